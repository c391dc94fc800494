"""The client with a real cluster of three, and with sentinels."""

import asyncio
import contextlib
import subprocess

from embedding_proxy.cache.disk.file_leases import FileLeases
from embedding_proxy.cache.shared.address import RedisOptions, parse
from embedding_proxy.cache.shared.client import UNAVAILABLE, Command, RedisClient
from embedding_proxy.cache.shared.redis_leases import RedisLeases
from embedding_proxy.cache.shared.tier import SharedTier
from embedding_proxy.proxy.config.schema import Settings
from embedding_proxy.proxy.diagnostics.check import check_shared
from ports import own_port
from redis_server import RedisServer, needs_redis, until
from shared_nodes import Nodes, ask, filled, is_right, tier

pytestmark = needs_redis
PATIENCE = 30.0


@contextlib.contextmanager
def servers(count, *options):
    with contextlib.ExitStack() as stack:
        started = []
        for _ in range(count):
            server = RedisServer(*options)
            stack.callback(server.close)
            started.append(server.start())
        yield started


@contextlib.contextmanager
def cluster():
    """Start three masters without replicas, as `redis-cli --cluster create` makes them one."""
    with servers(3, "--cluster-enabled", "yes", "--cluster-node-timeout", "2000") as nodes:
        hosts = [f"127.0.0.1:{node.port}" for node in nodes]
        command = ["redis-cli", "--cluster", "create", *hosts, "--cluster-yes"]
        subprocess.run(command, check=True, capture_output=True)
        while any(b"cluster_state:ok" not in node.call("CLUSTER", "INFO") for node in nodes):
            pass
        yield nodes


def client(url, **options):
    return RedisClient(RedisOptions(parse(url), **{"limit_s": PATIENCE, **options}))


@contextlib.asynccontextmanager
async def opened(url, **options):
    """Open a client, and wait until it has a server, however slow the machine is."""
    async with client(url, **options) as redis:
        await until(lambda: redis.is_available)
        yield redis


async def test_a_cluster_is_asked_by_slot_and_followed_when_slots_move():
    """Every key goes to its server, also one that has moved since, or is on its way."""
    with cluster() as nodes:
        async with opened(f"redis+cluster://127.0.0.1:{nodes[0].port}") as redis:
            keys = [redis.key("r", b"%d" % n) for n in range(600)]
            sets = [Command(key, (b"SET", key, key)) for key in keys]
            assert await redis.exchange(sets) == [b"OK"] * len(keys)
            assert await redis.get_many(keys) == keys
            assert len(redis.nodes) == 3
            key = b"{a}"
            slot = nodes[0].call("CLUSTER", "KEYSLOT", key)[1:].strip().decode()
            ids = {node.call("CLUSTER", "MYID").split(b"\r\n")[1]: node for node in nodes}
            owner = next(n for n in nodes if n.call("SET", key, b"v").startswith(b"+OK"))
            target = next(node for node in nodes if node is not owner)
            names = {id(node): name.decode() for name, node in ids.items()}
            target.call("CLUSTER", "SETSLOT", slot, "IMPORTING", names[id(owner)])
            owner.call("CLUSTER", "SETSLOT", slot, "MIGRATING", names[id(target)])
            assert await redis.get_many([key, b"{a}2"]) == [b"v", None]
            owner.call("MIGRATE", "127.0.0.1", str(target.port), key, "0", "5000")
            assert await redis.get_many([key, *keys]) == [b"v", *keys]
            for node in (target, owner):
                node.call("CLUSTER", "SETSLOT", slot, "NODE", names[id(target)])
            assert await redis.get_many([key, *keys]) == [b"v", *keys]


async def test_leases_of_a_cluster_have_one_holder(tmp_path):
    """Those of one request are on several servers, and each is asked for its own."""
    addresses = [bytes([number]) * 16 for number in range(100)]
    with cluster() as servers_of_cluster:
        async with contextlib.AsyncExitStack() as stack:
            one, other = [
                RedisLeases(
                    FileLeases(tmp_path / name), SharedTier(await stack.enter_async_context(redis))
                )
                for name in ("one", "other")
                for redis in [client(f"redis+cluster://127.0.0.1:{servers_of_cluster[0].port}")]
            ]
            assert len(await one.acquire(addresses)) == 100
            assert all(node.keys("embedding-proxy:1:lease:*") for node in servers_of_cluster)
            assert not await other.acquire(addresses)
            one.release(addresses, is_written=False)
            await one.aclose()
            assert len(await other.acquire(addresses)) == 100
            await other.aclose()
            assert not any(node.keys("embedding-proxy:1:lease:*") for node in servers_of_cluster)


