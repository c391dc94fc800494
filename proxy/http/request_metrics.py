"""Requests of this process, counted where they are answered: by route, status and duration."""

from bisect import bisect_left
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

from aiohttp import web
from embedding_proxy.providers.histogram import BOUNDS_S, Histogram

CLIENT_GONE = 499
"""Counted where no reply was finished: the client was gone, or the reply was cut off."""
EMBEDDINGS = "embeddings"
DASHBOARD = "dashboard"
LOGGED_ROUTES = frozenset((EMBEDDINGS, "models", "passthrough"))
"""Those whose requests have a line in the log; probes and pages for operators have none."""
_ROUTE_NAMES = (
    ("/embeddings", EMBEDDINGS),
    ("/models", "models"),
    ("/dashboard", DASHBOARD),
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
        """By route and status, but for those that `hits` and `misses` count."""
        self.durations: dict[str, Histogram] = {}
        """By route, likewise."""
        self.hits = Histogram()
        """Durations of requests for embeddings that were answered from the cache, with 200."""
        self.misses = Histogram()
        """Of those that were answered with 200, and something was bought or waited for."""
        self.is_change_known = False
        """Whether `on_change` was called since the last changes were published."""
        self.in_flight = 0
        self.on_change = do_nothing
        """Called after each change."""

    def observe_hit(self, seconds: float) -> None:
        """Count a request for embeddings that was answered from the cache, with the status 200."""
        self.hits.counts[bisect_left(BOUNDS_S, seconds)] += 1
        self.hits.sum_s += seconds
        if not self.is_change_known:
            self.is_change_known = True
            self.on_change()

    def observe(self, route: str, status: int, seconds: float, verdict: str | None = None) -> None:
        """Count a request that was answered; `verdict` is what its header `x-cache` says."""
        is_ours = route == EMBEDDINGS and status == 200  # A CDN behind the proxy has it, too.
        if is_ours and verdict == "hit":
            self.observe_hit(seconds)
            return
        if is_ours and verdict is not None:
            self.misses.observe(seconds)
        else:
            self.counts[route, status] += 1
            histogram = self.durations.get(route)
            if histogram is None:
                histogram = self.durations[route] = Histogram()
            histogram.observe(seconds)
        self.is_change_known = True
        self.on_change()

    @contextmanager
    def look_on(self) -> Iterator[None]:
        """Leave the request in progress out of `in_flight`: its reply ends with its reader."""
        self.in_flight -= 1
        try:
            yield
        finally:
            self.in_flight += 1

    @property
    def by_status(self) -> Counter[tuple[str, int]]:
        """All requests by route and status."""
        return self.counts + Counter({(EMBEDDINGS, 200): self.hits.count + self.misses.count})

    @property
    def by_route(self) -> dict[str, Histogram]:
        """The durations of all requests by route."""
        durations = dict(self.durations)
        if self.hits.count or self.misses.count:
            durations[EMBEDDINGS] = self.hits.plus(self.misses).plus(durations.get(EMBEDDINGS))
        return durations


def do_nothing() -> None:
    """Do nothing: nobody wants to know of changes."""
