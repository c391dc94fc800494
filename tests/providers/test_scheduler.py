"""Batches go side by side and come back in order; what fails costs no more than itself."""

import asyncio
import gc
from dataclasses import replace
from math import ceil, log2

import pytest
from clock import in_virtual_time, until
from embedding_proxy.providers.base import Context, Embedded, Space
from embedding_proxy.providers.errors import DeadlineExceeded, InvalidRequest, RateLimited
from embedding_proxy.providers.profile import Limits, limits_of
from embedding_proxy.providers.route_check import call_route
from embedding_proxy.providers.routing.route import Route
from embedding_proxy.providers.scheduling.assembly import assemble
from embedding_proxy.providers.scheduling.batch_size import MIN_INPUTS as LEAST
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from tests.providers.fakes import (
    Kept,
    Upstream,
    check,
    refusing,
    schedule,
    settle,
    tokens_of,
    vector_of,
)

SPACE = Space("m", 2)
ANY_TIME = Context()
LATE = RateLimited("p", "too many")


def texts(count):
    """Return inputs that are all different."""
    return [f"t{i}" for i in range(count)]


@settings(deadline=None)
@given(st.integers(1, 700), st.integers(1, 300), st.integers(1, 9), st.none() | st.integers(1, 900))
async def test_any_request_is_answered_in_order_within_the_limits(count, most, lanes, tokens):
    """Whatever the limits, each input is bought once and no call breaks one of them."""
    inputs, upstream = texts(count), Upstream()
    limits = Limits(inputs=most, tokens=tokens, concurrency=lanes)
    embedded = await schedule(upstream, limits).embed(SPACE, inputs, ANY_TIME)
    check(embedded, inputs)
    assert sorted(upstream.bought) == sorted(inputs)
    assert upstream.most <= lanes
    for call in upstream.calls:
        assert len(call) <= min(most, max(LEAST, ceil(count / lanes)))
        assert tokens is None or len(call) == 1 or len("".join(call)) / 2 <= tokens


async def test_a_bulk_request_is_asked_for_side_by_side():
    """Two thousand inputs are eight calls in the air at once: the time of the largest of them."""
    upstream = Upstream()
    embedded = await schedule(upstream, Limits()).embed(SPACE, texts(2000), ANY_TIME)
    assert [len(call) for call in upstream.calls] == [250] * 8
    assert upstream.most == 8
    assert embedded.providers == ("p250",)


async def test_a_small_request_is_one_call_as_it_came():
    """What fits in a part goes on untouched, its context too, and nothing is told in between."""
    upstream, kept = Upstream(), Kept()
    await schedule(upstream, Limits()).embed(SPACE, texts(LEAST), Context(user="u", on_part=kept))
    assert upstream.calls == [texts(LEAST)]
    assert upstream.contexts[0].user == "u"
    assert kept.rows == {}


async def test_the_providers_of_all_parts_are_named_in_order():
    """Whoever computed a part is named once, in the order of the inputs."""
    upstream = Upstream()
    upstream.hold()
    scheduler = schedule(upstream, Limits(tokens=8, concurrency=3))
    asking = asyncio.create_task(scheduler.embed(SPACE, ["aaaa", "b", "c", "dddddddd"], ANY_TIME))
    await settle()
    for call in reversed(range(len(upstream.calls))):
        upstream.let(call)
        await settle()
    assert (await asking).providers == ("p2", "p1")


async def test_each_part_is_told_as_soon_as_it_is_there():
    """Parts are handed on while others are still in the air."""
    upstream, kept, inputs = Upstream(), Kept(), texts(3)
    upstream.hold()
    scheduler = schedule(upstream, Limits(inputs=1))
    asking = asyncio.create_task(scheduler.embed(SPACE, inputs, Context(on_part=kept)))
    await settle()
    for call, rows in ((1, {1}), (0, {0, 1})):
        upstream.let(call)
        await settle()
        assert kept.rows.keys() == rows
    kept.check(inputs)
    upstream.let(2)
    check(await asking, inputs)


