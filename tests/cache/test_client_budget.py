"""Budgets of clients over several nodes: never passed together, and told again after each loss."""

import asyncio
import itertools
import time
from contextlib import AsyncExitStack, asynccontextmanager

import pytest
from embedding_proxy.cache.disk.store import Store
from embedding_proxy.cache.errors import BudgetExceeded
from embedding_proxy.cache.key import Partition
from embedding_proxy.cache.ledger import LedgerKey, Usage
from embedding_proxy.cache.shared.client_budget import SharedSpending
from embedding_proxy.providers.charge import Bill, Decision, SpendingAnswer, SpendingLimit
from embedding_proxy.proxy.service.budgets import Budgets

from tests.redis_server import needs_redis
from tests.shared_server import clients

PARTITION = Partition("", "m", 4)
LIMIT = SpendingLimit(100, "ever")
NOON = 45.5 * 86_400
"""On 15 February 1970."""


class Node:
    """A node's ledger on disk and its budgets."""

    def __init__(self, store, budgets):
        self.store, self.budgets, self.limit = store, budgets, LIMIT
        self.inside = asyncio.Event()
        """Whether a purchase was begun."""

    def charge(self, cost):
        """Count a charge in the ledger."""
        usage = Usage(misses=1, nanodollars_billed=cost)
        self.store.count(LedgerKey(PARTITION, "m", "p", "ci"), usage)

    async def buy(self, cost, *, amount=None, held=None):
        """Buy for the client, if the budget lets it; return whether it did."""
        try:
            async with self.budgets.purchase("ci", self.limit, amount or cost) as note:
                self.inside.set()
                if held is not None:
                    await held.wait()
                self.charge(cost)
                note(Bill("p", [0], [1], [cost]))
        except BudgetExceeded:
            return False
        return True


async def _until(is_so):
    while not is_so():  # noqa: ASYNC110 - counters of a test
        await asyncio.sleep(0)


@asynccontextmanager
async def _nodes(tmp_path, spendings, clock=time.time):
    """Give nodes, each with a store of its own."""
    async with AsyncExitStack() as stack:
        nodes = []
        for number, spending in enumerate(spendings):
            store = await stack.enter_async_context(Store(tmp_path / str(number), 1 << 30))
            budgets = Budgets(store, clock=clock)
            budgets.share(spending, lambda: len(spendings))
            stack.push_async_callback(budgets.aclose)
            nodes.append(Node(store, budgets))
        yield nodes


@needs_redis
async def test_three_nodes_together_spend_a_budget_and_no_more(tmp_path):
    """However many purchases come to three nodes at once, all of the budget is spent, not more."""
    async with clients(3) as servers:
        spendings = [SharedSpending(client, str(i)) for i, client in enumerate(servers)]
        async with _nodes(tmp_path, spendings) as nodes:
            done = await asyncio.gather(*(node.buy(10) for _ in range(6) for node in nodes))
            assert sum(done) == 10
            for node in nodes:
                await node.budgets.aclose()
            assert [await node.budgets.billed("ci", LIMIT) for node in nodes] == [100] * 3


@needs_redis
async def test_a_purchase_waits_for_that_of_another_node(tmp_path):
    """What may not fit beside a purchase of another node begins when that has ended."""
    async with clients(2) as servers:
        spendings = [SharedSpending(client, str(i)) for i, client in enumerate(servers)]
        async with _nodes(tmp_path, spendings) as (one, other):
            held = asyncio.Event()
            first = asyncio.create_task(one.buy(5, amount=80, held=held))
            await one.inside.wait()
            second = asyncio.create_task(other.buy(5, amount=30))
            await _until(lambda: servers[1].exchanges >= 3)
            assert not second.done()
            held.set()
            assert await first
            assert await second


@needs_redis
async def test_an_emptied_server_is_told_again(tmp_path):
    """Sums of the ledgers are told anew, so a budget that is spent stays spent on every node."""
    async with clients(2) as servers:
        spendings = [SharedSpending(client, str(i)) for i, client in enumerate(servers)]
        async with _nodes(tmp_path, spendings) as (one, other):
            assert await one.buy(100)
            await one.budgets.aclose()
            await servers[0].command("FLUSHALL")
            await one.budgets.publish(is_complete=True)
            assert not await other.buy(1)


