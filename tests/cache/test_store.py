"""The disk tier: what was acknowledged is there, what is not ours is not read, nothing raises."""

import asyncio
import contextlib
import hashlib
import os
import pickle
import sqlite3
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import diskcache
import pytest
from embedding_proxy.cache.disk import connection, database, disk_full, purge
from embedding_proxy.cache.disk import store as store_module
from embedding_proxy.cache.disk.database import PAGE_BYTES, RawDisk, log_bytes
from embedding_proxy.cache.disk.lock import WriterLock
from embedding_proxy.cache.disk.store import Store, StoreError
from embedding_proxy.cache.disk.write_batch import PendingRecord, WriteBatch
from embedding_proxy.cache.key import FORMAT, Partition
from embedding_proxy.proxy.config.schema import Settings
from embedding_proxy.proxy.service.embedding_service import EmbeddingService

from tests.cache.fakes import settle

GIB = 1 << 30
RAW, BINARY_FILE, TEXT_FILE, PICKLE = 1, 2, 3, 4


def _address(number):
    return hashlib.blake2b(number.to_bytes(8, "big"), digest_size=16).digest()


def _records(numbers, size=100):
    return {_address(i): hashlib.shake_128(i.to_bytes(8, "big")).digest(size) for i in numbers}


def _database(directory):
    return directory / f"v{FORMAT}" / "cache.db"


def _rows(directory):
    """Return how many records the file holds."""
    with _foreign(directory) as connection:
        return connection.execute("SELECT count(*) FROM Cache").fetchone()[0]


async def _read(store, addresses):
    """Return the records of a store, without their times."""
    return {a: found.record for a, found in (await store.lookup(addresses)).items()}


@contextlib.contextmanager
def _foreign(directory):
    """Give a connection to the store's file that is not the store's."""
    with contextlib.closing(
        sqlite3.connect(_database(directory), timeout=0, isolation_level=None)
    ) as connection:
        yield connection


def _plant(directory, key, value, *, raw=1, mode=RAW, filename=None):
    """Put a row into the store's file as someone else might."""
    with _foreign(directory) as connection:
        connection.execute(
            "INSERT INTO Cache"
            " (key, raw, store_time, expire_time, access_time, size, mode, filename, value)"
            " VALUES (?, ?, 0, 1e12, 0, 7, ?, ?, ?)",
            (key, raw, mode, filename, value),
        )


def _own_thread(store, call):
    """Run `call` on diskcache's own interface and close the connection it opens here."""
    try:
        return call(store._disk.file.cache)
    finally:
        store._disk.file.cache.close()


async def test_thousands_come_back_also_after_reopening(tmp_path):
    """Many more records than fit one SELECT are all read back, by one who asks for others too."""
    records = _records(range(3000))
    strangers = list(_records(range(3000, 3100)))
    addresses = [*records, *strangers]
    async with Store(tmp_path, GIB) as store:
        assert await _read(store, addresses) == {}
        assert await store.put_many(records)
        assert await _read(store, addresses) == records
    async with Store(tmp_path, GIB) as store:
        assert await _read(store, addresses) == records
        assert await _read(store, strangers) == {}


async def test_no_addresses_and_no_records_are_no_error(tmp_path):
    """The empty look-up finds nothing and the empty write succeeds."""
    async with Store(tmp_path, GIB) as store:
        assert await _read(store, []) == {}
        assert await store.put_many({})


async def test_a_record_is_replaced_whole(tmp_path):
    """The newer record of an address is the one that is read, and the only one kept."""
    address = _address(0)
    async with Store(tmp_path, GIB) as store:
        for record in (b"long" * 100, b"short", b""):
            assert await store.put_many({address: record})
            assert await _read(store, [address]) == {address: record}
        with _foreign(tmp_path) as connection:
            assert connection.execute("SELECT count(*) FROM Cache").fetchone() == (1,)


async def test_large_records_stay_inside_the_database(tmp_path):
    """No record becomes a file of its own, however large it is."""
    records = _records(range(3), size=300_000)
    async with Store(tmp_path, GIB) as store:
        assert await store.put_many(records)
        assert await _read(store, list(records)) == records
        files = {file.name for file in tmp_path.rglob("*") if file.is_file()}
    assert files <= {"cache.db", "cache.db-wal", "cache.db-shm", "purges", "writer.lock"}


@pytest.mark.parametrize(
    ("pragma", "value"),
    [("page_size", PAGE_BYTES), ("journal_mode", "wal"), ("auto_vacuum", 2)],
)
async def test_the_file_is_laid_out_as_measured(tmp_path, pragma, value):
    """Page size, journal and vacuum are as the measurements want them, also after reopening."""
    for _ in range(2):
        async with Store(tmp_path, GIB) as store:
            await store.put_many(_records(range(10)))
            with _foreign(tmp_path) as connection:
                assert connection.execute(f"PRAGMA {pragma}").fetchone() == (value,)
    assert PAGE_BYTES == 32_768


