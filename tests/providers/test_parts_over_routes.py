"""What one attempt has answered is not asked for again, at whichever route the next one is."""

import asyncio
from dataclasses import replace

import pytest
from embedding_proxy.providers.base import Context, Space
from embedding_proxy.providers.errors import (
    InvalidRequest,
    LocalQueueFull,
    ModelNotFound,
    Refusal,
    UpstreamError,
)
from embedding_proxy.providers.profile import Limits
from embedding_proxy.providers.routing.health import HealthRegistry
from embedding_proxy.providers.routing.router import Route, Router
from embedding_proxy.providers.scheduling.scheduler import Scheduler
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.providers.fakes import Kept, Upstream, check, settle

SPACE = Space("vendor/model", 2)
DOWN = UpstreamError("acme", "down", Refusal(503, "down"))
UNKNOWN = ModelNotFound("acme", "unknown", Refusal(404, "unknown"))


def texts(count):
    """Return so many different inputs."""
    return [f"t{i}" for i in range(count)]


class Provider:
    """A provider that takes so many inputs in a call, and names itself in its answers."""

    def __init__(self, name, inputs=2048, failure=lambda _: None, concurrency=1):
        self.name = name
        self.accepts_tokens = True
        self.limits = Limits(inputs=inputs, concurrency=concurrency)
        self.upstream = Upstream(failure)

    async def ask(self, model, space, inputs, context):
        embedded = await self.upstream.embed(space, inputs, context)
        return replace(embedded, providers=(self.name,))


def once(bad, error):
    """Return a failure of the first call that holds an input."""
    left = [bad]

    def failure(inputs):
        if left and left[0] in inputs:
            left.clear()
            return error
        return None

    return failure


async def no_wait(_):
    """Wait between attempts for no time at all."""


def router_over(*providers, **options):
    """Return a scheduler over these providers."""
    routes = [Route(provider, "m") for provider in providers]
    return Scheduler(Router(routes, **{"sleep": no_wait, **options}))


@pytest.mark.parametrize("kept", [True, False], ids=["kept", "nobody listens"])
async def test_the_same_provider_is_asked_for_what_is_missing(kept):
    """A part that fails in the middle costs its own inputs once more, and no others."""
    provider = Provider("a", 10, once("t25", DOWN))
    context = Context(on_part=Kept() if kept else None)
    inputs = texts(50)
    embedded = await router_over(provider).embed(SPACE, inputs, context)
    check(embedded, inputs)
    assert sorted(provider.upstream.bought) == sorted(inputs)
    assert embedded.providers == ("a",)
    if kept:
        context.on_part.check(inputs)


async def test_the_next_provider_is_asked_for_what_is_missing():
    """Its own way of cutting is applied to that; both are named."""
    first = Provider("a", 10, lambda call: UNKNOWN if "t25" in call else None, concurrency=8)
    second = Provider("b", 4)
    inputs = texts(50)
    embedded = await router_over(first, second).embed(SPACE, inputs, Context())
    check(embedded, inputs)
    assert sorted(first.upstream.bought) == sorted(inputs[:20] + inputs[30:])
    assert second.upstream.calls == [inputs[20:24], inputs[24:28], inputs[28:30]]
    assert embedded.providers == ("a", "b")


async def test_what_a_failed_route_answered_is_kept_for_the_clients_next_try():
    """When no route answers the rest, what was told is told by its place in the request, once."""
    first = Provider("a", 10, lambda call: UNKNOWN if "t5" in call else None, concurrency=8)
    second = Provider("b", 3, lambda call: UNKNOWN if "t8" in call else None, concurrency=8)
    told = []

    async def tell(places, part):
        told.extend(places)

    with pytest.raises(ModelNotFound):
        await router_over(first, second).embed(SPACE, texts(20), Context(on_part=tell))
    assert sorted(told) == [0, 1, 2, 3, 4, 5, *range(9, 20)]


async def test_a_refused_input_has_its_place_in_the_whole():
    """Whichever inputs are still asked for, the index is the client's."""
    first = Provider("a", 4, lambda call: UNKNOWN if "t6" in call else None, concurrency=8)

    def refused(call):
        return InvalidRequest("no", index=call.index("t7")) if "t7" in call else None

    second = Provider("b", 2, refused)
    with pytest.raises(InvalidRequest) as caught:
        await router_over(first, second).embed(SPACE, texts(12), Context())
    assert caught.value.index == 7
    assert second.upstream.calls == [["t4", "t5"], ["t6", "t7"]]


async def test_a_queue_that_fills_up_amid_the_calls_keeps_what_was_answered():
    """The rest is the next route's; the call that was not made counts for no attempt."""
    told_full = LocalQueueFull("a", "full", Refusal(429, "full", retry_after=9.0))
    first = Provider("a", 10, lambda call: told_full if "t25" in call else None, concurrency=8)
    second = Provider("b")
    router = router_over(first, second)
    inputs = texts(50)
    check(await router.embed(SPACE, inputs, Context()), inputs)
    assert second.upstream.calls == [inputs[20:30]]
    snapshot = router.router.upstreams.snapshot()["a"]
    assert (snapshot["attempts"], snapshot["failures"], snapshot["rests"]) == (4, {}, {})


