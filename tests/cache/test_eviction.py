"""The file's limit: the coldest go, nothing pinned does, and every record has its entry."""

import contextlib
from collections import Counter
from types import SimpleNamespace

import pytest
from embedding_proxy.cache.disk import eviction, purge
from embedding_proxy.cache.disk import write_batch as write_batch_module
from embedding_proxy.cache.disk.connection import folder_of, lock_of
from embedding_proxy.cache.disk.database import Database
from embedding_proxy.cache.disk.schema import PAGE_BYTES
from embedding_proxy.cache.disk.write_batch import PendingRecord, Use, WriteBatch
from embedding_proxy.cache.key import Partition
from embedding_proxy.cache.ledger import LedgerKey, Usage
from hypothesis import given, settings
from hypothesis import strategies as st

COMMON, OTHER, PINNED = (Partition(name, "m", 4) for name in ("", "other", "pinned"))
LIMIT = 40
"""Pages of a small store; some 15 are the schema's and the log's, the rest hold a record each."""
PAGEFUL = 30_000
LONG = 2 * eviction.TOUCH_MS / 1000
"""Seconds after which a use is written for certain."""


def _address(number):
    return number.to_bytes(16)


class Clock:
    """Seconds that pass only when told."""

    def __init__(self):
        self.now = 1_800_000_000.0

    @property
    def ms(self):
        return int(1000 * self.now)

    def time(self):
        return self.now


@contextlib.contextmanager
def _opened(directory, pages=LIMIT, pinned=("pinned",)):
    """Give the file of a store for this thread."""
    with contextlib.closing(lock_of(directory)) as lock:
        database = Database(folder_of(directory), pages * PAGE_BYTES, lock, pinned)
        try:
            yield database
        finally:
            database.close()


@pytest.fixture
def clock(monkeypatch):
    """Give a clock for what is written."""
    clock = Clock()
    monkeypatch.setattr(write_batch_module, "time", clock)
    return clock


def _put(database, numbers, partition=COMMON, size=PAGEFUL, **other):
    records = {_address(i): PendingRecord(bytes(size), partition) for i in numbers}
    database.write(WriteBatch(records=records, **other))


def _here(database):
    """Return the numbers of the records that are there, after checking each has its entry."""
    rows = database.sql("SELECT rowid, key FROM Cache").fetchall()
    ids = {id_ for (id_,) in database.sql("SELECT id FROM Entries")}
    assert {row for row, _ in rows} == ids
    ((count,),) = database.sql("SELECT value FROM Settings WHERE key = 'count'")
    assert count == len(rows)
    return {int.from_bytes(key) for _, key in rows}


def _pages(database):
    """Return the pages in the file, and how many of them are in use."""
    ((pages,),) = database.sql("PRAGMA page_count")
    ((free,),) = database.sql("PRAGMA freelist_count")
    return pages, pages - free


def test_the_one_unused_for_longest_goes_first(tmp_path, clock):
    """Neither the order of writing nor that of rows decides, but the last use that was written."""
    with _opened(tmp_path) as database:
        for i in range(12):
            clock.now += LONG
            _put(database, [i])
        clock.now += LONG
        database.write(WriteBatch(used={_address(i): Use(clock.ms, COMMON) for i in (0, 3, 4)}))
        gone = []
        for i in range(100, 120):
            clock.now += LONG
            before = _here(database)
            _put(database, [i])
            gone += sorted(before - _here(database))
        # At once some go for spare; those used again go only after all the others.
        order = [1, 2, *range(5, 12), 0, 3, 4]
        assert gone[:12] == [i for i in order if i in gone[:12]]
        assert set(gone[:9]) == set(order[:9])


def test_a_use_that_is_only_in_memory_protects(tmp_path, clock):
    """An entry whose use is not written yet stays, and gets the time of that use."""
    with _opened(tmp_path) as database:
        _put(database, range(12))
        recent = {_address(i): Use(clock.ms + 50_000, COMMON) for i in range(3)}
        for i in range(100, 120):
            clock.now += 1
            records = {_address(i): PendingRecord(bytes(PAGEFUL), COMMON)}
            database.write(WriteBatch(records=records), recent)
        assert {0, 1, 2} <= _here(database)
        assert not set(range(3, 9)) & _here(database)
        used = database.sql(
            "SELECT DISTINCT used FROM Entries JOIN Cache ON Cache.rowid = Entries.id"
            " WHERE key IN (?, ?, ?)",
            tuple(recent),
        ).fetchall()
        assert used == [(recent[_address(0)].at,)]


