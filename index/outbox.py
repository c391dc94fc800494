"""The outbox: points that Qdrant has not confirmed yet, in an SQLite file beside the store.

What `add` has returned from is on disk: after a kill −9 it is there. Several processes add; one of
them sends (see `sender`). A point leaves the file when Qdrant has confirmed it, or goes to the
table of the dead with the reason. What is added under an id that is waiting replaces what waits:
the newest wins, and each id has one place in the line.

The file also knows which ids were ever added, so that an answer from the cache is not sent again
and again. Its calls block; use an Outbox from one thread. Everything raises FAILURES.
"""

import sqlite3
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol, TypeVar

from cache.file.lock import WriterLock

from . import outbox_file
from .point import Backlog, Point, Target, Waiting

T = TypeVar("T")

FILE_NAME = "index-outbox.db"
FAILURES = (sqlite3.Error, OSError, TimeoutError)
PATIENCE_SECONDS = 2.0
"""The longest wait for another process that writes; a request may be waiting meanwhile."""
JSON_A_BYTE = 5.5
"""Bytes of JSON that a byte of a vector becomes: a float32 is 4 bytes, and up to 22 characters."""

_FREE_PAGES = 2048
"""Of 4 KiB: room that is kept for what comes, and given back at a time."""


class Full(Exception):
    """The file is as large as it may be: nothing is added until Qdrant takes some of it."""


