"""kill -9 at random moments of a write load of two processes on one store, again and again.

python torture.py ROUNDS — the suite runs a few rounds, `make torture` two thousand. What was
acknowledged is noted in a log outside the store, and every round must find all of it, unharmed.
In the end the ledger must have the charge of every record that is there.
"""

import asyncio
import hashlib
import os
import random
import signal
import sqlite3
import sys
import tempfile
import time
from contextlib import closing
from pathlib import Path

from embedding_proxy.cache.disk.store import Store
from embedding_proxy.cache.key import Partition
from embedding_proxy.cache.ledger import LedgerKey, Usage

WRITERS = 2
SIZE_LIMIT = 1 << 40
ADDRESS_BYTES = 16
HEADING = LedgerKey(Partition("", "m", 1536), "m", "p")


def record_of(address: bytes) -> bytes:
    """Return the record that belongs to an address: 0.5 to 8 kB that follow from it."""
    size = 512 + 30 * address[0]
    return hashlib.shake_128(address).digest(size)


def write_for_ever(directory: Path, log: int, seed: int) -> None:
    """Write records in groups of one to twenty, and note each group once it is acknowledged."""
    chance = random.Random(seed)

    async def main() -> None:
        async with Store(directory, SIZE_LIMIT) as store:
            while True:
                addresses = [chance.randbytes(ADDRESS_BYTES) for _ in range(chance.randint(1, 20))]
                store.count(HEADING, Usage(misses=len(addresses)))
                if await store.put_many({address: record_of(address) for address in addresses}):
                    os.write(log, b"".join(addresses))

    asyncio.run(main())


def kill_writers(directory: Path, log_path: Path, chance: random.Random) -> None:
    """Let the writers run for up to 200 ms, and kill all of them."""
    log = os.open(log_path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    pids = []
    for _ in range(WRITERS):
        seed = chance.getrandbits(64)
        pid = os.fork()
        if pid == 0:
            write_for_ever(directory, log, seed)
        pids.append(pid)
    os.close(log)
    time.sleep(chance.uniform(0.01, 0.2))
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    for pid in pids:
        os.waitpid(pid, 0)


async def check(directory: Path, acknowledged: list[bytes]) -> tuple[int, int]:
    """Return how many acknowledged records are lost, and how many are wrong."""
    lost = wrong = 0
    async with Store(directory, SIZE_LIMIT) as store:
        for start in range(0, len(acknowledged), 5000):
            some = acknowledged[start : start + 5000]
            found = await store.lookup(some)
            lost += len(some) - len(found)
            wrong += sum(kept.record != record_of(address) for address, kept in found.items())
    return lost, wrong


def noted(log: Path, skip: int) -> list[bytes]:
    """Return the addresses in the log, but for the first `skip`."""
    data = log.read_bytes()
    starts = range(skip * ADDRESS_BYTES, len(data), ADDRESS_BYTES)
    return [data[start : start + ADDRESS_BYTES] for start in starts]


def torture(directory: Path, rounds: int, seed: int) -> tuple[int, int, int]:
    """Return how many records were acknowledged, lost and wrong; raise if the file is corrupt.

    So it does if a record is there without its charge.
    """
    chance = random.Random(seed)
    log_path = directory / "acknowledged"
    seen = lost = wrong = 0
    log_path.touch()
    for _ in range(rounds):
        kill_writers(directory, log_path, chance)
        new = noted(log_path, seen)
        missing, bad = asyncio.run(check(directory, new))
        seen, lost, wrong = seen + len(new), lost + missing, wrong + bad
    missing, bad = asyncio.run(check(directory, noted(log_path, 0)))
    (database,) = directory.glob("v*/cache.db")
    with closing(sqlite3.connect(database)) as connection:
        ((verdict,),) = connection.execute("PRAGMA integrity_check").fetchall()
        ((records, charged),) = connection.execute(
            "SELECT (SELECT count(*) FROM Cache), (SELECT sum(misses) FROM Usage)"
        ).fetchall()
    if verdict != "ok" or list(directory.glob("*.damaged-*")):
        raise RuntimeError(f"the file is corrupt: {verdict}")
    if not seen <= records <= charged:
        raise RuntimeError(f"{seen} acknowledged, {records} records, {charged} charged")
    return seen, lost + missing, wrong + bad


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        start = time.monotonic()
        count = int(sys.argv[1])
        told, lost, wrong = torture(Path(folder), count, seed=int(sys.argv[2]))
        seconds = time.monotonic() - start
        print(f"{count} kills, {told:,} acknowledged, {lost} lost, {wrong} wrong, {seconds:.0f} s")
        sys.exit(bool(lost or wrong))
