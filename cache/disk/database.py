"""One SQLite file of records: opened, read and written. The only importer of diskcache.

Synchronous, and it raises: `store` decides on threads and on what a failure means. It knows neither
keys nor what is in a record: bytes in, bytes out.
"""

import contextlib
import sqlite3
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import diskcache
from embedding_proxy.cache import private_files

from . import (
    disk_full,
    eviction,
    ledger_reader,
    pages,
    quarantine,
    read_only,
    schema,
    write_ahead_log,
)
from .eviction import Eviction, StoreFull
from .lock import WriterLock
from .schema import CACHE_PAGES, MMAP_BYTES, PAGE_BYTES
from .write_batch import StoredRecord, Use, WriteBatch

BUSY_SECONDS = 2.0
"""The longest wait for another process's write. Then the write is given up."""

LOG_WAIT_MS = 100
"""How long a writer waits for readers to release a write-ahead log that has grown too long."""
_OTHER_PAGES = 16
"""The approximate pages that one transaction writes besides those of records."""

OWNER_SECONDS = 3.0
"""How long a process that opens the file waits for another that must save a deleted log."""
_OWNER_POLL_SECONDS = 0.05
_SAVE_TRIES = 10

FULL_SECONDS = 10.0
"""How long a store that is full of pinned entries gets no further attempt."""

LOG_DELETED = "the write-ahead log was deleted while the file was open"

FILE_NAME: str = diskcache.core.DBNAME

Timeout: type[Exception] = diskcache.Timeout
"""Raised when another process keeps the file locked for too long."""
STORE_FAILURES = (sqlite3.Error, Timeout)
FAILURES = (*STORE_FAILURES, OSError)
"""What any call here may raise."""

_RAW: int = diskcache.core.MODE_RAW
_SET = (
    "INSERT OR REPLACE INTO Settings VALUES (?, ?)",
    "UPDATE Settings SET value = ? WHERE key = ?",
)
"""How diskcache writes a setting."""


class RawDisk(diskcache.Disk):  # type: ignore[misc]
    """Stores only `bytes`, inside the database.

    diskcache pickles everything but bytes and plain scalars, and reading a pickle runs code
    (CVE-2025-69872). Here nothing is pickled, and a row that is marked as a pickle is never loaded.
    """

    def put(self, key: object) -> tuple[memoryview, bool]:
        """Return the database form of a key; only bytes are keys."""
        return sqlite3.Binary(_only_bytes(key)), True

    def get(self, key: object, raw: object) -> bytes:
        """Return the key in a row; raises ValueError for anything but raw bytes."""
        if not raw:
            raise ValueError("the row holds a pickled key; it is not read")
        return _only_bytes(key)

    def store(
        self,
        value: object,
        read: object,  # noqa: ARG002 - diskcache's signature
        key: object = None,  # noqa: ARG002
    ) -> tuple[int, int, None, memoryview]:
        """Return the columns (size, mode, filename, value) of a value; only bytes are values."""
        return 0, _RAW, None, sqlite3.Binary(_only_bytes(value))

    def fetch(self, mode: object, filename: object, value: object, read: object) -> bytes:  # noqa: ARG002
        """Return the value in a row; raises ValueError for anything but raw bytes."""
        if mode != _RAW:
            raise ValueError("the row holds no raw bytes; it is not read")
        return _only_bytes(value)


class QuietCache(diskcache.Cache):  # type: ignore[misc]
    """diskcache's cache, without repeated writes of settings that the file already has.

    Each write would be a transaction; together about 1 MB of log at each opening.
    """

    @property
    def _sql_retry(self) -> schema.Sql:
        run: schema.Sql = super()._sql_retry

        def run_unless_known(statement: str, parameters: Sequence[object] = ()) -> Any:  # noqa: ANN401 - a cursor
            if statement in _SET:
                key, value = parameters if statement == _SET[0] else reversed(parameters)
                query = "SELECT 1 FROM Settings WHERE key = ? AND value IS ?"
                if run(query, (key, value)).fetchall():
                    return None
            return run(statement, parameters)

        return run_unless_known


def _only_bytes(value: object) -> bytes:
    if type(value) is not bytes:
        raise ValueError(f"only bytes are kept here, not {type(value).__name__}")
    return value


