"""Read-only connections: beside a writer, without one, or to a damaged file."""

import contextlib
import resource
import sqlite3
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from types import MappingProxyType
from typing import Protocol

from embedding_proxy.cache import ledger
from embedding_proxy.providers.failure_backoff import Backoff

from . import ledger_reader
from .quarantine import QuarantinedFile
from .schema import CACHE_PAGES, MMAP_BYTES, Sql
from .write_ahead_log import damage_of
from .write_batch import StoredRecord

ADDRESSES_A_SELECT = 512
PATIENCE_SECONDS = 5.0
"""The longest wait for another process that reads the log of a damaged file for the first time."""
SLOW_SECONDS = 0.005
"""A shorter read does not delay others noticeably."""
LEDGER_DAMAGED = "the ledger is damaged: its two copies disagree"
MAX_REST_SECONDS = 0.05
"""Between two parts of the ledger: others get the processor as long as a part took, or so long."""
_LOCKED = (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED)
_RAW = 1  # diskcache's mode of a value that is bytes and nothing else


class ReadableFile(Protocol):
    """The part of a store's file that readers use. For one thread."""

    @property
    def folder(self) -> Path:
        """The folder of the format version."""

    @property
    def path(self) -> Path:
        """The database in it."""

    @property
    def address(self) -> str:
        """The URI by which another connection of SQLite reads the same file."""

    @property
    def sql(self) -> Sql:
        """Runs one statement with its parameters, and returns the rows. Raises sqlite3.Error."""

    def read_many(
        self, addresses: Sequence[bytes], *, not_before: float = 0.0
    ) -> dict[bytes, StoredRecord]:
        """Return the existing records by address, except those stored before a time."""


def read_many(sql: Sql, addresses: Sequence[bytes], not_before: float) -> dict[bytes, StoredRecord]:
    """Return the records that are there, by address, but for those stored before a time."""
    records: dict[bytes, StoredRecord] = {}
    for start in range(0, len(addresses), ADDRESSES_A_SELECT):
        batch = addresses[start : start + ADDRESSES_A_SELECT]
        for key, value, stored in sql(_select(len(batch)), batch):
            if type(key) is bytes and type(value) is bytes and stored >= not_before:
                records[key] = StoredRecord(value, stored)
    return records


@lru_cache(maxsize=ADDRESSES_A_SELECT)
def _select(addresses: int) -> str:
    """Return the statement that reads so many addresses; a single one by the index alone."""
    condition = "= ?" if addresses == 1 else f"IN ({','.join('?' * addresses)})"
    return (
        "SELECT key, value, coalesce(CAST(store_time AS REAL), 0) FROM Cache"
        f" WHERE key {condition} AND raw = 1 AND mode = {_RAW} AND typeof(value) = 'blob'"
    )


def read_ledger(
    path: Path,
    by: Sequence[ledger.By],
    max_lines: int | None = None,
    preferred: Mapping[ledger.By, Collection[str]] = MappingProxyType({}),
    lines: ledger.LedgerFilter = ledger.ALL_LINES,
) -> list[ledger.Line]:
    """Return the sums of a store's file (see `ledger_reader.read`), by a connection of its own.

    Raises sqlite3.DatabaseError also where the two copies of the sums disagree. They are compared
    where all lines are read: a budget reads its client's before each purchase.
    """
    with contextlib.closing(_connect(path, "mode=ro")) as connection:
        if lines == ledger.ALL_LINES and not ledger_reader.copies_agree(connection.execute):
            raise sqlite3.DatabaseError(LEDGER_DAMAGED)
        return ledger_reader.read(connection.execute, by, max_lines, preferred, lines)


def read_ledger_sums(
    path: Path, lines: ledger.LedgerFilter = ledger.ALL_LINES
) -> ledger.LedgerSums:
    """Return the sums of some days, read in parts, with rests between them; see `ledger_reader`."""
    sums = ledger.LedgerSums.empty()
    with contextlib.closing(_connect(path, "mode=ro")) as connection:
        began = time.monotonic()
        for part in ledger_reader.read_sums(connection.execute, lines):
            sums.add(part)
            time.sleep(min(MAX_REST_SECONDS, time.monotonic() - began))
            began = time.monotonic()
    return sums


