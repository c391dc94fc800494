"""A request on its way through the scheduler, and its inputs that wait for a vector.

An input has an identity and a history: it is queued, sent, sent again and answered as one object,
whichever other inputs share its calls. Only here is it known which place in which request it has.
"""

import asyncio
from collections.abc import Collection, Iterable, Sequence
from typing import NamedTuple, Protocol

from embedding_proxy.providers.base import Context, Embedded, Input, Space
from embedding_proxy.providers.charge import Bill
from embedding_proxy.providers.client_credential import Credential
from embedding_proxy.providers.errors import (
    DeadlineExceeded,
    EmbeddingError,
    InvalidRequest,
    LocalQueueFull,
    ProviderError,
)
from embedding_proxy.providers.routing import policy
from embedding_proxy.providers.routing.route import Route
from embedding_proxy.providers.routing.router import Router

from .assembly import assemble, rows_of


class FailedAttempt(NamedTuple):
    """An attempt that brought no vector for an input."""

    route: Route
    error: ProviderError
    was_limited: bool = False
    """Whether the rate limit of the route was known before its first attempt there."""
    is_unexplained: bool = False
    """Whether one input of the call may be to blame: it was not counted against the provider."""
    is_counted: bool = False
    """Whether it was counted against the provider."""


class PendingInput:
    """One input of one request, until its vector is there or the request has failed."""

    __slots__ = (
        "batches",
        "count",
        "failures",
        "index",
        "input",
        "is_alone",
        "is_queued",
        "max_batch",
        "max_tokens",
        "passed",
        "request",
        "searches",
        "story",
    )

    def __init__(
        self,
        request: "PendingRequest",
        index: int,
        item: Input,
        max_tokens: int = 0,
        count: int | None = None,
    ) -> None:
        self.request = request
        self.index = index
        """Its place in the request."""
        self.input = item
        self.max_tokens = max_tokens
        """Tokens it has at most, as far as anyone has looked."""
        self.count = count
        """Its exact number of tokens, where the space's tokenizer has counted them."""
        self.max_batch: int | None = None
        """Inputs in a call that it may be part of, after a larger call was refused as too large."""
        self.story: tuple[Route, ...] = ()
        """The route of each attempt so far, in order, also of those under way."""
        self.passed: tuple[Route, ...] = ()
        """Routes whose queue had no room in time: no attempt was made."""
        self.failures: tuple[FailedAttempt, ...] = ()
        self.is_alone = False
        """Whether it goes in a call of its own: an answer to several was bad in parts."""
        self.searches = 0
        """How often another input of its batch was found to be bad."""
        self.is_queued = False
        """Whether it is in a queue, or waits for the time to come back to one."""
        self.batches: tuple[Call, ...] = ()
        """The calls under way for it; more than one while a second route is asked beside."""

    def forget_attempt(self, route: Route) -> None:
        """Take the last attempt at a route out of its history: it says nothing of the route."""
        story = [*self.story]
        story.reverse()
        story.remove(route)
        self.story = tuple(reversed(story))

    @property
    def is_missing(self) -> bool:
        """Whether its vector has not come yet."""
        return self.index in self.request.missing

    @property
    def is_pursued(self) -> bool:
        """Whether it is in a queue or on the wire: then what comes of that decides."""
        return self.is_queued or bool(self.batches)

    @property
    def is_wanted(self) -> bool:
        """Whether it is worth a call: it is missing, and its request goes on."""
        return self.request.is_open and self.index in self.request.missing


