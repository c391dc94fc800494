"""Three proxies of one Redis, seen by HTTP and by commands: one budget, one limit, one bill."""

import asyncio
import json
import re

import pytest
from embedding_proxy.providers.charge import SpendingLimit
from embedding_proxy.proxy.config.keys_file import KeysFile, new_key
from fault_server import tokens_of

from tests.proxy.test_keys import COST, MODELS, _bearer, _stored
from tests.redis_server import needs_redis, redis_server

pytestmark = needs_redis
NODES = 3


@pytest.fixture
def server():
    """Give a Redis of one's own."""
    with redis_server() as started:
        yield started


@pytest.fixture
def start_nodes(server, tmp_path, upstream, start_proxy):
    """Give a function that starts proxies with folders of their own, in front of one upstream."""
    upstream.widths = {"m": 8}
    shared = {"url": server.url, "timeout_ms": 1000}

    async def start(*keys, server_section=None, **sections):
        proxies = []
        for number in range(NODES):
            directory = tmp_path / f"node-{number}"
            if keys:
                KeysFile(directory / "keys.yaml").change(lambda _: keys)
            cache = {"directory": str(directory), "shared": shared}
            name = {"node": f"node-{number}", **(server_section or {})}
            proxies.append(
                await start_proxy(
                    openai=upstream,
                    **{"models": MODELS, "cache": cache, "server": name, **sections},
                )
            )
        for proxy in proxies:
            await proxy.service.storage.membership.tick()
        return proxies

    return start


async def _status(proxy, key):
    url = proxy.url.removesuffix("/v1")
    async with proxy.http.get(f"{url}/status", headers=_bearer(key)) as reply:
        return json.loads(await reply.read())


@pytest.fixture
def configure(tmp_path, server):
    """Give a function that writes the configuration of a node, for commands."""

    def write(number):
        path = tmp_path / "config.yaml"
        cache = {
            "directory": str(tmp_path / f"node-{number}"),
            "shared": {"url": server.url, "timeout_ms": 1000},
        }
        path.write_text(json.dumps({"server": {"node": f"node-{number}"}, "cache": cache}))
        return path

    return write


async def test_a_budget_is_one_for_all_nodes(start_nodes, upstream, configure, command):
    """Requests at once, at all nodes: what was billed together is the budget, and no more."""
    key = new_key()
    limit = SpendingLimit(20 * COST, "ever")
    proxies = await start_nodes(_stored("poor", key, limit=limit))
    answers = await asyncio.gather(
        *(
            proxies[number % NODES].post({"model": "m", "input": f"text {number}"}, **_bearer(key))
            for number in range(30)
        )
    )
    bought = sum(tokens_of(one) for call in upstream.calls for one in call.payload["input"])
    assert bought == 20
    assert sorted({one.status for one in answers}) == [200, 429]
    for proxy in proxies:
        told = await _status(proxy, key)
        assert told["budget"]["usd_left"] == 0
    for number in range(NODES):
        listed = ("keys", "list", "--json", "--config", configure(number))
        (row,) = (await asyncio.to_thread(command, *listed)).json["keys"]
        assert row["spent"] == 0.02


async def test_the_bill_is_that_of_all_nodes_and_of_this_one(start_nodes, upstream):
    """A client and an admin see both; so do the metrics their node."""
    key, admin = new_key(), new_key()
    proxies = await start_nodes(_stored("ci", key), _stored("op", admin, is_admin=True))
    for number, proxy in enumerate(proxies):
        for text in range(number + 1):
            body = {"model": "m", "input": f"text {number} {text}"}
            assert (await proxy.post(body, **_bearer(key))).status == 200
    for proxy in proxies:
        await proxy.service.storage.store.flush_counts()
        await proxy.service.storage.membership._tell_sums()
    for number, proxy in enumerate(proxies):
        own = await _status(proxy, key)
        assert (own["since_ever"]["misses"], own["all_nodes"]["misses"]) == (number + 1, 6)
        told = await _status(proxy, admin)
        assert told["node"] == f"node-{number}"
        assert told["since_ever"]["misses"] == number + 1
        nodes = told["nodes"]
        assert (nodes["alive"], nodes["conflict"], nodes["since_ever"]["misses"]) == (3, None, 6)
        assert nodes["since_ever"]["clients"]["ci"]["misses"] == 6
        assert [(one["name"], one["misses"]) for one in nodes["nodes"]] == [
            ("node-0", 1),
            ("node-1", 2),
            ("node-2", 3),
        ]
        url = proxy.url.removesuffix("/v1")
        async with proxy.http.get(f"{url}/metrics", headers=_bearer(admin)) as reply:
            page = await reply.text()
        assert f'embedding_proxy_node_info{{node="node-{number}"}} 1.0' in page
        assert "embedding_proxy_nodes_alive 3.0" in page


