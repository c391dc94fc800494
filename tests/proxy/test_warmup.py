"""Warm-up: a new node gets what others have bought, at a bounded rate, and goes on where it was."""

import asyncio
import json
import time
from contextlib import asynccontextmanager

import pytest
from embedding_proxy.cache.disk.connection import opened
from embedding_proxy.cache.disk.purge import PurgeFilter
from embedding_proxy.cache.shared import sweep, warmup
from embedding_proxy.cache.shared.purge_exchange import PurgeExchange
from embedding_proxy.cache.shared.purge_log import LoggedPurge
from embedding_proxy.cache.shared.sweep import Interrupted
from embedding_proxy.cache.shared.value import KIND
from embedding_proxy.cache.shared.warmup import Copier, WarmUp, read_state

from tests.cache.fakes import key_of
from tests.proxy.test_membership import OTHERS, SPACE, Node, running
from tests.redis_server import needs_redis, redis_server
from tests.shared_server import SwitchedClient

pytestmark = needs_redis
TEXTS = [f"text {number}" for number in range(300)]


@pytest.fixture(autouse=True)
def short_steps(monkeypatch):
    """Have several steps for few records."""
    monkeypatch.setattr(sweep, "SCAN_KEYS", 40)
    monkeypatch.setattr(warmup, "LOT", 16)


@asynccontextmanager
async def _filled(tmp_path, server):
    """Give a client, after a node has bought some texts."""
    async with SwitchedClient(server.port) as client:
        async with running(Node(tmp_path / "old", client)) as node:
            await node.put(*TEXTS)
            await node.put("team", partition=OTHERS)
        yield client


@pytest.fixture
def server():
    """Give a Redis of one's own."""
    with redis_server() as started:
        yield started


class _Pace:
    """A clock that moves when somebody sleeps."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now

    async def sleep(self, seconds):
        self.now += seconds


async def _copy(client, folder, *, steps=None, limit=1 << 30, **options):
    """Run a warm-up of a new node, or some steps of it; return its state and the pace."""
    pace = _Pace()
    options = {"max_bytes_a_s": 1e9, **options}
    with opened(folder, limit, create=True) as file:
        state = read_state(file.folder)
        copier = Copier(client, file, clock=pace, sleep=pace.sleep, **options)
        taken = 0
        async for _ in copier.run(state):
            taken += 1
            if taken == steps:
                break
        return state, pace.now


async def test_a_new_node_has_all_records(tmp_path, server):
    """With the time when they were bought and their partition; nothing is bought or asked again."""
    async with _filled(tmp_path, server) as client:
        bought_by = time.time() + 0.001  # In whole milliseconds there, rounded.
        state, _ = await _copy(client, tmp_path / "new")
        assert (state.copied, state.present, state.left_out, state.is_done) == (301, 0, 0, True)
        async with running(Node(tmp_path / "new", client)) as node:
            await client.command("FLUSHALL")
            assert await node.texts(*TEXTS) == set(TEXTS)
            assert await node.texts("team", partition=OTHERS) == {"team"}
            assert node.tiers.counters.shared_hits == 0
            old = Node(tmp_path / "old", client)
            async with old.store:
                address = key_of("text 0", SPACE).address
                (then,), (now,) = [
                    (await one.store.lookup([address])).values() for one in (old, node)
                ]
                assert now.stored <= bought_by
                assert then.record == now.record


@pytest.mark.parametrize("steps", [1, 3, 7])
async def test_an_interrupted_one_goes_on(tmp_path, server, steps):
    """What was copied is not asked for again, and the figures go on."""
    async with _filled(tmp_path, server) as client:
        first, _ = await _copy(client, tmp_path / "new", steps=steps)
        assert 0 < first.copied < 301
        state, _ = await _copy(client, tmp_path / "new")
        assert (state.copied, state.is_done) == (301, True)
        again, _ = await _copy(client, tmp_path / "new")
        assert (again.copied, again.present) == (0, 301)


async def test_a_server_that_stops_answering_interrupts_it(tmp_path, server):
    """It says so, and the next one goes on."""
    async with _filled(tmp_path, server) as client:
        first, _ = await _copy(client, tmp_path / "new", steps=2)
        client.is_off = True
        with pytest.raises(Interrupted):
            await _copy(client, tmp_path / "new")
        client.is_off = False
        state, _ = await _copy(client, tmp_path / "new")
        assert state.copied == 301
        assert first.copied < 301


async def test_the_rate_is_bounded(tmp_path, server):
    """No more bytes a second than were allowed."""
    async with _filled(tmp_path, server) as client:
        state, seconds = await _copy(client, tmp_path / "new", max_bytes_a_s=1000.0)
        assert seconds >= state.copied_bytes / 1000


async def test_what_was_purged_or_is_old_or_damaged_is_left_out(tmp_path, server):
    """Nothing comes back to a disk that way."""
    async with _filled(tmp_path, server) as client:
        purges = [
            LoggedPurge("p1", PurgeFilter(namespace="team"), time.time() + 1),
            LoggedPurge(
                "p2", PurgeFilter(address=key_of("text 7", SPACE).address), time.time() + 1
            ),
        ]
        assert await PurgeExchange(client).add(purges)
        damaged = client.key(KIND, key_of("text 9", SPACE).address)
        await client.command("SETRANGE", damaged, 60, b"\0\0\0\0\0\0\0\0")
        state, _ = await _copy(client, tmp_path / "new")
        assert (state.copied, state.left_out) == (298, 3)
        state, _ = await _copy(client, tmp_path / "aged", ttl_s=1e-6)
        assert (state.copied, state.left_out) == (0, 301)


async def test_it_ends_before_the_store_would_evict(tmp_path, server, monkeypatch):
    """A node that is smaller than the shared tier keeps what it holds."""
    async with _filled(tmp_path, server) as client:
        monkeypatch.setattr(warmup, "ROOM_BYTES", 1 << 30)
        state, _ = await _copy(client, tmp_path / "new")
        assert (state.copied, state.is_full, state.is_done) == (0, True, False)
        monkeypatch.setattr(warmup, "ROOM_BYTES", 0)
        state, _ = await _copy(client, tmp_path / "new")
        assert (state.copied, state.is_full, state.is_done) == (301, False, True)


@pytest.mark.parametrize("content", [b"", b"[]", b'{"cursors": 1}', b'{"cursors": {"a": "b"}}'])
def test_a_damaged_state_is_a_new_one(tmp_path, content):
    """Then it begins anew, and finds what is there."""
    (tmp_path / warmup.FILE_NAME).write_bytes(content)
    assert read_state(tmp_path) == WarmUp()


def test_the_command_copies_and_says_how_much(tmp_path, server, command):
    """Figures for people and for scripts; without a server it says that it goes on later."""

    async def fill():
        async with _filled(tmp_path, server):
            pass

    asyncio.run(fill())
    config = tmp_path / "config.yaml"
    shared = {"url": server.url, "timeout_ms": 1000}
    config.write_text(json.dumps({"cache": {"directory": str(tmp_path / "new"), "shared": shared}}))
    done = command("cache", "warm-up", "--config", config)
    assert done.out.startswith("301 records copied (")
    assert "0 were here already" in done.out
    again = command("cache", "warm-up", "--config", config, "--json").json
    assert (again["copied"], again["present"], again["is_done"]) == (0, 301, True)
    server.kill()
    failed = command("cache", "warm-up", "--config", config)
    assert (failed.code, "it goes on there" in failed.err) == (1, True)
