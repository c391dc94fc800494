"""Commands on a store beside a writer: its write-ahead log stays within its limit and one step."""

import hashlib
import sqlite3
import struct
import threading
from contextlib import closing

import pytest
from embedding_proxy.cache.disk import connection
from embedding_proxy.cache.disk.purge import PurgeFilter
from embedding_proxy.cache.disk.schema import PAGE_BYTES
from embedding_proxy.cache.key import Partition, Row
from embedding_proxy.cache.maintenance import archive, backup, stats, verify
from embedding_proxy.cache.maintenance.short_reads import LogWatch, id_ranges
from embedding_proxy.cache.maintenance.verify import Findings
from embedding_proxy.cache.record import Entry, encode

LIMIT = 64 << 20
"""Of the store; its log has a fiftieth."""
LOG_PAGES = LIMIT // PAGE_BYTES // 50
MAX_WRITES_A_STEP = 3
HERE, THERE = Partition("", "a/space", 64), Partition("tenant", "a/space", 64)


def _row(number):
    digest = hashlib.blake2b(number.to_bytes(8, "big"), digest_size=16).digest()
    vector = struct.pack("<I", number) * 64
    record = encode(Entry(vector, 7, counted=True, digest=digest))
    return Row(digest, record, 1_000.5 + number, THERE if number % 100 == 0 else HERE)


ROWS = [_row(i) for i in range(2_000)]


class Writer:
    """A process that writes a record whenever it is let, and sees how large the log becomes."""

    def __init__(self, path):
        self.connection = sqlite3.connect(path, isolation_level=None)
        self.connection.execute(f"PRAGMA wal_autocheckpoint = {LOG_PAGES}")
        self.connection.execute(f"PRAGMA journal_size_limit = {LOG_PAGES * PAGE_BYTES}")
        self.connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        self.log = path.with_name(f"{path.name}-wal")
        self.writes = self.most_bytes = self.bytes_a_write = 0
        self.max_writes = 10_000
        self.max_writes_when_watched = 10_000
        self.is_writing = False

    def write(self, *_):
        """Write one record in one transaction, unless this is called while one is written."""
        if self.is_writing or self.writes >= self.max_writes:
            return
        self.is_writing = True
        row = _row(1_000_000 + self.writes)
        self.connection.execute("BEGIN IMMEDIATE")
        self.connection.execute(
            "INSERT INTO Cache (key, raw, store_time, access_time, mode, value)"
            " VALUES (?, 1, 0, 0, 1, ?)",
            (row.address, row.record),
        )
        self.connection.execute("INSERT INTO Entries VALUES (last_insert_rowid(), 1, 0, 0)")
        self.connection.execute("COMMIT")
        before, self.most_bytes = self.most_bytes, max(self.most_bytes, self.size)
        self.bytes_a_write = max(self.bytes_a_write, self.most_bytes - before)
        self.writes += 1
        self.is_writing = False

    @property
    def size(self):
        """The size of the log."""
        return self.log.stat().st_size

    def beside(self, reader, instructions):
        """Write whenever another connection's statements have made so many instructions."""

        def write():
            self.write()
            return 0

        reader.set_progress_handler(write, instructions)

    def check(self):
        """Check that the log has kept its limit."""
        step = MAX_WRITES_A_STEP * self.bytes_a_write
        assert self.most_bytes <= LOG_PAGES * (PAGE_BYTES + 24) + 32 + step


@pytest.fixture
def database(tmp_path):
    """Give a store of some rows."""
    with connection.opened(tmp_path / "store", LIMIT, create=True) as file:
        list(archive.import_rows(file, ROWS))
        yield file


@pytest.fixture
def writer(database, monkeypatch):
    """Give a writer that writes in each pause that a command makes for others."""
    writer = Writer(database.path)
    monkeypatch.setattr("time.sleep", writer.write)
    with closing(writer.connection):
        yield writer


def test_stats_let_the_log_begin_anew(database, writer, monkeypatch):
    """While the entries are counted somebody writes all the time."""
    monkeypatch.setattr(stats, "ROWS_A_STEP", 50, raising=False)
    writer.beside(database.cache._con, 1_000)
    found = stats.gather(database)
    database.cache._con.set_progress_handler(None, 0)
    assert found.entries == len(ROWS)
    assert writer.writes > 20
    writer.check()


def test_a_backup_lets_the_log_begin_anew(database, writer, monkeypatch, tmp_path):
    """While it is made somebody writes all the time, and it has all that was there before."""
    monkeypatch.setattr(backup, "MAX_ROWS_A_STEP", 100, raising=False)
    monkeypatch.setattr(backup, "MAX_KEYS_A_STEP", 100, raising=False)
    monkeypatch.setattr(backup, "PAGES_A_STEP", 1, raising=False)
    writer.max_writes = 200
    backup.copy(database, tmp_path / "copy.db", writer.write)
    assert writer.writes > 20
    writer.check()
    with closing(sqlite3.connect(tmp_path / "copy.db")) as copy:
        keys = {key for (key,) in copy.execute("SELECT key FROM Cache")}
    assert keys >= {row.address for row in ROWS}


