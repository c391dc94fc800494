"""Writes points to a collection, whole or as updates, and asks which ids it has."""

import asyncio
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import orjson
from embedding_proxy.providers import vector

from .client import Connection
from .collection import AnyConnection
from .errors import Missing
from .point import QueuedPoint, id_of

if TYPE_CHECKING:
    from qdrant_client import models


async def present_ids(qdrant: AnyConnection, name: str, ids: Sequence[int | str]) -> set[int | str]:
    """Return those ids that a collection has; none if it is not there. Raises QdrantFailure."""
    if not ids:
        return set()
    try:
        found = await qdrant.ask(
            lambda client: client.retrieve(name, list(ids), with_payload=False, with_vectors=False)
        )
    except Missing:
        return set()
    return {one.id if isinstance(one.id, int) else str(one.id) for one in found}


async def upsert(
    qdrant: Connection, collection: str, batch: Sequence[QueuedPoint], vector_name: str = ""
) -> None:
    """Write points, and return once they can be found. Raises QdrantFailure.

    `vector_name` is that of their vector. Updates of points that are there keep what they do not
    name; the others are written whole.
    """
    doing = f"writing points to {collection}"
    updates = [one for one in batch if one.is_update]
    there = await present_ids(qdrant, collection, [id_of(one.id) for one in updates])
    whole = [one for one in batch if not (one.is_update and id_of(one.id) in there)]
    updates = [one for one in updates if id_of(one.id) in there]
    if whole:
        points = await asyncio.to_thread(_structs, whole, vector_name)
        payloads = [one.payload for one in points]
        await qdrant.ask(
            lambda client: client.upsert(collection, points, wait=True), payloads, doing=doing
        )
    if updates:
        points = await asyncio.to_thread(_structs, updates, vector_name)
        payloads = [one.payload for one in points]
        operations = _operations(points)
        await qdrant.ask(
            lambda client: client.batch_update_points(collection, operations, wait=True),
            payloads,
            doing=doing,
        )


def _structs(batch: Sequence[QueuedPoint], vector_name: str) -> "list[models.PointStruct]":
    """Return points as the client takes them; every number is the float32 that it was."""
    from qdrant_client import models  # noqa: PLC0415 - an extra, and slow to import

    numbers = vector.stack([one.vector for one in batch]).tolist()
    points = []
    for one, row in zip(batch, numbers, strict=True):
        vectors: Any = row
        if vector_name or one.vectors:
            others = orjson.loads(one.vectors) if one.vectors else {}
            vectors = {**others, vector_name: row}
        payload = orjson.loads(one.payload)
        points.append(models.PointStruct(id=id_of(one.id), vector=vectors, payload=payload))
    return points


def _operations(points: "Sequence[models.PointStruct]") -> "list[models.UpdateOperation]":
    """Return what changes points that are there: the vectors and payload fields they name."""
    from qdrant_client import models  # noqa: PLC0415 - an extra, and slow to import

    vectors = [models.PointVectors(id=one.id, vector=one.vector) for one in points]
    operations: list[models.UpdateOperation] = [
        models.UpdateVectorsOperation(update_vectors=models.UpdateVectors(points=vectors))
    ]
    for one in points:
        change = models.SetPayload(payload=one.payload or {}, points=[one.id])
        operations.append(models.SetPayloadOperation(set_payload=change))
    return operations