async def test_one_server_of_a_cluster_that_is_gone_takes_only_its_keys(tmp_path):
    """The others answer; those of the missing one are unavailable, and cost no time later.

    Who names one server of it as if it were the only one is told so.
    """
    with cluster() as nodes:
        for node in nodes:
            node.call("CONFIG", "SET", "cluster-require-full-coverage", "no")
        async with opened(f"redis+cluster://127.0.0.1:{nodes[0].port}") as redis:
            keys = [redis.key("r", b"%d" % n) for n in range(300)]
            await redis.exchange([Command(key, (b"SET", key, key)) for key in keys])
            nodes[2].kill()
            while all(node.is_available for node in redis.nodes.values()):
                await redis.get_many(keys)
            values = await redis.get_many(keys)
            kept = [value for value in values if value is not UNAVAILABLE]
            assert 0 < len(kept) < len(keys)
            assert all(v in (k, UNAVAILABLE) for k, v in zip(keys, values, strict=True))
        problems = [await _problem(tmp_path, nodes[0].url) for _ in range(20)]
        assert any("cache.shared: it is a server of a cluster: " in str(one) for one in problems)


async def _problem(folder, url):
    settings = Settings.model_validate({"cache": {"directory": str(folder), "shared": url}})
    status = await check_shared(settings, offline=False)
    return status.problem


@contextlib.contextmanager
def sentinel(master):
    """Start a sentinel that takes a master for gone after 0.3 s, on its own word."""
    watch = RedisServer()
    config = watch.folder / "sentinel.conf"
    config.write_text(
        f"port {watch.port}\nbind 127.0.0.1\nsentinel monitor main 127.0.0.1 {master.port} 1\n"
        "sentinel down-after-milliseconds main 300\nsentinel failover-timeout main 1000\n"
    )
    watch.command = ["redis-server", str(config), "--sentinel"]
    try:
        yield watch.start()
    finally:
        watch.close()


@contextlib.contextmanager
def replicated():
    """Start a master with a replica, and a sentinel that knows both."""
    with contextlib.ExitStack() as stack:
        (master,) = stack.enter_context(servers(1))
        options = ("--replicaof", "127.0.0.1", str(master.port), "--repl-diskless-sync-delay", "0")
        stack.enter_context(servers(1, *options))
        # The replica says earlier that the link is up: before the master sends it what is written.
        while b"state=online" not in master.call("INFO", "replication"):
            pass
        watch = stack.enter_context(sentinel(master))
        while b"slaves=1" not in watch.call("INFO", "sentinel"):
            pass
        # The first is none: the next one is asked.
        yield master, f"redis+sentinel://127.0.0.1:{own_port()},127.0.0.1:{watch.port}/main"


async def test_a_failover_in_the_middle_of_a_load_fails_no_request(start_proxy, upstream, tmp_path):
    """Every text is answered while the master is killed, and the replica serves hits after."""
    with replicated() as (master, url):
        nodes = Nodes(start_proxy, upstream, url, tmp_path)
        one, other = await nodes.start("one"), await nodes.start("other")
        await filled(one, ["first"])
        while b":1\r\n" not in master.call("WAIT", "1", "0"):
            pass
        number = 0
        is_down = is_up = False
        while not is_up:
            number += 1
            if number == 20:
                master.kill()
            texts = [f"{client} {number}" for client in range(4)]
            answers = await asyncio.gather(*(ask(one, [text]) for text in texts))
            assert all(is_right(a[0], [t]) for a, t in zip(answers, texts, strict=True))
            is_down = is_down or (number >= 20 and not tier(one).is_available)
            is_up = is_down and tier(one).is_available and tier(other).is_available
        assert (await ask(other, ["first"]))[1] == "hit"
        await filled(one, ["last"])
        assert (await ask(other, ["last"]))[1] == "hit"


async def test_proxies_share_a_cluster(start_proxy, upstream, tmp_path):
    """What one has bought is spread over all servers, and found by the other."""
    with cluster() as servers_of_cluster:
        url = f"redis+cluster://127.0.0.1:{servers_of_cluster[0].port}"
        nodes = Nodes(start_proxy, upstream, url, tmp_path)
        one, other = await nodes.start("one"), await nodes.start("other")
        texts = [f"text {n}" for n in range(300)]
        await filled(one, texts)
        vectors, found = await ask(other, texts)
        assert (found, is_right(vectors, texts)) == ("hit", True)
        assert all(server.keys("embedding-proxy:1:r:*") for server in servers_of_cluster)
