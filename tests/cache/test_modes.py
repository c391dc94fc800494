"""What its terms make of a request: bought anew, without a trace, or not at all."""

import asyncio
import struct
import time
from collections import Counter
from dataclasses import replace

import pytest
from embedding_proxy.cache import record
from embedding_proxy.cache.errors import NotCached
from embedding_proxy.cache.ledger import Usage
from embedding_proxy.cache.memory import Memory
from embedding_proxy.providers.base import CachePolicy, Context, Embedded
from embedding_proxy.providers.errors import RateLimited
from embedding_proxy.providers.profile import Limits
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.cache.fakes import FakeEmbedder, FakeStore, Turnstile, key_of, settle, tokens_of
from tests.cache.test_embedder import ANY_TIME, DUPLICATE, HIT, JOIN, MIB, MISS, SPACE, Rig
from tests.providers.fakes import schedule

REFRESH = Context(terms=CachePolicy(max_age=0))
NO_STORE = Context(terms=CachePolicy(write=False))
OFF = Context(terms=CachePolicy(max_age=0, write=False))
FROZEN = Context(terms=CachePolicy(frozen=True))
IF_CACHED = Context(terms=CachePolicy(only_if_cached=True))
MINUTE = Context(terms=CachePolicy(max_age=60))


class Changing(FakeEmbedder):
    """An upstream whose numbers change: each vector says which call it is from."""

    async def embed(self, space, inputs, context):
        number = len(self.calls)
        embedded = await super().embed(space, inputs, context)
        return Embedded(
            [vector(number)] * len(inputs),
            embedded.tokens,
            embedded.counted,
            embedded.providers,
            embedded.outcomes,
        )


def vector(number):
    """Return the vector that the call of this number gives."""
    return struct.pack("<3f", number, 0, 0)


def numbers(embedded):
    """Return the numbers of the calls that the vectors of an answer are from."""
    return [int(struct.unpack("<3f", one)[0]) for one in embedded.vectors]


async def ask(rig, *inputs, context=ANY_TIME):
    """Make a request; return its outcomes, and the calls its vectors are from."""
    embedded = await rig.start(*inputs, context=context)
    return embedded.outcomes, numbers(embedded)


def kept(rig):
    """Return the call that the record of "a" is from, on disk."""
    key = key_of("a", SPACE)
    entry = record.decode(rig.store.records[key.address], key.digest, 3)
    return int(struct.unpack("<3f", entry.vector)[0])


# Bought anew.


@pytest.mark.parametrize("memory", [0, MIB])
async def test_a_refresh_replaces_what_is_kept(memory):
    """A known input is asked for again, once, and its new vector is what others get from then."""
    rig = Rig(Changing(), memory=memory)
    assert await ask(rig, "a") == ([MISS], [0])
    assert await ask(rig, "a", "b", "a", context=REFRESH) == ([MISS, MISS, DUPLICATE], [1, 1, 1])
    assert await ask(rig, "a") == ([HIT], [1])
    assert (kept(rig), rig.inner.asked) == (1, ["a", "a", "b"])
    assert rig.store.usage.tokens_billed == 2 * tokens_of("a") + tokens_of("b")


async def test_a_refresh_that_fails_leaves_what_was_there():
    """An upstream that is down is an error for who wants a new vector, and for nobody else."""
    rig = Rig(Changing())
    await ask(rig, "a")
    rig.inner.failure = lambda _: RateLimited("fake", "no")
    with pytest.raises(RateLimited):
        await ask(rig, "a", context=REFRESH)
    assert await ask(rig, "a") == ([HIT], [0])
    assert kept(rig) == 0


async def test_a_refresh_waits_for_no_purchase_that_was_begun_before():
    """It buys beside a miss or a refresh that is under way; who comes later joins the newest."""
    rig = Rig(Changing())
    rig.inner.gate.shut()
    requests = []
    for context in (ANY_TIME, REFRESH, REFRESH, ANY_TIME):
        requests.append(rig.start("a", context=context))
        await settle()
    assert len(rig.inner.calls) == 3
    rig.inner.gate.open()
    answers = [await request for request in requests]
    assert [answer.outcomes[0] for answer in answers] == [MISS, MISS, MISS, JOIN]
    assert [numbers(answer)[0] for answer in answers] == [0, 1, 2, 2]
    assert len(rig.in_flight) == 0


async def test_a_fill_that_was_replaced_ends_without_harm():
    """The older of two fills of one key lands first: the newer one is still there to be joined."""
    rig = Rig(Changing(), memory=0)
    rig.inner.gate.shut()
    older = rig.start("a")
    await settle()
    newer = rig.start("a", context=REFRESH)
    await settle()
    rig.inner.gate.let(0)
    assert numbers(await older) == [0]
    rig.store.broken = True  # so that what has landed is not found
    joiner = rig.start("a")
    await settle()
    rig.inner.gate.open()
    assert (numbers(await newer), numbers(await joiner)) == ([1], [1])
    assert len(rig.inner.calls) == 2


