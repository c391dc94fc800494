"""In which order a model's routes are preferred; whether one may be asked is not decided here."""

import math
from collections.abc import Callable, Sequence
from typing import Literal, TypeAlias

from .route import Route

Order: TypeAlias = Literal["listed", "cheapest", "fastest"]

WEIGHT = 0.2
"""What the newest measurement counts in the average; the older ones fade."""
INPUTS_A_CALL = 200
"""So many inputs take about as long as what every call takes anyway."""
TRY_EVERY = 30.0
"""Seconds after which a route that was not asked is put first for one call."""


class Latencies:
    """How fast each route answers: an exponentially weighted average of seconds.

    A call's time is a fixed part and a part for each input. The average of the plain times would
    make the route look slow that happened to get the large batches, and the time an input takes
    would make it look fast. So the time is divided by `1 + inputs / INPUTS_A_CALL`: the seconds of
    a call of few inputs. Only good answers are measured: a quick refusal is no speed.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._seconds: dict[Route, float] = {}
        self._asked: dict[Route, float] = {}

    def asked(self, route: Route) -> None:
        """Note that a route is being asked."""
        self._asked[route] = self._clock()

    def answered(self, route: Route, seconds: float, inputs: int) -> None:
        """Note how long a good answer to so many inputs took."""
        seconds /= 1 + inputs / INPUTS_A_CALL
        known = self._seconds.get(route)
        self._seconds[route] = seconds if known is None else known + WEIGHT * (seconds - known)

    def seconds(self, route: Route) -> float | None:
        """Return the average of a route in seconds, None before its first good answer."""
        return self._seconds.get(route)

    def arrange(self, routes: Sequence[Route]) -> list[Route]:
        """Return the fastest first. One that was not asked for long is first, for one call.

        A route that was never measured is last, in the order listed, but for that one call: with
        that, it is asked no more than once every `TRY_EVERY` seconds.
        """
        arranged = sorted(routes, key=lambda route: self._seconds.get(route, math.inf))
        if any(route in self._seconds for route in routes):
            now = self._clock()
            due = [r for r in arranged if now - self._asked.get(r, -math.inf) >= TRY_EVERY]
            if due:
                # The most neglected one; of those never asked, the first that is listed.
                chosen = min(due, key=lambda route: self._asked.get(route, -math.inf))
                arranged.remove(chosen)
                arranged.insert(0, chosen)
        return arranged


def cheapest(routes: Sequence[Route]) -> list[Route]:
    """Return the cheapest first; those whose price is not known are last, in the order listed."""
    return sorted(routes, key=lambda route: math.inf if route.price is None else route.price)
