"""Keeping a store's file under its limit: the coldest entries go, and their pages are used again.

The limit is on the real file. Room is made before a transaction writes, so the file does not grow
beyond the limit even for its length. Deleting by last use leaves pages half empty, and SQLite puts
new rows at the end; so when deleting alone frees too little, the rows that lie at the beginning are
moved to the end, and their pages become free as a whole.
"""

import math
from collections.abc import Callable, Collection

from .layout import PAGE_BYTES, Sql

ROUNDS = 8
"""The most attempts of one transaction; the next one goes on where it ended."""
MOST_PAGES = 512
"""The most pages (16 MiB) that one round deletes or moves, so that no transaction takes long."""
_ROW_BYTES = 64
"""What a row takes on its page beside the record, generously."""
_SPARE_PAGES = 4
"""Made free beyond what is lacking, since rows seldom fill the last page to its end."""
_OTHER_PAGES = 4
"""Pages that a transaction may want for the narrow tables and the indexes."""


def pages_for(lengths: Collection[int]) -> int:
    """Return the pages that records of these lengths, in bytes, take in a file."""
    if not lengths:
        return 0
    row = max(lengths) + _ROW_BYTES
    return _OTHER_PAGES + math.ceil(len(lengths) / max(1, PAGE_BYTES // row)) * math.ceil(
        row / PAGE_BYTES
    )


def make_room(
    sql: Sql,
    limit: int,
    wanted: int,
    used_at: Callable[[bytes], int],
    pinned: Collection[int] = (),
) -> bool:
    """Make room for `wanted` pages in a file of at most `limit` pages; return whether there is.

    `used_at` tells, by address, of a use that is not in the file yet, in milliseconds, or 0; such
    an entry is given that time instead of being deleted. So is one of a `pinned` partition.
    """
    for _ in range(ROUNDS):
        before = _lacking(sql, limit, wanted)
        if before <= 0:
            break
        _delete_coldest(sql, before + _SPARE_PAGES, used_at, pinned)
        after = _lacking(sql, limit, wanted)
        if 2 * after > min(before, MOST_PAGES):
            _move_first(sql, 2 * after)
    else:
        return _lacking(sql, limit, wanted) <= 0
    _give_back(sql, limit)
    return True


def _lacking(sql: Sql, limit: int, wanted: int) -> int:
    ((pages,),) = sql("PRAGMA page_count")
    ((free,),) = sql("PRAGMA freelist_count")
    return int(pages - free + wanted - limit)


def _rows_of(sql: Sql, pages: int) -> int:
    """Return how many rows fill so many pages, going by the average."""
    ((total,),) = sql("PRAGMA page_count")
    ((free,),) = sql("PRAGMA freelist_count")
    ((entries,),) = sql("SELECT value FROM Settings WHERE key = 'count'")
    share: float = min(pages, MOST_PAGES) / max(1, total - free)
    return math.ceil(share * int(entries))


def _delete_coldest(
    sql: Sql, pages: int, used_at: Callable[[bytes], int], pinned: Collection[int]
) -> None:
    """Delete as many of the entries used longest ago as fill so many pages."""
    wanted = _rows_of(sql, pages)
    ((newest,),) = sql("SELECT max(used) FROM Entries")
    for _ in range(ROUNDS):
        rows = sql(
            "SELECT id, used, partition, key FROM Entries LEFT JOIN Cache ON Cache.rowid = id"
            " ORDER BY used LIMIT ?",
            (wanted,),
        ).fetchall()
        kept = 0
        for row, used, partition, key in rows:
            newer = newest if partition in pinned else used_at(key)
            if newer > used or partition in pinned:
                sql("UPDATE Entries SET used = ? WHERE id = ?", (newer, row))
                kept += 1
            else:
                sql("DELETE FROM Cache WHERE rowid = ?", (row,))
                sql("DELETE FROM Entries WHERE id = ?", (row,))
        if not kept or len(rows) < wanted:
            return
        wanted = kept


def _move_first(sql: Sql, pages: int) -> None:
    """Move the rows that lie first in the file to its end; what was half empty is then free."""
    rows = sql("SELECT rowid FROM Cache ORDER BY rowid LIMIT ?", (_rows_of(sql, pages),)).fetchall()
    ((last,),) = sql("SELECT max(rowid) FROM Cache")
    for row, (old,) in enumerate(rows, start=(last or 0) + 1):
        sql("UPDATE Cache SET rowid = ? WHERE rowid = ?", (row, old))
        sql("UPDATE Entries SET id = ? WHERE id = ?", (row, old))


def _give_back(sql: Sql, limit: int) -> None:
    """Cut free pages off a file that is longer than its limit, as after the limit was lowered."""
    ((pages,),) = sql("PRAGMA page_count")
    if pages > limit:
        sql(f"PRAGMA incremental_vacuum({min(pages - limit, MOST_PAGES)})").fetchall()