async def test_what_was_read_before_a_refresh_does_not_come_back_after_it():
    """A slow read of the old record ends when the new one is kept: memory keeps the new one."""
    rig = Rig(Changing())
    await ask(rig, "a")
    rig = Rig(rig.inner, rig.store)  # as after a restart: nothing is in memory
    rig.store.reading.shut()
    slow = rig.start("a")
    await settle()
    rig.store.reading.let()
    await settle()
    rig.store.reading.is_open = True
    assert await ask(rig, "a", context=REFRESH) == ([MISS], [1])
    rig.store.reading.open()
    assert numbers(await slow) == [0]
    assert await ask(rig, "a") == ([HIT], [1])


async def test_a_cancelled_refresh_leaves_its_purchase_to_who_joined():
    """Alone it is called off and the old entry stays; what another waits for goes on."""
    rig = Rig(Changing(), memory=0)
    await ask(rig, "a")
    rig.inner.gate.shut()
    alone = rig.start("a", context=REFRESH)
    await settle()
    alone.cancel()
    await settle()
    assert rig.inner.gate.held == []
    assert await ask(rig, "a") == ([HIT], [0])
    leader = rig.start("a", "b", context=REFRESH)
    await settle()
    joiner = rig.start("b")
    await settle()
    leader.cancel()
    await settle()
    rig.inner.gate.open()
    assert (await joiner).outcomes == [JOIN]
    assert await ask(rig, "a", "b") == ([HIT, HIT], [2, 2])


# Old entries.


async def test_an_entry_that_is_too_old_is_bought_anew():
    """Only the age counts: what is younger is a hit, what is older is replaced."""
    rig = Rig(Changing(), memory=0)
    await ask(rig, "a")
    rig.store.stored = time.time() - 30
    assert await ask(rig, "a", context=MINUTE) == ([HIT], [0])
    rig.store.stored -= 60
    assert await ask(rig, "a") == ([HIT], [0])
    assert await ask(rig, "a", context=MINUTE) == ([MISS], [1])
    assert kept(rig) == 1


async def test_an_entry_too_old_in_memory_may_be_newer_on_disk():
    """Another process has bought it since: the disk is read before anything is bought."""
    rig = Rig(Changing())
    rig.tiers.memory = Memory(MIB, clock=lambda: time.time() - 90)
    await ask(rig, "a")
    rig.store.stored = time.time() - 30
    assert await ask(rig, "a", context=MINUTE) == ([HIT], [0])
    assert len(rig.store.reads) == 2
    assert await ask(rig, "a", context=MINUTE) == ([HIT], [0])
    assert len(rig.store.reads) == 2


async def test_the_second_look_takes_no_older_entries_than_the_first():
    """What another's fill has just kept is a hit, but not what is too old all the same."""
    rig = Rig(Changing(), memory=0)
    await ask(rig, "a")
    rig.store.reading.shut()
    late = rig.start("a", "b", context=MINUTE)
    await settle()
    rig.store.reading.let()
    await settle()
    rig.store.reading.is_open = True
    await ask(rig, "b")  # lands between the two looks; "a" is as old as before
    rig.store.reading.open()
    embedded = await late
    assert (embedded.outcomes, numbers(embedded)) == ([MISS, MISS], [2, 2])


async def test_one_who_takes_no_old_entries_waits_for_a_purchase():
    """What is bought at this moment is new enough, whatever entries its leader would have taken."""
    rig = Rig(Changing())
    rig.inner.gate.shut()
    requests = []
    for context in (ANY_TIME, MINUTE, MINUTE, ANY_TIME):
        requests.append(rig.start("a", context=context))
        await settle()
    rig.inner.gate.open()
    answers = [await request for request in requests]
    assert [answer.outcomes[0] for answer in answers] == [MISS, JOIN, JOIN, JOIN]
    assert [numbers(answer)[0] for answer in answers] == [0, 0, 0, 0]


# Without a trace.


@pytest.mark.parametrize("context", [NO_STORE, OFF], ids=["no-store", "off"])
async def test_nothing_stays_of_a_request_without_a_trace(context):
    """No record, no entry in memory, no note of a use, no flight; only the sums know of it."""
    rig = Rig(Changing())
    rig.inner.gate.shut()
    request = rig.start("a", "b", "a", context=context)
    await settle()
    assert len(rig.in_flight) == 0
    rig.inner.gate.open()
    assert (await request).outcomes == [MISS, MISS, DUPLICATE]
    assert (rig.store.records, rig.store.touched, len(rig.tiers.memory)) == ({}, set(), 0)
    cost = tokens_of("a") + tokens_of("b")
    assert rig.store.usage._replace(nanodollars_billed=0) == Usage(
        misses=2, duplicates=1, tokens_billed=cost, tokens_saved=tokens_of("a")
    )
    assert await ask(rig, "a") == ([MISS], [1])


