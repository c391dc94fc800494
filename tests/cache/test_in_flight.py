"""Single flight: one fetch for all who wait, and nobody's leaving harms another."""

import asyncio
import gc

import pytest
from embedding_proxy.cache.in_flight import Fetch, InFlight, wait
from embedding_proxy.cache.key import keyring
from embedding_proxy.cache.memory import Memory
from embedding_proxy.cache.tiers import Tiers
from embedding_proxy.providers.base import CachePolicy, Context, Embedded, Space
from embedding_proxy.providers.client_credential import Credential
from embedding_proxy.providers.errors import NoRoute
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.cache.fakes import FakeStore, Turnstile, settle, vector_of

SPACE = Space("m", 3)
RING = keyring(SPACE)
ITEMS = {RING.key(item): item for item in "abcd"}
KEYS = list(ITEMS)
KEY = KEYS[0]
ANY = Context()


class Work:
    """An embedder that answers when the test says so, or fails."""

    def __init__(self):
        self.end = asyncio.get_running_loop().create_future()
        self.runs = 0
        self.cancelled = False

    async def embed(self, space, inputs, _context):
        self.runs += 1
        try:
            await asyncio.shield(self.end)
        except asyncio.CancelledError:
            self.cancelled = True
            raise
        vectors = [vector_of(item, space) for item in inputs]
        return Embedded(vectors, [1] * len(inputs), counted=True)


def _lead(in_flight, work, keys=(KEY,), context=ANY):
    """Start a fetch, as a request does for what nobody buys yet."""
    tiers = Tiers(Memory(1 << 20), FakeStore())
    fetch = Fetch(in_flight, tiers, work, RING, {key: ITEMS[key] for key in keys}, context)
    in_flight.add(fetch)
    return fetch


async def _ask(in_flight, work, keys=(KEY,)):
    """Do as a request does: wait for what is under way, buy the rest; return what was bought."""
    joins, leads = in_flight.split(keys, ANY)
    fetches = set(joins.values())
    if leads:
        fetches.add(_lead(in_flight, work, leads))
    await wait(fetches)
    for fetch in fetches:
        fetch.task.result()
    return {key for fetch in fetches for key in fetch.entries if key in keys}


async def _start(in_flight, work, count, keys=(KEY,)):
    """Start requests and let them come to where they wait."""
    tasks = [asyncio.create_task(_ask(in_flight, work, keys)) for _ in range(count)]
    await settle()
    return tasks


async def test_one_fetch_serves_a_thousand():
    """However many ask for a key at once, the work is done once and all have its result."""
    in_flight, work = InFlight(), Work()
    tasks = await _start(in_flight, work, 1000)
    assert (work.runs, len(in_flight)) == (1, 1)
    work.end.set_result(None)
    assert await asyncio.gather(*tasks) == [{KEY}] * 1000
    assert (work.runs, len(in_flight), in_flight.landed) == (1, 0, 1)


async def test_after_the_end_a_key_is_led_again():
    """A fetch that has ended is joined by nobody; whoever asks then starts another."""
    in_flight = InFlight()
    for number in range(3):
        work = Work()
        work.end.set_result(None)
        assert await _ask(in_flight, work) == {KEY}
        assert (work.runs, in_flight.landed) == (1, number + 1)


async def test_keys_are_split_by_what_is_under_way():
    """Of several keys, those being bought are joined, each in its own fetch, and the rest led."""
    in_flight, first, second, third = InFlight(), Work(), Work(), Work()
    one = _lead(in_flight, first, KEYS[:2])
    two = _lead(in_flight, second, KEYS[2:3])
    joins, leads = in_flight.split(KEYS, ANY)
    assert joins == {KEYS[0]: one, KEYS[1]: one, KEYS[2]: two}
    assert leads == [KEYS[3]]
    assert len(in_flight) == 3

    (asking,) = await _start(in_flight, third, 1, KEYS)
    for work in (first, second, third):
        assert not asking.done()
        work.end.set_result(None)
        await settle()
    assert await asking == {*KEYS}
    assert (len(in_flight), in_flight.landed) == (0, 4)


async def test_waiting_ends_when_all_fetches_have_ended():
    """A fetch that fails early does not end the wait for the others."""
    in_flight, bad, good = InFlight(), Work(), Work()
    fetches = [_lead(in_flight, bad, KEYS[:1]), _lead(in_flight, good, KEYS[1:2])]
    waiting = asyncio.create_task(wait(fetches))
    await settle()
    bad.end.set_exception(NoRoute("early"))
    await settle()
    assert not waiting.done()
    good.end.set_result(None)
    await waiting
    assert str(fetches[0].task.exception()) == "early"
    assert [*fetches[1].entries] == KEYS[1:2]


