"""Reading every record of a store to see that it is whole, and mending what is not.

What is damaged below SQLite, so that pages cannot be read, is mended by carving: the file is moved
aside, and what is whole in it goes into a fresh one (see `salvage`).
"""

import sqlite3
from collections.abc import Iterator
from dataclasses import dataclass, field

from . import record
from .database import Database, is_damage
from .transfer import is_record

ROWS_A_BATCH = 500


@dataclass
class Findings:
    """What was found."""

    records: int = 0
    """Those that are whole."""
    damaged: list[int] = field(default_factory=list)
    """Rows whose record does not verify, or that hold something else."""
    lost_sight_of: list[int] = field(default_factory=list)
    """Rows that no row of `Entries` knows: they would never be counted or evicted."""
    broken: str | None = None
    """What SQLite says of the file itself, if it is not sound."""

    @property
    def sound(self) -> bool:
        """Whether there is nothing to mend."""
        return not (self.damaged or self.lost_sight_of or self.broken)


def scan(database: Database, findings: Findings) -> Iterator[int]:
    """Look at every record, yielding how many were looked at so far. Raises FAILURES.

    Damage of the file is not raised but noted.
    """
    try:
        yield from _scan_records(database, findings)
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
            "SELECT Cache.rowid, key, raw, mode, value, Entries.id, dimensions FROM Cache"
            " LEFT JOIN Entries ON Entries.id = Cache.rowid"
            " LEFT JOIN Partitions ON Partitions.id = partition"
            f" WHERE Cache.rowid > ? ORDER BY Cache.rowid LIMIT {ROWS_A_BATCH}",
            (last,),
        ).fetchall()
        for last, key, raw, mode, value, entry, dimensions in rows:
            width = record.width(value) if is_record(key, raw, mode, value) else None
            if width is None or dimensions not in (None, width):
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
        connection.executemany(
            "DELETE FROM Cache WHERE rowid = ?", ((row,) for row in findings.damaged)
        )
        connection.executemany(
            "INSERT OR IGNORE INTO Entries SELECT rowid, NULL, CAST(1000 * store_time AS INTEGER),"
            " CAST(1000 * access_time AS INTEGER) FROM Cache WHERE rowid = ?",
            ((row,) for row in findings.lost_sight_of),
        )
