"""What a fill got before it failed is kept, handed out, and not paid for again."""

import asyncio
import random

import pytest
from clock import in_virtual_time
from embedding_proxy.cache.errors import name_input
from embedding_proxy.providers.base import Context, Outcome
from embedding_proxy.providers.errors import InvalidRequest, Refusal, UpstreamError
from embedding_proxy.providers.profile import Limits
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.cache.fakes import FakeEmbedder, key_of, settle, tokens_of
from tests.cache.test_embedder import ANY_TIME, HIT, JOIN, MISS, SPACE, Rig, _right
from tests.providers.fakes import schedule

DOWN = UpstreamError("fake", "down", Refusal(503, "down"))


def batched(limits=Limits(inputs=1), **parts):  # noqa: B008 - it is frozen
    """Return a rig whose purchases go in parts of one input each."""
    rig = Rig(**parts)
    rig.embedder = rig.of(schedule(rig.inner, limits))
    return rig


def refused(*bad):
    """Return a failure of calls that hold one of these."""
    return lambda inputs: InvalidRequest("bad") if set(bad) & set(inputs) else None


@pytest.mark.parametrize("failing", ["a", "c", "e"], ids=["first", "middle", "last"])
async def test_a_failed_request_has_kept_what_it_bought(failing):
    """The retry pays only for what failed; the sums say what was bought, once each."""
    rig, inputs = batched(), list("abcde")
    rig.inner.failure = lambda call: DOWN if failing in call else None
    rig.inner.gate.shut()
    asking = rig.start(*inputs)
    await settle()
    rig.inner.gate.open()
    with pytest.raises(UpstreamError):
        await asking
    kept = [item for item in inputs if item != failing]
    assert rig.store.records.keys() == {key_of(item, SPACE).address for item in kept}
    assert rig.store.usage.misses == 4
    assert rig.store.usage.tokens_billed == sum(map(tokens_of, kept))
    rig.inner.failure = lambda _: None
    again = await rig.embed(*inputs)
    assert again.outcomes == [MISS if item == failing else HIT for item in inputs]
    assert sorted(rig.inner.asked) == sorted([*inputs, failing])
    assert rig.store.usage.tokens_billed == sum(map(tokens_of, inputs))


async def test_a_part_told_twice_is_counted_once():
    """An embedder may tell of a part and of the whole; it is bought once."""

    class Twice(FakeEmbedder):
        async def embed(self, space, inputs, context):
            answer = await super().embed(space, inputs, context)
            await context.on_part(range(len(inputs)), answer)
            await context.on_part(range(len(inputs)), answer)
            return answer

    rig = Rig(Twice())
    assert (await rig.embed("a", "b")).outcomes == [MISS, MISS]
    assert rig.store.usage.misses == 2


async def test_a_part_whose_bringer_is_called_off_while_it_is_kept_is_answered_with():
    """Of two calls for the same, the slower one is cancelled amid its telling: nothing is lost."""
    rig = Rig()

    class Overtaken(FakeEmbedder):
        async def embed(self, space, inputs, context):
            answer = await super().embed(space, inputs, context)
            rig.store.writing.shut()
            slow = asyncio.create_task(context.on_part(range(len(inputs)), answer))
            await settle()
            slow.cancel()
            await asyncio.wait([slow])
            return answer

    rig.embedder = rig.of(Overtaken())
    asking = rig.start("a", "b")
    await settle()
    assert not asking.done(), "it is not on disk"
    rig.store.writing.open()
    _right(await asking, ["a", "b"])
    assert len(rig.store.records) == rig.store.usage.misses == 2


async def test_a_joiner_has_its_part_before_the_rest_is_there():
    """Who waits for one part of a fill is answered when that part is kept, and not before."""
    rig = batched()
    rig.inner.gate.shut()
    leader = rig.start("a", "b")
    await settle()
    joiner = rig.start("b")
    await settle()
    rig.store.writing.shut()
    rig.inner.gate.let(1)
    await settle()
    assert not joiner.done()
    rig.store.writing.open()
    assert _right(await joiner, ["b"]).outcomes == [JOIN]
    assert not leader.done()
    late = rig.start("b", "a")
    await settle()
    rig.inner.gate.open()
    _right(await late, ["b", "a"])
    assert (await leader).outcomes == [MISS, MISS]
    assert rig.inner.asked == ["a", "b"]


async def test_a_joiner_of_what_was_bought_does_not_share_the_failure():
    """The fill fails after the part that a joiner waited for: it is answered all the same."""
    rig = batched()
    rig.inner.failure = lambda call: DOWN if "a" in call else None
    rig.inner.gate.shut()
    leader = rig.start("a", "b", "c")
    await settle()
    rig.store.writing.shut()
    joiners = [rig.start("b"), rig.start("b", "c"), rig.start("a", "c")]
    await settle()
    rig.inner.gate.open()
    await settle()
    rig.store.writing.open()
    with pytest.raises(UpstreamError):
        await leader
    assert _right(await joiners[0], ["b"]).outcomes == [JOIN]
    assert _right(await joiners[1], ["b", "c"]).outcomes == [JOIN, JOIN]
    with pytest.raises(UpstreamError):
        await joiners[2]


async def test_who_joins_an_abandoned_fill_does_not_suffer_for_its_other_inputs():
    """A call was begun for both; what it is refused for is the input of one who is gone."""
    rig = Rig()
    rig.embedder = rig.of(schedule(rig.inner))
    rig.inner.failure = refused("bad")
    rig.inner.gate.shut()
    gone = rig.start("bad", "good")
    await settle()
    gone.cancel()
    await settle()
    stays = rig.start("good")
    await settle()
    assert len(rig.inner.calls) == 1
    rig.inner.gate.open()
    _right(await stays, ["good"])


