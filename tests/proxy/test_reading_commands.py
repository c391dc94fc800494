"""Commands that only read, on a store that cannot be written: read-only, full, or locked.

There the bill and a rescue copy are needed most. Every fault is a real one where file systems can
be mounted; elsewhere, and for what no test can make, the opening for writing fails by injection.
"""

import contextlib
import errno
import json
import shutil
import sqlite3
import time
from contextlib import closing
from functools import partial
from types import SimpleNamespace

import disk_faults
import pytest
from disk_faults import CannotMount, file_system, full, locked, read_only
from embedding_proxy.cache.disk import connection, database, disk_full, exclusive_file
from embedding_proxy.cache.disk.write_batch import WriteBatch
from embedding_proxy.cache.key import Namespace, Row, keyring
from embedding_proxy.cache.ledger import LedgerKey, Usage
from embedding_proxy.cache.maintenance import archive
from embedding_proxy.cache.record import Entry, encode
from embedding_proxy.index.outbox import Outbox
from embedding_proxy.index.point import Point, Target
from embedding_proxy.providers.base import Space
from fault_server import vector_of

GIB = 1 << 30
WIDTH = 64
SPACE = Space("a/small", WIDTH)
ENTRIES = 50


def _row(text):
    key = keyring(SPACE, Namespace("")).key(text)
    vector = vector_of("small", text, WIDTH).tobytes()
    record = encode(Entry(vector, 1, True, key.digest))  # noqa: FBT003
    return Row(key.address, record, time.time() - 100, keyring(SPACE).partition)


@pytest.fixture
def directory(tmp_path):
    """Give the folder of a store, in one where a file system can be mounted."""
    return tmp_path / "disk" / "cache"


@pytest.fixture
def fill(directory):
    """Give a function that makes a store of some entries, a bill and points that wait."""

    def put():
        with connection.opened(directory, GIB, create=True) as file:
            list(archive.import_rows(file, [_row(f"text {i}") for i in range(ENTRIES)]))
            heading = LedgerKey(keyring(SPACE).partition, "small", "openai", "client")
            usage = Usage(misses=ENTRIES, tokens_billed=ENTRIES, nanodollars_billed=10**9)
            file.write(WriteBatch(usage={(20_000, heading): usage}))
        with closing(Outbox(directory, GIB)) as outbox:
            row = _row("text 1")
            point = Point(row.address, bytes(4), b"{}", 0, False, row.address, "")  # noqa: FBT003
            outbox.add(Target("docs", SPACE.name, WIDTH), [point])
        return directory / "v1" / "cache.db"

    return put


@pytest.fixture
def run(tmp_path, directory, monkeypatch, command):
    """Give a function that runs `cache …` on the store, and waits for no lock for long."""
    monkeypatch.setattr(database, "BUSY_SECONDS", 0.01)
    config = tmp_path / "config.yaml"
    config.write_text(json.dumps({"cache": {"directory": str(directory)}}))

    def run_command(*arguments):
        yes = ["--yes"] if arguments[0] == "purge" else []
        return command("cache", *arguments, *yes, "--config", config)

    return run_command


@contextlib.contextmanager
def _mounted(mount):
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(mount)
        except CannotMount as error:
            pytest.skip(f"no file system can be mounted here: {error}")
        yield


@contextlib.contextmanager
def _failing(error, monkeypatch):
    """Let every opening for writing fail."""

    def fail(*_):
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(connection, "Database", fail)
        patch.setattr(exclusive_file, "ExclusiveFile", fail)
        patch.setattr("embedding_proxy.proxy.cli.cache_purge.OutboxFile", fail)
        yield


def _sql_error(name, message):
    error = sqlite3.OperationalError(message)
    error.sqlite_errorname, error.sqlite_errorcode = name, getattr(sqlite3, name)
    return error