def test_a_use_in_the_same_transaction_protects(tmp_path, clock):
    """The uses that a transaction writes count for the room that it makes."""
    with _opened(tmp_path) as database:
        _put(database, range(12))
        for i in range(100, 120):
            clock.now += 1
            used = {_address(j): Use(clock.ms, COMMON) for j in range(3)}
            _put(database, [i], used=used)
        assert {0, 1, 2} <= _here(database)


def test_where_everything_was_just_used_there_is_still_room(tmp_path, clock):
    """Uses in memory protect, but the limit holds."""
    with _opened(tmp_path) as database:
        _put(database, range(12))
        recent = {_address(i): Use(clock.ms + 1_000_000, COMMON) for i in range(200)}
        for i in range(100, 130):
            clock.now += 1
            database.write(
                WriteBatch(records={_address(i): PendingRecord(bytes(PAGEFUL), COMMON)}), recent
            )
            assert i in _here(database)
            assert _pages(database)[1] <= LIMIT


def test_what_is_pinned_outlives_everything(tmp_path, clock):
    """Pinned entries stay, though they are the coldest."""
    with _opened(tmp_path) as database:
        _put(database, range(4), PINNED)
        for i in range(100, 150):
            clock.now += 100
            _put(database, [i])
            assert set(range(4)) <= _here(database)
            assert _pages(database)[1] <= LIMIT
    with _opened(tmp_path, pinned=()) as database:
        for i in range(200, 240):
            clock.now += 100
            _put(database, [i])
        assert not set(range(4)) & _here(database)


def test_a_store_full_of_what_is_pinned_takes_nothing_more(tmp_path, clock):
    """Then a write fails and says why; nothing pinned goes, and the file does not grow."""
    with _opened(tmp_path) as database:
        number = 0
        with contextlib.suppress(OSError):
            for number in range(100):
                clock.now += 100
                _put(database, [number], PINNED)
        assert 5 < number < LIMIT
        for partition in (COMMON, PINNED):
            with pytest.raises(OSError, match="full of what is pinned"):
                _put(database, [1000], partition)
        assert _here(database) == set(range(number))
        assert _pages(database)[0] <= LIMIT
        # What needs no room goes on.
        database.write(WriteBatch(used={_address(0): Use(clock.ms + 1_000_000, PINNED)}))
    with _opened(tmp_path, pages=2 * LIMIT) as database:
        _put(database, [1000])
        assert 1000 in _here(database)


def test_many_pinned_and_cold_entries_stop_no_write(tmp_path, clock):
    """A third of a full store is pinned and coldest: writes go on, and no pinned one goes."""
    with _opened(tmp_path, pages=160) as database:
        _put(database, range(250), PINNED, size=6000)
        for start in range(1000, 3000, 20):
            clock.now += 1
            _put(database, range(start, start + 20), size=6000)
            assert set(range(start, start + 20)) <= _here(database)
            assert _pages(database)[1] <= 160
        assert set(range(250)) <= _here(database)
        # Nobody used them: the time of their last use is that of their purchase.
        assert database.sql(
            "SELECT DISTINCT used FROM Entries JOIN Partitions ON Partitions.id = partition"
            " WHERE namespace = 'pinned'"
        ).fetchall() == [(1_800_000_000_000,)]


def test_where_all_was_just_used_and_something_is_pinned_writes_go_on(tmp_path, clock):
    """As with the drift checks' few entries, which are always pinned, in a small busy store."""
    with _opened(tmp_path) as database:
        _put(database, range(2), PINNED)
        for i in range(100, 160):
            clock.now += 1
            recent = {_address(n): Use(clock.ms, COMMON) for n in _here(database)}
            database.write(
                WriteBatch(records={_address(i): PendingRecord(bytes(PAGEFUL), COMMON)}), recent
            )
            assert {0, 1, i} <= _here(database)
            assert _pages(database)[1] <= LIMIT


