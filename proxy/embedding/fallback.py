"""Answers with the model that was asked for, or with one of another space that may stand in for it.

Only where the operator wrote it down (`fallback:`), and for the request as a whole: the vectors of
one answer are always of one space. What a model that stands in gives is cached under its own space
alone, so that the first model's vectors come back with the first model.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import TypeVar

from embedding_proxy.providers.base import ClientKeyRefused, EmbeddingError, InvalidRequest

from .registry import Model
from .widths import can_give

T = TypeVar("T")

log = logging.getLogger("embedding_proxy.fallback")


def fallback_models(model: Model, models: Mapping[str, Model], dimensions: int) -> list[Model]:
    """Return the models that may stand in for a model at that width, in the order preferred."""
    return [
        models[fallback.model]
        for fallback in model.fallbacks
        if can_give(models[fallback.model].space, dimensions, fallback.width)
    ]


async def embed_with_fallback(
    ask: Callable[[Model, float], Awaitable[T]], models: Sequence[Model], deadline: float
) -> T:
    """Ask one model after the other, and return the first answer.

    `ask` takes a model and the point on the event loop's clock by which it has to answer: each
    leaves the later ones an equal share of the time. A refusal of the inputs, or of the client's
    key, by the first model ends the matter; a later one may refuse what the first would take.
    Raises EmbeddingError: what the first model failed with, for that is the one asked for.
    """
    clock = asyncio.get_running_loop().time
    failure: EmbeddingError | None = None
    for place, model in enumerate(models):
        now = clock()
        try:
            return await ask(model, now + (deadline - now) / (len(models) - place))
        except EmbeddingError as error:
            if failure is None and isinstance(error, InvalidRequest | ClientKeyRefused):
                raise
            failure = failure or error
            for following in models[place + 1 : place + 2]:
                log.warning("%s: %s stands in: %s", model.name, following.name, error)
    assert failure is not None  # noqa: S101 - there is at least one model
    raise failure
