"""Nodes that share a Redis: purges reach all of them, sums are told once, names are their own."""

import asyncio
import time
from contextlib import AsyncExitStack, asynccontextmanager, closing

import pytest
from embedding_proxy.cache.disk.connection import opened
from embedding_proxy.cache.disk.purge import PurgeFilter
from embedding_proxy.cache.disk.store import Store
from embedding_proxy.cache.key import Partition
from embedding_proxy.cache.ledger import By, LedgerKey, Usage, add_up
from embedding_proxy.cache.memory import Memory
from embedding_proxy.cache.shared import sweep
from embedding_proxy.cache.shared.client_budget import SharedSpending
from embedding_proxy.cache.shared.node_registry import NodeName, read_node_id
from embedding_proxy.cache.shared.purge_log import LoggedPurge, time_of_purge
from embedding_proxy.cache.shared.tier import SharedTier
from embedding_proxy.cache.shared.warmup import Copier, WarmUp
from embedding_proxy.cache.tiers import Tiers
from embedding_proxy.index.outbox import Outbox
from embedding_proxy.index.point import Point, Target, id_bytes
from embedding_proxy.providers.base import Space
from embedding_proxy.providers.charge import Decision
from embedding_proxy.proxy.service import membership as membership_module
from embedding_proxy.proxy.service.budgets import Budgets
from embedding_proxy.proxy.service.membership import Membership

from tests.cache.fakes import entries_in, entry_of, key_of
from tests.redis_server import needs_redis
from tests.shared_server import clients
from tests.test_redis_cluster import client as patient_client
from tests.test_redis_cluster import cluster

SPACE = Space("m", 4)
PARTITION = Partition("", SPACE.label, 4)
OTHERS = Partition("team", SPACE.label, 4)


class Node:
    """A node without HTTP: its tiers and its membership."""

    def __init__(self, folder, client, name="", identity=""):
        self.folder, self.client = folder, client
        self.store = Store(folder, 1 << 30)
        self.shared = SharedTier(client)
        self.tiers = Tiers(Memory(1 << 20), self.store, self.shared)
        self.budgets = Budgets(self.store)
        node = NodeName(identity or read_node_id(folder), name or folder.name)
        self.membership = Membership(client, self.store, self.budgets, node)
        self.tiers.is_purged = self.membership.is_purged
        self.tiers.is_purged_shared = self.membership.is_purged_shared

    async def put(self, *texts, partition=PARTITION):
        """Keep the entries of some texts."""
        entries = {key_of(text, SPACE): entry_of(text, SPACE) for text in texts}
        await self.tiers.put_many(entries, partition)
        await self.shared.flush()

    async def texts(self, *texts, partition=PARTITION):
        """Return which of some texts are still served."""
        keys = {key_of(text, SPACE): text for text in texts}
        return {keys[key] for key in await entries_in(self.tiers, list(keys), partition)}

    async def in_redis(self):
        """Return how many records the shared tier has."""
        found = [len(step.keys) async for step in sweep.scan(self.client)]
        return sum(found)

    async def on_disk(self):
        """Return how many entries the disk has."""
        file = self.store._disk.file
        return await self.store._disk.read(
            lambda: file.sql("SELECT count(*) FROM Cache").fetchone()[0]
        )

    async def settle(self):
        """Do what is to be done now, the deletion of what was purged included."""
        await self.membership.tick()
        if self.membership._applying is not None:
            await self.membership._applying
        await self.membership.tick()


@asynccontextmanager
async def running(node):
    """Run a node, whose ticks are the test's own."""
    async with node.store, node.membership:
        node.membership._ticking.cancel()
        await asyncio.wait([node.membership._ticking])
        node.membership._ticking = None
        yield node


@asynccontextmanager
async def three(tmp_path):
    """Give three nodes that run."""
    async with clients(3) as opened, AsyncExitStack() as stack:
        yield [
            await stack.enter_async_context(running(Node(tmp_path / f"n{i}", client)))
            for i, client in enumerate(opened)
        ]


