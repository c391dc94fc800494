"""Points of the outbox, written to a collection in one call."""

import asyncio
from collections.abc import Sequence
from typing import TYPE_CHECKING

import orjson

from providers import vector

from .connection import Connection
from .point import Waiting, id_of

if TYPE_CHECKING:
    from qdrant_client import models


async def upsert(qdrant: Connection, collection: str, batch: Sequence[Waiting]) -> None:
    """Write points, and return once they can be found. Raises QdrantFailure."""
    points = await asyncio.to_thread(_structs, batch)
    payloads = [one.payload for one in points]
    await qdrant.ask(lambda client: client.upsert(collection, points, wait=True), payloads)


def _structs(batch: Sequence[Waiting]) -> "list[models.PointStruct]":
    """Return points as the client takes them; every number is the float32 that it was."""
    from qdrant_client import models  # noqa: PLC0415 - an extra, and slow to import

    numbers = vector.stack([one.vector for one in batch]).tolist()
    return [
        models.PointStruct(id=id_of(one.id), vector=row, payload=orjson.loads(one.payload))
        for one, row in zip(batch, numbers, strict=True)
    ]
