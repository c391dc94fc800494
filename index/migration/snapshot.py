"""What the old collection held when the new one was found equal to it: one line a point, on disk.

Qdrant keeps no log of changes. So what was written to the old collection while the aliases were
being switched is found by comparing it with this, and what clients wrote to the new one since then
can be told from what is merely different. It is on disk so that a cutover that is killed can go on.
"""

import hashlib
import sqlite3
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import orjson
from embedding_proxy.cache import private_files
from embedding_proxy.index.collection_reader import Point, PointId

from .state import JournalError

_LAYOUT = """
DROP TABLE IF EXISTS seen;
CREATE TABLE seen (id BLOB PRIMARY KEY, payload BLOB, whole BLOB, carried INTEGER) WITHOUT ROWID;
"""


@dataclass(frozen=True, slots=True)
class Row:
    """A point as it was."""

    payload: bytes
    """The digest of its payload."""
    whole: bytes
    """The digest of its payload and its vector, as far as that was read."""
    carried: bool
    """Whether the new collection had it, too."""


class Snapshot:
    """Rows by the ids of points, in the file `path`. Everything raises JournalError."""

    def __init__(self, path: Path) -> None:
        self._path = path
        with self._failing():
            private_files.make_folder(path.parent)
            private_files.create(path)
            self._sql = sqlite3.connect(path, isolation_level=None)

    def anew(self) -> None:
        """Forget everything; what is added is on the medium after `keep`."""
        if self._sql.in_transaction:
            self._run("ROLLBACK")
        with self._failing():
            self._sql.executescript(_LAYOUT)
        self._run("BEGIN")

    def keep(self) -> None:
        """Put what was added and removed on the medium."""
        if self._sql.in_transaction:
            self._run("COMMIT")

    def add(self, points: Iterable[Point], left: Collection[PointId]) -> None:
        """Note points as they are; those in `left` are not in the new collection."""
        self._many(
            "INSERT OR REPLACE INTO seen VALUES (?, ?, ?, ?)",
            [(_key(one.id), one.digest(), whole(one), one.id not in left) for one in points],
        )

    def remove(self, ids: Sequence[PointId]) -> None:
        """Forget points."""
        self._many("DELETE FROM seen WHERE id = ?", [(_key(one),) for one in ids])

    def rows(self, ids: Sequence[PointId]) -> dict[PointId, Row]:
        """Return the rows of these ids that are there."""
        found = {}
        for one in ids:
            row = self._run(
                "SELECT payload, whole, carried FROM seen WHERE id = ?", (_key(one),)
            ).fetchone()
            if row is not None:
                found[one] = Row(row[0], row[1], bool(row[2]))
        return found

    def pages(self, size: int) -> Iterator[list[PointId]]:
        """Yield all ids, some at a time; those of a page may be removed before the next."""
        after = b""
        while True:
            found = self._run(
                "SELECT id FROM seen WHERE id > ? ORDER BY id LIMIT ?", (after, size)
            ).fetchall()
            if not found:
                return
            yield [orjson.loads(key) for (key,) in found]
            after = found[-1][0]

    def close(self) -> None:
        """Close the file, and drop what was not kept."""
        self._sql.close()

    def _run(self, statement: str, values: Sequence[object] = ()) -> sqlite3.Cursor:
        with self._failing():
            return self._sql.execute(statement, values)

    def _many(self, statement: str, rows: Sequence[Sequence[object]]) -> None:
        if not self._sql.in_transaction:
            self._run("BEGIN")
        with self._failing():
            self._sql.executemany(statement, rows)

    @contextmanager
    def _failing(self) -> Iterator[None]:
        try:
            yield
        except (sqlite3.Error, OSError) as error:
            raise JournalError(f"{self._path}: {error}") from error


def whole(point: Point) -> bytes:
    """Return a digest of all that is known of a point."""
    told = hashlib.blake2b(point.digest(), digest_size=16)
    told.update(point.vector or b"")
    return told.digest()


def _key(one: PointId) -> bytes:
    return orjson.dumps(one)
