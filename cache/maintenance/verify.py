"""Reading every record of a store to see that it is whole, and mending what is not.

It reads in steps, so that a proxy that writes beside it can do its checkpoints. What SQLite checks
in one statement only (the structure of the file) is given up where a proxy writes so much that the
log would grow; then that is said, and such a store is never called sound.

What is damaged below SQLite, so that pages cannot be read, is mended by carving: the file is moved
aside, and what is whole in it goes into a fresh one (see `salvage`).
"""

import contextlib
import sqlite3
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from embedding_proxy.cache import record
from embedding_proxy.cache.disk.database import Database, is_damage
from embedding_proxy.cache.disk.read_only import ReadableFile
from embedding_proxy.cache.disk.schema import Sql

from .archive import RECORD_COLUMNS, is_record
from .short_reads import MAX_ID, LogWatch, Pauses, connect, id_ranges

ROWS_A_BATCH = 500
ENTRIES_A_BATCH = 10_000
MAX_PLACES = 1000
"""The most ranges of the file that are remembered for a repair. Beyond that they are joined."""
_DIGEST = slice(16, 32)
"""The position of the check digest in a record."""
_BATCH = f"""
    SELECT Cache.rowid, {RECORD_COLUMNS}, Entries.id, dimensions,
        (SELECT other.rowid FROM Cache AS other INDEXED BY Cache_key_raw
            WHERE other.key = Cache.key AND other.raw = Cache.raw)
    FROM Cache LEFT JOIN Entries ON Entries.id = Cache.rowid
    LEFT JOIN Partitions ON Partitions.id = partition
    WHERE Cache.rowid > :after AND Cache.rowid <= :last ORDER BY Cache.rowid LIMIT {{limit}}
"""
_ORPHANS = (
    "FROM Entries WHERE id > :after AND id <= :last"
    " AND NOT EXISTS (SELECT 1 FROM Cache WHERE rowid = Entries.id)"
)
_ENTER = """
    INSERT OR IGNORE INTO Entries (id, partition, stored, used)
    SELECT rowid, NULL, CAST(1000 * coalesce(store_time, 0) AS INTEGER),
        CAST(1000 * coalesce(access_time, 0) AS INTEGER) FROM Cache WHERE rowid = ?
"""


@dataclass
class Findings:
    """The result of a verification."""

    records: int = 0
    """Whole records."""
    damaged: int = 0
    """Rows whose record does not verify, or that hold something else."""
    lost_sight_of: int = 0
    """Rows without a row of `Entries`. They would never be counted or evicted."""
    wrong_partition: int = 0
    """Whole records of another width than their partition has. They are kept, because they were
    paid for and may be served again with the right configuration."""
    orphans: int = 0
    """Rows of `Entries` without a record."""
    broken: str | None = None
    """SQLite's message about the file, if the file is not sound."""
    unchecked: str | None = None
    """The parts that could not be checked because of many writes."""
    places: list[tuple[int, int]] = field(default_factory=list, repr=False, compare=False)
    """Ranges of rows (first - 1, last) that need a repair, at most MAX_PLACES."""

    @property
    def is_repairable(self) -> bool:
        """Whether `repair` has something to do."""
        return bool(self.damaged or self.lost_sight_of or self.wrong_partition or self.orphans)

    @property
    def sound(self) -> bool:
        """Whether everything was checked, and there is nothing to repair."""
        return not (self.is_repairable or self.broken or self.unchecked)


class _Row(NamedTuple):
    """A row of `Cache`, with the facts about it in other tables."""

    number: int
    key: Any
    raw: Any
    mode: Any
    value: Any
    entry: int | None
    dimensions: int | None
    found_at: int | None
    """The row to which the index of addresses leads."""

    @property
    def is_damaged(self) -> bool:
        """Whether the record does not verify. A record of a later version verifies."""
        if not is_record(self.key, self.raw, self.mode, self.value):
            return True
        return record.is_damaged(self.value, self.value[_DIGEST])

    @property
    def is_in_wrong_partition(self) -> bool:
        """Whether the record verifies and has another width than its partition."""
        width = record.width(self.value)
        return width is not None and self.dimensions not in (None, width)


def scan(database: ReadableFile, findings: Findings) -> Iterator[int]:
    """Check every record; yield the number of checked ones. Raises FAILURES.

    Damage of the file is not raised but recorded.
    """
    try:
        yield from _scan_records(database, findings)
        database.sql("SELECT namespace, space FROM Partitions").fetchall()
        _compare_indexes(database, findings)
        with contextlib.closing(connect(database)) as connection:
            watch = LogWatch(database)
            _compare_counts(watch, connection, findings)
            _check_structure(watch, connection, findings)
    except sqlite3.Error as error:
        if not is_damage(error):
            raise
        findings.broken = str(error)


def _scan_records(database: ReadableFile, findings: Findings) -> Iterator[int]:
    sql, pauses = database.sql, Pauses(database)
    checked = after = not_found = 0
    count = ROWS_A_BATCH
    while count == ROWS_A_BATCH:
        start = time.monotonic()
        batch = sql(_BATCH.format(limit=ROWS_A_BATCH), {"after": after, "last": MAX_ID}).fetchall()
        count = len(batch)
        last = batch[-1][0] if count == ROWS_A_BATCH else MAX_ID
        ((orphans,),) = sql(f"SELECT count(*) {_ORPHANS}", {"after": after, "last": last})
        is_repairable = orphans > 0
        findings.orphans += orphans
        for row in map(_Row._make, batch):
            if row.is_damaged:
                findings.damaged += 1
                is_repairable = True
                continue
            findings.records += 1
            not_found += row.found_at != row.number
            lost, wrong = row.entry is None, row.is_in_wrong_partition
            findings.lost_sight_of += lost
            findings.wrong_partition += wrong
            is_repairable |= lost or wrong
        if is_repairable:
            _remember(findings.places, after, last)
        after = last
        checked += count
        pauses.pause(start)
        yield checked
    if not_found:
        findings.broken = f"{not_found} records are not where the index of addresses says"