@needs_redis
async def test_what_was_billed_without_the_server_is_told_later_and_once(tmp_path):
    """A node that was cut off tells the sum of its ledger; told twice, it is the same sum."""
    async with clients(2) as servers:
        spendings = [SharedSpending(client, str(i)) for i, client in enumerate(servers)]
        async with _nodes(tmp_path, spendings) as (one, other):
            servers[0].is_off = True
            assert await one.buy(40)
            await one.budgets.aclose()
            assert await other.budgets.billed("ci", LIMIT) == 0
            servers[0].is_off = False
            for _ in range(2):
                await one.budgets.publish()
                await one.budgets.publish(is_complete=True)
                assert await other.budgets.billed("ci", LIMIT) == 40


@needs_redis
async def test_a_reservation_of_a_killed_node_lapses():
    """A purchase that nobody renews holds up others for no longer than its lease."""
    async with clients(1) as (server,):
        spending = SharedSpending(server, "killed")
        terms = {"here": 0, "limit": 100, "amount": 60}
        first = await spending.reserve("ci", 0, **terms, purchase="a")
        assert first == SpendingAnswer(Decision.RESERVED, 0)
        again = await spending.reserve("ci", 0, **terms, purchase="b")
        assert again.decision is Decision.WAIT
        key = server.key("budget", b"0:ci")
        # As if the lease was over.
        await server.command("HSET", key, "r:a", "60 1")
        late = await spending.reserve("ci", 0, **terms, purchase="b")
        assert late.decision is Decision.RESERVED


async def test_without_the_server_each_node_buys_within_its_share(tmp_path):
    """Nobody is refused for want of the server; purchases at once keep to the node's share."""
    spending = _Answers(None)
    async with _nodes(tmp_path, [spending, spending]) as (one, _):
        held = asyncio.Event()
        tasks = [asyncio.create_task(one.buy(1, amount=30, held=held))]
        await one.inside.wait()
        # Of 100 each node has 50.
        tasks.append(asyncio.create_task(one.buy(1, amount=30, held=held)))
        await _until(lambda: len(spending.calls) >= 3)
        assert one.budgets._client("ci").purchases == 1
        tasks.append(asyncio.create_task(one.buy(1, amount=20, held=held)))
        held.set()
        assert await asyncio.gather(*tasks) == [True] * 3


class _Answers:
    """Gives out answers, one a call, the last one for ever."""

    def __init__(self, *answers):
        self.answers = itertools.chain(answers, itertools.repeat(answers[-1]))
        self.calls = []
        self.heard = None
        """The answer to a node that tells what it has billed."""
        self.settled = []
        """The sum and the number of ended purchases of each call."""

    async def reserve(self, *_, **terms):
        self.calls.append(terms)
        return next(self.answers)

    async def renew(self, *_, **__):
        return None

    async def settle(self, *_, here, ended=()):
        self.settled.append((here, len(list(ended))))
        return self.heard


async def test_without_the_server_nodes_do_not_pass_a_budget_together(tmp_path):
    """Each spends its part of what was left when the server answered last, then no more."""
    spending = _Answers(SpendingAnswer(Decision.RESERVED, 20), None)
    async with _nodes(tmp_path, [spending, spending, spending]) as (one, *_):
        assert await one.buy(20)
        # Of the 80 that were left, a third is this node's; 20 of it are spent.
        assert [await one.buy(10) for _ in range(3)] == [True, False, False]


async def test_what_others_had_billed_counts_after_the_server_is_gone(tmp_path):
    """A budget that other nodes have spent does not begin anew when the server dies."""
    spending = _Answers(SpendingAnswer(Decision.RESERVED, 70), None)
    async with _nodes(tmp_path, [spending]) as (node,):
        assert await node.buy(20)
        assert await node.buy(10)
        assert not await node.buy(1)


@pytest.mark.parametrize("waits", [1, 3])
async def test_a_purchase_asks_again_until_there_is_room(tmp_path, waits):
    """Nobody in this process says when another node's purchase has ended."""
    wait, done = (SpendingAnswer(decision, 0) for decision in (Decision.WAIT, Decision.RESERVED))
    spending = _Answers(*[wait] * waits, done)
    async with _nodes(tmp_path, [spending]) as (node,):
        assert await node.buy(10)
    assert len(spending.calls) == waits + 1
    assert len({call["purchase"] for call in spending.calls}) == 1


async def test_readings_at_the_same_time_count_a_charge_once(tmp_path, monkeypatch):
    """What was charged is still known when the ledger fails after several readings at once."""
    async with _nodes(tmp_path, [_Answers(None)]) as (node,):
        assert await node.buy(40)
        await asyncio.gather(*(node.budgets.billed("ci", LIMIT) for _ in range(5)))
        await _break_ledger(node, monkeypatch)
        assert await node.budgets.billed("ci", LIMIT) == 40


