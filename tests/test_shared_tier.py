"""Proxies that share their vectors by a real Redis: what one has bought, another serves."""

import signal
import struct

import numpy as np
import pytest
from embedding_proxy.cache.key import Partition
from embedding_proxy.cache.shared.value import pack, unpack
from redis_server import needs_redis, redis_server, until
from shared_nodes import Nodes, ask, filled, is_right, tier

pytestmark = needs_redis


def reads_of(proxy):
    """Return a list that gets the number of keys of each read; nodes ask for other things, too."""
    redis, reads = tier(proxy).redis, []
    get_many = redis.get_many

    async def noted(keys, limit_s=None):
        reads.append(len(keys))
        return await get_many(keys, limit_s)

    redis.get_many = noted
    return reads


@pytest.fixture
def redis():
    """Give a server of one's own."""
    with redis_server() as server:
        yield server


@pytest.fixture
def nodes(start_proxy, upstream, redis, tmp_path):
    """Give what starts proxies."""
    return Nodes(start_proxy, upstream, redis.url, tmp_path)


async def test_what_one_node_has_bought_another_serves_and_keeps(nodes, redis, upstream):
    """A hit of the shared tier is billed to nobody, and from then on one of the node's own."""
    one, other = await nodes.start("one"), await nodes.start("other")
    texts = [f"text {n}" for n in range(700)]
    await filled(one, texts)
    calls = len(upstream.calls)
    vectors, found = await ask(other, texts)
    assert (found, is_right(vectors, texts)) == ("hit", True)
    assert other.service.counters.shared_hits == 700
    (usage,) = other.service.counted.values()
    assert (usage.hits, usage.misses, usage.tokens_billed) == (700, 0, 0)
    reads = reads_of(other)
    assert (await ask(other, texts))[1] == "hit"
    assert reads == []
    await other.service.storage.tiers.flush_copies()
    redis.kill()
    other.service.storage.memory.clear()
    assert (await ask(other, texts))[1] == "hit"
    assert other.service.counters.disk_hits == 700
    assert len(upstream.calls) == calls


async def test_many_inputs_take_few_exchanges(nodes):
    """2,000 inputs are asked for in one exchange."""
    one, other = await nodes.start("one"), await nodes.start("other")
    texts = [f"text {n}" for n in range(2000)]
    await filled(one, texts)
    reads = reads_of(other)
    assert (await ask(other, texts))[1] == "hit"
    assert reads == [2000]


async def test_a_record_that_was_altered_is_a_miss_and_is_counted(nodes, redis, upstream):
    """Whatever stands under a key, no wrong vector is served; what is bought replaces it."""
    one, other = await nodes.start("one"), await nodes.start("other")
    texts = [f"text {n}" for n in range(6)]
    await filled(one, texts)
    keys = redis.keys("embedding-proxy:1:r:*")
    values = [redis.value(key) for key in keys]
    spoilt = [
        values[0][:30] + bytes([values[0][30] ^ 1]) + values[0][31:],
        struct.pack("<Q", 0) + values[1][8:],
        values[3],
        values[3][:-1],
        b"",
        b"x" * 100,
    ]
    for key, value in zip(keys, spoilt, strict=True):
        redis.call("SET", key, value)
    calls = len(upstream.calls)
    vectors, found = await ask(other, texts)
    assert (found, is_right(vectors, texts)) == ("miss", True)
    assert len(upstream.calls) > calls
    assert tier(other).counters.mismatches == 6
    await tier(other).flush()
    third = await nodes.start("third")
    assert (await ask(third, texts))[1] == "hit"


async def test_the_time_of_the_purchase_travels_with_the_record(nodes, redis):
    """`max-age` and `ttl_days` count from the purchase, on whichever node."""
    one = await nodes.start("one")
    await filled(one, ["a", "b"])
    keys = redis.keys("embedding-proxy:1:r:*")
    for key in keys:
        record, stored, partition = unpack(redis.value(key))
        redis.call("SET", key, pack(record, stored - 7200, partition))
    other = await nodes.start("other")
    fresh = {"Cache-Control": "max-age=3600"}
    assert (await ask(other, ["a"], **fresh))[1] == "miss"
    assert (await ask(other, ["b"]))[1] == "hit"
    assert (await ask(other, ["b"], **fresh))[1] == "miss"
    old = await nodes.start("old", cache={"ttl_days": 1 / 24})
    redis.call("SET", keys[0], pack(record, stored - 7200, partition))
    redis.call("SET", keys[1], pack(record, stored - 7200, partition))
    assert (await ask(old, ["a", "b"]))[1] == "miss"


async def test_the_server_deletes_what_is_too_old(nodes, redis):
    """`ttl_days` of the section, or else of the cache, is the expiry of each key."""
    for name, shared, cache in (
        ("one", {"ttl_days": 2}, {"ttl_days": 9}),
        ("two", {}, {"ttl_days": 2}),
        ("three", {}, {}),
    ):
        await filled(await nodes.start(name, shared=shared, cache=cache), [name])
        (key,) = redis.keys("embedding-proxy:1:r:*")
        left = int(redis.call("PTTL", key)[1:])
        assert left == -1 if name == "three" else 0 < left <= 2 * 86_400_000
        redis.call("FLUSHALL")


