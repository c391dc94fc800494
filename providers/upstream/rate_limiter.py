"""Keeps calls to one provider within its limits, so that they queue here and are not refused there.

`RateLimiter` keeps the limits per minute; they are declared, or learned from reply headers.
`ProviderQueue` is the queue before one provider: its declared limits, the learned ones of each
model, and the concurrency limit.

A `SharedAllowance` makes the declared limits one allowance of several nodes. While it cannot be
asked, this process keeps to its share of them.

Queues are first in, first out. No call waits past the time by which it must begin: one that would
have to fails at once, and may go to another route.
"""

import asyncio
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Mapping, Sequence
from types import TracebackType
from typing import NoReturn

from embedding_proxy.providers.allowance import Bucket, SharedAllowance, SharedLimits
from embedding_proxy.providers.base import Context, Input
from embedding_proxy.providers.errors import DeadlineExceeded, LocalQueueFull, Refusal
from embedding_proxy.providers.profile import Limits

from .retry_after import MAX_WAIT, quantity, seconds_until

MAX_PAUSE_S = 60.0
"""The longest pause that an upstream can ask for."""
MAX_PAUSE_WAIT_S = 20.0
"""The longest pause that a call waits for; before a longer one it fails, for the next route."""
NEVER = float("-inf")
MAX_SHARED_WAIT_S = 1e9
"""What a call without a deadline waits for the limits of all nodes."""
MAX_MODELS = 1000
"""Models whose learned limits are kept, the most recently used ones."""


def estimate(inputs: Sequence[Input]) -> int:
    """Return about how many tokens an upstream will charge: fast, not exact.

    >>> estimate(["eight letters", (1, 2, 3)])
    7
    """
    total = 0
    for item in inputs:
        if not isinstance(item, str):
            total += len(item)
        elif item.isascii():
            total += len(item) // 4 + 1
        else:
            total += len(item.encode(errors="surrogatepass")) // 4 + 1
    return total


def allowance(
    headers: Mapping[str, str], kind: str, now: float
) -> tuple[float, float, float] | None:
    """Return the limit, what is left of it, and its growth in units per second; or None.

    All three headers `x-ratelimit-{limit,remaining,reset}-<kind>` are needed. `reset` is the time
    until nothing is used any more, so what is used divided by it is the rate at which the allowance
    grows, whatever period the upstream counts by. A reset of 0 means that it is whole now. However
    little the headers promise, an empty allowance is whole after MAX_WAIT.
    """
    limit, remaining = (
        quantity(headers.get(f"x-ratelimit-{what}-{kind}", "")) for what in ("limit", "remaining")
    )
    reset = seconds_until(headers.get(f"x-ratelimit-reset-{kind}", ""), now)
    if not limit or remaining is None or reset is None:
        return None
    remaining, reset = min(remaining, limit), min(reset, MAX_WAIT)
    used = limit - remaining
    if reset == 0 or used == 0:
        return limit, limit, limit / 60
    return limit, remaining, max(used / reset, limit / MAX_WAIT)