async def test_another_versions_files_are_left_alone(tmp_path):
    """A store keeps to the folder of its own format version, and lets nobody else look in."""
    other = tmp_path / f"v{FORMAT + 1}"
    other.mkdir()
    (other / "cache.db").write_bytes(b"of another version")
    async with Store(tmp_path, GIB) as store:
        await store.put_many(_records(range(1)))
        assert store.folder == tmp_path / f"v{FORMAT}"
        assert store.folder.stat().st_mode & 0o077 == 0
    assert [file.name for file in other.iterdir()] == ["cache.db"]
    assert (other / "cache.db").read_bytes() == b"of another version"


async def test_an_opening_beside_another_process_writes_nothing(tmp_path):
    """The write-ahead log is as long as before: diskcache would write its settings each time."""
    async with Store(tmp_path, GIB) as store:
        await store.put_many(_records(range(10)))
        log = store.folder / "cache.db-wal"
        before = log.stat().st_size
        for _ in range(3):
            async with Store(tmp_path, GIB) as other:
                assert len(await _read(other, list(_records(range(10))))) == 10
        assert log.stat().st_size == before
        # What differs is written: by whoever opens the file next, it is found as it was said.
        async with Store(tmp_path, 2 * GIB):
            pass
        with _foreign(tmp_path) as connection:
            rows = dict(connection.execute("SELECT key, value FROM Settings"))
        assert rows["sqlite_journal_size_limit"] == log_bytes(2 * GIB)


async def test_closing_leaves_no_log_and_no_thread(tmp_path):
    """After closing, the write-ahead log is merged into the file and both threads have ended."""
    async with Store(tmp_path, GIB) as store:
        await store.put_many(_records(range(100)))
        await _read(store, list(_records(range(100))))
    assert {file.name for file in store.folder.iterdir()} == {"cache.db", "purges"}
    assert not [t.name for t in threading.enumerate() if t.name.startswith("store-")]


async def test_closing_waits_for_a_write_under_way(tmp_path):
    """A write that was begun before the store closes is kept, and says so."""
    records = _records(range(2000))
    async with Store(tmp_path, GIB) as store:
        writing = asyncio.create_task(store.put_many(records))
        await asyncio.sleep(0)  # one turn of the loop: the write is under way
    assert await writing
    async with Store(tmp_path, GIB) as store:
        assert await _read(store, list(records)) == records


async def test_a_store_that_was_never_opened_keeps_nothing(tmp_path):
    """Before it is opened a store misses, and says of a write that it did not happen."""
    store = Store(tmp_path, GIB)
    assert await _read(store, [_address(0)]) == {}
    assert await store.put_many(_records(range(1))) is False
    await store.__aexit__()
    assert list(tmp_path.iterdir()) == []


# What is not ours is not read.


class Trap:
    """Makes a directory when it is loaded from a pickle: loading runs code."""

    def __init__(self, directory):
        self.directory = directory

    def __reduce__(self):
        return os.mkdir, (str(self.directory),)


@pytest.fixture
def sprung(tmp_path):
    """Give the directory that exists once the trap was loaded."""
    return tmp_path / "sprung"


@pytest.fixture
def trap(sprung):
    """Give a pickle that is a trap, and make sure that it is one."""
    pickled = pickle.dumps(Trap(sprung))
    pickle.loads(pickled)
    assert sprung.is_dir()
    sprung.rmdir()
    return pickled


PLANTED = {
    "pickled value": PICKLE,
    "pickle in a file": PICKLE,
    "bytes in a file": BINARY_FILE,
    "text in a file": TEXT_FILE,
    "text for bytes": RAW,
    "number for bytes": RAW,
    "unknown mode": 0,
}


@pytest.mark.parametrize("kind", PLANTED)
async def test_a_planted_value_is_refused(tmp_path, trap, sprung, kind):
    """A row that holds no raw bytes is a miss, is refused by diskcache's own get, and is healed."""
    good, bad = _records([1]), _address(2)
    async with Store(tmp_path, GIB) as store:
        await store.put_many(good)
        in_file = kind.endswith("in a file")
        if in_file:
            (store.folder / "planted.val").write_bytes(trap)
        value = {"text for bytes": "text", "number for bytes": 3}.get(kind, trap)
        _plant(
            tmp_path,
            bad,
            None if in_file else value,
            mode=PLANTED[kind],
            filename="planted.val" if in_file else None,
        )
        assert await _read(store, [*good, bad]) == good
        with pytest.raises(ValueError, match="bytes"):
            _own_thread(store, lambda cache: cache.get(bad))
        with pytest.raises(ValueError, match="bytes"):
            _own_thread(store, lambda cache: cache.get(bad, read=True))
        assert await store.put_many({bad: b"healed"})
        assert await _read(store, [bad]) == {bad: b"healed"}
        with _foreign(tmp_path) as connection:
            rows = connection.execute(
                "SELECT DISTINCT raw, mode, size, filename, expire_time FROM Cache"
            ).fetchall()
        assert rows == [(1, RAW, 0, None, None)]
    assert not sprung.exists()


