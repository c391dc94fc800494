"""Eviction: keeps a store's file under its limit by deleting the coldest entries.

The limit is on the real file. Room is made before a transaction writes, so the file does not grow
beyond the limit even for its length. Deleting by last use leaves pages half empty, and SQLite puts
new rows at the end; so when deleting alone frees too little, the rows that lie at the beginning are
moved to the end, and their pages become free as a whole.
"""

import math
from collections import Counter
from collections.abc import Callable, Collection

from .schema import PAGE_BYTES, Sql, release_pages

TOUCH_MS = 3_600_000
"""A use is written only if the last one written is older: 5,000 of them dirty 40 MB of pages."""
MIN_LOOK = 64
"""The fewest entries, used longest ago, that one look reads."""
MAX_DATED = 5_000
"""The most uses that one transaction writes while it looks for entries to evict."""
TRANSACTIONS_A_FULL_LOOK = 256
MOST_PAGES = 512
"""The most pages (16 MiB) that one transaction deletes or moves besides its own."""
_ROW_BYTES = 64
"""The bytes of a row on its page besides the record, generously."""
_SPARE_PAGES = 4
"""Pages made free beyond the need, because rows seldom fill the last page."""
_OTHER_PAGES = 4
"""Pages that a transaction may need for the narrow tables and the indexes."""


