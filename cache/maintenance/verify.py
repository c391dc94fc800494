"""Reading every record of a store to see that it is whole, and mending what is not.

What is damaged below SQLite, so that pages cannot be read, is mended by carving: the file is moved
aside, and what is whole in it goes into a fresh one (see `salvage`).
"""

import sqlite3
from collections.abc import Iterator
from dataclasses import dataclass, field

from cache import record
from cache.disk.database import Database, is_damage

from .transfer import RECORD_COLUMNS, is_record

ROWS_A_BATCH = 500
_ROW = (
    f"SELECT Cache.rowid, {RECORD_COLUMNS}, Entries.id, dimensions FROM Cache"
    " LEFT JOIN Entries ON Entries.id = Cache.rowid"
    " LEFT JOIN Partitions ON Partitions.id = partition"
)
_ORPHANS = "id NOT IN (SELECT rowid FROM Cache)"


@dataclass
class Findings:
    """What was found."""

    records: int = 0
    """Those that are whole."""
    damaged: list[int] = field(default_factory=list)
    """Rows whose record does not verify, or that hold something else."""
    lost_sight_of: list[int] = field(default_factory=list)
    """Rows that no row of `Entries` knows: they would never be counted or evicted."""
    orphans: int = 0
    """Rows of `Entries` without a record."""
    broken: str | None = None
    """What SQLite says of the file itself, if it is not sound."""

    @property
    def sound(self) -> bool:
        """Whether there is nothing to mend."""
        return not (self.damaged or self.lost_sight_of or self.orphans or self.broken)


def scan(database: Database, findings: Findings) -> Iterator[int]:
    """Look at every record, yielding how many were looked at so far. Raises FAILURES.

    Damage of the file is not raised but noted.
    """
    try:
        yield from _scan_records(database, findings)
        database.sql("SELECT namespace, space FROM Partitions").fetchall()
        ((findings.orphans,),) = database.sql(f"SELECT count(*) FROM Entries WHERE {_ORPHANS}")
        # Of the file's structure; the records have been seen.
        ((verdict,),) = database.sql("PRAGMA quick_check(1)")
        if verdict != "ok":
            findings.broken = str(verdict)
    except sqlite3.Error as error:
        if not is_damage(error):
            raise
        findings.broken = str(error)


def _scan_records(database: Database, findings: Findings) -> Iterator[int]:
    seen = last = 0
    while True:
        rows = database.sql(
            f"{_ROW} WHERE Cache.rowid > ? ORDER BY Cache.rowid LIMIT {ROWS_A_BATCH}",
            (last,),
        ).fetchall()
        for last, key, raw, mode, value, entry, dimensions in rows:
            if not _is_whole(key, raw, mode, value, dimensions):
                findings.damaged.append(last)
                continue
            findings.records += 1
            if entry is None:
                findings.lost_sight_of.append(last)
        seen += len(rows)
        yield seen
        if len(rows) < ROWS_A_BATCH:
            return


def mend(database: Database, findings: Findings) -> None:
    """Delete the damaged rows and enter the others again. Raises FAILURES."""
    with database.transaction() as connection:
        for row in findings.damaged:
            # Looked at again: a proxy may have put something good in its place.
            for found in connection.execute(f"{_ROW} WHERE Cache.rowid = ?", (row,)).fetchall():
                _, key, raw, mode, value, _, dimensions = found
                if not _is_whole(key, raw, mode, value, dimensions):
                    connection.execute("DELETE FROM Cache WHERE rowid = ?", (row,))
        connection.executemany(
            "INSERT OR IGNORE INTO Entries SELECT rowid, NULL,"
            " CAST(1000 * coalesce(store_time, 0) AS INTEGER),"
            " CAST(1000 * coalesce(access_time, 0) AS INTEGER) FROM Cache WHERE rowid = ?",
            ((row,) for row in findings.lost_sight_of),
        )
        connection.execute(f"DELETE FROM Entries WHERE {_ORPHANS}")


def _is_whole(key: object, raw: object, mode: object, value: object, dimensions: object) -> bool:
    if not is_record(key, raw, mode, value):
        return False
    width = record.width(bytes(value))  # type: ignore[call-overload]
    return width is not None and dimensions in (None, width)
