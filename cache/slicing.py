"""Answers a large request in slices, as if each were a request, and puts the answers together.

Whatever is done for each input of a request is so done for few of them at a time, and no step of
the event loop grows with the number of inputs. Inputs that are equal are asked for once, in
whichever slices they stand.
"""

import asyncio
from collections.abc import Awaitable, Callable, Iterator, Sequence
from typing import Any, NamedTuple, TypeAlias

from providers.base import Account, EmbeddingError, Input, Outcome, nanodollars
from providers.batching import calls
from providers.slices import SLICE, slices

from .flight import Fill
from .key import Keys
from .ledger import Answered
from .refusal import NotCached, renamed
from .usage import Usage

MAX_INPUTS = 2048
"""Inputs in a request that is answered as one."""
MAX_AT_ONCE = 8
"""Slices under way at a time: enough that no provider waits for inputs."""

Fills: TypeAlias = list[Fill[Any]]
Ask: TypeAlias = Callable[[Keys, Sequence[Input], Fills], Awaitable[Answered]]
"""Answers a slice, and adds the fills that it starts to a list."""


class Sliced(NamedTuple):
    """The answer to a request that was answered in slices."""

    answer: Answered
    duplicates: Usage
    """What of its usage no slice has counted: that of inputs which are equal to earlier ones."""
    is_repeatable: bool
    """Whether all of it was a hit, to a request that takes any entry."""


class _Places(NamedTuple):
    """The places of the inputs in a request."""

    first: list[int]
    """Of inputs that are equal to no earlier one."""
    duplicates: list[tuple[int, int]]
    """Of the others, each with the place of the first that it is equal to."""


async def answer_in_slices(
    ask: Ask, keys: Keys, inputs: Sequence[Input], account: Account, deadline: float | None
) -> Sliced:
    """Answer a request; its inputs have these keys. Raises EmbeddingError.

    After a failure nothing further is begun. It is raised when the calls under way have ended, or
    at the deadline, so that what was bought before is on disk.
    """
    places = await _find_duplicates(keys)
    work = _Work(ask, keys, inputs, places.first)
    await work.do(deadline)
    if work.missing:
        missing = {*work.missing}
        copies = [place for place, first in places.duplicates if first in missing]
        assert work.not_cached is not None  # noqa: S101 - something is missing
        raise NotCached(work.not_cached.terms, sorted([*missing, *copies]), len(keys))
    return await _assemble(work.parts, places.duplicates, len(keys), account)


async def _find_duplicates(keys: Keys) -> _Places:
    known: dict[bytes, int] = {}
    places = _Places([], [])
    async for some in slices(range(len(keys))):
        for place in some:
            first = known.setdefault(keys.digests[place], place)
            if first == place:
                places.first.append(place)
            else:
                places.duplicates.append((place, first))
    return places


class _Work:
    """The slices of one request on their way."""

    def __init__(
        self, ask: Ask, keys: Keys, inputs: Sequence[Input], places: Sequence[int]
    ) -> None:
        self._ask = ask
        self._keys = keys
        self._inputs = inputs
        self._slices: Iterator[Sequence[int]] = (
            places[start : start + SLICE] for start in range(0, len(places), SLICE)
        )
        self._fills: Fills = []
        """Those of slices that were not answered."""
        self._failures: list[EmbeddingError] = []
        self.parts: list[tuple[Sequence[int], Answered]] = []
        self.missing: list[int] = []
        """Places of what is not cached, where nothing may be bought."""
        self.not_cached: NotCached | None = None

    async def do(self, deadline: float | None) -> None:
        """Answer all slices, a few at a time. Raises EmbeddingError."""
        tasks = [asyncio.create_task(self._answer_slices()) for _ in range(MAX_AT_ONCE)]
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_EXCEPTION)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)
        if self._failures:
            going_on = [fill.task for fill in self._fills if not fill.task.done()]
            left = None if deadline is None else deadline - asyncio.get_running_loop().time()
            if going_on and (left is None or left > 0):
                await asyncio.wait(going_on, timeout=left)
            raise self._failures[0]
        for task in tasks:
            # What is no failure of an embedder is a defect.
            task.result()

    async def _answer_slices(self) -> None:
        for places in self._slices:
            digests = [self._keys.digests[place] for place in places]
            keys = Keys([self._keys.addresses[place] for place in places], digests)
            inputs = [self._inputs[place] for place in places]
            own: Fills = []
            try:
                answer = await self._ask(keys, inputs, own)
            except NotCached as error:
                self.not_cached = error
                self.missing += [places[place] for place in error.missing]
            except EmbeddingError as error:
                self._fills += own
                self._failures.append(renamed(error, places, len(self._keys)))
                raise
            except asyncio.CancelledError:
                self._fills += own
                raise
            else:
                self.parts.append((places, answer))
            await asyncio.sleep(0)


async def _assemble(
    parts: list[tuple[Sequence[int], Answered]],
    duplicates: Sequence[tuple[int, int]],
    count: int,
    account: Account,
) -> Sliced:
    whole = calls.Whole(count, Outcome.DUPLICATE)
    parts.sort(key=lambda part: part[0][0])
    is_repeatable = not duplicates and all(part.again is not None for _, part in parts)
    is_counted = all(part.counted for _, part in parts)
    names = dict.fromkeys(name for _, part in parts for name in part.providers)
    usage = Usage()
    while parts:
        await asyncio.sleep(0)
        # It is let go of at once: to free all of them together would be a long step, too.
        places, part = parts.pop()
        usage = usage.plus(part.usage)
        whole.add(places, part.vectors, part.tokens, part.outcomes)
    saved = 0
    async for some in slices(duplicates):
        for place, first in some:
            whole.vectors[place], whole.tokens[place] = whole.vectors[first], whole.tokens[first]
            saved += whole.tokens[place]
    copies = Usage(
        duplicates=len(duplicates),
        tokens_saved=saved,
        nanodollars_saved=nanodollars(saved, account.price),
    )
    answer = Answered(
        vectors=whole.vectors,
        tokens=whole.tokens,
        counted=is_counted,
        providers=tuple(names),
        outcomes=whole.outcomes,
        usage=usage.plus(copies),
    )
    return Sliced(answer, copies, is_repeatable)