def pages_for(lengths: Collection[int]) -> int:
    """Return the number of pages that records of these lengths (bytes) take in a file."""
    if not lengths:
        return 0
    # By the number of records that share a page: salvaged and imported records have all lengths.
    sharing: Counter[int] = Counter()
    pages = _OTHER_PAGES
    for length in lengths:
        row = length + _ROW_BYTES
        if row > PAGE_BYTES:
            pages += math.ceil(row / PAGE_BYTES)
        else:
            sharing[PAGE_BYTES // row] += 1
    return pages + sum(math.ceil(rows / on_page) for on_page, rows in sharing.items())


FULL = "the store is full of what is pinned; nothing is written"


class StoreFull(OSError):
    """There is no room: all that is left is pinned, and is never evicted."""


class Eviction:
    """Makes room in a file of at most `limit` pages. For one thread.

    Entries of namespaces in `pinned` are never evicted.
    """

    def __init__(self, limit: int, pinned: Collection[str] = ()) -> None:
        self._limit = limit
        self._pinned = pinned
        self._coldest = 0
        """Nothing that may go was used before, in milliseconds since 1970: where much is pinned,
        each look for the coldest would pass over all of that."""
        self._transactions = 0
        self.deleted = 0
        """Entries that were evicted since this was made; what was rolled back counts too."""

    def make_room(
        self, sql: Sql, pages_needed: int, used_at: Callable[[bytes], int], effort: int = 0
    ) -> bool:
        """Make room for so many pages, as far as that is quick; return whether there is room.

        What is left to do the next transaction does. `used_at` tells, by address, of a use that is
        not in the file yet, in milliseconds, or 0: such an entry is as young as that use. `effort`
        is how many pages the transaction writes besides: a large one may as well delete and move
        more. Raises StoreFull where nothing is left that may go; what was moved counts all the
        same.
        """
        limit = self._limit
        budget = 2 * max(pages_needed, effort) + max(4 * _SPARE_PAGES, min(MOST_PAGES, limit // 32))
        lacking, is_empty = _lacking(sql, limit, pages_needed), False
        pinned = self._pinned_ids(sql) if lacking > 0 else ""
        self._transactions += lacking > 0
        if self._transactions % TRANSACTIONS_A_FULL_LOOK == 0:
            # What was entered with an old time since, as by a repair, is to be found in the end.
            self._coldest = 0
        coldest: int | None = None
        deleted = 0
        while lacking > 0 and budget > 0:
            goal = min(lacking + _SPARE_PAGES, budget)
            deletions, used, is_empty = self._delete_coldest(
                sql, _rows_of(sql, goal), used_at, pinned
            )
            coldest = used if coldest is None else coldest
            deleted += deletions
            self.deleted += deletions
            budget -= goal
            before, lacking = lacking, _lacking(sql, limit, pages_needed)
            if 2 * lacking > min(before, goal) and budget > 0:
                _move_first(sql, min(2 * lacking, budget))
                budget -= 2 * lacking
                lacking = _lacking(sql, limit, pages_needed)
            if not deletions and lacking >= before:
                break
        # Of the first look only: should the transaction fail, all is as it was then.
        self._coldest = coldest or self._coldest
        ((pages,),) = sql("PRAGMA page_count")
        if pages > limit:
            # As after the limit was lowered.
            release_pages(sql, min(pages - limit, MOST_PAGES))
        if lacking > 0 and is_empty and not deleted and self._pinned and pages_needed:
            raise StoreFull(FULL)
        return lacking <= 0

    def use_interval_ms(self, sql: Sql, now_ms: int) -> int:
        """Return how old the last use of an entry that was written must be for another to be.

        Other processes know of no use but those that are written. In a store that fills up
        an entry must not become the coldest between two of them.
        """
        if _lacking(sql, self._limit, self._limit // 2) <= 0:
            return TOUCH_MS
        coldest = self._coldest_rows(sql, 1, self._pinned_ids(sql))
        return max(0, min(TOUCH_MS, (now_ms - coldest[0][1]) // 4)) if coldest else TOUCH_MS

    def _pinned_ids(self, sql: Sql) -> str:
        """Return the numbers of the pinned partitions, as a list for SQL."""
        if not self._pinned:
            return ""
        rows = sql("SELECT id, namespace FROM Partitions")
        return ",".join(str(int(number)) for number, name in rows if name in self._pinned)

    def _delete_coldest(
        self, sql: Sql, pages_needed: int, used_at: Callable[[bytes], int], pinned: str
    ) -> tuple[int, int, bool]:
        """Delete so many of the entries used longest ago, but for pinned ones.

        Returns how many were deleted, when the coldest of all was used (0 if there is none), and
        whether that is all there is. A use that is only in memory is written for those that would
        go else; they are no longer the coldest then. Where all have one, the coldest of them go.
        """
        deleted = dated = coldest = 0
        while deleted < pages_needed and dated < MAX_DATED:
            rows = self._coldest_rows(sql, max(pages_needed - deleted, MIN_LOOK), pinned)
            if not rows:
                return deleted, coldest, True
            coldest = coldest or rows[0][1]
            for row, used, key in rows:
                at = used_at(key)
                if at > used:
                    sql("UPDATE Entries SET used = ? WHERE id = ?", (at, row))
                    dated += 1
                else:
                    sql("DELETE FROM Cache WHERE rowid = ?", (row,))
                    sql("DELETE FROM Entries WHERE id = ?", (row,))
                    deleted += 1
                if deleted >= pages_needed:
                    break
        return deleted, coldest, False

    def _coldest_rows(self, sql: Sql, count: int, pinned: str) -> list[tuple[int, int, bytes]]:
        for since in dict.fromkeys((self._coldest, 0)):
            rows: list[tuple[int, int, bytes]] = sql(
                "SELECT id, used, key FROM Entries LEFT JOIN Cache ON Cache.rowid = id"
                f" WHERE used >= ? AND (partition IS NULL OR partition NOT IN ({pinned}))"
                " ORDER BY used LIMIT ?",
                (since, count),
            ).fetchall()
            if rows:
                return rows
        return []


def _lacking(sql: Sql, limit: int, pages_needed: int) -> int:
    ((pages,),) = sql("PRAGMA page_count")
    ((free,),) = sql("PRAGMA freelist_count")
    return int(pages - free + pages_needed - limit)


def _rows_of(sql: Sql, pages: int) -> int:
    """Return the number of rows that fill so many pages, by the average."""
    ((total,),) = sql("PRAGMA page_count")
    ((free,),) = sql("PRAGMA freelist_count")
    ((entries,),) = sql("SELECT value FROM Settings WHERE key = 'count'")
    share: float = pages / max(1, total - free)
    return math.ceil(share * int(entries))


def _move_first(sql: Sql, pages: int) -> None:
    """Move the first rows of the file to its end, so that half-empty pages become free."""
    rows = sql("SELECT rowid FROM Cache ORDER BY rowid LIMIT ?", (_rows_of(sql, pages),)).fetchall()
    ((last,),) = sql("SELECT max(rowid) FROM Cache")
    for row, (old,) in enumerate(rows, start=(last or 0) + 1):
        sql("UPDATE Cache SET rowid = ? WHERE rowid = ?", (row, old))
        sql("UPDATE Entries SET id = ? WHERE id = ?", (row, old))
