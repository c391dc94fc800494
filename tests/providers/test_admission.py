"""The queue before one provider: what is learned of its models is remembered, within bounds."""

import asyncio

import pytest
from clock import in_virtual_time, until
from embedding_proxy.providers.base import Context
from embedding_proxy.providers.errors import DeadlineExceeded, LocalQueueFull
from embedding_proxy.providers.profile import Limits
from embedding_proxy.providers.upstream.rate_limiter import MAX_MODELS, ProviderQueue


async def _take_slot(queue, model):
    async with queue.slot(model, 1, Context()):
        pass


async def test_the_models_asked_for_longest_ago_are_forgotten():
    """Names that clients make up do not fill the memory; those in use are kept."""
    waits = []

    async def sleep(seconds):
        waits.append(seconds)

    queue = ProviderQueue("acme", Limits(), sleep)
    queue.pause("in use", 5)
    queue.pause("of old", 5)
    for number in range(MAX_MODELS - 1):
        await _take_slot(queue, f"made up {number}")
        queue._limiter_of("in use")
    await _take_slot(queue, "of old")
    assert waits == []
    await _take_slot(queue, "in use")
    assert len(waits) == 1
    assert len(queue._learned) == MAX_MODELS


async def test_nothing_is_learned_where_that_is_not_wanted():
    """`from_headers: false` passes over what a reply tells of limits."""
    told = {
        "x-ratelimit-limit-requests": "1",
        "x-ratelimit-remaining-requests": "0",
        "x-ratelimit-reset-requests": "60s",
    }
    for learn in (True, False):
        waits = []

        async def sleep(seconds, waits=waits):
            waits.append(seconds)

        queue = ProviderQueue("acme", Limits(from_headers=learn), sleep)
        queue.learn("m", told)
        await _take_slot(queue, "m")
        assert bool(waits) == learn


async def test_who_is_cancelled_in_the_queue_takes_no_room():
    """A hedge that loses while it waits for a slot leaves the limits per minute to others."""
    limits = Limits(requests_per_minute=2, concurrency=1)
    waits = []

    async def sleep(seconds):
        waits.append(seconds)

    queue = ProviderQueue("acme", limits, sleep)
    async with queue.slot("m", 1, Context()):
        for _ in range(5):
            waiting = asyncio.create_task(_take_slot(queue, "m"))
            await until(lambda: queue._declared._in_flight["requests"] >= 2)
            waiting.cancel()
            await asyncio.wait([waiting])
    await _take_slot(queue, "m")
    assert waits == []


@in_virtual_time
async def test_whose_time_is_up_in_the_queue_takes_no_room():
    """A request that waits for a slot until its deadline makes no call, and none is counted."""
    waits = []

    async def sleep(seconds):
        waits.append(seconds)

    queue = ProviderQueue("acme", Limits(requests_per_minute=2, concurrency=1), sleep)
    loop = asyncio.get_running_loop()
    async with queue.slot("m", 1, Context()):
        for _ in range(5):
            with pytest.raises(DeadlineExceeded):
                async with queue.slot("m", 1, Context(deadline=loop.time() + 60)):
                    raise AssertionError("two calls at a time")
    await _take_slot(queue, "m")
    assert waits == []


@in_virtual_time
async def test_a_wait_for_a_connection_is_our_own():
    """Queues that share connections wait for one within their time, and no call is begun late."""
    connections = asyncio.Semaphore(1)
    one, other = (ProviderQueue("acme", Limits(), asyncio.sleep, connections) for _ in range(2))
    loop = asyncio.get_running_loop()
    async with one.slot("m", 1, Context()):
        with pytest.raises(DeadlineExceeded):
            async with other.slot("m", 1, Context(deadline=loop.time() + 60)):
                raise AssertionError("two calls on one connection")
        with pytest.raises(LocalQueueFull):
            async with other.slot("m", 1, Context(start_deadline=loop.time() + 60)):
                raise AssertionError("two calls on one connection")
    # Whoever has given up holds nothing.
    for _ in range(2 * Limits().concurrency):
        await _take_slot(other, "m")


@in_virtual_time
async def test_a_share_of_less_than_one_call_a_minute_lets_calls_through():
    """Four workers that share three calls a minute make one each, and the next after 80 seconds."""
    waits = []

    async def sleep(seconds):
        waits.append(seconds)

    limits = Limits(requests_per_minute=3).share(4)
    queue = ProviderQueue("acme", limits, sleep)
    await _take_slot(queue, "m")
    assert waits == []
    await _take_slot(queue, "m")
    assert waits == [pytest.approx(80)]
