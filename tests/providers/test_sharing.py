"""Inputs of many requests share calls, and no request suffers for another."""

import asyncio

import pytest
from clock import in_virtual_time, until
from embedding_proxy.providers.base import Context, Space
from embedding_proxy.providers.errors import (
    DeadlineExceeded,
    InvalidRequest,
    RateLimited,
    Refusal,
    UpstreamError,
)
from embedding_proxy.providers.profile import Limits
from embedding_proxy.providers.scheduling import scheduler
from embedding_proxy.providers.scheduling.search import MAX_SEARCHES
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.providers.fakes import Kept, Upstream, check, refusing, schedule, settle, vector_of

SPACE = Space("m", 2)
WINDOW = 0.005


class Rig:
    """A scheduler over an upstream."""

    def __init__(self, failure=lambda _: None, limits=None, window=0, **route):
        self.upstream = Upstream(failure)
        self.scheduler = schedule(self.upstream, limits, window, **route)

    def start(self, *inputs, space=SPACE, **context):
        """Start a request."""
        asking = self.scheduler.embed(space, inputs, Context(**context))
        return asyncio.create_task(asking)

    async def called(self, count=1):
        """Wait until so many calls have been made."""
        await until(lambda: len(self.upstream.calls) >= count)
        await settle()


def names(count):
    """Return inputs that are all different."""
    return [f"t{i}" for i in range(count)]


@pytest.mark.untraced
async def test_a_thousand_at_once_are_few_calls():
    """One thousand different inputs, each a request of its own, are a bulk request upstream."""
    rig = Rig()
    tasks = [rig.start(name) for name in names(1000)]
    for name, task in zip(names(1000), tasks, strict=True):
        check(await task, [name])
    assert len(rig.upstream.calls) == 8
    assert sorted(rig.upstream.bought) == sorted(names(1000))
    await settle()
    assert not rig.scheduler._queues


async def test_with_a_window_they_are_fewer_still():
    """Who waits for others on purpose wants few calls rather than quick ones."""
    rig = Rig(window=WINDOW)
    await asyncio.gather(*map(rig.start, names(1000)))
    assert len(rig.upstream.calls) == 4


async def test_only_those_of_one_space_and_one_user_share_a_call():
    """What an upstream is told of a call holds for all who are in it."""
    rig = Rig()
    spaces = [SPACE, Space("m", 2).with_parameters({"task": "query"}), Space("other", 2)]
    tasks = [rig.start("a", space=space, user=user) for space in spaces for user in ("x", None)]
    tasks += [rig.start("b", user="x"), rig.start("c", user="x", namespace="n")]
    tasks += [rig.start("d", user="x", neutral=(("metadata", b"1"),))]
    await asyncio.gather(*tasks)
    assert sorted(rig.upstream.calls) == [["a"]] * 5 + [["a", "b", "c"], ["d"]]


async def test_a_large_request_does_not_wait_for_the_window():
    """What is a batch by itself goes at once, and takes along who waits."""
    rig = Rig(window=60)
    small = rig.start("small")
    await settle()
    assert rig.upstream.calls == []
    inputs = names(scheduler.MAX_WINDOW_INPUTS + 1)
    async with asyncio.timeout(60):
        check(await rig.start(*inputs), inputs)
        check(await small, ["small"])


async def test_a_full_call_does_not_wait_out_the_window():
    """Once there are as many inputs as a call holds, it goes."""
    rig = Rig(limits=Limits(inputs=4), window=60)
    tasks = [rig.start(f"a{i}", f"b{i}") for i in range(2)]
    async with asyncio.timeout(60):
        for i, task in enumerate(tasks):
            check(await task, [f"a{i}", f"b{i}"])
    assert rig.upstream.calls == [["a0", "b0", "a1", "b1"]]


async def test_while_all_slots_are_taken_what_comes_shares_the_next_call():
    """Calls grow with the load and not in number: nothing is put together before a slot is free."""
    rig = Rig(limits=Limits(concurrency=2))
    rig.upstream.hold()
    first = []
    for i in range(2):
        first.append(rig.start(f"first {i}"))
        await rig.called(i + 1)
    later = []
    for name in names(50):
        later.append(rig.start(name))
        await asyncio.sleep(0)
    await settle()
    assert len(rig.upstream.calls) == 2
    rig.upstream.let(0)
    await rig.called(3)
    assert rig.upstream.calls[-1] == names(50)
    for call in list(rig.upstream.held):
        rig.upstream.let(call)
    await asyncio.gather(*later, *first)


@in_virtual_time
async def test_where_another_route_is_left_nobody_waits_for_a_slot_for_long():
    """Calls that hang hold up those who come after for a share of their time only."""
    other = Upstream()
    other.name = "other"
    rig = Rig(limits=Limits(concurrency=1), others=[other])
    rig.upstream.hold()
    hanging = rig.start("hanging")
    await rig.called(1)
    now = asyncio.get_running_loop().time()
    check(await rig.start("late", deadline=now + 60), ["late"])
    assert (rig.upstream.calls, other.calls) == ([["hanging"]], [["late"]])
    rig.upstream.let(0)
    await hanging