def purge_of(choice, identity="p1", at=None):
    return LoggedPurge(identity, choice, time_of_purge(time.time()) if at is None else at)


@pytest.mark.parametrize(
    ("choice", "left"),
    [
        (PurgeFilter(), set()),
        (PurgeFilter(namespace=""), {"team"}),
        (PurgeFilter(namespace="team"), {"a", "b"}),
        (PurgeFilter(space="m"), set()),
        (PurgeFilter(space="n"), {"a", "b", "team"}),
        (PurgeFilter(address=key_of("a", SPACE).address), {"b", "team"}),
        (PurgeFilter(stored_before=1.0), {"a", "b", "team"}),
        (PurgeFilter(stored_before=1e12), set()),
        (PurgeFilter(namespace="", stored_before=1e12), {"team"}),
    ],
)
@needs_redis
async def test_a_purge_reaches_all_nodes(tmp_path, choice, left):
    """Memory and disk of every node drop what is chosen, and nothing else; each says so."""
    async with three(tmp_path) as nodes:
        for node in nodes:
            await node.put("a", "b")
            await node.put("team", partition=OTHERS)
        purge = purge_of(choice)
        assert await nodes[0].membership.exchange.add([purge])
        for node in nodes:
            await node.settle()
            found = await node.texts("a", "b") | await node.texts("team", partition=OTHERS)
            assert found == left
            assert await node.on_disk() == len(left)
        receipts = await nodes[0].membership.exchange.receipts("p1")
        assert {(one.name, one.deleted) for one in receipts} == {
            (f"n{i}", 3 - len(left)) for i in range(3)
        }


@needs_redis
async def test_what_was_bought_after_a_purge_stays(tmp_path):
    """A node that hears of a purge late keeps what it has bought since."""
    async with three(tmp_path) as (one, other, _):
        await other.put("old")
        purge = purge_of(PurgeFilter())
        assert await one.membership.exchange.add([purge])
        while time.time() < purge.at + 0.001:  # noqa: ASYNC110 - times are whole milliseconds
            await asyncio.sleep(0)
        await other.put("new")
        await other.settle()
        assert await other.texts("old", "new") == {"new"}


@needs_redis
async def test_points_that_wait_for_qdrant_are_purged_on_every_node(tmp_path):
    """What was purged is not sent from another node."""
    async with three(tmp_path) as (one, other, _):
        with closing(Outbox(other.folder, 1 << 30)) as outbox:
            points = [Point(id_bytes(n), bytes(16), b"{}", plain=True, new=True) for n in (0, 1)]
            target = Target("docs", "m", 4)
            outbox.add(target, points)
            await one.membership.exchange.add([purge_of(PurgeFilter(address=id_bytes(1)))])
            await other.settle()
            assert [each.id for each in outbox.batch(target, 1 << 30, 9)] == [id_bytes(0)]


@needs_redis
async def test_a_node_that_was_down_purges_when_it_starts(tmp_path):
    """What was missed holds before the first request, and is deleted then."""
    async with clients(2) as (mine, theirs):
        async with running(Node(tmp_path / "away", mine)) as node:
            await node.put("a")
        async with running(Node(tmp_path / "other", theirs)) as other:
            await other.membership.exchange.add([purge_of(PurgeFilter())])
        async with running(Node(tmp_path / "away", mine)) as node:
            assert await node.texts("a") == set()
            await node.settle()
            assert await node.on_disk() == 0


@needs_redis
async def test_a_start_waits_for_a_server_that_is_slow_for_a_moment(tmp_path):
    """What was purged is known before the first request, although the first exchange failed."""
    async with clients(2) as (mine, theirs):
        async with running(Node(tmp_path / "away", mine)) as node:
            await node.put("a")
        async with running(Node(tmp_path / "other", theirs)) as other:
            await other.membership.exchange.add([purge_of(PurgeFilter())])
        mine.fails = 3
        async with running(Node(tmp_path / "away", mine)) as node:
            assert mine.fails == 0
            assert await node.texts("a") == set()


