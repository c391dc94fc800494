"""The points of a migration's collections: read in pages, written with all their vectors, compared.

A server may take fewer points in one request than are asked for: by its strict mode, a limit of
rates or of bytes, its own or that of a gateway. Then requests get smaller, and stay so.

The vectors of a point are dense, multi or sparse. A collection stores no more of a vector than its
type can hold: a copy that is stored again may differ in the last digits of that type, so copies are
compared with a tolerance (`is_copy`). A digest is exact: it tells whether one collection gives
other numbers than before (`vector_digest`).
"""

import asyncio
import hashlib
import json
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import numpy as np
from embedding_proxy.index.client import BatchSize, Connection, send_in_batches
from embedding_proxy.index.collection_reader import CollectionReader, Page, Point, PointId
from embedding_proxy.index.errors import Disconnected, TooLarge, Unavailable
from embedding_proxy.providers import vector
from embedding_proxy.providers.base import Vector
from embedding_proxy.providers.vector import Floats
from numpy.typing import NDArray

if TYPE_CHECKING:
    from qdrant_client import AsyncQdrantClient
    from qdrant_client.models import CollectionParams, PointStruct

WriteMode: TypeAlias = Literal["upsert", "insert_only", "update_only"]
"""`insert_only` skips points that exist, `update_only` skips points that do not."""

log = logging.getLogger("embedding_proxy.migrate")

WRITE_BYTES = 4_000_000
"""About how many bytes of JSON one write has; servers take 32 MiB, gateways may take less."""
_BYTES_PER_NUMBER = 12
"""About the size of a float32 in JSON."""
_MAX_POINTS = 1 << 20
"""Points of one request, until a server requests fewer."""

