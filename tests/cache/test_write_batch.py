"""One transaction: what it writes is written together, and what it refuses leaves nothing."""

import contextlib
import math
from types import SimpleNamespace

import pytest
from embedding_proxy.cache.disk import write_batch as write_batch_module
from embedding_proxy.cache.disk.connection import folder_of, lock_of
from embedding_proxy.cache.disk.database import FAILURES, Database
from embedding_proxy.cache.disk.eviction import TOUCH_MS
from embedding_proxy.cache.disk.write_batch import PendingRecord, StoredRecord, Use, WriteBatch
from embedding_proxy.cache.key import Partition
from embedding_proxy.cache.ledger import LedgerKey, Usage
from hypothesis import given, settings
from hypothesis import strategies as st

GIB = 1 << 30
NOW = 1_800_000_000.0
HERE, THERE = Partition("", "m", 4), Partition("", "other", 4)
A, B, C = (bytes([i]) * 16 for i in (1, 2, 3))


@contextlib.contextmanager
def _opened(directory):
    """Give the file of a store for this thread."""
    with contextlib.closing(lock_of(directory)) as lock:
        database = Database(folder_of(directory), GIB, lock)
        try:
            yield database
        finally:
            database.close()


@pytest.fixture
def database(tmp_path, monkeypatch):
    """Give a file, and a clock for it that stands still."""
    monkeypatch.setattr(write_batch_module, "time", SimpleNamespace(time=lambda: NOW))
    with _opened(tmp_path) as database:
        yield database


def _entries(database):
    """Return partition, stored and used of every entry, by address."""
    rows = database.sql(
        "SELECT key, namespace, space, dimensions, stored, used FROM Entries"
        " JOIN Cache ON Cache.rowid = Entries.id LEFT JOIN Partitions ON Partitions.id = partition"
    )
    return {
        row[0]: (None if row[1] is None else Partition(*row[1:4]), *row[4:])
        for row in rows.fetchall()
    }


def _in_step(database):
    """Tell whether there is exactly one entry for each record."""
    rows, entries = (
        {id_ for (id_,) in database.sql(f"SELECT {name} FROM {table}")}
        for name, table in (("rowid", "Cache"), ("id", "Entries"))
    )
    return rows == entries


def test_a_record_gets_an_entry(database):
    """Each record has its partition, its time of purchase and that of its last use."""
    records = {
        A: PendingRecord(b"a", HERE),
        B: PendingRecord(b"b", THERE, 17.25),
        C: PendingRecord(b"c", None),
    }
    database.write(WriteBatch(records=records))
    now = int(1000 * NOW)
    assert _entries(database) == {
        A: (HERE, now, now),
        B: (THERE, 17_250, now),
        C: (None, now, now),
    }
    assert database.read_many([A, B, C]) == {
        A: StoredRecord(b"a", NOW),
        B: StoredRecord(b"b", 17.25),
        C: StoredRecord(b"c", NOW),
    }


def test_a_record_written_again_keeps_one_entry(database):
    """The newer record's partition and times are those of the entry."""
    database.write(WriteBatch(records={A: PendingRecord(b"old", HERE, 1.0)}))
    database.write(WriteBatch(records={A: PendingRecord(b"new", THERE, 2.0)}))
    assert _entries(database) == {A: (THERE, 2000, int(1000 * NOW))}
    assert _in_step(database)


def test_only_the_record_that_was_seen_is_deleted(database):
    """A record goes with its entry; one that was replaced since stays with its own."""
    database.write(WriteBatch(records={A: PendingRecord(b"a", HERE), B: PendingRecord(b"b", HERE)}))
    database.write(WriteBatch(deletions=[(A, b"a"), (B, b"not b"), (C, b"c")]))
    assert list(_entries(database)) == [B]
    assert _in_step(database)


def test_deleted_and_written_in_one_transaction_is_there(database):
    """What is dead goes first, so that the record that takes its place stays."""
    database.write(WriteBatch(records={A: PendingRecord(b"a", HERE)}))
    database.write(WriteBatch(records={A: PendingRecord(b"a", THERE)}, deletions=[(A, b"a")]))
    assert _entries(database)[A][0] == THERE
    assert _in_step(database)


@pytest.mark.parametrize("after", [-5 * TOUCH_MS, -1, 0, 1, TOUCH_MS, TOUCH_MS + 1, 9 * TOUCH_MS])
def test_a_use_is_written_if_the_last_one_is_a_while_ago(database, after):
    """A use soon after the last one written is not, and none makes an entry older."""
    database.write(WriteBatch(records={A: PendingRecord(b"a", HERE)}))
    was = int(1000 * NOW)
    database.write(WriteBatch(used={A: Use(was + after, HERE), B: Use(was, HERE)}))
    assert _entries(database) == {A: (HERE, was, was + after if after > TOUCH_MS else was)}


