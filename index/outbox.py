"""Points that wait for Qdrant, deleted on purpose: their texts are nobody's any more.

What Qdrant has already stays there; a batch that is being sent at this moment arrives.

The outbox: points that Qdrant has not confirmed yet, in an SQLite file beside the store.

What `add` has returned from is on disk: after a kill −9 it is there. Several processes add; one of
them sends (see `sender`). A point leaves the file when Qdrant has confirmed it, or goes to the
table of the dead with the reason. What is added under an id that is waiting replaces what waits:
the newest wins, and each id has one place in the line.

The file also knows which ids were ever added, so that an answer from the cache is not sent again
and again. Its calls block; use an Outbox from one thread. Everything raises FAILURES.
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
from .point import Backlog, Point, Target, Waiting

_TABLES = ("waiting", "dead")
_TERMS = {
    "namespace": "namespace = :namespace",
    "space": (
        "(current_label(space) = :space"
        " OR substr(current_label(space), 1, length(:space) + 1) = :space || '?')"
    ),
    "address": "address = :address",
}


@dataclass(frozen=True, slots=True)
class Picked:
    """A point that waits, or was put aside."""

    target: int
    point: bytes
    address: bytes
    """Of what it was made from, in the cache."""


def pick(
    file: OutboxFile | ReadOnlyOutbox,
    *,
    namespace: str | None = None,
    space: str | None = None,
    address: bytes | None = None,
) -> list[Picked]:
    """Return the points for which all that is given holds; all points if nothing is.

    A space without parameters stands for those with parameters, too. Raises sqlite3.Error.
    """
    given = {
        "namespace": namespace,
        "space": None if space is None else current_label(space),
        "address": address,
    }
    values = {name: value for name, value in given.items() if value is not None}
    # What waits since before an update names its space with the values of its parameters.
    file.sql.create_function("current_label", 1, current_label, deterministic=True)
    condition = " AND ".join(_TERMS[name] for name in values) or "1"
    found: list[Picked] = []
    for table in _TABLES:
        rows = file.sql.execute(
            f"SELECT target, point, address FROM {table} JOIN target ON target.id = target"
            f" WHERE {condition}",
            values,
        )
        found += [Picked(*row) for row in rows]
    return found


def remove(file: OutboxFile, picked: Sequence[Picked]) -> None:
    """Delete points, and forget that they were ever there. Raises sqlite3.Error, OSError."""
    if not picked:
        return
    keys = [(one.target, one.point) for one in picked]
    with file.change() as sql:
        # What is deleted is overwritten.
        sql.execute("PRAGMA secure_delete = 1")
        for table in (*_TABLES, "known"):
            sql.executemany(f"DELETE FROM {table} WHERE target = ? AND point = ?", keys)
        sql.execute("UPDATE state SET forgotten = forgotten + 1")


__all__ = ["FAILURES", "FILE_NAME", "Full", "OnDisk", "Outbox"]

log = logging.getLogger("embedding_proxy.index")

T = TypeVar("T")

FAILURES = (sqlite3.Error, OSError, TimeoutError)
JSON_A_BYTE = 5.5
"""Bytes of JSON that a byte of a vector becomes: a float32 is 4 bytes, and up to 22 characters."""

_WHOLE = "target, point, bytes, at, payload, vector, sum, address, namespace"
_FORGOTTEN = "UPDATE state SET forgotten = forgotten + 1"


class Full(Exception):
    """The file is as large as it may be: nothing is added until Qdrant takes some of it."""


class Outbox:
    """The file in `folder`, of at most about `size_limit` bytes."""

    def __init__(self, folder: Path, size_limit: int) -> None:
        self._size_limit = size_limit
        self._file = OutboxFile(folder)
        self.spoilt = 0
        """Points that were not as they had been written, and were let go of."""

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    @property
    def damaged(self) -> int:
        """How often this process has found damage, of the file or of a point."""
        return self._file.damaged + self.spoilt

    @property
    def renewed(self) -> int:
        """How often another file was begun, or found: what it knew before is known no more."""
        return self._file.renewed

    def guarded(self, work: "Callable[[Outbox], T]") -> T:
        """Return what work with this outbox gives; where the file is damaged, with a new one."""
        return self._file.guarded(lambda: work(self))

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
        """How much of the file is in use."""
        return self._file.bytes

    @property
    def forgotten(self) -> int:
        """How often ids were forgotten so far; who keeps a copy of them compares."""
        row = self._file.sql.execute("SELECT forgotten FROM state").fetchone()
        return int(row[0])

    def targets(self) -> list[Target]:
        """Return the targets for which something waits, the one that waits longest first."""
        rows = self._file.sql.execute(
            "SELECT collection, space, dimensions,"
            " (SELECT min(seq) FROM waiting WHERE target = target.id) AS first"
            " FROM target WHERE first IS NOT NULL ORDER BY first"
        )
        return [Target(*row[:3]) for row in rows]

    def batch(self, target: Target, most_bytes: float, most_points: int) -> list[Waiting]:
        """Return the first of a target's line: one, and more while its JSON has most_bytes."""
        found: list[Waiting] = []
        spoilt: list[Waiting] = []
        size = 0.0
        rows = self._file.sql.execute(
            "SELECT seq, point, vector, payload, bytes, sum FROM waiting WHERE target = ?"
            " ORDER BY seq",
            (self._number(target),),
        )
        try:
            for *row, known in rows:
                one = Waiting(*row)
                if known is not None and known != _sum(one.id, one.vector, one.payload):
                    spoilt.append(one)
                    continue
                size += JSON_A_BYTE * len(one.vector) + len(one.payload) + 100
                if found and (size > most_bytes or len(found) >= most_points):
                    break
                found.append(one)
        finally:
            rows.close()
        if spoilt:
            self._let_go(target, spoilt)
        return found

    def _let_go(self, target: Target, points: Sequence[Waiting]) -> None:
        """Drop points that are damaged; the next answers with them add them again."""
        log.error("%d points that wait for Qdrant are damaged: not indexed", len(points))
        self.sent(points)
        with self._file.change() as sql:
            sql.executemany(
                "DELETE FROM known WHERE target = ? AND point = ?",
                ((self._number(target), one.id) for one in points),
            )
            sql.execute(_FORGOTTEN)
        self.spoilt += len(points)

    def sent(self, points: Iterable[Waiting]) -> None:
        """Let go of points; what has been added under their ids meanwhile stays."""
        with self._file.change() as sql:
            sql.executemany("DELETE FROM waiting WHERE seq = ?", ((one.seq,) for one in points))

    def tidy(self) -> None:
        """Give some of the room back that an outage has taken; for when nothing waits."""
        self._file.give_back()

    def died(self, points: Iterable[Waiting], reason: str) -> None:
        """Put points that Qdrant refuses out of the way of others."""
        now = time.time()
        with self._file.change() as sql:
            for one in points:
                sql.execute(
                    f"INSERT OR REPLACE INTO dead (died, reason, {_WHOLE})"
                    f" SELECT ?, ?, {_WHOLE} FROM waiting WHERE seq = ?",
                    (now, reason, one.seq),
                )
                sql.execute("DELETE FROM waiting WHERE seq = ?", (one.seq,))

    def later(self, points: Iterable[Waiting]) -> None:
        """Put points at the end of the line."""
        with self._file.change() as sql:
            for one in points:
                sql.execute(
                    f"INSERT OR REPLACE INTO waiting ({_WHOLE})"
                    f" SELECT {_WHOLE} FROM waiting WHERE seq = ?",
                    (one.seq,),
                )

    def revive(self) -> int:
        """Let the dead wait again: whoever starts may have removed the reason."""
        with self._file.change() as sql:
            sql.execute(f"INSERT OR IGNORE INTO waiting ({_WHOLE}) SELECT {_WHOLE} FROM dead")
            return sql.execute("DELETE FROM dead").rowcount

    def forget(self, collection: str) -> None:
        """Forget which points a collection has, but for those in the line: it is a new one."""
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
        """Count what has not arrived."""
        points, size, oldest = self._file.sql.execute(
            "SELECT count(*), coalesce(sum(bytes), 0), min(at) FROM waiting INDEXED BY line"
        ).fetchone()
        reasons = self._file.sql.execute(
            "SELECT collection, reason, count(*) FROM dead JOIN target ON target.id = dead.target"
            " GROUP BY collection, reason ORDER BY count(*) DESC"
        ).fetchall()
        dead = sum(count for *_, count in reasons)
        return Backlog(points, size, oldest, dead, tuple(map(tuple, reasons[:20])))


def _sum(point: bytes, vector: bytes, payload: bytes) -> bytes:
    return checksum(point + vector + payload)


class OnDisk(Protocol):
    """Runs work on the outbox in its thread."""

    async def __call__(self, work: Callable[[Outbox], T]) -> T:
        """Return what it returns. Raises FAILURES."""
        ...
