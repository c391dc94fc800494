"""The SQLite file of the outbox: its tables, how it is opened, and the recovery from damage.

The process that finds the file damaged moves it aside and makes a new one. The other processes see
that another file is at the path, and open that. The pending points of the damaged file are lost;
their ids are not known any more, so the next answers with them add them again.
"""

import contextlib
import logging
import sqlite3
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

from embedding_proxy.cache import atomic_file, private_files
from embedding_proxy.cache.disk.database import is_damage
from embedding_proxy.cache.disk.lock import WriterLock
from embedding_proxy.cache.disk.read_only import connect_read_only

T = TypeVar("T")

log = logging.getLogger("embedding_proxy.index")

FILE_NAME = "index-outbox.db"
LOCK_TIMEOUT_SECONDS = 2.0
"""The longest wait for another process that writes. A request may wait meanwhile."""

_FREE_PAGES = 2048
"""Free pages of 4 KiB that the file keeps, and that one vacuum frees."""
_VERSION = 3
_LAYOUT = """
CREATE TABLE IF NOT EXISTS target (
    id INTEGER PRIMARY KEY, collection TEXT, space TEXT, dimensions INTEGER,
    UNIQUE (collection, space, dimensions));
CREATE TABLE IF NOT EXISTS waiting (
    seq INTEGER PRIMARY KEY AUTOINCREMENT, target INTEGER, point BLOB, bytes INTEGER, at REAL,
    payload BLOB, vector BLOB, UNIQUE (target, point));
CREATE INDEX IF NOT EXISTS line ON waiting (target, seq, bytes, at);
CREATE TABLE IF NOT EXISTS known (
    target INTEGER, point BLOB, mark INTEGER, PRIMARY KEY (target, point)) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS dead (
    target INTEGER, point BLOB, bytes INTEGER, at REAL, died REAL, reason TEXT,
    payload BLOB, vector BLOB, PRIMARY KEY (target, point));
CREATE TABLE IF NOT EXISTS state (forgotten INTEGER);
INSERT INTO state SELECT 0 WHERE NOT EXISTS (SELECT 1 FROM state);
"""
# In files of version 1 the namespace is in the payload, and the id is the address unless a request
# named it.
_SECOND = "".join(
    f"""
ALTER TABLE {table} ADD COLUMN sum BLOB;
ALTER TABLE {table} ADD COLUMN address BLOB;
ALTER TABLE {table} ADD COLUMN namespace TEXT;
UPDATE {table} SET address = point,
    namespace = coalesce(json_extract(CAST(payload AS TEXT), '$.namespace'), '');
"""
    for table in ("waiting", "dead")
)
# The table of known ids becomes a journal: it has the time at which a point was added, and all that
# makes the point again, given its vector from the cache. `mark` is 0 if the next answer need not
# write the point again. A target has the state of its collection at the last check.
# A constant default changes no row, so a large file is upgraded at once.
_THIRD = """
ALTER TABLE waiting ADD COLUMN digest BLOB;
ALTER TABLE waiting ADD COLUMN vectors BLOB;
ALTER TABLE waiting ADD COLUMN is_update INTEGER DEFAULT 0;
ALTER TABLE waiting ADD COLUMN tries INTEGER DEFAULT 0;
ALTER TABLE dead ADD COLUMN digest BLOB;
ALTER TABLE dead ADD COLUMN vectors BLOB;
ALTER TABLE dead ADD COLUMN is_update INTEGER DEFAULT 0;
ALTER TABLE dead ADD COLUMN tries INTEGER DEFAULT 1;
ALTER TABLE dead ADD COLUMN due REAL DEFAULT 0;
ALTER TABLE known ADD COLUMN at REAL DEFAULT {now};
ALTER TABLE known ADD COLUMN address BLOB;
ALTER TABLE known ADD COLUMN digest BLOB;
ALTER TABLE known ADD COLUMN namespace TEXT;
ALTER TABLE known ADD COLUMN payload BLOB;
ALTER TABLE known ADD COLUMN vectors BLOB;
ALTER TABLE known ADD COLUMN is_update INTEGER DEFAULT 0;
CREATE INDEX aged ON known (at);
ALTER TABLE target ADD COLUMN identity TEXT;
ALTER TABLE target ADD COLUMN points INTEGER;
"""


