"""Small requests ride together, and none suffers for another."""

import asyncio
import gc

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from providers.base import Context, DeadlineExceeded, InputRefused, RateLimited, Space
from providers.batching import gather
from providers.batching.gather import Gatherer
from providers.limits import Limits
from tests.providers.fakes import Kept, Upstream, check, refusing, settle, vector_of

SPACE = Space("m", 2)
ANY_TIME = Context()
WINDOW = 0.005


class Rig:
    """A gatherer over an upstream."""

    def __init__(self, failure=lambda _: None, limits=None, window=WINDOW):
        self.upstream = Upstream(failure)
        limits = limits or Limits()
        self.gatherer = Gatherer(self.upstream, limits, window)

    def start(self, *inputs, space=SPACE, **context):
        """Start a request."""
        asking = self.gatherer.embed(space, inputs, Context(**context))
        return asyncio.create_task(asking)

    async def called(self, count=1):
        """Wait until so many calls have been made."""
        async with asyncio.timeout(20):
            while len(self.upstream.calls) < count:  # noqa: ASYNC110 - it takes a few turns
                await asyncio.sleep(0)
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
    assert len(rig.upstream.calls) == 4
    assert sorted(rig.upstream.bought) == sorted(names(1000))
    assert not rig.gatherer._boarding
    del task, tasks
    await settle()
    gc.collect()
    assert not rig.gatherer._turns


async def test_only_those_of_one_space_and_one_user_ride_together():
    """What an upstream is told of a call holds for all who are in it."""
    rig = Rig()
    spaces = [SPACE, Space("m", 2).with_parameters({"task": "query"}), Space("other", 2)]
    tasks = [rig.start("a", space=space, user=user) for space in spaces for user in ("x", None)]
    tasks += [rig.start("b", user="x"), rig.start("c", user="x", namespace="n")]
    await asyncio.gather(*tasks)
    assert sorted(rig.upstream.calls) == [["a"]] * 5 + [["a", "b", "c"]]
    assert [c.user for c in rig.upstream.contexts] == ["x", None] * 3


async def test_a_large_request_does_not_wait():
    """What is a batch by itself goes at once, with its own context."""
    rig = Rig(window=60)
    inputs = names(gather.SMALL + 1)
    context = Context(user="u", namespace="n")
    check(await rig.gatherer.embed(SPACE, inputs, context), inputs)
    assert rig.upstream.contexts[0].namespace == "n"


async def test_a_full_call_does_not_wait_out_the_window():
    """Once there are as many inputs as a call holds, it goes."""
    rig = Rig(limits=Limits(inputs=4), window=60)
    tasks = [rig.start(f"a{i}", f"b{i}") for i in range(2)]
    async with asyncio.timeout(20):
        for i, task in enumerate(tasks):
            check(await task, [f"a{i}", f"b{i}"])
    assert rig.upstream.calls == [["a0", "b0", "a1", "b1"]]


async def test_while_calls_are_in_the_air_the_next_ones_gather(monkeypatch):
    """Calls grow with the load: those who come while all turns are taken go in one."""
    monkeypatch.setattr(gather, "LONGEST_WAIT", 60)
    rig = Rig()
    rig.upstream.hold()
    first = []
    for i in range(gather.IN_THE_AIR):
        first.append(rig.start(f"first {i}"))
        await rig.called(i + 1)
    later = [rig.start(name) for name in names(50)]
    await asyncio.sleep(3 * WINDOW)
    assert len(rig.upstream.calls) == gather.IN_THE_AIR
    rig.upstream.let(0)
    await rig.called(gather.IN_THE_AIR + 1)
    assert rig.upstream.calls[-1] == names(50)
    for call in list(rig.upstream.held):
        rig.upstream.let(call)
    await asyncio.gather(*later, *first)


