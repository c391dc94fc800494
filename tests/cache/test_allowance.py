"""One allowance of a provider for all nodes: never passed together, and nobody waits without it."""

import asyncio
import contextlib
import itertools

import pytest
from embedding_proxy.cache.shared.allowance import Allowance
from embedding_proxy.providers.allowance import Reservation
from embedding_proxy.providers.errors import LocalQueueFull
from embedding_proxy.providers.upstream.rate_limiter import RateLimiter

from tests.redis_server import needs_redis
from tests.shared_server import clients

LIMITS = {"requests": 6.0, "tokens": 600.0}
NO = {"requests": 0.0, "tokens": 0.0}
ONE = {"requests": 1, "tokens": 10}


async def _now(client):
    seconds, micro = await client.command("TIME")
    return int(seconds) + int(micro) / 1e6


@needs_redis
async def test_three_nodes_together_do_not_pass_a_limit():
    """However the calls of three nodes are mixed, the bucket of one is all that they get."""
    async with clients(3) as nodes:
        allowances = [Allowance(node, "p", LIMITS) for node in nodes]
        began = await _now(nodes[0])
        replies = await asyncio.gather(
            *(one.reserve(ONE, 0.0, NO, NO) for _ in range(10) for one in allowances)
        )
        minutes = (await _now(nodes[0]) - began) / 60
        reserved = sum(reply.is_reserved for reply in replies)
        assert 6 <= reserved <= 6 + 6 * minutes


@needs_redis
async def test_the_scarcer_limit_decides():
    """Tokens are counted beside requests; one call larger than the whole limit may overdraw it."""
    async with clients(2) as (one, other):
        mine, theirs = (Allowance(client, "p", LIMITS) for client in (one, other))
        large = {"requests": 1, "tokens": 900}
        assert await mine.reserve(large, 0.0, NO, NO) == Reservation(0.0, is_reserved=True)
        refused = await theirs.reserve(ONE, 0.0, NO, NO)
        # 300 tokens beyond the limit and 10 more, at 10 a second.
        assert not refused.is_reserved
        assert 25 < refused.wait_s <= 31


@needs_redis
async def test_calls_that_wait_are_in_one_queue():
    """What waits reserves its room: each later call, of whichever node, waits for its own."""
    async with clients(2) as nodes:
        allowances = [Allowance(node, "p", {"requests": 1.0}) for node in nodes]
        waits = [
            (await allowances[number % 2].reserve(ONE, 1e9, NO, NO)).wait_s for number in range(5)
        ]
        assert waits[0] == 0
        assert all(later - earlier > 50 for earlier, later in itertools.pairwise(waits))


@needs_redis
async def test_what_is_given_back_is_had_by_another_node():
    """A call that was not made costs nobody anything."""
    async with clients(2) as nodes:
        mine, theirs = (Allowance(node, "p", {"requests": 1.0}) for node in nodes)
        await mine.reserve(ONE, 0.0, NO, NO)
        mine.give_back(ONE)
        assert not (await theirs.reserve(ONE, 0.0, NO, NO)).is_reserved
        assert (await mine.reserve(ONE, 0.0, NO, NO)).is_reserved


@needs_redis
async def test_an_emptied_server_is_told_what_was_taken():
    """A bucket that is lost does not begin full: each process tells once what it has taken."""
    async with clients(2) as nodes:
        mine, theirs = (Allowance(node, "p", LIMITS) for node in nodes)
        for one in (mine, theirs):
            await one.reserve(ONE, 0.0, NO, NO)
        await nodes[0].command("FLUSHALL")
        taken = {"requests": 3.0, "tokens": 30.0}
        began = await _now(nodes[0])
        replies = [
            await one.reserve(ONE, 0.0, taken, NO) for _ in range(6) for one in (mine, theirs)
        ]
        minutes = (await _now(nodes[0]) - began) / 60
        # The first tells of three, and has one; then the other tells of three, and all is used up.
        assert 1 <= sum(reply.is_reserved for reply in replies) <= 1 + 6 * minutes


@needs_redis
async def test_calls_at_the_same_time_tell_an_emptied_server_once():
    """What a process has taken is subtracted once, however many of its calls come first."""
    async with clients(1) as (node,):
        allowance = Allowance(node, "p", LIMITS)
        await allowance.reserve(ONE, 0.0, NO, NO)
        await node.command("FLUSHALL")
        began = await _now(node)
        taken = {"requests": 3.0, "tokens": 30.0}
        replies = await asyncio.gather(*(allowance.reserve(ONE, 0.0, taken, NO) for _ in range(10)))
        minutes = (await _now(node) - began) / 60
        assert 3 <= sum(reply.is_reserved for reply in replies) <= 3 + 6 * minutes


async def test_calls_at_the_same_time_tell_once_what_was_taken_without_the_server():
    """The others have nothing to tell."""
    clock = _Clock()
    reserved = Reservation(0.0, is_reserved=True)
    allowance = _Scripted(None, reserved, reserved, reserved)
    limiter = _limiter(allowance, clock)
    await limiter.acquire(10, None)
    await asyncio.gather(*(limiter.acquire(10, None) for _ in range(3)))
    assert sorted(untold["requests"] for _, untold in allowance.told[1:]) == [0.0, 0.0, 1.0]


class _Scripted:
    """An allowance whose answers are given."""

    nodes = 2

    def __init__(self, *answers):
        self.answers = list(answers)
        self.told = []
        self.returned = []

    async def reserve(self, cost, max_wait_s, deficits, untold):
        self.told.append((dict(deficits), dict(untold)))
        await asyncio.sleep(0)
        return self.answers.pop(0)

    def give_back(self, cost):
        self.returned.append(dict(cost))


