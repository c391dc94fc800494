"""Points as a migration writes them: with the new vector, and all others as they came."""

import json
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from embedding_proxy.index.collection_reader import CollectionReader, Point, PointId
from embedding_proxy.providers import vector

if TYPE_CHECKING:
    from qdrant_client.models import PointStruct

WRITE_BYTES = 4_000_000
"""About how much goes in one write; a server takes 32 MiB, and gateways before it less."""
_BYTES_A_NUMBER = 12
"""Of a float32 in JSON."""


class Points(CollectionReader):
    """Reads and writes the points of collections whose migrated vector has this name."""

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

    def _struct(self, point: Point) -> "PointStruct":
        from qdrant_client import models  # noqa: PLC0415 - an extra, and slow to import

        assert point.vector is not None  # noqa: S101 - nothing is written without
        (numbers,) = vector.stack([point.vector]).tolist()
        every: Any = numbers
        if self.vector_name or point.others:
            every = {**(point.others or {}), self.vector_name: numbers}
        return models.PointStruct(id=point.id, payload=dict(point.payload), vector=every)


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
