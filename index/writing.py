"""Points of the outbox, written to a collection in one call."""

import asyncio
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import orjson

from providers import vector
from providers.quoted_inputs import QuotedInputs

from .connection import Connection
from .failures import QdrantFailure
from .point import Waiting, id_of

if TYPE_CHECKING:
    from qdrant_client import models


async def upsert(qdrant: Connection, collection: str, batch: Sequence[Waiting]) -> None:
    """Write points, and return once they can be found. Raises QdrantFailure.

    Its message repeats no text of a payload: it goes to the log, the status and the outbox.
    """
    points = await asyncio.to_thread(_structs, batch)
    try:
        await qdrant.ask(lambda client: client.upsert(collection, points, wait=True))
    except QdrantFailure as failure:
        texts = [text for one in points for text in _texts(one.payload)]
        failure.args = (QuotedInputs(texts).hide(str(failure)),)
        raise


def _texts(value: object) -> Iterator[str]:
    """Yield the texts in a payload, however deep."""
    values = [value]
    while values:
        one = values.pop()
        if isinstance(one, str):
            yield one
        elif isinstance(one, dict):
            values += one.values()
        elif isinstance(one, list):
            values += one


def _structs(batch: Sequence[Waiting]) -> "list[models.PointStruct]":
    """Return points as the client takes them; every number is the float32 that it was."""
    from qdrant_client import models  # noqa: PLC0415 - an extra, and slow to import

    numbers = vector.stack([one.vector for one in batch]).tolist()
    return [
        models.PointStruct(id=id_of(one.id), vector=row, payload=orjson.loads(one.payload))
        for one, row in zip(batch, numbers, strict=True)
    ]
