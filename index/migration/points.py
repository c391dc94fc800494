"""The points of a migration's collections: read in pages, written with all their vectors.

A server may take fewer points in one request than are asked for: by its strict mode, a limit of
rates or of bytes, its own or that of a gateway. Then requests get smaller, and stay so.
"""

import json
import logging
import re
from collections import deque
from collections.abc import (
    AsyncIterator,
    Awaitable,
    Callable,
    Iterable,
    Iterator,
    Sequence,
)
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, TypeVar

from embedding_proxy.index.collection_reader import CollectionReader, Page, Point, PointId
from embedding_proxy.index.errors import QdrantFailure, translated
from embedding_proxy.providers import vector
from embedding_proxy.providers.base import Vector

from .vectors import numbers_in

if TYPE_CHECKING:
    from qdrant_client import AsyncQdrantClient
    from qdrant_client.models import PointStruct

T = TypeVar("T")

WriteMode: TypeAlias = Literal["upsert", "insert_only", "update_only"]
"""`insert_only` leaves alone the points that exist, `update_only` those that do not."""

log = logging.getLogger("embedding_proxy.migrate")

WRITE_BYTES = 4_000_000
"""About how many bytes of JSON one write has; servers take 32 MiB, gateways may take less."""
_BYTES_PER_NUMBER = 12
"""About the size of a float32 in JSON."""
_LIMIT = re.compile(r"Limit exceeded \d+ > (\d+)")
_TOO_LARGE = ("HTTP 413", "larger than rate limiter capacity", "split your request")


class TooLarge(QdrantFailure):
    """Qdrant takes fewer points in one request; `limit` is how many, None where it did not say."""

    def __init__(self, message: str, limit: int | None = None) -> None:
        super().__init__(message)
        self.limit = limit


def _size_limit(error: QdrantFailure) -> TooLarge | None:
    """Return the failure of a request that is too large for this server; None of another one."""
    words = str(error)
    found = _LIMIT.search(words)
    if found:
        return TooLarge(words, int(found[1]))
    return TooLarge(words) if any(one in words for one in _TOO_LARGE) else None


def _was_cut(error: QdrantFailure) -> bool:
    """Tell whether the connection ended amid a call: a server does so with what is too large."""
    source = getattr(error.__cause__, "source", None)
    return type(source).__name__ in {"ReadError", "WriteError", "RemoteProtocolError"}


class Points(CollectionReader):
    """Reads and writes the points of collections; `name` is that of the migrated vector."""

    max_read: int | None = None
    """Points in one read, as far as this server has told."""
    max_write: int | None = None
    """Points in one write, as far as this server has told."""

    async def ask(
        self,
        work: "Callable[[AsyncQdrantClient], Awaitable[T]]",
        payloads: Iterable[object] = (),
        *,
        is_divisible: bool = False,
    ) -> T:
        """Ask Qdrant as CollectionReader does. Raises QdrantFailure.

        TooLarge at once for what is too large; if `is_divisible`, also for a cut connection.
        """

        async def call(client: "AsyncQdrantClient") -> T:
            try:
                return await work(client)
            except Exception as error:
                failure = translated(error, str(self.qdrant))
                if isinstance(failure, QdrantFailure):
                    failure.__cause__ = error
                    large = _size_limit(failure)
                    if large is None and is_divisible and _was_cut(failure):
                        large = TooLarge(str(failure))
                    if large is not None:
                        raise large from error
                raise

        return await super().ask(call, payloads)

    async def pages(
        self, collection: str, size: int, offset: PointId | None = None, *, vectors: bool = False
    ) -> AsyncIterator[Page]:
        """Yield the pages of a collection in the order of ids, each of 1…`size` points."""
        while True:
            current = min(size, self.max_read or size)
            try:
                async for page in super().pages(collection, current, offset, vectors=vectors):
                    offset = page.after
                    yield page
            except TooLarge as error:
                self._reduce_reads(current, error)
            else:
                return

    async def get_points(
        self, collection: str, ids: Sequence[PointId], *, vectors: bool = False
    ) -> dict[PointId, Point]:
        """Return the points of these ids that are there."""
        found: dict[PointId, Point] = {}
        start = 0
        while start < len(ids):
            some = ids[start : start + (self.max_read or len(ids))]
            try:
                found |= await super().get_points(collection, some, vectors=vectors)
            except TooLarge as error:
                self._reduce_reads(len(some), error)
            else:
                start += len(some)
        return found

    async def sample(self, collection: str, most: int) -> list[Point]:
        """Return points drawn at random, with their vectors; fewer where a read takes fewer."""
        while True:
            current = min(most, self.max_read or most)
            try:
                return await super().sample(collection, current)
            except TooLarge as error:
                self._reduce_reads(current, error)

    async def nearest(self, collection: str, to: Vector, most: int) -> list[Point]:
        """Return what a search with this vector finds, the nearest first, with their vectors."""
        while True:
            current = min(most, self.max_read or most)
            try:
                return await super().nearest(collection, to, current)
            except TooLarge as error:
                self._reduce_reads(current, error)

    def _reduce_reads(self, size: int, error: TooLarge) -> None:
        """Read fewer points at a time from now on. Raises the error if there is no smaller read."""
        self.max_read = _reduced(size, error)
        log.warning("Qdrant: %s; reading %d points at a time", error, self.max_read)

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
        pending = deque(_in_writes(points))
        while pending:
            some = pending.popleft()
            if self.max_write and len(some) > self.max_write:
                pending.extendleft([some[self.max_write :], some[: self.max_write]])
                continue
            structs = [self._struct(point) for point in some]
            try:
                await self.ask(
                    lambda client, structs=structs: client.upsert(  # type: ignore[misc]
                        collection, structs, wait=True, **options
                    ),
                    [point.payload for point in some],
                    is_divisible=len(some) > 1,
                )
            except TooLarge as error:
                size = _reduced(len(some), error)
                if _size_limit(error):
                    self.max_write = size
                log.warning("Qdrant: %s; writing %d points at a time", error, size)
                pending.extendleft([some[size:], some[:size]])

    async def pause(self, seconds: float) -> None:
        """Wait for so long."""
        await self._sleep(seconds)

    async def delete(self, collection: str, ids: Sequence[PointId]) -> None:
        """Delete points, and return when they are gone."""
        start = 0
        while start < len(ids):
            some = list(ids[start : start + (self.max_write or len(ids))])
            try:
                await self.ask(lambda client, some=some: client.delete(collection, some, wait=True))  # type: ignore[misc]
            except TooLarge as error:
                self.max_write = _reduced(len(some), error)
            else:
                start += len(some)

    def _struct(self, point: Point) -> "PointStruct":
        from qdrant_client import models  # noqa: PLC0415 - an extra, and slow to import

        every: Any = dict(point.others or {})
        if point.vector is not None:
            (numbers,) = vector.stack([point.vector]).tolist()
            every = {**every, self.vector_name: numbers} if every or self.vector_name else numbers
        return models.PointStruct(id=point.id, payload=dict(point.payload), vector=every)


def _reduced(size: int, error: TooLarge) -> int:
    """Return the size of a smaller request. Raises the error if there is none."""
    smaller = size // 2 if error.limit is None else min(error.limit, size - 1)
    if smaller < 1:
        raise error
    return smaller


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