async def test_a_planted_file_name_deletes_no_file(tmp_path):
    """Writing over a row that names a file outside the store leaves that file alone."""
    precious = tmp_path / "precious"
    precious.write_bytes(b"not the cache's")
    async with Store(tmp_path / "cache", GIB) as store:
        _plant(tmp_path / "cache", _address(1), None, mode=BINARY_FILE, filename="../../precious")
        assert (store.folder / "../../precious").exists()
        assert await store.put_many(_records([1]))
        assert await _read(store, [_address(1)]) == _records([1])
    assert precious.read_bytes() == b"not the cache's"


async def test_a_planted_key_is_refused(tmp_path, trap, sprung):
    """A row whose key is a pickle is found by nobody, and not loaded by diskcache's own walks."""
    good = _records([1])
    async with Store(tmp_path, GIB) as store:
        await store.put_many(good)
        _plant(tmp_path, trap, b"record", raw=0)
        assert await _read(store, [*good, trap]) == good
        for walk in (list, lambda cache: list(cache.iterkeys()), diskcache.Cache.peekitem):
            with pytest.raises(ValueError, match="pickled key"):
                _own_thread(store, walk)
    assert not sprung.exists()


async def test_the_trap_would_catch_diskcache_itself(tmp_path, trap, sprung):
    """The same planted row does run code where diskcache reads it with its own Disk."""
    bad = _address(2)
    async with Store(tmp_path, GIB):
        _plant(tmp_path, bad, trap, mode=PICKLE)
    with diskcache.Cache(str(_database(tmp_path).parent)) as cache:
        cache.get(bad)
    assert sprung.is_dir()


@pytest.mark.parametrize(
    "value",
    [
        "text",
        1,
        1.5,
        None,
        True,
        (1,),
        bytearray(b"b"),
        memoryview(b"m"),
        type("B", (bytes,), {})(),
    ],
    ids=lambda value: type(value).__name__,
)
async def test_only_bytes_are_kept(tmp_path, value):
    """Whatever is not bytes is refused as key and as value, and leaves no row behind."""
    async with Store(tmp_path, GIB) as store:
        with pytest.raises(ValueError, match="only bytes"):
            _own_thread(store, lambda cache: cache.set(b"key", value))
        with pytest.raises(ValueError, match="only bytes"):
            _own_thread(store, lambda cache: cache.set(value, b"value"))
        with _foreign(tmp_path) as connection:
            assert connection.execute("SELECT count(*) FROM Cache").fetchone() == (0,)


def test_a_raw_row_is_read_as_the_bytes_it_holds(tmp_path):
    """What RawDisk writes of keys and values it reads again, and nothing of it is changed."""
    disk = RawDisk(str(tmp_path))
    for data in (b"", b"\x80\x04N.", bytes(range(256))):
        key, raw = disk.put(data)
        assert disk.get(bytes(key), raw) == data
        size, mode, filename, value = disk.store(data, read=False)
        assert (size, filename) == (0, None)
        assert disk.fetch(mode, filename, bytes(value), read=False) == data


# A failed read is a miss, a failed write is a line in the log.


@contextlib.contextmanager
def _refusing(directory, address):
    """Make SQLite refuse one address for a while."""
    with _foreign(directory) as connection:
        connection.execute(
            "CREATE TRIGGER refuse BEFORE INSERT ON Cache"
            f" WHEN NEW.key = x'{address.hex()}' BEGIN SELECT RAISE(ABORT, 'refused'); END"
        )
        yield
        connection.execute("DROP TRIGGER refuse")


@pytest.mark.parametrize("place", [0, 500, 999])
async def test_a_write_of_many_is_all_or_nothing(tmp_path, caplog, place):
    """One record that cannot be written keeps out all that came with it, and later ones go in."""
    before, records = _records([10_000]), _records(range(1000))
    async with Store(tmp_path, GIB) as store:
        assert await store.put_many(before)
        with _refusing(tmp_path, _address(place)):
            assert await store.put_many(records) is False
        assert _rows(tmp_path) == 1
        assert [r.levelname for r in caplog.records] == ["WARNING"]
        assert "wait in memory: 1000: refused" in caplog.text
        assert await store.put_many(records)
        assert await _read(store, [*records, *before]) == records | before


async def test_a_lock_held_by_another_fails_the_write_and_no_read(tmp_path, monkeypatch, caplog):
    """While another writes, reads go on, and a write waits in memory until it can be made."""
    monkeypatch.setattr(database, "BUSY_SECONDS", 0.01)
    before, records = _records([1]), _records([2])
    async with Store(tmp_path, GIB) as store:
        assert await store.put_many(before)
        with _foreign(tmp_path) as connection:
            connection.execute("BEGIN IMMEDIATE")
            async with asyncio.timeout(60):
                assert await store.put_many(records) is False
            assert "wait in memory: 1:" in caplog.text
            assert await _read(store, [*before, *records]) == before | records
            connection.execute("ROLLBACK")
        assert _rows(tmp_path) == 1
        await store._writer.flush()
        assert _rows(tmp_path) == 2


