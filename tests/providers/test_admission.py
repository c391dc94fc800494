"""The queue before one provider: what is learned of its models is remembered, within bounds."""

import asyncio

import pytest
from embedding_proxy.providers.base import Context
from embedding_proxy.providers.errors import DeadlineExceeded, LocalQueueFull
from embedding_proxy.providers.profile import Limits
from embedding_proxy.providers.upstream.rate_limiter import MOST_MODELS, Admission


async def _turn(admission, model):
    async with admission.turn(model, 1, Context()):
        pass


async def test_the_models_asked_for_longest_ago_are_forgotten():
    """Names that clients make up do not fill the memory; those in use are kept."""
    waits = []

    async def sleep(seconds):
        waits.append(seconds)

    admission = Admission("acme", Limits(), sleep)
    admission.hold("in use", 5)
    admission.hold("of old", 5)
    for number in range(MOST_MODELS - 1):
        await _turn(admission, f"made up {number}")
        admission._of("in use")
    await _turn(admission, "of old")
    assert waits == []
    await asyncio.wait_for(_turn(admission, "in use"), 1)
    assert len(waits) == 1
    assert len(admission._learned) == MOST_MODELS


async def test_nothing_is_learned_where_that_is_not_wanted():
    """`learn: false` passes over what a reply tells of limits."""
    told = {
        "x-ratelimit-limit-requests": "1",
        "x-ratelimit-remaining-requests": "0",
        "x-ratelimit-reset-requests": "60s",
    }
    for learn in (True, False):
        waits = []

        async def sleep(seconds, waits=waits):
            waits.append(seconds)

        admission = Admission("acme", Limits(learn=learn), sleep)
        admission.learn("m", told)
        await _turn(admission, "m")
        assert bool(waits) == learn


async def test_who_is_cancelled_in_the_queue_takes_no_room():
    """A hedge that loses while it waits for a slot leaves the limits per minute to others."""
    limits = Limits(requests_per_minute=2, concurrency=1)
    waits = []

    async def sleep(seconds):
        waits.append(seconds)

    admission = Admission("acme", limits, sleep)
    async with admission.turn("m", 1, Context()):
        for _ in range(5):
            waiting = asyncio.create_task(_turn(admission, "m"))
            while admission._declared._flying["requests"] < 2:  # noqa: ASYNC110 - nobody tells
                await asyncio.sleep(0)
            waiting.cancel()
            await asyncio.wait([waiting])
    await _turn(admission, "m")
    assert waits == []


async def test_whose_time_is_up_in_the_queue_takes_no_room():
    """A request that waits for a slot until its deadline makes no call, and none is counted."""
    waits = []

    async def sleep(seconds):
        waits.append(seconds)

    admission = Admission("acme", Limits(requests_per_minute=2, concurrency=1), sleep)
    loop = asyncio.get_running_loop()
    async with admission.turn("m", 1, Context()):
        for _ in range(5):
            with pytest.raises(DeadlineExceeded):
                async with admission.turn("m", 1, Context(deadline=loop.time() + 0.001)):
                    raise AssertionError("two calls at a time")
    await _turn(admission, "m")
    assert waits == []


async def test_a_wait_for_a_connection_is_our_own():
    """Queues that share connections wait for one within their time, and no call is begun late."""
    connections = asyncio.Semaphore(1)
    one, other = (Admission("acme", Limits(), asyncio.sleep, connections) for _ in range(2))
    loop = asyncio.get_running_loop()
    async with one.turn("m", 1, Context()):
        with pytest.raises(DeadlineExceeded):
            async with other.turn("m", 1, Context(deadline=loop.time() + 0.01)):
                raise AssertionError("two calls on one connection")
        with pytest.raises(LocalQueueFull):
            async with other.turn("m", 1, Context(begin_by=loop.time() + 0.01)):
                raise AssertionError("two calls on one connection")
    # Whoever has given up holds nothing.
    for _ in range(2 * Limits().concurrency):
        await asyncio.wait_for(_turn(other, "m"), 1)


async def test_a_share_of_less_than_one_call_a_minute_lets_calls_through():
    """Four workers that share three calls a minute make one each, and the next after 80 seconds."""
    waits = []

    async def sleep(seconds):
        waits.append(seconds)

    limits = Limits(requests_per_minute=3).share(4)
    admission = Admission("acme", limits, sleep)
    await _turn(admission, "m")
    assert waits == []
    await _turn(admission, "m")
    assert waits == [pytest.approx(80, abs=1)]
