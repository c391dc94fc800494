"""Asks for many inputs in parts: within the upstream's limits, side by side, each kept at once.

A refusal that a smaller call may not meet, or that is about one input of many, is followed down by
halves, so that what is good is bought and what is bad is named.
"""

import asyncio
from collections.abc import Sequence
from dataclasses import replace

from providers.batching.calls import Calls
from providers.batching.refused import is_about_a_field, is_about_an_input, is_about_size

from .base import Context, Embedded, Embedder, Input, InputRefused, Space
from .batching import split
from .limits import Limits


class Batcher:
    """An Embedder that divides a request among calls of another one.

    `InputRefused.index` of what it raises is the place among the inputs it was given. Extra calls
    to find that place: two for each halving of one part, so at most 2 × log2 of its inputs.
    """

    def __init__(self, inner: Embedder, limits: Limits, least: int = split.LEAST) -> None:
        """`least` inputs are in a part that is made for speed alone."""
        self._inner = inner
        self._limits = limits
        self._least = least

    async def embed(self, space: Space, inputs: Sequence[Input], context: Context) -> Embedded:
        """Return the answers of all parts in order. A failure is raised when all in the air ended.

        Parts that were answered were told to `context.on_part`, also when others failed.
        """
        sizes = await split.sizes(space, inputs, self._limits.tokens, context)
        if sizes is not None and space.tokenizer is not None:
            counts = zip(inputs, sizes, strict=True)
            context = replace(context, counts={i: n for i, n in counts if isinstance(i, str)})
        limits = split.side_by_side(len(inputs), self._limits, self._least)
        parts = split.split(len(inputs), limits, sizes)
        calls = Calls(self._inner.embed, space, inputs, context, limits.concurrency)
        halver = _Halver(calls)
        return await calls.answer(map(halver.get, parts))


class _Halver:
    """Gets parts, by halves where they are refused as a whole."""

    def __init__(self, calls: Calls) -> None:
        self._calls = calls
        self._searching = asyncio.Lock()

    async def get(self, places: range) -> None:
        """Get a part; what it fails with is noted."""
        failure = await self._calls.make(places)
        if failure is None:
            return
        if is_about_size(failure) and len(places) > 1:
            async with asyncio.TaskGroup() as group:
                for half in split.halves(places):
                    group.create_task(self.get(half))
        elif is_about_an_input(failure) and len(places) > 1:
            # Parts refused for the same reason are not all searched: one bad input is enough.
            async with self._searching:
                if any(isinstance(known, InputRefused) for known in self._calls.failures):
                    return
                left_out = await self._search(places, failure)
            for part in left_out:
                await self.get(part)
        else:
            self._fail(failure, places)

    async def _search(self, places: range, refusal: InputRefused) -> list[range]:
        """Find the input for which a part was refused; buy the halves that it is not in.

        If there is none, return the halves that were refused on the way, and not looked into.
        """
        proved = False
        left_out: list[range] = []
        while is_about_an_input(refusal) and len(places) > 1:
            both = split.halves(places)
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(self._calls.make(h, anyway=True)) for h in both]
            results = [task.result() for task in tasks]
            refused = [
                (half, result)
                for half, result in zip(both, results, strict=True)
                if isinstance(result, InputRefused)
            ]
            self._calls.failures += [
                result
                for result in results
                if result is not None and not isinstance(result, InputRefused)
            ]
            if not refused:
                # If both were answered, they were only too much together.
                return left_out
            # Only where others are taken is it the input that is refused.
            proved = proved or None in results
            (places, refusal), *others = refused
            left_out += [half for half, _ in others]
            if not proved and self._calls.space.parameters and len(set(map(str, results))) == 1:
                # It is a field that the client sent along; to go on would cost calls for nothing.
                break
        self._fail(refusal, places, proved=proved)
        return []

    def _fail(self, failure: Exception, places: range, *, proved: bool = True) -> None:
        """Note a failure; a refusal of one input with its place."""
        if isinstance(failure, InputRefused):
            within = failure.index
            proved = proved or self._calls.answered
            if within is None and proved and len(places) == 1 and not is_about_a_field(failure):
                within = 0
            if within is not None:
                failure = failure.at(places[within])
        self._calls.failures.append(failure)