async def test_what_an_embedder_below_tells_of_a_part_is_told_in_places_of_the_whole():
    """A part of a part has its place in the request."""
    kept, inputs = Kept(), texts(4)

    class Telling(Upstream):
        async def embed(self, space, inputs, context):
            answer = await super().embed(space, inputs, context)
            if "t3" in inputs:
                await context.on_part([1], replace(answer, vectors=answer.vectors[1:]))
                raise LATE
            return answer

    with pytest.raises(RateLimited):
        await schedule(Telling(), Limits(inputs=2, concurrency=1)).embed(
            SPACE, inputs, Context(on_part=kept)
        )
    assert kept.rows.keys() == {0, 1, 3}
    kept.check(inputs)


@pytest.mark.parametrize("failing", [0, 2, 4], ids=["first", "middle", "last"])
async def test_a_failed_part_lets_those_in_the_air_land_and_begins_no_other(failing):
    """What was asked is paid for and kept; what was not is not asked; then the failure is told."""
    upstream, kept, inputs = Upstream(), Kept(), texts(8)
    upstream.failure = lambda call: LATE if call == [f"t{failing}"] else None
    upstream.hold()
    scheduler = schedule(upstream, Limits(inputs=1, concurrency=5))
    asking = asyncio.create_task(scheduler.embed(SPACE, inputs, Context(on_part=kept)))
    await settle()
    upstream.let(failing)
    await settle()
    assert not asking.done()
    for call in {0, 1, 2, 3, 4} - {failing}:
        upstream.let(call)
    with pytest.raises(RateLimited) as caught:
        await asking
    assert caught.value is LATE
    assert len(upstream.calls) == 5
    assert kept.rows.keys() == {0, 1, 2, 3, 4} - {failing}
    kept.check(inputs)


@settings(deadline=None)
@given(
    st.lists(st.sampled_from(["good", "late", "bad", "defect"]), min_size=1, max_size=12),
    st.integers(1, 5),
    st.data(),
)
async def test_any_mixture_of_results_is_told_rightly(results, lanes, draw):
    """However parts end and in whatever order: what was bought was told, refusals come first."""
    inputs, kept, upstream = texts(len(results)), Kept(), Upstream()
    errors = {"late": LATE, "bad": InvalidRequest("no"), "defect": KeyError("x"), "good": None}
    upstream.failure = lambda call: errors[results[int(call[0][1:])]]
    upstream.hold()
    scheduler = schedule(upstream, Limits(inputs=1, concurrency=lanes))
    asking = asyncio.create_task(scheduler.embed(SPACE, inputs, Context(on_part=kept)))
    let = set()
    await settle()
    while not asking.done():
        call = draw.draw(st.sampled_from(sorted(upstream.held.keys() - let)))
        let.add(call)
        upstream.let(call)
        await settle()
    called = [results[int(call[0][1:])] for call in upstream.calls]
    failure = asking.exception()
    told = sorted(inputs[place] for place in kept.rows)
    # The last part of a whole answer is returned with it.
    assert sorted(upstream.bought) == told or (not failure and len(told) == len(inputs) - 1)
    kept.check(inputs)
    if set(called) == {"good"}:
        check(asking.result(), inputs)
    elif "bad" in called:
        assert isinstance(failure, InvalidRequest)
        assert failure.index == called.index("bad")
    else:
        assert failure in (LATE, errors["defect"])


async def test_what_was_begun_for_a_cancelled_request_is_finished_and_told():
    """Who goes away leaves nothing in the queue; calls under way are paid for, and are kept."""
    upstream, kept, inputs = Upstream(), Kept(), texts(5)
    upstream.hold()
    scheduler = schedule(upstream, Limits(inputs=1, concurrency=2))
    asking = asyncio.create_task(scheduler.embed(SPACE, inputs, Context(on_part=kept)))
    await settle()
    asking.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asking
    for call in (0, 1):
        upstream.let(call)
    await settle()
    assert upstream.calls == [["t0"], ["t1"]]
    assert kept.rows.keys() == {0, 1}
    assert not scheduler._queues


