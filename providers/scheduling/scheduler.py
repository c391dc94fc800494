"""Queues of pending inputs: batches out, vectors back.

Inputs of one request, of many requests, of a call that is made again, was too large or failed in
part are all the same thing here: pending inputs in a queue, with their history. A batch is taken
from the queue only when the provider has a slot for a call. So while all slots are taken, what
comes is put together into few calls, and nobody waits for company.

A request suffers from no other one: not from its bad input, not from its leaving, not from its
deadline. A call that was begun is finished, and its answer is kept.
"""

import asyncio
from collections import deque
from collections.abc import Sequence

from embedding_proxy.providers.attempts import Attempt
from embedding_proxy.providers.base import Context, Embedded, Input, Space
from embedding_proxy.providers.client_credential import Credential
from embedding_proxy.providers.errors import DeadlineExceeded, LocalQueueFull, RateLimited, Refusal
from embedding_proxy.providers.lru_cache import LRUCache
from embedding_proxy.providers.profile import Limits, limits_of
from embedding_proxy.providers.routing.health import Slots
from embedding_proxy.providers.routing.route import Route
from embedding_proxy.providers.routing.router import Router, View

from . import batch_size
from .batch import Batch
from .batch_limits import input_bytes
from .context_length import check_context_length
from .pending import Bisection, FailedAttempt, PendingInput, PendingRequest, QueueKey
from .search import fail_inputs, give_up

MAX_VIEWS = 1000
"""Spaces whose routes are remembered."""
MAX_WINDOW_INPUTS = 64
"""Inputs; a larger request does not wait for others to come."""
MIN_WINDOW_BATCH = 256
"""Inputs in a batch where small requests wait for others: they want few calls, not quick ones."""
LIKELY = 0.8
"""The part of a call's usual time that is left when it is still worth beginning."""
SLOT_WAIT_SHARE = 0.25
"""The part of the time left for which inputs wait for a slot where another route may be asked."""
MIN_COOLDOWN_WAIT_S = 0.1
"""What each wait for the end of a rate limit takes at least from the patience of an input."""


