"""Points that wait for Qdrant, deleted on purpose: their texts are nobody's any more.

What Qdrant has already stays there; a batch that is being sent at this moment arrives.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from embedding_proxy.providers.base import current_label

from .outbox_file import OutboxFile, ReadOnlyOutbox

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
