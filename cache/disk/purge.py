"""Purge: deletes entries by partition, age or address, in small transactions.

Running proxies hear of it: `announce` numbers it in the file, and signals the number.
"""

import contextlib
import mmap
import os
import re
import struct
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol, TypeAlias

from embedding_proxy.cache.key import OTHER_NAMESPACE
from embedding_proxy.cache.private_files import FILE_MODE
from embedding_proxy.providers.base import current_label

from . import bounds
from .read_only import ReadableFile
from .schema import Sql, release_pages

ROWS_A_TRANSACTION = 100
ENTRIES_A_READ = 5000
PAGES_A_STEP = 512
"""Pages that one transaction returns to the file system: 16 MiB."""

SIGNAL_NAME = "purges"
_SIGNAL = struct.Struct("<QQ")
"""The number of a purge in the file, and its time. A new file counts from 1 again."""
_CLOEXEC = getattr(os, "O_CLOEXEC", 0)

Position: TypeAlias = tuple[int, int]
"""When an entry was stored, in milliseconds since 1970, and its row."""
_FIRST: Position = (-1 << 63, 0)
_FOREVER = (1 << 63) - 1
_RECORDS = (
    "Cache LEFT JOIN Entries ON Entries.id = Cache.rowid"
    " LEFT JOIN Partitions ON Partitions.id = partition"
)


class WritableFile(ReadableFile, Protocol):
    """The part of a store's file that a purge uses: a `Database` or an `ExclusiveFile`."""

    def transaction(self, pages: int = 0) -> contextlib.AbstractContextManager[Any]:
        """Give the connection for changes that are made together; they write about so many pages.

        Raises FAILURES.
        """


@dataclass(frozen=True, slots=True)
class PurgeFilter:
    """The entries to purge: those that match all given values; without any, all entries."""

    namespace: str | None = None
    space: str | None = None
    """A space's label. Without parameters it also means the spaces with parameters."""
    stored_before: float | None = None
    """Seconds since 1970."""
    used_before: float | None = None
    address: bytes | None = None


def count_entries(database: ReadableFile, choice: PurgeFilter) -> tuple[int, int]:
    """Return the number of chosen entries, and the bytes of their records. Raises FAILURES."""
    counts = count_by_partition(database, choice).values()
    entries, size = (sum(column) for column in zip(*counts, strict=True)) if counts else (0, 0)
    if choice == PurgeFilter():
        # Of some records nothing else may be known.
        ((entries,),) = database.sql("SELECT value FROM Settings WHERE key = 'count'")
    return int(entries), size


def count_by_partition(
    database: ReadableFile, choice: PurgeFilter
) -> dict[int | None, tuple[int, int]]:
    """Return entries and bytes of what is chosen, by the number of their partition, as `count`."""
    if choice.address is not None:
        condition, values = where(choice)
        rows = database.sql(
            "SELECT partition, count(*), coalesce(sum(40 + 4 * dimensions), 0)"
            f" FROM {_RECORDS} WHERE {condition} GROUP BY partition",
            values,
        )
        return {partition: (entries, size) for partition, entries, size in rows}
    counts: dict[int | None, tuple[int, int]] = {}
    for partition, dimensions in _partitions(database.sql, choice):
        last: Position | None = _FIRST
        entries = 0
        while last is not None:
            rows, last = _oldest(database.sql, choice, partition, last, ENTRIES_A_READ)
            entries += len(rows)
        counts[partition] = (entries, entries * (40 + 4 * dimensions) if dimensions else 0)
    return counts


def is_chosen(database: ReadableFile, choice: PurgeFilter, address: bytes) -> bool:
    """Tell whether an entry exists at an address and is chosen. Raises FAILURES."""
    condition, values = where(replace(choice, address=address))
    return bool(
        database.sql(f"SELECT 1 FROM {_RECORDS} WHERE {condition} LIMIT 1", values).fetchone()
    )