class Scheduler:
    """An Embedder over the routes of a model: what requests want becomes batches.

    With `window_s`, small requests wait for so many seconds for others to share a call with. An
    input of more than `max_tokens` is refused; None = nothing is known of it.
    """

    def __init__(self, router: Router, window_s: float = 0, max_tokens: int | None = None) -> None:
        self.router = router
        self.window_s = window_s
        self._max_tokens = max_tokens
        self._queues: dict[QueueKey, _Queue] = {}
        self._views = LRUCache[tuple[Space, bool], View](MAX_VIEWS)

    async def embed(self, space: Space, inputs: Sequence[Input], context: Context) -> Embedded:
        """Return the answer to a request, whichever calls it took, in the order of its inputs.

        Raises EmbeddingError when its calls under way have ended. Parts that were answered were
        told to `context.on_part` by then, also when others failed. `index` of what is raised is the
        place among the inputs. When the deadline passes, or the caller goes, what is queued is
        dropped, and what is on the wire is finished.
        """
        if self._max_tokens is not None:
            context = await check_context_length(space, inputs, self._max_tokens, context)
        view = self._view(space, inputs, context.credential)
        key = QueueKey(space, context.user, context.credential, context.neutral, view.routes)
        limits = view.first().limits
        sizes, are_exact = await batch_size.sizes(space, inputs, limits.tokens, context)
        counts: Sequence[int | None] = sizes
        if not are_exact:
            counts = [context.counts.get(item) if type(item) is str else None for item in inputs]
        request = PendingRequest(inputs, context, sizes, counts)
        waits = self.window_s if len(inputs) <= MAX_WINDOW_INPUTS else 0
        self.queue(key, view).add(request.inputs, waits)
        return await request.result()

    def _view(self, space: Space, inputs: Sequence[Input], credential: Credential | None) -> View:
        """Return the routes that take such inputs; those of a client's own key are not kept.

        Raises NoRoute, ClientKeyRefused or InvalidRequest.
        """
        is_text = all(type(item) is str for item in inputs)
        view = self._views.get((space, is_text)) if credential is None else None
        if view is None:
            routes = tuple(self.router.usable(space, credential, is_text=is_text))
            view = View(self.router, routes, space, credential)
            if credential is None:
                self._views[space, is_text] = view
        return view

    def queue(self, key: QueueKey, view: View | None = None) -> "_Queue":
        """Return the queue for inputs of a kind."""
        queue = self._queues.get(key)
        if queue is None:
            view = view or View(self.router, key.routes, key.space, key.credential)
            queue = self._queues[key] = _Queue(self, key, view)
        return queue

    def forget(self, key: QueueKey, queue: "_Queue") -> None:
        """Forget a queue that is empty."""
        if self._queues.get(key) is queue:
            del self._queues[key]

    def add_again(
        self,
        key: QueueKey,
        inputs: Sequence[PendingInput],
        route: Route | None = None,
        *,
        search: Bisection | None = None,
        half: int = 0,
    ) -> None:
        """Queue inputs once more, before all others: they have waited longest.

        `route`: asks this one; without, the policy chooses among those that were not asked yet.
        """
        if not inputs:
            return
        first = inputs[0]
        key = key._replace(
            story=first.story,
            passed=first.passed,
            route=route,
            is_rested=route is not None
            and bool(first.failures)
            and isinstance(first.failures[-1].error, RateLimited),
            is_alone=first.is_alone,
            search=search,
            half=half or key.half,
        )
        self.queue(key).add_first(inputs)

    def add_later(
        self, wait_s: float, key: QueueKey, inputs: Sequence[PendingInput], route: Route | None
    ) -> None:
        """Queue inputs once more when so many seconds have passed."""

        async def wait() -> None:
            try:
                await self.router.sleep(wait_s)
            except asyncio.CancelledError:
                fail_inputs(inputs, DeadlineExceeded("the proxy is stopping"), key.search)
                raise
            self.add_again(key, inputs, route, search=key.search, half=key.half)

        for pending in inputs:
            pending.is_queued = True
        self.router.upstreams.attempts.start(wait(), Attempt())


