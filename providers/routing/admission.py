"""The queue before one provider: its limits per minute, those of a model, and calls at a time."""

import asyncio
from collections import OrderedDict
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import AsyncExitStack, asynccontextmanager

from providers.base import Context, DeadlineExceeded, Full, Refusal
from providers.limits import Limits

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
        self._connections = connections
        self._provider = provider
        self._learns = limits.learn
        self._sleep = sleep
        self._slots = asyncio.Semaphore(limits.concurrency)
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
            known = self._learned[model] = Throttle(self._provider, sleep=self._sleep)
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

    @asynccontextmanager
    async def turn(self, model: str, tokens: int, context: Context) -> AsyncIterator[None]:
        """Hold a place within both sorts of limits, then among the calls at the same time.

        In this order: who queues for the limit of one model takes no place from the others. Raises
        Full, or DeadlineExceeded.
        """
        learned = self._of(model)
        until = context.deadline if context.begin_by is None else context.begin_by
        async with AsyncExitStack() as stack:
            try:
                async with asyncio.timeout_at(until):
                    held = learned.held_until
                    rooms = [
                        await stack.enter_async_context(throttle.turn(tokens, until))
                        for throttle in (learned, self._declared)
                    ]
                    await self._slots.acquire()
                    while learned.held_until != held:
                        # A call was refused meanwhile, as this one would be.
                        self._slots.release()
                        held = learned.held_until
                        await learned.pause(until)
                        await self._slots.acquire()
                    stack.callback(self._slots.release)
                    if self._connections is not None:
                        await self._connections.acquire()
                        stack.callback(self._connections.release)
                    for room in rooms:
                        room.is_used = True
            except TimeoutError as error:
                if context.begin_by is not None:
                    message = "all the calls that it takes at a time are under way"
                    said = Refusal(429, message, "requests", "rate_limit_exceeded")
                    raise Full(self._provider, message, said) from error
                raise DeadlineExceeded(
                    f"the time of the request was up while it waited its turn at {self._provider}"
                ) from error
            yield