async def test_a_limit_of_a_provider_is_one_for_all_nodes(start_nodes, upstream):
    """The calls of three nodes together are those that the limit lets through at once."""
    providers = {"openai": {"base_url": upstream.url, "limits": {"requests_per_minute": 4}}}
    # Who would have to wait 15 s is refused.
    proxies = await start_nodes(providers=providers, server_section={"request_timeout_s": 10})
    loop = asyncio.get_running_loop()
    began = loop.time()
    answers = [
        await proxies[number % NODES].post({"model": "m", "input": f"text {number}"})
        for number in range(9)
    ]
    minutes = (loop.time() - began) / 60
    assert 4 <= len(upstream.calls) <= 4 + 4 * minutes
    assert sum(one.status == 200 for one in answers) == len(upstream.calls)
    assert {one.status for one in answers} == {200, 429}


async def test_a_dead_server_fails_nothing(start_nodes, upstream, server):
    """Budgets, bills and limits go on with what this node knows."""
    key, admin = new_key(), new_key()
    limit = SpendingLimit(1000 * COST, "ever")
    proxies = await start_nodes(
        _stored("ci", key, limit=limit), _stored("op", admin, is_admin=True)
    )
    assert (await proxies[0].post({"model": "m", "input": "a"}, **_bearer(key))).status == 200
    server.kill()
    for number, proxy in enumerate(proxies):
        body = {"model": "m", "input": f"text {number}"}
        assert (await proxy.post(body, **_bearer(key))).status == 200
        told = await _status(proxy, admin)
        assert told["nodes"]["nodes"] is None
        assert told["since_ever"]["misses"] == (2 if number == 0 else 1)
        assert (await _status(proxy, key))["all_nodes"] is None


async def test_stats_shows_all_nodes(start_nodes, server, command, configure):
    """This node's sums, those of each node, and those of all together."""
    proxies = await start_nodes()
    for number, proxy in enumerate(proxies):
        assert (await proxy.post({"model": "m", "input": f"text {number}"})).status == 200
        await proxy.service.storage.store.flush_counts()
        await proxy.service.storage.membership._tell_sums()
    config = configure(0)

    def stats(*arguments):
        return command("cache", "stats", "--config", config, *arguments)

    told = (await asyncio.to_thread(stats, "--json")).json
    assert (told["misses"], told["all_nodes"]["misses"], len(told["nodes"])) == (1, 3, 3)
    page = (await asyncio.to_thread(stats)).out
    assert re.search(r"^node-1 +alive +1 ", page, re.MULTILINE)
    assert re.search(r"^all nodes +3 ", page, re.MULTILINE)
    by_model = (await asyncio.to_thread(stats, "--by", "model", "--all-nodes", "--json")).json
    assert [(line["model"], line["misses"]) for line in by_model] == [("m", 3)]
    by_day = (await asyncio.to_thread(stats, "--by", "day", "--all-nodes", "--json")).json
    assert sum(line["misses"] for line in by_day) == 3
    wrong = await asyncio.to_thread(stats, "--by", "day", "--by", "model", "--all-nodes")
    assert (wrong.code, "day alone" in wrong.err) == (2, True)
    await asyncio.to_thread(server.kill)
    late = await asyncio.to_thread(stats, "--json")
    assert (late.json["all_nodes"], "does not answer" in late.err) == (None, True)
