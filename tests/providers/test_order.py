"""Which route is preferred; the clock is ours."""

from itertools import count

import pytest
from clock import Clock
from embedding_proxy.providers.charge import Bill
from embedding_proxy.providers.routing.order import (
    ENOUGH,
    INPUTS_A_CALL,
    TRY_EVERY,
    Latencies,
    Prices,
)
from embedding_proxy.providers.routing.route import Route


class Named:
    accepts_tokens = True

    def __init__(self, name):
        self.name = name


def routes(**prices):
    """Return routes with these prices."""
    return [Route(Named(name), "m", price) for name, price in prices.items()]


def names(arranged):
    """Return the names of routes as one word."""
    return "".join(route.name for route in arranged)


@pytest.mark.parametrize(
    ("prices", "order"),
    [
        ({"a": 0.1, "b": 0.02, "c": 0.05}, "bca"),
        ({"a": None, "b": 0.02}, "ba"),
        ({"a": None, "b": None}, "ab"),
        ({"a": 0.1, "b": 0.1}, "ab"),
        ({"a": 0.1, "b": 0.0}, "ba"),
    ],
)
def test_the_cheapest_is_first(prices, order):
    """Equal prices stay as listed, unknown ones are last, and nothing is cheaper than free."""
    assert names(Prices().arrange(routes(**prices))) == order


def bill(tokens, nanodollars, *, told=True):
    """Return what a call of so many tokens was charged."""
    return Bill("any", [0], [tokens], [nanodollars], told)


def test_what_an_upstream_charges_counts_more_than_what_is_configured():
    """From enough tokens on, so that a rounded sum decides nothing; what we count counts never."""
    prices = Prices()
    a, b = two = routes(a=0.1, b=0.02)
    prices.note_charge(b, bill(10, 10_000))
    prices.note_charge(b, bill(10**6, 10**9, told=False))
    assert names(prices.arrange(two)) == "ba"
    prices.note_charge(b, bill(ENOUGH, 200 * ENOUGH))
    assert prices.price(b) == pytest.approx(0.2, rel=0.1)
    assert names(prices.arrange(two)) == "ab"
    assert prices.price(a) == 0.1


def test_a_new_price_is_learned():
    """What was charged long ago fades."""
    prices = Prices()
    (a,) = routes(a=None)
    for _ in range(100):
        prices.note_charge(a, bill(1000, 20_000))
    for _ in range(100):
        prices.note_charge(a, bill(1000, 50_000))
    assert prices.price(a) == pytest.approx(0.05, rel=0.02)


def measured(latencies, route, *seconds, inputs=1):
    """Note answers of a route."""
    for one in seconds:
        latencies.note_attempt(route)
        latencies.note_answer(route, one, inputs)


def test_the_fastest_is_first():
    """Measured routes stand in the order of their averages."""
    latencies = Latencies(Clock())
    a, b, c = three = routes(a=None, b=None, c=None)
    assert names(latencies.arrange(three)) == "abc"
    for route, seconds in ((a, 3.0), (b, 1.0), (c, 2.0)):
        measured(latencies, route, seconds)
    assert names(latencies.arrange(three)) == "bca"


def test_old_measurements_fade():
    """One slow answer does not turn the order, a slow minute does."""
    latencies = Latencies(Clock())
    a, b = two = routes(a=None, b=None)
    measured(latencies, a, *[1.0] * 10)
    measured(latencies, b, *[1.5] * 10)
    measured(latencies, a, 3.0)
    assert names(latencies.arrange(two)) == "ab"
    measured(latencies, a, *[3.0] * 5)
    assert names(latencies.arrange(two)) == "ba"


def test_a_large_batch_does_not_make_a_route_slow():
    """What a call of many inputs takes is put down to their number."""
    latencies = Latencies(Clock())
    a, b = two = routes(a=None, b=None)
    measured(latencies, a, 0.2 * (1 + 2000 / INPUTS_A_CALL), inputs=2000)
    measured(latencies, b, 0.4)
    assert latencies.seconds(a) == pytest.approx(0.2)
    assert names(latencies.arrange(two)) == "ab"


def test_a_route_that_was_not_asked_for_long_gets_one_call():
    """An unmeasured route is tried once, then no sooner than half a minute later."""
    clock = Clock()
    latencies = Latencies(clock)
    a, b = two = routes(a=None, b=None)
    measured(latencies, a, 1.0)
    firsts = []
    for _ in range(100):
        first = latencies.arrange(two)[0]
        firsts.append(first.name)
        latencies.note_attempt(first)
        if first is a:
            latencies.note_answer(a, 1.0, 1)
        clock.now += TRY_EVERY / 40
    assert "".join(firsts).count("b") == 3
    measured(latencies, b, 0.5)
    assert names(latencies.arrange(two)) == "ba"


def test_only_one_of_several_is_tried_at_a_time():
    """Of those never asked, the first listed is tried first, each with one call."""
    clock = Clock()
    latencies = Latencies(clock)
    a, *_ = four = routes(a=None, b=None, c=None, d=None)
    measured(latencies, a, 1.0)
    tried = []
    for _ in count():
        first = latencies.arrange(four)[0]
        if first is a:
            break
        tried.append(first.name)
        latencies.note_attempt(first)
    assert "".join(tried) == "bcd"


def test_the_most_neglected_route_is_tried_first():
    """Of several that were not asked for long, it is the one asked longest ago."""
    clock = Clock()
    latencies = Latencies(clock)
    a, b, c = three = routes(a=None, b=None, c=None)
    for route, seconds in ((c, 3.0), (b, 2.0), (a, 1.0)):
        measured(latencies, route, seconds)
        clock.now += 1
    clock.now += TRY_EVERY
    latencies.note_attempt(a)
    assert names(latencies.arrange(three)) == "cab"
