"""Keeps to what a provider takes in one call, when it is asked for more.

Parts are cut to the limits of the first route; a later route may take less.
"""

from collections.abc import Sequence

from providers.base import Context, Embedded, Input, InputRefused, Space
from providers.limits import Limits

from . import split
from .calls import Ask, Calls


def limits_of(provider: object) -> Limits:
    """Return what a provider says it takes in a call; the usual where it says nothing."""
    limits = getattr(provider, "limits", None)
    return limits if isinstance(limits, Limits) else Limits()


async def ask_within_limits(
    ask: Ask, limits: Limits, space: Space, inputs: Sequence[Input], context: Context
) -> Embedded:
    """Ask a provider, in several calls where it takes less in one than is wanted."""
    sizes = await split.sizes(space, inputs, limits.tokens, context)
    if len(inputs) <= limits.inputs and sizes is None:
        return await ask(space, inputs, context)
    calls = Calls(ask, space, inputs, context, limits.concurrency)

    async def one(places: range) -> None:
        failure = await calls.make(places)
        if isinstance(failure, InputRefused) and failure.index is not None:
            failure = failure.at(places[failure.index])
        if failure is not None:
            calls.failures.append(failure)

    return await calls.answer(map(one, split.split(len(inputs), limits, sizes)))