INJECTED = {
    "read-only file system": OSError(errno.EROFS, "Read-only file system"),
    "no permission": PermissionError(errno.EACCES, "Permission denied"),
    "no space": OSError(errno.ENOSPC, "No space left on device"),
    "readonly": _sql_error("SQLITE_READONLY_DBMOVED", "attempt to write a readonly database"),
    "full": _sql_error("SQLITE_FULL", "database or disk is full"),
    "shared memory": _sql_error("SQLITE_IOERR_SHMSIZE", "disk I/O error"),
    "locked": TimeoutError("another process keeps writing to the store"),
    "busy": _sql_error("SQLITE_BUSY", "database is locked"),
}
REAL = {
    "read-only": lambda directory: _mounted(read_only(directory)),
    "no byte free": lambda directory: full(directory.parent),
    **{how: partial(locked, how) for how in disk_faults.LOCKS},
}


@pytest.fixture(params=[*REAL, *INJECTED])
def fault(request, directory, monkeypatch):
    """Give what makes a fault, on a file system that can be filled where that is needed."""
    with contextlib.ExitStack() as stack:
        if request.param == "no byte free":
            stack.enter_context(_mounted(file_system(directory.parent, 96 << 20)))
        else:
            directory.parent.mkdir()
        if request.param in REAL:
            yield lambda: REAL[request.param](directory)
        else:
            yield lambda: _failing(INJECTED[request.param], monkeypatch)


def test_what_only_reads_works_where_nothing_can_be_written(fault, run, fill, tmp_path):
    """The bill, the check of all records, a copy and an export are had, as without the fault."""
    path = fill()
    archive = tmp_path / "archive.emba"
    assert run("export", archive).code == 0
    shown = (
        ["stats", "--json"],
        ["stats", "--by", "model", "--json"],
        ["verify", "--json"],
        ["purge", "--all", "--dry-run", "--json"],
        ["import", archive, "--dry-run", "--json"],
    )
    expected = [run(*arguments).json for arguments in shown]
    before = path.read_bytes()
    with fault():
        done = [run(*arguments) for arguments in shown]
        backup = run("backup", tmp_path / "copy.db")
        export = run("export", tmp_path / "copy.emba")
        assert path.read_bytes() == before
    assert [(one.code, one.err) for one in (*done, backup, export)] == [(0, "")] * 7
    found = [one.json for one in done]
    # The files beside the database come and go with its connections.
    for stats in (expected[0], found[0]):
        for name in ("file_bytes", "data_bytes", "wal_bytes"):
            stats.pop(name)
    assert found == expected
    assert found[0]["entries"] == ENTRIES
    assert found[1][0]["usd_billed"] == 1.0
    assert (found[3]["chosen"], found[3]["waiting"]) == (ENTRIES, 1)
    shutil.rmtree(path.parent, ignore_errors=True)
    path.parent.mkdir(exist_ok=True)
    shutil.copy(tmp_path / "copy.db", path)
    assert run("verify", "--json").json["records"] == ENTRIES
    assert export.out == f"{tmp_path / 'copy.emba'}: {ENTRIES} entries\n"


REMEDIES = {
    "read-only file system": "write access",
    "no permission": "write access",
    "readonly": "write access",
    "no space": "free some space",
    "full": "free some space",
    "locked": "end or continue the process",
    "busy": "end or continue the process",
}


@pytest.mark.parametrize("failure", REMEDIES)
def test_what_writes_says_why_it_cannot(failure, run, fill, monkeypatch, tmp_path):
    """One line, with the remedy; nothing is changed."""
    fill()
    archive = tmp_path / "archive.emba"
    assert run("export", archive).code == 0
    with _failing(INJECTED[failure], monkeypatch):
        for command in (["purge", "--all"], ["verify", "--mend"], ["import", archive]):
            done = run(*command)
            assert (done.code, done.out, done.err.count("\n")) == (1, "", 1)
            error = INJECTED[failure]
            assert (getattr(error, "strerror", None) or str(error)) in done.err
            assert "Errno" not in done.err
            assert REMEDIES[failure] in done.err
    assert run("stats", "--json").json["entries"] == ENTRIES