def delete(
    database: WritableFile,
    choice: PurgeFilter,
    *,
    overwrite: bool = True,
    before: float | None = None,
) -> Iterator[int]:
    """Delete the chosen entries, yielding after each transaction how many it deleted.

    What is deleted is overwritten with zeros unless told not to. Entries that are stored meanwhile
    are left: where much is stored, it would not end, and delete what was bought after it began. So
    are those that were stored at `before` or later, in seconds since 1970. In the end the pages
    that are free are given back. Raises FAILURES.
    """
    if before is not None and (choice.address is None and choice != PurgeFilter()):
        stored_before = choice.stored_before
        until = before if stored_before is None else min(before, stored_before)
        choice = replace(choice, stored_before=until)
    if choice.address is not None or choice == PurgeFilter():
        yield from _delete_records(database, choice, overwrite=overwrite, before=before)
    else:
        for partition, _ in _partitions(database.sql, choice):
            end = _end(database.sql, partition)
            last: Position | None = _FIRST
            while last is not None:
                start = time.monotonic()
                # Looked for anew each time: others move rows to the end of the file meanwhile.
                with _deleting(database, overwrite=overwrite) as connection:
                    rows, last = _oldest(
                        connection.execute, choice, partition, last, ROWS_A_TRANSACTION, end
                    )
                    _delete(connection, rows)
                _let_others(start)
                yield len(rows)
    yield from _shrink(database)


def _partitions(sql: Sql, choice: PurgeFilter) -> list[tuple[int | None, int]]:
    """Return the numbers and widths of the chosen partitions; None for entries without one."""
    condition, values = where(replace(choice, stored_before=None, used_before=None))
    rows: list[tuple[int | None, int]] = sql(
        f"SELECT id, dimensions FROM Partitions WHERE {condition}", values
    ).fetchall()
    if choice.namespace is None and choice.space is None:
        rows.append((None, 0))
    return rows


def _end(sql: Sql, partition: int | None) -> int:
    """Return a time, in milliseconds since 1970, before which all present entries were stored."""
    ((newest,),) = sql("SELECT max(stored) FROM Entries WHERE partition IS ?", (partition,))
    return _FOREVER if newest is None else int(newest) + 1


def _oldest(  # noqa: PLR0913, PLR0917 - where to look, and how far
    sql: Sql,
    choice: PurgeFilter,
    partition: int | None,
    last: Position,
    count: int,
    end: int = _FOREVER,
) -> tuple[list[tuple[int]], Position | None]:
    """Return the chosen rows among the next `count` of a partition, and where they end.

    By the index of partition and age: no read is long. None stands for the end of the partition,
    or of what was stored before `end`, in milliseconds since 1970.
    """
    stored_before = _ms(choice.stored_before)
    end = end if stored_before is None else min(end, stored_before)
    rows = sql(
        "SELECT stored, id, used FROM Entries WHERE partition IS ? AND (stored, id) > (?, ?)"
        " AND stored < ? ORDER BY stored, id LIMIT ?",
        (partition, *last, end, count),
    ).fetchall()
    used_before = _ms(choice.used_before)
    chosen = [(row,) for _, row, used in rows if used_before is None or used < used_before]
    return chosen, rows[-1][:2] if len(rows) == count else None


def _delete(connection: Any, rows: Sequence[tuple[int]]) -> None:  # noqa: ANN401 - of SQLite
    connection.executemany("DELETE FROM Cache WHERE rowid = ?", rows)
    connection.executemany("DELETE FROM Entries WHERE id = ?", rows)


def _delete_records(
    database: WritableFile, choice: PurgeFilter, *, overwrite: bool, before: float | None
) -> Iterator[int]:
    """Delete the record at an address, or all records, also those without further rows."""
    condition, values = where(choice)
    # A row that others move to the end of the file meanwhile is known by its time.
    values["began"] = time.time() if before is None else before
    ((values["newest"],),) = database.sql("SELECT max(rowid) FROM Cache")
    if before is not None:
        values["newest"] = -1
    is_old = "(Cache.rowid <= :newest OR coalesce(CAST(store_time AS REAL), 0) < :began)"
    last, deleted = 0, ROWS_A_TRANSACTION
    while deleted == ROWS_A_TRANSACTION:
        start = time.monotonic()
        with _deleting(database, overwrite=overwrite) as connection:
            rows = connection.execute(
                f"SELECT Cache.rowid FROM {_RECORDS} WHERE Cache.rowid > :last AND {is_old}"
                f" AND {condition} ORDER BY Cache.rowid LIMIT {ROWS_A_TRANSACTION}",
                {**values, "last": last},
            ).fetchall()
            _delete(connection, rows)
        deleted = len(rows)
        last = rows[-1][0] if rows else last
        _let_others(start)
        yield deleted


