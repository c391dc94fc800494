"""Writes of the shared tier that are late: they replace nothing that is newer."""

import pytest
from embedding_proxy.cache.key import Keys, keyring
from embedding_proxy.cache.shared import tier as tier_module
from embedding_proxy.cache.shared.address import RedisOptions, parse
from embedding_proxy.cache.shared.client import UNAVAILABLE, RedisClient
from embedding_proxy.cache.shared.tier import SharedTier
from embedding_proxy.providers.base import Space
from redis_server import needs_redis, redis_server, until

from tests.cache.fakes import entry_of, key_of

pytestmark = needs_redis
SPACE = Space("m", 3)
PARTITION = keyring(SPACE).partition
KEY = key_of("a", SPACE)


def tier_at(server, time_s, **options):
    """Return a tier whose purchases are all of one moment."""
    client = RedisClient(RedisOptions(parse(server.url), limit_s=30.0))
    return SharedTier(client, clock=lambda: time_s, **options)


def put(tier, **options):
    tier.put({KEY.address: entry_of("a", SPACE)}, PARTITION, **options)


async def stored(tier):
    """Return when the record that is there was bought."""
    (found,) = await tier.lookup(Keys.from_keys([KEY]), SPACE.dimensions)
    return found and found.stored


@pytest.mark.parametrize("ttl_s", [None, 1e6], ids=["for ever", "with a TTL"])
@pytest.mark.parametrize("others", [500.0, 1000.0, 2000.0])
@pytest.mark.parametrize("fault", ["no answer", "an open breaker", "bought too late"])
async def test_a_late_write_replaces_only_what_is_older(monkeypatch, fault, others, ttl_s):
    """Whoever could not write for a while does not know what others have bought since."""
    monkeypatch.setattr(tier_module, "RETRY_S", 0.001)
    with redis_server() as server:
        async with tier_at(server, 1000.0, ttl_s=ttl_s) as one, tier_at(server, others) as other:
            exchange, waits = one.redis.exchange, []

            async def again(*arguments):
                assert one.is_queued(1)
                assert not one.is_queued(0)
                return await exchange(*arguments)

            async def fail(*_):
                monkeypatch.setattr(one.redis, "exchange", again)
                assert one.is_queued(1)
                put(other)
                await other.flush()
                return [UNAVAILABLE]

            if fault == "no answer":
                monkeypatch.setattr(one.redis, "exchange", fail)
                put(one)
            elif fault == "an open breaker":
                is_open = property(lambda client: client is not one.redis or waits.append(1))
                with monkeypatch.context() as broken:
                    broken.setattr(RedisClient, "is_available", is_open)
                    put(one)
                    put(other)
                    await other.flush()
                    await until(lambda: waits)
            else:
                put(other)
                await other.flush()
                put(one, stored=1000.0, replaces=False)
            assert one.is_queued(1)
            await one.flush()
            assert not one.is_queued(1)
            assert await stored(other) == max(1000.0, others)
            left_ms = int(server.call("PTTL", one.redis.key("r", KEY.address))[1:])
            assert (left_ms > 0) == (ttl_s is not None and others < 1000.0)


async def test_a_write_in_time_replaces_what_is_there():
    """The clocks of two nodes may differ; what is bought anew is the newest all the same."""
    with redis_server() as server:
        async with tier_at(server, 1000.0) as one, tier_at(server, 2000.0) as other:
            for tier in (other, one):
                put(tier)
                await tier.flush()
            assert await stored(one) == 1000.0


async def test_what_is_damaged_is_replaced_by_a_late_write():
    """Also what is too short to say when it was bought."""
    with redis_server() as server:
        async with tier_at(server, 1000.0) as one:
            server.call("SET", one.redis.key("r", KEY.address), "short")
            put(one, stored=900.0, replaces=False)
            await one.flush()
            assert await stored(one) == 900.0
