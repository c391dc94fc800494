"""Keeps to what a provider takes in one call, when it is asked for more.

Parts are cut to the limits of the first route; a later route may take less.
"""

from collections.abc import Sequence
from functools import partial
from typing import Protocol

from . import split
from .base import Context, Embedded, Input, InputRefused, Space
from .calls import Calls
from .limits import Limits


class Provider(Protocol):
    """What is asked here of a provider: one attempt."""

    async def ask(
        self, model: str, space: Space, inputs: Sequence[Input], context: Context
    ) -> Embedded:
        """Make one attempt at the upstream's `model`."""
        ...


def limits_of(provider: object) -> Limits:
    """Return what a provider says it takes in a call; the usual where it says nothing."""
    limits = getattr(provider, "limits", None)
    return limits if isinstance(limits, Limits) else Limits()


async def ask_within_limits(
    provider: Provider, model: str, space: Space, inputs: Sequence[Input], context: Context
) -> Embedded:
    """Ask a provider, in several calls where it takes less in one than is wanted."""
    limits = limits_of(provider)
    sizes = await split.sizes(space, inputs, limits.tokens)
    if len(inputs) <= limits.inputs and sizes is None:
        return await provider.ask(model, space, inputs, context)
    ask = partial(provider.ask, model)
    calls = Calls(ask, space, inputs, context, limits.concurrency)

    async def one(places: range) -> None:
        failure = await calls.make(places)
        if isinstance(failure, InputRefused) and failure.index is not None:
            failure = failure.at(places[failure.index])
        if failure is not None:
            calls.failures.append(failure)

    return await calls.answer(map(one, split.split(len(inputs), limits, sizes)))
