"""What the tests of redisvl's cache of embeddings ask of it, asked of the shared tier.

Its 26 cases (integration/test_embedcache.py, unit/test_embedcache_pipeline.py), and what is here:

- initialization with a name, a TTL, a client; entry ids; keys; ids agree between operations:
  `test_the_name_is_the_prefix_of_all_keys`
- set and get, mset and mget, mget by keys of which some are missing, several entries, exists and
  mexists (a look-up tells), one result for each key; the same, asynchronous:
  `test_what_was_put_is_found_and_nothing_else`
- drop and mdrop; the same, asynchronous: `test_what_was_deleted_is_missing_and_the_rest_is_not`
- expiry, of one and of a batch; the same, asynchronous: `test_records_expire`
- asynchronous batches, batches of nothing, large batches: `test_batches_of_any_size`
- a client that is given is used: `test_connections_are_used_again`
- a batch goes in one pipeline, with each expiry, and none of it is dropped (2 cases):
  `test_a_batch_is_one_exchange`

Not here: a TTL of one entry (an entry's age is its purchase's, and all of a tier expire alike);
metadata and texts beside the vector (no text leaves the proxy); synchronous calls.
"""

import pytest
from embedding_proxy.cache.key import Keys, keyring
from embedding_proxy.cache.shared.address import RedisOptions, parse
from embedding_proxy.cache.shared.client import RedisClient
from embedding_proxy.cache.shared.tier import SharedTier
from embedding_proxy.providers.base import Space
from redis_server import needs_redis, redis_server

from tests.cache.fakes import entry_of, key_of

pytestmark = needs_redis
SPACE = Space("m", 3)
PARTITION = keyring(SPACE).partition


@pytest.fixture
def redis():
    """Give a server of one's own."""
    with redis_server() as server:
        yield server


def tier(redis, prefix="embedding-proxy", **options):
    client = RedisClient(RedisOptions(parse(redis.url), prefix=prefix, limit_s=30.0))
    return SharedTier(client, **options)


async def put(shared, texts):
    shared.put({key_of(t, SPACE).address: entry_of(t, SPACE) for t in texts}, PARTITION)
    await shared.flush()


async def found(shared, texts):
    """Return which texts have their own entry; none has another's."""
    keys = Keys.from_keys([key_of(text, SPACE) for text in texts])
    entries = await shared.lookup(keys, SPACE.dimensions)
    assert len(entries) == len(texts)
    for text, one in zip(texts, entries, strict=True):
        assert one is None or one.entry == entry_of(text, SPACE)
    return [one is not None for one in entries]


async def test_the_name_is_the_prefix_of_all_keys(redis):
    """A key is made of the tier's name, the format, and the entry's address, always the same."""
    async with tier(redis) as shared, tier(redis, "another") as other:
        await put(shared, ["a"])
        await put(other, ["a", "b"])
        names = [b"embedding-proxy:1:r:" + key_of("a", SPACE).address]
        names += [b"another:1:r:" + key_of(text, SPACE).address for text in ("a", "b")]
        assert redis.keys("*") == sorted(names)
        assert await found(shared, ["a", "b"]) == [True, False]


async def test_what_was_put_is_found_and_nothing_else(redis):
    """One result for each key, in their order; what is not there is None."""
    async with tier(redis) as shared:
        assert await found(shared, ["a"]) == [False]
        await put(shared, ["a"])
        assert await found(shared, ["a"]) == [True]
        await put(shared, ["b", "c"])
        assert await found(shared, ["c", "nobody's", "a", "b"]) == [True, False, True, True]


async def test_what_was_deleted_is_missing_and_the_rest_is_not(redis):
    """Who deletes a key in Redis deletes this entry of the tier, and no other."""
    texts = [f"text {n}" for n in range(10)]
    async with tier(redis) as shared:
        await put(shared, texts)
        for text in texts[:5]:
            redis.call("DEL", shared.redis.key("r", key_of(text, SPACE).address))
        assert await found(shared, texts) == [False] * 5 + [True] * 5


async def test_records_expire(redis):
    """Each key has the time that is left of the TTL since the purchase; without TTL, none."""
    now = 1_000_000.0
    async with tier(redis, ttl_s=60, clock=lambda: now) as shared:
        old = key_of("old", SPACE)
        shared.put({old.address: entry_of("old", SPACE)}, PARTITION, now - 50)
        await put(shared, ["a", "b"])
        left = [int(redis.call("PTTL", key)[1:]) for key in redis.keys("*")]
        assert sorted(ms // 10_001 for ms in left) == [0, 5, 5]
        now += 30
        assert await found(shared, ["a", "old"]) == [True, False]
        redis.call("PEXPIRE", shared.redis.key("r", key_of("a", SPACE).address), "0")
        assert await found(shared, ["a", "b"]) == [False, True]
    redis.call("FLUSHALL")
    async with tier(redis) as shared:
        await put(shared, ["a"])
        assert redis.call("PTTL", redis.keys("*")[0]) == b":-1\r\n"


@pytest.mark.parametrize("count", [0, 1, 100, 5000])
async def test_batches_of_any_size(redis, count):
    """Nothing, one, many, more than one exchange holds."""
    texts = [f"text {n}" for n in range(count)]
    async with tier(redis) as shared:
        await put(shared, texts)
        assert await found(shared, texts) == [True] * count
        assert await found(shared, [f"other {n}" for n in range(count)]) == [False] * count


async def test_connections_are_used_again(redis):
    """One after the other, exchanges take one connection; a second one is made for none."""
    async with tier(redis) as shared:
        for number in range(20):
            await put(shared, [f"text {number}"])
            await found(shared, [f"text {number}"])
        (node,) = shared.redis.nodes.values()
        assert node.connections == 1


async def test_a_batch_is_one_exchange(redis):
    """Records are written with their expiry, together, and none is lost on the way."""
    async with tier(redis, ttl_s=60) as shared:
        before = shared.redis.counters.exchanges
        await put(shared, [f"text {n}" for n in range(100)])
        assert shared.redis.counters.exchanges == before + 1
        assert len(redis.keys("*")) == 100
        assert all(redis.call("PTTL", key) != b":-1\r\n" for key in redis.keys("*"))