async def test_a_write_waits_for_a_lock_and_keeps_no_reader_waiting(tmp_path):
    """A write that waits for another's lock holds up neither reads nor the loop, then succeeds."""
    before, records = _records([1]), _records([2])
    async with Store(tmp_path, GIB) as store:
        assert await store.put_many(before)
        with _foreign(tmp_path) as connection:
            connection.execute("BEGIN IMMEDIATE")
            writing = asyncio.create_task(store.put_many(records))
            await settle()
            async with asyncio.timeout(60):
                assert await _read(store, [*before, *records]) == before
            assert not writing.done()
            connection.execute("ROLLBACK")
        assert await writing
        assert await _read(store, [*before, *records]) == before | records


def _fill_with_garbage(directory):
    """Overwrite the store's file and its log, keeping their lengths."""
    for path in (_database(directory), Path(f"{_database(directory)}-wal")):
        with path.open("r+b") as file:
            file.write(os.urandom(path.stat().st_size))


async def test_garbage_in_the_file_is_a_miss_and_a_new_file(tmp_path, caplog):
    """A file that is overwritten under the open store is moved aside, and the store goes on."""
    records = _records(range(10))
    async with Store(tmp_path, GIB) as store:
        assert await store.put_many(records)
        with _foreign(tmp_path) as connection:
            # Another's write makes the store's connections look at the file again.
            connection.execute("INSERT INTO Settings VALUES ('foreign', 1)")
            _fill_with_garbage(tmp_path)
            assert await _read(store, list(records)) == {}
        assert "reading from the disk tier failed" in caplog.text
        assert "a new one is begun" in caplog.text
        assert await store.put_many(records)
        assert await _read(store, list(records)) == records
    assert len(list(tmp_path.glob(f"v{FORMAT}.damaged-*/cache.db"))) == 1


async def test_garbage_found_by_a_write_loses_no_write(tmp_path):
    """The write that finds the damage goes into the new file."""
    async with Store(tmp_path, GIB) as store:
        await store.put_many(_records(range(10)))
        with _foreign(tmp_path) as connection:
            connection.execute("INSERT INTO Settings VALUES ('foreign', 1)")
            _fill_with_garbage(tmp_path)
            assert await store.put_many(_records([11]))
        assert await _read(store, [_address(11)]) == _records([11])


async def test_a_damaged_file_at_the_start_is_moved_aside(tmp_path, caplog):
    """A file that does not open is kept for later, and the store begins anew."""
    _database_is_garbage(tmp_path)
    async with Store(tmp_path, GIB) as store:
        assert await store.put_many(_records([1]))
        assert await _read(store, [_address(1)]) == _records([1])
    (aside,) = tmp_path.glob(f"v{FORMAT}.damaged-*/cache.db")
    assert aside.read_bytes().startswith(b"no database at all")
    assert "moved to" in caplog.text


@pytest.mark.parametrize("replace", [False, True])
async def test_a_file_that_is_taken_away_is_let_go(tmp_path, replace):
    """What is written after the file was deleted, or another put in its place, is not lost."""
    async with Store(tmp_path, GIB) as store:
        await store.put_many(_records([1]))
        for path in store.folder.glob("cache.db*"):
            path.unlink()
        if replace:
            async with Store(tmp_path, GIB) as other:
                await other.put_many(_records([2]))
        assert await store.put_many(_records([3]))
    async with Store(tmp_path, GIB) as store:
        found = await _read(store, [_address(i) for i in (1, 2, 3)])
    assert found == _records([2, 3] if replace else [3])


async def test_a_disk_that_is_nearly_full_is_spared(tmp_path, monkeypatch, caplog):
    """With little room left nothing is written, hits go on, and it recovers by itself."""
    async with Store(tmp_path, GIB) as store:
        await store.put_many(_records([1]))
        monkeypatch.setattr(disk_full, "FREE_BYTES", 1 << 62)
        assert await store.put_many(_records([2])) is False
        assert "nearly full" in caplog.text
        assert await _read(store, [_address(1)]) == _records([1])
        monkeypatch.setattr(disk_full, "FREE_BYTES", 0)
        assert await store.put_many(_records([2]))


async def test_writes_that_wait_become_one_transaction(tmp_path, monkeypatch):
    """Whatever comes while the writer is busy is written together, and each is told."""
    sizes = []
    write = database.Database.write

    def counting(self, changes, recent):
        sizes.append(len(changes.records))
        write(self, changes, recent)

    monkeypatch.setattr(database.Database, "write", counting)
    async with Store(tmp_path, GIB) as store:
        told = await asyncio.gather(*(store.put_many(_records([i])) for i in range(50)))
        assert all(told)
        assert await _read(store, [_address(i) for i in range(50)]) == _records(range(50))
    assert sum(sizes) == 50
    assert len(sizes) <= 2


async def test_what_keeps_failing_is_left_alone(tmp_path, monkeypatch):
    """After three failed writes in a row the next is not even tried, for a while."""
    tries = []

    def failing(*_):
        tries.append(1)
        raise sqlite3.OperationalError("disk I/O error")

    async with Store(tmp_path, GIB) as store:
        with monkeypatch.context() as patch:
            patch.setattr(database.Database, "write", failing)
            told = [await store.put_many(_records([i])) for i in range(10)]
        assert (any(told), len(tries)) == (False, 3)
        store._writer.backoff._until = 0.0  # the rest is over
        assert await store.put_many(_records([1]))