class PendingRequest:
    """The inputs that one caller waits for, and what has come of them.

    It ends when no input is missing, or after a failure as soon as none of its calls is under way:
    what was asked for is paid for, and is kept.
    """

    def __init__(
        self,
        inputs: Sequence[Input],
        context: Context,
        max_tokens: Iterable[int],
        counts: Sequence[int | None],
    ) -> None:
        self.context = context
        self.inputs = [
            PendingInput(self, index, item, tokens, counts[index])
            for index, (item, tokens) in enumerate(zip(inputs, max_tokens, strict=True))
        ]
        self.count = len(inputs)
        """How many inputs it has."""
        self.missing: dict[int, None] = dict.fromkeys(range(len(inputs)))
        """The places for which nothing has come yet, in order."""
        self.searching: list[Bisection] = []
        """Searches for bad inputs of it, the one that is under way first: one at a time."""
        self.searches = 0
        """Bad inputs of it that were searched for."""
        self.has_left = False
        """Whether its client has gone before its time was up."""
        self.patience_s = policy.MAX_WAIT_S
        """Seconds for which it still waits for the end of rate limits."""
        self._parts: list[tuple[Sequence[int], Embedded]] = []
        self._failures: list[Exception] = []
        self._calls = 0
        self._is_over = False
        self._answer: asyncio.Future[Embedded] = asyncio.get_running_loop().create_future()

    @property
    def is_open(self) -> bool:
        """Whether further calls may be made for it."""
        return not self._failures and not self._answer.done()

    @property
    def is_waited_for(self) -> bool:
        """Whether its caller still waits, though it may have failed by now."""
        return not (self._is_over or self._answer.done())

    @property
    def has_client(self) -> bool:
        """Whether its client waits, or has waited until its time was up."""
        has_waiters = self.context.has_waiters
        return not self.has_left and (has_waiters is None or has_waiters())

    @property
    def has_answers(self) -> bool:
        """Whether any of its inputs was answered so far."""
        return len(self.missing) < self.count

    @property
    def has_refusal(self) -> bool:
        """Whether one of its inputs is known to be refused."""
        return any(isinstance(failure, InvalidRequest) for failure in self._failures)

    async def result(self) -> Embedded:
        """Return the whole answer, in the order of the inputs. Raises EmbeddingError.

        When its deadline passes, or nobody waits any more, what is queued is dropped; it ends when
        the calls under way have ended.
        """
        context = self.context
        expiry = None
        if context.deadline is not None:
            loop = asyncio.get_running_loop()
            if context.deadline <= loop.time():
                self.expire()
            else:
                expiry = loop.call_at(context.deadline, self.expire)
        if context.abandoned is not None:
            context.abandoned.add_done_callback(self._leave)
        try:
            return await self._answer
        except asyncio.CancelledError:
            if self._parts and not (self.missing or self._failures):
                # It was cancelled in the turn in which the last part came: that is told to nobody.
                await self._tell(*self._parts[-1])
            raise
        finally:
            # They know their request: left like this, only the collector of garbage could end both.
            self.inputs.clear()
            self._leave()
            if expiry is not None:
                expiry.cancel()
            if context.abandoned is not None:
                context.abandoned.remove_done_callback(self._leave)

    def expire(self) -> None:
        """Drop what is queued: the time is up."""
        self._is_over = True
        self.fail(DeadlineExceeded("the time of the request was up"))

    def _leave(self, _: object = None) -> None:
        """Drop what is queued: nobody waits any more."""
        if not self._is_over and not self._answer.done():
            deadline = self.context.deadline
            self.has_left = deadline is None or self._answer.get_loop().time() < deadline
        self._is_over = True
        if not self._answer.done():
            self.fail(DeadlineExceeded("nobody waits for the answer any more"))

    def fail(self, error: Exception) -> None:
        """Note a failure; no further call is made for this request."""
        self._failures.append(error)
        self._settle()

    def begin_call(self, inputs: Sequence[PendingInput] = ()) -> None:
        """Note that a call for some of its inputs is about to be made, or a search is."""
        self._calls += 1
        if inputs and self.context.on_begin is not None:
            self.context.on_begin([pending.index for pending in inputs])

    def end_call(self) -> None:
        """Note that such a call has ended, in whatever way."""
        self._calls -= 1
        self._settle()

    def _settle(self) -> None:
        if self._failures and not self._calls and not self._answer.done():
            self._answer.set_exception(min(self._failures, key=rank))

    async def take(self, indices: Sequence[int], part: Embedded) -> None:
        """Take the answer to some inputs; what is not new is left out.

        The last part of an answer is returned with the whole; every other one is told at once.
        """
        new = [row for row, index in enumerate(indices) if index in self.missing]
        if not new:
            return
        if len(new) < len(indices):
            indices, part = [indices[row] for row in new], rows_of(part, new)
        self._parts.append((indices, part))
        for index in indices:
            del self.missing[index]
        if not self.missing and self.is_open:
            self._answer.set_result(assemble(self._parts))
        else:
            await self._tell(indices, part)

    async def _tell(self, indices: Sequence[int], part: Embedded) -> None:
        if self.context.on_part is not None:
            await self.context.on_part(indices, part)

    def charge(self, bill: Bill) -> None:
        """Tell what was charged for some of its inputs; the places of the bill are theirs."""
        if self.context.on_charge is not None:
            self.context.on_charge(bill)