def _remember(ranges: list[tuple[int, int]], after: int, last: int) -> None:
    if ranges and (ranges[-1][1] == after or len(ranges) == MAX_PLACES):
        after, _ = ranges.pop()
    ranges.append((after, last))


def _compare_indexes(database: ReadableFile, findings: Findings) -> None:
    """Look up each row of `Entries` in each of its indexes. A missing one is never evicted."""
    sql = database.sql
    names = _indexes(sql, "Entries")
    lookups = [
        f"SELECT {number}, count(*) FROM Entries AS own NOT INDEXED"
        " WHERE id > :after AND id <= :last AND NOT EXISTS ("
        f'SELECT 1 FROM Entries AS other INDEXED BY "{name}" WHERE other.id = own.id AND '
        + " AND ".join(f"other.{column} IS own.{column}" for column in columns)
        + ")"
        for number, (name, columns) in enumerate(names.items())
    ]
    missing = [0] * len(names)
    for after, last in id_ranges(database, ENTRIES_A_BATCH) if names else ():
        for number, count in sql(" UNION ALL ".join(lookups), {"after": after, "last": last}):
            missing[number] += count
    for name, count in zip(names, missing, strict=True):
        if count:
            findings.broken = f"{count} entries are missing from index {name}"


def _compare_counts(watch: LogWatch, connection: sqlite3.Connection, findings: Findings) -> None:
    """Check that all indexes of a table have as many rows as the table, in one statement."""
    counts = []
    for table in _tables(connection):
        # The table of records is large, and its rows are those of `Entries`.
        if table == "Cache":
            if not (findings.lost_sight_of or findings.orphans):
                counts.append(("Entries", "NOT INDEXED", table))
        else:
            counts.append((table, "NOT INDEXED", table))
        indexes = _indexes(connection.execute, table)
        counts += ((table, f'INDEXED BY "{name}"', table) for name in indexes)
    # `count(*)` would take whichever index it likes.
    columns = ", ".join(f'(SELECT count(1) FROM "{table}" {how})' for table, how, _ in counts)
    rows = watch.fetch(connection, f"SELECT {columns}")
    if rows is None:
        findings.unchecked = "the indexes' numbers of rows"
        return
    of: dict[str, set[int]] = {}
    for (_, _, table), count in zip(counts, rows[0], strict=True):
        of.setdefault(table, set()).add(count)
    for table, totals in of.items():
        if len(totals) > 1:
            numbers = ", ".join(map(str, sorted(totals)))
            findings.broken = (
                f"table {table} and its indexes have unlike numbers of rows: {numbers}"
            )


def _check_structure(watch: LogWatch, connection: sqlite3.Connection, findings: Findings) -> None:
    """Let SQLite check the file; if there is no time for all of it, each small table."""
    checks = ["PRAGMA quick_check(1)"]
    for check in checks:
        rows = watch.fetch(connection, check)
        if rows is None:
            findings.unchecked = "the structure of the file"
            if len(checks) == 1:
                # Of the records' own table all rows were read, and all addresses looked up.
                small = [table for table in _tables(connection) if table != "Cache"]
                checks += [f'PRAGMA quick_check("{table}")' for table in small]
        elif rows[0][0] != "ok":
            findings.broken = str(rows[0][0])
            return


def _tables(connection: sqlite3.Connection) -> list[str]:
    names = connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")
    return [name for (name,) in names if not name.startswith("sqlite_")]


def _indexes(sql: Sql, table: str) -> dict[str, list[str]]:
    """Return the columns of each index that holds all rows of a table, by the index's name."""
    names = sql(
        "SELECT name FROM pragma_index_list(?) WHERE NOT partial AND origin != 'pk'", (table,)
    ).fetchall()
    return {
        name: [c for (c,) in sql("SELECT name FROM pragma_index_info(?)", (name,)).fetchall()]
        for (name,) in names
    }


def repair(database: Database, findings: Findings) -> None:
    """Delete the damaged rows and enter the others again, in batches. Raises FAILURES."""
    pauses = Pauses(database)
    for start, end in findings.places:
        after, count = start, ROWS_A_BATCH
        while count == ROWS_A_BATCH:
            start_time = time.monotonic()
            # Checked again: a proxy may have replaced the damaged record.
            with database.transaction() as connection:
                batch = connection.execute(
                    _BATCH.format(limit=ROWS_A_BATCH), {"after": after, "last": end}
                ).fetchall()
                count = len(batch)
                last = batch[-1][0] if count == ROWS_A_BATCH else end
                for row in map(_Row._make, batch):
                    if row.is_damaged:
                        connection.execute("DELETE FROM Cache WHERE rowid = ?", (row.number,))
                    elif row.entry is None:
                        connection.execute(_ENTER, (row.number,))
                    elif row.is_in_wrong_partition:
                        connection.execute(
                            "UPDATE Entries SET partition = NULL WHERE id = ?", (row.number,)
                        )
                connection.execute(f"DELETE {_ORPHANS}", {"after": after, "last": last})
            after = last
            pauses.pause(start_time)