async def test_a_request_without_a_trace_leaves_none(nodes, redis, upstream):
    """`no-store` reads, and writes to no tier; `no-cache` buys, and replaces."""
    one, other = await nodes.start("one"), await nodes.start("other")
    hidden = {"Cache-Control": "no-store"}
    await ask(one, ["secret"], **hidden)
    await tier(one).flush()
    assert redis.keys("*:r:*") == []
    await filled(one, ["a"])
    assert (await ask(other, ["a"], **hidden))[1] == "hit"
    assert len(other.service.storage.memory) == 0
    calls = len(upstream.calls)
    assert (await ask(other, ["a"], **{"Cache-Control": "no-cache"}))[1] == "miss"
    assert len(upstream.calls) == calls + 1


async def test_namespaces_and_widths_are_kept_apart(nodes, redis):
    """Another tenant's entry, or one of another width, is none."""
    keys = [{"key": "k", "namespace": "team"}, {"key": "l"}]
    server = {"keys": keys}
    one, other = await nodes.start("one", server=server), await nodes.start("other", server=server)
    await ask(one, ["a"], Authorization="Bearer k")
    await tier(one).flush()
    assert (await ask(other, ["a"], Authorization="Bearer l"))[1] == "miss"
    assert (await ask(other, ["a"], Authorization="Bearer k"))[1] == "hit"
    value = redis.value(redis.keys("embedding-proxy:1:r:*")[0])
    assert unpack(value).partition in (Partition("team", "s/m", 8), Partition("", "s/m", 8))


async def test_half_precision_is_for_this_tier_only(nodes, redis):
    """`element_type: float16` halves the vector and rounds it; nodes read both kinds."""
    one = await nodes.start("one", shared={"element_type": "float16"})
    other = await nodes.start("other")
    (exact,) = await filled(one, ["a"])
    ((found,), outcome) = await ask(other, ["a"])
    assert outcome == "hit"
    assert not np.array_equal(found, exact)
    assert np.allclose(found, exact, rtol=1e-3, atol=1e-6)
    assert np.array_equal((await ask(one, ["a"]))[0][0], exact)
    records = "embedding-proxy:1:r:*"
    size = len(redis.value(redis.keys(records)[0]))
    await filled(other, ["b"])
    assert max(len(redis.value(key)) for key in redis.keys(records)) == size + 16


async def test_a_server_that_fails_costs_no_request(nodes, redis, upstream, caplog):
    """Stopped, killed, started anew: each text is answered, and the tier comes back."""
    caplog.set_level("INFO")
    proxy = await nodes.start("one", shared={"timeout_ms": 5})
    for fault, mend in (
        (lambda: redis.signal(signal.SIGSTOP), lambda: redis.signal(signal.SIGCONT)),
        (redis.kill, redis.start),
    ):
        fault()
        number = 0
        while tier(proxy).is_available:
            vectors, _ = await ask(proxy, [f"{fault} {number}"])
            assert is_right(vectors, [f"{fault} {number}"])
            number += 1
        await ask(proxy, [f"{fault} last"])
        mend()
        await until(lambda: tier(proxy).is_available)
        await tier(proxy).flush()
    lines = [one.getMessage() for one in caplog.records if "shared tier" in one.getMessage()]
    assert sum("is left alone" in line for line in lines) >= 2
    assert sum("answers again" in line for line in lines) >= 2


async def test_a_full_server_is_read_and_takes_no_records(nodes, redis, caplog):
    """What it has is served; that it refuses writes is said once, and when it ends."""
    caplog.set_level("INFO")
    proxy = await nodes.start("one")
    await filled(proxy, ["a"])
    redis.call("CONFIG", "SET", "maxmemory", "1")
    await filled(proxy, ["b"])
    await filled(proxy, ["c"])
    assert tier(proxy).snapshot()["refuses_writes"].startswith("OOM")
    assert tier(proxy).counters.write_errors == 2
    other = await nodes.start("other")
    assert (await ask(other, ["a"]))[1] == "hit"
    redis.call("CONFIG", "SET", "maxmemory", "0")
    tier(proxy)._refusals.succeed()
    await filled(proxy, ["d"])
    assert tier(proxy).snapshot()["refuses_writes"] is None
    text = caplog.text
    assert text.count("takes no records: OOM") == 1
    assert text.count("takes records again") == 1


async def test_an_emptied_server_is_filled_again(nodes, redis):
    """What it lost is bought again by other nodes, once."""
    one, other, third = [await nodes.start(name) for name in ("one", "other", "third")]
    await filled(one, ["a"])
    redis.call("FLUSHALL")
    await filled(other, ["a"])
    assert (await ask(third, ["a"]))[1] == "hit"


async def test_status_and_metrics_tell_of_the_tier(nodes, redis):
    """Hits, misses, errors, mismatches, the breaker, and the time of an exchange."""
    one, other = await nodes.start("one"), await nodes.start("other")
    await filled(one, ["a"])
    await ask(other, ["a", "b"])
    await tier(other).flush()
    base = other.url.removesuffix("/v1")
    async with other.http.get(f"{base}/status") as reply:
        shared = (await reply.json())["shared"]
    assert shared["address"] == redis.url
    assert (shared["state"], shared["hits"], shared["misses"]) == ("closed", 1, 1)
    assert shared["mean_ms"] > 0
    async with other.http.get(f"{base}/metrics") as reply:
        text = await reply.text()
    for line in (
        'cache_lookups_total{result="shared"} 1.0',
        'shared_lookups_total{result="hit"} 1.0',
        'shared_lookups_total{result="miss"} 1.0',
        'shared_writes_total{result="written"} 1.0',
        "shared_breaker_state 0.0",
    ):
        assert f"embedding_proxy_{line}\n" in text
