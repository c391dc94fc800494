"""A snapshot of the old collection when the new one was equal to it: a row for each point, on disk.

Qdrant keeps no log of changes. Comparing the old collection with the snapshot finds what was
written to it while the aliases were switched, and tells changes that clients made in the new one
from other differences. It is on disk so that a killed cutover can continue.
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

from .state import MigrationStateError

_LAYOUT = """
DROP TABLE IF EXISTS seen;
CREATE TABLE seen (id BLOB PRIMARY KEY, payload BLOB, whole BLOB, carried INTEGER) WITHOUT ROWID;
"""


@dataclass(frozen=True, slots=True)
class SnapshotRow:
    """A point at the time of the snapshot."""

    payload: bytes
    """The digest of its payload."""
    content: bytes
    """The digest of its payload, and of its vector if that was read."""
    carried: bool
    """Whether the new collection had it, too."""


class Snapshot:
    """Rows by the ids of points, in the file `path`. Everything raises MigrationStateError."""

    def __init__(self, path: Path) -> None:
        self._path = path
        with self._translate_errors():
            private_files.make_folder(path.parent)
            private_files.create(path)
            self._sql = sqlite3.connect(path, isolation_level=None)

    def reset(self) -> None:
        """Delete all rows; new ones are on disk after `commit`."""
        if self._sql.in_transaction:
            self._run("ROLLBACK")
        with self._translate_errors():
            self._sql.executescript(_LAYOUT)
        self._run("BEGIN")

    def commit(self) -> None:
        """Write added and removed rows to disk."""
        if self._sql.in_transaction:
            self._run("COMMIT")

    def add(self, points: Iterable[Point], left: Collection[PointId]) -> None:
        """Store points as they are; those in `left` are not in the new collection."""
        self._many(
            "INSERT OR REPLACE INTO seen VALUES (?, ?, ?, ?)",
            [
                (_key(one.id), one.digest(), content_digest(one), one.id not in left)
                for one in points
            ],
        )

    def remove(self, ids: Sequence[PointId]) -> None:
        """Delete the rows of points."""
        self._many("DELETE FROM seen WHERE id = ?", [(_key(one),) for one in ids])

    def rows(self, ids: Sequence[PointId]) -> dict[PointId, SnapshotRow]:
        """Return the rows of these ids, of those that have one."""
        found = {}
        for one in ids:
            row = self._run(
                "SELECT payload, whole, carried FROM seen WHERE id = ?", (_key(one),)
            ).fetchone()
            if row is not None:
                found[one] = SnapshotRow(row[0], row[1], bool(row[2]))
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
        """Close the file; uncommitted changes are lost."""
        self._sql.close()

    def _run(self, statement: str, values: Sequence[object] = ()) -> sqlite3.Cursor:
        with self._translate_errors():
            return self._sql.execute(statement, values)

    def _many(self, statement: str, rows: Sequence[Sequence[object]]) -> None:
        if not self._sql.in_transaction:
            self._run("BEGIN")
        with self._translate_errors():
            self._sql.executemany(statement, rows)

    @contextmanager
    def _translate_errors(self) -> Iterator[None]:
        try:
            yield
        except (sqlite3.Error, OSError) as error:
            raise MigrationStateError(f"{self._path}: {error}") from error


def content_digest(point: Point) -> bytes:
    """Return a digest of the payload and the vector of a point."""
    told = hashlib.blake2b(point.digest(), digest_size=16)
    told.update(point.vector or b"")
    return told.digest()


def _key(one: PointId) -> bytes:
    return orjson.dumps(one)
