"""The values of indexing: points, their targets, pending points and the counts of a backlog."""

import zlib
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
    plain: bool
    """Whether its content follows from its id: once it is written, an answer with it need not be
    written again."""
    new: bool
    """Whether it goes to Qdrant even if it is plain, and known to be there."""
    address: bytes = b""
    """The cache address of the input; empty if it is the id."""
    namespace: str = ""
    """The namespace of the input in the cache."""
    digest: bytes = b""
    """The check digest of the input in the cache; empty if it is not known."""
    vectors: bytes = b""
    """Further vectors as a JSON object, by their names; empty if there are none."""
    is_update: bool = False
    """Whether a point that is there keeps its other vectors and other fields of its payload."""


class QueuedPoint(NamedTuple):
    """A point in the queue."""

    seq: int
    id: bytes
    vector: bytes
    payload: bytes
    size: int
    vectors: bytes
    is_update: bool


class JournalEntry(NamedTuple):
    """A point that was added at some time."""

    point: bytes
    address: bytes
    digest: bytes | None
    """None if an earlier version added it; then there is no payload, either."""
    namespace: str
    compressed: bytes | None
    """Its payload."""
    vectors: bytes
    is_update: bool

    @property
    def payload(self) -> bytes | None:
        """The payload as it was sent; None if the journal does not have it."""
        return None if self.compressed is None else zlib.decompress(self.compressed)


class CollectionState(NamedTuple):
    """What a collection is at some time; what somebody else did to it shows in a later one."""

    identity: str
    """See `collection.identity_of`."""
    points: int
    """About how many it has."""
    is_new: bool = False
    """Whether it was made just now."""


class Backlog(NamedTuple):
    """Counts of the points that have not arrived."""

    points: int
    bytes: int
    oldest: float | None
    """Since when the first of them waits, in seconds since 1970."""
    dead: int
    reasons: tuple[tuple[str, str, int], ...]
    """Of the dead letters: collection, reason, and how many."""

    def refusals(self) -> list[dict[str, object]]:
        """Return the reasons as they are shown."""
        return [
            {"collection": collection, "reason": reason, "points": count}
            for collection, reason, count in self.reasons
        ]


def id_bytes(one: PointId) -> bytes:
    """Return an id as bytes: 16 of a UUID, 8 of a number.

    >>> id_of(id_bytes(7)), id_of(id_bytes(UUID(int=7)))
    (7, '00000000-0000-0000-0000-000000000007')
    """
    return one.bytes if isinstance(one, UUID) else one.to_bytes(8, "big")


def id_of(data: bytes) -> int | str:
    """Return the id as Qdrant takes it."""
    return str(UUID(bytes=data)) if len(data) == 16 else int.from_bytes(data, "big")