async def test_only_the_record_that_was_bad_is_deleted(tmp_path):
    """A record that was replaced since it was read stays."""
    async with Store(tmp_path, GIB) as store:
        await store.put_many({_address(1): b"bad", _address(2): b"good"})
        assert await store.delete_many({_address(1): b"bad", _address(2): b"bad"})
        assert await _read(store, [_address(1), _address(2)]) == {_address(2): b"good"}


async def test_what_is_used_often_is_not_driven_out(tmp_path):
    """What is asked for again and again survives, though its uses are not on disk yet."""
    limit, size = 2 << 20, 6184
    used = _records(range(20), size)
    async with Store(tmp_path, limit) as store:
        await store.put_many(used)
        for start in range(20, 600, 20):
            store.touch(used)
            await store.put_many(_records(range(start, start + 20), size))
            assert await _read(store, list(used)) == used
        assert await _read(store, list(_records(range(20, 40)))) == {}


def _directory_is_a_file(directory):
    directory.write_bytes(b"")


def _folder_is_a_file(directory):
    directory.mkdir()
    (directory / f"v{FORMAT}").write_bytes(b"")


def _database_is_a_directory(directory):
    _database(directory).mkdir(parents=True)


def _database_is_garbage(directory):
    _database(directory).parent.mkdir(parents=True)
    _database(directory).write_bytes(b"no database at all " * 1000)


@pytest.mark.parametrize(
    "spoil",
    [_directory_is_a_file, _folder_is_a_file, _database_is_a_directory],
)
async def test_a_directory_that_cannot_be_used_is_said_so(tmp_path, spoil):
    """Opening raises StoreError that names the folder and the cause, and leaves no thread."""
    spoil(tmp_path / "cache")
    with pytest.raises(StoreError) as caught:
        async with Store(tmp_path / "cache", GIB):
            pytest.fail("the store opened")
    assert str(caught.value).startswith(f"{tmp_path / 'cache' / f'v{FORMAT}'}: ")
    cause = caught.value.__cause__
    assert (cause.strerror or str(cause)) in str(caught.value)
    assert "Errno" not in str(caught.value)
    assert not [t.name for t in threading.enumerate() if t.name.startswith("store-")]


# Eviction.


@pytest.mark.parametrize("batch", [37, 400, 2500], ids=lambda n: f"{n} a write")
async def test_the_file_stays_at_its_limit_and_the_oldest_go(tmp_path, batch):
    """Past the limit every write drives out the oldest, and as many as it must, not more."""
    limit, size, total = 10 << 20, 6184, 3000
    async with Store(tmp_path, limit) as store, contextlib.AsyncExitStack() as stack:
        connection = stack.enter_context(_foreign(tmp_path))
        for start in range(0, total, batch):
            end = min(start + batch, total)
            assert await store.put_many(_records(range(start, end), size))
            ((pages,),) = connection.execute("PRAGMA page_count")
            ((free,),) = connection.execute("PRAGMA freelist_count")
            # The few pages of schema and indexes are counted but not freed.
            assert (pages - free) * PAGE_BYTES <= limit + 8 * PAGE_BYTES
            kept = [key for (key,) in connection.execute("SELECT key FROM Cache")]
            assert set(kept) == {_address(i) for i in range(end - len(kept), end)}
            if end * size > limit:
                assert len(kept) * size > 0.84 * limit
        assert 0.84 * limit < len(kept) * size <= limit
        survivors = _records(range(total - len(kept), total), size)
        assert await _read(store, [_address(i) for i in range(total)]) == survivors
    # Freed pages are used again: the file never grew by more than one write past the limit.
    assert _database(tmp_path).stat().st_size <= 1.1 * (limit + batch * size)


async def test_what_was_written_again_counts_as_new(tmp_path):
    """A record that is written anew is not the next to be driven out."""
    limit, size = 3 << 20, 6184
    again = _records(range(20), size)
    async with Store(tmp_path, limit) as store:
        await store.put_many(again)
        await store.put_many(_records(range(20, 300), size))
        await store.put_many(again)
        assert len(await _read(store, [_address(i) for i in range(300)])) == 300
        await store.put_many(_records(range(300, 460), size))
        assert await _read(store, list(again)) == again
        assert await _read(store, [_address(i) for i in range(20, 40)]) == {}


async def test_below_the_limit_nothing_goes(tmp_path):
    """No record is driven out while there is room."""
    limit, size = 3 << 20, 6184
    records = _records(range(250), size)
    async with Store(tmp_path, limit) as store:
        for address, record in records.items():
            assert await store.put_many({address: record})
        assert await _read(store, list(records)) == records


# What put_many has returned for is there after a kill.

WRITER = """
import asyncio, sys
from pathlib import Path
from embedding_proxy.cache.disk.database import log_bytes
from embedding_proxy.cache.disk.store import Store

async def main(directory, start):
    async with Store(Path(directory), 1 << 30) as store:
        for batch in range(start, 1 << 30):
            records = {
                (50 * batch + i).to_bytes(16, "big"): b"%d " % batch * 1000 for i in range(50)
            }
            assert await store.put_many(records)
            print(batch, flush=True)

asyncio.run(main(sys.argv[1], int(sys.argv[2])))
"""