async def test_no_store_keeps_nothing_from_making_room():
    """What was read without a trace is not the last used one: it is the first to go."""
    rig = Rig(Changing(), memory=1000)  # room for two
    await ask(rig, "a", "b")
    await ask(rig, "a", context=NO_STORE)
    await ask(rig, "c")
    reads = len(rig.store.reads)
    await ask(rig, "b", "c")
    assert len(rig.store.reads) == reads


@pytest.mark.parametrize("memory", [0, MIB])
async def test_no_store_is_served_what_is_known(memory):
    """Reading costs nothing and leaves nothing: a hit that is noted nowhere."""
    rig = Rig(Changing(), memory=memory)
    await ask(rig, "a")
    assert await ask(rig, "a", context=NO_STORE) == ([HIT], [0])
    assert rig.store.touched == set()
    rig = Rig(rig.inner, rig.store)
    assert await ask(rig, "a", context=NO_STORE) == ([HIT], [0])
    assert len(rig.tiers.memory) == 0


async def test_off_reads_nothing():
    """What is known is bought all the same, no tier is asked, and what is kept stays as it was."""
    rig = Rig(Changing())
    await ask(rig, "a")
    reads, counters = len(rig.store.reads), rig.tiers.counters
    before = replace(counters)
    assert await ask(rig, "a", context=OFF) == ([MISS], [1])
    assert (len(rig.store.reads), rig.tiers.counters) == (reads, before)
    assert await ask(rig, "a") == ([HIT], [0])


@pytest.mark.parametrize("context", [NO_STORE, OFF], ids=["no-store", "off"])
async def test_who_leaves_no_trace_and_who_keeps_do_not_meet(context):
    """At the same time each buys for itself: neither waits for the other, and one is kept."""
    rig = Rig(Changing())
    rig.inner.gate.shut()
    requests = []
    for one in (ANY_TIME, context, context, ANY_TIME):
        requests.append(rig.start("a", context=one))
        await settle()
    assert len(rig.inner.calls) == 3
    rig.inner.gate.open()
    answers = [await request for request in requests]
    assert [answer.outcomes[0] for answer in answers] == [MISS, MISS, MISS, JOIN]
    assert (kept(rig), len(rig.in_flight)) == (0, 0)


async def test_the_bill_is_whole_when_a_request_without_a_trace_fails():
    """Parts that were bought before the failure are in the sums, and nowhere else."""
    rig = Rig(Changing())
    rig.embedder = rig.of(schedule(rig.inner, Limits(inputs=1)))
    rig.inner.failure = lambda inputs: RateLimited("fake", "no") if "b" in inputs else None
    rig.inner.gate.shut()
    asking = rig.start("a", "b", "c", context=OFF)
    await settle()
    rig.inner.gate.open()
    with pytest.raises(RateLimited):
        await asking
    billed = tokens_of("a") + tokens_of("c")
    assert rig.store.usage._replace(nanodollars_billed=0) == Usage(misses=2, tokens_billed=billed)
    assert (rig.store.records, len(rig.tiers.memory)) == ({}, 0)


async def test_a_cancelled_request_without_a_trace_calls_its_purchase_off():
    """Nobody else waits for it, so nobody pays for it."""
    rig = Rig(Changing())
    rig.inner.gate.shut()
    request = rig.start("a", context=OFF)
    await settle()
    assert len(rig.inner.gate.held) == 1
    request.cancel()
    await settle()
    assert rig.inner.gate.held == []
    assert rig.store.usage._replace(nanodollars_billed=0) == Usage()


# Nothing spent.


@pytest.mark.parametrize(
    ("terms", "status"),
    [
        (CachePolicy(frozen=True), 404),
        (CachePolicy(only_if_cached=True), 504),
        (CachePolicy(frozen=True, only_if_cached=True), 504),
        (CachePolicy(max_age=0, write=False, only_if_cached=True), 504),
    ],
)
async def test_what_is_missing_is_named_and_not_bought(terms, status):
    """The error names the first missing place and counts them all; nobody is asked."""
    rig = Rig()
    await rig.embed("old")
    with pytest.raises(NotCached) as caught:
        await rig.embed("old", "new", "old", "also new", "new", context=Context(terms=terms))
    error = caught.value
    first, count = (1, 3) if terms.max_age else (0, 5)
    assert (error.index, error.status, error.code, error.param) == (
        first,
        status,
        "not_cached",
        "input",
    )
    assert f"{count} of 5 inputs are" in str(error)
    assert f"the first is input {first})" in str(error)
    assert ("only-if-cached" in str(error)) == terms.only_if_cached
    assert ("cache.mode is frozen" in str(error)) != terms.only_if_cached
    assert ("as newly as" in str(error)) == (terms.max_age == 0)
    assert rig.inner.asked == ["old"]
    assert rig.store.usage.misses == 1