@settings(deadline=None)
@given(
    joiners=st.integers(1, 5),
    turns=st.integers(0, 6),
    together=st.booleans(),
)
async def test_a_cancelled_leader_harms_no_waiter(joiners, turns, together):
    """Whenever the leader is cancelled, those who wait by then get the one fetch's result."""
    in_flight, work = InFlight(), Work()
    leader = asyncio.create_task(_ask(in_flight, work))
    if not together:
        await settle()
    others = [asyncio.create_task(_ask(in_flight, work)) for _ in range(joiners)]
    for _ in range(turns):
        await asyncio.sleep(0)
    leader.cancel()
    await settle()
    assert leader.cancelled()
    work.end.set_result(None)
    assert await asyncio.gather(*others) == [{KEY}] * joiners
    assert (work.runs, work.cancelled) == (1, False)


async def test_a_leader_cancelled_at_once_finds_its_waiter():
    """One counts as waiting from the moment it asks, not from the loop's next turn."""
    in_flight, work = InFlight(), Work()
    fetch = _lead(in_flight, work)
    leader, joiner = wait([fetch]), wait([fetch])
    # Both run to where they wait, within this turn, as they do inside a request.
    leader.send(None)
    joiner.send(None)
    with pytest.raises(asyncio.CancelledError):
        leader.throw(asyncio.CancelledError())
    assert not fetch.abandonment.done()
    joiner.close()
    assert fetch.abandonment.done()
    await settle()
    assert fetch.task.cancelled()


async def test_the_last_to_leave_cancels_the_fetch():
    """The fetch goes on while anyone waits, and no longer."""
    in_flight, work = InFlight(), Work()
    tasks = await _start(in_flight, work, 5)
    for task in tasks:
        assert not work.cancelled
        task.cancel()
        await settle()
    assert work.cancelled
    assert (len(in_flight), in_flight.landed) == (0, 0)


async def test_a_call_that_was_begun_is_finished_and_kept():
    """It is paid for: nobody waits any more, and whoever asks next joins it."""

    class Begun(Work):
        async def embed(self, space, inputs, context):
            context.on_begin([0])
            return await super().embed(space, inputs, context)

    in_flight, work = InFlight(), Begun()
    (task,) = await _start(in_flight, work, 1, KEYS[:2])
    task.cancel()
    await settle()
    joins, leads = in_flight.split(KEYS[:2], ANY)
    assert ([*joins], leads) == (KEYS[:1], KEYS[1:2]), "no call was begun for the second"
    (fetch,) = joins.values()
    work.end.set_result(None)
    await fetch.task
    assert (work.cancelled, [*fetch.entries]) == (False, KEYS[:2])


async def test_leaving_two_fetches_cancels_only_the_one_nobody_else_waits_for():
    """A request that waits for its own fetch and for another's takes only its own along."""
    in_flight, theirs, own = InFlight(), Work(), Work()
    (other,) = await _start(in_flight, theirs, 1, KEYS[:1])
    (both,) = await _start(in_flight, own, 1, KEYS[:2])
    both.cancel()
    await settle()
    assert (theirs.cancelled, own.cancelled) == (False, True)
    theirs.end.set_result(None)
    assert await other == {KEYS[0]}


async def test_an_abandoned_fetch_is_replaced_and_not_joined():
    """While a cancelled fetch is still ending its key is led anew, and its end changes nothing."""
    in_flight, door, new = InFlight(), Turnstile(), Work()
    door.shut()

    class SlowToEnd:
        async def embed(self, *_):
            try:
                await asyncio.Event().wait()
            finally:
                await door.through()

    old = _lead(in_flight, SlowToEnd())
    waiting = asyncio.create_task(wait([old]))
    await settle()
    waiting.cancel()
    await settle()
    assert old.abandonment.done()
    assert not old.task.done()
    assert in_flight.split([KEY], ANY) == ({}, [KEY])

    (asking,) = await _start(in_flight, new, 1)
    door.open()
    await settle()
    assert old.task.cancelled()
    (joining,) = await _start(in_flight, new, 1)
    assert new.runs == 1
    new.end.set_result(None)
    assert await asyncio.gather(asking, joining) == [{KEY}, {KEY}]
    assert (len(in_flight), in_flight.landed) == (0, 1)


async def test_a_failure_reaches_all_who_wait():
    """Leader and waiters get the same error, and the key is free again."""
    in_flight, work = InFlight(), Work()
    tasks = await _start(in_flight, work, 10)
    failure = LookupError("no luck")
    work.end.set_exception(failure)
    results = await asyncio.gather(*tasks, return_exceptions=True)
    assert all(result is failure for result in results)
    assert (len(results), len(in_flight), in_flight.landed) == (10, 0, 0)