def test_a_use_tells_where_an_entry_belongs_only_if_nothing_did(database):
    """An entry of unknown partition takes that of its first use, and keeps it."""
    database.write(WriteBatch(records={A: PendingRecord(b"a", None)}))
    for partition, known in ((None, None), (HERE, HERE), (THERE, HERE), (None, HERE)):
        database.write(WriteBatch(used={A: Use(0, partition)}))
        assert _entries(database) == {A: (known, int(1000 * NOW), int(1000 * NOW))}


def test_sums_are_added_by_day_and_heading(database):
    """Each day and heading has sums of its own, and further counts add to them."""
    one, two = Usage(1, 2, 3, 4, 5, 6, 7, 8), Usage(hits=10, tokens_billed=1 << 40)
    lines = [
        *((day, LedgerKey(part)) for day, part in ((1, HERE), (1, THERE), (2, HERE))),
        *((1, LedgerKey(HERE, *names)) for names in ("mpc", "mp", "m", ("", "m"), ("", "", "m"))),
    ]
    for usage in (one, two, one):
        changes = WriteBatch()
        for day, heading in lines:
            changes.count(day, heading, usage)
            changes.count(day, heading, Usage())
        database.write(changes)
    rows = database.sql("SELECT * FROM Usage").fetchall()
    assert {Usage(*row[5:]) for row in rows} == {one.plus(two).plus(one)}
    assert len({row[:5] for row in rows}) == len(rows) == len(lines)
    assert {row[2:5] for row in rows} == {heading[1:] for _, heading in lines}


ODD = [
    Partition("", "", 0),
    Partition("a\0b", "m", 1),
    Partition("a", "m", 1),
    Partition("a\0c", "m", 1),
    Partition("'; DROP TABLE Cache; --", '"`[', 1),
    Partition("%", "_", 1),
    Partition("é", "m", 1),
    Partition("e\u0301", "m", 1),
    Partition("E", "M", 1),
    Partition("e", "m", 1),
    Partition("😀" * 2000, "m?x=~0d33762e87567f50", (1 << 63) - 1),
]


def test_odd_partitions_are_kept_apart(database):
    """Whatever stands in a name, each partition is one and stays the same when written again."""
    records = {bytes([i]) * 16: PendingRecord(b"x", partition) for i, partition in enumerate(ODD)}
    for _ in range(2):
        database.write(
            WriteBatch(records=records, usage={(1, LedgerKey(p)): Usage(hits=1) for p in ODD})
        )
        assert {a: entry[0] for a, entry in _entries(database).items()} == {
            a: kept.partition for a, kept in records.items()
        }
    assert database.sql("SELECT count(*) FROM Partitions").fetchall() == [(len(ODD),)]
    assert database.sql("SELECT count(*), min(hits) FROM Usage").fetchall() == [(len(ODD), 2)]


BAD = {
    "NaN": WriteBatch(
        records={A: PendingRecord(b"new", THERE), B: PendingRecord(b"b", THERE, math.nan)}
    ),
    "infinite": WriteBatch(
        records={A: PendingRecord(b"new", THERE), B: PendingRecord(b"b", THERE, math.inf)}
    ),
    "too large": WriteBatch(
        records={A: PendingRecord(b"new", THERE), B: PendingRecord(b"b", THERE, 1e30)}
    ),
    "half a pair": WriteBatch(
        records={
            A: PendingRecord(b"new", THERE),
            B: PendingRecord(b"b", Partition("\ud800", "m", 4)),
        }
    ),
    "dimensions": WriteBatch(
        records={A: PendingRecord(b"n", THERE), B: PendingRecord(b"", Partition("", "", 1 << 63))}
    ),
    "a use": WriteBatch(records={A: PendingRecord(b"new", THERE)}, used={A: Use(1 << 63, HERE)}),
    "a sum": WriteBatch(
        records={A: PendingRecord(b"new", THERE)},
        deletions=[(A, b"a")],
        usage={(1, LedgerKey(THERE)): Usage(hits=1), (1, LedgerKey(HERE)): Usage(hits=1 << 63)},
    ),
}


@pytest.mark.parametrize("bad", BAD)
def test_what_cannot_be_written_leaves_nothing(database, bad):
    """One bad thing keeps out all that came with it, and what was there is as it was."""
    database.write(WriteBatch(records={A: PendingRecord(b"a", HERE)}))
    tables = ("Cache", "Entries", "Partitions", "Usage", "Settings", "Purges")

    def everything():
        return [database.sql(f"SELECT * FROM {table}").fetchall() for table in tables]

    before = everything()
    with pytest.raises((ValueError, OverflowError, *FAILURES)):
        database.write(BAD[bad])
    assert everything() == before
    # The number that the partition would have had is another's now.
    database.write(WriteBatch(records={C: PendingRecord(b"c", Partition("new", "m", 4))}))
    database.write(WriteBatch(records={B: PendingRecord(b"b", THERE)}))
    assert {a: entry[0] for a, entry in _entries(database).items()} == {
        A: HERE,
        B: THERE,
        C: Partition("new", "m", 4),
    }
    assert _in_step(database)


