"""The outbox: points that Qdrant has not confirmed yet, in an SQLite file beside the store.

When `add` returns, the points are on disk, also after a kill -9. Several processes add; one of them
sends (see `sender`). A point leaves the file when Qdrant has confirmed it, or moves to the dead
letters with the reason. A point that is added under the id of a pending one replaces it: the newest
counts, and each id is in the queue once.

The file is also a journal of the points that were ever added. An answer from the cache whose point
is known to be in Qdrant is not sent again, unless that is long ago, or Qdrant was seen to have lost
points. With the vectors of the cache the journal makes lost points anew (see `resync`).

`select_entries` and `remove_entries` delete points whose texts are purged; the points that Qdrant
has already stay there, and a batch that is being sent arrives.

Calls block; use an Outbox from one thread. Everything raises FAILURES.
"""

import logging
import math
import sqlite3
import time
import zlib
from collections.abc import Callable, Iterable, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Protocol, TypeVar

from embedding_proxy.cache.key import checksum
from embedding_proxy.providers.base import current_label

from .outbox_db import FILE_NAME, OutboxFile, ReadOnlyOutbox
from .point import Backlog, CollectionState, JournalEntry, Point, QueuedPoint, Target

__all__ = [
    "FAILURES",
    "FILE_NAME",
    "JOURNAL",
    "PENDING",
    "CollectionBacklog",
    "OnDisk",
    "Outbox",
    "OutboxEntry",
    "OutboxFull",
    "read_backlog",
    "read_collections",
    "remove_entries",
    "select_entries",
]

log = logging.getLogger("embedding_proxy.index")

T = TypeVar("T")

FAILURES = (sqlite3.Error, OSError, TimeoutError)
JSON_A_BYTE = 5.5
"""Bytes of JSON that a byte of a vector becomes: a float32 is 4 bytes, and up to 22 characters."""

MAX_KNOWN_AGE_S = 7 * 86_400.0
"""Seconds after which the next answer with a known point writes it again."""
MIN_PAUSE_S, MAX_PAUSE_S = 60.0, 6 * 3600.0
"""The wait between two attempts to send a dead letter; it doubles each time."""
_PRUNED = 500
"""Entries of the journal that are dropped at a time, where there is no room for it."""

