"""The points of a migration's collections: read in pages, written with all their vectors.

A server may take fewer points in one request than are asked for: by its strict mode, a limit of
rates or of bytes, its own or that of a gateway. Then requests get smaller, and stay so.
"""

import asyncio
import json
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from embedding_proxy.index.client import BatchSize, Connection, send_in_batches
from embedding_proxy.index.collection_reader import CollectionReader, Page, Point, PointId
from embedding_proxy.index.errors import Disconnected, TooLarge, Unavailable
from embedding_proxy.providers import vector
from embedding_proxy.providers.base import Vector

from .vectors import numbers_in

if TYPE_CHECKING:
    from qdrant_client import AsyncQdrantClient
    from qdrant_client.models import PointStruct

WriteMode: TypeAlias = Literal["upsert", "insert_only", "update_only"]
"""`insert_only` leaves alone the points that exist, `update_only` those that do not."""

log = logging.getLogger("embedding_proxy.migrate")

WRITE_BYTES = 4_000_000
"""About how many bytes of JSON one write has; servers take 32 MiB, gateways may take less."""
_BYTES_PER_NUMBER = 12
"""About the size of a float32 in JSON."""
_MAX_POINTS = 1 << 20
"""Of one request, until a server says that it takes fewer."""


class Points(CollectionReader):
    """Reads and writes the points of collections; `name` is that of the migrated vector."""

    def __init__(
        self,
        qdrant: Connection,
        name: str = "",
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        super().__init__(qdrant, name, sleep)
        self._read_size = BatchSize(_MAX_POINTS)
        self._write_size = BatchSize(_MAX_POINTS)

    async def pages(
        self, collection: str, size: int, offset: PointId | None = None, *, vectors: bool = False
    ) -> AsyncIterator[Page]:
        """Yield the pages of a collection in the order of ids, each of 1…`size` points."""
        while True:
            current = min(size, self._read_size.max_items)
            try:
                async for page in super().pages(collection, current, offset, vectors=vectors):
                    offset = page.after
                    yield page
            except TooLarge as error:
                self._reduce(self._read_size, current, error)
            else:
                return

    async def get_points(
        self, collection: str, ids: Sequence[PointId], *, vectors: bool = False
    ) -> dict[PointId, Point]:
        """Return the points of these ids that are there."""
        found: dict[PointId, Point] = {}
        start = 0
        while start < len(ids):
            some = ids[start : start + self._read_size.max_items]
            try:
                found |= await super().get_points(collection, some, vectors=vectors)
            except TooLarge as error:
                self._reduce(self._read_size, len(some), error)
            else:
                start += len(some)
        return found

    async def sample(self, collection: str, most: int) -> list[Point]:
        """Return points drawn at random, with their vectors; fewer where a read takes fewer."""
        while True:
            current = min(most, self._read_size.max_items)
            try:
                return await super().sample(collection, current)
            except TooLarge as error:
                self._reduce(self._read_size, current, error)

    async def nearest(self, collection: str, to: Vector, most: int) -> list[Point]:
        """Return what a search with this vector finds, the nearest first, with their vectors."""
        while True:
            current = min(most, self._read_size.max_items)
            try:
                return await super().nearest(collection, to, current)
            except TooLarge as error:
                self._reduce(self._read_size, current, error)

    @staticmethod
    def _reduce(size: BatchSize, items: int, error: TooLarge) -> None:
        """Make requests smaller from now on. Raises the error if they cannot be."""
        if items == 1:
            raise error
        size.shrink(items, error)
        log.warning("Qdrant: %s; trying %d points at a time", error, size.max_items)

    async def write(
        self, collection: str, points: Sequence[Point], mode: WriteMode = "upsert"
    ) -> None:
        """Write points and return when they can be read. A write that is too large is halved.

        A server before 1.17 knows no mode but `upsert`; so callers check first which points exist.
        """
        from qdrant_client import models  # noqa: PLC0415 - an extra, and slow to import

        # Older versions of the package lack it; then the check of the caller must do.
        modes = getattr(models, "UpdateMode", None)
        options = {"update_mode": modes(mode)} if mode != "upsert" and modes else {}

        async def send(batch: Sequence[Point]) -> None:
            structs = [self._struct(point) for point in batch]
            payloads = [point.payload for point in batch]

            async def upsert(client: "AsyncQdrantClient") -> None:
                await client.upsert(collection, structs, wait=True, **options)

            try:
                await self.qdrant.ask(upsert, payloads)
            except Unavailable as error:
                # A batch whose connection is cut is halved; all else is waited for.
                if isinstance(error, Disconnected) and len(batch) > 1:
                    raise
                await self.ask(upsert, payloads)

        for some in _in_writes(points):
            await send_in_batches(some, self._write_size, send)

    async def pause(self, seconds: float) -> None:
        """Wait for so long."""
        await self._sleep(seconds)

    async def delete(self, collection: str, ids: Sequence[PointId]) -> None:
        """Delete points, and return when they are gone."""
        start = 0
        while start < len(ids):
            some = list(ids[start : start + self._write_size.max_items])
            try:
                await self.ask(lambda client, some=some: client.delete(collection, some, wait=True))  # type: ignore[misc]
            except TooLarge as error:
                self._reduce(self._write_size, len(some), error)
            else:
                start += len(some)

    def _struct(self, point: Point) -> "PointStruct":
        from qdrant_client import models  # noqa: PLC0415 - an extra, and slow to import

        every: Any = dict(point.others or {})
        if point.vector is not None:
            (numbers,) = vector.stack([point.vector]).tolist()
            every = {**every, self.vector_name: numbers} if every or self.vector_name else numbers
        return models.PointStruct(id=point.id, payload=dict(point.payload), vector=every)


def _in_writes(points: Sequence[Point]) -> Iterator[list[Point]]:
    """Split points into writes of about WRITE_BYTES at most, and one point at least."""
    some: list[Point] = []
    size = 0
    for point in points:
        numbers = len(point.vector or b"") // 4
        numbers += sum(numbers_in(one) for one in (point.others or {}).values())
        own = _BYTES_PER_NUMBER * numbers + len(json.dumps(point.payload, default=str))
        if some and size + own > WRITE_BYTES:
            yield some
            some, size = [], 0
        some.append(point)
        size += own
    if some:
        yield some
