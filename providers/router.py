"""Tries the routes of one model until one answers. The only importer of tenacity.

All routes of a model serve one space, so it does not matter for the numbers which one answers.
What follows from each failure is told in `faults`; how many attempts all requests together may add
is told in `budget`. A refusal of the input itself ends the matter: no other provider would take it.

Routes are asked in the order preferred, those left out that rest or whose breaker is open. A
provider that is half-open keeps its place for the one call that is let through as its probe: were
every other one asked before it, it would never be found well again. If the probe fails, that
request goes on to the next route like any other.
"""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import TypeAlias

from tenacity import AsyncRetrying, RetryCallState, retry_if_exception, wait_random_exponential

from providers.batching.within import limits_of
from providers.routing.counts import Counts
from providers.routing.health import Upstreams
from providers.routing.journey import ATTEMPTS, Journey, attempts
from providers.routing.lane import Lane
from providers.routing.order import Latencies, Order, Prices
from providers.routing.route import Provider, Route
from providers.routing.turn import ATTEMPTS_A_ROUTE, LONGEST_WAIT, Shut, Turn
from providers.scheduling.dispatcher import NextRoute

from .base import (
    AllResting,
    ClientKeyRefused,
    Context,
    Credential,
    DeadlineExceeded,
    Embedded,
    EmbeddingError,
    Full,
    Input,
    InputRefused,
    NoRoute,
    ProviderError,
    RateLimited,
    Refusal,
    Space,
)
from .limits import Limits

__all__ = ["ATTEMPTS", "ATTEMPTS_A_ROUTE", "LONGEST_WAIT", "Order", "Provider", "Route", "Router"]

MIN_TOLD_COOLDOWN = 1.0
"""Seconds; a shorter rest after a rate limit that named no time is not told to clients."""
MIN_COOLDOWN_WAIT = 0.1
"""Seconds of its patience that each wait for the end of a rate limit takes from a request."""

LaneOf: TypeAlias = Callable[[Route], Lane]
"""Returns the lane of a route that a request is in."""

_jitter = wait_random_exponential(multiplier=0.2, max=4.0)


