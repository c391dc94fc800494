"""Leases between machines: one holder among all nodes; without Redis, one on each."""

import asyncio
import contextlib

import pytest
from embedding_proxy.cache.disk.file_leases import FileLeases
from embedding_proxy.cache.key import keyring
from embedding_proxy.cache.shared import redis_leases
from embedding_proxy.cache.shared.address import RedisOptions, parse
from embedding_proxy.cache.shared.client import RedisClient
from embedding_proxy.cache.shared.redis_leases import RedisLeases
from embedding_proxy.cache.shared.tier import SharedTier
from embedding_proxy.providers.base import Space
from redis_server import needs_redis, redis_server, until

from tests.cache.fakes import entry_of

pytestmark = needs_redis
SPACE = Space("m", 3)

PATIENCE = 30.0
"""A limit that no machine is too slow for."""
ADDRESSES = [bytes([number]) * 16 for number in range(1, 9)]
ONE = ADDRESSES[:1]


@contextlib.asynccontextmanager
async def nodes(server, *folders, limit_s=PATIENCE):
    """Give the leases of processes, on the machines whose cache folders are named."""
    async with contextlib.AsyncExitStack() as stack:
        found = []
        for folder in folders:
            local = FileLeases(folder)
            stack.callback(local.close)
            options = RedisOptions(parse(server.url), limit_s=limit_s)
            redis = await stack.enter_async_context(RedisClient(options))
            leases = RedisLeases(local, SharedTier(redis))
            stack.push_async_callback(leases.aclose)
            found.append(leases)
        yield found


def key_of(address):
    return b"embedding-proxy:1:lease:" + address


def left_ms(server, address):
    """Return for how many milliseconds a lease lasts; -2 if nobody has it."""
    return int(server.call("PTTL", key_of(address))[1:])


async def test_a_lease_has_one_holder_among_all_nodes(tmp_path):
    """Of two machines one gets it; the other one does, once it is given back."""
    with redis_server() as server:
        async with nodes(server, tmp_path / "1", tmp_path / "2") as (one, two):
            assert [*await one.acquire(ADDRESSES[:3])] == ADDRESSES[:3]
            assert [*await two.acquire(ADDRESSES[2:5])] == ADDRESSES[3:5]
            one.release(ADDRESSES[:3], is_written=False)
            await until(lambda: left_ms(server, ADDRESSES[0]) == -2)
            assert [*await two.acquire(ADDRESSES[:5])] == ADDRESSES[:5]
        assert all(left_ms(server, address) == -2 for address in ADDRESSES), "given back at the end"


async def test_whoever_does_not_get_it_holds_nothing_on_its_machine(tmp_path):
    """Any process of a machine may be the one that asks Redis next."""
    with redis_server() as server:
        async with nodes(server, tmp_path / "1", tmp_path / "2", tmp_path / "2") as (one, *two):
            await one.acquire(ONE)
            for leases in two:
                assert not [*await leases.acquire(ONE)]
            server.call("DEL", key_of(ADDRESSES[0]))
            assert [*await two[1].acquire(ONE)] == ONE
            exchanges = two[0]._redis.counters.exchanges
            assert not [*await two[0].acquire(ONE)]
            assert two[0]._redis.counters.exchanges == exchanges, "its machine's lease is another's"


async def test_it_lasts_for_a_while_and_is_renewed(tmp_path, monkeypatch):
    """So nobody waits long for a node that has died, and a slow call keeps it."""
    monkeypatch.setattr(redis_leases, "RENEW_S", 0.01)
    with redis_server() as server:
        async with nodes(server, tmp_path) as (leases,):
            await leases.acquire(ONE)
            server.call("PEXPIRE", key_of(ADDRESSES[0]), "600000")
            await until(lambda: left_ms(server, ADDRESSES[0]) <= 1000 * redis_leases.TTL_S)
            assert left_ms(server, ADDRESSES[0]) > 0
            assert not leases.lapsed_s(ONE)


async def test_after_a_write_it_lasts_until_the_record_is_shared(tmp_path):
    """It expires by itself; its own process gets it again at once."""
    with redis_server() as server:
        async with nodes(server, tmp_path / "1", tmp_path / "2") as (one, two):
            await one.acquire(ONE)
            server.call("PEXPIRE", key_of(ADDRESSES[0]), "600000")
            one.release(ONE, is_written=True)
            await until(lambda: left_ms(server, ADDRESSES[0]) <= 1000 * redis_leases.WRITTEN_S)
            assert not [*await two.acquire(ONE)]
            assert [*await one.acquire(ONE)] == ONE
            one.release(ONE, is_written=False)
            await until(lambda: left_ms(server, ADDRESSES[0]) == -2)
            server.call("SET", key_of(ADDRESSES[0]), "another node's")
            assert not [*await one.acquire(ONE)]


