"""Writing together: each is told what became of its own, whoever fails or goes away."""

import asyncio
import sqlite3

import diskcache
import pytest
from embedding_proxy.cache.disk import writer as pending_module
from embedding_proxy.cache.disk.database import FileReplaced
from embedding_proxy.cache.disk.eviction import StoreFull
from embedding_proxy.cache.disk.write_batch import PendingRecord, Use
from embedding_proxy.cache.disk.writer import Writer
from embedding_proxy.cache.key import Partition
from embedding_proxy.cache.ledger import LedgerKey, Usage
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.cache.fakes import Turnstile, settle

P = Partition("", "m", 4)


def _address(number):
    return number.to_bytes(16)


class FakeFile:
    """What a Database does with changes, in a dict; `failure` gives the error to raise, if any."""

    def __init__(self):
        self.records = {}
        self.hits = 0
        self.sizes = []
        self.failure = lambda _: None
        self.most_bytes = 1 << 30
        self.uses_last_room = False

    def write(self, changes, _=None):
        self.sizes.append(len(changes.records))
        error = self.failure(changes)
        if error is not None:
            raise error
        for address, record in changes.deletions:
            if self.records.get(address) == record:
                del self.records[address]
        self.records.update({a: kept.record for a, kept in changes.records.items()})
        self.hits += sum(usage.hits for usage in changes.usage.values())


class FakeDisk:
    """A Disk of fake files whose writing thread a test can hold."""

    def __init__(self):
        self.file = FakeFile()
        self.gate = Turnstile()
        self.replaced = 0
        self.can_open = True

    async def write(self, work):
        await self.gate.through()
        return work()

    async def replace(self, old):
        if self.file is old:
            self.replaced += 1
            self.file = FakeFile() if self.can_open else None
            if not self.can_open:
                raise OSError("no")


class Rig:
    """A writer over a fake disk."""

    def __init__(self):
        self.disk = FakeDisk()
        self.writer = Writer(self.disk)

    def put(self, number, record=b"record"):
        """Start writing a record, as a task."""
        self.writer.pending.changes.records[_address(number)] = PendingRecord(record, P)
        return asyncio.create_task(self.writer.commit())

    @property
    def backlog(self):
        return {int.from_bytes(address) for address in self.writer.pending.backlog}

    @property
    def numbers(self):
        return {int.from_bytes(address) for address in self.disk.file.records}


@pytest.fixture
def rig():
    """Give a writer over a fake disk."""
    return Rig()


async def _told(*tasks):
    async with asyncio.timeout(60):
        return await asyncio.gather(*tasks)


async def test_all_that_waits_is_one_transaction(rig):
    """What comes while one transaction is written goes into the next, however much it is."""
    rig.disk.gate.shut()
    tasks = [rig.put(0)]
    await settle()
    tasks += [rig.put(i) for i in range(1, 100)]
    await settle()
    rig.disk.gate.open()
    assert await _told(*tasks) == [True] * 100
    assert rig.disk.file.sizes == [1, 99]
    assert rig.numbers == set(range(100))


async def test_nobody_is_told_before_it_is_written(rig):
    """Each waits for its own transaction, not for another's."""
    rig.disk.gate.shut()
    first = rig.put(1)
    await settle()
    second = rig.put(2)
    await settle()
    assert not first.done()
    rig.disk.gate.let()
    await settle()
    assert (first.done(), second.done()) == (True, False)
    assert rig.numbers == {1}
    rig.disk.gate.let()
    assert await _told(first, second) == [True, True]


@pytest.mark.parametrize("when", ["before", "during"])
async def test_one_who_goes_away_leaves_the_write(rig, when):
    """A waiter that is cancelled takes neither its own record with it nor another's."""
    rig.disk.gate.shut()
    if when == "before":
        rig.put(0)
        await settle()
    tasks = [rig.put(1), rig.put(2)]
    await settle()
    tasks[0].cancel()
    await settle()
    assert tasks[0].cancelled()
    rig.disk.gate.open()
    assert await _told(tasks[1]) == [True]
    await rig.writer.finish()
    assert {1, 2} <= rig.numbers


