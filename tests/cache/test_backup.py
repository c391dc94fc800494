"""Backups: whole, consistent, without what was purged meanwhile, or nothing at all."""

import hashlib
import os
import sqlite3
import struct
from contextlib import closing

import pytest
from embedding_proxy.cache.disk import connection, purge
from embedding_proxy.cache.disk.connection import StoreError
from embedding_proxy.cache.disk.purge import PurgeFilter
from embedding_proxy.cache.disk.store import Store
from embedding_proxy.cache.disk.write_batch import PendingRecord, WriteBatch
from embedding_proxy.cache.key import Partition, Row
from embedding_proxy.cache.ledger import LedgerKey, Usage
from embedding_proxy.cache.maintenance import archive, backup, short_reads
from embedding_proxy.cache.record import Entry, encode

GIB = 1 << 30
HERE = Partition("", "a/space", 64)
THERE = Partition("tenant", "a/space", 64)


def _row(number):
    digest = hashlib.blake2b(number.to_bytes(8, "big"), digest_size=16).digest()
    vector = struct.pack("<I", number) * 64
    record = encode(Entry(vector, 7, True, digest))  # noqa: FBT003
    return Row(digest, record, 1_000.5 + number, THERE if number % 3 else HERE)


ROWS = [_row(i) for i in range(400)]
MORE = [_row(i) for i in range(400, 800)]


@pytest.fixture
def database(tmp_path, monkeypatch):
    """Give a store of some rows, copied a few rows at a time."""
    monkeypatch.setattr(backup, "MAX_ROWS_A_STEP", 20)
    monkeypatch.setattr(backup, "MAX_KEYS_A_STEP", 20)
    # Nobody writes during a pause.
    monkeypatch.setattr(short_reads, "ROOM_SECONDS", 0.0)
    with connection.opened(tmp_path / "store", GIB, create=True) as file:
        list(archive.import_rows(file, ROWS))
        yield file


@pytest.fixture
def target(tmp_path):
    """Give where the copy goes: a folder of its own, with a name that may need quoting."""
    folder = tmp_path / "copies %20 ü"
    folder.mkdir()
    return folder / "cache's ?copy#.db"


def _restored(target, directory):
    """Return the rows of a store that a copy was put into."""
    (directory / "v1").mkdir(parents=True)
    (directory / "v1" / "cache.db").write_bytes(target.read_bytes())
    with connection.opened(directory, GIB) as file:
        assert file.sql("PRAGMA integrity_check").fetchall() == [("ok",)]
        return list(archive.export_rows(file, PurgeFilter(), archive.ExportReport()))


def test_a_copy_is_a_stores_file(database, target, tmp_path):
    """Put in the place of cache.db it holds every row, and it is one file, with no log beside."""
    told = []
    backup.copy(database, target, lambda done, total: told.append((done, total)))
    assert list(target.parent.iterdir()) == [target]
    assert _restored(target, tmp_path / "new") == ROWS
    assert told == sorted(told)
    assert len(told) > 3
    assert told[-1][0] == told[-1][1]
    with closing(sqlite3.connect(target)) as connection:
        assert connection.execute("PRAGMA journal_mode").fetchone() == ("delete",)
        assert connection.execute("PRAGMA auto_vacuum").fetchone() == (2,)


async def test_a_copy_is_served_from(database, target, tmp_path):
    """The disk tier reads every record out of it."""
    backup.copy(database, target, lambda *_: None)
    (tmp_path / "new" / "v1").mkdir(parents=True)
    target.rename(tmp_path / "new" / "v1" / "cache.db")
    async with Store(tmp_path / "new", GIB) as store:
        found = await store.lookup([row.address for row in ROWS])
    assert {a: one.record for a, one in found.items()} == {r.address: r.record for r in ROWS}


@pytest.fixture
def between(monkeypatch):
    """Give a list of functions; one is called between two steps, and each only once."""
    waiting = []

    class Steps(short_reads.Pauses):
        def pause(self, began):
            if waiting:
                waiting.pop(0)()
            super().pause(began)

    monkeypatch.setattr(backup, "Pauses", Steps)
    monkeypatch.setattr("time.sleep", lambda _: None)
    return waiting


def _sound(target):
    """Return the copy's counts of entries by what is said of them, after a look at all of it."""
    with closing(sqlite3.connect(target)) as copy:
        assert copy.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
        ((records,),) = copy.execute("SELECT count(*) FROM Cache JOIN Entries ON id = rowid")
        counts = [
            copy.execute(f"SELECT {count}").fetchone()[0]
            for count in (
                "count(*) FROM Cache",
                "count(*) FROM Entries",
                "value FROM Settings WHERE key = 'count'",
                "count(DISTINCT key) FROM Cache",
            )
        ]
        assert counts == [records] * 4
        names = "SELECT type, name, sql FROM sqlite_master ORDER BY type, name"
        return records, copy.execute(names).fetchall()