def test_an_export_of_few_lets_the_log_begin_anew(database, writer, monkeypatch):
    """Entries that are far from one another are looked for in steps, too."""
    monkeypatch.setattr(archive, "ENTRIES_A_RANGE", 50, raising=False)
    writer.beside(database.cache._con, 1_000)
    found = list(
        archive.export_rows(database, PurgeFilter(namespace="tenant"), archive.ExportReport())
    )
    database.cache._con.set_progress_handler(None, 0)
    assert found == [row for row in ROWS if row.partition == THERE]
    assert writer.writes > 5
    writer.check()


class Interrupted(sqlite3.Connection):
    """A connection that tells when it is interrupted."""

    was_interrupted = threading.Event()
    interrupts = 0

    def interrupt(self):
        """Interrupt, and tell."""
        super().interrupt()
        Interrupted.interrupts += 1
        self.was_interrupted.set()


@pytest.fixture
def watched(database, writer, monkeypatch):
    """Let the writer write while SQLite checks the structure, until it is interrupted."""
    Interrupted.interrupts = 0
    limit = LOG_PAGES * PAGE_BYTES

    def connect(file):
        made = sqlite3.connect(
            file.address,
            uri=True,
            isolation_level=None,
            check_same_thread=False,
            factory=Interrupted,
        )

        def write():
            before = writer.writes
            writer.write()
            if writer.writes > before and LogWatch(database).used_bytes() >= limit * 7 // 8:
                Interrupted.was_interrupted.wait(60)
                Interrupted.was_interrupted.clear()
            return 0

        made.set_progress_handler(write, 2_000)
        writer.max_writes = writer.writes + writer.max_writes_when_watched
        return made

    monkeypatch.setattr(verify, "connect", connect, raising=False)
    monkeypatch.setattr(verify, "ROWS_A_BATCH", 50)
    monkeypatch.setattr(verify, "ENTRIES_A_BATCH", 100, raising=False)
    writer.beside(database.cache._con, 4_000)
    return writer


def test_verification_lets_the_log_begin_anew(database, watched):
    """What one statement must check is given up, and the store is not called sound."""
    findings = Findings()
    list(verify.scan(database, findings))
    database.cache._con.set_progress_handler(None, 0)
    watched.check()
    assert findings.records >= len(ROWS)
    assert not findings.broken
    assert findings.unchecked
    assert not findings.sound
    assert not findings.is_repairable


def test_what_was_interrupted_is_tried_again(database, watched):
    """A writer that becomes silent after a while leaves the time for the whole verification."""
    watched.max_writes_when_watched = 12
    findings = Findings()
    list(verify.scan(database, findings))
    database.cache._con.set_progress_handler(None, 0)
    watched.check()
    assert watched.writes == watched.max_writes
    assert Interrupted.interrupts > 0
    assert findings.sound


def test_a_full_log_into_which_nobody_writes_is_no_reason_to_give_up(database, writer):
    """A log stays as large as it was when writing ended."""
    watch = LogWatch(database)
    while watch.used_bytes() < watch.limit_bytes * 7 // 8:
        writer.write()
    with closing(sqlite3.connect(database.path, check_same_thread=False)) as reader:
        assert watch.fetch(reader, "PRAGMA quick_check") == [("ok",)]


def test_how_much_of_a_log_is_used(database, writer):
    """Frames of before the log was begun anew do not count."""
    watch = LogWatch(database)
    for _ in range(5):
        writer.write()
    writer.connection.execute("PRAGMA wal_checkpoint(RESTART)")
    for _ in range(3):
        writer.write()
    ((_, frames, _),) = writer.connection.execute("PRAGMA wal_checkpoint(PASSIVE)")
    assert watch.used_bytes() == frames * (PAGE_BYTES + 24) < writer.size - 32
    writer.connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    assert watch.used_bytes() == 0
    writer.log.unlink()
    assert watch.used_bytes() == 0


def test_there_is_no_pause_where_nobody_writes(database, monkeypatch):
    """A command on an idle store takes no longer than it must."""
    monkeypatch.setattr("time.sleep", lambda _: pytest.fail("it waited"))
    assert len(list(id_ranges(database, 10))) == len(ROWS) // 10


@pytest.mark.parametrize("size", [1, 7, 1_999, 2_000, 2_001])
def test_ranges_hold_each_entry_once(size, database):
    """However many rows a range has, together they have all, gaps between ids or not."""
    database.sql("DELETE FROM Entries WHERE id BETWEEN 50 AND 1500 AND id % 3 = 0")
    database.sql("UPDATE Entries SET id = id + 1000000 WHERE id > 1900")
    ranges = list(id_ranges(database, size))
    counts = [
        database.sql("SELECT count(*) FROM Entries WHERE id > ? AND id <= ?", one).fetchone()[0]
        for one in ranges
    ]
    ((total,),) = database.sql("SELECT count(*) FROM Entries")
    assert sum(counts) == total
    assert max(counts) <= size