async def test_all_may_go_away(rig):
    """With nobody waiting any more the write is made all the same, and the next one too."""
    rig.disk.gate.shut()
    for task in [rig.put(i) for i in range(3)]:
        await settle()
        task.cancel()
    await settle()
    rig.disk.gate.open()
    assert await _told(rig.put(3)) == [True]
    assert rig.numbers == {0, 1, 2, 3}


@pytest.mark.parametrize(
    "error", [ValueError("a defect"), TypeError("a defect"), MemoryError(), KeyError(1)], ids=repr
)
async def test_a_defect_fails_who_waits_and_nobody_else(rig, caplog, error):
    """An error that nobody foresaw is told as a failure, logged whole, and the writer goes on."""
    rig.disk.gate.shut()
    rig.disk.file.failure = lambda changes: error if _address(1) in changes.records else None
    first, later = rig.put(1), None
    await settle()
    later = rig.put(2)
    await settle()
    rig.disk.gate.open()
    assert await _told(first, later) == [False, True]
    assert await _told(rig.put(3)) == [True]
    assert {2, 3} <= rig.numbers
    assert [r.exc_info[1] for r in caplog.records if r.exc_info] == [error]


FAILURES = [
    sqlite3.OperationalError("disk I/O error"),
    sqlite3.IntegrityError("refused"),
    diskcache.Timeout(),
    TimeoutError("another process keeps writing to the store"),
    OSError("the file system is nearly full; nothing is written"),
]


@pytest.mark.parametrize("error", FAILURES, ids=repr)
async def test_what_fails_is_kept_and_written_later(rig, caplog, error):
    """A failure of the moment is told, the record waits in memory, and goes with the next flush."""
    rig.disk.file.failure = lambda _: error
    assert await _told(rig.put(1), rig.put(2)) == [False, False]
    assert rig.disk.replaced == 0
    assert rig.backlog == {1, 2}
    assert "wait in memory: 2: " in caplog.text
    assert not caplog.text.rstrip().endswith(":")
    rig.disk.file.failure = lambda _: None
    await rig.writer.flush()
    assert (rig.numbers, rig.backlog) == ({1, 2}, set())


@pytest.mark.parametrize(
    "error",
    [
        sqlite3.DatabaseError("file is not a database"),
        sqlite3.OperationalError("no such table: Cache"),
        FileReplaced("the file was taken away"),
    ],
    ids=repr,
)
async def test_a_file_that_is_done_for_is_replaced_and_written_anew(rig, error):
    """The write that finds the file unusable goes into a fresh one, and nobody is told of it."""
    old = rig.disk.file
    old.failure = lambda _: error
    assert await _told(rig.put(1)) == [True]
    assert rig.disk.replaced == 1
    assert rig.disk.file is not old
    assert rig.numbers == {1}


async def test_a_fresh_file_that_fails_too_is_not_replaced_again(rig):
    """One replacement a write is enough; then the record waits."""
    rig.disk.file.failure = lambda _: sqlite3.DatabaseError("file is not a database")
    made = FakeFile.__init__

    def also_failing(self):
        made(self)
        self.failure = lambda _: sqlite3.DatabaseError("file is not a database")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FakeFile, "__init__", also_failing)
        assert await _told(rig.put(1)) == [False]
    assert rig.disk.replaced == 1
    assert rig.backlog == {1}


async def test_without_a_file_everything_waits(rig):
    """When no fresh file can be opened either, records and sums wait for one."""
    rig.disk.file.failure = lambda _: FileReplaced("gone")
    rig.disk.can_open = False
    rig.writer.pending.changes.count(1, LedgerKey(P), Usage(hits=3))
    assert await _told(rig.put(1)) == [False]
    assert (rig.disk.file, rig.writer.ready, rig.backlog) == (None, False, {1})
    assert await _told(rig.put(2)) == [False]
    rig.disk.file = FakeFile()
    await rig.writer.flush()
    assert (rig.numbers, rig.disk.file.hits) == ({1, 2}, 3)