def test_a_copy_is_laid_out_as_the_store_is(database, target):
    """Tables, indexes, triggers, layout and page size are the store's own."""
    backup.copy(database, target, lambda *_: None)
    records, schema = _sound(target)
    assert records == len(ROWS)
    names = "SELECT type, name, sql FROM sqlite_master ORDER BY type, name"
    assert schema == database.sql(names).fetchall()
    with closing(sqlite3.connect(target)) as copy:
        for pragma in ("user_version", "page_size", "auto_vacuum"):
            sql = f"PRAGMA {pragma}"
            assert copy.execute(sql).fetchall() == database.sql(sql).fetchall()


def test_others_write_meanwhile(database, target, tmp_path):
    """A copy has all that was there before and was not deleted, and comes to an end."""
    waiting = [MORE[i : i + 10] for i in range(0, len(MORE), 10)]
    steps = 0

    def write(*_):
        nonlocal steps
        steps += 1
        if waiting:
            with connection.opened(tmp_path / "store", GIB) as other:
                list(archive.import_rows(other, waiting.pop()))
                other.sql("DELETE FROM Cache WHERE rowid = ?", (steps,))

    backup.copy(database, target, write)
    assert steps > 3
    _sound(target)
    found = _restored(target, tmp_path / "new")
    assert found[: len(ROWS) - steps] == ROWS[steps:]
    assert {row.address for row in found} <= {row.address for row in (*ROWS, *MORE)}


def test_entries_that_eviction_moves_come_once(database, target, tmp_path, between):
    """An entry whose row gets another place is in the copy, whether or not it was copied before."""

    def move():
        for old in range(1 + 15 * (len(between) % 3), 400, 45):
            ((new,),) = database.sql("SELECT max(rowid) + 1 FROM Cache")
            database.sql("UPDATE Cache SET rowid = ? WHERE rowid = ?", (new, old))
            database.sql("UPDATE Entries SET id = ? WHERE id = ?", (new, old))

    between += [move] * 15
    backup.copy(database, target, lambda *_: None)
    assert not between
    assert _sound(target)[0] == len(ROWS)
    assert {row.address: row for row in _restored(target, tmp_path / "new")} == {
        row.address: row for row in ROWS
    }


def test_a_place_that_becomes_free_is_used_again(database, target, tmp_path, between):
    """Where the last rows are deleted, others move to places that were not copied yet."""

    def delete_and_move():
        database.sql("DELETE FROM Cache WHERE rowid > 200")
        for new, old in enumerate(range(1, 11), start=201):
            database.sql("UPDATE Cache SET rowid = ? WHERE rowid = ?", (new, old))
            database.sql("UPDATE Entries SET id = ? WHERE id = ?", (new, old))

    between.append(delete_and_move)
    backup.copy(database, target, lambda *_: None)
    assert _sound(target)[0] == 200
    addresses = {row.address for row in _restored(target, tmp_path / "new")}
    assert addresses == {row.address for row in ROWS[:200]}


@pytest.mark.parametrize("step", [0, 5, 19, 25, 35, 39])
def test_what_is_purged_meanwhile_is_not_in_the_copy(step, database, target, between):
    """Whenever a purge ends before the backup, nothing of what it deleted is left in the file."""

    def purge_tenant():
        list(purge.delete(database, PurgeFilter(namespace="tenant")))
        purge.announce(database, 1)

    between += [lambda: None] * step + [purge_tenant]
    backup.copy(database, target, lambda *_: None)
    assert not between
    kept = [row for row in ROWS if row.partition == HERE]
    assert _sound(target)[0] == len(kept)
    content = target.read_bytes()
    assert all(row.record in content for row in kept)
    assert not [row for row in ROWS if row.partition == THERE and row.record in content]


def test_purges_that_never_end_end_a_backup(database, target, monkeypatch):
    """Where each check is overtaken by another purge no copy is made, and that is said."""
    check = backup._Copy._take_over_changes

    def overtaken(self):
        check(self)
        purge.announce(database, 1)

    monkeypatch.setattr(backup._Copy, "_take_over_changes", overtaken)
    with pytest.raises(OSError, match="entries are purged all the time"):
        backup.copy(database, target, lambda *_: None)
    assert list(target.parent.iterdir()) == []


def test_what_is_bought_again_meanwhile_is_copied_again(database, target, tmp_path, between):
    """An entry that was purged, and bought anew, has its new vector in the copy."""
    digest = ROWS[3].address
    vector = struct.pack("<I", 999) * 64
    new = Row(digest, encode(Entry(vector, 7, True, digest)), 9_000.5, HERE)  # noqa: FBT003

    def buy_again():
        database.sql("DELETE FROM Cache WHERE key = ?", (digest,))
        list(archive.import_rows(database, [new]))

    between += [lambda: None] * 10 + [buy_again]
    backup.copy(database, target, lambda *_: None)
    _sound(target)
    found = {row.address: row for row in _restored(target, tmp_path / "new")}
    assert found == {row.address: row for row in (*ROWS, new)}
    assert ROWS[3].record not in target.read_bytes()