@needs_redis
async def test_a_purge_that_was_made_without_the_server_is_told_later(tmp_path):
    """It waits in the purge log of its node, and reaches the others when the server is back."""
    async with three(tmp_path) as (one, other, _):
        await other.put("a")
        one.client.is_off = True
        one.membership.log.change(lambda record: record.add([purge_of(PurgeFilter())]))
        await one.settle()
        await other.settle()
        assert await other.texts("a") == {"a"}
        one.client.is_off = False
        await one.settle()
        await other.settle()
        assert await other.texts("a") == set()


@needs_redis
async def test_purges_outlive_an_emptied_server(tmp_path):
    """A node that is down while the server loses its memory hears of a purge from the others."""
    async with clients(2) as (mine, theirs):
        async with running(Node(tmp_path / "away", mine)) as node:
            await node.put("a")
        async with running(Node(tmp_path / "other", theirs)) as other:
            await other.membership.exchange.add([purge_of(PurgeFilter())])
            await other.settle()
            await theirs.command("FLUSHALL")
            await other.settle()
        async with running(Node(tmp_path / "away", mine)) as node:
            assert await node.texts("a") == set()


@needs_redis
async def test_a_purged_record_that_is_written_again_is_not_served(tmp_path):
    """Whoever brings it back, and wherever it was: it was stored before the purge."""
    async with three(tmp_path) as (one, _, __):
        await one.put("a")
        records = await one.store.lookup([key_of("a", SPACE).address])
        stored = next(iter(records.values()))
        await one.membership.exchange.add([purge_of(PurgeFilter(), at=stored.stored + 1)])
        await one.settle()
        # A late writer: the record is on disk again, with the time when it was bought.
        await one.store.put_many({key_of("a", SPACE).address: stored.record}, PARTITION)
        assert await one.on_disk() == 1
        assert await one.texts("a") == set()


@needs_redis
async def test_an_interrupted_deletion_goes_on(tmp_path):
    """A kill between learning of a purge and deleting leaves it to the next start."""
    async with clients(1) as (client,):
        async with running(Node(tmp_path / "n", client)) as node:
            await node.put("a")
            node.membership.log.change(lambda record: record.add([purge_of(PurgeFilter())]))
            assert await node.on_disk() == 1
        async with running(Node(tmp_path / "n", client)) as node:
            assert await node.texts("a") == set()
            await node.settle()
            assert await node.on_disk() == 0


@needs_redis
async def test_another_process_of_the_node_drops_its_memory(tmp_path):
    """Two workers share the folder; the one that is no keeper hears of it by the signal."""
    async with (
        clients(2) as (mine, theirs),
        running(Node(tmp_path / "n", mine)) as keeper,
        running(Node(tmp_path / "n", theirs)) as worker,
    ):
        assert (keeper.membership.is_keeper, worker.membership.is_keeper) == (True, False)
        await worker.put("a")
        assert await worker.texts("a") == {"a"}
        await keeper.membership.exchange.add([purge_of(PurgeFilter())])
        await keeper.membership.tick()
        assert await worker.texts("a") == set()
        await keeper.settle()


@needs_redis
async def test_another_process_takes_over_when_the_keeper_ends(tmp_path):
    """A node beats as long as one of its processes runs."""
    async with clients(2) as (mine, theirs):
        async with (
            running(Node(tmp_path / "n", mine)),
            running(Node(tmp_path / "n", theirs)) as worker,
        ):
            assert not worker.membership.is_keeper
        async with running(Node(tmp_path / "n", theirs)) as worker:
            assert worker.membership.is_keeper


# Sums


async def _count(node, client, hits):
    node.store.count(LedgerKey(PARTITION, "m", "", client), Usage(hits=hits))
    await node.store.flush_counts()