class _Queue:
    """The pending inputs that may share calls."""

    def __init__(self, scheduler: Scheduler, key: QueueKey, view: View) -> None:
        self._scheduler = scheduler
        self._key = key
        self._router = scheduler.router
        self._view = view
        self._inputs: deque[PendingInput] = deque()
        self._batch_inputs = 1
        """How many inputs make a batch: planned when inputs come, for all that wait then."""
        self._planned_for: Limits | None = None
        self._flush: asyncio.Handle | None = None
        self._slot_timer: asyncio.Handle | None = None
        self._slots: Slots | None = None
        """Those that are waited for."""

    def add(self, inputs: Sequence[PendingInput], wait_s: float) -> None:
        """Queue inputs, and see to it that they are sent: in this turn of the loop, or later."""
        self._push(inputs)
        is_full = bool(wait_s) and len(self._inputs) >= self._view.first().limits.inputs
        if self._flush is not None and not (wait_s and not is_full):
            self._flush.cancel()
            self._flush = None
        if self._flush is None:
            loop = asyncio.get_running_loop()
            # Others that come in this turn of the loop share the call.
            self._flush = (
                loop.call_later(wait_s, self._send_all)
                if wait_s and not is_full
                else loop.call_soon(self._send_all)
            )

    def add_first(self, inputs: Sequence[PendingInput]) -> None:
        """Queue inputs before all others, and send what waits."""
        self._push(inputs, is_first=True)
        if self._flush is not None:
            self._flush.cancel()
        # Others of the same history that come in this turn of the loop share the call.
        self._flush = asyncio.get_running_loop().call_soon(self._send_all)

    def _push(self, inputs: Sequence[PendingInput], *, is_first: bool = False) -> None:
        for pending in inputs:
            pending.is_queued = True
        if is_first:
            self._inputs.extendleft(reversed(inputs))
        else:
            self._inputs += inputs

    def _pop(self) -> PendingInput:
        pending = self._inputs.popleft()
        pending.is_queued = False
        return pending

    def _pop_all(self) -> list[PendingInput]:
        return [self._pop() for _ in range(len(self._inputs))]

    def _send_all(self) -> None:
        """Plan the batches for all that waits, and send as many as there are slots."""
        self._flush = None
        self._planned_for = None
        self.send()

    def send(self) -> None:
        """Send batches of what waits, as long as there are slots."""
        try:
            self._send()
        except Exception as error:
            # A defect: nobody else will send what is left.
            self._fail_all(error)
            raise

    def _send(self) -> None:
        while self._drop_unwanted():
            if self._router.upstreams.attempts.is_closing:
                self._fail_all(DeadlineExceeded("the proxy is stopping"))
                break
            route = self._choose()
            if route is None:
                break
            if not self._send_one(route):
                return
        if not self._inputs:
            self._stop_waiting()
            if self._flush is None:
                self._scheduler.forget(self._key, self)

    def _send_one(self, route: Route) -> bool:
        """Send one batch to a route, if it has a slot; tell if it had."""
        limits, (key, health) = route.limits, self._view.limits(route)
        number = limits_of(route.provider).concurrency
        slots = self._router.upstreams.slots(route.name, key, number)
        if not slots.acquire(self.send, limits.concurrency):
            self._wait_for_slot(slots, route)
            return False
        is_delayed = self._slots is not None
        batch = self._take(route, limits, is_delayed=is_delayed)
        permit = None
        if batch:
            rested = self._key.is_rested and route is self._key.route
            permit = health.acquire(key, rested=rested)
        if permit is None:
            self._push(batch, is_first=True)
            slots.release()
        else:
            Batch(self._scheduler, self._key, self._view, route, batch, permit, slots).start()
        return True

    def _wait_for_slot(self, slots: Slots, route: Route) -> None:
        """Wait for a slot, for a while where another route is left."""
        self._slots = slots
        deadline = self._inputs[0].request.context.deadline
        if self._slot_timer is not None or deadline is None or self._key.route is not None:
            return
        if len(self._view.ready((*self._key.story, *self._key.passed))) > 1:
            loop = asyncio.get_running_loop()
            wait_s = SLOT_WAIT_SHARE * max(0.0, deadline - loop.time())
            self._slot_timer = loop.call_later(wait_s, self._pass_over, route)

    def _stop_waiting(self) -> None:
        if self._slot_timer is not None:
            self._slot_timer.cancel()
            self._slot_timer = None
        if self._slots is not None:
            self._slots.forget(self.send)
            self._slots = None

    def _pass_over(self, route: Route) -> None:
        """Let what waits go on to the next route: this one has had no slot for long."""
        self._slot_timer = None
        inputs = self._pop_all()
        if inputs:
            self._router.counts.failures[LocalQueueFull.reason] += 1
            message = "all the calls that it takes at a time are under way"
            refusal = Refusal(429, message, "requests", "rate_limit_exceeded")
            failure = FailedAttempt(route, LocalQueueFull(route.name, message, refusal))
            for pending in inputs:
                pending.passed += (route,)
                pending.failures += (failure,)
            self._scheduler.add_again(
                self._key, inputs, search=self._key.search, half=self._key.half
            )
        self.send()

    def _choose(self) -> Route | None:
        """Return the route to ask now; None where nothing is to be sent for now."""
        key, view = self._key, self._view
        if key.route is not None and view.is_ready(key.route, rested=key.is_rested):
            return key.route
        ready = view.ready((*key.story, *key.passed))
        if ready and (key.search is None or not key.search.is_internal):
            return ready[0]
        self._handle_no_route()
        return None

    def _handle_no_route(self) -> None:
        """Fail what waits, or wait for the end of a rate limit if that is near."""
        # What is asked for elsewhere just now is decided there.
        inputs = [pending for pending in self._pop_all() if not pending.batches]
        if not inputs:
            return
        if self._key.search is not None:
            self._key.search.note(inputs, inputs, self._view.unavailable())
            return
        failed = [pending for pending in inputs if pending.failures]
        if failed:
            give_up(self._scheduler, self._key, self._view, failed)
        inputs = [pending for pending in inputs if not pending.failures]
        if not inputs:
            return
        wait, now = self._view.cooldown_s(), self._router.upstreams.clock()
        patient: list[PendingInput] = []
        for pending in inputs:
            deadline = pending.request.context.deadline
            seconds_left = float("inf") if deadline is None else deadline - now
            if wait is None or wait > min(pending.request.patience_s, seconds_left):
                pending.request.fail(self._view.unavailable())
            else:
                patient.append(pending)
        if len(patient) < len(inputs):
            self._router.counts.refused += 1
        if patient and wait is not None:
            for request in dict.fromkeys(pending.request for pending in patient):
                request.patience_s -= max(wait, MIN_COOLDOWN_WAIT_S)
            self._scheduler.add_later(wait, self._key, patient, None)

    def _drop_unwanted(self) -> bool:
        """Drop what nobody wants from the head of the queue; tell if anything is left."""
        search = self._key.search
        while self._inputs:
            pending = self._inputs[0]
            if pending.is_wanted or (search is not None and search.wants(pending)):
                return True
            self._pop()
            if search is not None:
                search.note([pending], [], None)
        return False

    def _fail_all(self, error: Exception) -> None:
        inputs = self._pop_all()
        fail_inputs(inputs, error, self._key.search)

    def _take(self, route: Route, limits: Limits, *, is_delayed: bool) -> list[PendingInput]:
        """Take from the queue what fits into one call.

        After a wait for a slot, no call is begun that is sure to end too late for all who wait.
        """
        if limits != self._planned_for:
            self._planned_for = limits
            waiting = len(self._inputs)
            min_inputs = MIN_WINDOW_BATCH if self._scheduler.window_s else batch_size.MIN_INPUTS
            share = batch_size.share(waiting, limits, min_inputs)
            self._batch_inputs = batch_size.balance(waiting, share)
        while batch := self._take_first(route, limits):
            call_s = self._router.latencies.seconds(route) if is_delayed else None
            if call_s is None or not _is_too_late(batch, call_s):
                break
            error = DeadlineExceeded("the time left is too short for a call")
            fail_inputs(batch, error, self._key.search)
        return batch

    def _take_first(self, route: Route, limits: Limits) -> list[PendingInput]:
        """Take the first inputs that are wanted, as many as may go in one call."""
        key, health = self._view.limits(route)
        batch: list[PendingInput] = []
        max_inputs = limits.inputs
        if not self._key.is_alone:
            max_inputs = min(self._batch_inputs, max_inputs)
        tokens = size = 0
        while self._drop_unwanted() and len(batch) < max_inputs:
            pending = self._inputs[0]
            max_inputs = min(max_inputs, pending.max_batch or max_inputs)
            tokens += pending.max_tokens
            size += 0 if limits.bytes is None else input_bytes(pending.input)
            is_over = (limits.tokens is not None and tokens > limits.tokens) or (
                limits.bytes is not None and size > limits.bytes
            )
            if health.is_blamed(key, pending.input) and not self._key.is_alone:
                # It goes alone: others would fail with it.
                is_over, max_inputs = True, 1
            # What is too large by itself goes alone: the upstream will say so.
            if batch and (is_over or len(batch) >= max_inputs):
                break
            batch.append(self._pop())
        return batch


def _is_too_late(batch: Sequence[PendingInput], call_s: float) -> bool:
    """Tell whether a call that begins now is sure to end after the deadline of all who wait."""
    end = asyncio.get_running_loop().time() + LIKELY * call_s
    return all((pending.request.context.deadline or end) < end for pending in batch)