class Race:
    """Two providers that are asked at once, each call held until it is let."""

    def __init__(self, inputs, first, second):
        self.inputs = inputs
        self.first, self.second = first, second
        for provider in (first, second):
            provider.upstream.hold()
        self.hour = asyncio.Event()
        self.kept = Kept()
        self.router = router_over(first, second, hedge_after_s=1.0, sleep=self._sleep)

    async def _sleep(self, seconds):
        if seconds == 1.0:
            await self.hour.wait()

    async def start(self):
        """Start the request, and its hedge."""
        task = asyncio.create_task(
            self.router.embed(SPACE, self.inputs, Context(on_part=self.kept))
        )
        await settle()
        return task

    async def hedge(self):
        """Let the hedge begin."""
        self.hour.set()
        await settle()

    async def let(self, provider, *calls):
        """Let calls of a provider end, one after the other."""
        for call in calls:
            provider.upstream.let(call)
            await settle()


async def test_a_hedge_asks_only_for_what_is_missing():
    """What the first route has answered before the hedge begins is not bought again."""
    race = Race(texts(6), Provider("a", 3, concurrency=2), Provider("b"))
    task = await race.start()
    await race.let(race.first, 1)
    await race.hedge()
    assert race.second.upstream.calls == [["t0", "t1", "t2"]]
    await race.let(race.second, 0)
    embedded = await task
    check(embedded, race.inputs)
    assert embedded.providers == ("b", "a")
    race.kept.check(race.inputs)


async def test_each_of_two_routes_may_bring_a_part_and_fail():
    """Nothing is missing though neither route has answered all of it: that is an answer."""
    first = Provider("a", 3, lambda call: UNKNOWN if "t4" in call else None, concurrency=2)
    second = Provider("b", 3, lambda call: UNKNOWN if "t1" in call else None, concurrency=2)
    race = Race(texts(6), first, second)
    task = await race.start()
    await race.hedge()
    await race.let(first, 0, 1)
    await race.let(second, 1, 0)
    embedded = await task
    check(embedded, race.inputs)
    assert embedded.providers == ("a", "b")
    race.kept.check(race.inputs)


@settings(deadline=None)
@given(
    count=st.integers(1, 40),
    sizes=st.lists(st.integers(1, 12), min_size=1, max_size=3),
    bad=st.sets(st.tuples(st.integers(0, 2), st.integers(0, 39)), max_size=8),
    error=st.sampled_from([DOWN, UNKNOWN]),
)
async def test_nothing_is_bought_twice(count, sizes, bad, error):
    """However calls fail, an input is bought once at most, and the answer is right or is none."""
    bad = set(bad)

    def failing(place):
        def failure(call):
            hit = {(place, int(item[1:])) for item in call} & bad
            bad.difference_update(hit)
            return error if hit else None

        return failure

    providers = [
        Provider("abc"[i], size, failing(i), concurrency=2) for i, size in enumerate(sizes)
    ]
    inputs = texts(count)
    kept = Kept()
    router = router_over(*providers, upstreams=HealthRegistry())
    embedded = None
    try:
        embedded = await router.embed(SPACE, inputs, Context(on_part=kept))
    except type(error):
        assert len(kept.rows) < count
    bought = [item for provider in providers for item in provider.upstream.bought]
    assert len(bought) == len(set(bought))
    kept.check(inputs)
    if embedded is not None:
        check(embedded, inputs)
        assert sorted(bought) == sorted(inputs)
        used = {provider.name for provider in providers if provider.upstream.bought}
        assert set(embedded.providers) == used


async def test_what_two_routes_answer_is_told_once():
    """The second answer to the same inputs is nobody's news, and harms nothing."""
    told = []

    async def tell(places, part):
        told.append(list(places))

    race = Race(texts(6), Provider("a", 3, concurrency=2), Provider("b", 3, concurrency=2))
    race.kept = tell
    task = await race.start()
    await race.hedge()
    await race.let(race.first, 0)
    await race.let(race.second, 0, 1)
    check(await task, race.inputs)
    # The last part of a whole answer is returned with it.
    assert told == [[0, 1, 2]]


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 2, 0)])
async def test_parts_that_share_a_call_at_the_next_route_come_back_in_order(order):
    """They are put together in the order in which they failed, and answered by their places."""
    first = Provider("a", 2, lambda _: UNKNOWN, concurrency=3)
    second = Provider("b")
    first.upstream.hold()
    inputs = texts(6)
    task = asyncio.create_task(router_over(first, second).embed(SPACE, inputs, Context()))
    await settle()
    for call in order:
        first.upstream.held[call].set()
    check(await task, inputs)
    assert [sorted(call) for call in second.upstream.calls] == [inputs]