async def test_readings_at_the_same_time_are_one(tmp_path, monkeypatch):
    """Those that come while one is under way share the next; each sees what was there before it."""
    async with _nodes(tmp_path, [_Answers(None)]) as (node,):
        readings = 0
        read = node.store.ledger

        async def ledger(*arguments, **terms):
            nonlocal readings
            readings += 1
            return await read(*arguments, **terms)

        monkeypatch.setattr(node.store, "ledger", ledger)
        first = asyncio.create_task(node.budgets.billed("ci", LIMIT))
        await _until(lambda: readings)
        node.charge(40)
        later = await asyncio.gather(*(node.budgets.billed("ci", LIMIT) for _ in range(5)))
        await first
        assert (later, readings) == ([40] * 5, 2)


@needs_redis
async def test_other_nodes_are_told_only_what_is_certain(tmp_path, monkeypatch):
    """A charge that may be in the sum of the ledger, or not, is held against this node alone."""
    async with clients(2) as servers:
        spendings = [SharedSpending(client, str(i)) for i, client in enumerate(servers)]
        async with _nodes(tmp_path, spendings) as (one, other):
            flush = one.store.flush_counts
            async with one.budgets.purchase("ci", LIMIT, 40) as note:

                async def charge_before():
                    one.charge(40)
                    note(Bill("p", [0], [1], [40]))
                    return await flush()

                monkeypatch.setattr(one.store, "flush_counts", charge_before)
                assert await one.budgets.billed("ci", LIMIT) == 40
                await _break_ledger(one, monkeypatch)
                assert await one.budgets.billed("ci", LIMIT) >= 40
                assert await other.budgets.billed("ci", LIMIT) == 40
            await one.budgets.aclose()
            monkeypatch.setattr(one.store, "flush_counts", flush)
            assert await one.budgets.billed("ci", LIMIT) == 40


async def _break_ledger(node, monkeypatch):
    async def fail():
        return False

    await node.budgets.aclose()
    monkeypatch.setattr(node.store, "flush_counts", fail)


@needs_redis
@pytest.mark.parametrize("cost", [10, 0])
@pytest.mark.parametrize("period", ["day", "month", "ever"])
async def test_the_end_of_a_purchase_is_told_later(tmp_path, period, cost):
    """A node that was cut off gives its reservation back in whichever period that is."""
    async with clients(2) as servers:
        spendings = [SharedSpending(client, str(i)) for i, client in enumerate(servers)]
        async with _nodes(tmp_path, spendings, lambda: NOON) as (one, other):
            for node in (one, other):
                node.limit = SpendingLimit(100, period)
            held = asyncio.Event()
            first = asyncio.create_task(one.buy(cost, amount=90, held=held))
            await one.inside.wait()
            await one.budgets.publish()
            servers[0].is_off = True
            held.set()
            assert await first
            await one.budgets.aclose()
            servers[0].is_off = False
            await one.budgets.publish()
            key = servers[0].key("budget", f"{one.limit.first_day(NOON)}:ci".encode())
            fields = await servers[0].command("HKEYS", key)
            assert [field for field in fields if field.startswith(b"r:")] == []
            assert await other.buy(50)


@pytest.mark.parametrize("is_published", [False, True])
async def test_a_reservation_stays_until_its_charge_is_told(tmp_path, monkeypatch, is_published):
    """A purchase that ends while the ledger is read is not in the sum, and keeps its room."""
    spending = _Answers(SpendingAnswer(Decision.RESERVED, 0))
    spending.heard = SpendingAnswer(Decision.RESERVED, 0)
    async with _nodes(tmp_path, [spending]) as (node,):
        held = asyncio.Event()
        purchase = asyncio.create_task(node.buy(50, held=held))
        await node.inside.wait()
        node.charge(10)
        assert await node.store.flush_counts()
        read = node.store.ledger

        async def end_meanwhile(*arguments, **terms):
            lines = await read(*arguments, **terms)
            if terms["lines"].first_day == 0 and not held.is_set():
                held.set()
                assert await purchase
            return lines

        monkeypatch.setattr(node.store, "ledger", end_meanwhile)
        if is_published:
            await node.budgets.publish()
        else:
            await node.budgets.billed("ci", LIMIT)
        await node.budgets.aclose()
        assert sorted(set(spending.settled)) == [(10, 0), (60, 1)]