class Call(Protocol):
    """A call under way for some inputs."""

    def end_unneeded(self) -> None:
        """End the wait for it if none of its inputs needs it any more."""
        ...


class Bisection(Protocol):
    """A search for a bad input, of which some pending inputs are a half."""

    is_internal: bool

    def wants(self, pending: PendingInput) -> bool:
        """Tell whether an input is worth a call, though its request may have failed."""
        ...

    def proceed(self) -> None:
        """Go on, as the only search for its request."""
        ...

    def note(
        self,
        inputs: Sequence[PendingInput],
        missing: Sequence[PendingInput],
        error: EmbeddingError | None,
        *,
        culprit: PendingInput | None = None,
        is_answered: bool = False,
    ) -> None:
        """Note what came of inputs of a half, of which some are still missing."""
        ...


class QueueKey(NamedTuple):
    """What inputs must have in common to go in one call."""

    space: Space
    user: str | None
    credential: Credential | None
    neutral: tuple[tuple[str, bytes], ...]
    routes: tuple[Route, ...]
    """The routes that may be asked for them."""
    story: tuple[Route, ...] = ()
    """The routes of the attempts so far."""
    passed: tuple[Route, ...] = ()
    """Routes that had no room in time."""
    route: Route | None = None
    """The route that is to be asked again; None = the policy chooses."""
    is_rested: bool = False
    """Whether they have waited as long as that route asked for."""
    is_alone: bool = False
    search: Bisection | None = None
    """The search that they are a half of."""
    half: int = 0


class Queues(Protocol):
    """Takes back inputs that are to be sent again: the scheduler."""

    router: Router

    def add_again(
        self,
        key: QueueKey,
        inputs: Sequence[PendingInput],
        route: Route | None = None,
        *,
        search: Bisection | None = None,
        half: int = 0,
    ) -> None:
        """Queue inputs once more; `route`: asks this one, and no other."""
        ...

    def add_later(
        self, wait_s: float, key: QueueKey, inputs: Sequence[PendingInput], route: Route | None
    ) -> None:
        """Queue inputs once more when so many seconds have passed."""
        ...


def rank(error: BaseException) -> tuple[bool, bool, bool, int]:
    """Order failures by how much they say: a refused input by its place, then other refusals.

    Of the rest the first counts; what no call was made for says least.
    """
    is_refusal = isinstance(error, InvalidRequest)
    index = error.index if isinstance(error, EmbeddingError) else None
    return (
        isinstance(error, LocalQueueFull | DeadlineExceeded),
        not is_refusal,
        index is None,
        index or 0,
    )


def requests_of(inputs: Iterable[PendingInput]) -> dict[PendingRequest, list[PendingInput]]:
    """Return the requests of some inputs, in order, each with its own of them."""
    inputs_of: dict[PendingRequest, list[PendingInput]] = {}
    for pending in inputs:
        inputs_of.setdefault(pending.request, []).append(pending)
    return inputs_of


def min_retries(requests: Collection[PendingRequest]) -> int | None:
    """Return what holds for all of some requests of `Context.client_retries`."""
    counts = [request.context.client_retries for request in requests]
    numbers = [count for count in counts if count is not None]
    return min(numbers) if len(numbers) == len(counts) else None


def max_deadline(requests: Collection[PendingRequest]) -> float | None:
    """Return the deadline of the most patient of some requests; None where one has none."""
    deadlines = [request.context.deadline for request in requests]
    points = [deadline for deadline in deadlines if deadline is not None]
    return max(points) if len(points) == len(deadlines) else None
