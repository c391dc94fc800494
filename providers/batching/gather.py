"""Puts small requests that come at about the same time into one call.

Clients that send one text at a time, many at once, would use up a rate limit, and pay for what
every call costs anew. Here they ride together, and none suffers for another: not for its bad input,
not for its leaving, not for its deadline.
"""

import asyncio
import contextlib
from collections.abc import Sequence
from typing import NamedTuple
from weakref import WeakValueDictionary

from providers.base import (
    Bill,
    Context,
    Credential,
    DeadlineExceeded,
    Embedded,
    Embedder,
    Input,
    InputRefused,
    Space,
)
from providers.batcher import Batcher
from providers.limits import Limits

from .calls import Parts, rows_of
from .refused import is_about_an_input

SMALL = 64
"""Inputs; a larger request is a batch by itself."""
LEAST = 256
"""Inputs in a part of a gathered call: those who gather want few calls more than quick ones."""
IN_THE_AIR = 2
"""Calls at a time of those who may ride together; the next ones gather until one has landed, so
that calls grow with the load and not in number."""
LONGEST_WAIT = 1.0
"""Seconds after which a call goes without its turn: a hanging upstream holds up nobody for long."""
ROUNDS = 3
"""Refused inputs that are left out one by one; with more of them, each rides alone."""


class Line(NamedTuple):
    """Those who may ride together: one call has one space, user, key and neutral fields."""

    space: Space
    user: str | None
    credential: Credential | None = None
    neutral: tuple[tuple[str, bytes], ...] = ()