def read_ledger_hours(path: Path, lines: ledger.LedgerFilter) -> dict[int, ledger.Usage]:
    """Return the sums by hour, as far as they are kept; see `ledger_reader`."""
    with contextlib.closing(_connect(path, "mode=ro")) as connection:
        return ledger_reader.read_hours(connection.execute, lines)


class ReadOnlyFile:
    """A store's file that cannot be written now. For one thread. Raises sqlite3.Error.

    `reason` says why it is not opened for writing; empty where nobody is told. `log_bytes` is the
    size that writers keep the write-ahead log below, for `PRAGMA journal_size_limit`.
    """

    def __init__(self, path: Path, reason: str = "", log_bytes: int | None = None) -> None:
        self.folder = path.parent
        self.path = path
        self.reason = reason
        self._connection, self.address = connect_read_only(path)
        # These hold for this connection, and change nothing on disk.
        self._connection.execute(f"PRAGMA mmap_size = {MMAP_BYTES}").fetchall()
        self._connection.execute(f"PRAGMA cache_size = {CACHE_PAGES}")
        if log_bytes is not None:
            self._connection.execute(f"PRAGMA journal_size_limit = {log_bytes}").fetchall()

    @property
    def sql(self) -> Sql:
        """Runs one statement with its parameters, and returns the rows."""
        return self._connection.execute

    @property
    def lacks_log(self) -> bool:
        """Whether there is a write-ahead log with content that cannot be read."""
        log = self.path.with_name(f"{self.path.name}-wal")
        try:
            return "immutable" in self.address and log.stat().st_size > 0
        except OSError:
            return False

    def read_many(
        self, addresses: Sequence[bytes], *, not_before: float = 0.0
    ) -> dict[bytes, StoredRecord]:
        """Return the existing records by address, except those stored before a time."""
        return read_many(self._connection.execute, addresses, not_before)

    def close(self) -> None:
        """Close the file."""
        self._connection.close()


