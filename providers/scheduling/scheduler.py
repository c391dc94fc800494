"""One queue of pending inputs for each embedding space: batches out, vectors back.

Inputs of one request, of many requests, of a call that was too large or failed in part are all the
same thing here: pending inputs in a queue. A worker waits for a free slot among the calls that the
provider takes at a time, and only then takes from the queue what fits into one call. So while all
slots are taken, what comes is put together into few calls, and nobody waits for company.

A request suffers from no other one: not from its bad input, not from its leaving, not from its
deadline. A call that was begun is finished, and its answer is kept.
"""

import asyncio
import contextlib
from collections import deque
from collections.abc import Callable, Sequence
from typing import NamedTuple

from providers.base import Context, Credential, DeadlineExceeded, Embedded, Input, Space
from providers.limits import Limits

from . import batch_size
from .batch_limits import input_bytes
from .batch_sender import BatchSender
from .dispatcher import Dispatcher, NextRoute
from .pending import PendingInput, PendingRequest
from .tasks import Tasks

MAX_WINDOW_INPUTS = 64
"""Inputs; a larger request does not wait for others to come."""
MIN_WINDOW_BATCH = 256
"""Inputs in a batch where small requests wait for others: they want few calls, not quick ones."""
LIKELY = 0.8
"""The part of a call's usual time that is left when it is still worth beginning."""


class Scheduler:
    """An Embedder over a router: what requests want becomes batches within the route's limits.

    With `window_s`, small requests wait for so many seconds for others to share a call with.
    """

    def __init__(self, router: Dispatcher, tasks: Tasks | None = None, window_s: float = 0) -> None:
        self._router = router
        self._tasks = tasks or Tasks()
        self._window_s = window_s
        self._queues: dict[_Key, _Queue] = {}

    async def embed(self, space: Space, inputs: Sequence[Input], context: Context) -> Embedded:
        """Return the answer to a request, whichever calls it took, in the order of its inputs.

        Raises EmbeddingError when its calls under way have ended. Parts that were answered were
        told to `context.on_part` by then, also when others failed. `index` of what is raised is the
        place among the inputs. When the deadline passes, or the caller goes, what is queued is
        dropped, and what is on the wire is finished.
        """
        limits = self._router.next_route(context.credential, space).limits
        sizes, are_exact = await batch_size.sizes(space, inputs, limits.tokens, context)
        counts: Sequence[int | None] = sizes
        if not are_exact:
            counts = [context.counts.get(one) if type(one) is str else None for one in inputs]
        request = PendingRequest(inputs, context, sizes, counts)
        key = _Key(space, context.user, context.credential, context.neutral)
        queue = self._queues.get(key)
        if queue is None:
            queue = self._queues[key] = _Queue(self._router, key, self._tasks, self._forget)
        waits = self._window_s if len(inputs) <= MAX_WINDOW_INPUTS else 0
        min_inputs = MIN_WINDOW_BATCH if self._window_s else batch_size.MIN_INPUTS
        queue.add(request.inputs, waits, min_inputs)
        return await request.result()

    def _forget(self, key: "_Key") -> None:
        del self._queues[key]


class _Key(NamedTuple):
    """What inputs must have in common to go in one call."""

    space: Space
    user: str | None
    credential: Credential | None
    neutral: tuple[tuple[str, bytes], ...]


