"""The routes of one model: which may be asked, in which order, and what is said when none may.

All routes of a model serve one space, so it does not matter for the numbers which one answers.
Asks nobody: the scheduler sends the batches.
"""

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable, Collection, Sequence
from dataclasses import dataclass, field

from embedding_proxy.providers.base import Space
from embedding_proxy.providers.client_credential import Credential
from embedding_proxy.providers.errors import (
    ClientKeyRefused,
    EmbeddingError,
    InvalidRequest,
    NoProviderAvailable,
    NoRoute,
    RateLimited,
    Refusal,
)

from .health import Health, HealthRegistry
from .order import Latencies, Order, Prices
from .route import LimitKey, Provider, Route

__all__ = ["Counts", "Order", "Provider", "Route", "Router", "View"]


@dataclass(slots=True)
class Counts:
    """What was done for one model since the start."""

    attempts: int = 0
    retries: int = 0
    """Attempts at the provider that had just failed."""
    failovers: int = 0
    """Attempts at a further route."""
    hedges: int = 0
    refused: int = 0
    """Batches for which no provider could be asked."""
    failures: Counter[str] = field(default_factory=Counter)
    """Failed attempts by the error's reason; `local_queue_full` are those that were not made."""


class Router:
    """The routes of a model.

    `unavailable` is what to tell the client when there are no routes. `upstreams` is what is known
    of the providers, and is shared by the routers of all models. `order` says which route is
    preferred: as listed, by price, or by measured speed. With `hedge_after_s`, a batch that has no
    answer after so many seconds is sent to the next route as well. `sleep` takes seconds; tests
    inject one that does not wait.
    """

    def __init__(  # noqa: PLR0913 - the settings of a model, by name
        self,
        routes: Sequence[Route],
        *,
        unavailable: str = "no route is configured",
        upstreams: HealthRegistry | None = None,
        order: Order = "listed",
        hedge_after_s: float | None = None,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self.routes = tuple(routes)
        self.unavailable = unavailable
        self.upstreams = upstreams or HealthRegistry()
        self.counts = Counts()
        self.latencies = Latencies(self.upstreams.clock)
        self.prices = Prices()
        self.order = order
        self.hedge_after_s = hedge_after_s
        self.sleep = sleep

    def usable(
        self, space: Space, credential: Credential | None, *, is_text: bool
    ) -> Sequence[Route]:
        """Return the routes that take such inputs, and are paid with a key that is there.

        `is_text`: whether all inputs are texts.

        Raises NoRoute, ClientKeyRefused or InvalidRequest.
        """
        if not self.routes:
            raise NoRoute(self.unavailable)
        paid = [route for route in self.routes if route.takes(credential)]
        if not paid:
            raise ClientKeyRefused("This model is asked for with the client's own key; none came.")
        routes, objection = [], None
        for route in paid:
            problem = route.objection(space)
            if problem is None:
                routes.append(route)
            objection = objection or problem
        if objection is not None and not routes:
            raise objection
        if is_text:
            return routes
        routes = [route for route in routes if route.provider.accepts_tokens]
        if not routes:
            raise InvalidRequest(
                "No provider of this model takes token arrays, and these stand for no text.",
                param="input",
            )
        return routes


class View:
    """The routes of a model as one client with one space sees them, in the order preferred.

    Routes are left out that are in cooldown, or whose breaker is open. A provider that is half-open
    keeps its place for the one call that is let through as its probe: were every other one asked
    before it, it would never be found well again.
    """

    __slots__ = ("_limits", "credential", "router", "routes", "space")

    def __init__(
        self,
        router: Router,
        routes: tuple[Route, ...],
        space: Space,
        credential: Credential | None,
    ) -> None:
        self.router = router
        self.routes = routes
        self.space = space
        self.credential = credential
        self._limits: dict[Route, tuple[LimitKey, Health]] = {}

    def limits(self, route: Route) -> tuple[LimitKey, Health]:
        """Return the name under which the limits of a route hold here, and where."""
        limits = self._limits.get(route)
        if limits is None:
            key, health = route.limit_key(self.credential, self.space), self.health(route)
            limits = self._limits[route] = key, health
        return limits

    def key(self, route: Route) -> LimitKey:
        """Return the name under which the limits of a route hold here."""
        return self.limits(route)[0]

    def health(self, route: Route) -> Health:
        """Return what is known of the provider of a route."""
        return self.router.upstreams.of(route.name)

    def is_ready(self, route: Route, *, rested: bool = False) -> bool:
        """Tell whether a route may be asked now."""
        key, health = self.limits(route)
        return health.ready(key, rested=rested)

    def ready(self, tried: Collection[Route] = ()) -> Sequence[Route]:
        """Return the routes that were not tried and may be asked now, the preferred one first."""
        ready = [route for route in self.routes if route not in tried and self.is_ready(route)]
        return self.arrange(ready) if len(ready) > 1 else ready

    def first(self) -> Route:
        """Return the route that would be asked now; if none may be, the preferred one."""
        if len(self.routes) == 1:
            return self.routes[0]
        return (self.ready() or self.arrange(self.routes))[0]

    def arrange(self, routes: Sequence[Route]) -> Sequence[Route]:
        """Return routes in the order preferred."""
        match self.router.order:
            case "listed":
                return routes
            case "cheapest":
                return self.router.prices.arrange(routes)
            case "fastest":
                return self.router.latencies.arrange(routes)

    def cooldown_s(self) -> float | None:
        """Return the seconds until a rate limit ends, where nothing else is in the way; or None."""
        waits = []
        for route in self.routes:
            health, key = self.health(route), self.key(route)
            if health.lasting is not None:
                continue
            if health.held(key):
                return None
            waits.append(health.rest(key))
        return min(waits, default=None)

    def unavailable(self) -> EmbeddingError:
        """Say why no provider may be asked, and when the first of them may.

        Where no second try helps, that is what the provider itself said; where only rate limits are
        in the way, it is one of those.
        """
        states = [(self.health(route), self.key(route)) for route in self.arrange(self.routes)]
        passing = [(health, key) for health, key in states if health.lasting is None]
        if not passing:
            # The error was raised before, and each who is told of it has a traceback of its own.
            last = states[-1][0].lasting
            assert last is not None  # noqa: S101 - none of them is passing
            return last.with_index(None)
        wait = min(health.wait(key) for health, key in passing)
        reasons = [
            f"{health.name}: {health.why(key)}, asked again in {health.wait(key):.1f} s"
            for health, key in states
        ]
        message = "; ".join(dict.fromkeys(reasons))
        if any(health.held(key) for health, key in passing):
            return NoProviderAvailable(f"No provider can be asked just now ({message}).", wait)
        refusal = Refusal(429, message, "requests", "rate_limit_exceeded", wait)
        why = f"rate limited, asked again in {wait:.1f} s"
        return RateLimited(passing[0][0].name, why, refusal)
