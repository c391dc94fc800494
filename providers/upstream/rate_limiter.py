"""Keeps calls to one upstream under its limits per minute, so that they queue and are not refused.

Limits are declared, or learned from the headers of its replies. Waiting is first come, first
served; nobody waits past the time by which its call must begin: who would have to is told at once,
and may go to another route.

The queue before one provider: its limits per minute, those of a model, and calls at a time.
"""

import asyncio
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Mapping, Sequence
from types import TracebackType

from embedding_proxy.providers.base import Context, Input
from embedding_proxy.providers.errors import DeadlineExceeded, LocalQueueFull, Refusal
from embedding_proxy.providers.profile import Limits

from .rate_limit_headers import MAX_WAIT, allowance

LONGEST_HOLD = 60.0
"""Seconds for which an upstream that asked for a pause is left alone at most, without a try."""
LONGEST_PAUSE = 20.0
"""Seconds of such a pause that a call waits out; beyond, it is for the next route."""


def estimate(inputs: Sequence[Input]) -> int:
    """Return about how many tokens an upstream will charge; quick rather than exact.

    >>> estimate(["eight letters", (1, 2, 3)])
    7
    """
    return sum(_bytes(item) // 4 + 1 if isinstance(item, str) else len(item) for item in inputs)


def _bytes(text: str) -> int:
    return len(text) if text.isascii() else len(text.encode(errors="surrogatepass"))


class Bucket:
    """An allowance that refills evenly; one call larger than all of it may overdraw it."""

    def __init__(self, capacity: float, level: float, per_s: float, now: float) -> None:
        self.capacity = capacity
        self._level = level
        self._per_s = per_s
        self._at = now

    def _refill(self, now: float) -> None:
        self._level = min(self.capacity, self._level + max(0.0, now - self._at) * self._per_s)
        self._at = now

    def wait(self, cost: float, ahead: float, now: float) -> float:
        """Return the seconds until `cost` may be taken after `ahead` has been."""
        self._refill(now)
        missing = ahead + min(cost, self.capacity) - self._level
        return 0.0 if missing <= 0 else missing / self._per_s

    def take(self, cost: float, now: float) -> None:
        """Take `cost`, below zero if need be."""
        self._refill(now)
        self._level -= cost


class Throttle:
    """The queue before one upstream, or before one model of it.

    `clock` gives seconds on the event loop's clock, on which deadlines are; `wall_clock` gives
    seconds since 1970, for headers that name a point in time; `sleep` takes seconds.
    """

    def __init__(  # noqa: PLR0913 - two limits, and what a test injects
        self,
        provider: str,
        *,
        requests_per_minute: float | None = None,
        tokens_per_minute: float | None = None,
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
        self._buckets: dict[str, Bucket] = {}
        self._line = asyncio.Lock()  # first in, first out
        self._waiting = {"requests": 0, "tokens": 0}
        self._flying = {"requests": 0, "tokens": 0}
        self.held_until = float("-inf")
        """Until when nobody is let through; changed by each `hold` that is for longer."""

    @property
    def is_free(self) -> bool:
        """Whether a call need not wait: there is no limit, no pause, and nobody queues."""
        is_limited = bool(self._buckets) or self._has_limits
        return not (is_limited or self._line.locked() or self.held_until > self._clock())

    async def acquire(self, tokens: int, deadline: float | None) -> None:
        """Wait for room for one call of so many tokens, which holds it until `release`.

        Raises LocalQueueFull, with the wait, if there is no room before the deadline.
        """
        cost = {"requests": 1, "tokens": tokens}
        if not self.is_free:
            await self._wait(cost, deadline)
        _add(self._flying, cost)

    def release(self, tokens: int, *, is_unused: bool = False) -> None:
        """Note that the call has ended; one that was not made gives its room back."""
        cost = {"requests": 1, "tokens": tokens}
        if is_unused:
            self._take(cost, -1)
        _add(self._flying, cost, -1)

    @property
    def wait_s(self) -> float:
        """Seconds until there is room for one small call, if nobody queues before it."""
        return self._seconds({"requests": 1, "tokens": 1}, {}, self._clock())

    async def pause(self, deadline: float | None) -> None:
        """Wait until nobody is held any more.

        Raises LocalQueueFull if that is after the deadline.
        """
        now = self._clock()
        seconds = self._held_for(now)
        self._refuse_late(seconds, now, deadline)
        if seconds > 0:
            await self._sleep(seconds)

    async def _wait(self, cost: Mapping[str, int], deadline: float | None) -> None:
        now = self._clock()
        for kind, per_minute in self._declared.items():
            if per_minute is not None and kind not in self._buckets:
                self._buckets[kind] = Bucket(per_minute, per_minute, per_minute / 60, now)
        self._refuse_late(self._seconds(cost, self._waiting, now), now, deadline)
        _add(self._waiting, cost)
        try:
            async with self._line:
                now = self._clock()
                seconds = self._seconds(cost, {}, now)
                self._refuse_late(seconds, now, deadline)
                if seconds > 0:
                    await self._sleep(seconds)
                # Whoever is cancelled up to here has taken nothing, and the next in line goes on.
                self._take(cost)
        finally:
            _add(self._waiting, cost, -1)

    def _seconds(self, cost: Mapping[str, int], ahead: Mapping[str, int], now: float) -> float:
        """Return how long a call that is next after `ahead` has to wait."""
        waits = [
            bucket.wait(cost[kind], ahead.get(kind, 0), now)
            for kind, bucket in self._buckets.items()
        ]
        return max([self._held_for(now), *waits])

    def _held_for(self, now: float) -> float:
        return max(self.held_until - now, 0.0)

    def _take(self, cost: Mapping[str, int], sign: int = 1) -> None:
        for kind, bucket in self._buckets.items():
            bucket.take(sign * cost[kind], self._clock())

    def _refuse_late(self, seconds: float, now: float, deadline: float | None) -> None:
        too_late = deadline is not None and seconds > 0 and now + seconds >= deadline
        if too_late or self._held_for(now) > LONGEST_PAUSE:
            message = f"its limit of calls is used up; there is room again in {seconds:.1f} s"
            said = Refusal(429, message, "requests", "rate_limit_exceeded", seconds)
            raise LocalQueueFull(self._provider, message, said)

    def learn(self, headers: Mapping[str, str]) -> None:
        """Take over the limits that a reply tells; see `ratelimit.allowance`.

        Whatever the headers say, and however many calls are under way, no call that comes next
        waits longer than MAX_WAIT for what was learned here.
        """
        now, wall = self._clock(), self._wall_clock()
        for kind in ("requests", "tokens"):
            told = allowance(headers, kind, wall)
            if told is None:
                continue
            limit, remaining, per_s = told
            # The calls under way may not be counted in what remains.
            level = remaining - self._flying[kind]
            per_s = max(per_s, (limit - level) / MAX_WAIT)
            self._buckets[kind] = Bucket(limit, level, per_s, now)

    def hold(self, seconds: float) -> None:
        """Let nobody through for so long: the upstream said so when it refused a call.

        It is for those who queue here already; later requests are kept away by what is known of the
        provider's health, and may go to another route at once.
        """
        until = self._clock() + min(seconds, LONGEST_HOLD)
        self.held_until = max(self.held_until, until)


def _add(total: dict[str, int], cost: Mapping[str, int], sign: int = 1) -> None:
    for kind, number in cost.items():
        total[kind] += sign * number


MOST_MODELS = 1000
"""Models whose learned limits are remembered; those asked for longest ago are forgotten."""


class Admission:
    """Lets calls through to one provider. `sleep` takes seconds."""

    def __init__(
        self,
        provider: str,
        limits: Limits,
        sleep: Callable[[float], Awaitable[None]],
        connections: asyncio.Semaphore | None = None,
    ) -> None:
        """Take `connections` as shared by several queues of one provider; None = any number."""
        self.connections = connections
        self.provider = provider
        self.slots = asyncio.Semaphore(limits.concurrency)
        self._learns = limits.learn
        self._sleep = sleep
        self._declared = Throttle(
            provider,
            requests_per_minute=limits.requests_per_minute,
            tokens_per_minute=limits.tokens_per_minute,
            sleep=sleep,
        )
        self._learned: OrderedDict[str, Throttle] = OrderedDict()

    def _of(self, model: str) -> Throttle:
        """Return the limits learned of a model: each has its own, where upstreams tell them."""
        known = self._learned.get(model)
        if known is None:
            known = self._learned[model] = Throttle(self.provider, sleep=self._sleep)
            if len(self._learned) > MOST_MODELS:
                self._learned.popitem(last=False)
        self._learned.move_to_end(model)
        return known

    def learn(self, model: str, headers: Mapping[str, str]) -> None:
        """Take over the limits that a reply tells, if that is wanted."""
        if self._learns:
            self._of(model).learn(headers)

    def hold(self, model: str, seconds: float) -> None:
        """Let nobody through to a model for so long: it said so when it refused a call."""
        self._of(model).hold(seconds)

    def waits(self) -> dict[str, float]:
        """Return the seconds until there is room within the learned limit of each model, if any."""
        waits = {model: throttle.wait_s for model, throttle in self._learned.items()}
        return {model: wait for model, wait in waits.items() if wait > 0}

    def turn(self, model: str, tokens: int, context: Context) -> "_Turn":
        """Return what holds a place within both sorts of limits, then among the calls at a time.

        For `async with`. In this order: who queues for the limit of one model takes no place from
        the others. Raises LocalQueueFull, or DeadlineExceeded.
        """
        return _Turn(self, (self._of(model), self._declared), tokens, context)


class _Turn:
    """The place of one call: in both queues for limits, and among the calls at the same time."""

    __slots__ = ("_admission", "_context", "_held", "_is_admitted", "_queues", "_tokens")

    def __init__(
        self,
        admission: Admission,
        queues: tuple[Throttle, Throttle],
        tokens: int,
        context: Context,
    ) -> None:
        self._admission = admission
        self._queues = queues
        self._tokens = tokens
        self._context = context
        self._held: list[Throttle | asyncio.Semaphore] = []
        """What it has so far."""
        self._is_admitted = False

    async def __aenter__(self) -> None:
        context, admission = self._context, self._admission
        until = context.deadline if context.begin_by is None else context.begin_by
        is_free = all(queue.is_free for queue in self._queues) and not admission.slots.locked()
        try:
            if is_free and admission.connections is None:
                # Nothing is to be waited for, and nobody to be told.
                await self._enter(until)
            else:
                async with asyncio.timeout_at(until):
                    await self._enter(until)
        except TimeoutError as error:
            self._leave(is_unused=True)
            if context.begin_by is not None:
                message = "all the calls that it takes at a time are under way"
                said = Refusal(429, message, "requests", "rate_limit_exceeded")
                raise LocalQueueFull(admission.provider, message, said) from error
            raise DeadlineExceeded(
                f"the time of the request was up while it waited its turn at {admission.provider}"
            ) from error
        except BaseException:
            self._leave(is_unused=True)
            raise

    async def _enter(self, until: float | None) -> None:
        learned, slots = self._queues[0], self._admission.slots
        held_until = learned.held_until
        for queue in self._queues:
            await queue.acquire(self._tokens, until)
            self._held.append(queue)
        await slots.acquire()
        while learned.held_until != held_until:
            # A call was refused meanwhile, as this one would be.
            slots.release()
            held_until = learned.held_until
            await learned.pause(until)
            await slots.acquire()
        self._held.append(slots)
        if self._admission.connections is not None:
            await self._admission.connections.acquire()
            self._held.append(self._admission.connections)

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        self._leave(is_unused=isinstance(error, LocalQueueFull))

    def _leave(self, *, is_unused: bool) -> None:
        """Give everything back; the room within the limits only if no call was made."""
        for one in reversed(self._held):
            if isinstance(one, asyncio.Semaphore):
                one.release()
            else:
                one.release(self._tokens, is_unused=is_unused)
        self._held.clear()