async def test_the_calls_under_way_end_when_the_tasks_are_closed():
    """At the end of the process nothing goes on, whoever waits for it."""
    upstream = Upstream()
    upstream.hold()
    scheduler = schedule(upstream)
    asking = asyncio.create_task(scheduler.embed(SPACE, texts(500), ANY_TIME))
    await settle()
    assert upstream.air == 8
    await scheduler.router.upstreams.attempts.close()
    assert upstream.air == 0
    with pytest.raises(DeadlineExceeded):
        await asking


async def test_a_task_that_is_closed_before_it_runs_leaves_nobody_waiting():
    """What came in the very turn of the loop in which the process stops is failed, too."""
    scheduler = schedule(Upstream())
    attempts = scheduler.router.upstreams.attempts
    asking = asyncio.create_task(scheduler.embed(SPACE, ["a"], ANY_TIME))
    await until(lambda: attempts._tasks)
    await attempts.close()
    async with asyncio.timeout(60):
        with pytest.raises(DeadlineExceeded):
            await asking
    assert not scheduler._queues


def test_a_queue_that_is_dropped_amid_a_call_starts_nothing():
    """Where nobody runs the event loop any more, what is collected makes no new work."""

    async def begin():
        upstream = Upstream()
        upstream.hold()
        scheduler = schedule(upstream, Limits(inputs=1, concurrency=1))
        task = asyncio.create_task(scheduler.embed(SPACE, texts(3), ANY_TIME))
        await settle()
        assert upstream.air == 1
        del task

    loop = asyncio.new_event_loop()
    loop.set_exception_handler(lambda *_: None)
    loop.run_until_complete(begin())
    gc.collect()
    loop.close()


@in_virtual_time
async def test_after_the_deadline_no_call_is_begun_and_those_under_way_are_finished():
    """The failure is told when what is paid for has ended, and is kept."""
    upstream, kept = Upstream(), Kept()
    upstream.hold()
    scheduler = schedule(upstream, Limits(inputs=1, concurrency=2))
    soon = Context(deadline=asyncio.get_running_loop().time() + 60, on_part=kept)
    asking = asyncio.create_task(scheduler.embed(SPACE, texts(5), soon))
    await settle()
    await asyncio.sleep(61)
    await settle()
    for call in (0, 1):
        upstream.let(call)
    with pytest.raises(DeadlineExceeded):
        await asking
    assert len(upstream.calls) == 2
    assert {context.deadline for context in upstream.contexts} == {soon.deadline}
    assert kept.rows.keys() == {0, 1}


@given(st.permutations(range(8)), st.integers(1, 7))
def test_answers_are_put_in_order_however_they_are_mixed(places, cut):
    """Parts of any places, in any order, make one answer in the order of the places."""
    inputs = texts(8)
    parts = [
        (
            some,
            Embedded(
                [vector_of(inputs[i]) for i in some],
                [tokens_of(inputs[i]) for i in some],
                counted=True,
                providers=(f"p{min(some)}",),
            ),
        )
        for some in (sorted(places[:cut]), sorted(places[cut:]))
    ]
    embedded = assemble(parts)
    check(embedded, inputs)
    assert embedded.providers[0] == "p0"
    assert embedded.counted
    parts[0] = (parts[0][0], replace(parts[0][1], counted=False))
    assert not assemble(parts).counted


# Refusals.


@settings(deadline=None)
@given(st.integers(1, 600), st.data(), st.sampled_from([None, "input", "$.input", "input[3]"]))
async def test_a_bad_input_is_named_and_costs_few_calls(count, draw, param):
    """Wherever it is: it is named, found by halving, and all others of its part are bought."""
    place = draw.draw(st.integers(0, count - 1))
    inputs, kept = texts(count), Kept()
    upstream = Upstream(refusing(f"t{place}", param=param))
    with pytest.raises(InvalidRequest, match=r"^bad input$") as caught:
        await schedule(upstream, Limits()).embed(SPACE, inputs, Context(on_part=kept))
    assert (caught.value.index, caught.value.param) == (place, param)
    parts = min(8, ceil(count / LEAST))
    assert len(upstream.calls) <= parts + 2 * ceil(log2(ceil(count / parts)))
    assert sorted(kept.rows) == [i for i in range(count) if i != place]
    kept.check(inputs)
    assert len(upstream.bought) == count - 1


