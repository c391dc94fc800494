"""A store's file for one process alone, changed in place: it needs no room on the disk.

A full disk has no room for a write-ahead log, and so for no purge that would make room. Where no
other process has the file open, SQLite can do without: it keeps the old pages of a transaction in
memory. What it cannot do then is survive a kill: that may leave a damaged file, which is set aside
and salvaged at the next start like any other. So this is for a purge that nothing else can do.
"""

import contextlib
import sqlite3
from collections.abc import Iterator, Sequence
from pathlib import Path

from . import quarantine, read_only, schema, write_ahead_log
from .connection import StoreError, folder_of, lock_of
from .database import BUSY_SECONDS, FAILURES, FILE_NAME
from .write_batch import StoredRecord


class ExclusiveFile:
    """The file in `folder`. For one thread, which holds the writer's lock. Raises sqlite3.Error.

    A file that another process has open is refused, as SQLite finds it locked.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.path = folder / FILE_NAME
        self.address = read_only.address_of(self.path)
        self._connection = sqlite3.connect(self.path, BUSY_SECONDS, isolation_level=None)
        try:
            for pragma in ("locking_mode = EXCLUSIVE", "temp_store = MEMORY"):
                self.sql(f"PRAGMA {pragma}").fetchall()
            self.sql("PRAGMA journal_mode = MEMORY").fetchall()
            schema.refuse_older(self.sql)
        except BaseException:
            self._connection.close()
            raise

    @property
    def sql(self) -> schema.Sql:
        """Runs one statement with its parameters, and returns the rows."""
        return self._connection.execute

    @contextlib.contextmanager
    def transaction(self, pages: int = 0) -> Iterator[sqlite3.Connection]:  # noqa: ARG002 - in place
        """Give the connection for changes that are made together."""
        with self._connection:
            self.sql("BEGIN IMMEDIATE")
            yield self._connection

    def read_many(
        self, addresses: Sequence[bytes], *, not_before: float = 0.0
    ) -> dict[bytes, StoredRecord]:
        """Return the existing records by address, except those stored before a time."""
        return read_only.read_many(self.sql, addresses, not_before)

    def close(self) -> None:
        """Close the file."""
        # If there is still no room for a log, the next process that opens the file returns to one.
        with contextlib.suppress(sqlite3.Error):
            self.sql("PRAGMA journal_mode = WAL").fetchall()
        self._connection.close()


@contextlib.contextmanager
def open_alone(directory: Path) -> Iterator[ExclusiveFile]:
    """Give the file of a store; nobody else writes meanwhile. Raises StoreError."""
    folder = folder_of(directory)
    try:
        with contextlib.closing(lock_of(directory)) as lock, lock:
            quarantine.complete(folder / FILE_NAME)
            write_ahead_log.check(folder / FILE_NAME)
            with contextlib.closing(ExclusiveFile(folder)) as file:
                yield file
    except FAILURES as error:
        remedy = (
            "stop all proxies and commands that use it and purge again, or free some space on the"
            " disk"
        )
        if read_only.primary_code(error) == sqlite3.SQLITE_FULL:
            # The content of the log is written into the file before the log is deleted.
            log = write_ahead_log.sibling_path(folder / FILE_NAME, write_ahead_log.LOG)
            remedy = f"free some space on the disk, as much as {log} takes, and purge again"
        why = getattr(error, "strerror", None) or error
        raise StoreError(
            f"{folder}: the disk is full, and the store cannot be changed in place: {why}; {remedy}"
        ) from error
