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
    """The cosine, in collections that the proxy has made."""
    payload: Mapping[str, Any]

    @property
    def text(self) -> str | None:
        """The text of the point; None if the payload does not have it."""
        text = self.payload.get("text")
        return text if isinstance(text, str) else None


async def search(  # noqa: PLR0913 - what is searched for, and where
    qdrant: Connection,
    name: str,
    provenance: Provenance,
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
    `provenance`.
    """
    from qdrant_client import models  # noqa: PLC0415 - an extra, and slow to import

    name = await names.locate(qdrant, name, provenance)
    # An alias may change between two calls; a collection's own name does not.
    real = (await collection_aliases(qdrant)).get(name, name)
    vector_name = options.vector_name
    contents = await look(qdrant, real, vector_name)
    if contents is None:
        raise Missing(f"there is no collection {name}: nothing was indexed into it so far")
    claim = conflict(name, contents, provenance, adopt=options.adopt, vector_name=vector_name)
    if claim is not None:
        raise OtherSpace(claim)
    (numbers,) = vector.stack([query]).tolist()
    condition = None if where is None else models.Filter.model_validate(where)
    response = await qdrant.ask(
        lambda client: client.query_points(
            real,
            query=numbers,
            using=vector_name or None,
            limit=limit,
            query_filter=condition,
            with_payload=True,
        )
    )
    return [SearchHit(_id(point.id), point.score, point.payload or {}) for point in response.points]


def _id(value: object) -> int | str:
    return value if isinstance(value, int) else str(value)