async def test_what_was_acknowledged_survives_a_kill(tmp_path):
    """A writer is killed right after its n-th batch, round after round: no batch is lost or cut."""
    root = Path(store_module.__file__).parents[1]
    acknowledged = -1
    for enough in (1, 2, 3, 5, 8):
        writer = await asyncio.create_subprocess_exec(
            sys.executable,
            *("-c", WRITER, str(tmp_path), str(acknowledged + 1)),
            env={**os.environ, "PYTHONPATH": str(root)},
            stdout=asyncio.subprocess.PIPE,
        )
        for _ in range(enough):
            acknowledged = int(await writer.stdout.readline())
        writer.kill()
        # What it said between the last line that was read and its end counts as well.
        rest, _ = await writer.communicate()
        acknowledged = max([acknowledged, *map(int, rest[: rest.rfind(b"\n") + 1].split())])
        assert writer.returncode == -9

        async with Store(tmp_path, GIB) as store:
            batches = {
                batch: [(50 * batch + i).to_bytes(16, "big") for i in range(50)]
                for batch in range(acknowledged + 2)
            }
            for batch, addresses in batches.items():
                kept = await _read(store, addresses)
                # The batch after the last acknowledged one may be there, but never in part.
                assert len(kept) == 50 or (batch > acknowledged and not kept)
                assert set(kept.values()) <= {b"%d " % batch * 1000}
            with _foreign(tmp_path) as connection:
                assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)


async def test_a_closed_store_misses_and_keeps_nothing(tmp_path):
    """After closing, a read is a miss and a write says that it did not happen."""
    async with Store(tmp_path, GIB) as store:
        await store.put_many(_records([1]))
    assert await _read(store, [_address(1)]) == {}
    assert await store.put_many(_records([2])) is False


async def test_an_empty_file_left_by_a_kill_gets_the_page_size_too(tmp_path):
    """A kill between creating the file and laying it out leaves no store of 4 KiB pages."""
    _database(tmp_path).parent.mkdir(parents=True)
    _database(tmp_path).touch()
    async with Store(tmp_path, GIB):
        with _foreign(tmp_path) as connection:
            assert connection.execute("PRAGMA page_size").fetchone() == (PAGE_BYTES,)


# What the disk refuses waits in memory.


@contextlib.contextmanager
def _locked(directory):
    """Keep the store's file locked for a while, as another process can."""
    with _foreign(directory) as connection:
        connection.execute("BEGIN IMMEDIATE")
        yield
        connection.execute("ROLLBACK")


async def test_what_the_disk_refuses_is_read_and_written_later(tmp_path, monkeypatch):
    """It is served from memory meanwhile, and is on disk after the next flush that succeeds."""
    monkeypatch.setattr(database, "BUSY_SECONDS", 0.01)
    records = _records(range(5))
    async with Store(tmp_path, GIB) as store:
        with _locked(tmp_path):
            assert await store.put_many(records) is False
            await store._tick(store_module.FLUSH_TICKS)
            assert await _read(store, list(records)) == records
        await store._tick(store_module.FLUSH_TICKS - 1)
        assert _rows(tmp_path) == 0
        await store._tick(store_module.FLUSH_TICKS)
        assert _rows(tmp_path) == 5
        assert store._pending.backlog == {}
        assert await _read(store, list(records)) == records


async def test_closing_writes_what_the_disk_refused(tmp_path, monkeypatch):
    """What waits in memory is on disk after the store was closed, if the disk takes it by then."""
    monkeypatch.setattr(database, "BUSY_SECONDS", 0.01)
    records = _records(range(5))
    async with Store(tmp_path, GIB) as store:
        with _locked(tmp_path):
            assert await store.put_many(records) is False
    assert _rows(tmp_path) == 5


async def test_a_resting_disk_gets_what_was_bought_meanwhile(tmp_path):
    """While the disk is left alone records wait, are served, and go in when the rest is over."""
    records = _records(range(5))
    async with Store(tmp_path, GIB) as store:
        for _ in range(3):
            store._writer.backoff.fail()
        assert await store.put_many(records) is False
        assert await _read(store, list(records)) == records
        await store._tick(store_module.FLUSH_TICKS)
        assert _rows(tmp_path) == 0
        store._writer.backoff._until = 0.0
        await store._tick(store_module.FLUSH_TICKS)
        assert _rows(tmp_path) == 5


async def test_one_who_stops_waiting_leaves_the_write(tmp_path):
    """A write that nobody waits for any more is made, and the next ones as well."""
    held = threading.Event()
    async with Store(tmp_path, GIB) as store:
        holding = asyncio.create_task(store._disk.write(held.wait))
        waiting = [asyncio.create_task(store.put_many(_records([i]))) for i in range(3)]
        await settle()
        for task in waiting[:2]:
            task.cancel()
        await settle()
        held.set()
        assert await waiting[2]
        await holding
        assert await store.put_many(_records([3]))
        assert await _read(store, [_address(i) for i in range(4)]) == _records(range(4))