class RateLimiter:
    """Limits of requests and tokens per minute, of one upstream or of one model there.

    `clock` gives seconds on the event loop's clock, on which deadlines are; `wall_clock` gives
    seconds since 1970, for headers that name a point in time; `sleep` takes seconds.
    """

    def __init__(  # noqa: PLR0913 - two limits, and what a test injects
        self,
        provider: str,
        *,
        requests_per_minute: float | None = None,
        tokens_per_minute: float | None = None,
        shared: SharedAllowance | None = None,
        clock: Callable[[], float] | None = None,
        wall_clock: Callable[[], float] = time.time,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self._provider = provider
        self._clock = clock or (lambda: asyncio.get_running_loop().time())
        self._wall_clock = wall_clock
        self._sleep = sleep
        self._declared = {"requests": requests_per_minute, "tokens": tokens_per_minute}
        self._has_limits = requests_per_minute is not None or tokens_per_minute is not None
        self._shared: SharedLimits | None = None
        self._buckets: dict[str, Bucket] = {}
        if shared is not None and self._has_limits:
            self._shared = SharedLimits(shared, self._declared)
        self._queue = asyncio.Lock()  # first in, first out
        self._waiting = {"requests": 0, "tokens": 0}
        self._in_flight = {"requests": 0, "tokens": 0}
        self.paused_until = NEVER
        """The end of the pause; `pause` can only move it to a later time."""

    @property
    def is_free(self) -> bool:
        """Whether a call need not wait: there is no limit, no pause, and no queue."""
        if self._buckets or self._has_limits or self._queue.locked():
            return False
        return self.paused_until == NEVER or self.paused_until <= self._clock()

    async def acquire(self, tokens: int, deadline: float | None) -> None:
        """Wait for room for one call of so many tokens, which holds it until `release`.

        Raises LocalQueueFull, with the wait, if there is no room before the deadline.
        """
        if not self.is_free:
            await self._wait({"requests": 1, "tokens": tokens}, deadline)
        self.hold(tokens)

    def hold(self, tokens: int) -> None:
        """Count a call of so many tokens as under way."""
        self._in_flight["requests"] += 1
        self._in_flight["tokens"] += tokens

    def release(self, tokens: int, *, is_unused: bool = False) -> None:
        """Note the end of a call; one that was not made does not count against the limits."""
        if is_unused and self._shared is not None:
            self._shared.give_back({"requests": 1, "tokens": tokens}, self._clock())
        elif is_unused:
            self._take({"requests": 1, "tokens": tokens}, -1)
        self._in_flight["requests"] -= 1
        self._in_flight["tokens"] -= tokens

    @property
    def wait_s(self) -> float:
        """Seconds until there is room for one small call, without regard to the queue."""
        return self._seconds({"requests": 1, "tokens": 1}, {}, self._clock())

    async def wait_for_pause(self, deadline: float | None) -> None:
        """Wait for the end of the pause.

        Raises LocalQueueFull if that is after the deadline.
        """
        now = self._clock()
        seconds = self._paused_for(now)
        self._refuse_late(seconds, now, deadline)
        if seconds > 0:
            await self._sleep(seconds)

    async def _wait(self, cost: Mapping[str, int], deadline: float | None) -> None:
        if self._shared is not None:
            if await self._is_shared_wait_over(self._shared, cost, deadline):
                return
            # The queue is then before the share of this process.
            self._buckets = self._shared.share
        now = self._clock()
        for kind, per_minute in self._declared.items():
            if per_minute is not None and kind not in self._buckets:
                self._buckets[kind] = Bucket(per_minute, per_minute, per_minute / 60, now)
        self._refuse_late(self._seconds(cost, self._waiting, now), now, deadline)
        _add(self._waiting, cost)
        try:
            async with self._queue:
                now = self._clock()
                seconds = self._seconds(cost, {}, now)
                self._refuse_late(seconds, now, deadline)
                if seconds > 0:
                    await self._sleep(seconds)
                # A call that is cancelled before this line has taken nothing; the next one
                # continues.
                self._take(cost)
                if self._shared is not None:
                    self._shared.note_untold(cost, self._clock())
        finally:
            _add(self._waiting, cost, -1)

    async def _is_shared_wait_over(
        self, shared: SharedLimits, cost: Mapping[str, int], deadline: float | None
    ) -> bool:
        """Wait for room within the limits of all nodes; False if they cannot be asked now."""
        now = self._clock()
        max_wait_s = MAX_SHARED_WAIT_S if deadline is None else deadline - now
        reservation = await shared.reserve(cost, max_wait_s, self._clock)
        if reservation is None:
            return False
        if not reservation.is_reserved:
            self._refuse(reservation.wait_s)
        try:
            if reservation.wait_s > 0:
                await self._sleep(reservation.wait_s)
        except BaseException:
            shared.give_back(cost, self._clock())
            raise
        return True

    def _seconds(self, cost: Mapping[str, int], ahead: Mapping[str, int], now: float) -> float:
        """Return the seconds that a call behind `ahead` has to wait."""
        waits = [
            bucket.wait(cost[kind], ahead.get(kind, 0), now)
            for kind, bucket in self._buckets.items()
        ]
        return max([self._paused_for(now), *waits])

    def _paused_for(self, now: float) -> float:
        return max(self.paused_until - now, 0.0)

    def _take(self, cost: Mapping[str, int], sign: int = 1) -> None:
        for kind, bucket in self._buckets.items():
            bucket.take(sign * cost[kind], self._clock())

    def _refuse_late(self, seconds: float, now: float, deadline: float | None) -> None:
        too_late = deadline is not None and seconds > 0 and now + seconds >= deadline
        if too_late or self._paused_for(now) > MAX_PAUSE_WAIT_S:
            self._refuse(seconds)

    def _refuse(self, seconds: float) -> NoReturn:
        message = f"its limit of calls is used up; there is room again in {seconds:.1f} s"
        refusal = Refusal(429, message, "requests", "rate_limit_exceeded", seconds)
        raise LocalQueueFull(self._provider, message, refusal)

    def learn(self, headers: Mapping[str, str]) -> None:
        """Take over the limits in the headers of a reply; see `allowance`.

        Whatever the headers say, and however many calls are under way, no later call waits longer
        than MAX_WAIT because of them.
        """
        for kind in ("requests", "tokens"):
            if f"x-ratelimit-limit-{kind}" not in headers:
                continue
            learned = allowance(headers, kind, self._wall_clock())
            if learned is None:
                continue
            limit, remaining, per_s = learned
            # The calls under way may not be counted in what remains.
            level = remaining - self._in_flight[kind]
            per_s = max(per_s, (limit - level) / MAX_WAIT)
            self._buckets[kind] = Bucket(limit, level, per_s, self._clock())

    def pause(self, seconds: float) -> None:
        """Let no call through for so long: the upstream asked for it when it refused a call.

        It concerns calls that are queued here. The provider's health keeps later requests away;
        they may go to another route at once.
        """
        until = self._clock() + min(seconds, MAX_PAUSE_S)
        self.paused_until = max(self.paused_until, until)


def _add(total: dict[str, int], cost: Mapping[str, int], sign: int = 1) -> None:
    for kind, number in cost.items():
        total[kind] += sign * number


class ProviderQueue:
    """The queue before one provider. `sleep` takes seconds."""

    def __init__(
        self,
        provider: str,
        limits: Limits,
        sleep: Callable[[float], Awaitable[None]],
        connections: asyncio.Semaphore | None = None,
        shared: SharedAllowance | None = None,
    ) -> None:
        """Take `connections` as shared by several queues of one provider; None = any number.

        `shared` is the allowance of all nodes under the declared limits.
        """
        self.connections = connections
        self.provider = provider
        self.slots = asyncio.Semaphore(limits.concurrency)
        self._learns = limits.from_headers
        self._sleep = sleep
        self._declared = RateLimiter(
            provider,
            requests_per_minute=limits.requests_per_minute,
            tokens_per_minute=limits.tokens_per_minute,
            shared=shared,
            sleep=sleep,
        )
        self._learned: OrderedDict[str, RateLimiter] = OrderedDict()

    def _limiter_of(self, model: str) -> RateLimiter:
        """Return the learned limits of a model; each model has its own."""
        limiter = self._learned.get(model)
        if limiter is None:
            limiter = self._learned[model] = RateLimiter(self.provider, sleep=self._sleep)
            if len(self._learned) > MAX_MODELS:
                self._learned.popitem(last=False)
        self._learned.move_to_end(model)
        return limiter

    def learn(self, model: str, headers: Mapping[str, str]) -> None:
        """Take over the limits in the headers of a reply, if configured so."""
        if self._learns:
            self._limiter_of(model).learn(headers)

    def pause(self, model: str, seconds: float) -> None:
        """Let no call of a model through for so long: the upstream asked for it."""
        self._limiter_of(model).pause(seconds)

    def waits(self) -> dict[str, float]:
        """Return the seconds until there is room within the learned limit of each model, if any."""
        waits = {model: limiter.wait_s for model, limiter in self._learned.items()}
        return {model: wait for model, wait in waits.items() if wait > 0}

    def slot(self, model: str, tokens: int, context: Context) -> "_Slot":
        """Return the slot of one call, for `async with`: within the limits, then the concurrency.

        In this order a call that waits for the limit of its model takes no slot from other models.
        Entering raises LocalQueueFull or DeadlineExceeded.
        """
        return _Slot(self, (self._limiter_of(model), self._declared), tokens, context)


class _Slot:
    """The slot of one call: in both rate limiters, and in the concurrency limit."""

    __slots__ = ("_context", "_held", "_is_admitted", "_limiters", "_provider_queue", "_tokens")

    def __init__(
        self,
        queue: ProviderQueue,
        limiters: tuple[RateLimiter, RateLimiter],
        tokens: int,
        context: Context,
    ) -> None:
        self._provider_queue = queue
        self._limiters = limiters
        self._tokens = tokens
        self._context = context
        self._held: list[RateLimiter | asyncio.Semaphore] = []
        """What it has acquired so far."""
        self._is_admitted = False

    async def __aenter__(self) -> None:
        context, queue = self._context, self._provider_queue
        until = context.deadline if context.start_deadline is None else context.start_deadline
        learned, declared = self._limiters
        is_free = learned.is_free and declared.is_free and not queue.slots.locked()
        try:
            if is_free and queue.connections is None:
                # There is nothing to wait for, so no timeout is needed.
                learned.hold(self._tokens)
                declared.hold(self._tokens)
                self._held += (learned, declared)
                await queue.slots.acquire()
                self._held.append(queue.slots)
            else:
                async with asyncio.timeout_at(until):
                    await self._enter(until)
        except TimeoutError as error:
            self._leave(is_unused=True)
            if context.start_deadline is not None:
                message = "all the calls that it takes at a time are under way"
                refusal = Refusal(429, message, "requests", "rate_limit_exceeded")
                raise LocalQueueFull(queue.provider, message, refusal) from error
            raise DeadlineExceeded(
                f"the time of the request was up while it waited its turn at {queue.provider}"
            ) from error
        except BaseException:
            self._leave(is_unused=True)
            raise

    async def _enter(self, until: float | None) -> None:
        learned, slots = self._limiters[0], self._provider_queue.slots
        paused_until = learned.paused_until
        for limiter in self._limiters:
            await limiter.acquire(self._tokens, until)
            self._held.append(limiter)
        await slots.acquire()
        while learned.paused_until != paused_until:
            # Another call was refused meanwhile, and this one would be, too.
            slots.release()
            paused_until = learned.paused_until
            await learned.wait_for_pause(until)
            await slots.acquire()
        self._held.append(slots)
        if self._provider_queue.connections is not None:
            await self._provider_queue.connections.acquire()
            self._held.append(self._provider_queue.connections)

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        self._leave(is_unused=isinstance(error, LocalQueueFull))

    def _leave(self, *, is_unused: bool) -> None:
        """Release everything; only an unmade call does not count against the limits."""
        for held in reversed(self._held):
            if isinstance(held, asyncio.Semaphore):
                held.release()
            else:
                held.release(self._tokens, is_unused=is_unused)
        self._held.clear()