class _Queue:
    """The pending inputs that may share calls, and the workers that make these."""

    def __init__(
        self, router: Dispatcher, key: _Key, tasks: Tasks, forget: Callable[[_Key], None]
    ) -> None:
        self._router = router
        self._key = key
        self._tasks = tasks
        self._forget = forget
        self._sender = BatchSender(router, key.space, key.credential, self._add_first)
        self._inputs: deque[PendingInput] = deque()
        self._batch_inputs = 1
        """How many inputs make a batch: planned when inputs come, for all that wait then."""
        self._planned_for: Limits | None = None
        self._min_inputs = batch_size.MIN_INPUTS
        self._workers = 0
        self._idle_workers = 0
        """Those that wait for a slot, and have not taken a batch yet."""
        self._flush: asyncio.Handle | None = None

    def add(self, inputs: Sequence[PendingInput], wait_s: float, min_inputs: int) -> None:
        """Queue inputs, and see to it that they are sent: in this turn of the loop, or later."""
        self._inputs += inputs
        self._min_inputs = min_inputs
        is_full = bool(wait_s) and len(self._inputs) >= self._next_route().limits.inputs
        if self._flush is not None and not (wait_s and not is_full):
            self._flush.cancel()
            self._flush = None
        if self._flush is None:
            loop = asyncio.get_running_loop()
            wait_s = 0 if is_full else wait_s
            # Others that come in this turn of the loop share the call.
            self._flush = (
                loop.call_later(wait_s, self._send_all)
                if wait_s
                else loop.call_soon(self._send_all)
            )

    def _add_first(self, inputs: Sequence[PendingInput]) -> None:
        """Queue inputs before all others: they have waited longest."""
        self._inputs.extendleft(reversed(inputs))
        self._send_all()

    def _send_all(self) -> None:
        """Plan the batches for all that waits, and start the workers for them."""
        if self._flush is not None:
            self._flush.cancel()
            self._flush = None
        limits = self._next_route().limits
        self._plan(limits)
        self._start_workers(limits.concurrency)

    def _plan(self, limits: Limits) -> None:
        """Choose the size of the batches for all that waits."""
        waiting = len(self._inputs)
        self._planned_for = limits
        if waiting:
            share = batch_size.share(waiting, limits, self._min_inputs)
            self._batch_inputs = batch_size.even(waiting, share)

    def _next_route(self) -> NextRoute:
        return self._router.next_route(self._key.credential, self._key.space)

    def _start_workers(self, max_workers: int | None = None) -> None:
        """Start a worker for each batch that waits, as many as may work at a time."""
        wanted = -(-len(self._inputs) // self._batch_inputs)
        if wanted and max_workers is None:
            max_workers = self._max_workers()
        while self._idle_workers < wanted and self._workers < (max_workers or 0):
            self._workers += 1
            self._idle_workers += 1
            self._tasks.start(self._work())
        if not self._workers and not self._inputs and self._flush is None:
            self._forget(self._key)

    def _max_workers(self) -> int:
        """Return how many calls may be made at a time; fewer while a limit is searched for."""
        return self._next_route().limits.concurrency

    async def _work(self) -> None:
        """Send batches until nothing waits any more."""
        has_worked = False
        try:
            while self._inputs and self._workers <= self._max_workers():
                await self._send_one(has_worked=has_worked)
                has_worked = True
        except BaseException as error:
            # The proxy is stopping, or this is a defect: nobody else will send what is left.
            self._fail_all(error)
            raise
        finally:
            self._workers -= 1
            self._idle_workers -= 1
            self._start_workers()

    def _fail_all(self, error: BaseException) -> None:
        """Fail the requests of all that waits."""
        told = error if isinstance(error, Exception) else DeadlineExceeded("the proxy is stopping")
        waiting = list(self._inputs)
        self._inputs.clear()
        # Where the event loop is closed, nobody is left to be told.
        with contextlib.suppress(RuntimeError):
            for one in waiting:
                one.request.fail(told)

    async def _send_one(self, *, has_worked: bool) -> None:
        """Wait for a slot, take a batch and send it. `has_worked`: others waited meanwhile."""
        route = self._next_route()
        slots = route.slots
        had_to_wait = slots.locked()
        has_slot = await self._acquire(route)
        try:
            if had_to_wait:
                # Another route may be the next one by now.
                route = self._next_route()
            batch = self._take(route, is_delayed=had_to_wait or has_worked)
            if batch:
                self._idle_workers -= 1
                try:
                    self._start_workers()
                    await self._sender.send(batch)
                finally:
                    self._idle_workers += 1
        finally:
            if has_slot:
                slots.release()

    async def _acquire(self, route: NextRoute) -> bool:
        """Wait for a slot, for a while where another route is left; return whether there is one."""
        deadline = self._inputs[0].request.context.deadline if self._inputs else None
        if not (route.has_alternative and route.slots.locked()) or deadline is None:
            return await route.slots.acquire()
        # The same share of the time that the router leaves to each of two routes.
        max_wait = max(0.0, deadline - asyncio.get_running_loop().time()) / 4
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(max_wait):
                return await route.slots.acquire()
        return False

    def _take(self, route: NextRoute, *, is_delayed: bool) -> list[PendingInput]:
        """Take from the queue what fits into one call.

        After a wait for a slot, no call is begun that is sure to end too late for all who wait.
        """
        if route.limits != self._planned_for:
            self._plan(route.limits)
        while batch := self._take_first(route):
            if not (is_delayed and _is_too_late(batch, route.call_s)):
                break
            for one in batch:
                if one.request.is_open:
                    one.request.fail(DeadlineExceeded("the time left is too short for a call"))
        return batch

    def _take_first(self, route: NextRoute) -> list[PendingInput]:
        """Take the first inputs that are wanted, as many as may go in one call."""
        limits = route.limits
        batch: list[PendingInput] = []
        max_inputs = min(self._batch_inputs, limits.inputs)
        tokens = size = 0
        while self._inputs and len(batch) < max_inputs:
            one = self._inputs[0]
            if one.is_wanted:
                max_inputs = min(max_inputs, one.max_batch or max_inputs)
                tokens += one.max_tokens
                size += 0 if limits.bytes is None else input_bytes(one.input)
                is_over = (limits.tokens is not None and tokens > limits.tokens) or (
                    limits.bytes is not None and size > limits.bytes
                )
                if route.is_blamed is not None and route.is_blamed(one.input):
                    # It goes alone: others would fail with it.
                    is_over, max_inputs = True, 1
                # What is too large by itself goes alone: the upstream will say so.
                if batch and (is_over or len(batch) >= max_inputs):
                    break
                batch.append(one)
            self._inputs.popleft()
        return batch


def _is_too_late(batch: Sequence[PendingInput], call_s: float | None) -> bool:
    """Tell whether a call that begins now is sure to end after the deadline of all who wait."""
    if call_s is None:
        return False
    end = asyncio.get_running_loop().time() + LIKELY * call_s
    return all((one.request.context.deadline or end) < end for one in batch)
