"""The tables of a store's file beside diskcache's own, and the way from older layouts to this one.

diskcache keeps the records: table `Cache`, some kB a row. What is counted, sorted and changed often
stands in narrow rows of its own, so that noting a use does not rewrite a page of records.
"""

import contextlib
import sqlite3
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from embedding_proxy.cache import private_files
from embedding_proxy.providers.base import current_label

PAGE_BYTES = 32_768
"""Five records of 1,536 dimensions a page: 1.07 bytes on disk a byte kept, 1.34 with 4 KiB."""
MMAP_BYTES = 1 << 36
"""Reads go through the page cache without copies; most builds of SQLite map at most 2 GiB."""
CACHE_PAGES = 1024
"""A connection's own cache, 32 MiB: beyond what is mapped it saves the index from being re-read."""
LAYOUT = 4
"""The layout, in `PRAGMA user_version`. A file of an older layout is upgraded when it is opened."""

INCREMENTAL = 2
"""`PRAGMA auto_vacuum`: freed pages can be given back, but nothing is moved at every commit."""

Sql = Callable[..., Any]
"""Runs one statement with its parameters, and returns the rows."""

_FROM_NONE = (
    """CREATE TABLE IF NOT EXISTS Partitions (
        id INTEGER PRIMARY KEY, namespace TEXT NOT NULL, space TEXT NOT NULL,
        dimensions INTEGER NOT NULL, UNIQUE (namespace, space, dimensions))""",
    # One row a record, under its rowid; times in milliseconds since 1970.
    """CREATE TABLE IF NOT EXISTS Entries (
        id INTEGER PRIMARY KEY, partition INTEGER, stored INTEGER NOT NULL,
        used INTEGER NOT NULL)""",
    "CREATE INDEX IF NOT EXISTS Entries_used ON Entries (used)",
    """CREATE TRIGGER IF NOT EXISTS Entries_delete AFTER DELETE ON Cache BEGIN
        DELETE FROM Entries WHERE id = OLD.rowid; END""",
    # What was answered, by day (since 1970, UTC) and partition; see the next layout.
    """CREATE TABLE IF NOT EXISTS Usage (
        day INTEGER NOT NULL, partition INTEGER NOT NULL, hits INTEGER NOT NULL,
        joins INTEGER NOT NULL, misses INTEGER NOT NULL, duplicates INTEGER NOT NULL,
        tokens_saved INTEGER NOT NULL, tokens_billed INTEGER NOT NULL,
        PRIMARY KEY (day, partition)) WITHOUT ROWID""",
    # Purges. Running proxies read it to learn that their memory is out of date.
    """CREATE TABLE IF NOT EXISTS Purges (
        id INTEGER PRIMARY KEY, at INTEGER NOT NULL, entries INTEGER NOT NULL)""",
    # Of layout 0 the time of the last use is all that can be had without reading every record.
    """INSERT OR IGNORE INTO Entries (id, partition, stored, used)
        SELECT rowid, NULL, CAST(1000 * access_time AS INTEGER),
            CAST(1000 * access_time AS INTEGER) FROM Cache""",
    "DROP INDEX IF EXISTS Cache_access_time",
)
# The ledger. It keeps the name of the table it replaces: a process of the version before that still
# runs fails to write to it, and keeps what it has; for want of the table it would take the file for
# damaged, and move it aside.
_FROM_1 = (
    "ALTER TABLE Usage RENAME TO Usage_1",
    """CREATE TABLE Usage (
        day INTEGER NOT NULL, partition INTEGER NOT NULL, model TEXT NOT NULL,
        provider TEXT NOT NULL, client TEXT NOT NULL, hits INTEGER NOT NULL,
        joins INTEGER NOT NULL, misses INTEGER NOT NULL, duplicates INTEGER NOT NULL,
        tokens_saved INTEGER NOT NULL, tokens_billed INTEGER NOT NULL,
        nanodollars_saved INTEGER NOT NULL, nanodollars_billed INTEGER NOT NULL,
        PRIMARY KEY (day, partition, model, provider, client)) WITHOUT ROWID""",
    # Of layout 1 nobody knows who was paid, nor how much.
    """INSERT INTO Usage SELECT day, partition, coalesce(space, ''), '', '', hits, joins, misses,
        duplicates, tokens_saved, tokens_billed, 0, 0
        FROM Usage_1 LEFT JOIN Partitions ON id = partition""",
    "DROP TABLE Usage_1",
)
_SUMS = (
    *("hits", "joins", "misses", "duplicates", "tokens_saved", "tokens_billed"),
    *("nanodollars_saved", "nanodollars_billed"),
)
_ADD_USAGE = f"""
    INSERT INTO Usage (day, partition, model, provider, client, {", ".join(_SUMS)})
    SELECT day, ?, model, provider, client, {", ".join(_SUMS)} FROM Usage WHERE partition = ?
    ON CONFLICT (day, partition, model, provider, client) DO UPDATE SET
        {", ".join(f"{name} = {name} + excluded.{name}" for name in _SUMS)}
"""
_FROM_2 = (
    "DROP INDEX IF EXISTS Entries_used",
    # What is used longest ago, without those of partitions that are never evicted.
    "CREATE INDEX Entries_used ON Entries (used, partition)",
    # What expires or is purged is found by partition and age.
    "CREATE INDEX Entries_stored ON Entries (partition, stored)",
    # Holds each row of the ledger a second time, on other pages: one damaged page costs no sum.
    f"CREATE INDEX Usage_copy ON Usage ({', '.join(_SUMS)})",
    # Whose sums were taken over, by the name of the folder it was moved to; see `salvage`.
    "CREATE TABLE Salvaged (name TEXT PRIMARY KEY) WITHOUT ROWID",
    # diskcache's index; no row here has an expiry time, and each would stand in it.
    "DROP INDEX IF EXISTS Cache_expire_time",
    """CREATE INDEX Cache_expire_time ON Cache (expire_time)
        WHERE expire_time IS NOT NULL""",
)
_FROM_3 = (
    # The ledger's last weeks by hour (since 1970, UTC), see `bounds.hour_rows`.
    f"""CREATE TABLE Hours (
        hour INTEGER NOT NULL, model TEXT NOT NULL, client TEXT NOT NULL,
        {", ".join(f"{name} INTEGER NOT NULL" for name in _SUMS)},
        PRIMARY KEY (hour, model, client)) WITHOUT ROWID""",
)
_STEPS = {0: _FROM_NONE, 1: _FROM_1, 2: _FROM_2, 3: _FROM_3}
"""The statements that lead from each older layout to the next."""


