"""The queue before one provider: its limits per minute, those of a model, and calls at a time."""

import asyncio
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Mapping
from types import TracebackType

from embedding_proxy.providers.base import Context, DeadlineExceeded, LocalQueueFull, Refusal
from embedding_proxy.providers.limits import Limits

from .throttle import Throttle

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