async def test_nobody_waits_long_for_a_turn(monkeypatch):
    """Calls that hang hold up those who come after for a moment only."""
    monkeypatch.setattr(gather, "LONGEST_WAIT", 0.01)
    rig = Rig()
    rig.upstream.hold()
    hanging = rig.start("hanging")
    await rig.called(1)
    turns = rig.gatherer._turns[gather.Line(SPACE, None)]
    turns._value = 0
    late = rig.start("late")
    await rig.called(2)
    rig.upstream.let(1)
    check(await late, ["late"])
    await settle()
    assert turns._value == 0, "it gives no turn back that it had not"
    hanging.cancel()


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
            assert isinstance(result, InputRefused)
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
            assert (type(result), result.index) == (InputRefused, 0)
    assert len(rig.upstream.calls) <= 40 + gather.ROUNDS * 13
    assert sorted(rig.upstream.bought) == sorted(f"t{i}" for i in range(1, 40, 2))


@pytest.mark.parametrize(
    "failure", [RateLimited("p", "no"), InputRefused("no", param="model"), KeyError("defect")]
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


@pytest.mark.parametrize("when", ["boarding", "in the air"])
async def test_who_leaves_harms_nobody(when):
    """The others are answered; in the air, what the one who left has paid for is kept."""
    rig, kept = Rig(), Kept()
    rig.upstream.hold()
    tasks = [rig.start(name, on_part=kept) for name in names(3)]
    if when == "boarding":
        await asyncio.sleep(0)
    else:
        await rig.called()
    tasks[0].cancel()
    await rig.called()
    rig.upstream.let(0)
    check(await tasks[1], ["t1"])
    check(await tasks[2], ["t2"])
    assert tasks[0].cancelled()
    assert rig.upstream.calls == [names(3)[when == "boarding" :]]
    assert len(kept.rows) == (when != "boarding")


@pytest.mark.parametrize("when", ["boarding", "in the air"])
async def test_a_call_for_nobody_is_called_off(when):
    """When all have left nothing goes on, and the next one starts anew."""
    rig = Rig()
    rig.upstream.hold()
    tasks = [rig.start(name) for name in names(3)]
    await (asyncio.sleep(0) if when == "boarding" else rig.called())
    for task in tasks:
        task.cancel()
    await settle()
    assert rig.upstream.air == 0
    assert not rig.gatherer._boarding
    rig.upstream.held = None
    check(await rig.start("a"), ["a"])


async def test_each_waits_until_its_own_deadline():
    """One whose time is up goes; the call has the time of the most patient."""
    rig = Rig()
    rig.upstream.hold()
    now = asyncio.get_running_loop().time()
    hasty, patient = rig.start("a", deadline=now + 0.05), rig.start("b", deadline=now + 60)
    await rig.called()
    with pytest.raises(DeadlineExceeded):
        await hasty
    assert rig.upstream.contexts[0].deadline == now + 60
    rig.upstream.let(0)
    check(await patient, ["b"])
    rig.upstream.held = None
    await asyncio.gather(rig.start("a", deadline=now + 60), rig.start("b"))
    assert rig.upstream.contexts[-1].deadline is None


async def test_a_refusal_that_names_nobody_sends_each_alone():
    """When nothing tells whose input is refused, nobody is blamed for another's."""
    rig = Rig(refusing("x", "y"))
    results = await asyncio.gather(*map(rig.start, ["x", "y", "good"]), return_exceptions=True)
    assert [type(result) for result in results[:2]] == [InputRefused] * 2
    check(results[2], ["good"])
    assert rig.upstream.bought == ["good"]


async def test_who_is_asked_for_again_pays_only_for_what_is_missing():
    """A request that came in two parts, of which one was refused for another's, buys that one."""
    rig = Rig(limits=Limits(inputs=2, concurrency=1))
    rig.upstream.failure = lambda call: (
        InputRefused("no", index=call.index("bad")) if "bad" in call else None
    )
    tasks = [rig.start("a"), rig.start("b", "c"), rig.start("bad")]
    check(await tasks[0], ["a"])
    check(await tasks[1], ["b", "c"])
    with pytest.raises(InputRefused):
        await tasks[2]
    assert rig.upstream.bought == ["a", "b", "c"]