def test_a_store_full_of_what_is_pinned_still_keeps_the_bill(tmp_path, clock):
    """The records are refused; their sums and the uses noted are written, and only once."""
    heading = LedgerKey(COMMON, "m", "p", "c")
    with _opened(tmp_path) as database:
        with contextlib.suppress(OSError):
            for number in range(100):
                _put(database, [number], PINNED)
        clock.now += LONG
        changes = WriteBatch(
            records={_address(1000): PendingRecord(bytes(PAGEFUL), COMMON)},
            usage={(1, heading): Usage(misses=1, tokens_billed=7)},
            used={_address(0): Use(clock.ms, PINNED)},
        )
        for _ in range(2):
            with pytest.raises(eviction.StoreFull):
                database.write(changes)
        assert database.sql("SELECT misses, tokens_billed FROM Usage").fetchall() == [(1, 7)]
        assert database.sql("SELECT max(used) FROM Entries").fetchall() == [(clock.ms,)]


def test_entries_colder_than_any_before_are_found(tmp_path, clock, monkeypatch):
    """What is entered with an old time of use, as by a repair, is not passed over for ever."""
    monkeypatch.setattr(eviction, "TRANSACTIONS_A_FULL_LOOK", 8)
    with _opened(tmp_path) as database:
        for i in range(30):
            clock.now += 1
            _put(database, [i])
        assert 29 in _here(database)
        database.sql("UPDATE Entries SET used = 5")
        for i in range(100, 140):
            clock.now += 1
            _put(database, [i])
            assert _pages(database)[1] <= LIMIT
        assert not set(range(30)) & _here(database)


@pytest.mark.parametrize("size", [0, 1, 100, 6184, 16_000, PAGEFUL, 40_000, 300_000])
def test_the_estimate_is_what_records_take(tmp_path, size):
    """As many pages are foreseen for records as they take, or a few more."""
    count = 50
    with _opened(tmp_path, pages=10_000) as database:
        _put(database, range(1000, 1010), size=size)
        _, before = _pages(database)
        _put(database, range(count), size=size)
        taken = _pages(database)[1] - before
    foreseen = eviction.pages_for([size] * count)
    assert taken <= foreseen <= 2 * taken + 8


def test_no_records_take_no_room():
    """Nothing is foreseen for a transaction without records."""
    assert eviction.pages_for([]) == 0
    assert eviction.pages_for([10, PAGEFUL]) == eviction.pages_for([PAGEFUL, 10])


def test_a_write_larger_than_the_limit_leaves_a_store_within_it(tmp_path, clock):
    """Of a batch that can never fit as much is kept as there is room for."""
    with _opened(tmp_path) as database:
        _put(database, range(10))
        clock.now += 100
        _put(database, range(100, 100 + 3 * LIMIT))
        assert _pages(database)[1] <= LIMIT
        clock.now += 100
        _put(database, [1000])
        assert _pages(database)[1] <= LIMIT
        assert 1000 in _here(database)
        assert not set(range(10)) & _here(database)


def test_what_lies_on_half_empty_pages_is_moved_together(tmp_path, clock):
    """When the coldest lie scattered, deleting them frees no page; what is left moves together."""
    with _opened(tmp_path, pages=64) as database:
        for start in range(0, 400, 10):
            _put(database, range(start, start + 10), size=3000)
        order = [i * 149 % 400 for i in range(400) if i * 149 % 400 in _here(database)]
        clock.now += LONG
        uses = {_address(i): Use(clock.ms + place, COMMON) for place, i in enumerate(order)}
        database.write(WriteBatch(used=uses))
        for start in range(1000, 1200, 10):
            clock.now += 1
            _put(database, range(start, start + 10), size=3000)
            assert _pages(database)[1] <= 64
        here = _here(database)
        old = len(here & set(range(400)))
        assert set(range(1000, 1200)) <= here
        assert here & set(range(400)) == set(order[-old:])
        assert old > 82  # 76 where nothing moves
        lengths = database.sql("SELECT DISTINCT length(value) FROM Cache").fetchall()
        assert lengths == [(3000,)]


