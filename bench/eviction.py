"""What eviction costs a hit: p99 at the limit against p99 below it, as ratios of one run.

python bench/eviction.py [ROUNDS] — single hits, from memory and from disk, while nobody writes,
while a writer adds records and there is room, and while it adds as many and the coldest must go.
Rounds alternate between the three, so that a change in the machine's speed falls on all alike.
"""

import asyncio
import json
import os
import random
import statistics
import sys
import tempfile
import time
from contextlib import AsyncExitStack
from pathlib import Path

from embedding_proxy.cache.disk.store import Store
from embedding_proxy.cache.key import Keys, keyring
from embedding_proxy.cache.memory import Memory
from embedding_proxy.cache.record import Entry
from embedding_proxy.cache.tiers import Tiers
from embedding_proxy.providers.base import Space

LIMIT = 128 << 20
ROOM = 1 << 40
HOT = 500
READS = 400
"""Hits a round; some rounds give thousands for each p99."""
BATCH = 50
WRITE_EVERY_S = 0.02
"""So long a writer waits between two writes: some 2,500 vectors a second."""
SPACE = Space("bench/eviction", 1536)
RING = keyring(SPACE)
LOADS = ("nobody writes", "room", "at the limit")


def entries(word: str, count: int) -> dict:
    """Return entries by key; the vectors are all the same."""
    keys = [RING.key(f"{word} {i}") for i in range(count)]
    vector = bytes(4 * SPACE.dimensions)
    return {key: Entry(vector, tokens=1, counted=True, digest=key.digest) for key in keys}


class Writer:
    """Adds records to a store until it is told to stop."""

    def __init__(self, tiers: Tiers, name: str) -> None:
        self._tiers = tiers
        self._name = name
        self.written = 0

    async def add(self, count: int) -> None:
        """Add some at once."""
        new = entries(f"{self._name} {self.written}", count)
        await self._tiers.put_many(new, RING.partition)
        self.written += count

    async def run(self) -> None:
        """Add some now and then."""
        while True:
            await self.add(BATCH)
            await asyncio.sleep(WRITE_EVERY_S)


async def hits(tiers: Tiers, keys: list, chance: random.Random) -> list[float]:
    """Return the milliseconds that single hits took."""
    taken = []
    for _ in range(READS):
        key = chance.choice(keys)
        start = time.perf_counter()
        lookup = await tiers.lookup(Keys.from_keys([key]), RING.partition)
        taken.append(1e3 * (time.perf_counter() - start))
        if lookup.missing:
            raise RuntimeError("what is read again and again was evicted")
    return taken


def p99(values: list[float]) -> float:
    """Return the 99th percentile."""
    return statistics.quantiles(values, n=100)[98]


async def measure(folder: Path, rounds: int) -> dict[str, dict[str, float]]:
    """Return percentiles by tier and load, and how large the full file was at most."""
    chance = random.Random(1)  # noqa: S311 - the same choices in every run
    hot = entries("hot", HOT)
    keys = list(hot)
    taken = {(tier, load): [] for tier in ("disk", "memory") for load in LOADS}
    async with AsyncExitStack() as stack:
        stores = {
            load: await stack.enter_async_context(
                Store(folder / load, LIMIT if load == LOADS[2] else ROOM)
            )
            for load in LOADS
        }
        disk = {load: Tiers(Memory(0), store) for load, store in stores.items()}
        # The hits are not to leave memory for what is added.
        memory = {load: Tiers(Memory(1 << 30), store) for load, store in stores.items()}
        writers = {load: Writer(disk[load], load) for load in LOADS}
        for load, tiers in disk.items():
            await tiers.put_many(hot, RING.partition)
            await memory[load].lookup(Keys.from_keys(keys), RING.partition)
            # All three files are as large; only one of them may grow no further.
            for _ in range(LIMIT // 6184 // 500):
                await writers[load].add(500)
                await tiers.lookup(Keys.from_keys(keys), RING.partition)
        files = [stores[LOADS[2]].folder / name for name in ("cache.db", "cache.db-wal")]
        most = 0
        for _ in range(rounds):
            for tier, by_load in (("disk", disk), ("memory", memory)):
                for load in chance.sample(LOADS, len(LOADS)):
                    writing = None
                    if load != LOADS[0]:
                        writing = asyncio.create_task(writers[load].run())
                        await asyncio.sleep(WRITE_EVERY_S)
                    # Memory hits alone would be over before anything is written.
                    for _ in range(1 if tier == "disk" else 20):
                        taken[tier, load] += await hits(by_load[load], keys, chance)
                        await asyncio.sleep(0)
                    if writing is not None:
                        writing.cancel()
                        await asyncio.wait([writing])
                    most = max(most, sum(file.stat().st_size for file in files))
    rows: dict[str, dict[str, float]] = {}
    for tier in ("disk", "memory"):
        tails = {load: p99(taken[tier, load]) for load in LOADS}
        rows[f"{tier} hit"] = {
            **{f"p99 ms, {load}": round(tail, 4) for load, tail in tails.items()},
            "at the limit / room": round(tails["at the limit"] / tails["room"], 2),
            "at the limit / nobody writes": round(tails["at the limit"] / tails[LOADS[0]], 2),
            "hits": len(taken[tier, LOADS[0]]),
        }
    rows["written"] = {load: writer.commit for load, writer in writers.items()}
    rows["file and log / limit"] = {"most": round(most / LIMIT, 3)}
    return rows


def main() -> None:
    """Measure, and print JSON."""
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 20
    with tempfile.TemporaryDirectory(dir=os.environ.get("BENCH_DIR")) as name:
        print(json.dumps(asyncio.run(measure(Path(name), rounds)), indent=2))


if __name__ == "__main__":
    main()