def test_a_full_disk_is_named_where_sqlite_says_less(run, fill, monkeypatch):
    """Without room for shared memory it speaks of an I/O error; who writes is told the cause."""
    fill()
    with _failing(INJECTED["shared memory"], monkeypatch):
        assert "free some space" not in run("purge", "--all").err
        full = SimpleNamespace(disk_usage=lambda _: SimpleNamespace(free=0))
        monkeypatch.setattr(disk_full, "shutil", full)
        done = run("purge", "--all")
    assert (done.code, done.out, done.err.count("\n")) == (1, "", 1)
    assert "the disk is full, and the store cannot be changed in place: disk I/O error" in done.err
    assert "stop all proxies" in done.err
    assert "or free some space on the disk" in done.err


@pytest.mark.parametrize(
    ("layout", "says"), [(2, "open it once where it can be written"), (99, "")]
)
def test_another_layout_is_not_read_but_told(layout, says, run, fill, monkeypatch):
    """What cannot be brought up to the present layout is one line, with the remedy."""
    path = fill()
    with closing(sqlite3.connect(path)) as file:
        file.execute(f"PRAGMA user_version = {layout}")
    with _failing(INJECTED["readonly"], monkeypatch):
        for command in (["stats"], ["verify"], ["export", "-"]):
            done = run(*command)
            assert (done.code, done.out, done.err.count("\n")) == (1, "", 1)
            assert f"{path} has layout {layout}" in done.err
            assert says in done.err


def test_a_file_that_is_damaged_is_found_to_be(run, fill, monkeypatch):
    """Verification reports damage also of a file that can only be read."""
    path = fill()
    path.write_bytes(path.read_bytes()[:4096] + b"garbage" * 20_000)
    with _failing(INJECTED["readonly"], monkeypatch):
        done = run("verify")
    assert done.code == 1
    assert "the file is damaged" in done.out


def test_a_log_that_cannot_be_read_is_told(run, fill, monkeypatch):
    """Where SQLite can make no shared memory, the file is read without its log: that is said."""
    path = fill()
    real = sqlite3.connect

    def connect(address, *arguments, **options):
        if str(address).endswith("?mode=ro"):
            raise _sql_error("SQLITE_CANTOPEN", "unable to open database file")
        return real(address, *arguments, **options)

    log = path.with_name("cache.db-wal")
    monkeypatch.setattr(sqlite3, "connect", connect)
    with _failing(INJECTED["readonly"], monkeypatch):
        assert "the log" not in run("stats").err
        log.write_bytes(b"frames")
        done = run("stats", "--json")
    assert done.err.startswith("what the log cache.db-wal holds cannot be read, and is left out")
    assert done.json["entries"] == ENTRIES


@pytest.mark.parametrize(
    "name", ["writer.lock", "v1/cache.db", "v1/cache.db-wal", "v1/cache.db-shm"]
)
async def test_a_directory_in_the_place_of_a_file_is_named(name, tmp_path, upstream, start_proxy):
    """A proxy does not start, and says which it is and what to do."""
    cache = {"directory": str(tmp_path / "cache")}
    if name not in ("v1/cache.db", "writer.lock"):
        await start_proxy(openai=upstream, cache=cache)
        await start_proxy.stop()
    (tmp_path / "cache" / name).mkdir(parents=True)
    with pytest.raises(connection.StoreError) as caught:
        await start_proxy(openai=upstream, cache=cache)
    says = f"{tmp_path / 'cache' / name} is a directory, and the store needs a file there: move it"
    assert says in str(caught.value)


@pytest.mark.parametrize("name", ["writer.lock", "v1/cache.db", "v1/cache.db-wal"])
def test_commands_name_what_is_in_the_place_of_a_file(name, run, directory):
    """It is not said that there is no store yet."""
    (directory / name).mkdir(parents=True)
    for command in (["stats"], ["verify"], ["purge", "--all"]):
        done = run(*command)
        assert (done.code, done.out, done.err.count("\n")) == (1, "", 1)
        assert f"{directory / name} is a directory" in done.err