_WHOLE = (
    "target, point, bytes, at, payload, vector, sum, address, digest, namespace, vectors,"
    " is_update, tries"
)
_FORGOTTEN = "UPDATE state SET forgotten = forgotten + 1"
PENDING, JOURNAL = ("waiting", "dead"), ("known",)
"""The tables of points that have not arrived, and of all that were ever added."""
_TERMS = {
    "namespace": "namespace = :namespace",
    "space": (
        "(current_label(space) = :space"
        " OR substr(current_label(space), 1, length(:space) + 1) = :space || '?')"
    ),
    "address": "coalesce(address, point) = :address",
    "before": "coalesce(at, 0) < :before",
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
        """How often this process opened a new file, which lacks the ids of the former one."""
        return self._file.renewed

    def guarded(self, work: "Callable[[Outbox], T]") -> T:
        """Return the result of `work`. A damaged file is replaced, and the work is repeated."""
        return self._file.guarded(lambda: work(self))

    def add(self, target: Target, points: Sequence[Point]) -> int:
        """Add the points that are new or not known, all or none. Raises OutboxFull.

        Returns their number.
        """
        number, now = self._number(target), time.time()
        if number is not None:
            points = [p for p in points if p.new or not self._is_known(number, p.id, now)]
        if not points:
            return 0
        if self.size >= self._size_limit:
            self._prune(4)
        if self.size >= self._size_limit:
            raise OutboxFull(f"{self.size / 1e6:.0f} MB wait for Qdrant")
        with self._file.change() as sql:
            if number is None:
                sql.execute(
                    "INSERT OR IGNORE INTO target (collection, space, dimensions) VALUES (?, ?, ?)",
                    target,
                )
                number = self._number(target)
            here = [(number, p.id) for p in points]
            sql.executemany(
                f"INSERT OR REPLACE INTO waiting ({_WHOLE})"
                " VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, 0)",
                (
                    (
                        *(number, p.id, len(p.vector) + len(p.payload) + len(p.vectors), now),
                        *(p.payload, p.vector, _sum(p.id, p.vector, p.payload, p.vectors)),
                        *(p.address or p.id, p.digest or None, p.namespace, p.vectors, p.is_update),
                    )
                    for p in points
                ),
            )
            # A reply waits for this: the rest of the journal is written when the point has arrived.
            sql.executemany(
                "INSERT OR REPLACE INTO known (target, point, mark, at) VALUES (?, ?, ?, ?)",
                ((number, p.id, not p.plain, now) for p in points),
            )
            sql.executemany("DELETE FROM dead WHERE target = ? AND point = ?", here)
        return len(points)

    def _number(self, target: Target) -> int | None:
        row = self._file.sql.execute(
            "SELECT id FROM target WHERE collection = ? AND space = ? AND dimensions = ?", target
        ).fetchone()
        return None if row is None else int(row[0])

    def _is_known(self, number: int, point: bytes, now: float) -> bool:
        """Tell whether a plain point need not be written again."""
        row = self._file.sql.execute(
            "SELECT 1 FROM known WHERE target = ? AND point = ? AND mark = 0 AND at > ?",
            (number, point, now - MAX_KNOWN_AGE_S),
        ).fetchone()
        return row is not None

    def _prune(self, times: int) -> None:
        """Drop the oldest entries of the journal, so that half of the file is for what waits."""
        for _ in range(times):
            if self.size <= self._size_limit // 2:
                return
            with self._file.change() as sql:
                dropped = sql.execute(
                    "DELETE FROM known WHERE (target, point) IN"
                    " (SELECT target, point FROM known ORDER BY at LIMIT ?)",
                    (_PRUNED,),
                ).rowcount
                sql.execute(_FORGOTTEN)
            if not dropped:
                return

    @property
    def size(self) -> int:
        """Bytes of the file that are in use."""
        return self._file.size

    @property
    def forgotten(self) -> int:
        """How often ids were forgotten. Processes compare it to drop their copies of the ids."""
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
        """Return a target's first points: at least one, and at most `max_bytes` of JSON."""
        points: list[QueuedPoint] = []
        corrupt: list[QueuedPoint] = []
        size = 0.0
        rows = self._file.sql.execute(
            "SELECT seq, point, vector, payload, bytes, coalesce(vectors, x''), is_update, sum"
            " FROM waiting WHERE target = ? ORDER BY seq",
            (self._number(target),),
        )
        try:
            for *row, checksum_ in rows:
                point = QueuedPoint(*row)
                sum_ = _sum(point.id, point.vector, point.payload, point.vectors)
                if checksum_ is not None and checksum_ != sum_:
                    corrupt.append(point)
                    continue
                size += (
                    JSON_A_BYTE * len(point.vector) + len(point.payload) + len(point.vectors) + 100
                )
                if points and (size > max_bytes or len(points) >= max_points):
                    break
                points.append(point)
        finally:
            rows.close()
        if corrupt:
            self._drop_corrupt(target, corrupt)
        return points

    def _drop_corrupt(self, target: Target, points: Sequence[QueuedPoint]) -> None:
        """Drop damaged points; the next answers with them add them again."""
        log.error("%d points that wait for Qdrant are damaged: not indexed", len(points))
        with self._file.change() as sql:
            sql.executemany("DELETE FROM waiting WHERE seq = ?", ((point.seq,) for point in points))
            sql.executemany(
                "UPDATE known SET mark = 1 WHERE target = ? AND point = ?",
                ((self._number(target), point.id) for point in points),
            )
            sql.execute(_FORGOTTEN)
        self.corrupt_points += len(points)

    def ack(self, points: Iterable[QueuedPoint]) -> None:
        """Move points that Qdrant confirmed to the journal; later ones of the same ids stay."""
        with self._file.change() as sql:
            for point in points:
                row = sql.execute(
                    "DELETE FROM waiting WHERE seq = ? RETURNING target, point, payload,"
                    " coalesce(address, point), digest, coalesce(namespace, ''), vectors,"
                    " is_update",
                    (point.seq,),
                ).fetchone()
                if row is not None:
                    target, id_, payload, *rest = row
                    sql.execute(
                        "UPDATE known SET payload = ?, address = ?, digest = ?, namespace = ?,"
                        " vectors = ?, is_update = ? WHERE target = ? AND point = ?",
                        (zlib.compress(payload, 1), *rest, target, id_),
                    )

    def tidy(self) -> None:
        """Shrink the file after an outage. Call it when no point is pending."""
        self._prune(20)
        self._file.incremental_vacuum()

    def move_to_dead_letters(self, points: Iterable[QueuedPoint], reason: str, now: float) -> None:
        """Move points that Qdrant rejects to the dead letters, until they are due again."""
        with self._file.change() as sql:
            for point in points:
                sql.execute(
                    f"INSERT OR REPLACE INTO dead (died, reason, due, {_WHOLE})"
                    " SELECT ?, ?, ? + min(?, ? * (1 << min(tries, 20))),"
                    f" {_WHOLE.removesuffix('tries')} tries + 1 FROM waiting WHERE seq = ?",
                    (now, reason, now, MAX_PAUSE_S, MIN_PAUSE_S, point.seq),
                )
                sql.execute("DELETE FROM waiting WHERE seq = ?", (point.seq,))

    def defer(self, points: Iterable[QueuedPoint]) -> None:
        """Move points to the end of the queue."""
        with self._file.change() as sql:
            for point in points:
                sql.execute(
                    f"INSERT OR REPLACE INTO waiting ({_WHOLE})"
                    f" SELECT {_WHOLE} FROM waiting WHERE seq = ?",
                    (point.seq,),
                )

    def requeue_dead_letters(self, now: float = math.inf) -> int:
        """Queue the dead letters again that are due at this time; return how many."""
        if not self._file.sql.execute("SELECT 1 FROM dead WHERE due <= ?", (now,)).fetchone():
            return 0
        with self._file.change() as sql:
            sql.execute(
                f"INSERT OR IGNORE INTO waiting ({_WHOLE}) SELECT {_WHOLE} FROM dead"
                " WHERE due <= ?",
                (now,),
            )
            return sql.execute("DELETE FROM dead WHERE due <= ?", (now,)).rowcount

    def journal_targets(self) -> list[Target]:
        """Return the targets with points in the journal."""
        rows = self._file.sql.execute(
            "SELECT collection, space, dimensions FROM target"
            " WHERE EXISTS (SELECT 1 FROM known WHERE known.target = target.id) ORDER BY id"
        )
        return [Target(*row) for row in rows]

    def journal(self, target: Target, after: bytes, limit: int) -> list[JournalEntry]:
        """Return a target's first journal entries after an id, without pending ones."""
        rows = self._file.sql.execute(
            "SELECT point, coalesce(address, point), digest, coalesce(namespace, ''), payload,"
            " coalesce(vectors, x''), is_update FROM known"
            " WHERE target = :target AND point > :after AND NOT EXISTS"
            " (SELECT 1 FROM waiting WHERE target = known.target AND point = known.point)"
            " AND NOT EXISTS"
            " (SELECT 1 FROM dead WHERE target = known.target AND point = known.point)"
            " ORDER BY point LIMIT :most",
            {"target": self._number(target), "after": after, "most": limit},
        )
        return [JournalEntry(*row) for row in rows]

    def state(self, target: Target) -> CollectionState | None:
        """Return the state of a target's collection at the last check, if there was one."""
        row = self._file.sql.execute(
            "SELECT identity, points FROM target WHERE id = ?", (self._number(target),)
        ).fetchone()
        return None if row is None or row[0] is None else CollectionState(*row)

    def note_state(self, target: Target, state: CollectionState) -> None:
        """Store the state of a target's collection."""
        with self._file.change() as sql:
            sql.execute(
                "UPDATE target SET identity = ?, points = ? WHERE id = ?",
                (state.identity, state.points, self._number(target)),
            )

    def forget(self, target: Target, points: Iterable[bytes] | None = None) -> int:
        """Let the next answers write points again: those named, or all of a target.

        Pending points are written anyway, and not counted. Returns the number of points.
        """
        number = self._number(target)
        with self._file.change() as sql:
            statement = (
                "UPDATE known SET mark = 1 WHERE target = ? AND mark = 0 AND NOT EXISTS"
                " (SELECT 1 FROM waiting WHERE waiting.target = known.target"
                "  AND waiting.point = known.point)"
            )
            if points is None:
                count = sql.execute(statement, (number,)).rowcount
            else:
                rows = ((number, point) for point in points)
                count = sql.executemany(f"{statement} AND point = ?", rows).rowcount
            if count > 0:
                sql.execute(_FORGOTTEN)
            return max(count, 0)

    def backlog(self) -> Backlog:
        """Count the points that have not arrived."""
        return read_backlog(self._file.sql)


class CollectionBacklog(NamedTuple):
    """The points of one target, counted."""

    collection: str
    space: str
    dimensions: int
    waiting: int
    refused: int
    journaled: int


def read_collections(sql: sqlite3.Connection) -> list[CollectionBacklog]:
    """Count the points of each target. Raises sqlite3.Error."""
    rows = sql.execute(
        "SELECT collection, space, dimensions,"
        " (SELECT count(*) FROM waiting WHERE waiting.target = target.id),"
        " (SELECT count(*) FROM dead WHERE dead.target = target.id),"
        " (SELECT count(*) FROM known WHERE known.target = target.id)"
        " FROM target ORDER BY id"
    )
    return [CollectionBacklog(*row) for row in rows]


def read_backlog(sql: sqlite3.Connection) -> Backlog:
    """Count the points that have not arrived. Raises sqlite3.Error."""
    points, size, oldest = sql.execute(
        "SELECT count(*), coalesce(sum(bytes), 0), min(at) FROM waiting INDEXED BY line"
    ).fetchone()
    reasons = sql.execute(
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


def select_entries(  # noqa: PLR0913 - by name
    file: OutboxFile | ReadOnlyOutbox,
    *,
    namespace: str | None = None,
    space: str | None = None,
    address: bytes | None = None,
    before: float | None = None,
    tables: Sequence[str] = PENDING,
) -> list[OutboxEntry]:
    """Return the points that match all given values; all points if none is given.

    `before` is a time, in seconds since 1970; only points that were added earlier match. `tables`
    are PENDING or JOURNAL. A space without parameters matches those with parameters, too.
    Raises sqlite3.Error.
    """
    criteria = {
        "namespace": namespace,
        "space": None if space is None else current_label(space),
        "address": address,
        "before": before,
    }
    values = {name: value for name, value in criteria.items() if value is not None}
    # Points of an earlier version name their space with the values of its parameters.
    file.sql.create_function("current_label", 1, current_label, deterministic=True)
    condition = " AND ".join(_TERMS[name] for name in values) or "1"
    entries: list[OutboxEntry] = []
    for table in tables:
        rows = file.sql.execute(
            f"SELECT target, point, coalesce(address, point) FROM {table}"
            f" JOIN target ON target.id = target WHERE {condition}",
            values,
        )
        entries += [OutboxEntry(*row) for row in rows]
    return entries


def purge_points(
    folder: Path,
    *,
    namespace: str | None,
    space: str | None,
    address: bytes | None,
    before: float,
) -> int:
    """Delete what waits in `folder`, and was added before a time; return how much. See above.

    Raises FAILURES.
    """
    if not (folder / FILE_NAME).exists():
        return 0
    with closing(OutboxFile(folder)) as file:
        entries = select_entries(
            file,
            namespace=namespace,
            space=space,
            address=address,
            before=before,
            tables=(*PENDING, *JOURNAL),
        )
        remove_entries(file, entries)
    return len(entries)


def remove_entries(file: OutboxFile, entries: Sequence[OutboxEntry]) -> None:
    """Delete points and their journal entries. Raises sqlite3.Error, OSError."""
    if not entries:
        return
    keys = [(entry.target, entry.point) for entry in entries]
    with file.change() as sql:
        # SQLite overwrites what it deletes.
        sql.execute("PRAGMA secure_delete = 1")
        for table in (*PENDING, *JOURNAL):
            sql.executemany(f"DELETE FROM {table} WHERE target = ? AND point = ?", keys)
        sql.execute(_FORGOTTEN)


def _sum(point: bytes, vector: bytes, payload: bytes, vectors: bytes) -> bytes:
    return checksum(point + vector + payload + vectors)