async def test_what_an_abandoned_fill_had_bought_is_not_bought_again():
    """One who looked before a part landed is given it, though everybody else has left its fetch."""
    rig = batched()
    rig.inner.gate.shut()
    leader = rig.start("a", "b")
    await settle()
    rig.store.reading.shut()
    late = rig.start("a")
    await settle()
    rig.store.reading.let(0)
    await settle()
    rig.inner.gate.let(0)
    await settle()
    leader.cancel()
    rig.store.reading.open()
    await settle()
    rig.inner.gate.open()
    assert _right(await late, ["a"]).outcomes == [HIT]
    assert rig.inner.asked == ["a", "b"]


# Refused inputs.


@settings(deadline=None)
@given(st.lists(st.integers(0, 9), min_size=1, max_size=30), st.data())
async def test_the_refused_input_is_named_as_the_client_knows_it(numbers, draw):
    """Whatever hits and duplicates are around it, the index is its first place in the request."""
    bad = draw.draw(st.sampled_from(numbers))
    known = draw.draw(st.sets(st.integers(0, 9))) - {bad}
    rig = batched(Limits())
    inputs = [f"t{n}" for n in numbers]
    if known:
        await rig.embed(*(f"t{n}" for n in known))
    rig.inner.failure = refused(f"t{bad}")
    with pytest.raises(InvalidRequest) as caught:
        await rig.embed(*inputs)
    place = numbers.index(bad)
    assert caught.value.index == place
    if len(inputs) == 1:
        assert (str(caught.value), caught.value.param) == ("bad", None)
    else:
        assert (str(caught.value), caught.value.param) == (f"bad (input {place})", "input")
    again = [item for item in inputs if item != f"t{bad}"]
    if again:
        assert MISS not in (await rig.embed(*again)).outcomes


@pytest.mark.parametrize("param", [None, "input[0]", "input.1", "user"])
def test_a_part_of_a_part_is_named_once(param):
    """Whoever puts parts together names the place in the whole, and nothing but that."""
    bare = InvalidRequest("bad", param=param, index=0)
    error = name_input(name_input(bare, 1, 2), 7, 9)
    assert (str(error), error.index) == ("bad (input 7)", 7)
    assert error.param == ("user" if param == "user" else "input")
    alone = name_input(error, 0, 1)
    assert (str(alone), alone.index, alone.param) == ("bad", 0, param)


async def test_each_client_is_told_its_own_place():
    """Leader and joiner asked for the same bad input at different places."""
    rig = batched(Limits())
    rig.inner.failure = refused("bad")
    rig.inner.gate.shut()
    requests = [rig.start("a", "bad"), rig.start("bad", "bad", "b"), rig.start("bad")]
    await settle()
    rig.inner.gate.open()
    results = await asyncio.gather(*requests, return_exceptions=True)
    assert [str(result) for result in results] == ["bad (input 1)", "bad (input 0)", "bad"]
    assert [result.index for result in results] == [1, 0, 0]


@pytest.mark.parametrize("named", [False, True])
async def test_a_joiner_whose_own_inputs_are_good_is_not_refused(named):
    """All that a joiner wants was in a fill with another's bad input: it gets it, most for free."""
    rig = batched(Limits())
    rig.inner.failure = refused("bad")
    if named:
        rig.inner.failure = lambda call: (
            InvalidRequest("bad", index=call.index("bad")) if "bad" in call else None
        )
    rig.inner.gate.shut()
    leader = rig.start("a", "bad", "b", "c")
    await settle()
    joiners = [rig.start("c", "a"), rig.start("a", "b", "bad"), rig.start("b")]
    await settle()
    rig.inner.gate.open()
    results = await asyncio.gather(leader, *joiners, return_exceptions=True)
    assert [getattr(result, "index", None) for result in results] == [1, None, 2, None]
    _right(results[1], ["c", "a"])
    _right(results[3], ["b"])
    bought = [item for item in rig.inner.asked if item == "bad"]
    assert len(bought) <= 3


@pytest.mark.untraced
async def test_a_thousand_cancelled_leaders_fail_no_joiner():
    """Whenever a leader goes away, whoever joined it is answered."""
    random.seed(1)
    rig = batched(memory=0)
    for number in range(1000):
        rig.inner.gate.shut()
        names = [f"{number} {i}" for i in range(3)]
        leader = rig.start(*names)
        for _ in range(random.randrange(8)):
            await asyncio.sleep(0)
        joiner = rig.start(names[number % 3])
        for _ in range(random.randrange(8)):
            await asyncio.sleep(0)
        leader.cancel()
        await asyncio.sleep(0)
        rig.inner.gate.open()
        (outcome,) = _right(await joiner, [names[number % 3]]).outcomes
        assert outcome in (Outcome.JOIN, Outcome.MISS)
    await settle()
    assert len(rig.in_flight) == 0


@in_virtual_time
async def test_a_wait_for_another_ends_at_ones_own_deadline():
    """A joiner does not wait longer than its own time, whatever the one it waits for has left."""
    rig = batched()
    rig.inner.gate.shut()
    leader = rig.start("a", context=ANY_TIME)
    await settle()
    soon = Context(deadline=asyncio.get_running_loop().time() + 1)
    with pytest.raises(Exception, match="the time of the request was up"):
        await rig.embed("a", context=soon)
    rig.inner.gate.open()
    _right(await leader, ["a"])
