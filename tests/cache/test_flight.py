"""Flights: one fill for all who wait, and nobody's leaving harms another."""

import asyncio
import gc

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cache import flight
from cache.flight import Flights
from cache.key import Key
from providers.base import Terms
from tests.cache.fakes import Turnstile, settle

KEYS = [Key(bytes([i]) * 16, bytes(16)) for i in range(4)]
KEY = KEYS[0]


class Work:
    """What a fill does: it waits for its end, which the test sets as a result or an error."""

    def __init__(self):
        self.end = asyncio.get_running_loop().create_future()
        self.runs = 0
        self.cancelled = False

    async def run(self, fill):
        self.runs += 1
        try:
            return await asyncio.shield(self.end)
        except asyncio.CancelledError:
            self.cancelled = True
            raise


async def _ask(flights, work, keys=(KEY,)):
    """Do as a request does: join what is under way, lead the rest, wait, and read the results."""
    joins, leads = flights.part(list(keys))
    fills = set(joins.values())
    if leads:
        fills.add(flights.lead(leads, work.run))
    await flight.wait(fills)
    return [fill.task.result() for fill in fills]


async def _start(flights, work, count, keys=(KEY,)):
    """Start requests and let them come to where they wait."""
    tasks = [asyncio.create_task(_ask(flights, work, keys)) for _ in range(count)]
    await settle()
    return tasks


async def test_one_fill_serves_a_thousand():
    """However many ask for a key at once, the work is done once and all have its result."""
    flights, work = Flights(), Work()
    tasks = await _start(flights, work, 1000)
    assert (work.runs, len(flights)) == (1, 1)
    work.end.set_result("bought")
    assert await asyncio.gather(*tasks) == [["bought"]] * 1000
    assert (work.runs, len(flights), flights.landed) == (1, 0, 1)


async def test_after_the_landing_a_key_is_led_again():
    """A fill that has ended is joined by nobody; whoever asks then starts another."""
    flights = Flights()
    for number in range(3):
        work = Work()
        work.end.set_result(number)
        assert await _ask(flights, work) == [number]
        assert flights.landed == number + 1


async def test_keys_are_parted_by_what_is_under_way():
    """Of several keys, those being bought are joined, each in its own fill, and the rest led."""
    flights, first, second, third = Flights(), Work(), Work(), Work()
    one = flights.lead(KEYS[:2], first.run)
    two = flights.lead(KEYS[2:3], second.run)
    joins, leads = flights.part(KEYS)
    assert joins == {KEYS[0]: one, KEYS[1]: one, KEYS[2]: two}
    assert leads == [KEYS[3]]
    assert len(flights) == 3

    (asking,) = await _start(flights, third, 1, KEYS)
    for work in (first, second, third):
        assert not asking.done()
        work.end.set_result(work)
        await settle()
    assert set(await asking) == {first, second, third}
    assert (len(flights), flights.landed) == (0, 3)


async def test_waiting_ends_when_all_fills_have_ended():
    """A fill that fails early does not end the wait for the others."""
    flights, bad, good = Flights(), Work(), Work()
    fills = [flights.lead([KEYS[0]], bad.run), flights.lead([KEYS[1]], good.run)]
    waiting = asyncio.create_task(flight.wait(fills))
    await settle()
    bad.end.set_exception(LookupError("early"))
    await settle()
    assert not waiting.done()
    good.end.set_result("late")
    await waiting
    assert [str(fills[0].task.exception()), fills[1].task.result()] == ["early", "late"]


@settings(deadline=None)
@given(
    joiners=st.integers(1, 5),
    turns=st.integers(0, 6),
    together=st.booleans(),
)
async def test_a_cancelled_leader_harms_no_joiner(joiners, turns, together):
    """Whenever the leader is cancelled, the joiners that are there get the one fill's result."""
    flights, work = Flights(), Work()
    leader = asyncio.create_task(_ask(flights, work))
    if not together:
        await settle()
    others = [asyncio.create_task(_ask(flights, work)) for _ in range(joiners)]
    for _ in range(turns):
        await asyncio.sleep(0)
    leader.cancel()
    await settle()
    assert leader.cancelled()
    work.end.set_result("bought")
    assert await asyncio.gather(*others) == [["bought"]] * joiners
    assert (work.runs, work.cancelled) == (1, False)


async def test_a_leader_cancelled_at_once_finds_its_joiner_waiting():
    """A joiner counts from the moment it asks, not from the loop's next turn."""
    flights, work = Flights(), Work()
    fill = flights.lead([KEY], work.run)
    leader, joiner = flight.wait([fill]), flight.wait([fill])
    # Both run to where they wait, within this turn, as they do inside a request.
    leader.send(None)
    joiner.send(None)
    with pytest.raises(asyncio.CancelledError):
        leader.throw(asyncio.CancelledError())
    assert not fill.abandoned
    joiner.close()
    assert fill.abandoned
    await settle()
    assert fill.task.cancelled()


