"""Keeping a store's file under its limit: the coldest entries go, and their pages are used again.

The limit is on the real file. Room is made before a transaction writes, so the file does not grow
beyond the limit even for its length. Deleting by last use leaves pages half empty, and SQLite puts
new rows at the end; so when deleting alone frees too little, the rows that lie at the beginning are
moved to the end, and their pages become free as a whole.
"""

import math
from collections.abc import Callable, Collection
from typing import NamedTuple

from .schema import PAGE_BYTES, Sql, give_back

PASSES = 8
"""The most passes over the cold end that one round makes to find what may go."""
MOST_PAGES = 512
"""The most pages (16 MiB) that one transaction deletes or moves beside what it needs itself."""
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


class Room(NamedTuple):
    """What came of making room."""

    lacking: int
    """Pages that are still lacking; 0 or less: there is room."""
    deleted: int
    """Entries that had to go."""


def make_room(  # noqa: PLR0913 - by name
    sql: Sql,
    *,
    limit: int,
    wanted: int,
    used_at: Callable[[bytes], int],
    pinned: Collection[int] = (),
    effort: int = 0,
) -> Room:
    """Make room for `wanted` pages in a file of at most `limit` pages, as far as that is quick.

    What is left to do the next transaction does. `used_at` tells, by address, of a use that is not
    in the file yet, in milliseconds, or 0; such an entry is given that time instead of being
    deleted. So is one of a `pinned` partition. `effort` is how many pages the transaction writes
    besides: a large one may as well delete and move more.
    """
    budget = 2 * max(wanted, effort) + max(4 * _SPARE_PAGES, min(MOST_PAGES, limit // 32))
    lacking, deleted = _lacking(sql, limit, wanted), 0
    while lacking > 0 and budget > 0:
        goal = min(lacking + _SPARE_PAGES, budget)
        gone = _delete_coldest(sql, goal, used_at, pinned)
        deleted += gone
        budget -= goal
        before, lacking = lacking, _lacking(sql, limit, wanted)
        if 2 * lacking > min(before, goal) and budget > 0:
            _move_first(sql, min(2 * lacking, budget))
            budget -= 2 * lacking
            lacking = _lacking(sql, limit, wanted)
        if not gone and lacking >= before:
            break
    ((pages,),) = sql("PRAGMA page_count")
    if pages > limit:
        # As after the limit was lowered.
        give_back(sql, min(pages - limit, MOST_PAGES))
    return Room(lacking, deleted)


def _lacking(sql: Sql, limit: int, wanted: int) -> int:
    ((pages,),) = sql("PRAGMA page_count")
    ((free,),) = sql("PRAGMA freelist_count")
    return int(pages - free + wanted - limit)


def _rows_of(sql: Sql, pages: int) -> int:
    """Return how many rows fill so many pages, going by the average."""
    ((total,),) = sql("PRAGMA page_count")
    ((free,),) = sql("PRAGMA freelist_count")
    ((entries,),) = sql("SELECT value FROM Settings WHERE key = 'count'")
    share: float = pages / max(1, total - free)
    return math.ceil(share * int(entries))


def _delete_coldest(
    sql: Sql, pages: int, used_at: Callable[[bytes], int], pinned: Collection[int]
) -> int:
    """Delete as many of the entries used longest ago as fill so many pages; return how many."""
    wanted = _rows_of(sql, pages)
    ((newest,),) = sql("SELECT max(used) FROM Entries")
    deleted = 0
    for _ in range(PASSES):
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
                deleted += 1
        if not kept or len(rows) < wanted:
            break
        wanted = kept
    return deleted


def _move_first(sql: Sql, pages: int) -> None:
    """Move the rows that lie first in the file to its end; what was half empty is then free."""
    rows = sql("SELECT rowid FROM Cache ORDER BY rowid LIMIT ?", (_rows_of(sql, pages),)).fetchall()
    ((last,),) = sql("SELECT max(rowid) FROM Cache")
    for row, (old,) in enumerate(rows, start=(last or 0) + 1):
        sql("UPDATE Cache SET rowid = ? WHERE rowid = ?", (row, old))
        sql("UPDATE Entries SET id = ? WHERE id = ?", (row, old))