class Gatherer:
    """A batcher that holds small requests for up to `window_s` seconds, to make one of several.

    Everyone is answered as soon as its own part is there.
    """

    def __init__(self, inner: Embedder, limits: Limits, window_s: float) -> None:
        self._alone = Batcher(inner, limits)
        self._together = Batcher(inner, limits, LEAST)
        self._limits = limits
        self._window_s = window_s
        self._boarding: dict[Line, _Ride] = {}
        self._turns: WeakValueDictionary[Line, asyncio.Semaphore] = WeakValueDictionary()

    async def embed(self, space: Space, inputs: Sequence[Input], context: Context) -> Embedded:
        """Return the answer to a request, which may have been part of a larger one.

        Raises EmbeddingError: the request's own, or one that is of all alike.
        """
        if len(inputs) > SMALL:
            return await self._alone.embed(space, inputs, context)
        line = Line(space, context.user, context.credential, context.neutral)
        ride = self._boarding.get(line)
        if ride is None:
            ride = self._boarding[line] = _Ride(self._together, line, self._limits)
            ride.task = asyncio.create_task(self._drive(line, ride))
        rider = _Rider(inputs, context)
        ride.board(rider)
        try:
            async with asyncio.timeout_at(context.deadline):
                return await rider.answer
        except TimeoutError as error:
            raise DeadlineExceeded("the time of the request was up") from error
        finally:
            if ride.leave(rider):
                self._depart(line, ride)

    async def _drive(self, line: Line, ride: "_Ride") -> None:
        """Wait for company, then for a turn; then go."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._window_s):
                await ride.full.wait()
        turns = self._turns.setdefault(line, asyncio.Semaphore(IN_THE_AIR))
        has_turn = False
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(LONGEST_WAIT):
                has_turn = await turns.acquire()
        self._depart(line, ride)
        try:
            await ride.go()
        finally:
            if has_turn:
                turns.release()

    def _depart(self, line: Line, ride: "_Ride") -> None:
        """Let nobody board any more."""
        if self._boarding.get(line) is ride:
            del self._boarding[line]


class _Rider:
    """One request, and what has come for it."""

    def __init__(self, inputs: Sequence[Input], context: Context) -> None:
        self.inputs = inputs
        self.context = context
        self.parts = Parts(len(inputs))
        self.answer: asyncio.Future[Embedded] = asyncio.get_running_loop().create_future()

    async def take(self, places: Sequence[int], part: Embedded) -> None:
        """Take what is new; keep what will not be part of an answer."""
        places, part = self.parts.take(places, part)
        if not places:
            return
        if not self.parts.missing and not self.answer.done():
            self.answer.set_result(self.parts.whole())
        elif self.context.on_part is not None:
            await self.context.on_part(places, part)

    def fail(self, error: Exception) -> None:
        """Tell the one who waits, if it still does."""
        if not self.answer.done():
            self.answer.set_exception(error)


class _Ride:
    """Some requests in one call; what goes wrong for one of them is seen to by further calls."""

    def __init__(self, inner: Embedder, line: Line, limits: Limits) -> None:
        self.full = asyncio.Event()
        self.task: asyncio.Task[None] | None = None
        self._inner = inner
        self._line = line
        self._limits = limits
        self._riders: list[_Rider] = []

    def board(self, rider: _Rider) -> None:
        """Take one along."""
        self._riders.append(rider)
        if sum(len(one.inputs) for one in self._riders) >= self._limits.inputs:
            self.full.set()

    def leave(self, rider: _Rider) -> bool:
        """Let one go, answered or not; tell whether it was the last one, and all is called off."""
        if rider.answer.done() and not rider.answer.cancelled():
            rider.answer.exception()
        rider.answer.cancel()
        over = not self._waiting()
        if over and self.task is not None:
            self.task.cancel()
        return over

    def _waiting(self) -> list[_Rider]:
        return [rider for rider in self._riders if not rider.answer.done()]

    async def go(self) -> None:
        """Answer everyone."""
        for _ in range(ROUNDS):
            riders = self._waiting()
            if not riders:
                return
            failure = await self._call(riders)
            if not isinstance(failure, InputRefused) or failure.index is None:
                break
        else:
            failure = None
        riders = self._waiting()
        if failure is not None and (len(riders) == 1 or not is_about_an_input(failure)):
            for rider in riders:
                rider.fail(failure)
            return
        # Somebody's input is refused, or many are: as they would be without this file.
        turns = asyncio.Semaphore(self._limits.concurrency)

        async def alone(rider: _Rider) -> None:
            async with turns:
                failure = await self._call([rider])
            if failure is not None:
                rider.fail(failure)

        async with asyncio.TaskGroup() as group:
            for rider in riders:
                group.create_task(alone(rider))

    async def _call(self, riders: Sequence[_Rider]) -> Exception | None:
        """Ask for all that is missing, and hand it out; return what was everyone's failure."""
        seats = [(rider, place) for rider in riders for place in rider.parts.missing]
        deadlines = [rider.context.deadline for rider in riders]
        known = [deadline for deadline in deadlines if deadline is not None]

        async def hand_out(places: Sequence[int], part: Embedded) -> None:
            for rider, rows in _each_ones(seats, places).items():
                await rider.take([seats[places[i]][1] for i in rows], rows_of(part, rows))

        def charge(bill: Bill) -> None:
            theirs = bill.at([place for _, place in seats])
            for rider, rows in _each_ones(seats, bill.places).items():
                if rider.context.on_charge is not None:
                    rider.context.on_charge(theirs.rows(rows))

        context = Context(
            deadline=max(known) if len(known) == len(deadlines) else None,
            user=self._line.user,
            on_part=hand_out,
            counts={text: n for one in riders for text, n in one.context.counts.items()},
            account=riders[0].context.account,
            on_charge=charge,
            credential=self._line.credential,
            neutral=self._line.neutral,
        )
        inputs = [rider.inputs[place] for rider, place in seats]
        try:
            await hand_out(
                range(len(seats)), await self._inner.embed(self._line.space, inputs, context)
            )
        except Exception as error:  # noqa: BLE001 - raised where someone waits
            if not isinstance(error, InputRefused) or error.index is None:
                return error
            rider, place = seats[error.index]
            rider.fail(error.at(place))
            return error
        return None


def _each_ones(
    seats: Sequence[tuple[_Rider, int]], places: Sequence[int]
) -> dict[_Rider, list[int]]:
    """Return which rows of something about these places of a call are whose."""
    rows: dict[_Rider, list[int]] = {}
    for i, place in enumerate(places):
        rows.setdefault(seats[place][0], []).append(i)
    return rows
