"""What a service can be asked beside vectors: how alike texts are, which are nearest to one.

For code of one's own; the proxy has no such routes. Nothing that is asked here is indexed.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from embedding_proxy.index.collection import Provenance
from embedding_proxy.index.failures import OtherSpace
from embedding_proxy.index.search import Found, search
from embedding_proxy.providers import likeness, vector
from embedding_proxy.proxy.config import ConfigError
from embedding_proxy.proxy.settings.schema import Settings

from .bringing import space_of
from .indexing import Indexing, collection_of
from .result import Result


@dataclass(frozen=True, slots=True)
class Near:
    """A text, and how near it is to the one that was asked about."""

    place: int
    """In the list that was given."""
    text: str
    score: float
    """The cosine."""


class SearchMixin(ABC):
    """Similarities and searches over whatever embeds."""

    settings: Settings
    indexing: Indexing | None

    @abstractmethod
    async def embed(
        self,
        inputs: str | Sequence[str | int | Sequence[int]],
        model: str,
        *,
        dimensions: int | None = None,
        parameters: Mapping[str, object] | None = None,
        index: object = None,
    ) -> Result:
        """Embed one input or several. Raises EmbeddingError."""

    async def similarity(
        self, one: str, other: str, model: str, *, dimensions: int | None = None
    ) -> float:
        """Return the cosine between two texts, -1…1. Raises EmbeddingError."""
        found = await self.embed([one, other], model, dimensions=dimensions, index=False)
        return float(found.similarity()[0, 1])

    async def nearest(
        self, query: str, texts: Sequence[str], k: int, model: str, *, dimensions: int | None = None
    ) -> list[Near]:
        """Return the k texts that are nearest to a query, the nearest first; of equals the earlier.

        Raises EmbeddingError.
        """
        if not texts:
            return []
        found = await self.embed([query, *texts], model, dimensions=dimensions, index=False)
        first, *others = vector.derive(found.embedded.vectors, found.dimensions)
        ranked = likeness.ranked(first, others, k)
        return [Near(place, texts[place], score) for place, score in ranked]

    async def query(  # noqa: PLR0913 - a question's parts, by name
        self,
        text: str,
        model: str,
        limit: int = 10,
        *,
        collection: str | None = None,
        dimensions: int | None = None,
        parameters: Mapping[str, object] | None = None,
        stored: Mapping[str, object] | None = None,
        where: Mapping[str, Any] | None = None,
    ) -> list[Found]:
        """Return what is nearest to a text in the collection of the model's space in Qdrant.

        It is the collection that the answers of this model, width and parameters are indexed into,
        unless one is named; one that holds vectors of another space or width is never searched.
        `stored` are the parameters of the vectors there, where they are others than the query's
        `parameters`, and the model is made for that: `input_type` "document" and "query". `where`
        is a filter in Qdrant's JSON. Raises EmbeddingError, QdrantFailure, and ConfigError without
        `index.qdrant`.
        """
        if self.indexing is None or self.settings.index.qdrant is None:
            raise ConfigError(
                "index.qdrant: is not set, so there is nothing to search; set its url"
            )
        asked = await self.embed(
            text, model, dimensions=dimensions, parameters=parameters, index=False
        )
        if asked.fallback:
            raise OtherSpace(
                f"{asked.name} stood in for {model}: its vectors compare with none of the"
                f" collection's; ask again when {model} answers"
            )
        space = asked.space
        if stored is not None:
            space = asked.model.space.with_parameters(stored)
            if asked.space.name != space.name:
                space = space_of(asked.model.width, space, asked.dimensions)
        qdrant = self.settings.index.qdrant
        name = collection or qdrant.collection
        name = name or collection_of(asked.name, space, asked.dimensions, qdrant)
        (numbers,) = vector.derive(asked.embedded.vectors, asked.dimensions)
        return await search(
            await self.indexing.indexer.connection(),
            name,
            Provenance(space.label, asked.dimensions),
            numbers,
            limit=limit,
            where=where,
            adopt=qdrant.adopt,
        )
