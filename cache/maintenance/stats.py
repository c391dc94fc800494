"""Statistics of a store: entries, bytes and savings, by partition."""

import contextlib
import sqlite3
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from embedding_proxy.cache.disk import connection
from embedding_proxy.cache.disk.database import FILE_NAME
from embedding_proxy.cache.disk.read_only import ReadableFile, ReadOnlyFile
from embedding_proxy.cache.disk.schema import Sql
from embedding_proxy.cache.disk.write_ahead_log import LOG, sibling_path
from embedding_proxy.cache.key import UNKNOWN, Partition
from embedding_proxy.cache.ledger import Usage

from .short_reads import id_ranges

ROWS_A_STEP = 100_000


class StoreSize(NamedTuple):
    """The size of a store."""

    entries: int
    file_bytes: int
    """Bytes on disk, with the write-ahead log."""


def read_size(directory: Path) -> StoreSize | None:
    """Return the size of the store in `directory`; None if there is none that can be read.

    The file is opened read-only, beside proxies that may be running.
    """
    path = connection.folder_of(directory) / FILE_NAME
    try:
        with contextlib.closing(ReadOnlyFile(path)) as store:
            ((entries,),) = store.sql("SELECT value FROM Settings WHERE key = 'count'").fetchall()
        files = (path, sibling_path(path, LOG))
        return StoreSize(int(entries), sum(file.stat().st_size for file in files if file.exists()))
    except (OSError, sqlite3.Error, ValueError):
        return None


def read_age(directory: Path) -> tuple[float, float] | None:
    """Return when the oldest entry was stored, and when the one was used that was used longest ago.

    In seconds since 1970. None where there is none, or the store cannot be read. A look into an
    index for each partition, however many entries there are.
    """
    path = connection.folder_of(directory) / FILE_NAME
    try:
        with contextlib.closing(ReadOnlyFile(path)) as store:
            ((stored, used),) = store.sql(
                "SELECT min((SELECT min(stored) FROM Entries WHERE partition IS number)),"
                " (SELECT min(used) FROM Entries)"
                " FROM (SELECT id AS number FROM Partitions UNION ALL SELECT NULL)"
            ).fetchall()
        return None if stored is None else (stored / 1000, used / 1000)
    except (OSError, sqlite3.Error, ValueError):
        return None


class _Entered(NamedTuple):
    """Sums of a partition's entries; times in milliseconds."""

    entries: int
    oldest: int
    newest: int
    last_used: int

    def plus(self, other: "_Entered") -> "_Entered":
        """Return the sums of both."""
        return _Entered(
            self.entries + other.entries,
            min(self.oldest, other.oldest),
            max(self.newest, other.newest),
            max(self.last_used, other.last_used),
        )


@dataclass(frozen=True, slots=True)
class Held:
    """The sums of one partition; times are seconds since 1970, None without entries."""

    partition: Partition
    entries: int
    bytes: int
    """Bytes of the records; their pages take about 7 % more."""
    oldest: float | None
    newest: float | None
    last_used: float | None
    usage: Usage


@dataclass(frozen=True, slots=True)
class Stats:
    """The sums of a store."""

    data_bytes: int
    """Bytes of the database on disk."""
    log_bytes: int
    """Bytes of its write-ahead log."""
    since_day: int | None
    """The first counted day, in days since 1970; None if there is none."""
    held: tuple[Held, ...]

    @property
    def file_bytes(self) -> int:
        """The bytes of both on disk, for which `cache.size_limit_gib` is the limit."""
        return self.data_bytes + self.log_bytes

    @property
    def entries(self) -> int:
        """All entries."""
        return sum(partition.entries for partition in self.held)

    @property
    def usage(self) -> Usage:
        """The sums of all partitions."""
        total = Usage()
        for partition in self.held:
            total = total.plus(partition.usage)
        return total


def gather(database: ReadableFile) -> Stats:
    """Return the sums of a store. Raises FAILURES.

    It reads in steps, so that the write-ahead log does not grow meanwhile. If the store is written
    to, the sums are those of the whole time that this takes.
    """
    sql = database.sql
    partitions = {
        number: Partition(*columns)
        for number, *columns in sql("SELECT id, namespace, space, dimensions FROM Partitions")
    }
    usage = usage_by_partition(sql)
    entries = _entries(database)
    rows = []
    for number in sorted(entries.keys() | usage.keys(), key=lambda n: n or 0):
        partition = partitions.get(number or 0, UNKNOWN)
        count, *times = entries.get(number, (0, None, None, None))
        oldest, newest, last_used = (None if ms is None else ms / 1000 for ms in times)
        size = count * (40 + 4 * partition.dimensions)
        sums = usage.get(number, Usage())
        rows.append(Held(partition, count, size, oldest, newest, last_used, sums))
    ((since,),) = sql("SELECT min(day) FROM Usage")
    sizes = _size(database.path), _size(sibling_path(database.path, LOG))
    return Stats(*sizes, since, tuple(rows))


def _size(path: Path) -> int:
    """Return the size of a file; 0 if it does not exist, as a log that was just deleted."""
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


def _entries(database: ReadableFile) -> dict[int | None, _Entered]:
    """Return number, first and last purchase, and last use of the entries, by partition."""
    sums: dict[int | None, _Entered] = {}
    for after, last in id_ranges(database, ROWS_A_STEP):
        for number, *columns in database.sql(
            "SELECT partition, count(*), min(stored), max(stored), max(used) FROM Entries"
            " WHERE id > ? AND id <= ? GROUP BY partition",
            (after, last),
        ):
            entries = _Entered(*columns)
            sum_so_far = sums.get(number)
            sums[number] = entries if sum_so_far is None else sum_so_far.plus(entries)
    return sums


def usage_by_partition(sql: Sql) -> dict[int | None, Usage]:
    """Return the sums of answers by partition, one step for each day."""
    sums: dict[int | None, Usage] = {}
    columns = ", ".join(f"sum({name})" for name in Usage._fields)
    day = -1
    while True:
        ((day,),) = sql("SELECT min(day) FROM Usage WHERE day > ?", (day,)).fetchall()
        if day is None:
            return sums
        statement = f"SELECT partition, {columns} FROM Usage WHERE day = ? GROUP BY partition"
        for number, *values in sql(statement, (day,)).fetchall():
            sums[number] = sums.get(number, Usage()).plus(Usage(*values))


def value(database: ReadableFile, entries: Mapping[int | None, int]) -> tuple[int, int]:
    """Return the approximate cost of entries in nanodollars, and the entries of unknown cost.

    `entries` are their numbers by partition. The bill of a partition is divided by its purchases.
    The cost is unknown if all of them were imported. Raises FAILURES.
    """
    usage = usage_by_partition(database.sql)
    total, unknown = 0.0, 0
    for partition, number in entries.items():
        sums = usage.get(partition, Usage())
        if sums.misses:
            total += number * sums.nanodollars_billed / sums.misses
        else:
            unknown += number
    return round(total), unknown