async def test_uses_are_written_now_and_then_and_in_the_end(tmp_path):
    """A use is in the file after the tenth tick, or when the store is closed."""
    address = _address(0)

    def used():
        with _foreign(tmp_path) as connection:
            return connection.execute("SELECT used FROM Entries").fetchone()[0]

    def age():
        with _foreign(tmp_path) as connection:
            connection.execute("UPDATE Entries SET used = 0")

    async with Store(tmp_path, GIB) as store:
        await store.put_many(_records([0]))
        age()
        store.touch([address])
        await store._tick(1)
        assert used() == 0
        await store._tick(store_module.FLUSH_TICKS)
        assert used() > 0
        age()
        store.touch([address])
    assert used() > 0


# Time to live.


@pytest.mark.parametrize("ttl", [1, 3600.5])
async def test_a_record_is_read_until_it_is_too_old(tmp_path, monkeypatch, ttl):
    """Age counts from when it was written, to the millisecond and less; reading adds nothing."""
    now = 1_800_000_000.0
    monkeypatch.setattr(store_module, "time", SimpleNamespace(time=lambda: now))
    async with Store(tmp_path, GIB, ttl_s=ttl) as store, Store(tmp_path, GIB) as ageless:
        await store.put_many(_records([1]))
        for age, there in ((0, True), (ttl / 2, True), (ttl - 1e-3, True), (ttl + 1e-3, False)):
            now = 1_800_000_000.0 + age
            assert bool(await _read(store, [_address(1)])) is there
        assert await _read(ageless, [_address(1)]) == _records([1])
        await store.put_many(_records([1]))
        now += ttl / 2
        assert await _read(store, [_address(1)]) == _records([1])


async def test_what_is_too_old_is_deleted_in_time(tmp_path, monkeypatch):
    """Now and then the old records go from the file, and no younger one with them."""
    now = 1_800_000_000.0
    monkeypatch.setattr(store_module, "time", SimpleNamespace(time=lambda: now))
    monkeypatch.setattr("embedding_proxy.cache.disk.purge.ROWS_A_TRANSACTION", 10)
    async with Store(tmp_path, GIB, ttl_s=100) as store:
        await store.put_many(_records(range(25)))
        now += 60
        await store.put_many(_records(range(25, 30)))
        now += 50
        await store._tick(store_module.EXPIRY_TICKS)
        assert _rows(tmp_path) == 30
        await store._tick(store_module.EXPIRY_TICKS + 1)
        assert _rows(tmp_path) == 5
        assert await _read(store, [_address(i) for i in range(30)]) == _records(range(25, 30))


async def test_without_a_time_to_live_nothing_is_deleted(tmp_path, monkeypatch):
    """By default records are kept however old they are."""
    monkeypatch.setattr(store_module, "time", SimpleNamespace(time=lambda: 0.0))
    async with Store(tmp_path, GIB) as store:
        await store.put_many(_records([1]))
        monkeypatch.undo()
        await store._tick(store_module.EXPIRY_TICKS + 1)
        assert await _read(store, [_address(1)]) == _records([1])


async def test_one_process_at_a_time_deletes_what_has_expired(tmp_path, monkeypatch):
    """While another process is at it a worker does nothing, and the next time it does its part."""
    now = 1_800_000_000.0
    monkeypatch.setattr(store_module, "time", SimpleNamespace(time=lambda: now))
    async with Store(tmp_path, GIB, ttl_s=100) as store:
        await store.put_many(_records(range(5)))
        now += 200
        lock = WriterLock(tmp_path / store_module.EXPIRY_LOCK, 0)
        with contextlib.closing(lock), lock:
            await store._tick(1)
            assert _rows(tmp_path) == 5
        await store._tick(1)
        assert _rows(tmp_path) == 0


async def test_a_frozen_cache_deletes_nothing_that_has_expired(tmp_path, monkeypatch):
    """What is too old is not served, and stays for a proxy that may buy it again."""
    now = 1_800_000_000.0
    monkeypatch.setattr(store_module, "time", SimpleNamespace(time=lambda: now))
    settings = Settings.model_validate(
        {"cache": {"directory": str(tmp_path), "mode": "frozen", "ttl_days": 1}}
    )
    async with Store(tmp_path, GIB) as store:
        await store.put_many(_records(range(5)))
    now += 200_000
    async with EmbeddingService(settings) as service:
        await service._storage.store._tick(1)
        assert await _read(service._storage.store, list(_records(range(5)))) == {}
    assert _rows(tmp_path) == 5


