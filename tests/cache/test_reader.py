"""Reading from the store's file: at once where that is quick, else by a thread, and the same."""

import asyncio
import contextlib
import itertools
import sqlite3
import time
from unittest.mock import Mock

import pytest
from clock import Clock
from embedding_proxy.cache.disk import read_only
from embedding_proxy.cache.disk.connection import Disk
from embedding_proxy.cache.disk.read_only import SLOW_SECONDS, InlineReader
from embedding_proxy.cache.disk.reader import MAX_INLINE_RECORDS, Reader
from embedding_proxy.cache.disk.store import Store
from embedding_proxy.cache.disk.write_batch import PendingRecord, StoredRecord, WriteBatch
from embedding_proxy.cache.key import Partition
from embedding_proxy.providers.failure_backoff import MAX_SECONDS, MIN_SECONDS

GIB = 1 << 30
P = Partition("", "m", 4)


def _kept(numbers, stored=5.0):
    return {i.to_bytes(16): PendingRecord(bytes([i % 251]) * 500, P, stored) for i in numbers}


def _found(numbers, stored=5.0):
    return {a: StoredRecord(kept.record, stored) for a, kept in _kept(numbers, stored).items()}


def _addresses(numbers):
    return [i.to_bytes(16) for i in numbers]


@pytest.fixture
async def disk(tmp_path):
    """Give an open disk with a hundred records."""
    disk = Disk(tmp_path, GIB, ())
    await disk.open()
    await _write(disk, range(100))
    yield disk
    await disk.close()


async def _write(disk, numbers):
    await disk.write(lambda: disk.file.write(WriteBatch(records=_kept(numbers))))


async def _nobody(*_):
    pytest.fail("no file is damaged here")


@pytest.fixture
def reader(disk):
    """Give a reader of that disk, for a file that stays whole."""
    return Reader(disk, _nobody, _nobody)


@pytest.fixture
def by_thread(disk, monkeypatch):
    """Give a list of how many addresses each read in a thread was for."""
    lengths = []
    read = disk.file.read_many

    def noted(addresses, **options):
        lengths.append(len(addresses))
        return read(addresses, **options)

    monkeypatch.setattr(disk.file, "read_many", noted)
    return lengths


# --- a glance -------------------------------------------------------------------------------------


@pytest.mark.parametrize("not_before", [0.0, 5.0, 5.1])
async def test_both_ways_find_the_same(disk, not_before):
    """What is there, new enough, and nothing else."""
    asked = _addresses([3, 200, 99, 0])
    found = disk.inline_reader.get_many(asked, not_before=not_before)
    assert found == (_found([3, 99, 0]) if not_before <= 5 else {})
    assert found == disk.file.read_many(asked, not_before=not_before)


async def test_what_was_just_written_is_seen(disk):
    """A record is there for a glance as soon as it is on disk, and as it was written last."""
    assert disk.inline_reader.get_many(_addresses([7, 300])) == _found([7])
    await _write(disk, [300])
    assert disk.inline_reader.get_many(_addresses([7, 300])) == _found([7, 300])


async def test_after_a_slow_one_none_is_taken_for_a_while(disk, monkeypatch):
    """What it read is given; then comes a rest, longer each time the first one after is slow."""
    clock, reads = Clock(), itertools.count()
    monkeypatch.setattr(read_only, "_disk_reads", lambda: next(reads))

    def slow(*given):
        clock.now += 1.1 * SLOW_SECONDS
        return quick(*given)

    quick = read_only.read_many
    monkeypatch.setattr(read_only, "read_many", slow)
    with contextlib.closing(InlineReader(disk.file.path, clock)) as glance:
        rest = MIN_SECONDS
        for _ in range(8):
            assert glance.get_many(_addresses([1])) == _found([1])
            clock.now += rest - 0.01
            assert glance.get_many(_addresses([1])) is None
            clock.now += 0.02
            rest = min(2 * rest, MAX_SECONDS)
        monkeypatch.setattr(read_only, "read_many", quick)
        for _ in range(2):
            assert glance.get_many(_addresses([1])) == _found([1])
        monkeypatch.setattr(read_only, "read_many", slow)
        assert glance.get_many(_addresses([1])) == _found([1])
        assert glance.get_many(_addresses([1])) is None
        clock.now += MIN_SECONDS + 0.01
        assert glance.get_many(_addresses([1])) == _found([1])


@pytest.mark.parametrize(("disk_reads", "rests"), [(7, False), (None, True)])
async def test_what_was_slow_without_the_disk_does_not_count(disk, monkeypatch, disk_reads, rests):
    """The processor was busy elsewhere; where nobody knows, it may have been the disk."""
    clock = Clock()

    def slow(*given):
        clock.now += 1.1 * SLOW_SECONDS
        return quick(*given)

    quick = read_only.read_many
    monkeypatch.setattr(read_only, "read_many", slow)
    monkeypatch.setattr(read_only, "_disk_reads", lambda: disk_reads)
    with contextlib.closing(InlineReader(disk.file.path, clock)) as glance:
        for _ in range(3):
            assert glance.get_many(_addresses([1])) == _found([1])
            assert (glance.get_many(_addresses([1])) is None) == rests
            clock.now += MAX_SECONDS + 0.01


