"""A copy of a store that is in use: whole, consistent, and itself a store's file.

It is made in steps, each a short read, so that the write-ahead log does not grow. Four things are
done in this order:

1. All records are copied in the order of their rows, with their rows of `Entries`, until a step
   finds the end. Eviction gives rows a new place at the end, never before what is still to be
   copied; so a row may come twice (then it is left out), and is never missed.
2. The indexes and triggers are made.
3. Each copied entry is looked up in the store. What was deleted meanwhile is deleted from the copy;
   what was bought again is copied again.
4. The ledger and the other small tables are copied in one read, so the vectors in the copy are
   billed in it. If a purge ended meanwhile, 3 and 4 are repeated.

So the copy holds every entry that was there from beginning to end, none that a purge deleted which
ended before, and possibly some that were bought meanwhile.
"""

import contextlib
import sqlite3
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from embedding_proxy.cache import atomic_file, private_files
from embedding_proxy.cache.disk.read_only import ReadableFile
from embedding_proxy.cache.disk.schema import CACHE_PAGES, MMAP_BYTES

from .short_reads import Pauses

STEP_BYTES = 8 << 20
"""The approximate most that one step copies."""
MAX_ROWS_A_STEP = 5_000
MAX_KEYS_A_STEP = 1_000
"""The number of entries that one step looks up, in the order of their addresses."""
MAX_TURNS, MAX_ROWS_AT_LEAST = 4, 1_000_000
"""The copy is given up after this many times the store's entries, plus a constant."""
MAX_CHECKS = 10
"""The number of comparisons with the store while purges continue."""
_CACHE_KIB = 1 << 16
"""Memory for pages of the copy, and for the sorting of an index."""
_KEY_INDEX = "Cache_key_raw"
_BY_STEPS = ("Cache", "Entries", "Settings")
"""Tables that are not copied as a whole at the end."""

# Rows that are no records are never served, so they are not copied.
_IS_RECORD = (
    "raw = 1 AND mode = 1 AND typeof(key) = 'blob' AND length(key) = 16 AND typeof(value) = 'blob'"
)
_RANGE = "rowid > :after AND rowid <= :last"
_COPY_RECORDS = f"""
    INSERT OR IGNORE INTO main.Cache
    SELECT * FROM source.Cache WHERE {_RANGE} AND {_IS_RECORD} ORDER BY rowid
"""
_COPY_ENTRIES = """
    INSERT INTO main.Entries
    SELECT * FROM source.Entries WHERE id > :after AND id <= :last
        AND EXISTS (SELECT 1 FROM main.Cache WHERE rowid = Entries.id)
"""
# For a record that the store's list of entries lacks.
_ENTER = f"""
    INSERT OR IGNORE INTO main.Entries (id, partition, stored, used)
    SELECT rowid, NULL, CAST(1000 * coalesce(store_time, 0) AS INTEGER),
        CAST(1000 * coalesce(access_time, 0) AS INTEGER)
    FROM main.Cache WHERE {_RANGE}
"""
_DELETE_DOUBLE = """
    DELETE FROM main.Cache WHERE rowid IN (SELECT id FROM (
        SELECT rowid AS id, row_number() OVER (PARTITION BY key ORDER BY rowid DESC) AS place
        FROM main.Cache) WHERE place > 1)
"""
_FIND_CHANGED = f"""
    INSERT INTO temp.Changed
    SELECT copied.rowid, present.rowid
    FROM main.Cache AS copied INDEXED BY {_KEY_INDEX}
    CROSS JOIN main.Entries AS own ON own.id = copied.rowid
    LEFT JOIN source.Cache AS present ON present.key = copied.key AND present.raw = 1
    LEFT JOIN source.Entries AS entry ON entry.id = present.rowid
    WHERE copied.key > :after AND copied.key <= :last
        AND (present.rowid IS NULL OR entry.stored != own.stored)
"""