async def test_the_last_to_leave_cancels_the_fill():
    """The fill goes on while anyone waits, and no longer."""
    flights, work = Flights(), Work()
    tasks = await _start(flights, work, 5)
    for task in tasks:
        assert not work.cancelled
        task.cancel()
        await settle()
    assert work.cancelled
    assert (len(flights), flights.landed) == (0, 1)


async def test_leaving_two_fills_cancels_only_the_one_nobody_else_waits_for():
    """A request that waits for its own fill and for another's takes only its own along."""
    flights, theirs, own = Flights(), Work(), Work()
    (other,) = await _start(flights, theirs, 1, KEYS[:1])
    (both,) = await _start(flights, own, 1, KEYS[:2])
    both.cancel()
    await settle()
    assert (theirs.cancelled, own.cancelled) == (False, True)
    theirs.end.set_result("theirs")
    assert await other == ["theirs"]


async def test_an_abandoned_fill_is_replaced_and_not_joined():
    """While a cancelled fill is still ending its key is led anew, and its end changes nothing."""
    flights, door, new = Flights(), Turnstile(), Work()
    door.shut()

    async def slow_to_end(_):
        try:
            await asyncio.Event().wait()
        finally:
            await door.through()

    old = flights.lead([KEY], slow_to_end)
    waiting = asyncio.create_task(flight.wait([old]))
    await settle()
    waiting.cancel()
    await settle()
    assert old.abandoned
    assert not old.task.done()
    assert flights.part([KEY]) == ({}, [KEY])

    (asking,) = await _start(flights, new, 1)
    door.open()
    await settle()
    assert old.task.cancelled()
    (joining,) = await _start(flights, new, 1)
    assert new.runs == 1
    new.end.set_result("new")
    assert await asyncio.gather(asking, joining) == [["new"], ["new"]]
    assert (len(flights), flights.landed) == (0, 2)


async def test_a_failure_reaches_all_who_wait():
    """Leader and joiners get the same error, and the key is free again."""
    flights, work = Flights(), Work()
    tasks = await _start(flights, work, 10)
    failure = LookupError("no luck")
    work.end.set_exception(failure)
    results = await asyncio.gather(*tasks, return_exceptions=True)
    assert all(result is failure for result in results)
    assert (len(results), len(flights), flights.landed) == (10, 0, 1)


@pytest.mark.parametrize("when", ["while being cancelled", "just before"])
async def test_a_failure_nobody_is_left_to_hear_of_is_no_news(when):
    """A fill that fails as its last waiter leaves is not reported as never looked at."""
    reports = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: reports.append(context))
    flights, end = Flights(), asyncio.get_running_loop().create_future()

    async def fails(_):
        try:
            await end
        finally:
            raise LookupError(when)

    fill = flights.lead([KEY], fails)
    waiting = asyncio.create_task(flight.wait([fill]))
    await settle()
    if when == "just before":
        # When the fill is done, and before the one who waits is told.
        fill.task.add_done_callback(lambda _, waiting=waiting: waiting.cancel())
        end.set_result(None)
    else:
        waiting.cancel()
    await settle()
    assert waiting.cancelled()
    assert fill.task.done()
    assert not fill.task.cancelled()
    assert (len(flights), flights.landed) == (0, 1)
    del fill, waiting
    gc.collect()
    await settle()
    assert reports == []


@pytest.mark.parametrize("terms", [Terms(write=False), Terms(max_age=0)], ids=str)
async def test_all_fills_are_ended_at_the_close(terms):
    """Also one that leaves no trace, and one whose place another has taken."""
    flights, works = Flights(), [Work(), Work()]
    fills = [flights.lead([KEY], works[0].run), flights.lead([KEY], works[1].run, terms=terms)]
    await settle()
    await flights.close()
    assert all(fill.task.done() for fill in fills)
    assert len(flights) == 0


@settings(deadline=None)
@given(st.lists(st.sampled_from(["ask", "leave first", "leave last", "turn"]), max_size=25))
async def test_any_coming_and_going_serves_all_who_stay(steps):
    """However requests come and go, who stays is served, and only fills nobody wants are ended."""
    flights, works, tasks, gone = Flights(), [], [], set()

    class Numbered(Work):
        async def run(self, fill):
            works.append(self)
            return await super().run(fill)

    for step in steps:
        staying = [task for task in tasks if task not in gone]
        if step == "ask":
            tasks.append(asyncio.create_task(_ask(flights, Numbered())))
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
        work.end.set_result(work)
    assert await asyncio.gather(*staying) == [going_on] * len(staying)
    await settle()
    assert len(flights) == 0