async def test_after_a_wait_no_call_is_begun_that_ends_too_late():
    """When nobody who waits can be answered in time, the call is spared, and that is told."""
    rig = Rig(limits=Limits(concurrency=1), call_s=1000.0)
    rig.upstream.hold()
    now = asyncio.get_running_loop().time()
    first = rig.start("first", deadline=now + 60)
    await rig.called(1)
    late = rig.start("late", deadline=now + 60)
    patient = rig.start("patient", space=Space("other", 2), deadline=now + 6000)
    await settle()
    rig.upstream.let(0)
    check(await first, ["first"])
    await rig.called(2)
    rig.upstream.let(1)
    check(await patient, ["patient"])
    with pytest.raises(DeadlineExceeded, match="too short"):
        await late
    assert rig.upstream.calls == [["first"], ["patient"]]


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.lists(st.integers(0, 12), min_size=1, max_size=4), min_size=1, max_size=12),
    st.sets(st.integers(0, 12), max_size=5),
    st.integers(1, 8),
)
async def test_a_bad_input_is_only_its_owners(requests, bad, most):
    """Whoever asked for what is refused is told which it was; everyone else is answered."""
    rig = Rig(refusing(*(f"t{i}" for i in bad)), Limits(inputs=most))
    asked = [[f"t{i}" for i in request] for request in requests]
    results = await asyncio.gather(
        *(rig.start(*inputs) for inputs in asked), return_exceptions=True
    )
    for request, inputs, result in zip(requests, asked, results, strict=True):
        if bad & set(request):
            assert isinstance(result, InvalidRequest)
            assert result.index is None or request[result.index] in bad
        else:
            check(result, inputs)


async def test_many_bad_inputs_cost_no_more_than_going_alone():
    """After some rounds of leaving one out, each goes alone, and only for what is missing."""
    rig = Rig(refusing(*(f"t{i}" for i in range(0, 40, 2))))
    results = await asyncio.gather(*map(rig.start, names(40)), return_exceptions=True)
    for i, result in enumerate(results):
        if i % 2:
            check(result, [f"t{i}"])
        else:
            assert (type(result), result.index) == (InvalidRequest, 0)
    assert len(rig.upstream.calls) <= 40 + MAX_SEARCHES * 13
    assert sorted(rig.upstream.bought) == sorted(f"t{i}" for i in range(1, 40, 2))


@pytest.mark.parametrize(
    "failure", [RateLimited("p", "no"), InvalidRequest("no", param="model"), KeyError("defect")]
)
async def test_what_is_wrong_for_all_is_told_to_all(failure):
    """A failure that is nobody's own is everybody's, after one call."""
    rig = Rig(lambda _: failure)
    results = await asyncio.gather(*map(rig.start, names(5)), return_exceptions=True)
    assert [type(result) for result in results] == [type(failure)] * 5
    assert len(rig.upstream.calls) == 1


async def test_what_was_bought_before_a_failure_is_kept():
    """Parts that were answered reach their requests; of a request in two parts one is told."""
    rig = Rig(limits=Limits(inputs=2, concurrency=1))
    rig.upstream.failure = lambda call: RateLimited("p", "no") if "c" in call else None
    kept = Kept()
    whole, cut = rig.start("a"), rig.start("b", "c", on_part=kept)
    check(await whole, ["a"])
    with pytest.raises(RateLimited):
        await cut
    assert kept.rows == {0: vector_of("b")}


@pytest.mark.parametrize("when", ["queued", "on the wire"])
async def test_who_leaves_harms_nobody(when):
    """The others are answered; what was begun for the one who left is kept."""
    rig, kept = Rig(), Kept()
    rig.upstream.hold()
    tasks = [rig.start(name, on_part=kept) for name in names(3)]
    if when == "queued":
        await asyncio.sleep(0)
    else:
        await rig.called()
    tasks[0].cancel()
    await rig.called()
    rig.upstream.let(0)
    check(await tasks[1], ["t1"])
    check(await tasks[2], ["t2"])
    assert tasks[0].cancelled()
    assert rig.upstream.calls == [names(3)[when == "queued" :]]
    assert len(kept.rows) == (when != "queued")


@pytest.mark.parametrize("when", ["queued", "on the wire"])
async def test_what_nobody_waits_for_is_not_begun_but_finished(when):
    """When all have left, what is queued is dropped; a call that was begun is kept."""
    rig, kept = Rig(), Kept()
    rig.upstream.hold()
    tasks = [rig.start(name, on_part=kept) for name in names(3)]
    await (asyncio.sleep(0) if when == "queued" else rig.called())
    for task in tasks:
        task.cancel()
    await settle()
    assert len(rig.upstream.calls) == (when != "queued")
    for call in rig.upstream.held:
        rig.upstream.let(call)
    await settle()
    assert not rig.scheduler._queues
    assert len(kept.rows) == (when != "queued")
    rig.upstream.held = None
    check(await rig.start("a"), ["a"])