def test_a_lowered_limit_is_reached(tmp_path, clock):
    """After the limit was lowered the next writes bring the pages in use down to it."""
    with _opened(tmp_path, pages=400) as database:
        _put(database, range(300))
        assert _pages(database)[1] > 300
    with _opened(tmp_path) as database:
        for i in range(1000, 1030):
            clock.now += 1
            _put(database, [i])
        assert _pages(database)[1] <= LIMIT
        assert set(range(1020, 1030)) <= _here(database)


def test_one_transaction_does_not_do_everything(tmp_path, clock, monkeypatch):
    """Bringing a large file under a low limit takes several transactions, each goes some way."""
    monkeypatch.setattr(eviction, "MOST_PAGES", 4)
    with _opened(tmp_path, pages=400, pinned=()) as database:
        _put(database, range(300))
    with _opened(tmp_path, pinned=()) as database:
        in_use = [_pages(database)[1]]
        while in_use[-1] > LIMIT:
            _put(database, [1000 + len(in_use)])
            in_use.append(_pages(database)[1])
            assert in_use[-2] - 60 < in_use[-1] < in_use[-2]
        assert len(in_use) > 3


def test_a_row_without_its_record_is_swept_up(tmp_path, clock):
    """An entry whose record someone else took away goes like any other."""
    with _opened(tmp_path) as database:
        database.sql("INSERT INTO Entries VALUES (1000000, NULL, 0, 0)")
        for i in range(40):
            clock.now += 1
            _put(database, [i])
        assert 39 in _here(database)


NUMBERS = st.sets(st.integers(0, 40), min_size=1, max_size=5)
PARTITIONS = st.sampled_from([COMMON, OTHER])
STEPS = st.lists(
    st.tuples(st.just("put"), PARTITIONS, NUMBERS)
    | st.tuples(st.just("put"), PARTITIONS, NUMBERS)
    | st.tuples(st.just("put"), st.just(PINNED), st.sets(st.integers(100, 103), min_size=1))
    | st.tuples(st.sampled_from(["delete", "use"]), PARTITIONS, NUMBERS)
    | st.tuples(st.just("purge"), st.sampled_from([COMMON, OTHER]), st.none())
    | st.tuples(st.sampled_from(["flush", "reopen"]), st.none(), st.none()),
    min_size=5,
    max_size=40,
)


class Rig:
    """A small store, and beside it a dict of what should be in it: partition and last use."""

    def __init__(self, directory, clock):
        self._directory = directory
        self._clock = clock
        self._stack = contextlib.ExitStack()
        self._rows = {}
        self._recent = {}
        self.reopen()

    def reopen(self, *_):
        self.close()
        self.database = self._stack.enter_context(_opened(self._directory))

    def close(self):
        self._stack.close()

    def put(self, partition, numbers):
        records = {_address(i): PendingRecord(bytes(PAGEFUL), partition) for i in numbers}
        self.database.write(WriteBatch(records=records), self._recent)
        self._rows.update(dict.fromkeys(numbers, (partition, self._clock.ms)))

    def delete(self, _, numbers):
        self.database.write(WriteBatch(deletions=[(_address(i), bytes(PAGEFUL)) for i in numbers]))
        for i in numbers:
            self._rows.pop(i, None)

    def purge(self, partition, _):
        chosen = purge.PurgeFilter(partition.namespace, partition.space)
        doomed = [i for i, row in self._rows.items() if row[0] == partition]
        assert purge.count_entries(self.database, chosen)[0] == len(doomed)
        assert sum(purge.delete(self.database, chosen)) == len(doomed)
        for i in doomed:
            del self._rows[i]
        pages, in_use = _pages(self.database)
        assert pages == in_use

    def use(self, partition, numbers):
        """Use some, in memory only."""
        self._recent.update({_address(i): Use(self._clock.ms, partition) for i in numbers})
        self._rows.update(
            {i: (self._rows[i][0], self._clock.ms) for i in numbers & self._rows.keys()}
        )

    def flush(self, *_):
        self.database.write(WriteBatch(used=dict(self._recent)))
        self._recent.clear()

    def check(self, room):
        """Check what is there; `room` is how many pages were left before."""
        here = _here(self.database)
        assert here <= self._rows.keys()
        evicted = {i: self._rows.pop(i) for i in self._rows.keys() - here}
        assert not any(partition == PINNED for partition, _ in evicted.values())
        others = [used for partition, used in self._rows.values() if partition != PINNED]
        assert not (evicted and others) or max(u for _, u in evicted.values()) <= min(others)
        assert not (evicted and room > 20)  # nothing goes while there is room
        assert _partitions(self.database) == Counter(p for p, _ in self._rows.values())
        assert _pages(self.database)[1] <= LIMIT


