"""Rows out of a store and into a store, a batch at a time. What is whole goes; nothing is replaced.

A running proxy goes on meanwhile: each batch is a read or a transaction of its own.
"""

import math
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from embedding_proxy.cache import record
from embedding_proxy.cache.disk.changes import Changes, Kept
from embedding_proxy.cache.disk.database import Database
from embedding_proxy.cache.disk.purge import Choice, where
from embedding_proxy.cache.disk.read_only import ReadableFile
from embedding_proxy.cache.row import Partition, Row

from .short_reads import id_ranges

ROWS_A_BATCH = 500
ENTRIES_A_RANGE = 20_000
_END = (1 << 63) - 1
RECORD_COLUMNS = (
    "CASE typeof(key) WHEN 'blob' THEN key END, raw, mode,"
    " CASE typeof(value) WHEN 'blob' THEN value END"
)
"""A text that is none would stop the reading of all rows."""


@dataclass
class Read:
    """What came of reading a store's rows."""

    damaged: int = 0
    """Rows whose record does not verify; they are left out."""


@dataclass
class Written:
    """What came of writing rows into a store."""

    stored: int = 0
    present: int = 0
    """Those that were there already, or came twice."""
    refused: int = 0
    """Those whose record does not verify."""


def rows(database: ReadableFile, choice: Choice, report: Read) -> Iterator[Row]:
    """Yield the chosen rows that are whole, in the order in which they lie. Raises FAILURES."""
    condition, values = where(choice)
    if choice == Choice():
        # Also rows that no row of `Entries` knows.
        tables = "Cache LEFT JOIN Entries ON Entries.id = Cache.rowid"
        ranges = iter([(0, _END)])
    else:
        # The narrow table is read in ranges: few of its rows may be chosen, far from one another.
        tables = "Entries CROSS JOIN Cache ON Cache.rowid = Entries.id"
        ranges = id_ranges(database, ENTRIES_A_RANGE)
    number = "Cache.rowid" if choice == Choice() else "Entries.id"
    statement = (
        f"SELECT {number}, {RECORD_COLUMNS},"
        " coalesce(stored / 1000.0, CAST(store_time AS REAL), 0), namespace, space, dimensions"
        f" FROM {tables} LEFT JOIN Partitions ON Partitions.id = partition"
        f" WHERE {number} > :after AND {number} <= :last AND {condition}"
        f" ORDER BY {number} LIMIT {ROWS_A_BATCH}"
    )
    for start, last in ranges:
        after, count = start, ROWS_A_BATCH
        while count == ROWS_A_BATCH:
            some = database.sql(statement, {**values, "after": after, "last": last}).fetchall()
            count = len(some)
            for after, key, raw, mode, value, stored, *names in some:  # noqa: B007 - the last one counts
                width = record.width(value) if is_record(key, raw, mode, value) else None
                if width is None:
                    report.damaged += 1
                    continue
                partition = None if names[1] is None or names[2] != width else Partition(*names)
                yield Row(key, value, stored, partition)


def is_record(key: object, raw: object, mode: object, value: object) -> bool:
    """Tell whether the columns of a row of table `Cache` are those of a record, not a pickle's."""
    return raw == 1 and mode == 1 and type(value) is bytes and type(key) is bytes and len(key) == 16


def put(database: ReadableFile, new: Iterable[Row], *, dry_run: bool = False) -> Iterator[Written]:
    """Write the rows that are not there yet; yield the sums so far after each batch.

    Any readable file serves `dry_run`; else it is a Database. Raises FAILURES, and what `new`
    raises.
    """
    sums = Written()
    for batch in _batches(new):
        now = time.time()
        whole = 0
        wanted: dict[bytes, Kept] = {}
        for row in batch:
            width = record.width(row.record)
            if width is None:
                sums.refused += 1
                continue
            whole += 1
            known = row.partition is not None and row.partition.dimensions == width
            stored = row.stored if math.isfinite(row.stored) and 0 <= row.stored <= now else now
            # Of two rows of one address the first is the better known (see `salvage`).
            wanted.setdefault(
                row.address, Kept(row.record, row.partition if known else None, stored)
            )
        there = database.read_many(list(wanted))
        bad = [
            (a, found.record) for a, found in there.items() if record.width(found.record) is None
        ]
        missing = {a: kept for a, kept in wanted.items() if a not in there} | {
            address: wanted[address] for address, _ in bad
        }
        if missing and not dry_run:
            if not isinstance(database, Database):
                raise TypeError("the file is open for reading only")
            database.write(Changes(records=missing, dead=bad, keep_newer=True))
        sums.stored += len(missing)
        sums.present += whole - len(missing)
        yield sums


def _batches(rows: Iterable[Row]) -> Iterator[list[Row]]:
    """Yield all rows in batches; those before a failure come before it."""
    batch: list[Row] = []
    try:
        for row in rows:
            batch.append(row)
            if len(batch) == ROWS_A_BATCH:
                yield batch
                batch = []
    except Exception:
        if batch:
            yield batch
        raise
    if batch:
        yield batch