class OutboxFile:
    """The file in `folder`, open. Use it from one thread. Everything raises sqlite3.Error, OSError.

    Use `sql` to read, and `change` for every change.
    """

    def __init__(self, folder: Path) -> None:
        private_files.make_folder(folder)
        self.path = folder / FILE_NAME
        self.damaged = 0
        """How often this process has moved a damaged file aside."""
        self.renewed = 0
        """How often this process has opened another file than the first."""
        self._lock = WriterLock(folder / "index-outbox.lock", LOCK_TIMEOUT_SECONDS)
        try:
            with self._lock:
                self._open()
        except BaseException:
            self._lock.close()
            raise

    def _open(self) -> None:
        try:
            self.sql = _open_database(self.path)
        except sqlite3.DatabaseError as error:
            if not self._means_damage(error):
                raise
            self._set_aside(error)
            self.sql = _open_database(self.path)
        self._inode = self.path.stat().st_ino

    def _set_aside(self, error: sqlite3.Error) -> None:
        damaged = self.path.with_name(f"{self.path.name}.damaged-{time.time_ns()}")
        atomic_file.move(self.path, damaged)
        for tail in ("-wal", "-shm"):
            self.path.with_name(self.path.name + tail).unlink(missing_ok=True)
        self.damaged += 1
        log.error(
            "%s is damaged (%s): moved aside, what waited in it is not indexed", self.path, error
        )

    @property
    def replaced(self) -> bool:
        """Whether the file that is open is no longer the one at its path."""
        try:
            return self.path.stat().st_ino != self._inode
        except FileNotFoundError:
            return True

    def guarded(self, work: Callable[[], T]) -> T:
        """Return the result of `work`; a damaged file is replaced, and the work repeated."""
        if self.replaced:
            self._renew()
        try:
            return work()
        except sqlite3.Error as error:
            if not self._means_damage(error):
                raise
            self._renew(error)
        return work()

    def _means_damage(self, error: sqlite3.Error) -> bool:
        """Tell whether an error means a damaged file, and not a passing failure."""
        if is_damage(error):
            return True
        # SQLite reports a truncated file with the same error as a failing medium.
        return str(error).startswith("disk I/O error") and _is_cut_short(self.path)

    def _renew(self, error: sqlite3.Error | None = None) -> None:
        """Open the file at the path, after moving it aside if it is still the damaged one."""
        self.renewed += 1
        with self._lock:
            with contextlib.suppress(sqlite3.Error):
                self.sql.close()
            if error is not None and not self.replaced:
                self._set_aside(error)
            self._open()

    @contextlib.contextmanager
    def change(self) -> Iterator[sqlite3.Connection]:
        """Give a transaction; other writers wait."""
        with self._lock:
            if self.replaced:
                raise sqlite3.DatabaseError("the file was taken away")
            self.sql.execute("BEGIN IMMEDIATE")
            try:
                yield self.sql
                self.sql.execute("COMMIT")
            except BaseException:
                if self.sql.in_transaction:
                    self.sql.execute("ROLLBACK")
                raise

    @property
    def size(self) -> int:
        """Bytes of the file that are in use."""
        pages, free, size = (
            self.sql.execute(f"PRAGMA {name}").fetchone()[0]
            for name in ("page_count", "freelist_count", "page_size")
        )
        return int((pages - free) * size)

    def incremental_vacuum(self) -> None:
        """Return free pages to the file system if there are many."""
        (free,) = self.sql.execute("PRAGMA freelist_count").fetchone()
        if free > _FREE_PAGES:
            with self._lock:
                # `execute` would step it once, which frees one page.
                self.sql.executescript(f"PRAGMA incremental_vacuum({_FREE_PAGES})")

    def close(self) -> None:
        """Close the file."""
        try:
            with self._lock:  # the last connection writes the log into the file
                self.sql.close()
        finally:
            self.sql.close()
            self._lock.close()


class ReadOnlyOutbox:
    """The file in `folder`, where it cannot be written. Everything raises sqlite3.Error."""

    def __init__(self, folder: Path) -> None:
        path = folder / FILE_NAME
        self.sql, _ = connect_read_only(path, "target")
        (version,) = self.sql.execute("PRAGMA user_version").fetchone()
        if version != _VERSION:
            self.sql.close()
            raise sqlite3.OperationalError(
                f"{path} has version {version} and cannot be written; version {_VERSION} is read:"
                " open it once where it can be written"
            )

    def close(self) -> None:
        """Close the file."""
        self.sql.close()


def _is_cut_short(path: Path) -> bool:
    """Tell whether a file has fewer pages than its header says."""
    try:
        with path.open("rb") as file:
            head = file.read(32)
    except FileNotFoundError:
        return False
    if len(head) < 32:
        return True
    page, pages = int.from_bytes(head[16:18]), int.from_bytes(head[28:32])
    return path.stat().st_size < (page if page > 1 else 1 << 16) * pages


def _open_database(path: Path) -> sqlite3.Connection:
    private_files.create(path)
    sql = sqlite3.connect(path, isolation_level=None, timeout=LOCK_TIMEOUT_SECONDS)
    try:
        # Deleted vectors leave whole free pages, so the file can shrink.
        sql.execute("PRAGMA auto_vacuum = INCREMENTAL")
        sql.execute("PRAGMA journal_mode = WAL")
        sql.execute("PRAGMA synchronous = NORMAL")
        (version,) = sql.execute("PRAGMA user_version").fetchone()
        if version > _VERSION:
            raise sqlite3.OperationalError(f"{path} is of a later version")  # noqa: TRY301
        third = _THIRD.format(now=time.time())
        steps = "".join((_LAYOUT, _SECOND, third)[version:])
        if steps:
            # In one transaction, so that an upgrade that was killed begins again.
            sql.executescript(f"BEGIN; {steps} PRAGMA user_version = {_VERSION}; COMMIT;")
    except BaseException:
        sql.close()
        raise
    return sql