async def test_it_lasts_as_long_as_the_record_waits_to_be_shared(tmp_path, monkeypatch):
    """However long the queue of writes is, no other node buys what waits in it."""
    monkeypatch.setattr(redis_leases, "RENEW_S", 0.01)
    entry, partition = entry_of("a", SPACE), keyring(SPACE).partition
    with redis_server() as server:
        async with nodes(server, tmp_path / "1", tmp_path / "2") as (one, two):
            tier, gate = one._tier, asyncio.Event()
            write = tier._write

            async def write_late(writes):
                await gate.wait()
                await write(writes)

            tier._write = write_late
            await one.acquire(ADDRESSES[:2])
            tier.put({ADDRESSES[0]: entry, ADDRESSES[1]: entry}, partition)
            one.release(ADDRESSES[:2], is_written=True)
            assert [*await one.acquire(ADDRESSES[1:2])] == ADDRESSES[1:2]
            one.release(ADDRESSES[1:2], is_written=False)
            await until(lambda: left_ms(server, ADDRESSES[1]) == -2)
            for _ in range(3):
                server.call("PEXPIRE", key_of(ADDRESSES[0]), "600000")
                await until(lambda: left_ms(server, ADDRESSES[0]) <= 1000 * redis_leases.WRITTEN_S)
            assert [*await two.acquire(ADDRESSES[:2])] == ADDRESSES[1:2]
            gate.set()
            await until(lambda: not one._tasks)
            server.call("PEXPIRE", key_of(ADDRESSES[0]), "600000")
            await one.aclose()
            assert left_ms(server, ADDRESSES[0]) > 10_000, "it was there; nothing is renewed"


async def test_the_end_waits_for_no_record_that_cannot_be_shared(tmp_path):
    """Its lease lapses by itself."""
    with redis_server() as server:
        async with nodes(server, tmp_path) as (leases,):
            tier = leases._tier
            tier._write = lambda _: asyncio.Event().wait()
            await leases.acquire(ONE)
            tier.put({ONE[0]: entry_of("a", SPACE)}, keyring(SPACE).partition)
            leases.release(ONE, is_written=True)
            await leases.aclose()
            tier._writer.cancel()
            assert 0 < left_ms(server, ONE[0]) <= 1000 * redis_leases.WRITTEN_S


async def test_what_is_granted_twice_is_given_back_twice(tmp_path):
    """Inside a process it is granted again, without asking anybody."""
    with redis_server() as server:
        async with nodes(server, tmp_path) as (leases,):
            for _ in range(2):
                assert [*await leases.acquire(ONE)] == ONE
            leases.release(ONE, is_written=False)
            assert left_ms(server, ADDRESSES[0]) > 0
            leases.release(ONE, is_written=False)
            await until(lambda: left_ms(server, ADDRESSES[0]) == -2)


async def test_another_nodes_lease_is_left_alone(tmp_path, monkeypatch):
    """One that has lost it, as when it was stopped, neither renews nor deletes it."""
    monkeypatch.setattr(redis_leases, "RENEW_S", 0.01)
    monkeypatch.setattr(redis_leases, "TTL_S", 0.05)
    with redis_server() as server:
        async with nodes(server, tmp_path) as (leases,):
            await leases.acquire(ONE)
            server.call("SET", key_of(ADDRESSES[0]), "another node's", "PX", "600000")
            await until(lambda: leases.lapsed_s(ONE))
            leases.release(ONE, is_written=False)
        assert left_ms(server, ADDRESSES[0]) > 10_000


@pytest.mark.parametrize("fault", ["killed", "full"])
async def test_without_redis_each_machine_decides(tmp_path, fault):
    """Then every node buys for itself, once; nobody waits or fails."""
    options = ("--maxmemory", "1", "--maxmemory-policy", "noeviction") if fault == "full" else ()
    with redis_server(*options) as server:
        folders = (tmp_path / "1", tmp_path / "1", tmp_path / "2")
        async with nodes(server, *folders) as (one, neighbour, two):
            if fault == "killed":
                server.kill()
            assert [*await one.acquire(ADDRESSES)] == ADDRESSES
            assert [*await two.acquire(ADDRESSES)] == ADDRESSES
            assert not [*await neighbour.acquire(ADDRESSES)]
            for leases in (one, two):
                leases.release(ADDRESSES[:4], is_written=True)
                leases.release(ADDRESSES[4:], is_written=False)
            assert [*await neighbour.acquire(ADDRESSES)] == ADDRESSES[4:]


async def test_a_user_that_may_run_no_script_is_told(tmp_path, caplog):
    """Then leases lapse by themselves."""
    with redis_server("--rename-command", "EVAL", "") as server:
        async with nodes(server, tmp_path) as (leases,):
            assert [*await leases.acquire(ADDRESSES)] == ADDRESSES
            leases.release(ONE, is_written=False)
            leases.release(ADDRESSES[1:], is_written=False)
        assert 0 < left_ms(server, ADDRESSES[0]) <= 1000 * redis_leases.TTL_S
    said = [one.getMessage() for one in caplog.records if "leases" in one.getMessage()]
    assert len(said) == 1
    assert "lapse after 3 s: ERR unknown command" in said[0]


async def test_a_cancelled_attempt_holds_nothing(tmp_path):
    """Whether or not Redis had taken it down by then."""
    with redis_server() as server:
        async with nodes(server, tmp_path, tmp_path) as (one, neighbour):
            server.call("CLIENT", "PAUSE", "600000", "WRITE")
            attempt = asyncio.create_task(one.acquire(ONE))
            await until(lambda: b"blocked_clients:1" in server.call("INFO", "clients"))
            attempt.cancel()
            await asyncio.wait([attempt])
            assert attempt.cancelled()
            server.call("CLIENT", "UNPAUSE")
            await until(lambda: left_ms(server, ADDRESSES[0]) == -2)
            assert [*await neighbour.acquire(ONE)] == ONE
