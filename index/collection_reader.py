"""Reads collections of Qdrant: in pages, by ids, or by similarity.

A reader waits for passing failures (an outage, a limit) to end, up to about two minutes. Everything
raises QdrantFailure. The requested vector of a point is bytes, as everywhere in the program; its
other vectors, named or sparse, are as the client returns them.

A server scales the vectors of a cosine collection to length 1 when it stores them, in float32. They
come back with other last bits if the model's vectors have length 1, and as other vectors if not.
A folder keeps them as they were given.
"""

import asyncio
import hashlib
import json
import logging
import math
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias, TypeVar

from embedding_proxy.providers import vector
from embedding_proxy.providers.base import Vector
from embedding_proxy.providers.failure_backoff import Backoff

from .client import Connection
from .errors import InUse, Unavailable

if TYPE_CHECKING:
    from qdrant_client import AsyncQdrantClient
    from qdrant_client.models import Record, ScoredPoint

T = TypeVar("T")

log = logging.getLogger("embedding_proxy.qdrant")

MAX_TRIES = 8
"""Attempts of one call in a row; with the waits between them about two minutes."""
MIN_WAIT_S, MAX_WAIT_S = 0.5, 30.0

PointId: TypeAlias = int | str
"""A point's id as Qdrant gives it: a number, or a UUID as text."""


@dataclass(frozen=True, slots=True)
class Point:
    """A point, with the parts that were requested."""

    id: PointId
    payload: Mapping[str, Any]
    vector: Vector | None = None
    """The vector of the reader's name; None if there is none, or it was not requested."""
    others: Mapping[str, Any] | None = None
    """Further vectors by their names."""

    def digest(self) -> bytes:
        """Return a digest of the payload; two with the same content have the same."""
        content = json.dumps(self.payload, sort_keys=True, default=str)
        return hashlib.blake2b(content.encode(), digest_size=16).digest()

    def with_vector(self, new: Vector) -> "Point":
        """Return the same point with another vector."""
        return replace(self, vector=new)


class Page(NamedTuple):
    """Some points, and the id where the next page begins; None after the last page."""

    points: Sequence[Point]
    after: PointId | None


class CollectionReader:
    """Reads the points of collections, each with the vector of one name."""

    def __init__(
        self,
        qdrant: Connection,
        name: str = "",
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self.qdrant = qdrant
        self.vector_name = name
        """The name of the vector; "" for the unnamed one."""
        self._sleep = sleep

    async def ask(
        self,
        work: "Callable[[AsyncQdrantClient], Awaitable[T]]",
        payloads: Iterable[object] = (),
        *,
        doing: str = "",
    ) -> T:
        """Call Qdrant as `Connection.ask` does; retry passing failures. Raises QdrantFailure."""
        backoff = Backoff(MIN_WAIT_S, MAX_WAIT_S)
        for attempt in range(1, MAX_TRIES + 1):
            try:
                return await self.qdrant.ask(work, payloads, doing=doing)
            except Unavailable as error:
                if attempt == MAX_TRIES or isinstance(error, InUse):
                    raise
                wait_s = backoff.fail()
                wait_s = min(MAX_WAIT_S, error.retry_after_s or wait_s)
                log.warning("Qdrant: %s; trying again in %.0f s", error, wait_s)
                await self._sleep(wait_s)
        raise AssertionError("the last try returns or raises")

    async def pages(
        self, collection: str, size: int, offset: PointId | None = None, *, vectors: bool = False
    ) -> AsyncIterator[Page]:
        """Yield the pages of a collection in the order of ids, each of 1…`size` points."""
        while True:
            records, after = await self.ask(
                lambda client, offset=offset: client.scroll(  # type: ignore[misc]
                    collection, limit=size, offset=offset, with_payload=True, with_vectors=vectors
                )
            )
            offset = _id(after)
            if records:
                yield Page([self._point(record) for record in records], offset)
            if offset is None:
                return

    async def get_points(
        self, collection: str, ids: Sequence[PointId], *, vectors: bool = False
    ) -> dict[PointId, Point]:
        """Return the points of these ids that exist."""
        if not ids:
            return {}
        records = await self.ask(
            lambda client: client.retrieve(
                collection, list(ids), with_payload=True, with_vectors=vectors
            )
        )
        return {point.id: point for point in map(self._point, records)}

    async def sample(self, collection: str, count: int) -> list[Point]:
        """Return points drawn at random, with their vectors."""
        from qdrant_client import models  # noqa: PLC0415 - an extra, and slow to import

        query = models.SampleQuery(sample=models.Sample.RANDOM)
        response = await self.ask(
            lambda client: client.query_points(
                collection, query=query, limit=count, with_payload=True, with_vectors=True
            )
        )
        return [self._point(record) for record in response.points]

    async def nearest(self, collection: str, to: Vector, count: int) -> list[Point]:
        """Return the points nearest to this vector, the nearest first, with their vectors."""
        (numbers,) = vector.stack([to]).tolist()
        response = await self.ask(
            lambda client: client.query_points(
                collection,
                query=numbers,
                using=self.vector_name or None,
                limit=count,
                with_payload=False,
                with_vectors=True,
            )
        )
        return [self._point(record) for record in response.points]

    async def count(self, collection: str) -> int:
        """Return how many points there are, exactly."""
        return (await self.ask(lambda client: client.count(collection, exact=True))).count

    def _point(self, record: "Record | ScoredPoint") -> Point:
        vectors: object = record.vector
        others = None
        if isinstance(vectors, Mapping):
            others = {name: value for name, value in vectors.items() if name != self.vector_name}
            vectors = vectors.get(self.vector_name)
        numbers = vector.from_numbers(_floats(vectors)) if isinstance(vectors, Sequence) else None
        return Point(_id(record.id), record.payload or {}, numbers, others or None)


def _floats(numbers: Sequence[Any]) -> list[float]:
    """Return numbers as they are read from JSON, where a NaN is a null."""
    return [math.nan if number is None else float(number) for number in numbers]


def _id(value: object) -> Any:  # noqa: ANN401 - a number, a text, or None
    return value if value is None or isinstance(value, int) else str(value)
