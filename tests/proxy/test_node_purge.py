"""`cache purge` with nodes that share a Redis: whom it reaches, and what it says of each."""

import asyncio
import json
import threading
import time
from pathlib import Path

import pytest
from embedding_proxy.cache.disk.purge import PurgeFilter
from embedding_proxy.cache.shared.node_registry import read_node_id
from embedding_proxy.cache.shared.purge_log import PurgeLog

from tests.proxy.test_membership import Node, running
from tests.redis_server import needs_redis, redis_server
from tests.shared_server import SwitchedClient

pytestmark = needs_redis


@pytest.fixture
def server():
    """Give a Redis of one's own."""
    with redis_server() as started:
        yield started


@pytest.fixture
def purge(tmp_path, server, command):
    """Give a function that runs `cache purge` on the node `here`."""
    config = tmp_path / "config.yaml"
    shared = {"url": server.url, "timeout_ms": 1000}
    config.write_text(
        json.dumps(
            {
                "server": {"node": "here"},
                "cache": {"directory": str(tmp_path / "here"), "shared": shared},
            }
        )
    )

    def run(*arguments):
        return command("cache", "purge", "--config", config, "--yes", *arguments)

    return run


def _fill(folder, server, *texts):
    """Run a node, let it keep some texts, and stop it."""

    async def fill():
        async with SwitchedClient(server.port) as client, running(Node(folder, client)) as node:
            await node.put(*texts)

    asyncio.run(fill())


def _texts(folder, server, *texts):
    """Start a node; return which texts it serves, and how many entries it has in the end."""

    async def ask():
        async with SwitchedClient(server.port) as client, running(Node(folder, client)) as node:
            found = await node.texts(*texts)
            await node.settle()
            return found, await node.on_disk()

    return asyncio.run(ask())


class _Running:
    """A node that runs in a thread of its own."""

    def __init__(self, folder: Path, server):
        self._folder, self._server = folder, server
        self._ready, self._stop = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run()))

    async def _run(self):
        async with SwitchedClient(self._server.port) as client:
            node = Node(self._folder, client)
            async with running(node):
                await node.put("a", "b", "c")
                self._ready.set()
                while not self._stop.is_set():
                    await node.settle()
                    await asyncio.sleep(0)

    def __enter__(self):
        self._thread.start()
        self._ready.wait()
        return self

    def __exit__(self, *_):
        self._stop.set()
        self._thread.join()


def test_it_says_which_nodes_have_made_it(purge, tmp_path, server):
    """One that runs is waited for; one that is stopped makes it when it starts."""
    _fill(tmp_path / "here", server, "a", "b")
    _fill(tmp_path / "away", server, "a", "b", "c", "d")
    with _Running(tmp_path / "other", server):
        done = purge("--all", "--wait", "60")
    assert done.code == 0, done.err
    assert "2 nodes have deleted it: here (2), other (3)" in done.out
    assert "away was stopped: it deletes it when it starts" in done.out
    assert _texts(tmp_path / "away", server, "a", "d") == (set(), 0)
    again = purge("--all", "--json", "--wait", "0").json
    assert {one["name"]: one["state"] for one in again["nodes"]} == {
        "here": "done",
        "away": "down",
        "other": "down",
    }


def test_what_another_node_holds_can_be_purged_here(purge, tmp_path, server):
    """A namespace that this node does not know is none of its mistakes."""
    _fill(tmp_path / "here", server, "a")
    _fill(tmp_path / "away", server, "a")
    assert purge("--namespace", "team", "--wait", "0").code == 0
    assert _texts(tmp_path / "away", server, "a") == ({"a"}, 1)
    assert purge("--namespace", "", "--wait", "0").code == 0
    assert _texts(tmp_path / "away", server, "a") == (set(), 0)


def test_without_the_server_it_is_told_later(purge, tmp_path, server):
    """It fails, for others do not know of it; the proxy of this node makes up for it."""
    _fill(tmp_path / "here", server, "a")
    _fill(tmp_path / "away", server, "a")
    server.kill()
    done = purge("--all")
    assert (done.code, "deleted on this node alone" in done.err) == (1, True)
    server.start()
    assert _texts(tmp_path / "away", server, "a") == ({"a"}, 1)
    assert _texts(tmp_path / "here", server, "a") == (set(), 0)
    assert _texts(tmp_path / "away", server, "a") == (set(), 0)


def test_a_clock_that_is_wrong_does_not_purge_what_is_bought_later(purge, tmp_path, server):
    """The purge is dated ahead by some seconds at most, and says which clock is wrong."""
    _fill(tmp_path / "here", server, "a")

    async def beat():
        node = Node(tmp_path / "away", SwitchedClient(server.port))
        async with node.client, running(node):
            node.membership.registry._clock = lambda: time.time() + 3600
            await node.settle()
            await node.settle()

    asyncio.run(beat())
    done = purge("--all", "--wait", "0")
    assert done.code == 0
    assert "the clock of away is 3," in done.err
    (logged,) = PurgeLog(tmp_path / "here" / "v1").read().purges.values()
    assert logged.at < time.time() + 10


def test_a_dry_run_tells_nobody(purge, tmp_path, server):
    """It counts here, and changes nothing anywhere."""
    _fill(tmp_path / "here", server, "a")
    assert "would be deleted" in purge("--all", "--dry-run").out
    assert PurgeLog(tmp_path / "here" / "v1").read().purges == {}
    assert _texts(tmp_path / "here", server, "a") == ({"a"}, 1)


def test_the_log_has_it_before_anything_is_deleted(purge, tmp_path, server, monkeypatch):
    """A command that is killed in between is made up for by the proxy of the node."""
    _fill(tmp_path / "here", server, "a", "b")
    monkeypatch.setattr("embedding_proxy.proxy.cli.cache_purge._delete", _killed)
    assert purge("--all").code not in (0, 2)
    (logged,) = PurgeLog(tmp_path / "here" / "v1").read().purges.values()
    assert (logged.choice, logged.is_done, logged.is_told) == (PurgeFilter(), False, True)
    assert abs(logged.at - time.time()) < 3600
    assert read_node_id(tmp_path / "here")
    assert _texts(tmp_path / "here", server, "a") == (set(), 0)


def _killed(*_):
    raise KeyboardInterrupt


def test_an_import_brings_back_what_was_purged(purge, tmp_path, server, command):
    """Whoever imports it wants it; it is as new as its import, so the purge is not about it."""
    _fill(tmp_path / "here", server, "a", "b")
    config = tmp_path / "config.yaml"
    export = ("cache", "export", tmp_path / "kept", "--config", config)
    assert command(*export).code == 0
    assert purge("--all", "--wait", "0").code == 0
    assert _texts(tmp_path / "here", server, "a", "b") == (set(), 0)
    done = command("cache", "import", tmp_path / "kept", "--config", config)
    assert "2 entries" in done.out
    assert _texts(tmp_path / "here", server, "a", "b") == ({"a", "b"}, 2)