@settings(deadline=None)
@given(st.integers(2, 300), st.sets(st.integers(0, 299), min_size=2))
@example(65, {0, 1, 2, 4, 8, 16})  # Nothing of the batch that holds them is taken, but others are.
async def test_of_several_bad_inputs_one_is_named(count, places):
    """With more than one, the one that is named is bad, and no call more is spent on the others."""
    places = {place % count for place in places}
    assume(len(places) > 1)
    upstream = Upstream(refusing(*(f"t{i}" for i in places)))
    with pytest.raises(InvalidRequest) as caught:
        await schedule(upstream, Limits()).embed(SPACE, texts(count), ANY_TIME)
    assert caught.value.index in {*places, None}
    if len(places) < count / 2:
        assert caught.value.index is not None or len(upstream.bought) == 0
    parts = ceil(count / LEAST)
    assert len(upstream.calls) <= parts + 2 * ceil(log2(LEAST))
    assert not {f"t{i}" for i in places} & set(upstream.bought)


async def test_the_lowest_of_named_inputs_is_told():
    """Among refusals the one that names an input counts, and of those the first."""
    upstream = Upstream()
    upstream.failure = lambda call: InvalidRequest(f"no {call[0]}")
    with pytest.raises(InvalidRequest, match="no t0") as caught:
        await schedule(upstream, Limits(inputs=1)).embed(SPACE, texts(3), ANY_TIME)
    assert caught.value.index == 0


@pytest.mark.parametrize("param", ["model", "dimensions", "input_type", "encoding_format"])
async def test_what_is_wrong_with_every_input_is_not_searched(param):
    """A refusal of another field is told as it came, after one call."""
    upstream = Upstream(refusing("t5", param=param))
    with pytest.raises(InvalidRequest) as caught:
        await schedule(upstream, Limits()).embed(SPACE, texts(50), ANY_TIME)
    assert caught.value.index is None
    assert len(upstream.calls) == 1
    with pytest.raises(InvalidRequest) as caught:
        await schedule(upstream, Limits()).embed(SPACE, ["t5"], ANY_TIME)
    assert caught.value.index is None


async def test_an_extra_field_that_is_refused_is_not_searched_for_among_the_inputs():
    """Where the client sent fields of its own, and both halves are refused alike, it is they."""
    upstream = Upstream(lambda _: InvalidRequest("Unrecognized request argument supplied: x"))
    space = SPACE.with_parameters({"x": 1})
    with pytest.raises(InvalidRequest) as caught:
        await schedule(upstream, Limits()).embed(space, texts(64), ANY_TIME)
    assert caught.value.index is None
    assert len(upstream.calls) == 3


async def test_nobody_is_blamed_without_proof():
    """When even the last input is refused and no other was taken, none is named."""
    upstream = Upstream(lambda _: InvalidRequest("no"))
    with pytest.raises(InvalidRequest) as caught:
        await schedule(upstream, Limits()).embed(SPACE, texts(500), ANY_TIME)
    assert caught.value.index is None
    assert len(upstream.calls) <= 8 + 2 * 6, "and one part only is searched"


async def test_an_upstream_that_names_the_input_is_believed():
    """A refusal with an index is told with the place in the request, and nothing is searched."""
    upstream = Upstream()
    upstream.failure = lambda call: InvalidRequest("no", index=2) if "t102" in call else None
    with pytest.raises(InvalidRequest) as caught:
        await schedule(upstream, Limits(inputs=100)).embed(SPACE, texts(200), ANY_TIME)
    expected = next(call for call in upstream.calls if "t102" in call)[2]
    assert caught.value.index == texts(200).index(expected)
    assert len(upstream.calls) == 4


async def test_the_search_ends_with_a_failure_of_another_kind():
    """Halves that fail for another reason leave the place unknown; that reason is told."""
    upstream = Upstream()
    upstream.failure = lambda call: InvalidRequest("no") if len(call) > 4 else LATE
    with pytest.raises(RateLimited):
        await schedule(upstream, Limits()).embed(SPACE, texts(8), ANY_TIME)
    assert len(upstream.calls) == 3


