"""Limits per minute: calls queue in order, nobody waits for nothing, and headers are believed."""

import asyncio
from contextlib import asynccontextmanager

import pytest
from embedding_proxy.providers.errors import LocalQueueFull, RateLimited
from embedding_proxy.providers.upstream.rate_limiter import (
    MAX_PAUSE_S,
    MAX_PAUSE_WAIT_S,
    Bucket,
    RateLimiter,
    estimate,
)
from embedding_proxy.providers.upstream.retry_after import MAX_WAIT
from hypothesis import given
from hypothesis import strategies as st

EPOCH = 1_772_366_400.0
"""The present time in seconds since 1970, by the tests' wall clock."""


class Clock:
    """A clock that moves when somebody sleeps, and only then."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.slept = []

    def __call__(self) -> float:
        return self.now

    async def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        await asyncio.sleep(0)
        self.now += seconds


@pytest.fixture
def clock():
    """Give a clock at 1000 seconds."""
    return Clock()


def limiter_on(clock, **limits) -> RateLimiter:
    """Return a limiter on that clock."""
    return RateLimiter("acme", clock=clock, wall_clock=lambda: EPOCH, sleep=clock.sleep, **limits)


@asynccontextmanager
async def turn(limiter, tokens, deadline):
    """Hold room for the length of a call; one that a later queue refuses was not made."""
    await limiter.acquire(tokens, deadline)
    is_unused = False
    try:
        yield
    except LocalQueueFull:
        is_unused = True
        raise
    finally:
        limiter.release(tokens, is_unused=is_unused)


async def call(limiter, tokens=1, deadline=None) -> None:
    """Make a call that takes no time."""
    async with turn(limiter, tokens, deadline):
        pass


@pytest.mark.parametrize(
    ("inputs", "tokens"), [(["abcdefgh"], 3), ([""], 1), ([(1, 2, 3)], 3), (["日本", "\ud800"], 3)]
)
def test_tokens_are_estimated(inputs, tokens):
    """A token is taken for four bytes; ids are counted."""
    assert estimate(inputs) == tokens


async def test_calls_within_the_limit_do_not_wait(clock):
    """A minute's worth of calls goes at once; the next waits for its share of a minute."""
    limiter = limiter_on(clock, requests_per_minute=6)
    for _ in range(6):
        await call(limiter)
    assert clock.slept == []
    await call(limiter)
    await call(limiter)
    assert clock.slept == pytest.approx([10, 10])


async def test_without_limits_nothing_waits(clock):
    """No limit declared and none learned means no queue."""
    limiter = limiter_on(clock)
    for _ in range(1000):
        await call(limiter, 10**9)
    assert clock.slept == []


async def test_tokens_have_a_limit_of_their_own(clock):
    """Whichever of the two limits is the tighter decides."""
    limiter = limiter_on(clock, requests_per_minute=60, tokens_per_minute=600)
    await call(limiter, 600)
    await call(limiter, 100)
    assert clock.slept == pytest.approx([10])


async def test_a_call_larger_than_the_limit_goes_alone_and_is_paid_for(clock):
    """It waits until nothing is used, overdraws, and the next waits until that is made up for."""
    limiter = limiter_on(clock, tokens_per_minute=60)
    await call(limiter, 30)
    await call(limiter, 180)
    await call(limiter, 10)
    assert clock.slept == pytest.approx([30, 130])


async def test_an_unused_minute_is_not_saved_up(clock):
    """However long nothing was asked, no more than a minute's worth goes at once."""
    limiter = limiter_on(clock, requests_per_minute=2)
    await call(limiter)
    clock.now += 3600
    for _ in range(3):
        await call(limiter)
    assert clock.slept == pytest.approx([30])


async def test_first_come_first_served(clock):
    """A small call does not overtake a large one that came before it."""
    limiter = limiter_on(clock, tokens_per_minute=60)
    await call(limiter, 60)
    done = []

    async def one(name, tokens):
        await call(limiter, tokens)
        done.append((name, clock.now))

    await asyncio.gather(one("large", 50), one("small", 1), one("middle", 9))
    assert done == [("large", 1050.0), ("small", 1051.0), ("middle", 1060.0)]


async def test_who_gives_up_leaves_the_place_to_the_next(clock):
    """Cancelled waiters, asleep or in line, take nothing: those behind them go that much sooner."""
    limiter = limiter_on(clock, tokens_per_minute=60)
    await call(limiter, 60)
    never = asyncio.Event()
    slept = asyncio.Event()

    async def sleep(_):
        slept.set()
        await never.wait()

    limiter._sleep = sleep
    asleep = asyncio.create_task(call(limiter, 50))
    await slept.wait()
    in_line = asyncio.create_task(call(limiter, 50))
    last = asyncio.create_task(call(limiter, 10))
    await asyncio.sleep(0)
    limiter._sleep = clock.sleep
    in_line.cancel()
    asleep.cancel()
    await asyncio.gather(asleep, in_line, return_exceptions=True)
    await last
    assert clock.slept == pytest.approx([10])
    await call(limiter, 5, deadline=clock.now + 6)  # nothing of theirs is still reckoned with
    assert clock.slept == pytest.approx([10, 5])


