"""Keeps to what a provider takes in one call, when it is asked for more.

Parts are cut to the limits of the first route; a later route may take less.
"""

from collections.abc import Sequence

from providers.base import Context, Embedded, EmbeddingError, Input, InvalidAnswer, Space
from providers.limits import Limits
from providers.scheduling import batch_size

from .calls import Ask, Calls


def limits_of(provider: object) -> Limits:
    """Return what a provider says it takes in a call; the usual where it says nothing."""
    limits = getattr(provider, "limits", None)
    return limits if isinstance(limits, Limits) else Limits()


async def ask_within_limits(
    ask: Ask, limits: Limits, space: Space, inputs: Sequence[Input], context: Context
) -> Embedded:
    """Ask a provider, in several calls where it takes less in one than is wanted."""
    if len(inputs) == 1:
        return await ask(space, inputs, context)
    sizes, _ = await batch_size.sizes(space, inputs, limits.tokens, context)
    is_within = limits.tokens is None or sum(sizes) <= limits.tokens
    if len(inputs) <= limits.inputs and is_within:
        return await ask(space, inputs, context)
    calls = Calls(ask, space, inputs, context, limits.concurrency)

    async def one(places: range) -> None:
        failure = await calls.make(places)
        if isinstance(failure, EmbeddingError) and failure.index is not None:
            failure = failure.at(places[failure.index])
        elif isinstance(failure, InvalidAnswer) and len(places) == 1:
            failure = failure.at(places[0])
        if failure is not None:
            calls.failures.append(failure)

    return await calls.answer(map(one, batch_size.split(len(inputs), limits, sizes)))