SIZE = [
    {"kind": "max_tokens_per_request"},
    {"code": "max_tokens_per_request", "param": "input"},
    {"status": 413},
]


@settings(deadline=None)
@given(st.integers(1, 200), st.integers(1, 64), st.sampled_from(SIZE))
async def test_a_call_that_is_too_large_is_divided_until_it_fits(count, most, how):
    """A refusal for size is nobody's business: the halves are asked for, and all is answered."""
    upstream = Upstream(lambda call: InvalidRequest("large", **how) if len(call) > most else None)
    inputs = texts(count)
    check(await schedule(upstream, Limits()).embed(SPACE, inputs, ANY_TIME), inputs)
    assert sorted(upstream.bought) == sorted(inputs)
    assert upstream.most <= 8


async def test_a_limit_that_is_named_and_not_learned_is_kept_to_all_the_same():
    """The same call is not made again and again, whatever the route makes of the refusal."""
    named = InvalidRequest("batch size 8, in tokens: at most 2 inputs", status=400)
    upstream = Upstream(lambda call: named if len(call) > 2 else None)
    async with asyncio.timeout(60):
        check(await schedule(upstream).embed(SPACE, texts(8), ANY_TIME), texts(8))
    assert [len(call) for call in upstream.calls] == [8, 2, 2, 2, 2]


async def test_what_is_too_large_alone_is_named():
    """An input that no call can hold is refused by its place; the others are bought."""
    upstream, kept = Upstream(), Kept()
    upstream.failure = lambda call: InvalidRequest("large", status=413) if "t9" in call else None
    with pytest.raises(InvalidRequest) as caught:
        await schedule(upstream, Limits()).embed(SPACE, texts(20), Context(on_part=kept))
    assert (caught.value.index, caught.value.status) == (9, 413)
    assert 9 not in kept.rows


@settings(deadline=None)
@given(st.integers(1, 200), st.integers(1, 64), st.none() | st.integers(0, 199))
async def test_calls_that_are_refused_only_together_are_answered_apart(count, most, bad):
    """An upstream that calls a large batch a bad input gets smaller ones, down to what fits."""
    upstream, inputs, kept = Upstream(), texts(count), Kept()
    upstream.failure = lambda call: (
        InvalidRequest("what") if len(call) > most or f"t{bad}" in call else None
    )
    asking = schedule(upstream, Limits()).embed(SPACE, inputs, Context(on_part=kept))
    if bad is None or bad >= count:
        check(await asking, inputs)
        assert sorted(upstream.bought) == sorted(inputs)
    else:
        with pytest.raises(InvalidRequest) as caught:
            await asking
        assert caught.value.index == bad or (most == 1 and caught.value.index is None)
    kept.check(inputs)


# A route that takes less than the first.


class Narrow:
    """A provider that takes so much in a call, and says so."""

    def __init__(self, limits, failure=lambda _: None):
        self.limits = limits
        self.upstream = Upstream(failure)
        self.models = set()

    async def ask(self, model, space, inputs, context):
        self.models.add(model)
        return await self.upstream.embed(space, inputs, context)


@settings(deadline=None)
@given(st.integers(1, 100), st.integers(1, 40), st.none() | st.integers(1, 60))
async def test_a_part_is_cut_again_where_a_provider_takes_less(count, most, tokens):
    """Each call keeps to what this provider takes, also at a time."""
    provider = Narrow(Limits(inputs=most, tokens=tokens, concurrency=2))
    inputs = texts(count)
    check(await call_route(Route(provider, "theirs"), SPACE, inputs, ANY_TIME), inputs)
    assert all(len(call) <= most for call in provider.upstream.calls)
    assert sorted(provider.upstream.bought) == sorted(inputs)
    assert provider.upstream.most <= 2
    assert provider.models == {"theirs"}


def test_a_provider_that_says_nothing_has_the_usual_limits():
    """What a provider takes is its own to say; OpenAI's limits hold for one that does not."""
    assert limits_of(Narrow(Limits(inputs=3))) == Limits(inputs=3)
    assert limits_of(object()) == Limits()