def log_bytes(size_limit: int) -> int:
    """Return the limit of the write-ahead log of a store: a fiftieth of its own, at most 32 MiB."""
    return min(max(size_limit // PAGE_BYTES // 50, 4), 1000) * PAGE_BYTES


class LogHeld(TimeoutError):
    """A reader prevents SQLite from emptying the write-ahead log, and there is no room for more."""


class FileReplaced(OSError):
    """The open file is no longer the one at its path. A write would be lost."""


class Database:
    """The file in `folder`, of at most about `size_limit` bytes. Raises FAILURES.

    Each thread that uses it closes its own connection in the end. Many processes may have the file
    open; `lock` is theirs in common. Entries of namespaces in `pinned` are never evicted.
    """

    def __init__(
        self, folder: Path, size_limit: int, lock: WriterLock, pinned: Collection[str] = ()
    ) -> None:
        self.folder = folder
        self.path = folder / FILE_NAME
        self._lock = lock
        limit = max(1, size_limit // PAGE_BYTES)
        self._log_pages = log_bytes(size_limit) // PAGE_BYTES
        self._eviction = Eviction(max(1, limit - self._log_pages), pinned)
        self._size_limit = size_limit
        self._log = write_ahead_log.sibling_path(self.path, write_ahead_log.LOG)
        self._shared_memory = write_ahead_log.sibling_path(self.path, write_ahead_log.SHARED_MEMORY)
        self.most_bytes = max(size_limit // 64, 1 << 18)
        """The most bytes of one transaction, so that log and file stay within the limit."""
        self.uses_last_room = False
        """Whether records are also written when less than disk_full.FREE_BYTES is free."""
        self._full_until = 0.0
        self._is_let_go = False
        private_files.make_folder(folder)
        deadline = time.monotonic() + OWNER_SECONDS
        while not self._is_opened():
            if time.monotonic() >= deadline:
                raise sqlite3.OperationalError(
                    "the file is locked by a process whose write-ahead log was deleted; stop that"
                    " process, and what it has written is kept"
                )
            time.sleep(_OWNER_POLL_SECONDS)

    def _is_opened(self) -> bool:
        """Open the file, unless a process that has it open must first notice that its log is gone.

        That process has to save what is in it. A second log beside it would be its undoing.
        """
        with self._lock:
            quarantine.complete(self.path)
            if write_ahead_log.is_open_without_log(self.path):
                return False
            write_ahead_log.check(self.path)
            try:
                self.cache = self._open()
            except (sqlite3.OperationalError, schema.NewerLayout) as error:
                if not (_may_be_header(error) and pages.is_header_damaged(_head(self.path))):
                    raise
                raise sqlite3.DatabaseError(f"the file is damaged: {error}") from error
            except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
                # What diskcache, sqlite3 itself, or the way up from an older layout makes of a
                # table that holds what it cannot hold.
                raise sqlite3.DatabaseError(f"the file is damaged: {error}") from error
            self._inode = quarantine.inode_of(self.path)
            self._log_inodes = self._inodes_of_log()
        return True

    def _open(self) -> diskcache.Cache:
        schema.prepare(self.path)
        schema.check(self.path, BUSY_SECONDS)
        cache = QuietCache(
            str(self.folder),
            timeout=BUSY_SECONDS,
            disk=RawDisk,
            # Eviction is our own: that of diskcache counts pages that are already free.
            cull_limit=0,
            eviction_policy="none",
            sqlite_auto_vacuum=schema.INCREMENTAL,
            sqlite_cache_size=CACHE_PAGES,
            sqlite_journal_size_limit=self._log_pages * PAGE_BYTES,
            sqlite_mmap_size=MMAP_BYTES,
            # Evicted records need not be overwritten; purged records are (see `purge`).
            sqlite_secure_delete=0,
            sqlite_temp_store=disk_full.temp_store(),
            sqlite_wal_autocheckpoint=self._log_pages,
        )
        with cache.transact():
            for statement in schema.missing_steps(cache._sql):  # noqa: SLF001 - see `sql`
                cache._sql(statement)  # noqa: SLF001
            schema.rename_spaces(cache._sql)  # noqa: SLF001
            if not ledger_reader.copies_agree(cache._sql):  # noqa: SLF001
                raise sqlite3.DatabaseError(read_only.LEDGER_DAMAGED)
        return cache

    @property
    def sql(self) -> schema.Sql:
        """The calling thread's way to run a statement; diskcache has no calls for many.

        Raises FileReplaced after `let_go`: diskcache would open what is at the path by now.
        """
        if self._is_let_go:
            raise FileReplaced("the file was let go")
        run: schema.Sql = self.cache._sql  # noqa: SLF001
        return run

    @property
    def address(self) -> str:
        """The URI by which another connection of SQLite reads the same file."""
        return read_only.address_of(self.path)

    @property
    def replaced(self) -> bool:
        """Whether the open file is no longer the one at its path."""
        return quarantine.inode_of(self.path) != self._inode

    @property
    def has_lost_log(self) -> bool:
        """Whether the open log, or its shared memory, is no longer at its path.

        SQLite deletes them when the last connection closes, not while this one is open.
        """
        pairs = zip(self._log_inodes, self._inodes_of_log(), strict=True)
        return any(noted is not None and noted != present for noted, present in pairs)

    def _inodes_of_log(self) -> tuple[int | None, int | None]:
        return quarantine.inode_of(self._log), quarantine.inode_of(self._shared_memory)

    def save_log(self) -> bool:
        """Bring what is in a log that was deleted into the file; return whether it was deleted.

        The file is then to be set aside: another process may have its pages from the log. Raises
        LogHeld while a reader is in the way; nobody writes meanwhile, as whoever does looks first.
        """
        with self._lock:
            if self.replaced or not self.has_lost_log:
                return False
            self._save_log()
        return True

    def _save_log(self) -> None:
        if quarantine.inode_of(self._log) == self._log_inodes[0]:
            return  # Only the shared memory is gone: the log is moved with the file.
        self.sql(f"PRAGMA busy_timeout = {LOG_WAIT_MS}").fetchall()
        try:
            for _ in range(_SAVE_TRIES):
                ((is_busy, *_),) = self.sql("PRAGMA wal_checkpoint(FULL)").fetchall()
                if not is_busy:
                    return
        except sqlite3.OperationalError:
            raise  # Of the moment: the log is all there is of what was written.
        except sqlite3.DatabaseError:
            return  # Of damage: what is in the file is all that can be saved.
        finally:
            self.sql(f"PRAGMA busy_timeout = {int(1000 * BUSY_SECONDS)}").fetchall()
        raise LogHeld(
            "the write-ahead log was deleted, and what is in it cannot be saved while somebody"
            " reads the store: nothing is written until that reader ends"
        )

    def let_go(self) -> None:
        """Refuse all further work of any thread. Each thread still closes its own connection."""
        self._is_let_go = True

    def close(self) -> None:
        """Close the calling thread's connection. The last connection does a checkpoint."""
        with contextlib.suppress(TimeoutError), self._lock:
            self.cache.close()

    def quarantine(self) -> Path | None:
        """Move the damaged file aside; return its folder (see `quarantine`).

        Returns None if another process has already replaced it, after the same damage.
        """
        with self._lock:
            quarantined = quarantine.move(self.path, self._inode)
        return None if quarantined is None else quarantined.folder

    def read_many(
        self, addresses: Sequence[bytes], *, not_before: float = 0.0
    ) -> dict[bytes, StoredRecord]:
        """Return the existing records by address, except those stored before a time."""
        return read_only.read_many(self.sql, addresses, not_before)

    @contextlib.contextmanager
    def transaction(self, pages: int = 0) -> Iterator[Any]:
        """Give the connection for changes that are made together, while nobody else writes.

        `pages` is about how many pages will be written. Raises LogHeld where there is no room for
        them.
        """
        with self._lock:
            if self.replaced:
                raise FileReplaced("the file was taken away")
            if self.has_lost_log:
                self._save_log()
                raise sqlite3.DatabaseError(LOG_DELETED)
            self._heed_log(pages)
            with self.cache.transact():
                yield self.cache._con  # noqa: SLF001

    def _heed_log(self, pages: int) -> None:
        """Raise LogHeld if the write-ahead log would grow beyond what the file leaves of the limit.

        SQLite empties the log when nobody reads what is in it; a reader that does not end keeps it
        growing. Below its limit the store has room for a longer log.
        """
        log = _size(self._log)
        if log <= 2 * self._log_pages * PAGE_BYTES:
            return
        # What is in the log is in the file, too, once it is copied there.
        ((in_file,),) = self.sql("PRAGMA page_count")
        if max(_size(self.path), in_file * PAGE_BYTES) + log + pages * PAGE_BYTES <= (
            self._size_limit
        ):
            return
        self.sql(f"PRAGMA busy_timeout = {LOG_WAIT_MS}").fetchall()
        try:
            ((is_busy, *_),) = self.sql("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
        finally:
            self.sql(f"PRAGMA busy_timeout = {int(1000 * BUSY_SECONDS)}").fetchall()
        if is_busy:
            raise LogHeld(
                "somebody reads the store without an end, so its write-ahead log cannot be emptied:"
                " nothing is written until that reader ends"
            )

    @property
    def evicted(self) -> int:
        """The number of entries evicted since the file was opened."""
        return self._eviction.deleted

    @property
    def room(self) -> int:
        """The number of bytes that file and log may still grow."""
        return self._size_limit - _size(self.path) - _size(self._log)

    def write(self, changes: WriteBatch, recent: Mapping[bytes, Use] | None = None) -> None:
        """Make all changes in one transaction, and room for them before.

        `recent` has uses that are not written yet; for them, too, an entry is not evicted. Where
        there is no room for the records, sums and uses are written, and taken out of `changes`,
        before StoreFull is raised.
        """
        if changes.records and not self.uses_last_room:
            disk_full.check_room(self.folder)
        pages_needed = eviction.pages_for(
            [len(pending.record) for pending in changes.records.values()]
        )
        full: StoreFull | None = None
        with self.transaction(2 * pages_needed + _OTHER_PAGES) as connection:
            changes.delete_records(connection)
            changes.put_sums(connection, int(time.time() // 3600))
            there_is_room = True
            try:
                there_is_room = self._make_room(pages_needed, pages_needed, changes, recent or {})
            except StoreFull as error:
                full = error
            else:
                changes.put_records(connection)
            if changes.used:
                last_ms = max(use.at for use in changes.used.values())
                interval_ms = self._eviction.use_interval_ms(self.sql, last_ms)
                changes.put_uses(connection, interval_ms)
            if full is None and not there_is_room:
                self._make_room(0, pages_needed, changes, recent or {})
        if full is not None:
            changes.deletions, changes.used, changes.usage = [], {}, {}
            raise full

    def _make_room(
        self, pages_needed: int, effort: int, changes: WriteBatch, recent: Mapping[bytes, Use]
    ) -> bool:
        def used_at(address: bytes) -> int:
            use = changes.used.get(address) or recent.get(address)
            return use.at if use else 0

        if pages_needed and time.monotonic() < self._full_until:
            raise StoreFull(eviction.FULL)
        try:
            return self._eviction.make_room(self.sql, pages_needed, used_at, effort)
        except StoreFull:
            # This is costly to find out, and does not change soon.
            self._full_until = time.monotonic() + FULL_SECONDS
            raise


def _may_be_header(error: BaseException) -> bool:
    """Tell whether an error may come of a damaged header, or of a passing condition."""
    return isinstance(error, schema.NewerLayout) or "readonly" in str(error)


def _head(path: Path) -> bytes:
    # To close it takes the locks of other connections of this process; there is none that writes.
    with path.open("rb") as file:
        return file.read(100)


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


_DAMAGE = (
    *("no such table", "no such column", "malformed", "Could not decode"),
    "unsupported file format",
)


def is_damage(error: BaseException) -> bool:
    """Tell whether an error means that the file itself is unusable, now and later."""
    if isinstance(error, UnicodeDecodeError):
        return True  # A message of SQLite that quotes a damaged schema.
    if isinstance(error, sqlite3.OperationalError):
        # Nearly all of these are about the moment: locked, full, no such file. But a damaged
        # schema may lack what every store has.
        return str(error).startswith(_DAMAGE)
    return isinstance(error, sqlite3.DatabaseError) and not isinstance(
        error, sqlite3.IntegrityError | sqlite3.ProgrammingError
    )
