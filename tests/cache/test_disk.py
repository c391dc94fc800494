"""The file and its two threads: opened where one can be, set aside where not, tried again."""

import asyncio
import contextlib
import os
import sqlite3
import threading
from pathlib import Path

import pytest
from embedding_proxy.cache.disk import connection as disk_module
from embedding_proxy.cache.disk import database, purge, quarantine
from embedding_proxy.cache.disk.connection import Disk, StoreError
from embedding_proxy.cache.disk.database import Database
from embedding_proxy.cache.disk.schema import PAGE_BYTES
from embedding_proxy.cache.disk.store import Store
from embedding_proxy.cache.disk.write_batch import PendingRecord, WriteBatch
from embedding_proxy.cache.key import FORMAT, Partition

from tests.cache.fakes import settle

GIB = 1 << 30
P = Partition("", "m", 4)
RECORDS = {i.to_bytes(16): bytes([i]) * 5000 for i in range(40)}


def _path(directory):
    return directory / f"v{FORMAT}" / "cache.db"


def _threads():
    return [t.name for t in threading.enumerate() if t.name.startswith("store-")]


@contextlib.asynccontextmanager
async def _opened(directory, **options):
    """Give an open disk, closed in the end."""
    disk = Disk(directory, GIB, ())
    await disk.open(**options)
    try:
        yield disk
    finally:
        await disk.close()


async def _fill(directory):
    """Make a store of some records, and return its file's bytes."""
    async with Store(directory, GIB) as store:
        assert await store.put_many(RECORDS, P)
    return _path(directory).read_bytes()


async def test_reading_and_writing_have_a_thread_each(tmp_path):
    """Work on the file runs in one thread of each kind, never in the loop's, and both end."""
    async with _opened(tmp_path) as disk:
        readers = {await disk.read(lambda: threading.current_thread().name) for _ in range(5)}
        writers = {await disk.write(lambda: threading.current_thread().name) for _ in range(5)}
        assert (len(readers), len(writers)) == (1, 1)
        assert not readers & writers
        assert threading.current_thread().name not in readers | writers
    assert _threads() == []


async def test_a_read_does_not_wait_for_a_write(tmp_path):
    """While the writing thread is held up, reading goes on."""
    held = threading.Event()
    async with _opened(tmp_path) as disk:
        writing = asyncio.create_task(disk.write(held.wait))
        async with asyncio.timeout(60):
            assert await disk.read(lambda: 1) == 1
        assert not writing.done()
        held.set()
        assert await writing


async def test_what_fails_in_a_thread_is_raised_here(tmp_path):
    """An error of the work is the caller's, and the thread goes on."""

    def failing():
        raise sqlite3.OperationalError("disk I/O error")

    async with _opened(tmp_path) as disk:
        for thread in (disk.read, disk.write):
            with pytest.raises(sqlite3.OperationalError, match="disk I/O"):
                await thread(failing)
            assert await thread(lambda: 1) == 1


# Opening.


def _garbage(whole):
    return os.urandom(len(whole))


def _text(_):
    return b"no database at all " * 3000


def _no_header(whole):
    return bytes(100) + whole[100:]


def _no_schema(whole):
    return whole[:100] + b"\xff" * (PAGE_BYTES - 100) + whole[PAGE_BYTES:]


def _one_page(whole):
    return whole[:PAGE_BYTES]


def _other_page_size(whole):
    return whole[:16] + b"\x00\x03" + whole[18:]


def _stub(whole):
    return whole[:1000]


DAMAGES = [_garbage, _text, _no_header, _no_schema, _one_page, _other_page_size, _stub]


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__[1:])
async def test_a_damaged_file_is_moved_aside_and_kept(tmp_path, damage):
    """However it is damaged, the store opens or heals itself, and not one byte is deleted."""
    whole = await _fill(tmp_path)
    damaged = damage(whole)
    _path(tmp_path).write_bytes(damaged)
    async with Store(tmp_path, GIB) as store:
        # What SQLite does not see at once is found by the first who reads or writes.
        for _ in range(2):
            await store.lookup(list(RECORDS))
            await store.put_many(RECORDS, P)
        found = await store.lookup(list(RECORDS))
        assert {a: one.record for a, one in found.items()} == RECORDS
    async with Store(tmp_path, GIB) as store:
        assert (await store.lookup(list(RECORDS))).keys() == RECORDS.keys()
    (quarantined,) = tmp_path.glob(f"v{FORMAT}.damaged-*/cache.db")
    assert len(quarantined.read_bytes()) == len(damaged)