@contextlib.contextmanager
def _deleting(database: WritableFile, *, overwrite: bool) -> Iterator[Any]:
    """Give a transaction that overwrites deleted records, or does not."""
    with database.transaction(ROWS_A_TRANSACTION // 4) as connection:
        connection.execute(f"PRAGMA secure_delete = {int(overwrite)}").fetchall()
        try:
            yield connection
        finally:
            # The same connection writes, and evicts, when nobody purges.
            connection.execute("PRAGMA secure_delete = 0").fetchall()


def spillover(choice: PurgeFilter) -> list[PurgeFilter]:
    """Return what may also hold chosen entries: the partitions of what came beyond the bounds.

    See `bounds`. An entry there does not say which namespace or space it is of.
    """
    filters = []
    rest = None if choice.space is None else bounds.rest_of(current_label(choice.space))
    if rest is not None and rest != choice.space:
        filters.append(replace(choice, space=rest))
    is_chosen_by_name = choice.namespace is not None or choice.space is not None
    if is_chosen_by_name and choice.namespace != OTHER_NAMESPACE:
        filters.append(replace(choice, namespace=OTHER_NAMESPACE, space=None))
    return filters


class PurgeSignal:
    """The number of the last purge, in a file that every process maps: to poll takes no call.

    `folder` is the store's. For one thread. Raises OSError, also where there is no room for it.
    """

    def __init__(self, folder: Path) -> None:
        file = os.open(folder / SIGNAL_NAME, os.O_RDWR | os.O_CREAT | _CLOEXEC, FILE_MODE)
        try:
            if os.fstat(file).st_size < _SIGNAL.size:
                os.write(file, bytes(_SIGNAL.size))
            self._map = mmap.mmap(file, _SIGNAL.size, access=mmap.ACCESS_READ)
        finally:
            os.close(file)
        self._last = self._map[:]

    def poll(self) -> int | None:
        """Return the number of the last purge if it is new since the last poll; else None."""
        last = self._map[:]
        if last == self._last:
            return None
        self._last = last
        number: int = _SIGNAL.unpack(last)[0]
        return number

    def close(self) -> None:
        """Give the file back."""
        self._map.close()


def announce(database: WritableFile, entries: int) -> bool:
    """Signal running proxies that entries were deleted, so that they empty their memory.

    Returns whether they were signalled; then they serve no deleted entry from now on. Otherwise
    they notice it at the next tick of their store. Raises FAILURES.
    """
    at = int(1000 * time.time())
    with database.transaction() as connection:
        connection.execute("INSERT INTO Purges (at, entries) VALUES (?, ?)", (at, entries))
    number = count_purges(database)
    try:
        file = os.open(database.folder / SIGNAL_NAME, os.O_RDWR | os.O_CREAT | _CLOEXEC, FILE_MODE)
        try:
            os.write(file, _SIGNAL.pack(number, time.time_ns()))
        finally:
            os.close(file)
    except OSError:
        return False
    return True


def count_purges(database: ReadableFile) -> int:
    """Return the number of the last announced purge. Raises FAILURES."""
    ((number,),) = database.sql("SELECT coalesce(max(id), 0) FROM Purges")
    return int(number)


def _shrink(database: WritableFile) -> Iterator[int]:
    released = PAGES_A_STEP
    while released == PAGES_A_STEP:
        start = time.monotonic()
        with database.transaction():
            released = release_pages(database.sql, PAGES_A_STEP)
        _let_others(start)
        yield 0


def _let_others(start: float) -> None:
    """Pause for other writers, which try the lock every millisecond."""
    time.sleep(max(0.003, (time.monotonic() - start) / 4))


def where(choice: PurgeFilter) -> tuple[str, dict[str, object]]:
    """Return a condition on Entries and Partitions, for an address on Cache, and its values."""
    terms = {
        "namespace = :namespace": choice.namespace,
        "(space = :space OR substr(space, 1, length(:space) + 1) = :space || '?')": (
            None if choice.space is None else current_label(choice.space)
        ),
        "stored < :stored": _ms(choice.stored_before),
        "used < :used": _ms(choice.used_before),
        "Cache.key = :address AND Cache.raw = 1": choice.address,
    }
    conditions = {term: value for term, value in terms.items() if value is not None}
    values: dict[str, object] = {
        re.findall(":([a-z]+)", term)[0]: value for term, value in conditions.items()
    }
    return " AND ".join(conditions) or "1", values


def _ms(seconds: float | None) -> int | None:
    return None if seconds is None else int(1000 * seconds)
