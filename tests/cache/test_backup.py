"""Backups: the store as it was at one moment, whole, or nothing at all."""

import hashlib
import os
import sqlite3
import struct
from contextlib import closing

import pytest

from cache.disk import connection
from cache.disk.connection import StoreError
from cache.disk.purge import Choice
from cache.disk.store import Store
from cache.maintenance import backup, transfer
from cache.record import Entry, encode
from cache.row import Partition, Row

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
    """Give a store of some rows, copied a page at a time."""
    monkeypatch.setattr(backup, "PAGES_A_STEP", 1)
    with connection.opened(tmp_path / "store", GIB, create=True) as file:
        list(transfer.put(file, ROWS))
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
        return list(transfer.rows(file, Choice(), transfer.Read()))


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
        found = await store.get_many([row.address for row in ROWS])
    assert {a: one.record for a, one in found.items()} == {r.address: r.record for r in ROWS}


def test_what_is_written_meanwhile_is_not_in_the_copy(database, target, tmp_path):
    """Others go on writing and deleting; the copy is of the moment it was begun, and ends."""
    waiting = [MORE[i : i + 20] for i in range(0, len(MORE), 20)]
    steps = 0

    def write(*_):
        nonlocal steps
        steps += 1
        if waiting:
            with connection.opened(tmp_path / "store", GIB) as other:
                list(transfer.put(other, waiting.pop()))
                other.sql("DELETE FROM Cache WHERE rowid = ?", (steps,))

    backup.copy(database, target, write)
    assert steps > 3
    assert _restored(target, tmp_path / "new") == ROWS
    ((there,),) = database.sql("SELECT count(*) FROM Cache")
    assert there == len(ROWS) + len(MORE) - 20 * len(waiting) - min(steps, 20)


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
