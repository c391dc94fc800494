"""A snapshot of both collections when they were equal: a row for each point, on disk.

Qdrant keeps no log of changes. Comparing the old collection with the snapshot finds what was
written to it while the aliases were switched, and comparing the new one finds what clients have
changed there since. Each part of a point is kept apart: its payload with the migrated vector, and
every other vector. It is on disk so that a killed cutover can continue.
"""

import hashlib
import sqlite3
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import orjson
from embedding_proxy.cache import private_files
from embedding_proxy.index.collection_reader import Point, PointId

from .points import vector_digest
from .state import MigrationStateError

_LAYOUT = """
DROP TABLE IF EXISTS seen;
CREATE TABLE seen (
    id BLOB PRIMARY KEY, payload BLOB, whole BLOB, carried INTEGER, vectors BLOB, text INTEGER
) WITHOUT ROWID;
"""

Digests = Mapping[str, str | None]
"""Digests of vectors by their names."""


@dataclass(frozen=True, slots=True)
class SnapshotRow:
    """A point at the time of the snapshot."""

    payload: bytes
    """The digest of its payload."""
    content: bytes
    """The digest of its payload, and of its old vector if that was read."""
    carried: bool
    """Whether the new collection had it too."""
    old: Digests | None
    """Its other vectors in the old collection; None in a snapshot of an earlier version."""
    new: Digests | None
    """Its other vectors in the new collection; None as above."""
    vector: str | None
    """The digest of its new vector, if that was read."""


class Snapshot:
    """Rows by the ids of points, in the file `path`. Everything raises MigrationStateError."""

    def __init__(self, path: Path) -> None:
        self._path = path
        with self._translate_errors():
            private_files.make_folder(path.parent)
            private_files.create(path)
            self._sql = sqlite3.connect(path, isolation_level=None)
            self._upgrade()

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

    def add(
        self,
        points: Iterable[Point],
        new: Mapping[PointId, Point],
        with_text: Collection[PointId] = (),
    ) -> None:
        """Store points of the old collection with their state in the new one.

        `with_text` are the ids of points whose vector can be compared with a text.
        """
        self._many(
            "INSERT OR REPLACE INTO seen (id, payload, whole, carried, vectors, text)"
            " VALUES (?, ?, ?, ?, ?, ?)",
            [
                (
                    _key(point.id),
                    point.digest(),
                    content_digest(point),
                    point.id in new,
                    _vectors_json(point, new.get(point.id)),
                    point.id in with_text,
                )
                for point in points
            ],
        )

    def remove(self, ids: Sequence[PointId]) -> None:
        """Delete the rows of points."""
        self._many("DELETE FROM seen WHERE id = ?", [(_key(id_),) for id_ in ids])

    def rows(self, ids: Sequence[PointId]) -> dict[PointId, SnapshotRow]:
        """Return the rows of these ids that exist."""
        rows = {}
        for id_ in ids:
            row = self._run(
                "SELECT payload, whole, carried, vectors FROM seen WHERE id = ?", (_key(id_),)
            ).fetchone()
            if row is not None:
                digests = (None, None, None) if row[3] is None else orjson.loads(row[3])
                rows[id_] = SnapshotRow(row[0], row[1], bool(row[2]), *digests)
        return rows

    def counts(self) -> tuple[int, int]:
        """Return the number of points, and the number that the new collection had."""
        total, carried = self._run("SELECT count(*), total(carried) FROM seen").fetchone()
        return total, int(carried)

    def draw(self, number: int, *, with_text: bool) -> list[PointId]:
        """Return points that the new collection had, drawn at random; or of those with a text."""
        rows = self._run(
            "SELECT id FROM seen WHERE carried AND (text OR ?) ORDER BY random() LIMIT ?",
            (not with_text, number),
        )
        return [orjson.loads(key) for (key,) in rows]

    def pages(self, size: int) -> Iterator[list[PointId]]:
        """Yield all ids, some at a time; those of a page may be removed before the next."""
        after = b""
        while True:
            rows = self._run(
                "SELECT id FROM seen WHERE id > ? ORDER BY id LIMIT ?", (after, size)
            ).fetchall()
            if not rows:
                return
            yield [orjson.loads(key) for (key,) in rows]
            after = rows[-1][0]

    def _upgrade(self) -> None:
        """Add the new columns to the file of an earlier version."""
        columns = {column[1] for column in self._sql.execute("PRAGMA table_info(seen)")}
        if columns and "vectors" not in columns:
            self._sql.execute("ALTER TABLE seen ADD COLUMN vectors BLOB")
            self._sql.execute("ALTER TABLE seen ADD COLUMN text INTEGER")

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
    digest = hashlib.blake2b(point.digest(), digest_size=16)
    digest.update(point.vector or b"")
    return digest.digest()


def other_digests(point: Point) -> Digests:
    """Return the digests of a point's other vectors."""
    return {name: vector_digest(vector) for name, vector in (point.others or {}).items()}


def _vectors_json(old: Point, new: Point | None) -> bytes:
    theirs = {} if new is None else other_digests(new)
    own = None if new is None else vector_digest(new.vector)
    return orjson.dumps([other_digests(old), theirs, own])


def _key(id_: PointId) -> bytes:
    return orjson.dumps(id_)