_TOLERANCES = {"float16": 2e-3, "uint8": 0.0, "turbo16": 2e-3, "turbo8": 2e-2, "turbo4": 0.2}
"""The tolerance of a number that is stored again, as a share of the largest of its vector."""
_FLOAT32 = 1e-5


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
        """Return the points of these ids that exist."""
        points: dict[PointId, Point] = {}
        start = 0
        while start < len(ids):
            batch = ids[start : start + self._read_size.max_items]
            try:
                points |= await super().get_points(collection, batch, vectors=vectors)
            except TooLarge as error:
                self._reduce(self._read_size, len(batch), error)
            else:
                start += len(batch)
        return points

    async def sample(self, collection: str, count: int) -> list[Point]:
        """Return points drawn at random, with their vectors; fewer where a read takes fewer."""
        while True:
            current = min(count, self._read_size.max_items)
            try:
                return await super().sample(collection, current)
            except TooLarge as error:
                self._reduce(self._read_size, current, error)

    async def nearest(self, collection: str, to: Vector, count: int) -> list[Point]:
        """Return the points nearest to this vector, the nearest first, with their vectors."""
        while True:
            current = min(count, self._read_size.max_items)
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

        A server before 1.17 knows only the mode `upsert`; callers first check which points exist.
        """
        from qdrant_client import models  # noqa: PLC0415 - an extra, and slow to import

        # Older versions of the client lack it; then only the check of the caller applies.
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
                # A batch whose connection is cut is halved; all other failures are retried.
                if isinstance(error, Disconnected) and len(batch) > 1:
                    raise
                await self.ask(upsert, payloads)

        for chunk in _in_writes(points):
            await send_in_batches(chunk, self._write_size, send)

    async def pause(self, seconds: float) -> None:
        """Wait for some seconds."""
        await self._sleep(seconds)

    async def delete(self, collection: str, ids: Sequence[PointId]) -> None:
        """Delete points, and return when they are gone."""
        start = 0
        while start < len(ids):
            batch = list(ids[start : start + self._write_size.max_items])
            try:
                await self.ask(
                    lambda client, batch=batch: client.delete(  # type: ignore[misc]
                        collection, batch, wait=True
                    )
                )
            except TooLarge as error:
                self._reduce(self._write_size, len(batch), error)
            else:
                start += len(batch)

    def _struct(self, point: Point) -> "PointStruct":
        from qdrant_client import models  # noqa: PLC0415 - an extra, and slow to import

        every: Any = dict(point.others or {})
        if point.vector is not None:
            (numbers,) = vector.stack([point.vector]).tolist()
            every = {**every, self.vector_name: numbers} if every or self.vector_name else numbers
        return models.PointStruct(id=point.id, payload=dict(point.payload), vector=every)


def _in_writes(points: Sequence[Point]) -> Iterator[list[Point]]:
    """Split points into writes of about WRITE_BYTES at most, and one point at least."""
    batch: list[Point] = []
    size = 0
    for point in points:
        numbers = len(point.vector or b"") // 4
        numbers += sum(numbers_in(value) for value in (point.others or {}).values())
        own = _BYTES_PER_NUMBER * numbers + len(json.dumps(point.payload, default=str))
        if batch and size + own > WRITE_BYTES:
            yield batch
            batch, size = [], 0
        batch.append(point)
        size += own
    if batch:
        yield batch


@dataclass(frozen=True, slots=True)
class VectorType:
    """How a collection stores the vectors of one name."""

    datatype: str = "float32"
    is_cosine: bool = False
    """Whether a server scales them to length 1 when it stores them."""

    @property
    def tolerance(self) -> float:
        """The share of its largest number by which a vector and its copy may differ."""
        return _TOLERANCES.get(self.datatype, _FLOAT32)


def vector_types(params: "CollectionParams") -> dict[str, VectorType]:
    """Return how the vectors of a collection are stored, by their names; "" is the unnamed one."""
    config: Any = params.vectors
    dense = dict(config) if isinstance(config, Mapping) else {"": config} if config else {}
    types = {
        name: VectorType(
            _datatype(vector_params.datatype), str(vector_params.distance.value) == "Cosine"
        )
        for name, vector_params in dense.items()
    }
    for name, vector_params in (params.sparse_vectors or {}).items():
        types[name] = VectorType(
            _datatype(vector_params.index.datatype if vector_params.index else None)
        )
    return types


def _datatype(datatype: Any) -> str:  # noqa: ANN401 - an enum of the client, or None
    return "float32" if datatype is None else str(datatype.value)


def vector_digest(vector: Any) -> str | None:  # noqa: ANN401 - in each form that Qdrant has
    """Return a digest of a vector in any form; None without a vector."""
    if vector is None:
        return None
    indices, numbers = _parts(vector)
    content = hashlib.blake2b(f"{numbers.shape}".encode(), digest_size=12)
    if indices is not None:
        content.update(indices.tobytes())
    content.update(numbers.tobytes())
    return content.hexdigest()


def is_copy(vector: Any, copy: Any, kind: VectorType) -> bool:  # noqa: ANN401 - as above
    """Tell whether two vectors of any form are equal, within what their type can hold."""
    if vector is None or copy is None:
        return vector is copy
    (indices, numbers), (others, theirs) = _parts(vector), _parts(copy)
    if numbers.shape != theirs.shape or (indices is None) != (others is None):
        return False
    if indices is not None and others is not None and not np.array_equal(indices, others):
        return False
    if kind.is_cosine and indices is None:
        numbers, theirs = _scale(numbers), _scale(theirs)
    largest = max(np.abs(numbers).max(initial=0.0), np.abs(theirs).max(initial=0.0))
    return np.allclose(numbers, theirs, rtol=0, atol=kind.tolerance * largest, equal_nan=True)


def numbers_in(vector: Any) -> int:  # noqa: ANN401 - as above
    """Return the number of numbers in the JSON of a vector."""
    if isinstance(vector, Sequence):
        return sum(len(element) if isinstance(element, Sequence) else 1 for element in vector)
    return 2 * len(getattr(vector, "indices", ()))


def _parts(vector: Any) -> tuple[NDArray[np.int64] | None, Floats]:  # noqa: ANN401 - as above
    """Return the sorted indices (None if the vector is not sparse) and the numbers."""
    if isinstance(vector, bytes):
        return None, np.frombuffer(vector, "<f4")
    if not isinstance(vector, Sequence):
        indices = np.asarray(vector.indices, np.int64)
        order = np.argsort(indices)
        return indices[order], np.asarray(vector.values, np.float32)[order]
    return None, np.asarray(vector, np.float32)


def _scale(numbers: Floats) -> Floats:
    lengths = np.linalg.norm(numbers, axis=-1, keepdims=True)
    return (numbers / np.where(lengths > 0, lengths, 1)).astype(np.float32)
