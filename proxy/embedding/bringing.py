"""Applies a width strategy to an answer: other vectors, and so another space."""

import asyncio
from collections.abc import Sequence
from dataclasses import replace

from embedding_proxy.providers import vector
from embedding_proxy.providers.base import InvalidAnswer, Space, Vector

from .result import Result
from .strategies import find
from .widths import BUILT_IN


async def apply_dimension_strategy(result: Result) -> Result:
    """Return an answer at its width, where the model's width is a matter of a strategy.

    Nothing of it is cached: that is the model's own vector. Raises InvalidAnswer.
    """
    name, native = result.model.width, result.space.dimensions
    if name in BUILT_IN or result.fallback or result.dimensions == native:
        return result
    vectors = await asyncio.to_thread(_bring, name, result.embedded.vectors, result.dimensions)
    embedded = replace(result.embedded, vectors=vectors, again=None)
    return replace(result, space=space_of(name, result.space, result.dimensions), embedded=embedded)


def space_of(name: str, space: Space, dimensions: int) -> Space:
    """Return the space of what a strategy makes of vectors of a space."""
    return replace(
        space,
        name=f"{space.name}~{name}-{find(name).version}",
        dimensions=dimensions,
        matryoshka=False,
        unit_norm=False,
    )


def _bring(name: str, vectors: Sequence[Vector], dimensions: int) -> list[Vector]:
    try:
        rows = vector.rows(find(name).bring(vector.stack(vectors), dimensions))
        if len(rows) != len(vectors):
            raise vector.VectorError(f"{len(rows)} vectors for {len(vectors)}")  # noqa: TRY301
        for row in rows:
            vector.check(row, dimensions)
    except Exception as error:
        why = str(error) or type(error).__name__
        raise InvalidAnswer(f"width {name}", f"the strategy failed: {why}") from error
    return rows