class Outbox:
    """The file in `folder`, of at most about `size_limit` bytes."""

    def __init__(self, folder: Path, size_limit: int) -> None:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._lock = WriterLock(folder / "index-outbox.lock", PATIENCE_SECONDS)
        self._size_limit = size_limit
        self._targets: dict[Target, int] = {}
        try:
            with self._lock:
                self._sql = outbox_file.opened(folder / FILE_NAME, PATIENCE_SECONDS)
        except BaseException:
            self._lock.close()
            raise

    def close(self) -> None:
        """Close the file."""
        try:
            with self._lock:  # the last connection writes the log into the file
                self._sql.close()
        finally:
            self._sql.close()
            self._lock.close()

    @contextmanager
    def _change(self) -> Iterator[sqlite3.Connection]:
        """Give a transaction; whoever else changes something waits."""
        with self._lock:
            self._sql.execute("BEGIN IMMEDIATE")
            try:
                yield self._sql
                self._sql.execute("COMMIT")
            except BaseException:
                if self._sql.in_transaction:
                    self._sql.execute("ROLLBACK")
                raise

    def add(self, target: Target, points: Sequence[Point]) -> int:
        """Add those that are new or not known, all or none; return how many. Raises Full."""
        number = self._number(target)
        if number is not None:
            points = [p for p in points if p.new or self._mark(number, p.id) != p.mark]
        if not points:
            return 0
        if self.bytes >= self._size_limit:
            raise Full(f"{self.bytes / 1e6:.0f} MB wait for Qdrant")
        now = time.time()
        with self._change() as sql:
            if number is None:
                sql.execute("INSERT OR IGNORE INTO target VALUES (NULL, ?, ?, ?)", target)
                number = self._number(target)
            here = [(number, p.id) for p in points]
            sql.executemany(
                "INSERT OR REPLACE INTO waiting VALUES (NULL, ?, ?, ?, ?, ?, ?)",
                (
                    (number, p.id, len(p.vector) + len(p.payload), now, p.payload, p.vector)
                    for p in points
                ),
            )
            sql.executemany(
                "INSERT OR REPLACE INTO known VALUES (?, ?, ?)",
                ((number, p.id, p.mark) for p in points),
            )
            sql.executemany("DELETE FROM dead WHERE target = ? AND point = ?", here)
        return len(points)

    def _number(self, target: Target) -> int | None:
        if target not in self._targets:
            row = self._sql.execute(
                "SELECT id FROM target WHERE collection = ? AND space = ? AND dimensions = ?",
                target,
            ).fetchone()
            if row is None:
                return None
            if self._sql.in_transaction:
                # It may be rolled back yet.
                return int(row[0])
            self._targets[target] = row[0]
        return self._targets[target]

    def _mark(self, number: int, point: bytes) -> int | None:
        row = self._sql.execute(
            "SELECT mark FROM known WHERE target = ? AND point = ?", (number, point)
        ).fetchone()
        return None if row is None else int(row[0])

    @property
    def bytes(self) -> int:
        """How much of the file is in use."""
        pages, free, size = (
            self._sql.execute(f"PRAGMA {name}").fetchone()[0]
            for name in ("page_count", "freelist_count", "page_size")
        )
        return int((pages - free) * size)

    @property
    def forgotten(self) -> int:
        """How often ids were forgotten so far; who keeps a copy of them compares."""
        row = self._sql.execute("SELECT forgotten FROM state").fetchone()
        return int(row[0])

    def targets(self) -> list[Target]:
        """Return the targets for which something waits, the one that waits longest first."""
        rows = self._sql.execute(
            "SELECT collection, space, dimensions,"
            " (SELECT min(seq) FROM waiting WHERE target = target.id) AS first"
            " FROM target WHERE first IS NOT NULL ORDER BY first"
        )
        return [Target(*row[:3]) for row in rows]

    def batch(self, target: Target, most_bytes: float, most_points: int) -> list[Waiting]:
        """Return the first of a target's line: one, and more while its JSON has most_bytes."""
        found: list[Waiting] = []
        size = 0.0
        rows = self._sql.execute(
            "SELECT seq, point, vector, payload, bytes FROM waiting WHERE target = ? ORDER BY seq",
            (self._number(target),),
        )
        try:
            for row in rows:
                one = Waiting(*row)
                size += JSON_A_BYTE * len(one.vector) + len(one.payload) + 100
                if found and (size > most_bytes or len(found) >= most_points):
                    break
                found.append(one)
        finally:
            rows.close()
        return found

    def sent(self, points: Iterable[Waiting]) -> None:
        """Let go of points; what has been added under their ids meanwhile stays."""
        with self._change() as sql:
            sql.executemany("DELETE FROM waiting WHERE seq = ?", ((one.seq,) for one in points))

    def tidy(self) -> None:
        """Give some of the room back that an outage has taken; for when nothing waits."""
        (free,) = self._sql.execute("PRAGMA freelist_count").fetchone()
        if free > _FREE_PAGES:
            with self._lock:
                # `execute` would step it once, which frees one page.
                self._sql.executescript(f"PRAGMA incremental_vacuum({_FREE_PAGES})")

    def died(self, points: Iterable[Waiting], reason: str) -> None:
        """Put points that Qdrant refuses out of the way of others."""
        now = time.time()
        with self._change() as sql:
            for one in points:
                sql.execute(
                    "INSERT OR REPLACE INTO dead"
                    " SELECT target, point, bytes, at, ?, ?, payload, vector"
                    " FROM waiting WHERE seq = ?",
                    (now, reason, one.seq),
                )
                sql.execute("DELETE FROM waiting WHERE seq = ?", (one.seq,))

    def later(self, points: Iterable[Waiting]) -> None:
        """Put points at the end of the line."""
        with self._change() as sql:
            for one in points:
                sql.execute(
                    "INSERT OR REPLACE INTO waiting"
                    " SELECT NULL, target, point, bytes, at, payload, vector"
                    " FROM waiting WHERE seq = ?",
                    (one.seq,),
                )

    def revive(self) -> int:
        """Let the dead wait again: whoever starts may have removed the reason."""
        with self._change() as sql:
            sql.execute(
                "INSERT OR IGNORE INTO waiting"
                " SELECT NULL, target, point, bytes, at, payload, vector FROM dead"
            )
            return sql.execute("DELETE FROM dead").rowcount

    def forget(self, collection: str) -> None:
        """Forget which points a collection has, but for those in the line: it is a new one."""
        with self._change() as sql:
            gone = sql.execute(
                "DELETE FROM known WHERE target IN (SELECT id FROM target WHERE collection = ?)"
                " AND NOT EXISTS (SELECT 1 FROM waiting"
                "  WHERE waiting.target = known.target AND waiting.point = known.point)",
                (collection,),
            ).rowcount
            if gone:
                sql.execute("UPDATE state SET forgotten = forgotten + 1")

    def backlog(self) -> Backlog:
        """Count what has not arrived."""
        points, size, oldest = self._sql.execute(
            "SELECT count(*), coalesce(sum(bytes), 0), min(at) FROM waiting INDEXED BY line"
        ).fetchone()
        reasons = self._sql.execute(
            "SELECT collection, reason, count(*) FROM dead JOIN target ON target.id = dead.target"
            " GROUP BY collection, reason ORDER BY count(*) DESC"
        ).fetchall()
        dead = sum(count for *_, count in reasons)
        return Backlog(points, size, oldest, dead, tuple(map(tuple, reasons[:20])))


class OnDisk(Protocol):
    """Runs work on the outbox in its thread."""

    async def __call__(self, work: Callable[[Outbox], T]) -> T:
        """Return what it returns. Raises FAILURES."""
        ...
