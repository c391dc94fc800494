"""A request on its way through the scheduler, and its inputs that wait for a vector.

An input has an identity: it is queued, sent, sent again and answered as one object, whichever other
inputs share its calls. Only here is it known which place in which request it has.
"""

import asyncio
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace

from providers.base import (
    Bill,
    Context,
    DeadlineExceeded,
    Embedded,
    EmbeddingError,
    Full,
    Input,
    InputRefused,
)
from providers.batching.calls import Parts, rows_of


@dataclass(eq=False, slots=True)
class PendingInput:
    """One input of one request, until its vector is there or the request has failed."""

    request: "PendingRequest"
    index: int
    """Its place in the request."""
    input: Input
    max_tokens: int
    """Tokens it has at most, as far as anyone has looked."""
    count: int | None = None
    """Its exact number of tokens, where the space's tokenizer has counted them."""
    max_batch: int | None = None
    """Inputs in a call that it may be part of, after a larger call was refused as too large."""

    @property
    def is_missing(self) -> bool:
        """Whether its vector has not come yet."""
        return self.index in self.request.missing

    @property
    def is_wanted(self) -> bool:
        """Whether it is worth a call: it is missing, and its request goes on."""
        return self.is_missing and self.request.is_open


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
        self.search_lock = asyncio.Lock()
        """Held while one of its batches is searched for a bad input: one is enough."""
        self._parts = Parts(len(inputs))
        self._failures: list[Exception] = []
        self._calls = 0
        self._is_over = False
        self.has_left = False
        """Whether its client has gone before its time was up."""
        self.searches = 0
        """Bad inputs of it that were searched for."""
        self._answer: asyncio.Future[Embedded] = asyncio.get_running_loop().create_future()

    @property
    def missing(self) -> Collection[int]:
        """The places for which nothing has come yet."""
        return self._parts.missing.keys()

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
        told = self.context.has_waiters
        return not self.has_left and (told is None or told())

    @property
    def has_answers(self) -> bool:
        """Whether any of its inputs was answered so far."""
        return len(self.missing) < self.count

    @property
    def has_refusal(self) -> bool:
        """Whether one of its inputs is known to be refused."""
        return any(isinstance(failure, InputRefused) for failure in self._failures)

    async def result(self) -> Embedded:
        """Return the whole answer, in the order of the inputs. Raises EmbeddingError.

        When its deadline passes, or nobody waits any more, what is queued is dropped; it ends when
        the calls under way have ended.
        """
        context = self.context
        expiry = None
        if context.deadline is not None:
            loop = asyncio.get_running_loop()
            expiry = loop.call_at(context.deadline, self.expire)
        if context.abandoned is not None:
            context.abandoned.add_done_callback(self._leave)
        try:
            return await self._answer
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
        deadline = self.context.deadline
        if not self._is_over and not self._answer.done():
            now = self._answer.get_loop().time()
            self.has_left = deadline is None or now < deadline
        self._is_over = True
        if not self._answer.done():
            self.fail(DeadlineExceeded("nobody waits for the answer any more"))

    def fail(self, error: Exception) -> None:
        """Note a failure; no further call is made for this request."""
        self._failures.append(error)
        self._settle()

    def begin_call(self, inputs: Sequence[PendingInput]) -> None:
        """Note that a call for some of its inputs is about to be made."""
        self._calls += 1
        if self.context.on_begin is not None:
            self.context.on_begin([one.index for one in inputs])

    def end_call(self) -> None:
        """Note that such a call has ended, in whatever way."""
        self._calls -= 1
        self._settle()

    def _settle(self) -> None:
        if self._failures and not self._calls and not self._answer.done():
            self._answer.set_exception(min(self._failures, key=_rank))

    async def take(self, indices: Sequence[int], part: Embedded) -> None:
        """Take the answer to some inputs; what is not new is left out.

        The last part of an answer is returned with the whole; every other one is told at once.
        """
        indices, part = self._parts.take(indices, part)
        if not indices:
            return
        if not self.missing and self.is_open:
            self._answer.set_result(self._parts.whole())
        elif self.context.on_part is not None:
            await self.context.on_part(indices, part)


def _rank(error: Exception) -> tuple[bool, bool, bool, int]:
    """Order failures by how much they say: a refused input by its place, then other refusals.

    Of the rest the first counts; what no call was made for says least.
    """
    is_refusal = isinstance(error, InputRefused)
    index = error.index if isinstance(error, EmbeddingError) else None
    return isinstance(error, Full | DeadlineExceeded), not is_refusal, index is None, index or 0


def by_request(
    inputs: Sequence[PendingInput], places: Sequence[int]
) -> dict[PendingRequest, list[int]]:
    """Return, for each request of a call, the positions in `places` of inputs of its own."""
    owned: dict[PendingRequest, list[int]] = {}
    for position, place in enumerate(places):
        owned.setdefault(inputs[place].request, []).append(position)
    return owned


def _min_retries(contexts: Sequence[Context]) -> int | None:
    """Return what holds for all of some requests of `Context.client_retries`."""
    counts = [context.client_retries for context in contexts]
    known = [count for count in counts if count is not None]
    return min(known) if len(known) == len(counts) else None


def call_context(inputs: Sequence[PendingInput], *, max_attempts: int | None = None) -> Context:
    """Return what goes along with a call for inputs of one or more requests.

    The call has the time of the most patient request. Each request is told of its own inputs, and
    is charged for them.
    """
    requests = [*dict.fromkeys(one.request for one in inputs)]
    contexts = [request.context for request in requests]
    deadlines = [context.deadline for context in contexts]
    known = [deadline for deadline in deadlines if deadline is not None]
    last = max(contexts, key=lambda one: -1.0 if one.deadline is None else one.deadline)

    async def hand_out(places: Sequence[int], part: Embedded) -> None:
        for request, positions in by_request(inputs, places).items():
            own = part if len(positions) == len(places) else rows_of(part, positions)
            await request.take([inputs[places[position]].index for position in positions], own)

    def charge(bill: Bill) -> None:
        whole = bill.at([one.index for one in inputs])
        for request, positions in by_request(inputs, bill.places).items():
            if request.context.on_charge is not None:
                request.context.on_charge(whole.rows(positions))

    return replace(
        contexts[0],
        deadline=max(known) if len(known) == len(deadlines) else None,
        begun=last.begun,
        has_waiters=lambda: any(request.has_client for request in requests),
        on_part=hand_out,
        counts={
            one.input: one.count
            for one in inputs
            if isinstance(one.input, str) and one.count is not None
        },
        on_charge=charge,
        client_retries=_min_retries(contexts),
        max_attempts=max_attempts,
        on_begin=None,
        abandoned=None,
        finishes_calls=True,
        # A call of a search is also for the inputs of a request that has failed: they are kept.
        is_needed=lambda: any(
            one.is_wanted or (max_attempts is not None and one.request.is_waited_for)
            for one in inputs
        ),
    )