async def test_two_damages_lie_side_by_side(tmp_path):
    """A second damaged store does not take the place of the first, within a second or not."""
    for number in range(3):
        _path(tmp_path).parent.mkdir(exist_ok=True)
        _path(tmp_path).write_bytes(b"no database %d " % number * 3000)
        async with Store(tmp_path, GIB) as store:
            assert await store.put_many(RECORDS, P)
    quarantined = {path.read_bytes()[:13] for path in tmp_path.glob("*.damaged-*/cache.db")}
    assert quarantined == {b"no database 0", b"no database 1", b"no database 2"}


BAD_MOMENTS = [
    sqlite3.OperationalError("unable to open database file"),
    sqlite3.OperationalError("disk I/O error"),
    OSError(5, "Input/output error"),
    PermissionError(13, "Permission denied"),
    TimeoutError("another process keeps writing to the store"),
]


def _failing(error):
    def fail(*_, **__):
        raise error

    return fail


@pytest.mark.parametrize("error", BAD_MOMENTS, ids=repr)
async def test_a_bad_moment_at_the_start_is_survived(tmp_path, monkeypatch, caplog, error):
    """Where a store was, the service starts without writing, and takes it up when it can."""
    await _fill(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(disk_module, "Database", _failing(error))
        async with Store(tmp_path, GIB) as store:
            assert store._disk.file is None
            assert "the disk tier cannot be opened" in caplog.text
            assert await store.put_many({bytes([99]) * 16: b"bought meanwhile"}, P) is False
            await store._tick(1)
            assert store._disk.file is None
            patch.undo()
            await store._tick(2)
            found = await store.lookup([*RECORDS, bytes([99]) * 16])
            assert len(found) == len(RECORDS) + 1
            await store._writer.flush()
    async with Store(tmp_path, GIB) as store:
        assert len(await store.lookup([*RECORDS, bytes([99]) * 16])) == len(RECORDS) + 1
    assert not list(tmp_path.glob("*.damaged-*"))


async def test_nobody_opens_a_file_while_another_process_writes(tmp_path, monkeypatch):
    """Opening takes the lock of all who write, and is tried again when it is not to be had."""
    await _fill(tmp_path)
    monkeypatch.setattr(database, "BUSY_SECONDS", 0.01)
    with contextlib.closing(disk_module.lock_of(tmp_path)) as others:
        with others:
            store = await Store(tmp_path, GIB).__aenter__()
            assert store._disk.file is None
        await store._tick(1)
        assert store._disk.file is not None
        assert (await store.lookup(list(RECORDS))).keys() == RECORDS.keys()
        await store.__aexit__()


@pytest.mark.parametrize("error", BAD_MOMENTS, ids=repr)
async def test_where_no_store_was_it_is_said(tmp_path, monkeypatch, error):
    """A first start that fails is a mistake of the configuration more likely than not."""
    monkeypatch.setattr(disk_module, "Database", _failing(error))
    with pytest.raises(StoreError) as caught:
        async with Store(tmp_path, GIB):
            pytest.fail("the store opened")
    assert repr(caught.value.__cause__) == repr(error)
    assert _threads() == []


async def test_a_first_start_on_a_full_disk_says_what_to_do(tmp_path, monkeypatch):
    """SQLite's own failures have a remedy, as those of the system have."""
    full = sqlite3.OperationalError("database or disk is full")
    full.sqlite_errorcode = sqlite3.SQLITE_FULL
    monkeypatch.setattr(disk_module, "Database", _failing(full))
    with pytest.raises(StoreError, match="disk is full; free some space on the disk"):
        async with Store(tmp_path, GIB):
            pytest.fail("the store opened")


async def test_opening_that_keeps_failing_is_not_tried_each_second(tmp_path, monkeypatch):
    """After three tries there is a rest, and ticks in it try nothing."""
    await _fill(tmp_path)
    tries = []

    def failing(*_):
        tries.append(1)
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(disk_module, "Database", failing)
        async with Store(tmp_path, GIB) as store:
            for tick in range(1, 9):
                await store._tick(tick)
            assert len(tries) == 1 + 3
            store._writer.backoff._until = 0.0
            patch.undo()
            await store._tick(9)
            assert (await store.lookup(list(RECORDS))).keys() == RECORDS.keys()


async def test_trying_again_with_an_open_file_does_nothing(tmp_path):
    """Only where no file is open is one opened, by however many try at once."""
    async with _opened(tmp_path) as disk:
        file = disk.file
        await asyncio.gather(*(disk.try_again() for _ in range(3)))
        assert disk.file is file


async def test_many_who_find_the_same_damage_replace_once(tmp_path):
    """Of those who find a file unusable one replaces it, the others find it replaced."""
    await _fill(tmp_path)
    async with _opened(tmp_path) as disk:
        old = disk.file
        await asyncio.gather(*(disk.replace(old) for _ in range(5)))
        assert disk.file is not None
        assert disk.file is not old
        new = disk.file
        await disk.replace(old)
        assert disk.file is new
        await disk.write(lambda: new.write(WriteBatch(records={bytes(16): PendingRecord(b"x", P)})))
    assert len(list(tmp_path.glob("*.damaged-*"))) == 1


async def test_what_another_process_replaced_is_not_moved_aside(tmp_path):
    """Of two processes that find the same damage one moves the file; the other opens the new."""
    await _fill(tmp_path)
    async with _opened(tmp_path) as one, _opened(tmp_path) as two:
        await one.replace(one.file)
        await one.write(
            lambda: one.file.write(WriteBatch(records={bytes(16): PendingRecord(b"x", P)}))
        )
        await two.replace(two.file)
        assert (await two.read(lambda: two.file.read_many([bytes(16)]))).keys() == {bytes(16)}
    assert len(list(tmp_path.glob("*.damaged-*"))) == 1


async def test_a_replacement_that_fails_leaves_no_file_and_can_be_tried_again(
    tmp_path, monkeypatch
):
    """When no fresh file opens there is none, and the next try opens one."""
    await _fill(tmp_path)
    async with _opened(tmp_path) as disk:
        with monkeypatch.context() as patch:
            patch.setattr(disk_module, "Database", _failing(OSError(28, "No space left on device")))
            with pytest.raises(OSError, match="No space"):
                await disk.replace(disk.file)
            assert disk.file is None
            with pytest.raises(OSError, match="No space"):
                await disk.try_again()
        await disk.try_again()
        assert disk.file is not None


# Closing.


async def test_closing_while_a_file_is_replaced_ends_well(tmp_path):
    """Whoever comes second waits; no thread, no lock and no write-ahead log is left."""
    await _fill(tmp_path)
    disk = Disk(tmp_path, GIB, ())
    await disk.open()
    replacing = asyncio.create_task(disk.replace(disk.file))
    await settle()
    await disk.close()
    await replacing
    assert disk.file is None
    assert _threads() == []
    files = {path.name for path in _path(tmp_path).parent.iterdir()}
    assert files == {"cache.db", "purges"}


async def test_closing_ends_with_the_work_that_was_begun(tmp_path):
    """What a thread was given before the closing is done in it."""
    done = []
    disk = Disk(tmp_path, GIB, ())
    await disk.open()
    works = [
        asyncio.create_task(thread(lambda: done.append(1))) for thread in (disk.read, disk.write)
    ]
    await settle()
    await disk.close()
    await asyncio.gather(*works)
    assert done == [1, 1]


async def test_reading_while_closing_raises_nothing(tmp_path):
    """Requests that come while the store closes are misses or hits, and nothing else."""
    await _fill(tmp_path)
    store = await Store(tmp_path, GIB).__aenter__()
    asked = [asyncio.create_task(store.lookup(list(RECORDS))) for _ in range(20)]
    await asyncio.sleep(0)
    closing = asyncio.create_task(store.__aexit__())
    while not closing.done():
        asked.append(asyncio.create_task(store.lookup(list(RECORDS)[:3])))
        asked.append(asyncio.create_task(store.put_many({bytes(16): b"x"}, P)))
        await asyncio.sleep(0)
    for answer in await asyncio.gather(*asked):
        assert answer is False or answer is True or answer.keys() <= RECORDS.keys()
    assert _threads() == []


# For those who work beside the proxies.


async def test_the_tables_can_be_read_beside_a_running_store(tmp_path):
    """A second opener sees what the first wrote, and its purge is heard."""
    heard = []
    async with Store(tmp_path, GIB, on_purge=lambda: heard.append(1)) as store:
        await store.put_many(RECORDS, P)
        with disk_module.opened(tmp_path, GIB) as file:
            assert isinstance(file, Database)
            assert sum(purge.delete(file, purge.PurgeFilter())) == len(RECORDS)
            purge.announce(file, len(RECORDS))
        assert await store.lookup(list(RECORDS)) == {}
        await store._tick(1)
        assert heard == [1]


def test_where_no_store_is_none_is_opened(tmp_path):
    """Looking into a directory that holds no store makes none, and says so."""
    with (
        pytest.raises(StoreError, match="there is no store yet"),
        disk_module.opened(tmp_path, GIB),
    ):
        pytest.fail("it opened")
    assert list(tmp_path.iterdir()) == []


def test_is_damage_tells_the_file_from_the_moment():
    """What goes away by itself is no damage; what does not, is."""
    moment = [
        *BAD_MOMENTS,
        sqlite3.OperationalError("database is locked"),
        sqlite3.OperationalError("database or disk is full"),
        sqlite3.IntegrityError("UNIQUE constraint failed"),
        sqlite3.ProgrammingError("Cannot operate on a closed database."),
        database.FileReplaced("the file was taken away"),
    ]
    file = [
        sqlite3.DatabaseError("file is not a database"),
        sqlite3.DatabaseError("database disk image is malformed"),
        sqlite3.OperationalError("no such table: Cache"),
        sqlite3.OperationalError("no such column: store_time"),
        sqlite3.OperationalError("malformed database schema (Cache)"),
    ]
    assert not any(map(database.is_damage, moment))
    assert all(map(database.is_damage, file))


def test_a_thousand_stores_set_aside_are_enough(tmp_path, monkeypatch):
    """Setting aside gives up before it looks for a name for ever."""
    path = tmp_path / "v1" / "cache.db"
    path.parent.mkdir()
    path.write_bytes(b"damaged")
    monkeypatch.setattr(Path, "mkdir", _failing(FileExistsError()))
    with pytest.raises(FileExistsError, match="too many damaged stores"):
        quarantine.move(path, path.stat().st_ino)
    assert path.read_bytes() == b"damaged"


# Where in the file's header, what is written there.
HEADERS = {
    "write version": (18, b"\x09"),
    "read version": (19, b"\x09"),
    "reserved bytes": (20, b"\x40"),
    "format of the schema": (44, b"\x00\x00\x00\x77"),
    "layout": (60, b"\x50\xa8\x00\x03"),
    "negative layout": (60, b"\xd0\xa8\x00\x03"),
}


@pytest.mark.parametrize("place", HEADERS)
async def test_a_damaged_header_is_no_matter_of_the_moment(tmp_path, place):
    """What SQLite takes for a file that must not be written, or of a version to come, is damage."""
    whole = await _fill(tmp_path)
    offset, noise = HEADERS[place]
    _path(tmp_path).write_bytes(whole[:offset] + noise + whole[offset + len(noise) :])
    async with Store(tmp_path, GIB) as store:
        assert await store.put_many({b"n" * 16: b"new"}, P)
    assert len(list(tmp_path.glob(f"v{FORMAT}.damaged-*/cache.db"))) == 1


def test_a_file_that_goes_away_meanwhile_is_no_obstacle(tmp_path, monkeypatch):
    """A process that ends takes away the log's index while another one opens the store."""
    path = tmp_path / f"v{FORMAT}" / "cache.db-shm"
    path.parent.mkdir()
    path.touch()
    is_file = Path.is_file

    def vanishing(self, **how):
        self.unlink(missing_ok=True)
        return is_file(self, **how)

    monkeypatch.setattr(Path, "is_file", vanishing)
    disk_module.lock_of(tmp_path).close()


async def test_without_a_temporary_folder_sqlite_works_in_memory(tmp_path, monkeypatch):
    """A container whose only writable folder is that of the cache: a new store is made there."""

    def missing():
        raise FileNotFoundError

    monkeypatch.setattr("tempfile.gettempdir", missing)
    async with _opened(tmp_path) as disk:
        assert disk.file.sql("PRAGMA temp_store").fetchall() == [(2,)]
    monkeypatch.undo()
    async with _opened(tmp_path) as disk:
        assert disk.file.sql("PRAGMA temp_store").fetchall() == [(0,)]
