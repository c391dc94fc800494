"""Points of a collection as a migration reads and writes them; what Qdrant fails at is tried again.

A point's one vector that is migrated is bytes here, as everywhere in the house; its other vectors,
named or sparse, are carried as they come.
"""

import asyncio
import hashlib
import json
import logging
import math
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypeVar

from index.connection import Connection
from index.failures import InUse, Unavailable
from providers import vector
from providers.base import Vector

from .journal import PointId

if TYPE_CHECKING:
    from qdrant_client import AsyncQdrantClient
    from qdrant_client.models import PointStruct, Record, ScoredPoint

T = TypeVar("T")

log = logging.getLogger("embedding_proxy.migrate")

MOST_TRIES = 8
"""Of one call to Qdrant, in a row; with the waits between them some two minutes."""
LONGEST_WAIT_S = 30.0
WRITE_BYTES = 4_000_000
"""About how much goes in one write; a server takes 32 MiB, and gateways before it less."""
_BYTES_A_NUMBER = 12
"""Of a float32 in JSON."""


@dataclass(frozen=True, slots=True)
class Point:
    """A point, with as much of it as was asked for."""

    id: PointId
    payload: Mapping[str, Any]
    vector: Vector | None = None
    """The one that is migrated; None if there is none, or it was not asked for."""
    others: Mapping[str, Any] | None = None
    """Further vectors by their names."""

    def digest(self) -> bytes:
        """Return a digest of the payload; two with the same content have the same."""
        told = json.dumps(self.payload, sort_keys=True, default=str)
        return hashlib.blake2b(told.encode(), digest_size=16).digest()

    def with_vector(self, new: Vector) -> "Point":
        """Return the same point with another vector."""
        return replace(self, vector=new)


class Points:
    """Reads and writes the points of collections whose migrated vector has this name."""

    def __init__(
        self,
        qdrant: Connection,
        name: str = "",
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self.qdrant = qdrant
        self.vector_name = name
        """"" is the unnamed one."""
        self._sleep = sleep

    async def ask(
        self,
        work: "Callable[[AsyncQdrantClient], Awaitable[T]]",
        payloads: Iterable[object] = (),
    ) -> T:
        """Ask Qdrant as `Connection.ask` does; what passes is waited for. Raises QdrantFailure."""
        for tried in range(1, MOST_TRIES + 1):
            try:
                return await self.qdrant.ask(work, payloads)
            except Unavailable as error:
                if tried == MOST_TRIES or isinstance(error, InUse):
                    raise
                wait_s = min(LONGEST_WAIT_S, error.retry_after_s or 2.0 ** (tried - 2))
                log.warning("Qdrant: %s; trying again in %.0f s", error, wait_s)
                await self._sleep(wait_s)
        raise AssertionError("the last try returns or raises")

    async def page(
        self, collection: str, offset: PointId | None, limit: int, *, vectors: bool
    ) -> tuple[list[Point], PointId | None]:
        """Return some points in the order of their ids, and where the next ones begin."""
        found, after = await self.ask(
            lambda client: client.scroll(
                collection, limit=limit, offset=offset, with_payload=True, with_vectors=vectors
            )
        )
        return [self._point(record) for record in found], _id(after)

    async def those(
        self, collection: str, ids: Sequence[PointId], *, vectors: bool = False
    ) -> dict[PointId, Point]:
        """Return the points of these ids that are there."""
        if not ids:
            return {}
        found = await self.ask(
            lambda client: client.retrieve(
                collection, list(ids), with_payload=True, with_vectors=vectors
            )
        )
        return {point.id: point for point in map(self._point, found)}

    async def sample(self, collection: str, most: int) -> list[Point]:
        """Return points drawn at random, with their vectors."""
        from qdrant_client import models  # noqa: PLC0415 - an extra, and slow to import

        query = models.SampleQuery(sample=models.Sample.RANDOM)
        found = await self.ask(
            lambda client: client.query_points(
                collection, query=query, limit=most, with_payload=True, with_vectors=True
            )
        )
        return [self._point(record) for record in found.points]

    async def nearest(self, collection: str, to: Vector, most: int) -> list[Point]:
        """Return what a search with this vector finds, the nearest first, with their vectors."""
        (numbers,) = vector.stack([to]).tolist()
        found = await self.ask(
            lambda client: client.query_points(
                collection,
                query=numbers,
                using=self.vector_name or None,
                limit=most,
                with_payload=False,
                with_vectors=True,
            )
        )
        return [self._point(record) for record in found.points]

    async def count(self, collection: str) -> int:
        """Return how many points there are, exactly."""
        return (await self.ask(lambda client: client.count(collection, exact=True))).count

    async def write(
        self, collection: str, points: Sequence[Point], *, only_new: bool = False
    ) -> None:
        """Write points; they are there when this returns. `only_new` leaves alone what is there.

        A server before 1.17 does not know `only_new`; so a caller asks before which are there.
        """
        from qdrant_client import models  # noqa: PLC0415 - an extra, and slow to import

        # Older versions of the package have no such thing; then the asking before must do.
        modes = getattr(models, "UpdateMode", None)
        options = {"update_mode": modes.INSERT_ONLY} if only_new and modes else {}
        for some in _in_writes(points):
            structs = [self._struct(point) for point in some]
            await self.ask(
                lambda client, structs=structs: client.upsert(  # type: ignore[misc]
                    collection, structs, wait=True, **options
                ),
                [point.payload for point in some],
            )

    async def delete(self, collection: str, ids: Sequence[PointId]) -> None:
        """Delete points; they are gone when this returns."""
        if ids:
            await self.ask(lambda client: client.delete(collection, list(ids), wait=True))

    def _point(self, record: "Record | ScoredPoint") -> Point:
        found: object = record.vector
        others = None
        if isinstance(found, Mapping):
            others = {name: one for name, one in found.items() if name != self.vector_name}
            found = found.get(self.vector_name)
        numbers = vector.from_numbers(_floats(found)) if isinstance(found, Sequence) else None
        return Point(_id(record.id), record.payload or {}, numbers, others or None)

    def _struct(self, point: Point) -> "PointStruct":
        from qdrant_client import models  # noqa: PLC0415 - an extra, and slow to import

        assert point.vector is not None  # noqa: S101 - nothing is written without
        (numbers,) = vector.stack([point.vector]).tolist()
        every: Any = numbers
        if self.vector_name or point.others:
            every = {**(point.others or {}), self.vector_name: numbers}
        return models.PointStruct(id=point.id, payload=dict(point.payload), vector=every)


def _floats(numbers: Sequence[Any]) -> list[float]:
    """Return numbers as they are read from JSON, where a NaN is a null."""
    return [math.nan if number is None else float(number) for number in numbers]


def _id(found: object) -> Any:  # noqa: ANN401 - a number, a text, or None
    return found if found is None or isinstance(found, int) else str(found)


def _in_writes(points: Sequence[Point]) -> Iterator[list[Point]]:
    """Part points so that each write has about WRITE_BYTES at most, and one point at least."""
    some: list[Point] = []
    size = 0
    for point in points:
        own = len(point.vector or b"") // 4 * _BYTES_A_NUMBER
        own += len(json.dumps(point.payload, default=str)) + sum(
            _BYTES_A_NUMBER * len(one) for one in (point.others or {}).values() if type(one) is list
        )
        if some and size + own > WRITE_BYTES:
            yield some
            some, size = [], 0
        some.append(point)
        size += own
    if some:
        yield some