class DamagedFile:
    """A quarantined file, as far as it can be read. For one thread; never raises."""

    def __init__(self, quarantined: QuarantinedFile) -> None:
        self.quarantined = quarantined
        self._connection: sqlite3.Connection | None = None
        self._is_whole = False
        with contextlib.suppress(OSError):
            # SQLite reads a damaged log in part, and deletes the one of an empty file.
            self._is_whole = not damage_of(quarantined.path)
            if quarantined.path.stat().st_size == 0:
                return
        for query in ("mode=ro", "mode=ro&immutable=1"):
            # The second is used if SQLite can make no file beside it; it then reads no log.
            self.close()
            # SQLite's message may quote a damaged schema, which is no text.
            with contextlib.suppress(sqlite3.Error, UnicodeDecodeError):
                self._connection = _connected(quarantined.path, query, patience_s=PATIENCE_SECONDS)
                self._connection.execute("SELECT 1 FROM sqlite_master LIMIT 1").fetchall()
                return
            self._is_whole = self._is_whole and not quarantined.log.exists()

    def read_many(
        self, addresses: Sequence[bytes], *, not_before: float = 0.0
    ) -> tuple[dict[bytes, StoredRecord], set[bytes]]:
        """Return the readable records by address, and the addresses that cannot be looked up.

        All other addresses are not in the file. After `close`, nothing can be looked up.
        """
        records: dict[bytes, StoredRecord] = {}
        unreadable: set[bytes] = set()
        for start in range(0, len(addresses), ADDRESSES_A_SELECT):
            batch = addresses[start : start + ADDRESSES_A_SELECT]
            read = self._read(batch, not_before)
            if read is not None:
                records |= read
                unreadable |= set() if self._is_whole else set(batch) - read.keys()
                continue
            for address in batch:
                record = self._read([address], not_before)
                if record is None or not (record or self._is_whole):
                    unreadable.add(address)
                else:
                    records |= record
        return records, unreadable

    def _read(
        self, addresses: Sequence[bytes], not_before: float
    ) -> dict[bytes, StoredRecord] | None:
        if self._connection is None:
            return None
        try:
            return read_many(self._connection.execute, addresses, not_before)
        except Exception:  # noqa: BLE001 - of damage, sqlite3 makes errors of many kinds
            return None

    def close(self) -> None:
        """Close the file."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None


class InlineReader:
    """Reads a store's file in the event loop's own thread, if that is quick.

    A read from the page cache is faster than a switch to another thread, but it blocks the event
    loop. So after a slow read, no read is made here for a while.
    """

    def __init__(self, path: Path, clock: Callable[[], float] = time.monotonic) -> None:
        """Open the file, in any thread. Raises sqlite3.Error."""
        self._connection = _connect(path, "mode=ro", patience_s=0.0)
        self._connection.execute(f"PRAGMA mmap_size = {MMAP_BYTES}").fetchall()
        self._connection.execute(f"PRAGMA cache_size = {CACHE_PAGES}")
        # A new cursor for each read costs a tenth of the read.
        self._cursor = self._connection.cursor()
        self._clock = clock
        self._backoff = Backoff(clock=clock)
        self._is_first = True
        self._disk_reads: int | None = None
        """The disk reads of the reading thread at the last call."""

    def get_many(
        self, addresses: Sequence[bytes], *, not_before: float = 0.0
    ) -> dict[bytes, StoredRecord] | None:
        """Return the result of `read_many`; None if a read may be slow, or has failed.

        A thread repeats a failed read, and reports the failure.
        """
        if self._backoff.is_waiting:
            return None
        if self._is_first:
            self._is_first, self._disk_reads = False, _disk_reads()
        start = self._clock()
        try:
            records = read_many(self._cursor.execute, addresses, not_before)
        except Exception:  # noqa: BLE001 - of damage, sqlite3 makes errors of many kinds
            self._backoff.fail()
            return None
        if self._clock() - start > SLOW_SECONDS and self._has_read_from_disk():
            self._backoff.fail()
        else:
            self._backoff.succeed()
        return records

    def _has_read_from_disk(self) -> bool:
        """Tell whether this thread has read from the disk since the last call.

        True if the system cannot tell.
        """
        before, self._disk_reads = self._disk_reads, _disk_reads()
        return before is None or self._disk_reads != before

    def close(self) -> None:
        """Close the connection."""
        self._connection.close()


def _disk_reads() -> int | None:
    """Return how often this thread has waited for a page so far; None if the system cannot tell."""
    if not hasattr(resource, "RUSAGE_THREAD"):
        return None
    spent = resource.getrusage(resource.RUSAGE_THREAD)
    return spent.ru_majflt + spent.ru_inblock


def address_of(path: Path, query: str = "mode=ro") -> str:
    """Return the URI by which SQLite opens a file (https://www.sqlite.org/uri.html)."""
    return f"{path.absolute().as_uri()}?{query}"


def connect_read_only(path: Path, table: str = "Cache") -> tuple[sqlite3.Connection, str]:
    """Return a connection that only reads a file with this table, and the URI of the connection.

    If SQLite can make no lock or shared memory beside the file, it is read as an unchanging file,
    without its write-ahead log; not if another process keeps it locked, because then its pages
    change. Raises sqlite3.Error.
    """
    query = "mode=ro"
    try:
        return _connect(path, query, table=table), address_of(path, query)
    except sqlite3.OperationalError as error:
        if primary_code(error) in _LOCKED:
            raise
    query = "mode=ro&immutable=1"
    return _connect(path, query, table=table), address_of(path, query)


def primary_code(error: BaseException) -> int:
    """Return SQLite's primary result code; 0 for an error that SQLite did not make."""
    return int(getattr(error, "sqlite_errorcode", 0)) & 0xFF


def _connected(path: Path, query: str, patience_s: float) -> sqlite3.Connection:
    return sqlite3.connect(address_of(path, query), patience_s, uri=True, check_same_thread=False)


def _connect(
    path: Path, query: str, patience_s: float = 5.0, table: str = "Cache"
) -> sqlite3.Connection:
    connection = _connected(path, query, patience_s)
    try:
        connection.execute(f"SELECT 1 FROM {table} LIMIT 1").fetchall()
    except sqlite3.Error:
        connection.close()
        raise
    return connection