@pytest.mark.parametrize("context", [FROZEN, IF_CACHED], ids=["frozen", "only-if-cached"])
async def test_what_is_there_is_served_for_nothing(context):
    """A request of which all is known is a hit like every other."""
    rig = Rig()
    await rig.embed("a", "b")
    assert (await rig.embed("b", "a", "b", context=context)).outcomes == [HIT, HIT, DUPLICATE]
    with pytest.raises(NotCached, match=r"1 of 1 inputs is not in the cache \(input 0\)"):
        await rig.embed("c", context=context)


@pytest.mark.parametrize("context", [FROZEN, IF_CACHED], ids=["frozen", "only-if-cached"])
async def test_who_may_not_spend_does_not_wait_for_who_does(context):
    """An input that another is buying just now is a miss at once, and the purchase goes on."""
    rig = Rig()
    rig.inner.gate.shut()
    buying = rig.start("a")
    await settle()
    with pytest.raises(NotCached):
        await rig.embed("a", context=context)
    assert not buying.done()
    rig.inner.gate.open()
    await buying
    assert (await rig.embed("a", context=context)).outcomes == [HIT]


# All together.

TERMS = st.sampled_from(
    [one.terms for one in (ANY_TIME, ANY_TIME, REFRESH, NO_STORE, OFF, FROZEN, IF_CACHED, MINUTE)]
)
STEPS = st.lists(
    st.tuples(st.lists(st.sampled_from("abc"), min_size=1, max_size=3), TERMS),
    min_size=1,
    max_size=6,
)


async def play(draw, rig, gate, steps):
    """Start requests, cancel some, and let go of what the gate holds, in an order that is drawn.

    Returns the tasks, all done, with the number of calls before each was started.
    """
    gate.shut()
    tasks = []
    try:
        while len(tasks) < len(steps) or gate.held:
            choices = [("let", i) for i in range(len(gate.held))]
            choices += [("cancel", i) for i, (task, _) in enumerate(tasks) if not task.done()]
            if len(tasks) < len(steps):
                choices.append(("start", len(tasks)))
            what, which = draw.draw(st.sampled_from(choices))
            if what == "let":
                gate.let(which)
            elif what == "cancel":
                tasks[which][0].cancel()
            else:
                inputs, terms = steps[which]
                task = rig.start(*inputs, context=Context(terms=terms))
                tasks.append((task, len(rig.inner.calls)))
            await settle()
    finally:
        # An example that is given up in between leaves nobody waiting, and no failure unheard.
        gate.open()
        await asyncio.gather(*(task for task, _ in tasks), return_exceptions=True)
    return tasks


def check(rig, inputs, terms, embedded, begun):
    """Check that an answer is what its terms allow."""
    outcomes = set(embedded.outcomes)
    if not terms.spend:
        assert outcomes <= {HIT, DUPLICATE}
    if not terms.write:
        assert JOIN not in outcomes
    for item, call in zip(inputs, numbers(embedded), strict=True):
        # The vector is this input's own, and as new as it has to be.
        assert item in rig.inner.calls[call][1]
        assert terms.max_age > 0 or call >= begun


@settings(deadline=None)
@given(STEPS, st.sampled_from([0, MIB]), st.data())
async def test_in_any_interleaving_each_request_gets_what_its_terms_allow(steps, limit, draw):
    """Whoever is cancelled: no refresh is old, no trace stays, and the sums are the bill."""
    gate = Turnstile()
    rig = Rig(Changing(gate), FakeStore(gate), limit)
    tasks = await play(draw, rig, gate, steps)
    answered = Counter()
    for (task, begun), (inputs, terms) in zip(tasks, steps, strict=True):
        if task.cancelled():
            continue
        if isinstance(task.exception(), NotCached):
            assert not terms.spend
            continue
        check(rig, inputs, terms, task.result(), begun)
        answered.update(task.result().outcomes)
    may_stay = {
        key_of(item, SPACE).address
        for inputs, terms in steps
        if terms.write and terms.spend
        for item in inputs
    }
    assert rig.store.records.keys() <= may_stay
    assert set(rig.tiers.memory._entries) <= may_stay
    assert len(rig.in_flight) == 0
    if not any(task.cancelled() for task, _ in tasks):
        bought = [item for _, inputs, _ in rig.inner.calls for item in inputs]
        assert rig.store.usage.misses == len(bought) == answered[MISS]
        assert rig.store.usage.tokens_billed == sum(map(tokens_of, bought))
