"""Reading a whole store without holding its write-ahead log.

SQLite begins its log anew only while no reader uses it
(https://www.sqlite.org/wal.html#avoiding_excessively_large_wal_files). One long read beside a proxy
that writes makes the log grow without bound. So a command reads in steps of bounded rows, each a
read of its own, and leaves writers as much time as it takes. What SQLite does in one statement only
is interrupted when the log is nearly full, and tried again.

Of a log only its headers are read here (https://www.sqlite.org/fileformat2.html#the_write_ahead_log).
The file of the wal-index (`-shm`) must never be opened beside SQLite: closing it drops SQLite's
locks.
"""

import contextlib
import sqlite3
import threading
import time
from collections.abc import Iterator
from typing import Any

from embedding_proxy.cache.disk.read_only import ReadableFile
from embedding_proxy.cache.disk.schema import Sql

MIN_PAUSE_SECONDS = 0.002
MAX_PAUSE_SECONDS = 0.25
POLL_SECONDS = 0.005
"""Interval of the checks of the log during a long statement."""
ROOM_SECONDS = 1.0
"""The longest wait for an empty log."""
TRIES = 5
"""The number of attempts of a long statement."""
MAX_ID = (1 << 63) - 1
"""The largest id of a row in SQLite."""
NO_LIMIT_BYTES = 64 << 20
"""The limit of a log without its own limit."""

_LOG_HEADER, _FRAME_HEADER = 32, 24
_int = int.from_bytes  # All numbers of a log are big-endian.


def connect(file: ReadableFile) -> sqlite3.Connection:
    """Return a new connection to a store's file that only reads. Raises sqlite3.Error."""
    return sqlite3.connect(file.address, isolation_level=None, uri=True, check_same_thread=False)


class LogWatch:
    """The write-ahead log of a store: its use, and statements that keep it below its limit."""

    def __init__(self, database: ReadableFile) -> None:
        self._path = database.path.with_name(f"{database.path.name}-wal")
        # The connection knows what the proxies keep to: all have the same configuration.
        ((limit,),) = database.sql("PRAGMA journal_size_limit").fetchall()
        self.limit_bytes: int = limit if limit > 0 else NO_LIMIT_BYTES
        """The size that the log should not exceed."""

    def used_bytes(self) -> int:
        """Return the bytes written to the log since it last began again; 0 without a log."""
        try:
            with self._path.open("rb", buffering=0) as log:
                header = log.read(_LOG_HEADER)
                size = log.seek(0, 2)
                frame = _FRAME_HEADER + _int(header[8:12])
                salts = header[16:24]

                def is_current(number: int) -> bool:
                    log.seek(_LOG_HEADER + number * frame + 8)
                    return log.read(8) == salts

                # Frames of the present log come first; behind them are those of earlier ones.
                low, high = 0, max(0, size - _LOG_HEADER) // frame
                while low < high:
                    middle = (low + high) // 2
                    if is_current(middle):
                        low = middle + 1
                    else:
                        high = middle
                return low * frame
        except FileNotFoundError:
            return 0

    def fetch(self, connection: sqlite3.Connection, statement: str) -> list[Any] | None:
        """Return the rows of a long statement; None if the log never left it enough time.

        Writers keep the log below its limit only while nobody reads. So an interrupted statement is
        tried again later, with an empty log. Raises sqlite3.Error.
        """
        for _ in range(TRIES):
            before = self.used_bytes()
            try:
                with self._interrupting(connection, before):
                    return connection.execute(statement).fetchall()
            except sqlite3.OperationalError as error:
                if error.sqlite_errorcode != sqlite3.SQLITE_INTERRUPT:
                    raise
            self.wait_for_room()
        return None

    @contextlib.contextmanager
    def _interrupting(self, connection: sqlite3.Connection, before: int) -> Iterator[None]:
        """Interrupt the connection as soon as other processes have nearly filled the log."""
        over = threading.Event()

        def watch() -> None:
            while not over.wait(POLL_SECONDS):
                # A log that was full before, and that nobody writes to, is no reason to stop.
                if self.used_bytes() != before and self.is_nearly_full():
                    connection.interrupt()

        thread = threading.Thread(target=watch, name="log-watch", daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()

    def is_nearly_full(self) -> bool:
        """Tell whether the log has seven eighths of its limit."""
        return self.used_bytes() >= self.limit_bytes * 7 // 8

    def wait_for_room(self) -> None:
        """Wait until a writer empties the log, if it is nearly full, within a limit."""
        deadline = time.monotonic() + ROOM_SECONDS
        while self.is_nearly_full() and time.monotonic() < deadline:
            time.sleep(MIN_PAUSE_SECONDS)


class Pauses:
    """Pauses between the short reads of one connection.

    A log that is always read is never emptied. If nobody writes, there is no pause.
    """

    def __init__(
        self, database: ReadableFile, sql: Sql | None = None, schema: str = "main"
    ) -> None:
        """Watch the store in `schema` of the connection behind `sql`; by default its own."""
        self._watch = LogWatch(database)
        self._sql = sql or database.sql
        self._version_of = f"PRAGMA {schema}.data_version"
        self._version = self._read_version()

    def pause(self, start: float) -> None:
        """Wait as long as the read took that began at `start` (time.monotonic), if others wrote.

        If they have nearly filled the log, wait until they empty it: a checkpoint may take longer
        than a read.
        """
        took = time.monotonic() - start
        version = self._read_version()
        if version != self._version:
            self._version = version
            time.sleep(min(max(MIN_PAUSE_SECONDS, took), MAX_PAUSE_SECONDS))
            self._watch.wait_for_room()

    def _read_version(self) -> int:
        ((version,),) = self._sql(self._version_of).fetchall()
        return int(version)


def id_ranges(database: ReadableFile, rows: int) -> Iterator[tuple[int, int]]:
    """Yield ranges (first - 1, last) of ids of `Entries` that hold at most `rows` rows each.

    They cover all entries that are there at the beginning. Eviction may give an entry a larger id
    meanwhile; such an entry may be left out. Pauses between two ranges. Raises FAILURES.
    """
    sql, pauses = database.sql, Pauses(database)
    ((end,),) = sql("SELECT coalesce(max(id), 0) FROM Entries").fetchall()
    last = 0
    while last < end:
        start = time.monotonic()
        ((following,),) = sql(
            "SELECT max(id) FROM (SELECT id FROM Entries WHERE id > ? AND id <= ?"
            " ORDER BY id LIMIT ?)",
            (last, end, rows),
        ).fetchall()
        if following is None:
            return
        yield last, following
        last = following
        pauses.pause(start)
