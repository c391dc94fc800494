"""Purges among nodes when something fails: sweeps that end early, servers and nodes that forget."""

import time

import pytest
from embedding_proxy.cache.disk.purge import PurgeFilter
from embedding_proxy.cache.shared import purge_exchange, purge_log, sweep
from embedding_proxy.cache.shared.address import parse
from embedding_proxy.cache.shared.client import RedisClient, RedisOptions
from embedding_proxy.cache.shared.tier import SharedTier
from embedding_proxy.proxy.config.schema import Cache
from embedding_proxy.proxy.service.storage import Storage

from tests.cache.fakes import key_of
from tests.proxy.test_membership import SPACE, Node, purge_of, running, three
from tests.redis_server import needs_redis, redis_server
from tests.shared_server import SwitchedClient, clients

pytestmark = needs_redis


async def test_a_new_node_leaves_the_shared_tier_as_it_is(tmp_path, monkeypatch):
    """The floor of a server that has forgotten purges is about a node's own disk alone."""
    monkeypatch.setattr(purge_log, "MAX_PURGES", 10)
    monkeypatch.setattr(purge_exchange, "MAX_PURGES", 10)
    texts = {"a", "b", "c"}
    async with clients(2) as (mine, theirs), running(Node(tmp_path / "old", mine)) as old:
        await old.put(*texts)
        await _purge_often(old, 12)
        assert (await old.membership.exchange.read()).floor > 0
        async with running(Node(tmp_path / "new", theirs)) as new:
            assert await new.texts(*texts) == texts
            await new.settle()
            assert await new.in_redis() == 3
            assert await new.texts(*texts) == texts
            await new.tiers.flush_copies()
            new.store.on_purge()
            theirs.is_off = True
            assert await new.texts(*texts) == texts


async def test_an_interrupted_sweep_is_made_up_for(tmp_path, monkeypatch):
    """A purge is kept until nothing of it is left; whoever comes next may sweep."""
    monkeypatch.setattr(purge_log, "MAX_PURGES", 10)
    monkeypatch.setattr(purge_exchange, "MAX_PURGES", 10)
    interrupted = []

    async def interrupt(*_):
        interrupted.append(1)
        raise sweep.Interrupted("server")

    async with clients(2) as (mine, theirs), running(Node(tmp_path / "a", mine)) as one:
        await one.put("secret")
        with monkeypatch.context() as patch:
            patch.setattr(sweep, "delete", interrupt)
            await one.membership.exchange.add([purge_of(PurgeFilter(namespace=""))])
            await one.settle()
            await _purge_often(one, 25)
            assert len(interrupted) == 1
            assert await one.in_redis() == 1
            assert await one.texts("secret") == set()
        async with running(Node(tmp_path / "b", theirs)) as other:
            await other.settle()
            assert await other.in_redis() == 0
        one.membership._sweep_at = float("-inf")
        await one.settle()
        # All is swept by now.
        assert not one.membership._unswept
        await _purge_often(one, 12, "more")
        shared = await one.membership.exchange.read()
        assert len(shared.purges) <= 11
        assert len(one.membership.log.read().purges) <= 11


async def test_purges_outlive_a_server_that_comes_back_with_older_data(tmp_path):
    """Its generation is the same; nodes that know more than it tell it."""
    async with three(tmp_path) as (one, other, away):
        await away.put("a", "b")
        redis, key = one.client, one.client.key("purges")
        await one.membership.exchange.add([purge_of(PurgeFilter(namespace="x"), "p0")])
        await one.settle()
        snapshot = await redis.command("DUMP", key)
        await one.membership.exchange.add([purge_of(PurgeFilter(namespace=""))])
        await one.settle()
        await other.settle()
        await redis.command("RESTORE", key, 0, snapshot, "REPLACE")
        await other.settle()
        await away.settle()
        assert await away.texts("a", "b") == set()


async def test_a_node_that_stops_leaves_the_rest_of_a_purge(tmp_path, monkeypatch):
    """It ends after the present step, on disk as in Redis, and goes on when it starts."""
    monkeypatch.setattr(sweep, "SCAN_KEYS", 10)
    texts = [f"text {number}" for number in range(300)]
    async with clients(1) as (client,):
        async with running(Node(tmp_path / "n", client)) as node:
            await node.put(*texts)
            await node.membership.exchange.add([purge_of(PurgeFilter(namespace=""))])
            monkeypatch.setattr(node.store._disk, "write", _stopping(node, node.store._disk.write))
            await node.settle()
            assert 0 < await node.on_disk() < 300
            assert not node.membership.log.read().purges["p1"].is_done
        async with running(Node(tmp_path / "n", client)) as node:
            with monkeypatch.context() as patch:
                patch.setattr(sweep, "_delete_chosen", _stopping(node, sweep._delete_chosen))
                await node.settle()
            assert await node.on_disk() == 0
            assert 0 < await node.in_redis() < 300
        async with running(Node(tmp_path / "n", client)) as node:
            await node.settle()
            assert await node.in_redis() == 0


async def test_a_purge_holds_although_the_log_cannot_be_written(tmp_path, monkeypatch, caplog):
    """A full disk keeps nothing from being purged; it is written, and deleted, when it has room."""
    async with three(tmp_path) as (one, _, __):
        await one.put("a")
        await one.membership.exchange.add([purge_of(PurgeFilter())])

        def full(*_):
            raise OSError(28, "No space left on device")

        with monkeypatch.context() as patch:
            patch.setattr(one.membership.log, "change", full)
            for _ in range(3):
                await one.membership.tick()
                assert await one.texts("a") == set()
            assert caplog.text.count("the purge log cannot be written") == 1
        await one.settle()
        assert await one.on_disk() == 0


@pytest.mark.parametrize("path", ["node.lock", "node-id"])
async def test_a_node_that_cannot_take_part_heeds_purges(tmp_path, path, caplog):
    """As in a folder that is read-only: what other nodes purge is not served, and it says so."""
    with redis_server() as server:
        async with SwitchedClient(server.port) as client:
            async with running(Node(tmp_path / "n", client)) as node:
                await node.put("a", "b")
            for name in (path, "purge-log.lock"):
                (tmp_path / "n" / name).unlink(missing_ok=True)
                (tmp_path / "n" / name).mkdir()
            early = purge_of(PurgeFilter(address=key_of("a", SPACE).address), "early")
            assert await node.membership.exchange.add([early])
            url = parse(f"redis://127.0.0.1:{server.port}")
            shared = SharedTier(RedisClient(RedisOptions(url, limit_s=20.0)))
            async with Storage(Cache(directory=tmp_path / "n"), 1, shared, "n") as storage:
                node.tiers, node.membership = storage.tiers, storage.membership
                assert await node.texts("a", "b") == {"b"}
                assert not storage.membership.is_keeper
                await node.membership.exchange.add([purge_of(PurgeFilter(namespace=""), "late")])
                await storage.membership.tick()
                assert await node.texts("a", "b") == set()
    assert caplog.text.count("this node heeds the purges of others") == 1


def _stopping(node, work):
    """Return a function that does the same, and has a node stop once it has deleted something."""

    async def stopping(*arguments):
        done = await work(*arguments)
        if isinstance(done, int) and done and node.membership._applying is not None:
            node.membership._stop.set()
        return done

    return stopping


async def _purge_often(node, count, word="often"):
    """Make purges that are about nothing, in the future, so each is later than all before."""
    for number in range(count):
        name = f"{word}-{number}"
        purge = purge_of(PurgeFilter(namespace=name), name, time.time() + 60 + number)
        assert await node.membership.exchange.add([purge])
        await node.settle()