def copy(database: ReadableFile, target: Path, progress: Callable[[int, int], None]) -> None:
    """Write the store's entries and ledger to `target`, which must not exist.

    `progress` gets the number of copied entries and of all entries. Other processes read and write
    meanwhile. Raises FAILURES; then nothing is left at `target`.
    """
    if target.exists():
        raise FileExistsError(f"{target} exists; it is not overwritten")
    # A separate folder, because SQLite makes files beside the one that it writes.
    with tempfile.TemporaryDirectory(".part", f"{target.name}-", target.parent) as folder:
        part = Path(folder) / target.name
        private_files.create(part)
        address = f"{part.absolute().as_uri()}?mode=rwc"
        with contextlib.closing(sqlite3.connect(address, isolation_level=None, uri=True)) as own:
            _Copy(own, database).make(progress)
        atomic_file.publish(part, target, exclusive=True)


class _Copy:
    """A copy in progress: `main` is the copy, `source` the store, both in one connection."""

    def __init__(self, connection: sqlite3.Connection, database: ReadableFile) -> None:
        self._sql = connection.execute
        self._sql("ATTACH ? AS source", (database.address,))
        self._page_bytes = self._one("PRAGMA source.page_size")
        self._sql(f"PRAGMA main.page_size = {self._page_bytes}")
        self._sql(f"PRAGMA main.auto_vacuum = {self._one('PRAGMA source.auto_vacuum')}")
        self._sql(f"PRAGMA main.cache_size = -{_CACHE_KIB}")
        self._sql(f"PRAGMA source.cache_size = {CACHE_PAGES}")
        self._sql(f"PRAGMA source.mmap_size = {MMAP_BYTES}").fetchall()
        # Nobody reads the copy before it is complete and on disk.
        self._sql("PRAGMA main.journal_mode = MEMORY")
        self._sql("PRAGMA main.synchronous = OFF")
        self._sql("PRAGMA main.secure_delete = ON")
        self._layout = self._one("PRAGMA source.user_version")
        self._schema = self._sql(
            "SELECT type, name, sql FROM source.sqlite_master"
            " WHERE sql IS NOT NULL AND name NOT LIKE 'sqlite~_%' ESCAPE '~'"
        ).fetchall()
        self._pauses = Pauses(database, self._sql, "source")

    def make(self, progress: Callable[[int, int], None]) -> None:
        """Make the whole copy. Raises FAILURES."""
        for sql in self._statements("table"):
            self._sql(sql)
        with self._transaction():
            self._sql("INSERT INTO main.Settings SELECT * FROM source.Settings")
            self._sql("INSERT INTO main.Partitions SELECT * FROM source.Partitions")
        self._copy_records(progress)
        for sql in self._statements("index"):
            self._sql(sql)
        with self._transaction():
            self._sql(
                "UPDATE main.Settings SET value = (SELECT count(*) FROM main.Entries)"
                " WHERE key = 'count'"
            )
            # Of files beside the database; a store has none.
            self._sql("UPDATE main.Settings SET value = 0 WHERE key = 'size'")
            for sql in self._statements("trigger"):
                self._sql(sql)
        self._check()
        self._sql(f"PRAGMA main.user_version = {self._layout}")

    def _statements(self, kind: str) -> list[str]:
        return [sql for what, name, sql in self._schema if what == kind and name != _KEY_INDEX]

    def _copy_records(self, progress: Callable[[int, int], None]) -> None:
        total = self._one("SELECT CAST(value AS INTEGER) FROM source.Settings WHERE key = 'count'")
        file_bytes = self._one("PRAGMA source.page_count") * self._page_bytes
        average = file_bytes // total if total > 0 else self._page_bytes
        rows = max(1, min(MAX_ROWS_A_STEP, STEP_BYTES // max(1, average)))
        end = self._one("SELECT coalesce(max(rowid), 0) FROM source.Cache")
        after = done = 0
        is_indexed = False
        while True:
            start = time.monotonic()
            with self._transaction():
                last, row_count = self._sql(
                    "SELECT max(rowid), count(*) FROM"
                    " (SELECT rowid FROM source.Cache WHERE rowid > ? ORDER BY rowid LIMIT ?)",
                    (after, rows),
                ).fetchone()
                for statement in (_COPY_RECORDS, _COPY_ENTRIES, _ENTER) if row_count else ():
                    self._sql(statement, {"after": after, "last": last})
            after, done = last or after, done + row_count
            progress(min(done, total), total)
            if not is_indexed and (row_count < rows or after >= end):
                # Up to here a row seldom came twice; behind it there are those with new places.
                self._index_keys()
                is_indexed = True
            elif row_count < rows:
                return
            elif done > MAX_TURNS * total + MAX_ROWS_AT_LEAST:
                raise OSError("the store is written to faster than it can be copied to this place")
            self._pauses.pause(start)

    def _index_keys(self) -> None:
        (sql,) = (sql for _, name, sql in self._schema if name == _KEY_INDEX)
        try:
            self._sql(sql)
        except sqlite3.IntegrityError:
            # Rows at the end were deleted meanwhile, and others were moved to their places.
            self._sql(_DELETE_DOUBLE)
            self._sql("DELETE FROM main.Entries WHERE id NOT IN (SELECT rowid FROM main.Cache)")
            self._sql(sql)

    def _check(self) -> None:
        for _ in range(MAX_CHECKS):
            purges = self._one("SELECT coalesce(max(id), 0) FROM source.Purges")
            self._take_over_changes()
            with self._transaction():
                self._copy_small_tables()
                if self._one("SELECT coalesce(max(id), 0) FROM main.Purges") == purges:
                    return
        raise OSError("entries are purged all the time; copy the store when that is over")

    def _copy_small_tables(self) -> None:
        for kind, name, _ in self._schema:
            if kind == "table" and name not in _BY_STEPS:
                # Partitions of which entries were copied stay, should they have been joined since.
                if name != "Partitions":
                    self._sql(f'DELETE FROM main."{name}"')
                self._sql(f'INSERT OR REPLACE INTO main."{name}" SELECT * FROM source."{name}"')

    def _take_over_changes(self) -> None:
        """Repeat the store's deletions in the copy, and copy again what was bought again."""
        self._sql("CREATE TEMP TABLE IF NOT EXISTS Changed (copied INTEGER, present INTEGER)")
        names = [name for _, name, *_ in self._sql("PRAGMA main.table_info(Cache)")][1:]
        columns = ", ".join(f'"{name}"' for name in names)
        after = b""
        while True:
            start = time.monotonic()
            with self._transaction():
                last = self._one(
                    f"SELECT max(key) FROM (SELECT key FROM main.Cache INDEXED BY {_KEY_INDEX}"
                    f" WHERE key > ? ORDER BY key LIMIT {MAX_KEYS_A_STEP})",
                    after,
                )
                if last is None:
                    return
                self._sql(_FIND_CHANGED, {"after": after, "last": last})
                self._sql("DELETE FROM main.Cache WHERE rowid IN (SELECT copied FROM temp.Changed)")
                self._sql(
                    f"INSERT INTO main.Cache (rowid, {columns}) SELECT copied, {columns}"
                    " FROM temp.Changed JOIN source.Cache ON source.Cache.rowid = present"
                    f" WHERE {_IS_RECORD}"
                )
                self._sql(
                    "INSERT INTO main.Entries SELECT copied, partition, stored, used"
                    " FROM temp.Changed JOIN source.Entries ON id = present"
                    " WHERE copied IN (SELECT rowid FROM main.Cache)"
                )
                self._sql("DELETE FROM temp.Changed")
            after = last
            self._pauses.pause(start)

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[None]:
        """One read of the store and one write of the copy. If it fails, the copy is deleted."""
        self._sql("BEGIN")
        yield
        self._sql("COMMIT")

    def _one(self, statement: str, *values: object) -> Any:  # noqa: ANN401 - what the column holds
        ((value,),) = self._sql(statement, values).fetchall()
        return value
