"""Nodes that share a Redis: one of them buys what several are asked for at once."""

import asyncio
import signal

import pytest
from fault_server import status
from redis_server import needs_redis, redis_server, until
from shared_nodes import Nodes, ask, is_right

pytestmark = needs_redis
NEW = "text-embedding-9"


@pytest.fixture
def redis():
    """Give a server of one's own."""
    with redis_server() as server:
        yield server


@pytest.fixture
def nodes(start_proxy, upstream, redis, tmp_path):
    """Give what starts proxies."""
    return Nodes(start_proxy, upstream, redis.url, tmp_path)


async def test_what_is_asked_of_three_nodes_at_once_is_bought_by_one(nodes, upstream):
    """Its right vectors come from every node, billed once in the sum of all ledgers."""
    upstream.gate = asyncio.Event()
    three = [await nodes.start(name) for name in ("one", "two", "three")]
    texts = ["a", "b", "c"]
    asked = [asyncio.create_task(ask(node, texts)) for node in three * 3]
    await until(lambda: upstream.calls)
    upstream.gate.set()
    for vectors, _ in [await task for task in asked]:
        assert is_right(vectors, texts)
    assert sorted(upstream.inputs) == texts
    sums = [usage for node in three for usage in node.service.counted.values()]
    assert sum(usage.misses for usage in sums) == 3
    assert sum(usage.inputs for usage in sums) == 27
    assert sum(usage.tokens_billed for usage in sums) == 3


async def test_a_node_that_fails_leaves_the_purchase_to_another(nodes, upstream):
    """Its own clients are told; another node that waited tries by itself."""
    failure, goes_on = status(400), asyncio.Event()

    async def fail(request, payload):
        await goes_on.wait()
        return await failure(request, payload)

    upstream.script.append(fail)
    one, other = await nodes.start("one"), await nodes.start("other")
    failing = asyncio.create_task(one.post({"model": "m", "input": ["a"]}))
    await until(lambda: upstream.calls)
    waiting = asyncio.create_task(ask(other, ["a"]))
    await until(lambda: len(other.service._registry.in_flight))
    goes_on.set()
    assert (await failing).status == 400
    vectors, _ = await waiting
    assert is_right(vectors, ["a"])
    assert upstream.inputs == ["a", "a"]


@pytest.mark.parametrize("fault", ["killed", "stopped"])
async def test_without_redis_each_node_buys_for_itself(nodes, redis, upstream, fault):
    """Requests go on as they would with no Redis at all."""
    one, other = await nodes.start("one"), await nodes.start("other")
    if fault == "killed":
        redis.kill()
    else:
        redis.signal(signal.SIGSTOP)
    for node in (one, other):
        vectors, found = await ask(node, ["a"])
        assert (is_right(vectors, ["a"]), found) == (True, "miss")
    assert upstream.inputs == ["a", "a"]


async def test_a_width_that_another_node_has_learned_is_not_bought_again(nodes, upstream):
    """The first input of a model of which only the name is known is looked for in Redis."""
    upstream.widths = {NEW: 40}
    for name in ("one", "other"):
        node = await nodes.start(name)
        reply = await node.post({"model": NEW, "input": "a"})
        (item,) = (await reply.json())["data"]
        assert (reply.status, len(item["embedding"])) == (200, 40)
        await node.service.storage.shared.flush()
    assert upstream.inputs == ["a"]
