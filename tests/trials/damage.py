"""Bits flipped, files cut, at random: nothing wrong is served, nothing fails, the rest still hits.

python damage.py FLIPS CUTS SEED — the suite runs a few, `make damage` ten thousand and one
thousand. Each round takes a good store, harms its database or its write-ahead log in one place,
opens it, asks for everything, and writes and reads something new.
"""

import asyncio
import hashlib
import logging
import random
import shutil
import sys
import tempfile
from collections import Counter
from pathlib import Path

from embedding_proxy.cache.disk.store import Store
from embedding_proxy.cache.key import Key, keyring
from embedding_proxy.cache.memory import Memory
from embedding_proxy.cache.record import Entry
from embedding_proxy.cache.tiers import Tiers
from embedding_proxy.providers.base import Space

from tests.cache.fakes import entries_in

SPACE = Space("damaged/space", 96)
RECORDS = 400
A_COMMIT = 10
"""Records a commit to the log: one each would make nearly all of it old versions of pages."""
SIZE_LIMIT = 1 << 30


def entry_of(key: Key) -> Entry:
    """Return the entry that belongs to a key."""
    vector = hashlib.shake_128(key.digest).digest(4 * SPACE.dimensions)
    return Entry(vector, tokens=7, counted=True, digest=key.digest)


KEYS = [keyring(SPACE).key(f"input {i}") for i in range(RECORDS)]
PARTITION = keyring(SPACE).partition
NEW = keyring(SPACE).key("something new")


async def prepare(folder: Path) -> Path:
    """Return a store of which half lies in the database and half still in the log."""
    good = folder / "good"
    async with Store(folder / "made", SIZE_LIMIT) as store:
        tiers = Tiers(Memory(0), store)
        await tiers.put_many({key: entry_of(key) for key in KEYS[: RECORDS // 2]}, PARTITION)
    async with Store(folder / "made", SIZE_LIMIT) as store:
        tiers = Tiers(Memory(0), store)
        for start in range(RECORDS // 2, RECORDS, A_COMMIT):
            some = KEYS[start : start + A_COMMIT]
            await tiers.put_many({key: entry_of(key) for key in some}, PARTITION)
        # As a kill would leave it: the log has not been merged.
        shutil.copytree(folder / "made", good)
    for shared in good.rglob("*-shm"):
        shared.unlink()
    return good


def harm(directory: Path, how: str, chance: random.Random) -> None:
    """Flip one bit of the database or its log, or cut it somewhere."""
    path = chance.choice(sorted(directory.glob("v*/cache.db*")))
    size = path.stat().st_size
    with path.open("r+b") as file:
        if how == "cut":
            file.truncate(chance.randrange(size))
            return
        file.seek(chance.randrange(size))
        byte = file.read(1)[0]
        file.seek(-1, 1)
        file.write(bytes([byte ^ 1 << chance.randrange(8)]))


async def use(directory: Path) -> Counter[str]:
    """Ask for everything, then write and read something new; return what came of it."""
    seen: Counter[str] = Counter()
    async with Store(directory, SIZE_LIMIT) as store:
        tiers = Tiers(Memory(0), store)
        found = await entries_in(tiers, KEYS, PARTITION)
        seen["hits"] = len(found)
        seen["wrong"] = sum(entry != entry_of(key) for key, entry in found.items())
        await tiers.put_many({NEW: entry_of(NEW)}, PARTITION)
        again = await entries_in(tiers, [NEW], PARTITION)
        seen["not written"] = again != {NEW: entry_of(NEW)}
    return seen


def damage(folder: Path, rounds: dict[str, int], seed: int) -> Counter[str]:
    """Return the sums over all rounds."""
    chance = random.Random(seed)
    good = asyncio.run(prepare(folder))
    total: Counter[str] = Counter()
    for how, count in rounds.items():
        for _ in range(count):
            victim = folder / "victim"
            shutil.copytree(good, victim)
            harm(victim, how, chance)
            total.update(asyncio.run(use(victim)))
            shutil.rmtree(victim)
    return total


if __name__ == "__main__":
    logging.disable()
    flips, cuts, seed = map(int, sys.argv[1:])
    with tempfile.TemporaryDirectory() as name:
        total = damage(Path(name), {"flip": flips, "cut": cuts}, seed)
    share = total["hits"] / ((flips + cuts) * RECORDS)
    print(
        f"{flips} flips, {cuts} cuts, {total['wrong']} wrong, {total['not written']} not written,"
        f" {share:.1%} hits"
    )
    sys.exit(bool(total["wrong"] or total["not written"]))
