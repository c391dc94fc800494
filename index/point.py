"""The values of indexing: points, their targets, pending points and the counts of a backlog."""

from dataclasses import dataclass
from typing import NamedTuple, TypeAlias
from uuid import UUID

from embedding_proxy.providers.base import Vector

PointId: TypeAlias = int | UUID
"""An id in Qdrant: an unsigned integer of 64 bits, or a UUID."""

MAX_ID = (1 << 64) - 1


class Target(NamedTuple):
    """A collection, and the vectors that may go into it."""

    collection: str
    space: str
    """The label of the space."""
    dimensions: int


@dataclass(frozen=True, slots=True)
class Point:
    """A vector with its id and payload."""

    id: bytes
    """See `id_bytes`."""
    vector: Vector
    payload: bytes
    """A JSON object."""
    mark: int
    """Tells one content of this id from another; 0 where the id alone decides the content."""
    new: bool
    """Whether it goes to Qdrant even if a point of this id and mark has."""
    address: bytes = b""
    """The cache address of the input; empty if it is the id."""
    namespace: str = ""
    """The namespace of the input in the cache."""


class QueuedPoint(NamedTuple):
    """A point in the queue."""

    seq: int
    id: bytes
    vector: bytes
    payload: bytes
    bytes: int


class Backlog(NamedTuple):
    """Counts of the points that have not arrived."""

    points: int
    bytes: int
    oldest: float | None
    """Since when the first of them waits, in seconds since 1970."""
    dead: int
    reasons: tuple[tuple[str, str, int], ...]
    """Of the dead letters: collection, reason, and how many."""


def id_bytes(one: PointId) -> bytes:
    """Return an id as bytes: 16 of a UUID, 8 of a number.

    >>> id_of(id_bytes(7)), id_of(id_bytes(UUID(int=7)))
    (7, '00000000-0000-0000-0000-000000000007')
    """
    return one.bytes if isinstance(one, UUID) else one.to_bytes(8, "big")


def id_of(data: bytes) -> int | str:
    """Return the id as Qdrant takes it."""
    return str(UUID(bytes=data)) if len(data) == 16 else int.from_bytes(data, "big")
