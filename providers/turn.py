"""One route's turn in a request: may it be asked, how often, and what its failures mean.

A journey is what the attempts of one request share, whichever routes they go to.
"""

import asyncio
import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from . import faults
from .base import (
    Context,
    CredentialsRefused,
    Embedded,
    EmbeddingError,
    Input,
    PassingFailure,
    ProviderError,
    RateLimited,
    Space,
    UpstreamTimeout,
)
from .breaker import Permit, Verdict
from .health import Upstreams
from .order import Latencies
from .route import Route

log = logging.getLogger("embedding_proxy.router")

ATTEMPTS = 3
"""The most attempts for one request, all routes together."""
ATTEMPTS_A_ROUTE = 2
"""The most attempts at one route while another is left."""
LONGEST_WAIT = 20.0
"""Seconds; an upstream that asks for more is left for the next route."""
PROBE_LIMIT = 10.0
"""Seconds that a probe may take of a request that another route could answer."""


class Shut(EmbeddingError):
    """The provider may not be asked now. Never leaves the router."""


@dataclass(slots=True)
class Journey:
    """A request on its way over the routes."""

    space: Space
    inputs: Sequence[Input]
    context: Context
    left: int = ATTEMPTS
    """Attempts that may still be made."""
    asked: list[Route] = field(default_factory=list)
    """Routes that were asked, in order."""
    hedged: bool = False
    """Whether a second route is or was asked beside the first."""
    failure: ProviderError | None = None
    """What to tell the client when no route answers."""

    def failed(self, error: ProviderError) -> None:
        """Keep the failure that says most: the last one that may pass, else the last one."""
        if isinstance(error, PassingFailure) or not isinstance(self.failure, PassingFailure):
            self.failure = error


@dataclass(slots=True)
class Counts:
    """What the turns of one router have done since the start."""

    attempts: int = 0
    retries: int = 0
    """Attempts at the provider that had just failed."""
    failovers: int = 0
    """Turns of a route after another's."""
    hedges: int = 0
    refused: int = 0
    """Requests for which no provider could be asked."""
    failures: Counter[str] = field(default_factory=Counter)
    """Failed attempts by class of the error."""


class Turn:
    """Asks one route for one request. `later` is how many more routes could be asked after it."""

    def __init__(  # noqa: PLR0913 - what a router shares with its turns
        self,
        route: Route,
        journey: Journey,
        later: int,
        *,
        upstreams: Upstreams,
        latencies: Latencies,
        counts: Counts,
    ) -> None:
        self._route = route
        self._journey = journey
        self._later = later
        self._upstreams = upstreams
        self._budget = upstreams.budget
        self._health = upstreams.of(route.name)
        self._latencies = latencies
        self._counts = counts
        self._made = 0
        # Each later route keeps at least one attempt in reserve.
        most = ATTEMPTS_A_ROUTE if later else journey.left
        self._most = max(1, min(most, journey.left - later))
        self._failure: ProviderError | None = None
        self._receipt: float | None = None
        self._scouting = False
        self._rested = False

    async def go_on(self) -> None:
        """Wait until the request, having failed elsewhere, may go on to this route.

        The rules are told in `budget`. Raises Shut, and TimeoutError at the request's deadline.
        """
        while self._health.breaker.ready():
            if self._health.proved:
                return
            if not (self._health.scouts or self._health.declined) or self._budget.affords():
                self._pay()
                self._scouting = True
                return
            if self._health.declined:
                raise Shut
            async with asyncio.timeout(self.time_left()):
                await self._health.news()
        raise Shut

    def hedge(self) -> bool:
        """Pay for an attempt beside another that is still under way, if that can be afforded."""
        affordable = self._health.breaker.ready() and self._budget.affords()
        if affordable:
            self._pay()
        return affordable

    async def ask(self) -> Embedded:
        """Make one attempt. Raises Shut when the provider may not be asked any more."""
        journey, health = self._journey, self._health
        # A hedge may have taken the last attempt.
        permit = health.enter(rested=self._rested) if journey.left > 0 else None
        if permit is None:
            self._refund()
            raise Shut
        journey.left -= 1
        if not journey.asked:
            self._budget.call()
        if self._made:
            self._counts.retries += 1
        else:
            journey.asked.append(self._route)
        self._made += 1
        self._counts.attempts += 1
        self._latencies.asked(self._route)
        free = self._receipt is None and len(journey.asked) > 1
        health.scouts += self._scouting
        begun = self._upstreams.clock()
        try:
            embedded = await self._embed(permit)
        except ProviderError as error:
            self._note(error)
            if free and faults.rule(error).verdict is Verdict.BAD:
                self._budget.spend()
            health.failed(permit, error)
            raise
        except BaseException:
            health.abandoned(permit)
            raise
        finally:
            health.scouts -= self._scouting
        if self._scouting:
            self._refund()
        seconds = self._upstreams.clock() - begun
        self._latencies.answered(self._route, seconds, len(journey.inputs))
        health.answered(permit)
        return embedded

    def again(self, error: BaseException) -> bool:
        """Tell whether the same provider is to be asked again after an error; if so, pay for it."""
        if not isinstance(error, ProviderError):
            return False
        self._receipt, self._scouting = None, False
        # Who was told a time, and waits for it, has done its part of the provider's rest.
        self._rested |= isinstance(error, RateLimited) and error.retry_after is not None
        wait = error.retry_after or 0.0
        again = (
            self._made < self._most
            and self._made <= faults.rule(error).again
            and wait < self.time_left(LONGEST_WAIT)
            and self._health.breaker.ready(rested=self._rested)
            and self._budget.affords()
        )
        if again:
            self._pay()
        return again

    def wait(self, jitter: float) -> float:
        """Return the seconds to wait before the next attempt: what was asked for, or the jitter."""
        asked = self._failure.retry_after if self._failure else None
        return min(jitter, self.time_left(LONGEST_WAIT)) if asked is None else asked

    def time_left(self, most: float | None = None) -> float:
        """Return the seconds until the request's deadline, at most `most`."""
        deadline = self._journey.context.deadline
        left = float("inf") if deadline is None else deadline - self._upstreams.clock()
        return max(left if most is None else min(left, most), 0.0)

    async def _embed(self, permit: Permit) -> Embedded:
        """Ask within the time that leaves the later routes theirs. Raises UpstreamTimeout."""
        journey, limit = self._journey, None
        if self._later and journey.context.deadline is not None:
            limit = self.time_left() / (self._later + 1) or None
        if self._later and permit.probe:
            limit = min(limit or PROBE_LIMIT, PROBE_LIMIT)
        try:
            async with asyncio.timeout(limit) as scope:
                return await self._route.embed(journey.space, journey.inputs, journey.context)
        except TimeoutError as error:
            if limit is None or not scope.expired():
                raise
            raise UpstreamTimeout(self._route.name, f"no answer within {limit:.1f} s") from error

    def _note(self, error: ProviderError) -> None:
        self._failure = error
        self._journey.failed(error)
        self._counts.failures[type(error).__name__] += 1
        if isinstance(error, CredentialsRefused):
            log.error("%s: THE PROXY'S OWN KEY IS NOT ACCEPTED: %s", self._route.name, error)

    def give_up(self) -> None:
        """Say in the log why this route did not answer."""
        if self._failure is not None and not isinstance(self._failure, CredentialsRefused):
            log.warning("%s", self._failure)

    def _pay(self) -> None:
        self._receipt = self._budget.spend()

    def _refund(self) -> None:
        if self._receipt is not None:
            self._budget.refund(self._receipt)
            self._receipt = None
