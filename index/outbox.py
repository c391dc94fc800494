"""The outbox: points that Qdrant has not confirmed yet, in an SQLite file beside the store.

When `add` returns, the points are on disk, also after a kill -9. Several processes add; one of them
sends (see `sender`). A point leaves the file when Qdrant has confirmed it, or moves to the dead
letters with the reason. A point that is added under the id of a pending one replaces it: the newest
counts, and each id is in the queue once.

The file also knows which ids were ever added, so that answers from the cache are not sent again and
again. `select_entries` and `remove_entries` delete points whose texts are purged; the points that
Qdrant has already stay there, and a batch that is being sent arrives.

Calls block; use an Outbox from one thread. Everything raises FAILURES.
"""

import logging
import sqlite3
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeVar

from embedding_proxy.cache.key import checksum
from embedding_proxy.providers.base import current_label

from .outbox_db import FILE_NAME, OutboxFile, ReadOnlyOutbox
from .point import Backlog, Point, QueuedPoint, Target

__all__ = [
    "FAILURES",
    "FILE_NAME",
    "OnDisk",
    "Outbox",
    "OutboxEntry",
    "OutboxFull",
    "remove_entries",
    "select_entries",
]

log = logging.getLogger("embedding_proxy.index")

T = TypeVar("T")

FAILURES = (sqlite3.Error, OSError, TimeoutError)
JSON_A_BYTE = 5.5
"""Bytes of JSON that a byte of a vector becomes: a float32 is 4 bytes, and up to 22 characters."""

_WHOLE = "target, point, bytes, at, payload, vector, sum, address, namespace"
_FORGOTTEN = "UPDATE state SET forgotten = forgotten + 1"
_TABLES = ("waiting", "dead")
_TERMS = {
    "namespace": "namespace = :namespace",
    "space": (
        "(current_label(space) = :space"
        " OR substr(current_label(space), 1, length(:space) + 1) = :space || '?')"
    ),
    "address": "address = :address",
}


class OutboxFull(Exception):
    """The file has reached its size limit: nothing is added until Qdrant takes some points."""