async def test_three_failures_are_followed_by_a_rest(rig):
    """Then nothing is flushed until the rest is over."""
    rig.disk.file.failure = lambda _: OSError("no")
    for number in range(3):
        assert rig.writer.ready
        await _told(rig.put(number))
    assert not rig.writer.ready
    tries = len(rig.disk.file.sizes)
    await rig.writer.flush()
    assert len(rig.disk.file.sizes) == tries
    rig.disk.file.failure = lambda _: None
    rig.writer.backoff._until = 0.0
    await rig.writer.flush()
    assert (rig.numbers, rig.backlog) == ({0, 1, 2}, set())


async def test_a_flush_stops_at_the_first_failure(rig, monkeypatch):
    """What can wait is tried a transaction at a time, and not again and again."""
    monkeypatch.setattr(pending_module, "USES_A_WRITE", 1)
    rig.writer.pending.uses.note([_address(i) for i in range(5)], Use(1, P))
    rig.disk.file.failure = lambda _: OSError("no")
    await rig.writer.flush()
    assert len(rig.disk.file.sizes) == 1
    rig.disk.file.failure = lambda _: None
    await rig.writer.flush()
    assert rig.writer.pending.take_deferred() is None


async def test_finishing_writes_all_there_is(rig):
    """What is being written, what waits and what could wait is on disk in the end."""
    rig.disk.file.failure = lambda _: OSError("no")
    await _told(rig.put(1))
    rig.disk.file.failure = lambda _: None
    rig.disk.gate.shut()
    waiting = [rig.put(2)]
    await settle()
    waiting.append(rig.put(3))
    rig.writer.pending.changes.count(1, LedgerKey(P), Usage(hits=1))
    rig.writer.pending.uses.note([_address(1)], Use(1, P))
    await settle()
    finishing = asyncio.create_task(rig.writer.finish())
    await settle()
    assert not finishing.done()
    rig.disk.gate.open()
    await _told(finishing)
    assert await _told(*waiting) == [True, True]
    assert (rig.numbers, rig.disk.file.hits, rig.backlog) == ({1, 2, 3}, 1, set())
    assert rig.writer.pending.take_deferred() is None


async def test_a_write_that_fails_at_the_end_is_made_once_more(rig):
    """What is being written when the end comes is waited for: nobody else would repeat it."""
    rig.disk.gate.shut()
    waiting = rig.put(1)
    await settle()
    finishing = asyncio.create_task(rig.writer.finish())
    await settle()
    assert not finishing.done()
    errors = iter([OSError("no")])
    rig.disk.file.failure = lambda _: next(errors, None)
    rig.disk.gate.open()
    await _told(finishing)
    assert await _told(waiting) == [False]
    assert rig.numbers == {1}


async def test_sums_do_not_share_the_fate_of_a_record_that_cannot_be_kept(rig):
    """Where a record fails the transaction, what was paid is written without it, and once."""
    rig.disk.file.failure = lambda changes: OSError("no") if changes.records else None
    rig.writer.pending.changes.count(1, LedgerKey(P), Usage(hits=3))
    assert await _told(rig.put(1)) == [False]
    assert rig.disk.file.hits == 3
    assert rig.backlog == {1}
    rig.disk.file.failure = lambda _: None
    await rig.writer.finish()
    assert (rig.disk.file.hits, rig.numbers) == (3, {1})