async def test_what_expires_is_found_by_an_index_and_not_overwritten(tmp_path, monkeypatch):
    """No step reads the whole table, and what is evicted later is not overwritten either."""
    monkeypatch.setattr("embedding_proxy.cache.disk.purge.ROWS_A_TRANSACTION", 10)
    statements = []
    async with Store(tmp_path, GIB, ttl_s=100) as store:
        await store.put_many(_records(range(40)), Partition("a", "m", 4))
        await store.put_many(_records(range(40, 60)))
        with _foreign(tmp_path) as connection:
            connection.execute("UPDATE Entries SET stored = 5 WHERE id % 2")
        await store._disk.write(
            lambda: store._disk.file.cache._con.set_trace_callback(statements.append)
        )
        await store._tick(1)
        (secure,) = await store._disk.write(
            lambda: store._disk.file.sql("PRAGMA secure_delete").fetchone()
        )
        assert secure == 0
        assert _rows(tmp_path) == 30
        looks = [one for one in statements if one.startswith("SELECT stored, id, used")]
        assert len(looks) >= 4
        with _foreign(tmp_path) as connection:
            for look in looks:
                ((*_, how),) = connection.execute(f"EXPLAIN QUERY PLAN {look}").fetchall()
                assert "USING INDEX Entries_stored (partition=? AND stored>? AND stored<?)" in how


async def test_a_purge_leaves_the_connection_as_it_was(tmp_path):
    """What is purged is overwritten; what is evicted afterwards by the same connection is not."""
    with connection.opened(tmp_path, GIB, create=True) as file:
        file.write(
            WriteBatch(records={a: PendingRecord(r, None) for a, r in _records(range(5)).items()})
        )
        steps = purge.delete(file, purge.PurgeFilter())
        assert next(steps) == 5
        assert file.sql("PRAGMA secure_delete").fetchall() == [(0,)]
        assert list(steps) == [0]


async def test_the_purchase_that_is_newer_wins(tmp_path):
    """What a busy disk refused is written later in place of an older record, not of a newer one."""
    old, new = b"the expired one", b"bought anew"
    address = _address(1)
    for first, second, expected in ((5.0, 9.0, new), (9.0, 5.0, old)):
        with connection.opened(tmp_path, GIB, create=True) as file:
            file.write(WriteBatch(records={address: PendingRecord(old, None, first)}))
            backlog = {address: PendingRecord(new, None, second)}
            file.write(WriteBatch(records=backlog, keep_newer=True))
            ((value, stored),) = file.sql(
                "SELECT value, Entries.stored FROM Cache JOIN Entries ON id = Cache.rowid"
            )
            assert (value, stored) == (expected, 9000)


async def test_a_purchase_for_an_expired_record_outlives_a_busy_disk(tmp_path, monkeypatch):
    """Its write fails, the old record is still there; the flush puts the new one in its place."""
    now = 1_800_000_000.0
    monkeypatch.setattr(store_module, "time", SimpleNamespace(time=lambda: now))
    async with Store(tmp_path, GIB, ttl_s=100) as store:
        await store.put_many({_address(1): b"old"})
        now += 200
        write = store._disk.file.write
        monkeypatch.setattr(store._disk.file, "write", _refuse)
        assert await store.put_many({_address(1): b"new"}) is False
        monkeypatch.setattr(store._disk.file, "write", write)
        await store._writer.flush()
    async with Store(tmp_path, GIB, ttl_s=100) as store:
        assert await _read(store, [_address(1)]) == {_address(1): b"new"}


def _refuse(*_):
    raise OSError("busy")


async def test_a_file_that_is_replaced_while_a_write_waits_gets_nothing(tmp_path):
    """Whoever waits for the lock looks at the file only once it has it: no write is lost."""
    async with Store(tmp_path, GIB) as store:
        await store.put_many(_records([1]))
        lock = connection.lock_of(tmp_path)
        with contextlib.closing(lock):
            with lock:
                write = asyncio.create_task(store.put_many(_records([2])))
                await settle()
                _database(tmp_path).rename(tmp_path / "elsewhere.db")
                for tail in ("-wal", "-shm"):
                    _database(tmp_path).with_name(f"cache.db{tail}").unlink(missing_ok=True)
            assert await write
        assert await _read(store, [_address(2)]) == _records([2])
        assert _rows(tmp_path) == 1


async def test_a_reader_without_an_end_does_not_make_the_log_outgrow_the_limit(
    tmp_path, monkeypatch
):
    """File and log stay within the limit; what waits meanwhile is read, and written afterwards."""
    monkeypatch.setattr(database, "LOG_WAIT_MS", 0)
    limit, size = 8 << 20, 6000
    total = dict.fromkeys(range(1600))
    async with Store(tmp_path, limit) as store:
        await store.put_many(_records(range(100), size))
        with _foreign(tmp_path) as reader:
            reader.execute("BEGIN")
            reader.execute("SELECT count(*) FROM Cache").fetchall()
            written = []
            for start in range(100, len(total), 20):
                store._writer.backoff.succeed()
                written.append(await store.put_many(_records(range(start, start + 20), size)))
                files = (_database(tmp_path), _database(tmp_path).with_name("cache.db-wal"))
                assert sum(file.stat().st_size for file in files) <= 1.05 * limit
            # There is some room for a longer log, and then there is none.
            assert written[:10] == [True] * 10
            assert written[-10:] == [False] * 10
            late = _records(range(len(total) - 20, len(total)), size)
            assert await _read(store, list(late)) == late
        store._writer.backoff.succeed()
        await store._writer.flush()
        assert not store._pending.backlog
        assert await store.put_many(_records([9999], size))
        assert _database(tmp_path).with_name("cache.db-wal").stat().st_size <= limit // 8
        assert await _read(store, list(late)) == late