async def test_nobody_waits_for_what_comes_too_late(clock):
    """Who cannot have a turn before the deadline is told at once, with the wait; others go on."""
    limiter = limiter_on(clock, requests_per_minute=6)
    for _ in range(6):
        await call(limiter)
    with pytest.raises(RateLimited, match=r"^acme: .* again in 10\.0 s") as caught:
        await call(limiter, deadline=clock.now + 9)
    said = caught.value.refusal
    assert (said.status, said.code) == (429, "rate_limit_exceeded")
    assert caught.value.retry_after == pytest.approx(10)
    assert clock.slept == []
    await call(limiter, deadline=clock.now + 11)
    assert clock.slept == pytest.approx([10])


async def test_those_ahead_are_reckoned_with(clock):
    """The wait of a newcomer is that behind all who wait already."""
    limiter = limiter_on(clock, requests_per_minute=6)
    for _ in range(6):
        await call(limiter)
    waiting = [asyncio.create_task(call(limiter)) for _ in range(3)]
    await asyncio.sleep(0)
    with pytest.raises(RateLimited) as caught:
        await call(limiter, deadline=clock.now + 35)
    assert caught.value.retry_after == pytest.approx(40)
    await asyncio.gather(*waiting)


def told(limit, remaining, reset, kind="requests") -> dict[str, str]:
    """Return what an upstream tells of one limit."""
    values = {"limit": limit, "remaining": remaining, "reset": reset}
    return {f"x-ratelimit-{what}-{kind}": str(value) for what, value in values.items()}


async def test_a_limit_is_learned(clock):
    """Of 100 calls 40 remain and a minute makes up for 60: the 41st waits a second."""
    limiter = limiter_on(clock)
    limiter.learn(told(100, 40, "1m0s"))
    for _ in range(40):
        await call(limiter)
    assert clock.slept == []
    await call(limiter)
    assert clock.slept == pytest.approx([1])


async def test_a_limit_of_tokens_is_learned(clock):
    """Tokens are learned like calls, in any period the upstream counts by."""
    limiter = limiter_on(clock)
    limiter.learn(told(1000, 0, "500ms", "tokens"))
    await call(limiter, 100)
    assert clock.slept == pytest.approx([0.05])


async def test_calls_under_way_are_reckoned_with(clock):
    """What remains by a reply is without the calls that are still out."""
    limiter = limiter_on(clock)
    async with turn(limiter, 1, None), turn(limiter, 1, None):
        limiter.learn(told(10, 2, "8s"))
        await call(limiter)
    assert clock.slept == pytest.approx([1])
    limiter.learn(told(10, 2, "8s"))  # all are back: what remains is all theirs who come now
    await call(limiter)
    await call(limiter)
    assert clock.slept == pytest.approx([1])


async def test_what_is_learned_does_not_lift_what_is_declared(clock):
    """A limit told by the upstream takes the place of the declared one of its sort only."""
    limiter = limiter_on(clock, tokens_per_minute=60)
    await call(limiter, 60)
    limiter.learn(told(100, 99, "1s"))
    await call(limiter, 6)
    assert clock.slept == pytest.approx([6])


@pytest.mark.parametrize(
    "headers",
    [
        {},
        told("", "", ""),
        told(0, 0, "1s"),
        told(100, "x", "1s"),
        told(100, 0, "soon"),
        told(-5, 0, "1s"),
        {"x-ratelimit-remaining-requests": "0"},
    ],
)
async def test_half_a_limit_is_none(headers, clock):
    """Limit, remaining and reset are needed, all three and readable."""
    limiter = limiter_on(clock)
    limiter.learn(headers)
    await call(limiter)
    assert clock.slept == []


@pytest.mark.parametrize("remaining", [0, 2])
@pytest.mark.parametrize("reset", ["0s", f"{EPOCH - 1:.0f}"])
async def test_a_reset_of_0_means_now(reset, remaining, clock):
    """What is whole now is there at once, and grows by the minute; nothing is divided by zero."""
    limiter = limiter_on(clock)
    limiter.learn(told(2, remaining, reset))
    for _ in range(3):
        await call(limiter)
    assert clock.slept == pytest.approx([30])


