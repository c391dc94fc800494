"""Similarity search: the points nearest to a vector, in a collection of the same space."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from embedding_proxy.providers import vector
from embedding_proxy.providers.base import Vector

from .client import Connection
from .collection import (
    CollectionNames,
    CollectionOptions,
    Provenance,
    collection_aliases,
    conflict,
    look,
)
from .errors import Missing, OtherSpace


@dataclass(frozen=True, slots=True)
class SearchHit:
    """A point that a search found."""

    id: int | str
    score: float
    """Its cosine, in collections that are made here."""
    payload: Mapping[str, Any]

    @property
    def text(self) -> str | None:
        """The text it was made of, where the payload holds it."""
        found = self.payload.get("text")
        return found if isinstance(found, str) else None


async def search(  # noqa: PLR0913 - what is searched for, and where
    qdrant: Connection,
    name: str,
    wanted: Provenance,
    query: Vector,
    *,
    limit: int,
    where: Mapping[str, Any] | None,
    options: CollectionOptions,
    names: CollectionNames,
) -> list[SearchHit]:
    """Return the nearest points, the nearest first; `where` is a filter in Qdrant's JSON.

    `name` may be an alias; `names` are the proxy's own, of which a migration may have replaced one.
    With `options.adopt` a collection that says nothing of its space is trusted. Raises
    QdrantFailure; Missing, and OtherSpace for a collection whose vectors compare with none of
    `wanted`.
    """
    from qdrant_client import models  # noqa: PLC0415 - an extra, and slow to import

    name = await names.locate(qdrant, name, wanted)
    # An alias may lead elsewhere from one call to the next; a collection's own name does not.
    real = (await collection_aliases(qdrant)).get(name, name)
    vector_name = options.vector_name
    seen = await look(qdrant, real, vector_name)
    if seen is None:
        raise Missing(f"there is no collection {name}: nothing was indexed into it so far")
    claim = conflict(name, seen, wanted, adopt=options.adopt, vector_name=vector_name)
    if claim is not None:
        raise OtherSpace(claim)
    (numbers,) = vector.stack([query]).tolist()
    condition = None if where is None else models.Filter.model_validate(where)
    found = await qdrant.ask(
        lambda client: client.query_points(
            real,
            query=numbers,
            using=vector_name or None,
            limit=limit,
            query_filter=condition,
            with_payload=True,
        )
    )
    return [SearchHit(_id(one.id), one.score, one.payload or {}) for one in found.points]


def _id(one: object) -> int | str:
    return one if isinstance(one, int) else str(one)
