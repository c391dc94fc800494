"""The write-ahead log is deleted under a running store: what was acknowledged is still there."""

import asyncio
import hashlib
import os
import signal
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest
from embedding_proxy.cache.disk import database
from embedding_proxy.cache.disk.connection import StoreError, lock_of, opened
from embedding_proxy.cache.disk.database import Database, LogHeld
from embedding_proxy.cache.disk.store import Store
from embedding_proxy.cache.key import Partition
from embedding_proxy.cache.ledger import By, LedgerKey, Usage
from embedding_proxy.cache.record import Entry, encode

from embedding_proxy import cache

GIB = 1 << 30
PARTITION = Partition("", "a/space", 96)
HEADING = LedgerKey(PARTITION, "model", "seller", "client")
PAID = Usage(misses=40, tokens_billed=280, nanodollars_billed=11)
DELETED = {
    "log": ["cache.db-wal"],
    "shared memory": ["cache.db-shm"],
    "both": ["cache.db-wal", "cache.db-shm"],
}

# A store of another process. It does what it is told, a line each, and says when it is done.
OTHER = """
import asyncio, sys
from pathlib import Path
from embedding_proxy.cache.disk.store import Store
from tests.cache.test_lost_log import HEADING, PAID, PARTITION, group

async def main():
    loop = asyncio.get_running_loop()
    async with Store(Path(sys.argv[1]), 1 << 30) as store:
        print("open", flush=True)
        while line := await loop.run_in_executor(None, sys.stdin.readline):
            what, _, number = line.strip().partition(" ")
            if what == "put":
                store.count(HEADING, PAID)
                print(await store.put_many(group(int(number)), PARTITION), flush=True)
            elif what == "get":
                print(len(await store.lookup(list(group(int(number))))), flush=True)

asyncio.run(main())
"""
# Opens and closes a store, and puts something, again and again.
IN_TURN = """
import asyncio, sys
from pathlib import Path
from embedding_proxy.cache.disk.store import Store
from tests.cache.test_lost_log import HEADING, PAID, PARTITION, group

async def main():
    for number in range(100):
        async with Store(Path(sys.argv[1]), 1 << 30) as store:
            store.count(HEADING, PAID)
            assert await store.put_many(group(int(sys.argv[2]) + number % 7), PARTITION)

asyncio.run(main())
"""
ROOT = Path(cache.__file__).parents[1]


def _record(number):
    digest = hashlib.blake2b(number.to_bytes(8, "big"), digest_size=16).digest()
    vector = hashlib.shake_128(digest).digest(4 * 96)
    return digest[::-1], encode(Entry(vector, 7, True, digest))  # noqa: FBT003


def group(number):
    """Return 40 records that no other number has."""
    return dict(map(_record, range(40 * number, 40 * number + 40)))


class Other:
    """A store of another process."""

    def __init__(self, directory):
        self.process = _started(OTHER, directory)
        assert self._said() == "open"

    def _said(self):
        return self.process.stdout.readline().strip()

    async def do(self, *what):
        """Have it do something; return what it says."""
        self.process.stdin.write(" ".join(map(str, what)) + "\n")
        self.process.stdin.flush()
        return await asyncio.to_thread(self._said)

    def kill(self):
        """End it as `kill -9` does."""
        os.kill(self.process.pid, signal.SIGKILL)
        self._ended()

    def stop(self):
        """Let it close its store."""
        self.process.stdin.close()
        self._ended()

    def _ended(self):
        self.process.wait()
        self.process.stdout.close()
        if not self.process.stdin.closed:
            self.process.stdin.close()


def _started(code, *arguments):
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


@pytest.fixture
def start():
    """Give a way to start stores of other processes, which end with the test."""
    started = []

    def start(directory):
        started.append(Other(directory))
        return started[-1]

    yield start
    for other in started:
        if other.process.poll() is None:
            other.kill()


