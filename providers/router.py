"""Tries the routes of one model in order until one answers. The only importer of tenacity.

All routes of a model serve one space, so it does not matter for the numbers which one answers.
Passing failures are tried again after a jittered wait, or after the wait the upstream asked for;
everything else goes to the next route at once. A refusal of the input itself ends the matter: no
other provider would take it.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from tenacity import (
    AsyncRetrying,
    RetryCallState,
    retry_if_exception,
    stop_after_attempt,
    wait_random_exponential,
)

from .base import (
    Context,
    DeadlineExceeded,
    Embedded,
    EmbeddingError,
    Input,
    InputRefused,
    NoRoute,
    PassingFailure,
    ProviderError,
    Space,
    UpstreamTimeout,
)

log = logging.getLogger("embedding_proxy.router")

ATTEMPTS = 3
"""The most attempts for one request, all routes together."""
ATTEMPTS_A_ROUTE = 2
"""The most attempts at one route while another is left."""
LONGEST_WAIT = 20.0
"""Seconds; an upstream that asks for more is left for the next route."""


class Provider(Protocol):
    """What a route needs of a provider: its name, and one attempt."""

    name: str

    @property
    def accepts_tokens(self) -> bool:
        """Whether token arrays may be sent as they are."""
        ...

    async def ask(
        self, model: str, space: Space, inputs: Sequence[Input], context: Context
    ) -> Embedded:
        """Make one attempt at the upstream's `model`. Raises EmbeddingError."""
        ...


@dataclass(frozen=True, slots=True)
class Route:
    """A provider and the name by which it knows the model; an Embedder of a single attempt."""

    provider: Provider
    model: str

    async def embed(self, space: Space, inputs: Sequence[Input], context: Context) -> Embedded:
        """Ask the provider once."""
        return await self.provider.ask(self.model, space, inputs, context)


class Router:
    """An Embedder over routes in order of preference.

    `unavailable` is what to tell the client when there are no routes. `sleep` takes seconds; tests
    inject one that does not wait.
    """

    def __init__(
        self,
        routes: Sequence[Route],
        *,
        unavailable: str = "no route is configured",
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self.routes = tuple(routes)
        self.unavailable = unavailable
        self._sleep = sleep

    async def embed(self, space: Space, inputs: Sequence[Input], context: Context) -> Embedded:
        """Return the first route's answer; raise the last route's error when none answers."""
        if not self.routes:
            raise NoRoute(self.unavailable)
        routes = self.routes
        if any(not isinstance(item, str) for item in inputs):
            routes = tuple(route for route in routes if route.provider.accepts_tokens)
            if not routes:
                raise InputRefused(
                    "No provider of this model takes token arrays, and these stand for no text.",
                    param="input",
                )
        left = ATTEMPTS
        failure: EmbeddingError | None = None
        for later, route in zip(range(len(routes) - 1, -1, -1), routes, strict=True):
            # Each later route keeps at least one attempt in reserve.
            turns = max(1, min(ATTEMPTS_A_ROUTE if later else left, left - later))
            retrying = self._retrying(turns, context)
            try:
                return await retrying(route.embed, space, inputs, context)
            except ProviderError as error:
                log.warning("%s", error)
                failure = error
            left -= retrying.statistics.get("attempt_number", 1)
            if left <= 0:
                break
        raise failure or DeadlineExceeded("the time of the request was up")

    def _retrying(self, turns: int, context: Context) -> AsyncRetrying:
        jitter = wait_random_exponential(multiplier=0.2, max=4.0)

        def left() -> float:
            if context.deadline is None:
                return LONGEST_WAIT
            return min(context.deadline - asyncio.get_running_loop().time(), LONGEST_WAIT)

        def wait(state: RetryCallState) -> float:
            asked = _failure(state).retry_after
            return min(jitter(state), max(left(), 0.0)) if asked is None else asked

        def worth_waiting(error: BaseException) -> bool:
            if not isinstance(error, PassingFailure) or isinstance(error, UpstreamTimeout):
                return False
            return (error.retry_after or 0.0) < left()

        return AsyncRetrying(
            stop=stop_after_attempt(turns),
            wait=wait,
            retry=retry_if_exception(worth_waiting),
            sleep=self._sleep,
            reraise=True,
        )


def _failure(state: RetryCallState) -> PassingFailure:
    """Return the failure that is about to be waited for."""
    error = state.outcome.exception() if state.outcome else None
    if not isinstance(error, PassingFailure):
        raise TypeError("only passing failures are waited for")
    return error