async def test_a_limit_of_which_nothing_is_used_grows_by_the_minute(clock):
    """Where use tells no rate, the limit is one a minute."""
    limiter = limiter_on(clock)
    limiter.learn(told(2, 2, "1s"))
    for _ in range(3):
        await call(limiter)
    assert clock.slept == pytest.approx([30])


async def test_a_reset_may_be_a_point_in_time(clock):
    """Of 60 calls none remains, and all are back in a minute: the next call waits a second."""
    limiter = limiter_on(clock)
    limiter.learn(told(60, 0, f"{EPOCH + 60:.0f}"))
    await call(limiter)
    assert clock.slept == pytest.approx([1])


@pytest.mark.parametrize("reset", ["4102444800", "2045-01-01T00:00:00Z", "99999999", "9" * 20])
async def test_an_absurd_reset_locks_nobody_out(reset, clock):
    """A model is asked again within minutes, whatever its headers say, and tells better then."""
    limiter = limiter_on(clock)
    limiter.learn(told(1, 0, reset))
    await call(limiter)
    assert clock.slept == pytest.approx([MAX_WAIT])
    limiter.learn(told(60, 60, "1s"))
    await call(limiter)
    assert clock.slept == pytest.approx([MAX_WAIT])


async def test_calls_under_way_lock_nobody_out(clock):
    """A rate is no slower for the tokens that are out: all of it is back within the bound."""
    limiter = limiter_on(clock)
    async with turn(limiter, 10**9, None):
        limiter.learn(told(1000, 999, "1s", "tokens"))
    await call(limiter, 1000)
    assert clock.slept == pytest.approx([MAX_WAIT], rel=0.01)


async def test_an_upstream_that_asks_for_a_pause_gets_it(clock):
    """After a refusal with a wait nobody calls before it is over."""
    limiter = limiter_on(clock)
    limiter.pause(5)
    limiter.pause(3)
    await call(limiter)
    await call(limiter)
    assert clock.slept == pytest.approx([5])


async def test_a_long_pause_is_not_waited_out(clock):
    """A call is refused at once while the pause is long, but the upstream is tried in the end."""
    limiter = limiter_on(clock)
    limiter.pause(86_400)
    with pytest.raises(RateLimited) as caught:
        await call(limiter)
    assert caught.value.retry_after == MAX_PAUSE_S
    clock.now += MAX_PAUSE_S - MAX_PAUSE_WAIT_S
    await call(limiter)
    assert clock.slept == pytest.approx([MAX_PAUSE_WAIT_S])


@given(st.lists(st.tuples(st.floats(0, 30), st.integers(1, 50)), min_size=1, max_size=40))
def test_no_window_holds_more_than_the_limit(calls):
    """In any minute at most the allowance of two goes through: what was full, and what grew."""
    bucket = Bucket(60, 60, 1, 0.0)
    now, taken = 0.0, []
    for pause, cost in calls:
        now += pause
        now += bucket.wait(cost, 0, now)
        bucket.take(cost, now)
        taken.append((now, cost))
    for start, _ in taken:
        assert sum(cost for at, cost in taken if start <= at < start + 60) <= 120 + 1e-6


async def test_a_queue_that_is_full_is_told_apart_from_the_upstreams_refusal(clock):
    """No call was made, and whoever counts calls can tell; a client cannot."""
    limiter = limiter_on(clock, requests_per_minute=6)
    limiter.pause(30)
    with pytest.raises(LocalQueueFull) as caught:
        await call(limiter)
    assert isinstance(caught.value, RateLimited)


async def test_a_call_that_the_next_queue_refuses_takes_nothing(clock):
    """Of two queues in a row, the first has its room back when the second is full."""
    first = limiter_on(clock, requests_per_minute=1)
    second = limiter_on(clock)
    second.pause(30)
    with pytest.raises(LocalQueueFull):
        async with turn(first, 1, None), turn(second, 1, None):
            raise AssertionError("never")
    await call(first)
    assert clock.slept == []


async def test_an_upstreams_own_refusal_was_a_call(clock):
    """What the upstream refuses is counted as the upstream counts it."""
    limiter = limiter_on(clock, requests_per_minute=1)
    with pytest.raises(RateLimited):
        async with turn(limiter, 1, None):
            raise RateLimited("acme", "slow down")
    await call(limiter)
    assert clock.slept == pytest.approx([60])


async def test_a_pause_is_waited_out_or_refused(clock):
    """Outside the queue the same rules hold: what is too long, or too late, is not begun."""
    limiter = limiter_on(clock)
    await limiter.wait_for_pause(None)
    assert clock.slept == []
    limiter.pause(5)
    with pytest.raises(LocalQueueFull):
        await limiter.wait_for_pause(clock.now + 5)
    await limiter.wait_for_pause(clock.now + 6)
    assert clock.slept == pytest.approx([5])