def test_what_is_in_the_copy_is_billed_in_it(database, target, between):
    """The ledger is copied last: what was bought meanwhile stands in it, whether copied or not."""

    def buy():
        usage = {(20_000, LedgerKey(HERE, "m", "p")): Usage(misses=1, tokens_billed=7)}
        row = MORE[len(between)]
        kept = {row.address: PendingRecord(row.record, row.partition)}
        database.write(WriteBatch(records=kept, usage=usage))

    between += [buy] * 30
    backup.copy(database, target, lambda *_: None)
    records = _sound(target)[0]
    with closing(sqlite3.connect(target)) as copy:
        sums = copy.execute("SELECT sum(misses), sum(tokens_billed) FROM Usage").fetchall()
    assert sums == [(30, 210)]
    assert len(ROWS) < records <= len(ROWS) + 30


def test_a_record_that_nobody_entered_is_entered_in_the_copy(database, target, tmp_path):
    """What the store lost sight of is copied, what is no record is not, nor what has none."""
    database.sql("DELETE FROM Entries WHERE id = 8")
    database.sql("INSERT INTO Entries VALUES (5000, 1, 0, 0)")
    database.sql("UPDATE Cache SET mode = 4 WHERE rowid = 9")
    backup.copy(database, target, lambda *_: None)
    assert _sound(target)[0] == len(ROWS) - 1
    found = {row.address: row for row in _restored(target, tmp_path / "new")}
    assert found.pop(ROWS[7].address) == ROWS[7]._replace(partition=None)
    assert found == {row.address: row for row in (*ROWS[:7], *ROWS[9:])}


def test_a_store_that_is_written_faster_than_it_is_copied(database, target, monkeypatch):
    """A copy that would never end is given up, and that is said."""
    monkeypatch.setattr(backup, "MAX_ROWS_AT_LEAST", 0)
    numbers = iter(range(1_000, 100_000))

    def write(*_):
        list(archive.import_rows(database, [_row(next(numbers)) for _ in range(25)]))

    with pytest.raises(OSError, match="faster than it can be copied"):
        backup.copy(database, target, write)
    assert list(target.parent.iterdir()) == []


def test_nothing_is_overwritten(database, target):
    """A file that is there, even an empty one, stays as it is."""
    target.write_bytes(b"mine")
    with pytest.raises(FileExistsError, match="is not overwritten"):
        backup.copy(database, target, lambda *_: None)
    assert target.read_bytes() == b"mine"
    assert list(target.parent.iterdir()) == [target]


@pytest.mark.parametrize("error", [OSError("full"), sqlite3.OperationalError, KeyboardInterrupt])
def test_a_copy_that_fails_leaves_nothing(error, database, target):
    """However it ends, half a copy stays neither under its name nor under another."""
    told = []

    def fail(done, _):
        told.append(done)
        if len(told) == 3:
            raise error

    with pytest.raises(error if isinstance(error, type) else OSError):
        backup.copy(database, target, fail)
    assert len(told) == 3
    assert list(target.parent.iterdir()) == []
    backup.copy(database, target, lambda *_: None)
    assert list(target.parent.iterdir()) == [target]


def test_what_sqlite_lays_beside_a_copy_goes_with_it(database, target):
    """A journal that a full disk leaves beside half a copy stays no longer than the half."""

    def fail(*_):
        files = [path for path in target.parent.rglob("*") if path.is_file()]
        part = min(files, key=lambda path: len(path.name))
        part.with_name(f"{part.name}-left").touch()
        raise sqlite3.OperationalError("database or disk is full")

    with pytest.raises(sqlite3.OperationalError):
        backup.copy(database, target, fail)
    assert list(target.parent.iterdir()) == []


def test_a_file_system_without_links_gets_a_copy_too(database, target, monkeypatch):
    """Where no second name can be given to the copy, it is moved to its place."""

    def no_links(*_):
        raise PermissionError("Operation not permitted")

    monkeypatch.setattr(os, "link", no_links)
    backup.copy(database, target, lambda *_: None)
    assert list(target.parent.iterdir()) == [target]


def test_a_store_that_is_damaged_is_not_copied(tmp_path, target):
    """Where the store cannot be read no copy is made of it."""
    path = tmp_path / "store" / "v1" / "cache.db"
    path.parent.mkdir(parents=True)
    path.write_bytes(b"not a database" * 1_000)
    with pytest.raises(StoreError), connection.opened(tmp_path / "store", GIB) as file:
        backup.copy(file, target, lambda *_: None)
    assert list(target.parent.iterdir()) == []


def test_a_page_that_cannot_be_read_ends_a_backup(database, target):
    """Damage in the midst of a store is not copied silently."""
    page = database.sql("SELECT page_count / 2 FROM pragma_page_count").fetchone()[0]
    database.sql("PRAGMA wal_checkpoint(TRUNCATE)")
    with database.path.open("r+b") as file:
        data = file.read()
        leaves = [i for i in range(page, len(data) // 32_768) if data[i * 32_768] == 0x0D]
        file.seek(leaves[0] * 32_768)
        file.write(bytes(32_768))
    with pytest.raises(sqlite3.DatabaseError):
        backup.copy(database, target, lambda *_: None)
    assert list(target.parent.iterdir()) == []
