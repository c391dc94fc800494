"""Rows out of a store and into one: what is whole goes, as it is, and nothing is replaced."""

import hashlib
import itertools
import math
import sqlite3
import struct
import time

import pytest
from embedding_proxy.cache.disk import connection
from embedding_proxy.cache.disk.purge import PurgeFilter
from embedding_proxy.cache.key import Partition, Row
from embedding_proxy.cache.maintenance import archive
from embedding_proxy.cache.record import Entry, encode

GIB = 1 << 30
HERE = Partition("", "a/space", 4)
PARAMETERS = Partition("", "a/space?task=~12549ea7d2d841ef", 4)
LIKE = Partition("", "a/space-2", 4)
THERE = Partition("tenant ü %", "a/space", 6)
PARTITIONS = (HERE, PARAMETERS, LIKE, THERE, None)


def _row(number, partition=HERE, stored=1_000.5, tokens=7):
    digest = hashlib.blake2b(number.to_bytes(8, "big"), digest_size=16).digest()
    width = partition.dimensions if partition else 2
    vector = struct.pack("<I", number) * width
    return Row(digest, encode(Entry(vector, tokens, True, digest)), stored, partition)  # noqa: FBT003


ROWS = [_row(i, PARTITIONS[i % 5], 1_000 + i / 4) for i in range(50)]


@pytest.fixture
def opened(tmp_path):
    """Give a function that opens a store by name, a new one if need be."""
    return lambda name="one": connection.opened(tmp_path / name, GIB, create=True)


def _put(database, rows, **options):
    sums = archive.ImportReport()
    for sums in archive.import_rows(database, rows, **options):  # noqa: B007 - the last one counts
        pass
    return sums


def _read(database, **choice):
    report = archive.ExportReport()
    return list(archive.export_rows(database, PurgeFilter(**choice), report)), report.damaged


def test_rows_come_out_as_they_went_in(opened):
    """Address, record, time and partition survive, in the order of the store."""
    with opened() as database:
        assert _put(database, ROWS) == archive.ImportReport(stored=50)
        assert _read(database) == (ROWS, 0)
    with opened() as database, opened("two") as other:
        assert _put(other, _read(database)[0]) == archive.ImportReport(stored=50)
        assert _read(other) == (ROWS, 0)


def test_more_rows_than_a_batch_come_once_each(opened, monkeypatch):
    """However many rows a batch has, none is left out and none comes twice."""
    for size in (1, 7, 49, 50, 51):
        monkeypatch.setattr(archive, "ROWS_A_BATCH", size)
        with opened(f"by {size}") as database:
            seen = [(sums.stored, sums.present) for sums in archive.import_rows(database, ROWS)]
            assert len(seen) == math.ceil(50 / size)
            assert _read(database) == (ROWS, 0)


@pytest.mark.parametrize(
    ("choice", "partitions"),
    [
        ({}, PARTITIONS),
        ({"namespace": ""}, (HERE, PARAMETERS, LIKE)),
        ({"namespace": "tenant ü %"}, (THERE,)),
        ({"namespace": "tenant"}, ()),
        ({"space": "a/space"}, (HERE, PARAMETERS, THERE)),
        ({"space": "a/space?task=~12549ea7d2d841ef"}, (PARAMETERS,)),
        ({"space": "a/spac_"}, ()),
        ({"space": "a/space", "namespace": ""}, (HERE, PARAMETERS)),
    ],
)
def test_only_the_chosen_partitions_come(choice, partitions, opened):
    """A namespace is itself, a space its parameters too, and no sign in them stands for others."""
    with opened() as database:
        _put(database, ROWS)
        found, damaged = _read(database, **choice)
    assert found == [row for row in ROWS if row.partition in partitions]
    assert damaged == 0


@pytest.mark.parametrize(
    "damage",
    [
        "value = zeroblob(length(value))",
        "value = substr(value, 1, length(value) - 1)",
        "value = x''",
        "value = NULL",
        "value = 7",
        "value = 'text'",
        "mode = 4",
        "mode = NULL",
        "raw = 0",
        "key = x'00'",
        "key = 'sixteen letters!'",
    ],
)
def test_a_damaged_row_is_left_out_and_counted(damage, opened):
    """What does not verify, claims to be a pickle or has no address does not come out."""
    with opened() as database:
        _put(database, ROWS[:10])
        database.sql(f"UPDATE Cache SET {damage} WHERE key = ?", (ROWS[3].address,))
        assert _read(database) == (ROWS[:3] + ROWS[4:10], 1)


def test_a_partition_of_another_width_is_not_believed(opened):
    """A row whose record is whole, but no vector of its partition, comes without one."""
    with opened() as database:
        _put(database, [_row(1)])
        database.sql("UPDATE Partitions SET dimensions = 5")
        assert _read(database) == ([_row(1, HERE)._replace(partition=None)], 0)
    with opened("two") as other:
        odd = _row(1)._replace(partition=Partition("", "a/space", 5))
        assert _put(other, [odd]) == archive.ImportReport(stored=1)
        assert _read(other) == ([odd._replace(partition=None)], 0)


