"""Requests of this process, counted where they are answered: by route, status and duration."""

from bisect import bisect_left
from collections import Counter
from functools import cache

from aiohttp import web
from embedding_proxy.providers.histogram import BOUNDS_S, Histogram

CLIENT_GONE = 499
"""Counted where no reply was finished: the client was gone, or the reply was cut off."""
EMBEDDINGS = "embeddings"
LOGGED_ROUTES = frozenset((EMBEDDINGS, "models", "passthrough"))
"""Those whose requests have a line in the log; probes and pages for operators have none."""
_ROUTE_NAMES = (
    ("/embeddings", EMBEDDINGS),
    ("/models", "models"),
    ("/status", "status"),
    ("/metrics", "metrics"),
    ("{rest", "passthrough"),
    ("/", "other"),
)
"""A route's name, by what its path in the router holds; the first that fits counts."""


@cache
def _name(canonical: str) -> str:
    return next((name for part, name in _ROUTE_NAMES if part in canonical), "unknown")


def route_name(request: web.Request) -> str:
    """Return what a request asked for, as one of few words: no client can add one."""
    resource = request.match_info.route.resource
    return "unknown" if resource is None else _name(resource.canonical)


class RequestMetrics:
    """Requests of this process, counted where they are answered."""

    def __init__(self) -> None:
        self.counts: Counter[tuple[str, int]] = Counter()
        """By route and status."""
        self.durations: dict[str, Histogram] = {}
        self.hits = Histogram()
        """Durations of the requests that the fast path has answered."""
        self.is_change_known = False
        """Whether `on_change` was called since the last changes were published."""
        self.in_flight = 0
        self.on_change = do_nothing
        """Called after each change."""

    def observe_hit(self, seconds: float) -> None:
        """Count a request for embeddings that the fast path has answered; it has the status 200."""
        self.hits.counts[bisect_left(BOUNDS_S, seconds)] += 1
        self.hits.sum_s += seconds
        if not self.is_change_known:
            self.is_change_known = True
            self.on_change()

    def observe(self, route: str, status: int, seconds: float) -> None:
        """Count a request that was answered."""
        self.counts[route, status] += 1
        histogram = self.durations.get(route)
        if histogram is None:
            histogram = self.durations[route] = Histogram()
        histogram.observe(seconds)
        self.is_change_known = True
        self.on_change()


def do_nothing() -> None:
    """Do nothing: nobody wants to know of changes."""