async def _all_sums(node, by=(By.CLIENT,)):
    return {names[0]: usage.hits for names, usage in add_up(await node.membership.nodes(), by)}


@needs_redis
async def test_sums_of_all_nodes_add_up_however_often_they_are_told(tmp_path):
    """Each node tells its whole ledger; told twice, late or after a loss, it counts once."""
    async with three(tmp_path) as nodes:
        for number, node in enumerate(nodes, start=1):
            await _count(node, "ci", number)
            await _count(node, f"only-{number}", 10)
            for _ in range(2):
                await node.membership._tell_sums()
        expected = {"ci": 6, "only-1": 10, "only-2": 10, "only-3": 10}
        assert await _all_sums(nodes[0]) == expected
        assert sum((await _all_sums(nodes[1], [By.DAY])).values()) == 36
        await nodes[0].client.command("FLUSHALL")
        for node in nodes:
            node.membership._sums_at = float("-inf")
            await node.settle()
        assert await _all_sums(nodes[2]) == expected


@needs_redis
async def test_sums_that_the_server_has_evicted_are_told_again(tmp_path):
    """Although they are the same."""
    async with three(tmp_path) as (one, other, _):
        await _count(one, "ci", 1)
        await one.membership._tell_sums()
        await other.client.command("DEL", other.client.key("ledger"))
        assert await _all_sums(other) == {}
        await one.membership._tell_sums()
        assert await _all_sums(other) == {"ci": 1}


@needs_redis
async def test_sums_that_the_server_has_lost_a_part_of_are_told_again(tmp_path):
    """It came back with older data, and they are the same."""
    async with three(tmp_path) as (one, other, _):
        redis, key = other.client, other.client.key("ledger")
        await _count(one, "ci", 1)
        await one.membership._tell_sums()
        older = await redis.command("DUMP", key)
        await _count(one, "ci", 1)
        await one.membership._tell_sums()
        await one.membership.exchange.add([purge_of(PurgeFilter(namespace="x"))])
        await one.settle()
        await redis.command("RESTORE", key, 0, older, "REPLACE")
        await redis.command("HSET", redis.key("purges"), "number", 0)
        await one.settle()
        assert await _all_sums(other) == {"ci": 2}


@needs_redis
async def test_sums_that_arrive_late_change_nothing(tmp_path):
    """A stopped server may carry out old commands after new ones."""
    async with three(tmp_path) as (one, other, _):
        commands = []
        exchange = one.client.exchange

        async def noted(some, limit_s=None):
            commands.append(some)
            return await exchange(some, limit_s)

        one.client.exchange = noted
        await _count(one, "ci", 1)
        await one.membership._tell_sums()
        early = list(commands)
        await _count(one, "ci", 1)
        await one.membership._tell_sums()
        for some in early:
            await exchange(some)
        assert await _all_sums(other) == {"ci": 2}
        await _count(one, "ci", 1)
        for _ in range(2):
            await one.membership._tell_sums()
        assert await _all_sums(other) == {"ci": 3}


@needs_redis
async def test_a_server_that_is_away_costs_nothing_and_is_caught_up(tmp_path):
    """Ticks do not raise, nothing is lost, and what was counted meanwhile is told once."""
    async with three(tmp_path) as (one, other, _):
        one.client.is_off = True
        await _count(one, "ci", 5)
        for _ in range(3):
            await one.settle()
        assert await one.membership.nodes() is None
        one.client.is_off = False
        one.membership._sums_at = float("-inf")
        await one.settle()
        assert await _all_sums(other) == {"ci": 5}


# Names