def _delete(directory, what):
    for name in DELETED[what]:
        (directory / "v1" / name).unlink()


def _asides(directory):
    return sorted(directory.glob("v1.damaged-*"))


async def _assert_there(store, groups):
    """Each record at once and after the salvage, and the sums."""
    for _ in range(2):
        for number in range(groups):
            assert len(await store.lookup(list(group(number)))) == 40, number
        await store.salvaged()
    sums = Usage(*(groups * number for number in PAID))
    assert await store.ledger([By.MODEL]) == [(("model",), sums)]


@pytest.mark.parametrize("what", DELETED)
async def test_all_is_there_after_a_kill(tmp_path, start, what):
    """What was put before the log was deleted, and after, is on disk when the process is killed."""
    other = start(tmp_path)
    assert await other.do("put", 0) == "True"
    _delete(tmp_path, what)
    assert await other.do("put", 1) == "True"
    assert await other.do("put", 2) == "True"
    other.kill()
    async with Store(tmp_path, GIB) as store:
        await _assert_there(store, 3)
    assert len(_asides(tmp_path)) == 1


@pytest.mark.parametrize("what", DELETED)
async def test_all_of_two_processes_is_there_after_a_kill(tmp_path, start, what):
    """Both write before and after; the file is set aside once."""
    one, two = start(tmp_path), start(tmp_path)
    assert await one.do("put", 0) == "True"
    assert await two.do("put", 1) == "True"
    _delete(tmp_path, what)
    for other, number in ((one, 2), (two, 3), (one, 4), (two, 5)):
        assert await other.do("put", number) == "True"
    for number in range(6):
        assert await one.do("get", number) == "40"
        assert await two.do("get", number) == "40"
    one.kill()
    two.kill()
    async with Store(tmp_path, GIB) as store:
        await _assert_there(store, 6)
    assert len(_asides(tmp_path)) == 1


@pytest.mark.parametrize("what", DELETED)
async def test_a_process_that_opens_meanwhile_waits_until_the_log_is_saved(tmp_path, start, what):
    """The one that has the file open notices by itself; the other one finds everything."""
    async with Store(tmp_path, GIB) as store:
        store.count(HEADING, PAID)
        assert await store.put_many(group(0), PARTITION)
        _delete(tmp_path, what)
        other = await asyncio.to_thread(start, tmp_path)
        assert await other.do("put", 1) == "True"
        assert await other.do("get", 0) == "40"
        await store._tick(1)
        store.count(HEADING, PAID)
        assert await store.put_many(group(2), PARTITION)
        other.kill()
        await _assert_there(store, 3)
    async with Store(tmp_path, GIB) as store:
        await _assert_there(store, 3)
    assert len(_asides(tmp_path)) == 1


@pytest.mark.parametrize("what", DELETED)
async def test_a_store_notices_it_by_itself(tmp_path, what):
    """It does not wait for the next write."""
    async with Store(tmp_path, GIB) as store:
        store.count(HEADING, PAID)
        assert await store.put_many(group(0), PARTITION)
        old = store._disk.file
        _delete(tmp_path, what)
        await store._tick(1)
        assert store._disk.file is not old
        assert not store._disk.file.has_lost_log
        await _assert_there(store, 1)
    assert len(_asides(tmp_path)) == 1


async def test_two_stores_of_one_process(tmp_path):
    """Each notices it, the file is set aside once, and both find everything."""
    async with Store(tmp_path, GIB) as one, Store(tmp_path, GIB) as two:
        for number, store in enumerate((one, two)):
            store.count(HEADING, PAID)
            assert await store.put_many(group(number), PARTITION)
        _delete(tmp_path, "both")
        for number, store in enumerate((two, one), 2):
            store.count(HEADING, PAID)
            assert await store.put_many(group(number), PARTITION)
        for store in (one, two):
            await store._tick(1)
            await _assert_there(store, 4)
    assert len(_asides(tmp_path)) == 1