@pytest.mark.parametrize("when", ["while being cancelled", "just before"])
async def test_a_failure_nobody_is_left_to_hear_of_is_no_news(when):
    """A fetch that fails as its last waiter leaves is not reported as never looked at."""
    reports = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: reports.append(context))
    in_flight, end = InFlight(), asyncio.get_running_loop().create_future()

    class Fails:
        async def embed(self, *_):
            try:
                await end
            finally:
                raise LookupError(when)

    fetch = _lead(in_flight, Fails())
    waiting = asyncio.create_task(wait([fetch]))
    await settle()
    if when == "just before":
        # When the fetch is done, and before the one who waits is told.
        fetch.task.add_done_callback(lambda _, waiting=waiting: waiting.cancel())
        end.set_result(None)
    else:
        waiting.cancel()
    await settle()
    assert waiting.cancelled()
    assert fetch.task.done()
    assert not fetch.task.cancelled()
    assert len(in_flight) == 0
    del fetch, waiting
    gc.collect()
    await settle()
    assert reports == []


@pytest.mark.parametrize("terms", [CachePolicy(write=False), CachePolicy(max_age=0)], ids=str)
async def test_all_fetches_are_ended_at_the_close(terms):
    """Also one that leaves no trace, and one whose place another has taken."""
    in_flight, works = InFlight(), [Work(), Work()]
    fetches = [
        _lead(in_flight, work, context=Context(terms=each))
        for work, each in zip(works, (CachePolicy(), terms), strict=True)
    ]
    await settle()
    await in_flight.close()
    assert all(fetch.task.done() for fetch in fetches)
    assert len(in_flight) == 0


@settings(deadline=None)
@given(st.lists(st.sampled_from(["ask", "leave first", "leave last", "turn"]), max_size=25))
async def test_any_coming_and_going_serves_all_who_stay(steps):
    """However requests come and go, who stays is served, and only what nobody wants is ended."""
    in_flight, works, tasks, gone = InFlight(), [], [], set()

    class Numbered(Work):
        async def embed(self, *given):
            works.append(self)
            return await super().embed(*given)

    for step in steps:
        staying = [task for task in tasks if task not in gone]
        if step == "ask":
            tasks.append(asyncio.create_task(_ask(in_flight, Numbered())))
        elif step == "turn":
            await asyncio.sleep(0)
        elif staying:
            task = staying[0 if step == "leave first" else -1]
            task.cancel()
            gone.add(task)
    await settle()
    going_on = [work for work in works if not work.cancelled]
    staying = [task for task in tasks if task not in gone]
    assert len(going_on) == bool(staying)
    for work in going_on:
        work.end.set_result(None)
    assert await asyncio.gather(*staying) == [{KEY}] * len(staying)
    await settle()
    assert len(in_flight) == 0


async def test_what_has_landed_is_known_for_a_while():
    """Of what has landed since a look-up its keys are told; after too much of it, all are."""
    in_flight = InFlight(max_recent=3)

    async def land(key, context=ANY):
        work = Work()
        work.end.set_result(None)
        fetch = _lead(in_flight, work, [key], context)
        await wait([fetch])
        assert [*fetch.entries] == [key]

    await land(KEYS[0])
    mark = in_flight.landed
    assert in_flight.landed_since(mark, KEYS) == set()
    await land(KEYS[1])
    await land(KEYS[2], Context(terms=CachePolicy(write=False)))
    assert in_flight.landed_since(mark, KEYS) == {KEYS[1]}
    assert in_flight.landed_since(mark, KEYS[2:]) == set()
    for _ in range(3):
        await land(KEYS[1])
    assert in_flight.landed_since(mark, KEYS[2:]) == {*KEYS[2:]}


ANNE, BOB = Credential("secret 1", "key-1"), Credential("secret 2", "key-2")
NEW, PROOF = CachePolicy(max_age=0), CachePolicy(max_age=0, joins_same_key=True)


@pytest.mark.parametrize(
    ("leader", "own", "is_served"),
    [
        (Context(), Context(), True),
        (Context(), Context(terms=CachePolicy(max_age=60)), True),
        (Context(credential=ANNE), Context(terms=PROOF, credential=ANNE), False),
        (Context(terms=CachePolicy(max_age=60)), Context(), True),
        (Context(terms=NEW), Context(terms=NEW), False),
        (Context(terms=NEW), Context(), True),
        (Context(terms=NEW, credential=ANNE), Context(terms=PROOF, credential=ANNE), True),
        (Context(terms=NEW, credential=ANNE), Context(terms=PROOF, credential=BOB), False),
        (Context(), Context(terms=CachePolicy(write=False)), False),
    ],
)
async def test_who_waits_for_whom(leader, own, is_served):
    """A fetch serves those who take what it buys: see `Fetch.serves`."""
    in_flight = InFlight()
    _lead(in_flight, Work(), context=leader)
    joins, _ = in_flight.split([KEY], own)
    assert bool(joins) == is_served
    await in_flight.close()
