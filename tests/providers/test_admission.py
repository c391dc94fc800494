"""The queue before one provider: what is learned of its models is remembered, within bounds."""

import asyncio

from providers.base import Context
from providers.limits import Limits
from providers.routing.admission import MOST_MODELS, Admission


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