async def test_nothing_is_set_aside_while_a_reader_keeps_a_part_of_the_log(tmp_path, monkeypatch):
    """What cannot be saved yet waits, and so do writes; when the reader ends, all is there."""
    monkeypatch.setattr(database, "LOG_WAIT_MS", 1)
    async with Store(tmp_path, GIB) as store:
        store.count(HEADING, PAID)
        assert await store.put_many(group(0), PARTITION)
        path = tmp_path / "v1" / "cache.db"
        with closing(sqlite3.connect(path, isolation_level=None)) as reader:
            reader.execute("BEGIN")
            reader.execute("SELECT count(*) FROM Cache").fetchall()
            store.count(HEADING, PAID)
            assert await store.put_many(group(1), PARTITION)
            _delete(tmp_path, "log")
            store.count(HEADING, PAID)
            assert not await store.put_many(group(2), PARTITION)
            with pytest.raises(LogHeld):
                await store._disk.write(store._disk.file.save_log)
            assert _asides(tmp_path) == []
        store._writer.backoff.succeed()
        assert await store.flush_counts()
        await store._tick(10)
        await _assert_there(store, 3)
    assert len(_asides(tmp_path)) == 1


async def test_a_command_saves_the_log_when_it_ends(tmp_path):
    """It says what happened, and its file, closed, has all that it wrote."""

    def work():
        with opened(tmp_path, GIB, create=True) as file:
            with file.transaction() as connection:
                connection.execute("INSERT INTO Salvaged (name) VALUES ('a')")
            _delete(tmp_path, "both")
            with file.transaction():
                pass

    with pytest.raises(StoreError, match=database.LOG_DELETED):
        work()
    with opened(tmp_path, GIB) as file:
        assert file.sql("SELECT name FROM Salvaged").fetchall() == [("a",)]


async def test_a_file_whose_owner_does_not_notice_is_not_opened(tmp_path, monkeypatch):
    """A second log would destroy it: the error says what to do, and the file stays as it is."""
    monkeypatch.setattr(database, "OWNER_SECONDS", 0.0)
    with closing(lock_of(tmp_path)) as lock:
        owner = Database(tmp_path / "v1", GIB, lock)
        _delete(tmp_path, "both")
        with pytest.raises(sqlite3.OperationalError, match="stop that process"):
            Database(tmp_path / "v1", GIB, lock)
        assert not (tmp_path / "v1" / "cache.db-wal").exists()
        owner.close()
        Database(tmp_path / "v1", GIB, lock).close()


async def test_a_second_process_opens_a_file_behind_a_symbolic_link(tmp_path, start):
    """SQLite keeps the log beside the file that the link leads to."""
    async with Store(tmp_path, GIB):
        pass
    path = tmp_path / "v1" / "cache.db"
    path.rename(tmp_path / "elsewhere.db")
    path.symlink_to(tmp_path / "elsewhere.db")
    async with Store(tmp_path, GIB) as store:
        assert await store.put_many(group(0), PARTITION)
        other = await asyncio.to_thread(start, tmp_path)
        assert await other.do("get", 0) == "40"
        (tmp_path / "elsewhere.db-wal").unlink()
        assert store._disk.file.has_lost_log
        (tmp_path / "elsewhere.db-wal").touch()
        other.kill()


async def test_processes_that_open_and_close_in_turn_set_nothing_aside(tmp_path):
    """SQLite deletes the log whenever the last of them closes; that is no loss."""
    both = [_started(IN_TURN, tmp_path, start) for start in (0, 10)]
    for process in both:
        process.stdin.close()
        assert await asyncio.to_thread(process.wait) == 0
        process.stdout.close()
    assert _asides(tmp_path) == []
    async with Store(tmp_path, GIB) as store:
        sums = Usage(*(200 * number for number in PAID))
        assert await store.ledger([By.MODEL]) == [(("model",), sums)]
