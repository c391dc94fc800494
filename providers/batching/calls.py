"""The calls made for one request: so many at a time, each answer handed on as soon as it is there.

What fails fails the request, but only when the calls in the air have ended: they are paid for.
"""

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Sequence
from dataclasses import replace
from typing import TypeAlias

from providers.base import (
    Context,
    Embedded,
    Full,
    Input,
    InputRefused,
    Outcome,
    Space,
    Vector,
)
from providers.slices import slices

Ask: TypeAlias = Callable[[Space, Sequence[Input], Context], Awaitable[Embedded]]
"""Asks for the vectors of some inputs, in one call."""


class Calls:
    """The calls that answer one request between them."""

    def __init__(
        self, ask: Ask, space: Space, inputs: Sequence[Input], context: Context, concurrency: int
    ) -> None:
        self.space = space
        self.failures: list[Exception] = []
        """What ends the request; once there is one, no further part is begun."""
        self._ask = ask
        self._inputs = inputs
        self._context = context
        self._turns = asyncio.Semaphore(concurrency)
        self._parts: list[tuple[range, Embedded]] = []

    @property
    def answered(self) -> bool:
        """Whether any call was answered so far."""
        return bool(self._parts)

    async def make(self, places: range, *, anyway: bool = False) -> Exception | None:
        """Make one call for the inputs at these places; return what it fails with, or None.

        It is left out when the request has failed while it waited for its turn, unless `anyway`.
        """
        async with self._turns:
            if self.failures and not anyway:
                return None
            inputs = [self._inputs[place] for place in places]
            try:
                part = await self._ask(self.space, inputs, self._context_of(places))
            except Exception as error:  # noqa: BLE001 - raised when the other calls have ended
                return error
        self._parts.append((places, part))
        if self._context.on_part is not None and len(places) < len(self._inputs):
            await self._context.on_part(places, part)
        return None

    def _context_of(self, whole: range) -> Context:
        """Return what goes along with a part: parts of it are parts of the whole."""
        context = self._context
        if len(whole) == len(self._inputs):
            return context
        on_part, on_charge = context.on_part, context.on_charge
        if on_part is not None:

            async def keep(places: Sequence[int], part: Embedded) -> None:
                await on_part([whole[place] for place in places], part)

            context = replace(context, on_part=keep)
        if on_charge is not None:
            context = replace(context, on_charge=lambda bill: on_charge(bill.at(whole)))
        return context

    async def answer(self, parts: Iterable[Coroutine[object, object, None]]) -> Embedded:
        """Do what answers the parts, side by side, and put the answers together in order.

        Raises EmbeddingError: a refusal before anything else, for no second try would change it.
        """
        async with asyncio.TaskGroup() as group:
            for part in parts:
                group.create_task(part)
        if self.failures:
            raise min(self.failures, key=_weight)
        answered = sum(len(places) for places, _ in self._parts)
        if answered != len(self._inputs):
            raise RuntimeError(f"{answered} inputs answered of {len(self._inputs)}")
        return assembled(self._parts)


def _weight(error: Exception) -> tuple[bool, bool, bool, int]:
    """Order failures: refused inputs by their places, other refusals, the rest as they came.

    What no call was made for says least.
    """
    refused = isinstance(error, InputRefused)
    index = error.index if isinstance(error, InputRefused) else None
    return isinstance(error, Full), not refused, index is None, index or 0


class Parts:
    """What has come so far of the answers to the inputs of one request, from whomever."""

    def __init__(self, inputs: int) -> None:
        self.missing = dict.fromkeys(range(inputs))
        """The places for which nothing has come yet, in order."""
        self._parts: list[tuple[Sequence[int], Embedded]] = []

    def take(self, places: Sequence[int], part: Embedded) -> tuple[Sequence[int], Embedded]:
        """Keep what is new of a part, and return that: its places, which may be none."""
        new = [i for i, place in enumerate(places) if place in self.missing]
        if len(new) < len(places):
            places, part = [places[i] for i in new], rows_of(part, new)
        if new:
            self._parts.append((places, part))
        for place in places:
            del self.missing[place]
        return places, part

    def whole(self) -> Embedded:
        """Return the answer to the request, when nothing is missing."""
        return assembled(self._parts)


def rows_of(part: Embedded, rows: Sequence[int]) -> Embedded:
    """Return the answers in some rows of a part."""
    return replace(
        part,
        vectors=[part.vectors[i] for i in rows],
        tokens=[part.tokens[i] for i in rows],
        outcomes=[part.outcomes[i] for i in rows] if part.outcomes else (),
    )


def assembled(parts: Sequence[tuple[Sequence[int], Embedded]]) -> Embedded:
    """Put the answers to all places of a request into their order."""
    if len(parts) == 1:
        return parts[0][1]
    whole = Whole(sum(len(places) for places, _ in parts))
    for places, part in parts:
        whole.add(places, part.vectors, part.tokens, _outcomes(part))
    return whole.embedded(parts)


async def assembled_in_steps(parts: Sequence[tuple[Sequence[int], Embedded]]) -> Embedded:
    """Do the same for any number of places; others get their turn."""
    whole = Whole(sum(len(places) for places, _ in parts))
    for places, part in parts:
        outcomes = _outcomes(part)
        async for rows in slices(range(len(places))):
            some = slice(rows[0], rows[-1] + 1)
            whole.add(places[some], part.vectors[some], part.tokens[some], outcomes[some])
    return whole.embedded(parts)


class Whole:
    """The answer to `count` inputs, put together of parts; `outcome` is that of all others."""

    def __init__(self, count: int, outcome: Outcome = Outcome.MISS) -> None:
        self.vectors: list[Vector] = [b""] * count
        self.tokens = [0] * count
        self.outcomes = [outcome] * count

    def add(
        self,
        places: Sequence[int],
        vectors: Sequence[Vector],
        tokens: Sequence[int],
        outcomes: Sequence[Outcome],
    ) -> None:
        """Add the answers to some places."""
        for place, vector, number, outcome in zip(places, vectors, tokens, outcomes, strict=True):
            self.vectors[place] = vector
            self.tokens[place] = number
            self.outcomes[place] = outcome

    def embedded(self, parts: Sequence[tuple[Sequence[int], Embedded]]) -> Embedded:
        """Return it, when all parts are in it."""
        ordered = sorted(parts, key=lambda part: part[0][0])
        return Embedded(
            vectors=self.vectors,
            tokens=self.tokens,
            counted=all(part.counted for _, part in ordered),
            providers=tuple(dict.fromkeys(name for _, part in ordered for name in part.providers)),
            outcomes=self.outcomes,
        )


def _outcomes(part: Embedded) -> Sequence[Outcome]:
    return part.outcomes or [Outcome.MISS] * len(part.vectors)