def test_a_row_that_nobody_entered_comes_all_the_same(opened):
    """Without its row in `Entries` a record still has a time, and no partition."""
    with opened() as database:
        _put(database, ROWS[:2])
        database.sql("DELETE FROM Entries")
        assert _read(database) == ([row._replace(partition=None) for row in ROWS[:2]], 0)


def test_what_is_there_stays(opened):
    """A row of an address that is taken is not written, whatever it says."""
    mine, theirs = _row(1, tokens=1), _row(1, THERE, stored=2_000, tokens=2)
    with opened() as database:
        _put(database, [mine])
        assert _put(database, [theirs, _row(2)]) == archive.ImportReport(stored=1, present=1)
        assert _read(database) == ([mine, _row(2)], 0)


def test_what_is_there_and_damaged_is_replaced(opened):
    """A record that could not be served makes room for one that can."""
    with opened() as database:
        _put(database, ROWS[:2])
        database.sql("UPDATE Cache SET value = x'00' WHERE key = ?", (ROWS[0].address,))
        database.sql("UPDATE Cache SET mode = 4 WHERE key = ?", (ROWS[1].address,))
        assert _put(database, ROWS[:2]) == archive.ImportReport(stored=2)
        rows, damaged = _read(database)
        assert (sorted(rows), damaged) == (sorted(ROWS[:2]), 0)


def test_a_row_that_does_not_verify_is_refused(opened):
    """It is counted, and does not get in the way of those beside it."""
    bad = ROWS[1]._replace(record=ROWS[1].record[:-1] + b"\0")
    with opened() as database:
        sums = _put(database, [ROWS[0], bad, ROWS[2]._replace(record=b""), ROWS[3]])
        assert sums == archive.ImportReport(stored=2, refused=2)
        assert _read(database) == ([ROWS[0], ROWS[3]], 0)


@pytest.mark.parametrize("stored", [math.nan, math.inf, -math.inf, -1.0, 1e18])
def test_a_time_that_cannot_be_is_now(stored, opened):
    """Nothing was bought before 1970, or in times to come; such an entry is new."""
    with opened() as database:
        before = int(1000 * time.time()) / 1000
        _put(database, [_row(1, stored=stored)])
        ((row,), _) = _read(database)
        assert before <= row.stored <= time.time()
        assert before <= database.read_many([row.address])[row.address].stored <= time.time()


def test_the_time_of_purchase_is_kept_for_all_who_look(opened):
    """The age that expiry goes by is the same in both tables; a row taken in was used now."""
    with opened() as database:
        before = int(1000 * time.time())
        _put(database, [_row(1)])
        assert database.read_many([_row(1).address], not_before=1_000.5)
        assert not database.read_many([_row(1).address], not_before=1_001)
        ((stored, used),) = database.sql("SELECT stored, used FROM Entries")
        assert stored == 1_000_500
        assert used >= before


def test_a_dry_run_writes_nothing(opened):
    """The sums are those of the real run; the store stays as it was."""
    with opened() as database:
        _put(database, ROWS[:10])
        sums = _put(database, ROWS[5:20], dry_run=True)
        assert sums == archive.ImportReport(stored=10, present=5)
        assert _read(database) == (ROWS[:10], 0)


def test_what_came_before_a_failure_of_the_source_stays(opened, monkeypatch):
    """The batches that were whole are in when the source fails, and the failure is raised."""
    monkeypatch.setattr(archive, "ROWS_A_BATCH", 10)

    def failing():
        yield from ROWS[:25]
        raise LookupError("torn")

    with opened() as database:
        with pytest.raises(LookupError, match="torn"):
            _put(database, failing())
        found, _ = _read(database)
    assert found[:20] == ROWS[:20]
    assert found == ROWS[: len(found)]


def test_others_write_meanwhile(opened, monkeypatch):
    """Between batches nothing is locked: what is written behind the reader comes, too."""
    monkeypatch.setattr(archive, "ROWS_A_BATCH", 10)
    with opened() as database, opened() as other:
        _put(database, ROWS[:20])
        found = archive.export_rows(database, PurgeFilter(), archive.ExportReport())
        first = list(itertools.islice(found, 10))
        _put(other, ROWS[20:30])
        assert first + list(found) == ROWS[:30]


def test_a_store_that_cannot_be_read_is_no_short_one(opened):
    """A failure on the way is raised, and does not look like the end."""
    with opened() as database:
        _put(database, ROWS)
        found = archive.export_rows(database, PurgeFilter(), archive.ExportReport())
        database.sql("ALTER TABLE Cache RENAME TO Elsewhere")
        with pytest.raises(sqlite3.OperationalError, match="no such table"):
            next(found)