@pytest.mark.parametrize("error", [TimeoutError("locked"), diskcache.Timeout("locked")])
async def test_sums_wait_with_the_record_where_the_file_is_locked(rig, error):
    """A second wait for the same lock would hold up those who wait, and come to nothing."""
    rig.disk.file.failure = lambda _: error
    rig.writer.pending.changes.count(1, LedgerKey(P), Usage(hits=3))
    assert await _told(rig.put(1)) == [False]
    assert rig.disk.file.sizes == [1]
    rig.disk.file.failure = lambda _: None
    await rig.writer.finish()
    assert (rig.disk.file.hits, rig.numbers) == (3, {1})


async def test_a_full_store_is_not_left_alone_and_said_once(rig, caplog):
    """Each write goes to the file, which keeps the sums of it; the log tells why once a while."""
    rig.disk.file.failure = lambda _: StoreFull("the store is full of what is pinned")
    for number in range(5):
        assert await _told(rig.put(number)) == [False]
    assert rig.writer.ready
    assert len(rig.disk.file.sizes) == 5
    assert caplog.text.count("full of what is pinned") == 1


async def test_what_is_lost_in_the_end_is_said(rig, caplog):
    """A backlog that no disk took is an error in the log, with its number."""
    rig.disk.file.failure = lambda _: OSError("no")
    await _told(rig.put(1), rig.put(2))
    await rig.writer.finish()
    assert "2 records could not be kept on disk" in caplog.text


async def test_at_the_end_it_is_tried_again_and_with_the_last_room(rig):
    """A lock that somebody holds a little longer, or the room kept free, costs nothing paid for."""
    file = rig.disk.file
    file.failure = lambda _: None if file.uses_last_room else OSError("nearly full")
    assert await _told(rig.put(1)) == [False]
    await rig.writer.finish()
    assert rig.numbers == {1}
    errors = [TimeoutError("locked"), TimeoutError("locked")]
    file.failure = lambda _: errors.pop() if errors else None
    assert await _told(rig.put(2)) == [False]
    await rig.writer.finish()
    assert rig.numbers == {1, 2}


STEPS = st.lists(
    st.sampled_from(["put", "count", "flush", "let", "cancel", "fail", "recover", "break"]),
    max_size=30,
)


@settings(deadline=None)
@given(STEPS)
async def test_in_any_order_nothing_is_lost_or_counted_twice(steps):
    """Whatever fails on the way: in the end every record is on disk, every count is there once."""
    rig, tasks, counted, flushes = Rig(), [], 0, []
    everything = {}
    rig.disk.gate.shut()
    for number, step in enumerate(steps):
        rig.writer.backoff.succeed()
        if step == "put":
            tasks.append((number, rig.put(number)))
        elif step == "count":
            counted += 1
            rig.writer.pending.changes.count(1, LedgerKey(P), Usage(hits=1))
        elif step == "flush":
            flushes.append(asyncio.create_task(rig.writer.flush()))
        elif step == "let" and rig.disk.gate.held:
            rig.disk.gate.let()
        elif step == "cancel" and tasks:
            tasks[-1][1].cancel()
        elif step in ("fail", "recover"):
            error = OSError("no") if step == "fail" else None
            rig.disk.file.failure = lambda _, error=error: error
        elif step == "break":
            # What is in a file that was taken away is gone; only what was told matters no more.
            everything |= dict.fromkeys(rig.numbers)
            lost, rig.disk.file.failure = rig.disk.file, lambda _: FileReplaced("gone")
            counted -= lost.hits
            lost.hits = 0
        await settle()
    rig.disk.gate.open()
    await asyncio.gather(*(task for _, task in tasks), *flushes, return_exceptions=True)
    if rig.disk.file.failure(None) is not None:
        everything |= dict.fromkeys(rig.numbers)
        rig.disk.file.failure = lambda _: None
    rig.writer.backoff.succeed()
    await rig.writer.finish()
    assert rig.numbers | everything.keys() == {number for number, _ in tasks}
    assert rig.disk.file.hits == counted
    assert rig.writer.pending.changes.usage == {}
    told = {number for number, task in tasks if not task.cancelled() and task.result()}
    assert told <= rig.numbers | everything.keys()
