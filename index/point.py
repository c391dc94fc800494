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
    """A collection, and the space and dimensions of its vectors."""

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
    """Whether its content follows from its id. Once it is written, the next answer with it need not
    write it again."""
    new: bool
    """Whether it is sent to Qdrant even if it is plain and known to be there."""
    address: bytes = b""
    """The cache address of the input; empty if it is the id."""
    namespace: str = ""
    """The namespace of the input in the cache."""
    digest: bytes = b""
    """The check digest of the input in the cache; empty if it is not known."""
    vectors: bytes = b""
    """Further vectors as a JSON object, by their names; empty if there are none."""
    is_update: bool = False
    """Whether an existing point keeps its other vectors and other fields of its payload."""


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
    """None if an earlier version added it. Then there is no payload either."""
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
    """The state of a collection. A later one that differs shows what another program did to it."""

    identity: str
    """See `collection.identity_of`."""
    points: int
    """The approximate number of its points."""
    is_new: bool = False
    """Whether it was made just now."""


class Backlog(NamedTuple):
    """Counts of the points that have not arrived."""

    points: int
    bytes: int
    oldest: float | None
    """When the oldest of them was added, in seconds since 1970."""
    dead: int
    reasons: tuple[tuple[str, str, int], ...]
    """Of the dead letters: collection, reason, and number."""

    def refusals(self) -> list[dict[str, object]]:
        """Return the reasons as `/status` shows them."""
        return [
            {"collection": collection, "reason": reason, "points": count}
            for collection, reason, count in self.reasons
        ]


def id_bytes(id_: PointId) -> bytes:
    """Return an id as bytes: 16 of a UUID, 8 of a number.

    >>> id_of(id_bytes(7)), id_of(id_bytes(UUID(int=7)))
    (7, '00000000-0000-0000-0000-000000000007')
    """
    return id_.bytes if isinstance(id_, UUID) else id_.to_bytes(8, "big")


def id_of(data: bytes) -> int | str:
    """Return the id in the form of Qdrant's client."""
    return str(UUID(bytes=data)) if len(data) == 16 else int.from_bytes(data, "big")