class Router:
    """An Embedder over routes.

    `unavailable` is what to tell the client when there are no routes. `upstreams` is what is known
    of the providers, and is shared by the routers of all models. `order` says which route is
    preferred: as listed, by price, or by measured speed. With `hedge_after_s`, a request that has
    no answer after so many seconds is sent to the next route as well. `sleep` takes seconds; tests
    inject one that does not wait.
    """

    def __init__(  # noqa: PLR0913 - the settings of a model, by name
        self,
        routes: Sequence[Route],
        *,
        unavailable: str = "no route is configured",
        upstreams: Upstreams | None = None,
        order: Order = "listed",
        hedge_after_s: float | None = None,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self.routes = tuple(routes)
        self.unavailable = unavailable
        self.upstreams = upstreams or Upstreams()
        self.counts = Counts()
        self.latencies = Latencies(self.upstreams.clock)
        self.prices = Prices()
        self._order = order
        self._hedge_after_s = hedge_after_s
        self._sleep = sleep

    async def embed(self, space: Space, inputs: Sequence[Input], context: Context) -> Embedded:
        """Return the first good answer. Raises EmbeddingError, and then what says most.

        When no provider may be asked it is raised without waiting for anything, unless only a rate
        limit is in the way that ends soon.
        """
        credential = context.credential

        def lane(route: Route) -> Lane:
            return route.lane(credential, space)

        routes = self._preferred(self._able(space, inputs, credential), lane)
        journey = Journey(space, inputs, context, self.prices.charged, attempts(routes))
        patience = LONGEST_WAIT
        while True:
            try:
                answer = await self._ask_routes(routes, journey)
            except Shut:
                if journey.failure is not None:
                    raise self._explained(journey, journey.failure) from None
                wait = self._cooldown(routes, lane)
                max_wait = min(patience, _time_left(context, self.upstreams.clock))
                if wait is None or wait > max_wait or not journey.is_needed:
                    self.counts.refused += 1
                    raise self._unavailable(routes, lane) from None
                patience -= max(wait, MIN_COOLDOWN_WAIT)
                await self._sleep(wait)
                if not journey.is_needed:
                    raise self._unavailable(routes, lane) from None
            except TimeoutError as error:
                raise DeadlineExceeded("the time of the request was up") from error
            else:
                # Another try, or another route, has answered: it was none of the inputs.
                for name, blamed in journey.unexplained:
                    self.upstreams.of(name).blame(blamed)
                return answer

    def _explained(self, journey: Journey, failure: ProviderError) -> ProviderError:
        """Return the failure of a request, with what is known of it besides."""
        failure.unexplained = tuple(journey.unexplained)
        said = failure.refusal
        if isinstance(failure, RateLimited) and said is not None and not said.retry_after:
            lanes = {one.name: journey.lane(one) for one in journey.asked}
            wait = self.upstreams.of(failure.provider).rest(lanes.get(failure.provider, ""))
            if wait > MIN_TOLD_COOLDOWN:
                failure.refusal = replace(said, retry_after=wait)
        return failure

    async def _ask_routes(self, routes: Sequence[Route], journey: Journey) -> Embedded:
        if self._hedge_after_s is not None and len(routes) > 1:
            return await self._race(routes, journey, self._hedge_after_s)
        return await self._walk(routes, journey)

    def next_route(self, credential: Credential | None, space: Space | None = None) -> NextRoute:
        """Return the route that a batch would be sent to now: the first that may be asked."""
        routes = [one for one in self.routes if one.takes(credential)] or self.routes
        if not routes:
            return NextRoute(Limits(), asyncio.Semaphore(1), has_alternative=False, call_s=None)

        def lane_of(route: Route) -> Lane:
            return route.lane(credential, space)

        ready = [route for route in routes if self._ready(route, lane_of)]
        route = self._preferred(ready or routes, lane_of)[0]
        concurrency = limits_of(route.provider).concurrency
        lane = lane_of(route)
        slots = self.upstreams.slots(route.name, lane, concurrency)
        health = self.upstreams.of(route.name)
        return NextRoute(
            route.limits,
            slots,
            has_alternative=len(ready) > 1,
            call_s=self.latencies.seconds(route),
            is_blamed=partial(health.is_blamed, lane) if health.has_blamed else None,
        )

    def may_search(self, credential: Credential | None) -> bool:
        """Tell whether two more calls may find out if one input is to blame; if so, count them."""
        budget = self.upstreams.budget_of(credential)
        if not budget.affords():
            return False
        budget.spend()
        budget.spend()
        return True

    def blame_provider(self, error: ProviderError) -> None:
        """Count a failure against the providers that it is of: no single input is to blame."""
        for name, lane in error.unexplained:
            self.upstreams.of(name).blame(lane)

    def blame_input(
        self,
        error: ProviderError,
        item: Input,
        credential: Credential | None,
        space: Space | None = None,
    ) -> None:
        """Note that an input, and not the provider, is to blame for a failure."""
        for route in self.routes:
            if route.name == error.provider:
                self.upstreams.of(route.name).blame_input(route.lane(credential, space), item)

    def _able(
        self, space: Space, inputs: Sequence[Input], credential: Credential | None
    ) -> Sequence[Route]:
        """Return the routes that take such inputs, and are paid with a key that is at hand.

        Raises NoRoute, ClientKeyRefused or InputRefused.
        """
        if not self.routes:
            raise NoRoute(self.unavailable)
        paid = self._paid(credential)
        objections = {route: route.objection(space) for route in paid}
        routes = [route for route in paid if objections[route] is None]
        if not routes:
            raise next(objection for objection in objections.values() if objection)
        if all(isinstance(item, str) for item in inputs):
            return routes
        routes = [route for route in routes if route.provider.accepts_tokens]
        if not routes:
            raise InputRefused(
                "No provider of this model takes token arrays, and these stand for no text.",
                param="input",
            )
        return routes

    def _paid(self, credential: Credential | None) -> Sequence[Route]:
        """Return the routes for which there is a key. Raises ClientKeyRefused."""
        routes = [route for route in self.routes if route.takes(credential)]
        if not routes:
            raise ClientKeyRefused("This model is asked for with the client's own key; none came.")
        return routes

    def _preferred(self, routes: Sequence[Route], lane: LaneOf) -> Sequence[Route]:
        match self._order:
            case "listed":
                return routes
            case "cheapest":
                return self.prices.arrange(routes)
            case "fastest":
                ready = [route for route in routes if self._ready(route, lane)]
                rest = [route for route in routes if route not in ready]
                return [*self.latencies.arrange(ready), *rest]

    def _ready(self, route: Route, lane: LaneOf) -> bool:
        return self.upstreams.of(route.name).ready(lane(route))

    async def _walk(self, routes: Sequence[Route], journey: Journey) -> Embedded:
        """Ask one route after the other. Raises Shut when none has answered."""
        for place, route in enumerate(routes):
            if journey.left <= 0:
                break
            if route in journey.asked or not self._ready(route, journey.lane):
                continue
            turn = self._turn(route, journey, routes[place + 1 :])
            if journey.begun:
                if not journey.is_needed:
                    break
                try:
                    await turn.go_on()
                except Shut:
                    continue
            self.counts.failovers += bool(journey.asked)
            try:
                return await self._ask(turn)
            except (ProviderError, Shut):
                turn.give_up()
        raise Shut

    async def _ask(self, turn: Turn) -> Embedded:
        """Ask one route, and again where that may help. Raises ProviderError, Shut."""
        try:
            return await turn.ask()
        except ProviderError as error:
            failed = [error]

        async def again() -> Embedded:
            if failed:
                raise failed.pop()
            return await turn.ask()

        # Made after a failure only: it takes as long as a tenth of the whole way upstream.
        return await self._retrying(turn)(again)

    async def _race(self, routes: Sequence[Route], journey: Journey, after: float) -> Embedded:
        """Walk, and ask one more route beside if that takes long; the first good answer wins."""
        walk = asyncio.create_task(self._walk(routes, journey))
        hedge = asyncio.create_task(self._hedge(routes, journey, after))
        pending = {walk, hedge}
        try:
            while pending:
                done, pending = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
                for task in done:
                    error = task.exception()
                    if error is None:
                        return task.result()
                    if not isinstance(error, Shut):
                        raise error
                if walk in done and not journey.hedged:
                    break
            raise Shut
        finally:
            walk.cancel()
            hedge.cancel()
            await asyncio.gather(walk, hedge, return_exceptions=True)

    async def _hedge(self, routes: Sequence[Route], journey: Journey, after: float) -> Embedded:
        """Ask the next route once when the time has come. Raises Shut when that gives nothing."""
        await self._sleep(after)
        for route in routes:
            if route in journey.asked or not self._ready(route, journey.lane):
                continue
            turn = self._turn(route, journey, ())
            if not turn.hedge():
                break
            journey.hedged = True
            self.counts.hedges += 1
            try:
                return await turn.ask()
            except Full:
                turn.give_up()
                self.counts.hedges -= 1
            except ProviderError:
                turn.give_up()
                break
        raise Shut

    def _turn(self, route: Route, journey: Journey, after: Sequence[Route]) -> Turn:
        later = (other for other in after if other not in journey.asked)
        return Turn(
            route,
            journey,
            sum(self._ready(other, journey.lane) for other in later),
            upstreams=self.upstreams,
            latencies=self.latencies,
            counts=self.counts,
        )

    def _retrying(self, turn: Turn) -> AsyncRetrying:
        def wait(state: RetryCallState) -> float:
            return turn.wait(_jitter(state))

        return AsyncRetrying(
            retry=retry_if_exception(turn.again), wait=wait, sleep=self._sleep, reraise=True
        )

    def _cooldown(self, routes: Sequence[Route], lane_of: LaneOf) -> float | None:
        """Return the seconds until a rate limit ends, where nothing else is in the way; or None."""
        waits = []
        for route in routes:
            health, lane = self.upstreams.of(route.name), lane_of(route)
            if health.lasting is not None:
                continue
            if health.held(lane):
                return None
            waits.append(health.rest(lane))
        return min(waits, default=None)

    def _unavailable(self, routes: Sequence[Route], lane_of: LaneOf) -> EmbeddingError:
        """Say why no provider may be asked, and when the first of them may.

        Where no second try helps, that is what the provider itself said; where only rate limits are
        in the way, it is one of those.
        """
        known = [(self.upstreams.of(route.name), lane_of(route)) for route in routes]
        passing = [(health, lane) for health, lane in known if health.lasting is None]
        if not passing:
            # The error was raised before, and each who is told of it has a traceback of its own.
            last = known[-1][0].lasting
            assert last is not None  # noqa: S101 - none of them is passing
            return last.at(None)
        wait = min(health.wait(lane) for health, lane in passing)
        reasons = [
            f"{health.name}: {health.why(lane)}, asked again in {health.wait(lane):.1f} s"
            for health, lane in known
        ]
        told = "; ".join(dict.fromkeys(reasons))
        if any(health.held(lane) for health, lane in passing):
            return AllResting(f"No provider can be asked just now ({told}).", wait)
        said = Refusal(429, told, "requests", "rate_limit_exceeded", wait)
        return RateLimited(passing[0][0].name, f"rate limited, asked again in {wait:.1f} s", said)


def _time_left(context: Context, clock: Callable[[], float]) -> float:
    return float("inf") if context.deadline is None else context.deadline - clock()
