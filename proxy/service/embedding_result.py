"""What a service gives for the inputs of a request, whoever asked."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Optional

from embedding_proxy.cache.cached_hit import CountedEmbeddings
from embedding_proxy.cache.ledger import Usage
from embedding_proxy.providers import vector
from embedding_proxy.providers.base import Input, Outcome, Space, Vector, slices
from embedding_proxy.providers.dimensions import check_heads, derive
from embedding_proxy.providers.errors import InvalidAnswer
from embedding_proxy.providers.similarity import similarities

from .model_registry import Model


@dataclass(slots=True, repr=False)
class Result:
    """The answer to n inputs, in their order."""

    model: Model
    """The one that was asked for."""
    space: Space
    """Of the vectors: another than the model's only if `fallback` is true."""
    dimensions: int
    """The width that was asked for."""
    embedded: CountedEmbeddings
    """The vectors at the model's own width, as bytes; tokens, outcomes, providers."""
    fallback: bool = False
    """Whether a model of another space stood in for the one that was asked for."""
    name: str = ""
    """Of the model that gave the vectors."""
    inputs: Sequence[Input] = ()
    """As they were embedded: token arrays as texts where they stand for some, cut if so wanted."""
    namespace: str = ""
    """The part of the cache in which they were looked up."""

    def __repr__(self) -> str:
        """Without inputs and vectors: what is printed may be long, and be read by others."""
        shape = len(self.embedded.vectors), self.dimensions
        counts = ", ".join(f"{n} {outcome}" for outcome, n in Counter(self.outcomes).items())
        return f"<Result: model {self.name!r}, vectors of shape {shape}, {counts}>"

    @property
    def vectors(self) -> vector.Floats:
        """The vectors as one array of float32, shape (n, dimensions)."""
        return vector.stack(derive(self.embedded.vectors, self.dimensions))

    def similarity(self, other: Optional["Result"] = None) -> vector.Floats:
        """Return the cosines of all vectors with all of another result, or of this; shape (n, m).

        Raises ValueError for vectors that do not compare: of another space, or another width.
        """
        other = other or self
        mine, theirs = ((result.space.label, result.dimensions) for result in (self, other))
        if mine != theirs:
            raise ValueError(
                "vectors of two spaces do not compare:"
                f" {mine[0]} at {mine[1]}, {theirs[0]} at {theirs[1]}"
            )
        rows, columns = (
            derive(result.embedded.vectors, result.dimensions) for result in (self, other)
        )
        return similarities(rows, columns)

    @property
    def outcomes(self) -> Sequence[Outcome]:
        """How each input was answered."""
        return self.embedded.outcomes

    @property
    def tokens(self) -> int:
        """Prompt tokens of all inputs: what an uncached request would have been charged."""
        return sum(self.embedded.tokens)

    @property
    def tokens_billed(self) -> int:
        """Prompt tokens that providers charged now."""
        return self.usage.tokens_billed

    @property
    def usage(self) -> Usage:
        """The sums: how many inputs were answered in which way, what was billed and saved."""
        return self.embedded.usage


def make_result(  # noqa: PLR0913, PLR0917 - what is known of an answer
    requested: Model,
    answering: Model,
    space: Space,
    width: int,
    inputs: Sequence[Input],
    embedded: CountedEmbeddings,
    namespace: str,
) -> Result:
    """Return the result that an answer is, of which every vector can be brought to the width."""
    fallback = answering.name != requested.name
    return Result(requested, space, width, embedded, fallback, answering.name, inputs, namespace)


def check(space: Space, width: int, vectors: Sequence[Vector]) -> None:
    """Check that vectors of a space can be brought to a width. Raises InvalidAnswer."""
    if width < space.dimensions:
        try:
            check_heads(vectors, width)
        except vector.VectorError as error:
            raise InvalidAnswer(space.name, f"a vector cannot be cut: {error}") from error


async def check_in_steps(space: Space, width: int, vectors: Sequence[Vector]) -> None:
    """Do the same for many vectors. Raises InvalidAnswer."""
    async for part in slices(vectors if width < space.dimensions else ()):
        check(space, width, part)