class Outbox:
    """The file in `folder`, of at most about `size_limit` bytes."""

    def __init__(self, folder: Path, size_limit: int) -> None:
        self._size_limit = size_limit
        self._file = OutboxFile(folder)
        self.corrupt_points = 0
        """Points that failed their checksum and were dropped."""

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    @property
    def damaged(self) -> int:
        """How often this process has found damage, of the file or of a point."""
        return self._file.damaged + self.corrupt_points

    @property
    def renewed(self) -> int:
        """How often this process opened another file: it lacks the ids of the former one."""
        return self._file.renewed

    def guarded(self, work: "Callable[[Outbox], T]") -> T:
        """Return the result of `work`; a damaged file is replaced, and the work repeated."""
        return self._file.guarded(lambda: work(self))

    def add(self, target: Target, points: Sequence[Point]) -> int:
        """Add points that are new or not known, all or none; return how many. Raises OutboxFull."""
        number = self._number(target)
        if number is not None:
            points = [p for p in points if p.new or self._mark(number, p.id) != p.mark]
        if not points:
            return 0
        if self.bytes >= self._size_limit:
            raise OutboxFull(f"{self.bytes / 1e6:.0f} MB wait for Qdrant")
        now = time.time()
        with self._file.change() as sql:
            if number is None:
                sql.execute("INSERT OR IGNORE INTO target VALUES (NULL, ?, ?, ?)", target)
                number = self._number(target)
            here = [(number, p.id) for p in points]
            sql.executemany(
                f"INSERT OR REPLACE INTO waiting ({_WHOLE}) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
                (
                    (
                        *(number, p.id, len(p.vector) + len(p.payload), now, p.payload, p.vector),
                        *(_sum(p.id, p.vector, p.payload), p.address or p.id, p.namespace),
                    )
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
        row = self._file.sql.execute(
            "SELECT id FROM target WHERE collection = ? AND space = ? AND dimensions = ?", target
        ).fetchone()
        return None if row is None else int(row[0])

    def _mark(self, number: int, point: bytes) -> int | None:
        row = self._file.sql.execute(
            "SELECT mark FROM known WHERE target = ? AND point = ?", (number, point)
        ).fetchone()
        return None if row is None else int(row[0])

    @property
    def bytes(self) -> int:
        """Bytes of the file that are in use."""
        return self._file.bytes

    @property
    def forgotten(self) -> int:
        """How often ids were forgotten so far; holders of copies of the ids compare it."""
        row = self._file.sql.execute("SELECT forgotten FROM state").fetchone()
        return int(row[0])

    def targets(self) -> list[Target]:
        """Return the targets that have pending points, the longest waiting first."""
        rows = self._file.sql.execute(
            "SELECT collection, space, dimensions,"
            " (SELECT min(seq) FROM waiting WHERE target = target.id) AS first"
            " FROM target WHERE first IS NOT NULL ORDER BY first"
        )
        return [Target(*row[:3]) for row in rows]

    def batch(self, target: Target, max_bytes: float, max_points: int) -> list[QueuedPoint]:
        """Return a target's first points: one, and more up to `max_bytes` of JSON."""
        found: list[QueuedPoint] = []
        corrupt: list[QueuedPoint] = []
        size = 0.0
        rows = self._file.sql.execute(
            "SELECT seq, point, vector, payload, bytes, sum FROM waiting WHERE target = ?"
            " ORDER BY seq",
            (self._number(target),),
        )
        try:
            for *row, known in rows:
                one = QueuedPoint(*row)
                if known is not None and known != _sum(one.id, one.vector, one.payload):
                    corrupt.append(one)
                    continue
                size += JSON_A_BYTE * len(one.vector) + len(one.payload) + 100
                if found and (size > max_bytes or len(found) >= max_points):
                    break
                found.append(one)
        finally:
            rows.close()
        if corrupt:
            self._drop_corrupt(target, corrupt)
        return found

    def _drop_corrupt(self, target: Target, points: Sequence[QueuedPoint]) -> None:
        """Drop damaged points; the next answers with them add them again."""
        log.error("%d points that wait for Qdrant are damaged: not indexed", len(points))
        self.ack(points)
        with self._file.change() as sql:
            sql.executemany(
                "DELETE FROM known WHERE target = ? AND point = ?",
                ((self._number(target), one.id) for one in points),
            )
            sql.execute(_FORGOTTEN)
        self.corrupt_points += len(points)

    def ack(self, points: Iterable[QueuedPoint]) -> None:
        """Delete points that Qdrant confirmed; later ones of the same ids stay."""
        with self._file.change() as sql:
            sql.executemany("DELETE FROM waiting WHERE seq = ?", ((one.seq,) for one in points))

    def tidy(self) -> None:
        """Shrink the file after an outage; for when no point is pending."""
        self._file.incremental_vacuum()

    def move_to_dead_letters(self, points: Iterable[QueuedPoint], reason: str) -> None:
        """Move points that Qdrant rejects to the dead letters."""
        now = time.time()
        with self._file.change() as sql:
            for one in points:
                sql.execute(
                    f"INSERT OR REPLACE INTO dead (died, reason, {_WHOLE})"
                    f" SELECT ?, ?, {_WHOLE} FROM waiting WHERE seq = ?",
                    (now, reason, one.seq),
                )
                sql.execute("DELETE FROM waiting WHERE seq = ?", (one.seq,))

    def defer(self, points: Iterable[QueuedPoint]) -> None:
        """Move points to the end of the queue."""
        with self._file.change() as sql:
            for one in points:
                sql.execute(
                    f"INSERT OR REPLACE INTO waiting ({_WHOLE})"
                    f" SELECT {_WHOLE} FROM waiting WHERE seq = ?",
                    (one.seq,),
                )

    def requeue_dead_letters(self) -> int:
        """Queue the dead letters again, at a start: the reason may be gone. Return how many."""
        with self._file.change() as sql:
            sql.execute(f"INSERT OR IGNORE INTO waiting ({_WHOLE}) SELECT {_WHOLE} FROM dead")
            return sql.execute("DELETE FROM dead").rowcount

    def forget(self, collection: str) -> None:
        """Forget the ids of a collection that is new, except those of pending points."""
        with self._file.change() as sql:
            gone = sql.execute(
                "DELETE FROM known WHERE target IN (SELECT id FROM target WHERE collection = ?)"
                " AND NOT EXISTS (SELECT 1 FROM waiting"
                "  WHERE waiting.target = known.target AND waiting.point = known.point)",
                (collection,),
            ).rowcount
            if gone:
                sql.execute(_FORGOTTEN)

    def backlog(self) -> Backlog:
        """Count the points that have not arrived."""
        points, size, oldest = self._file.sql.execute(
            "SELECT count(*), coalesce(sum(bytes), 0), min(at) FROM waiting INDEXED BY line"
        ).fetchone()
        reasons = self._file.sql.execute(
            "SELECT collection, reason, count(*) FROM dead JOIN target ON target.id = dead.target"
            " GROUP BY collection, reason ORDER BY count(*) DESC"
        ).fetchall()
        dead = sum(count for *_, count in reasons)
        return Backlog(points, size, oldest, dead, tuple(map(tuple, reasons[:20])))


class OnDisk(Protocol):
    """Runs work on the outbox in the outbox's thread."""

    async def __call__(self, work: Callable[[Outbox], T]) -> T:
        """Return the result of `work`. Raises FAILURES."""
        ...


@dataclass(frozen=True, slots=True)
class OutboxEntry:
    """Identifies a pending point or a dead letter."""

    target: int
    point: bytes
    address: bytes
    """The cache address of the input that it was made from."""


def select_entries(
    file: OutboxFile | ReadOnlyOutbox,
    *,
    namespace: str | None = None,
    space: str | None = None,
    address: bytes | None = None,
) -> list[OutboxEntry]:
    """Return the points that match all given values; all points if none is given.

    A space without parameters matches those with parameters, too. Raises sqlite3.Error.
    """
    given = {
        "namespace": namespace,
        "space": None if space is None else current_label(space),
        "address": address,
    }
    values = {name: value for name, value in given.items() if value is not None}
    # Points of an earlier version name their space with the values of its parameters.
    file.sql.create_function("current_label", 1, current_label, deterministic=True)
    condition = " AND ".join(_TERMS[name] for name in values) or "1"
    found: list[OutboxEntry] = []
    for table in _TABLES:
        rows = file.sql.execute(
            f"SELECT target, point, address FROM {table} JOIN target ON target.id = target"
            f" WHERE {condition}",
            values,
        )
        found += [OutboxEntry(*row) for row in rows]
    return found


def remove_entries(file: OutboxFile, entries: Sequence[OutboxEntry]) -> None:
    """Delete points, and that their ids are known. Raises sqlite3.Error, OSError."""
    if not entries:
        return
    keys = [(one.target, one.point) for one in entries]
    with file.change() as sql:
        # SQLite overwrites what it deletes.
        sql.execute("PRAGMA secure_delete = 1")
        for table in (*_TABLES, "known"):
            sql.executemany(f"DELETE FROM {table} WHERE target = ? AND point = ?", keys)
        sql.execute(_FORGOTTEN)


def _sum(point: bytes, vector: bytes, payload: bytes) -> bytes:
    return checksum(point + vector + payload)