@pytest.mark.parametrize("stored", [-1.5, 0.0, 0.001, 4e9])
def test_any_finite_time_is_kept(database, stored):
    """Records from before 1970 or from the future come back with their time."""
    database.write(WriteBatch(records={A: PendingRecord(b"a", HERE, stored)}))
    found = database.read_many([A], not_before=-10.0)
    assert found == {A: StoredRecord(b"a", stored)}
    assert _entries(database)[A][1] == int(1000 * stored)


def test_no_changes_change_nothing(database):
    """The empty transaction succeeds, and names no partition."""
    database.write(WriteBatch())
    assert database.sql("SELECT count(*) FROM Partitions").fetchall() == [(0,)]
    assert _in_step(database)


def test_a_huge_transaction_is_one(database):
    """Many thousands of records and uses go in at once."""
    addresses = [i.to_bytes(16) for i in range(12_000)]
    database.write(
        WriteBatch(
            records={a: PendingRecord(a, HERE) for a in addresses},
            used={a: Use(int(1000 * NOW) + 2 * TOUCH_MS, THERE) for a in addresses},
        )
    )
    assert database.read_many(addresses).keys() == set(addresses)
    assert set(_entries(database).values()) == {
        (HERE, int(1000 * NOW), int(1000 * NOW) + 2 * TOUCH_MS)
    }


@pytest.mark.parametrize("spoilt", ["record", "entry"])
def test_an_entry_has_the_time_of_the_record_that_is_there(spoilt, database):
    """Also where an older record takes the place of a damaged one, or an entry is missing."""
    database.write(WriteBatch(records={A: PendingRecord(b"first", HERE, NOW)}))
    if spoilt == "record":
        database.sql("UPDATE Cache SET mode = 4, value = 'text'")
    else:
        database.sql("DELETE FROM Entries")
    database.write(
        WriteBatch(records={A: PendingRecord(b"second", HERE, NOW - 1)}, keep_newer=True)
    )
    found = database.read_many([A])[A]
    assert found.record == (b"second" if spoilt == "record" else b"first")
    assert _entries(database) == {A: (HERE, int(1000 * found.stored), int(1000 * NOW))}


STEPS = st.lists(
    st.tuples(
        st.dictionaries(
            st.sampled_from([A, B, C]),
            st.builds(
                PendingRecord,
                st.binary(max_size=3),
                st.sampled_from([HERE, THERE, None]),
                st.none() | st.integers(-5, 5).map(float),
            ),
        ),
        st.lists(st.tuples(st.sampled_from([A, B, C]), st.binary(max_size=3)), max_size=2),
        st.dictionaries(
            st.sampled_from([A, B, C]),
            st.builds(
                Use,
                st.integers(-3, 3).map(lambda n: int(1000 * NOW) + n * TOUCH_MS),
                st.sampled_from([HERE, THERE, None]),
            ),
        ),
        st.booleans(),
    ),
    max_size=8,
)


@settings(deadline=None, max_examples=30)
@given(steps=STEPS)
def test_any_sequence_agrees_with_a_model(tmp_path_factory, steps):
    """Records, partitions and times are those of a dict; what is rolled back is as if never."""
    now = int(1000 * NOW)
    model = {}
    with (
        pytest.MonkeyPatch.context() as patch,
        _opened(tmp_path_factory.mktemp("store")) as database,
    ):
        patch.setattr(write_batch_module, "time", SimpleNamespace(time=lambda: NOW))
        for records, dead, used, fails in steps:
            changes = WriteBatch(records=dict(records), deletions=list(dead), used=dict(used))
            if fails:
                changes.count(0, LedgerKey(THERE), Usage(hits=1 << 63))
                with pytest.raises(OverflowError):
                    database.write(changes)
            else:
                database.write(changes)
                for address, record in dead:
                    if address in model and model[address][0] == record:
                        del model[address]
                for address, kept in records.items():
                    stored = NOW if kept.stored is None else kept.stored
                    before = model[address][1] if address in model else None
                    model[address] = [kept.record, kept.partition or before, stored, now]
                for address, use in used.items():
                    row = model.get(address)
                    if row and (row[1] is None or row[3] < use.at - TOUCH_MS):
                        row[1], row[3] = row[1] or use.partition, max(row[3], use.at)
            found = database.read_many([A, B, C], not_before=-10.0)
            assert found == {a: StoredRecord(row[0], row[2]) for a, row in model.items()}
            assert _entries(database) == {
                a: (row[1], int(1000 * row[2]), row[3]) for a, row in model.items()
            }
            assert _in_step(database)