@in_virtual_time
async def test_a_call_has_the_time_of_the_most_patient_request():
    """A request whose time is up while its call is under way is told when that has ended."""
    rig, kept = Rig(), Kept()
    rig.upstream.hold()
    now = asyncio.get_running_loop().time()
    hasty = rig.start("a", deadline=now + 60, on_part=kept)
    patient = rig.start("b", deadline=now + 600)
    await rig.called()
    await asyncio.sleep(61)
    await settle()
    assert rig.upstream.contexts[0].deadline == now + 600
    rig.upstream.let(0)
    check(await patient, ["b"])
    with pytest.raises(DeadlineExceeded):
        await hasty
    assert kept.rows == {0: vector_of("a")}
    rig.upstream.held = None
    await asyncio.gather(rig.start("a", deadline=now + 600), rig.start("b"))
    assert rig.upstream.contexts[-1].deadline is None


async def test_a_refusal_that_names_nobody_sends_each_alone():
    """When nothing tells whose input is refused, nobody is blamed for another's."""
    rig = Rig(refusing("x", "y"))
    results = await asyncio.gather(*map(rig.start, ["x", "y", "good"]), return_exceptions=True)
    assert [type(result) for result in results[:2]] == [InvalidRequest] * 2
    check(results[2], ["good"])
    assert rig.upstream.bought == ["good"]


async def test_who_is_asked_for_again_pays_only_for_what_is_missing():
    """A request that came in two parts, of which one was refused for another's, buys that one."""
    rig = Rig(limits=Limits(inputs=2, concurrency=1))
    rig.upstream.failure = lambda call: (
        InvalidRequest("no", index=call.index("bad")) if "bad" in call else None
    )
    tasks = [rig.start("a"), rig.start("b", "c"), rig.start("bad")]
    check(await tasks[0], ["a"])
    check(await tasks[1], ["b", "c"])
    with pytest.raises(InvalidRequest):
        await tasks[2]
    assert rig.upstream.bought == ["a", "b", "c"]


async def test_an_input_that_a_half_names_fails_its_own_request_alone():
    """While a bad input is searched for, one that is named leaves nobody without an end."""

    def failure(call):
        if len(call) == 4:
            return InvalidRequest("what")
        return InvalidRequest("named", index=call.index("a")) if "a" in call else None

    rig = Rig(failure)
    tasks = [rig.start(name) for name in "abcd"]
    async with asyncio.timeout(60):
        with pytest.raises(InvalidRequest, match="named"):
            await tasks[0]
        for name, task in zip("bcd", tasks[1:], strict=True):
            check(await task, [name])


async def test_a_half_that_is_too_large_is_divided():
    """A refusal for size says nothing of any input, also in the middle of a search."""
    sizes = {4: InvalidRequest("what"), 2: InvalidRequest("large", status=413)}
    rig = Rig(lambda call: sizes.get(len(call)))
    tasks = [rig.start(name) for name in "abcd"]
    for name, task in zip("abcd", tasks, strict=True):
        check(await task, [name])


async def test_a_window_is_over_when_a_divided_call_takes_its_requests_along():
    """Its end would come to a queue that is forgotten by then."""
    large = InvalidRequest("large", status=413)
    rig = Rig(lambda call: large if len(call) > 65 else None, window=60)
    rig.upstream.hold()
    inputs = names(scheduler.MAX_WINDOW_INPUTS + 2)
    many = rig.start(*inputs)
    await rig.called()
    few = rig.start("few")
    await settle()
    window = next(iter(rig.scheduler._queues.values()))._flush
    rig.upstream.held[0].set()
    rig.upstream.held = None
    check(await many, inputs)
    check(await few, ["few"])
    assert window.cancelled()
    assert not rig.scheduler._queues


@pytest.mark.parametrize(
    "failure", [InvalidRequest("no"), UpstreamError("p", "x", Refusal(500, "x"))], ids=str
)
async def test_no_bad_input_is_searched_for_when_nobody_waits(failure):
    """A call that was begun is finished; when it fails after everybody has gone, that is all."""
    rig = Rig(lambda _: failure)
    rig.upstream.hold()
    abandoned = asyncio.get_running_loop().create_future()
    asking = rig.start(*names(64), abandoned=abandoned)
    await rig.called()
    abandoned.set_result(None)
    await settle()
    rig.upstream.held[0].set()
    rig.upstream.held = None
    with pytest.raises(type(failure)):
        await asking
    assert len(rig.upstream.calls) == 1