def _partitions(database):
    """Return how many entries there are of each partition."""
    rows = database.sql(
        "SELECT namespace, space, dimensions, count(*) FROM Entries"
        " JOIN Partitions ON Partitions.id = partition GROUP BY partition"
    )
    return {Partition(*row[:3]): row[3] for row in rows}


@pytest.mark.untraced
@settings(deadline=None, max_examples=25)
@given(steps=STEPS)
def test_entries_keep_in_step_with_records(tmp_path_factory, steps):
    """Whatever is put, deleted, used, purged and driven out: entries, sums and limit are right."""
    clock = Clock()
    with (
        pytest.MonkeyPatch.context() as patch,
        contextlib.closing(Rig(tmp_path_factory.mktemp("store"), clock)) as rig,
    ):
        patch.setattr(write_batch_module, "time", clock)
        for what, partition, numbers in steps:
            clock.now += LONG
            room = LIMIT - _pages(rig.database)[1]
            getattr(rig, what)(partition, numbers)
            rig.check(room)
            if what == "put":
                # An eviction goes by the times in the file, so have these in order again.
                rig.flush()
        assert rig.database.sql("PRAGMA integrity_check").fetchall() == [("ok",)]


def test_a_pinned_name_is_a_namespace_not_a_space(tmp_path, clock):
    """Only the namespace's own name pins, not a space's of that name, nor a longer name."""
    with _opened(tmp_path) as database:
        for i, partition in enumerate(
            [Partition("", "pinned", 4), Partition("pinned2", "m", 4), Partition("PINNED", "m", 4)]
        ):
            _put(database, [i], partition)
        for i in range(100, 150):
            clock.now += 100
            _put(database, [i])
        assert not {0, 1, 2} & _here(database)


def test_the_clock_may_stand_still(tmp_path, monkeypatch):
    """Where all entries have one time, the limit holds and what was just written is there."""
    monkeypatch.setattr(write_batch_module, "time", SimpleNamespace(time=lambda: 0.0))
    with _opened(tmp_path) as database:
        for i in range(100):
            _put(database, [i])
            assert i in _here(database)
            assert _pages(database)[1] <= LIMIT


def test_what_another_process_uses_again_and_again_stays(tmp_path, clock):
    """In a full store its uses are written often enough that who evicts knows of them."""
    with _opened(tmp_path) as mine, _opened(tmp_path) as theirs:
        _put(mine, range(3))
        for i in range(100, 200):
            clock.now += 10
            # One process only reads, and writes its uses now and then; the other only buys.
            theirs.write(WriteBatch(used={_address(n): Use(clock.ms, COMMON) for n in range(3)}))
            _put(mine, [i])
            assert {0, 1, 2, i} <= _here(mine)


def test_many_hot_entries_at_the_cold_end_all_stay(tmp_path, clock):
    """However many were used a moment ago without a note: they outlive what nobody asks for."""
    with _opened(tmp_path, pages=400) as database:
        hot = range(600)
        _put(database, hot, size=3000)
        recent = {}
        for start in range(1000, 9000, 20):
            clock.now += 1
            recent |= {_address(i): Use(clock.ms, COMMON) for i in hot}
            records = {
                _address(i): PendingRecord(bytes(3000), COMMON) for i in range(start, start + 20)
            }
            database.write(WriteBatch(records=records), recent)
        assert set(hot) <= _here(database)
        assert _pages(database)[1] <= 400