@needs_redis
async def test_two_nodes_of_one_name_are_noticed(tmp_path, caplog):
    """Both say so, once; a node that was restarted, in its folder or in a new one, is no other."""
    async with clients(3) as opened:
        async with running(Node(tmp_path / "a", opened[0], "web")) as one:
            await one.settle()
            assert one.membership.conflict == ""
        async with running(Node(tmp_path / "b", opened[1], "web")) as one:
            for _ in range(2):
                await one.settle()
            assert one.membership.conflict == ""
            async with running(Node(tmp_path / "c", opened[2], "web")) as other:
                for _ in range(2):
                    await one.settle()
                    await other.settle()
                assert (one.membership.conflict, other.membership.conflict) == ("name", "name")
                assert one.membership.alive == 2
        told = [line for line in caplog.messages if "the name 'web'" in line]
        assert len(told) == 2


@needs_redis
async def test_a_copied_folder_is_noticed(tmp_path):
    """Two nodes of one id would tell their sums in one place."""
    async with (
        clients(2) as (mine, theirs),
        running(Node(tmp_path / "a", mine, identity="same")) as one,
        running(Node(tmp_path / "b", theirs, identity="same")) as other,
    ):
        for _ in range(2):
            await one.settle()
            await other.settle()
        assert (one.membership.conflict, other.membership.conflict) == ("id", "id")


@needs_redis
async def test_all_of_it_works_with_a_cluster(tmp_path):
    """Keys lie on several servers: purges, sums, limits, budgets and warm-up need none together."""
    with cluster() as servers:
        url = f"redis+cluster://127.0.0.1:{servers[0].port}"
        async with (
            patient_client(url) as mine,
            patient_client(url) as theirs,
            running(Node(tmp_path / "a", mine)) as one,
            running(Node(tmp_path / "b", theirs)) as other,
        ):
            texts = [f"text {number}" for number in range(100)]
            await one.put(*texts, "team")
            await one.put("team", partition=OTHERS)
            assert await other.texts(*texts) == set(texts)
            assert await one.in_redis() == 101
            await _count(one, "ci", 3)
            for node in (one, other):
                await node.membership._tell_sums()
            assert await _all_sums(other) == {"ci": 3}
            with opened(tmp_path / "c", 1 << 30, create=True) as file:
                copier = Copier(mine, file, max_bytes_a_s=1e9)
                *_, state = [now async for now in copier.run(WarmUp())]
            assert (state.copied, state.is_done, len(state.cursors)) == (101, True, 3)
            allowance = one.membership.allowance("p", {"requests": 1.0})
            no = {"requests": 0.0, "tokens": 0.0}
            cost = {"requests": 1, "tokens": 1}
            got = [(await allowance.reserve(cost, 0.0, no, no)).is_reserved for _ in range(2)]
            assert got == [True, False]
            spending = SharedSpending(mine, one.membership.node.id)
            limits = {"here": 5, "limit": 10, "amount": 5, "purchase": "x"}
            answer = await spending.reserve("ci", 0, **limits)
            assert answer.decision is Decision.RESERVED
            await one.membership.exchange.add([purge_of(PurgeFilter(namespace=""))])
            for node in (one, other):
                await node.settle()
                assert await node.texts(*texts) == set()
            assert await one.in_redis() == 1
            assert await one.texts("team", partition=OTHERS) == {"team"}


def test_the_id_of_a_node_is_that_of_its_folder(tmp_path):
    """It is made once, also by several at a time, and a damaged one is made anew."""
    first = read_node_id(tmp_path / "new")
    assert first == read_node_id(tmp_path / "new")
    (tmp_path / "new" / "node-id").write_bytes(b"\xff")
    assert read_node_id(tmp_path / "new").isalnum()


@needs_redis
async def test_a_clock_that_is_wrong_is_told(tmp_path, caplog, monkeypatch):
    """Ages and purges go by the clocks of the nodes."""
    async with clients(1) as (client,), running(Node(tmp_path / "n", client)) as node:
        node.membership.registry._clock = lambda: time.time() + 90
        await node.settle()
        assert "90" in caplog.text
        assert "ahead of" in caplog.text
        nodes = await node.membership.registry.read()
        assert 80 < nodes.ahead_s(nodes.nodes[0]) < 100
        monkeypatch.setattr(membership_module, "MAX_AHEAD_S", 1.0)
