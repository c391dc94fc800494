"""What is said of a store: every entry and every use once, under the partition it belongs to."""

import hashlib
import time

import pytest
from embedding_proxy.cache.disk import connection
from embedding_proxy.cache.disk.write_batch import PendingRecord, WriteBatch
from embedding_proxy.cache.key import Partition
from embedding_proxy.cache.ledger import LedgerKey, Usage
from embedding_proxy.cache.maintenance import stats
from embedding_proxy.cache.record import Entry, encode

GIB = 1 << 30
HERE = Partition("", "a/space", 4)
PARAMETERS = Partition("", "a/space?task=~12549ea7d2d841ef", 4)
THERE = Partition("tenant ü", "a/space", 6)
DAY = 20_000


@pytest.fixture
def database(tmp_path):
    """Give the file of an empty store."""
    with connection.opened(tmp_path, GIB, create=True) as file:
        yield file


def _put(database, numbers, partition, stored, used):
    """Keep a record under each number; all are bought at one time and used at another."""
    width = partition.dimensions if partition else 2
    kept = {}
    for number in numbers:
        digest = hashlib.blake2b(number.to_bytes(8, "big"), digest_size=16).digest()
        entry = Entry(digest[:4] * width, 7, counted=True, digest=digest)
        kept[digest] = PendingRecord(encode(entry), partition, stored)
    database.write(WriteBatch(records=kept))
    marks = ",".join("?" * len(kept))
    database.sql(
        f"UPDATE Entries SET used = ? WHERE id IN (SELECT rowid FROM Cache WHERE key IN ({marks}))",
        (int(1000 * used), *kept),
    )


def _by_partition(database):
    return {one.partition: one for one in stats.gather(database).held}


def test_an_empty_store_has_empty_sums(database):
    """Nothing kept and nothing counted: zeros, and no day since which was counted."""
    found = stats.gather(database)
    assert (found.held, found.since_day, found.entries) == ((), None, 0)
    assert (found.usage, found.usage.hit_rate) == (Usage(), 0.0)


def test_entries_are_summed_by_partition(database):
    """Number, bytes of the records and times are each partition's own."""
    _put(database, range(3), HERE, 1_000.25, 5_000)
    _put(database, range(3, 5), HERE, 2_000.5, 4_000)
    _put(database, range(5, 6), PARAMETERS, 3_000, 6_000)
    _put(database, range(6, 10), THERE, 500, 7_000.125)
    kept = [len(record) for (record,) in database.sql("SELECT value FROM Cache")]
    found = _by_partition(database)
    assert found == {
        HERE: stats.Held(HERE, 5, 5 * 56, 1_000.25, 2_000.5, 5_000, Usage()),
        PARAMETERS: stats.Held(PARAMETERS, 1, 56, 3_000, 3_000, 6_000, Usage()),
        THERE: stats.Held(THERE, 4, 4 * 64, 500, 500, 7_000.125, Usage()),
    }
    assert sum(one.bytes for one in found.values()) == sum(kept)
    assert stats.gather(database).entries == 10


def test_entries_of_unknown_partition_are_counted_too(database):
    """What an early version wrote stands in a line of its own until it is used."""
    _put(database, range(2), None, 1_000, 1_000)
    _put(database, range(2, 3), HERE, 1_000, 1_000)
    found = _by_partition(database)
    assert {partition: one.entries for partition, one in found.items()} == {
        stats.UNKNOWN: 2,
        HERE: 1,
    }


def test_uses_are_summed_over_the_days(database):
    """All days of a partition are one sum, and the sums of all partitions the total."""
    counted = {
        (DAY, LedgerKey(HERE, "m", "p")): Usage(1, 2, 3, 4, 50, 60, 7, 8),
        (DAY + 1, LedgerKey(HERE, client="c")): Usage(10, 20, 30, 40, 500, 600, 70, 80),
        (DAY + 2, LedgerKey(THERE)): Usage(hits=5, tokens_saved=7),
    }
    database.write(WriteBatch(usage=counted))
    _put(database, range(1), HERE, 1_000, 1_000)
    found = stats.gather(database)
    held = {one.partition: one for one in found.held}
    assert held[HERE].usage == Usage(11, 22, 33, 44, 550, 660, 77, 88)
    assert held[HERE].entries == 1
    assert held[THERE] == stats.Held(THERE, 0, 0, None, None, None, Usage(5, tokens_saved=7))
    assert found.usage == Usage(16, 22, 33, 44, 557, 660, 77, 88)
    assert found.since_day == DAY
    assert found.usage.hit_rate == pytest.approx(1 - 33 / 115)


def test_the_size_on_disk_is_that_of_the_file_and_its_log(database):
    """What is still in the log counts; the index to it, which is memory, does not."""
    _put(database, range(100), HERE, time.time(), time.time())
    log = database.path.with_name(f"{database.path.name}-wal")
    index = database.path.with_name(f"{database.path.name}-shm")
    sizes = [path.stat().st_size for path in (database.path, log, index)]
    assert all(sizes)
    assert stats.gather(database).file_bytes == sum(sizes[:2])


def test_ages_are_found_by_the_indexes_alone(database, tmp_path):
    """Of the oldest entry, in whatever partition, and of the one that is unused for longest."""
    assert stats.read_age(tmp_path) is None
    for number, partition in enumerate((HERE, None, THERE, PARAMETERS)):
        _put(database, [2 * number, 2 * number + 1], partition, 3000.0 - number, 9000.0 + number)
    assert stats.read_age(tmp_path) == (2997.0, 9000.0)
    _put(database, [8], None, 2000.0, 9500.0)
    assert stats.read_age(tmp_path) == (2000.0, 9000.0)
    for query in (
        "SELECT min(stored) FROM Entries WHERE partition IS 1",
        "SELECT min(used) FROM Entries",
    ):
        ((*_, how),) = database.sql(f"EXPLAIN QUERY PLAN {query}").fetchall()
        assert "COVERING INDEX Entries_" in how
    assert stats.read_age(tmp_path / "nowhere") is None
