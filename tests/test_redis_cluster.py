"""The client with a real cluster of three, and with sentinels."""

import asyncio
import contextlib
import subprocess

from embedding_proxy.cache.shared.address import RedisOptions, parse
from embedding_proxy.cache.shared.client import UNAVAILABLE, Command, RedisClient
from ports import own_port
from redis_server import RedisServer, needs_redis

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


async def test_a_cluster_is_asked_by_slot_and_followed_when_slots_move():
    """Every key goes to its server, also one that has moved since, or is on its way."""
    with cluster() as nodes:
        async with client(f"redis+cluster://127.0.0.1:{nodes[0].port}") as redis:
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


async def test_one_server_of_a_cluster_that_is_gone_takes_only_its_keys():
    """The others answer; those of the missing one are unavailable, and cost no time later."""
    with cluster() as nodes:
        for node in nodes:
            node.call("CONFIG", "SET", "cluster-require-full-coverage", "no")
        async with client(f"redis+cluster://127.0.0.1:{nodes[0].port}") as redis:
            keys = [redis.key("r", b"%d" % n) for n in range(300)]
            await redis.exchange([Command(key, (b"SET", key, key)) for key in keys])
            nodes[2].kill()
            while all(node.is_available for node in redis.nodes.values()):
                await redis.get_many(keys)
            values = await redis.get_many(keys)
            kept = [value for value in values if value is not UNAVAILABLE]
            assert 0 < len(kept) < len(keys)
            assert all(v in (k, UNAVAILABLE) for k, v in zip(keys, values, strict=True))


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


async def test_a_failover_by_sentinels_is_followed():
    """After the master is gone its replica is used, without a restart."""
    with (
        servers(1) as (master,),
        servers(1, "--replicaof", "127.0.0.1", str(master.port)) as (replica,),
    ):
        while b"master_link_status:up" not in replica.call("INFO", "replication"):
            pass
        with sentinel(master) as watch:
            while b"slaves=1" not in watch.call("INFO", "sentinel"):
                pass
            url = f"redis+sentinel://127.0.0.1:{own_port()},127.0.0.1:{watch.port}/main"
            async with client(url) as redis:
                assert await redis.exchange([Command(None, (b"SET", b"k", b"v"))]) == [b"OK"]
                while b":1\r\n" not in master.call("WAIT", "1", "0"):
                    pass
                master.kill()
                setting = Command(None, (b"SET", b"l", b"w"))
                while await redis.exchange([setting]) != [b"OK"]:  # noqa: ASYNC110
                    await asyncio.sleep(0.001)
                assert await redis.get_many([b"k", b"l"]) == [b"v", b"w"]