class NewerLayout(OSError):
    """A newer version wrote the file. It is not changed."""


def prepare(path: Path) -> None:
    """Lay out a file that does not exist yet, or is empty, as a kill can leave it."""
    if path.exists() and path.stat().st_size:
        return
    for rest in ("-wal", "-shm"):
        # Of a file that was deleted.
        path.with_name(path.name + rest).unlink(missing_ok=True)
    private_files.create(path)
    # Both hold only if they are set before diskcache sets the journal mode.
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as connection:
        connection.execute(f"PRAGMA page_size = {PAGE_BYTES}")
        connection.execute(f"PRAGMA auto_vacuum = {INCREMENTAL}")
        connection.execute("VACUUM")


def check(path: Path, patience_s: float) -> None:
    """Raise NewerLayout for a file of a layout that this version does not know.

    Raises sqlite3.OperationalError for one that somebody keeps locked: diskcache would wait for it
    for a minute; and sqlite3.DatabaseError for one that cannot be written for damage.
    """
    with contextlib.closing(
        sqlite3.connect(path, timeout=patience_s, isolation_level=None)
    ) as connection:
        ((layout,),) = connection.execute("PRAGMA user_version")
        connection.execute("BEGIN IMMEDIATE")
        if 0 < layout <= LAYOUT:
            # Only a writer detects some damage of the header. It does not reach the log.
            connection.execute("INSERT OR REPLACE INTO Settings SELECT key, value FROM Settings")
        connection.execute("ROLLBACK")
    refuse_newer(path, layout)


def refuse_newer(path: Path, layout: int) -> None:
    """Raise NewerLayout for a layout that this version does not know."""
    if layout > LAYOUT:
        raise NewerLayout(
            f"{path} has layout {layout}, this version knows {LAYOUT}:"
            " use a newer embedding-proxy, or another directory"
        )


def release_pages(sql: Sql, pages: int) -> int:
    """Cut up to so many free pages off the end of the file; return their number.

    Files of an early layout cannot shrink; they use free pages again.
    """
    ((before,),) = sql("PRAGMA freelist_count")
    for _ in range(min(pages, before)):
        # Each call steps once, and each step is one page.
        sql("PRAGMA incremental_vacuum(1)").fetchall()
    ((after,),) = sql("PRAGMA freelist_count")
    return int(before - after)


def rename_spaces(sql: Sql) -> None:
    """Give partitions whose label still holds values of parameters their present label.

    It is done at each opening: a process of an earlier version may have written such labels since,
    so there may be two partitions of one space, and they become one. The layout stays the same.
    """
    rows = sql("SELECT id, namespace, space, dimensions FROM Partitions").fetchall()
    former = [(row, label) for row in rows if (label := current_label(row[2])) != row[2]]
    if not former:
        return
    # Replaced values are overwritten, because they were not meant to be kept.
    sql("PRAGMA secure_delete = 1")
    for (number, namespace, _, dimensions), label in former:
        same = sql(
            "SELECT id FROM Partitions WHERE (namespace, space, dimensions) = (?, ?, ?)",
            (namespace, label, dimensions),
        ).fetchall()
        if not same:
            sql("UPDATE Partitions SET space = ? WHERE id = ?", (label, number))
            continue
        ((number_kept,),) = same
        sql("UPDATE Entries SET partition = ? WHERE partition = ?", (number_kept, number))
        sql(_ADD_USAGE, (number_kept, number))
        sql("DELETE FROM Usage WHERE partition = ?", (number,))
        sql("DELETE FROM Partitions WHERE id = ?", (number,))
    # Sums of which only the label was known when the ledger began; see `_FROM_1`.
    for (_, _, old, _), label in former:
        sql("UPDATE OR IGNORE Usage SET model = ? WHERE model = ?", (label, old))
    sql("PRAGMA secure_delete = 0")


def is_current(sql: Sql) -> bool:
    """Tell whether a file has the present layout, and no label of an earlier form."""
    if sql("PRAGMA user_version").fetchall() != [(LAYOUT,)]:
        return False
    return all(current_label(space) == space for (space,) in sql("SELECT space FROM Partitions"))


def refuse_older(sql: Sql) -> None:
    """Raise sqlite3.OperationalError for a file that must be upgraded to this layout first."""
    if not is_current(sql):
        raise sqlite3.OperationalError("the file is of an older layout")


def missing_steps(sql: Sql) -> Iterator[str]:
    """Yield the statements that upgrade a file to this layout, for one transaction."""
    ((layout,),) = sql("PRAGMA user_version")
    for version in range(layout, LAYOUT):
        yield from _STEPS[version]
    if layout != LAYOUT:
        yield f"PRAGMA user_version = {LAYOUT}"