@pytest.mark.parametrize("error", [sqlite3.DatabaseError("malformed"), ValueError(), MemoryError()])
async def test_a_glance_that_fails_is_none_taken(disk, monkeypatch, error):
    """Whatever comes out of SQLite: the thread finds the same, and tells of it."""
    monkeypatch.setattr(read_only, "read_many", Mock(side_effect=error))
    assert disk.inline_reader.get_many(_addresses([1])) is None


async def test_a_lock_is_not_waited_for(disk, monkeypatch, reader):
    """While another has the file for itself the loop is not held up, and does not ask again."""
    assert disk.inline_reader._connection.execute("PRAGMA busy_timeout").fetchall() == [(0,)]
    with monkeypatch.context() as patch:
        patch.setattr(read_only, "read_many", _locked)
        assert disk.inline_reader.get_many(_addresses([1])) is None
    assert reader.lookup_nowait(_addresses([1]), 0.0) is None
    assert await reader.lookup(_addresses([1]), 0.0) == _found([1])


def _locked(*_):
    raise sqlite3.OperationalError("database is locked")


async def test_another_file_gets_another_glance(disk):
    """What stands at the path is read, not what was taken away."""
    old = disk.inline_reader
    await disk.replace(disk.file)
    assert disk.inline_reader is not old
    assert disk.inline_reader.get_many(_addresses([1])) == {}
    await _write(disk, [1])
    assert disk.inline_reader.get_many(_addresses([1])) == _found([1])


async def test_a_glance_that_cannot_be_had_is_done_without(tmp_path, monkeypatch):
    """The file is open all the same, whatever went wrong."""
    monkeypatch.setattr(
        "embedding_proxy.cache.disk.connection.InlineReader", Mock(side_effect=ValueError())
    )
    disk = Disk(tmp_path, GIB, ())
    await disk.open()
    assert (disk.file is None, disk.inline_reader) == (False, None)
    await disk.close()


# --- the reader -----------------------------------------------------------------------------------


async def test_few_are_read_at_once(reader, by_thread):
    """No thread is asked, neither for a few nor for as many as there are."""
    assert reader.lookup_nowait(_addresses([5, 400]), 0.0) == _found([5])
    assert await reader.lookup(_addresses(range(150)), 0.0) == _found(range(100))
    assert not by_thread


async def test_many_are_not_read_at_once(reader):
    """So many that others would have to wait are not even begun."""
    assert reader.lookup_nowait(_addresses(range(100)), 0.0) is None


async def test_others_get_their_turn_between(reader, monkeypatch):
    """Between a few and the next few, whoever is ready goes on."""
    monkeypatch.setattr(read_only, "SLOW_SECONDS", 1e9)
    turns = []

    async def other():
        while True:
            turns.append(1)
            await asyncio.sleep(0)

    task = asyncio.create_task(other())
    await reader.lookup(_addresses(range(100)), 0.0)
    task.cancel()
    assert len(turns) >= 100 // MAX_INLINE_RECORDS


@pytest.mark.parametrize("quick", [0, 1, 3])
async def test_what_is_slow_is_left_to_the_thread(disk, reader, by_thread, monkeypatch, quick):
    """From the first few that would be slow, all that is left is read by the thread, in one go."""
    glances = iter([True] * quick)
    glance = disk.inline_reader.get_many

    def some(addresses, *, not_before):
        return glance(addresses, not_before=not_before) if next(glances, False) else None

    monkeypatch.setattr(disk.inline_reader, "get_many", some)
    assert await reader.lookup(_addresses(range(150)), 0.0) == _found(range(100))
    assert by_thread == [150 - MAX_INLINE_RECORDS * quick]


async def test_without_a_glance_the_thread_reads(disk, reader, by_thread):
    """Where no second connection can be had, all is as ever."""
    disk.inline_reader.close()
    disk.inline_reader = None
    assert reader.lookup_nowait(_addresses([5]), 0.0) is None
    assert await reader.lookup(_addresses([5, 400]), 0.0) == _found([5])
    assert by_thread == [2]


async def test_a_file_that_keeps_failing_is_not_glanced_at(disk, reader):
    """Whoever waits for the thread's rest to end waits with this, too."""
    for _ in range(3):
        reader.backoff.fail()
    assert reader.lookup_nowait(_addresses([5]), 0.0) is None
    assert await reader.lookup(_addresses([5]), 0.0) == {}


async def test_a_store_gives_what_it_may(tmp_path, monkeypatch):
    """Nothing before it is opened, nor after it was closed; meanwhile, nothing that is too old."""
    store = Store(tmp_path, GIB, ttl_s=100)
    (address,) = _addresses([1])
    assert store.lookup_nowait([address]) is None
    async with store:
        await store.put_many({address: b"record"}, P)
        assert store.lookup_nowait([address])[address].record == b"record"
        later = time.time() + 101
        with monkeypatch.context() as patch:
            patch.setattr("embedding_proxy.cache.disk.store.time.time", lambda: later)
            assert store.lookup_nowait([address]) == {}
    assert store.lookup_nowait([address]) is None