class _Clock:
    def __init__(self):
        self.now = 1000.0
        self.slept = []

    def __call__(self):
        return self.now

    async def sleep(self, seconds):
        self.slept.append(seconds)
        self.now += seconds


def _limiter(allowance, clock, requests=4.0):
    return RateLimiter(
        "p", requests_per_minute=requests, shared=allowance, clock=clock, sleep=clock.sleep
    )


async def test_a_call_waits_as_long_as_all_nodes_must():
    """The wait that the shared allowance names is waited; a place too late is refused with it."""
    clock = _Clock()
    allowance = _Scripted(Reservation(7.0, is_reserved=True), Reservation(9.0, is_reserved=False))
    limiter = _limiter(allowance, clock)
    await limiter.acquire(10, clock.now + 8)
    assert clock.slept == [7.0]
    with pytest.raises(LocalQueueFull) as refused:
        await limiter.acquire(10, clock.now + 8)
    assert "9.0 s" in str(refused.value)
    limiter.release(10, is_unused=True)
    assert allowance.returned == [{"requests": 1, "tokens": 10}]


async def test_a_call_that_is_cancelled_while_it_waits_gives_its_room_back():
    """Nobody waits behind a call that will not be made."""
    clock = _Clock()
    allowance = _Scripted(Reservation(7.0, is_reserved=True))
    limiter = _limiter(allowance, clock)

    async def cancel(_):
        raise asyncio.CancelledError

    limiter._sleep = cancel
    with pytest.raises(asyncio.CancelledError):
        await limiter.acquire(10, None)
    assert allowance.returned == [{"requests": 1, "tokens": 10}]


async def _cancel_in_the_exchange(limiter, allowance):
    """Cancel a call when the allowance was asked and has not answered; let it answer then."""
    told = len(allowance.told)
    call = asyncio.create_task(limiter.acquire(10, None))
    while len(allowance.told) == told:  # noqa: ASYNC110 - counters of a test
        await asyncio.sleep(0)
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call
    for _ in range(10):
        await asyncio.sleep(0)


async def test_a_call_that_is_cancelled_in_the_exchange_gives_its_room_back():
    """Nobody waits for room that was reserved when the call was gone."""
    allowance = _Scripted(Reservation(0.0, is_reserved=True))
    await _cancel_in_the_exchange(_limiter(allowance, _Clock()), allowance)
    assert allowance.returned == [{"requests": 1, "tokens": 10}]


@pytest.mark.parametrize("answer", [None, Reservation(9.0, is_reserved=False)])
async def test_a_call_that_is_cancelled_in_the_exchange_returns_no_room_that_it_has_not(answer):
    """What was not reserved is not given back, and what was not told is told with the next call."""
    clock = _Clock()
    reserved = Reservation(0.0, is_reserved=True)
    allowance = _Scripted(None, answer, reserved, reserved)
    limiter = _limiter(allowance, clock)
    await limiter.acquire(10, None)
    await _cancel_in_the_exchange(limiter, allowance)
    await limiter.acquire(10, None)
    assert allowance.returned == []
    untold = [told["requests"] for _, told in allowance.told]
    assert untold == [0.0, 1.0, 1.0 if answer is None else 0.0]


@needs_redis
async def test_what_a_cancelled_call_took_is_had_by_the_next_one():
    """On a real server: with room for one call, one that is cancelled at once takes none."""
    async with clients(1) as (node,):
        allowance = Allowance(node, "p", {"requests": 1.0})
        limiter = RateLimiter("p", requests_per_minute=1.0, shared=allowance)
        cancelled = asyncio.create_task(limiter.acquire(10, None))
        while not node.exchanges:  # noqa: ASYNC110 - counters of a test
            await asyncio.sleep(0)
        cancelled.cancel()
        with pytest.raises(asyncio.CancelledError):
            await cancelled
        # Each refusal takes an exchange; during these the first one comes to its end.
        deadline = asyncio.get_running_loop().time()
        for _ in range(100):
            with contextlib.suppress(LocalQueueFull):
                await limiter.acquire(10, deadline)
                return
        pytest.fail("the room is lost")


async def test_each_node_keeps_to_its_share_while_nobody_can_be_asked():
    """Two nodes without the server make no more calls than the limit together, and tell."""
    clock = _Clock()
    allowance = _Scripted(None, None, None, Reservation(0.0, is_reserved=True))
    limiter = _limiter(allowance, clock)
    for _ in range(2):
        await limiter.acquire(10, clock.now + 1)
    with pytest.raises(LocalQueueFull):
        await limiter.acquire(10, clock.now + 1)
    await limiter.acquire(10, clock.now + 1)
    assert allowance.told[-1] == ({"requests": 2.0}, {"requests": 2.0})


async def test_what_was_told_is_not_told_again():
    """After the server is back, only what was taken without it is told, and once."""
    clock = _Clock()
    reserved = Reservation(0.0, is_reserved=True)
    allowance = _Scripted(reserved, None, reserved, reserved)
    limiter = _limiter(allowance, clock)
    for _ in range(4):
        await limiter.acquire(10, clock.now + 1)
    untold = [told["requests"] for _, told in allowance.told]
    assert untold == [0.0, 0.0, 1.0, 0.0]


async def test_what_a_node_took_beyond_its_share_is_no_debt_when_it_is_alone():
    """A server that dies costs no wait that was not there: the share begins at zero, not below."""
    clock = _Clock()
    reserved = Reservation(0.0, is_reserved=True)
    allowance = _Scripted(*[reserved] * 4, None)
    limiter = _limiter(allowance, clock)
    for _ in range(4):
        await limiter.acquire(10, None)
    await limiter.acquire(10, None)
    # One request at two a minute; with the debt it would be 90 s.
    assert clock.slept == [30.0]
