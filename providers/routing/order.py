"""Orders a model's routes by preference; it does not decide whether one may be asked."""

import math
from collections.abc import Callable, Sequence
from typing import Literal, TypeAlias

from embedding_proxy.providers.charge import Bill

from .route import Route

Order: TypeAlias = Literal["listed", "cheapest", "fastest"]

WEIGHT = 0.2
"""What the newest measurement counts in the average; the older ones fade."""
INPUTS_A_CALL = 200
"""So many inputs take about as long as what every call takes anyway."""
TRY_EVERY = 30.0
"""Seconds after which a route that was not asked is put first for one call."""
ENOUGH = 1000
"""Tokens from which on the charges of an upstream tell its price."""
FADE = 0.95
"""What a call still counts in its route's price when the next one has come."""


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

    def note_attempt(self, route: Route) -> None:
        """Note that a route is being asked."""
        self._asked[route] = self._clock()

    def note_answer(self, route: Route, seconds: float, inputs: int) -> None:
        """Note how long a good answer to so many inputs took."""
        seconds /= 1 + inputs / INPUTS_A_CALL
        average = self._seconds.get(route)
        change = 0.0 if average is None else WEIGHT * (seconds - average)
        self._seconds[route] = seconds if average is None else average + change

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


class Prices:
    """What each route charges: what its upstream names in its replies, else what is configured.

    An upstream may round what it charges for a call, or sell one call cheaper: so its word counts
    from ENOUGH tokens on, and older calls count less and less.
    """

    def __init__(self) -> None:
        self._charged: dict[Route, tuple[float, float]] = {}

    def note_charge(self, route: Route, bill: Bill) -> None:
        """Note what a call was charged."""
        if bill.told:
            tokens, cost = (FADE * sum_ for sum_ in self._charged.get(route, (0.0, 0.0)))
            self._charged[route] = (tokens + sum(bill.tokens), cost + sum(bill.nanodollars))

    def price(self, route: Route) -> float | None:
        """Return a price in USD per million tokens; None where nobody knows."""
        tokens, cost = self._charged.get(route, (0.0, 0.0))
        return cost / tokens / 1000 if tokens >= ENOUGH else route.price

    def arrange(self, routes: Sequence[Route]) -> list[Route]:
        """Return the cheapest first; of unknown price are the last, in the order listed."""
        prices = {route: self.price(route) for route in routes}
        return sorted(routes, key=lambda route: _or_infinity(prices[route]))


def _or_infinity(price: float | None) -> float:
    return math.inf if price is None else price
