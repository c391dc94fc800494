"""Limits of a call that an upstream shows are learned, and no mistake about them is for ever."""

import asyncio

from embedding_proxy.providers.base import Context, Space
from embedding_proxy.providers.errors import InvalidRequest
from embedding_proxy.providers.profile import Limits
from embedding_proxy.providers.scheduling.batch_limits import (
    MAX_MODELS,
    MAX_NAMED_CALLS,
    MAX_SMALL_CALLS,
    BatchLimits,
)

from tests.providers.fakes import Upstream, check, schedule, settle

LARGE = InvalidRequest("large", status=413)


def learned(*refused, error=LARGE):
    """Return the limits of a provider that has refused calls of so many short inputs."""
    limits = BatchLimits("p", Limits())
    for count in refused:
        limits.learn_refused("m", ["x"] * count, 1000, error)
    return limits


def test_a_limit_that_was_misread_is_not_kept_for_ever():
    """A number in a sentence may be another; after many calls the upstream is asked anew."""
    limits = learned(64, error=InvalidRequest("In this batch of 64 inputs, number 3 is empty"))
    assert limits.of("m").inputs == 3
    for _ in range(MAX_NAMED_CALLS):
        limits.learn_accepted("m", ["x"] * 3)
    assert limits.of("m").inputs == Limits().inputs


def test_that_several_inputs_get_one_vector_is_never_forgotten():
    """Nothing in the answers would tell it again before a client had a wrong one."""
    limits = learned(64, error=InvalidRequest("batch size must be at most 10"))
    limits.learn_single("m")
    limits.learn_refused("m", ["x"] * 9, 1000, InvalidRequest("batch size must be at most 5"))
    for _ in range(2 * MAX_NAMED_CALLS):
        limits.learn_accepted("m", ["x"])
    assert limits.of("m").inputs == 1


def test_a_limit_is_looked_for_one_call_at_a_time():
    """While calls are as large as may be; those that are surely taken go side by side."""
    limits = learned(64)
    assert (limits.of("m").inputs, limits.of("m").concurrency) == (32, 1)
    limits.learn_accepted("m", ["x"] * 32)
    assert (limits.of("m").inputs, limits.of("m").concurrency) == (48, 1)
    for _ in range(MAX_SMALL_CALLS):
        assert limits.of("m").concurrency == 1
        limits.learn_accepted("m", ["x"] * 20)
    assert limits.of("m").concurrency == Limits().concurrency
    limits.learn_accepted("m", ["x"] * 48)
    assert (limits.of("m").inputs, limits.of("m").concurrency) == (56, 1)


async def test_small_requests_do_not_wait_for_a_limit_that_nobody_needs():
    """After a large request has met a limit, single inputs are asked for side by side as before."""
    limits = learned(64)
    limits.learn_accepted("m", ["x"] * 32)
    for _ in range(MAX_SMALL_CALLS):
        limits.learn_accepted("m", ["x"])

    upstream = Upstream()
    upstream.limits_of = limits.of
    upstream.hold()
    scheduler = schedule(upstream)
    tasks = []
    for text in ("a", "b", "c"):
        tasks.append(asyncio.create_task(scheduler.embed(Space("m", 2), [text], Context())))
        await settle()
    assert upstream.air == 3
    for call in range(3):
        upstream.let(call)
    for text, task in zip(("a", "b", "c"), tasks, strict=True):
        check(await task, [text])


def test_models_are_forgotten_when_there_are_too_many():
    """Names of models may come from clients."""
    limits = BatchLimits("p", Limits())
    for number in range(MAX_MODELS + 1):
        limits.learn_single(f"m{number}")
    assert limits.of("m0").inputs == Limits().inputs
    assert limits.of(f"m{MAX_MODELS}").inputs == 1
