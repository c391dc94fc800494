"""What a call was charged: told once for each, to the token, and to those whose inputs it had."""

import asyncio
from dataclasses import replace
from functools import partial

import pytest
from embedding_proxy.providers.base import Context, Space
from embedding_proxy.providers.charge import MAX_NANODOLLARS, Account, Bill, Charge, nanodollars
from embedding_proxy.providers.errors import InvalidAnswer, RateLimited
from embedding_proxy.providers.profile import Limits
from embedding_proxy.providers.route_check import call_route
from embedding_proxy.providers.routing.route import Route
from embedding_proxy.providers.routing.router import Router
from embedding_proxy.providers.scheduling.scheduler import Scheduler
from embedding_proxy.providers.tokens import share
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.providers.fakes import Upstream, schedule, tokens_of

SPACE = Space("m", 2)
LIST_PRICE = Account("m", "c", price=0.02)


class Charging(Upstream):
    """A provider that charges what it is told to, each call as it comes."""

    name = "shop"
    accepts_tokens = True

    def __init__(self, charges=lambda _: None, limits=None, failure=lambda _: None):
        super().__init__(failure)
        self.charges = charges
        self.limits = limits or Limits()
        self.charged = []

    async def ask(self, model, space, inputs, context):
        charge = self.charges(inputs)
        try:
            answer = await self.embed(space, inputs, context)
        except InvalidAnswer as error:
            error.charge = charge
            self.charged.append(charge)
            raise
        self.charged.append(charge or Charge(sum(map(tokens_of, inputs))))
        return replace(answer, charge=charge)


async def _bills(embed, inputs, account=LIST_PRICE):
    """Return the bills of a request, and what it failed with."""
    bills = []
    try:
        await embed(SPACE, inputs, Context(account=account, on_charge=bills.append))
    except (InvalidAnswer, RateLimited) as error:
        return bills, error
    return bills, None


ABC = ["a", "bb", "ccc"]  # 2 + 3 + 4 tokens


@pytest.mark.parametrize(
    ("charge", "price", "tokens", "cost"),
    [
        (None, None, [2, 3, 4], [40, 60, 80]),
        (None, 0.5, [2, 3, 4], [1000, 1500, 2000]),
        (None, 0.0, [2, 3, 4], [0, 0, 0]),
        (Charge(9), None, [2, 3, 4], [40, 60, 80]),
        (Charge(18), None, [4, 6, 8], [80, 120, 160]),
        (Charge(10), None, [2, 3, 5], [44, 67, 89]),
        (Charge(9, 18), 0.5, [2, 3, 4], [4, 6, 8]),
        (Charge(None, 5), None, [2, 3, 4], [1, 2, 2]),
        (Charge(9, 0), None, [2, 3, 4], [0, 0, 0]),
    ],
)
async def test_a_call_is_billed_as_the_upstream_says_else_as_we_count(charge, price, tokens, cost):
    """Its own tokens and dollars come first; then our count, at the route's price or the list's."""
    told = charge is not None and charge.nanodollars is not None
    route = Route(Charging(lambda _: charge), "m", price)
    bills, _ = await _bills(partial(call_route, route), ABC)
    assert [replace(bill, places=list(bill.places)) for bill in bills] == [
        Bill("shop", [0, 1, 2], tokens, cost, told)
    ]


@pytest.mark.parametrize("charge", [Charge(30), Charge(30, 7), Charge(None, 7), None])
async def test_an_answer_that_is_no_good_is_billed_if_it_was_charged(charge):
    """What was paid for nothing is told; where the upstream said nothing, there is nothing."""
    provider = Charging(lambda _: charge, failure=lambda _: InvalidAnswer("shop", "no good"))
    bills, error = await _bills(partial(call_route, Route(provider, "m")), ABC)
    assert isinstance(error, InvalidAnswer)
    if charge is None:
        assert bills == []
        return
    (bill,) = bills
    assert list(bill.places) == [0, 1, 2]
    assert sum(bill.tokens) == (charge.tokens or 0)
    assert sum(bill.nanodollars) == (7 if charge.nanodollars else 600)


async def test_what_was_answered_is_not_billed_again():
    """When one part of a call fails, the next try buys that alone; the bill has every call."""
    failures = [RateLimited("shop", "later"), None]
    provider = Charging(
        limits=Limits(inputs=2, concurrency=1),
        failure=lambda inputs: failures.pop(0) if "ccc" in inputs else None,
    )
    router = Router([Route(provider, "m")], sleep=lambda _: asyncio.sleep(0))
    bills, error = await _bills(Scheduler(router).embed, ABC)
    assert error is None
    assert [list(bill.places) for bill in bills] == [[0, 1], [2]]
    assert sum(sum(bill.tokens) for bill in bills) == 5 + 4


@settings(deadline=None)
@given(
    st.lists(st.integers(1, 9), min_size=1, max_size=12),
    st.integers(1, 7),
    st.integers(0, 4),
    st.integers(1, 1000),
)
async def test_who_share_a_call_are_billed_their_shares(sizes, most, bad, total):
    """Each is told of its own places only, and all of them together of every token and dollar."""
    left = [InvalidAnswer("shop", "no good")] * bad
    provider = Charging(
        lambda inputs: Charge(total * len(inputs), total),
        Limits(inputs=most),
        lambda _: left.pop() if left else None,
    )
    router = Router([Route(provider, "m")], sleep=lambda _: asyncio.sleep(0))
    scheduler = Scheduler(router)
    told = await asyncio.gather(
        *(
            _bills(scheduler.embed, [f"{i}.{j}" for j in range(size)])
            for i, size in enumerate(sizes)
        )
    )
    for size, (bills, error) in zip(sizes, told, strict=True):
        places = {place for bill in bills for place in bill.places}
        assert places <= set(range(size))
        assert error or places == set(range(size))
    every = [bill for bills, _ in told for bill in bills]
    assert sum(sum(bill.tokens) for bill in every) == sum(one.tokens for one in provider.charged)
    assert sum(sum(bill.nanodollars) for bill in every) == total * len(provider.charged)


async def test_parts_are_billed_at_their_places():
    """A request that is divided reads its bills by its own places."""
    scheduler = schedule(Charging(), Limits(inputs=2))
    inputs = [f"t{i}" for i in range(5)]
    bills, _ = await _bills(scheduler.embed, inputs)
    assert sorted(place for bill in bills for place in bill.places) == list(range(5))
    told = {p: n for bill in bills for p, n in zip(bill.places, bill.tokens, strict=True)}
    assert told == {place: tokens_of(item) for place, item in enumerate(inputs)}


@given(st.integers(0, 1 << 40), st.lists(st.integers(0, 1 << 20), min_size=1, max_size=50))
def test_shares_add_up_and_are_fair(total, sizes):
    """Nothing is lost or made in sharing, and no share is off by one whole."""
    parts = share(total, sizes)
    assert sum(parts) == total
    whole = sum(sizes)
    for part, size in zip(parts, sizes, strict=True):
        fair = total * size / whole if whole else total / len(sizes)
        assert abs(part - fair) < 1.001


def test_no_price_is_beyond_counting():
    """However dear a model is said to be, its sums fit into 64 bits for years."""
    assert nanodollars(1 << 31, 1e300) == MAX_NANODOLLARS
    assert nanodollars(0, 1e300) == 0
    assert nanodollars(1, 0.005) == 5
