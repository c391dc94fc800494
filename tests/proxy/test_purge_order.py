"""Purges among nodes in any order of events: what was purged is served nowhere, the rest stays.

Nodes buy, purge, stop and start; the server goes, comes back, and loses its memory, or a part
of it; records are written to the shared tier late. Everything but the disk, the memory and the
server is the real one.
"""

import asyncio
import tempfile
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from embedding_proxy.cache.disk.purge import PurgeFilter
from embedding_proxy.cache.key import Partition
from embedding_proxy.cache.shared import purge_log
from embedding_proxy.cache.shared.node_registry import Beat, NodeName
from embedding_proxy.cache.shared.purge_exchange import PurgeState, SharedPurges
from embedding_proxy.cache.shared.purge_log import (
    LoggedPurge,
    PurgeLog,
    PurgeRecord,
    PurgeRules,
    decode,
)
from embedding_proxy.proxy.service import membership as membership_module
from embedding_proxy.proxy.service.membership import Membership
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

NAMESPACES = ("", "a")
TEXTS = (b"1", b"2", b"3")


def _partition(namespace):
    return Partition(namespace, "m", 4)


class Server:
    """What the nodes share: records, purges, and whether it answers."""

    def __init__(self):
        self.is_on = True
        self.records = {}
        self.late = []
        """Writes that have not arrived."""
        self.generation = 0
        self.purges = {}
        self.floor = 0.0
        self.number = 0
        self.last = ""
        self.save()

    def save(self):
        """Keep a snapshot."""
        state = self.generation, self.floor, self.number, self.last
        self._saved = dict(self.records), dict(self.purges), state

    def restore(self):
        """Come back with older data."""
        records, purges, state = self._saved
        self.records, self.purges = dict(records), dict(purges)
        self.generation, self.floor, self.number, self.last = state

    def empty(self):
        self.records.clear()
        self.purges.clear()
        self.generation, self.number, self.floor, self.last = self.generation + 1, 0, 0.0, ""
        self.save()


class Exchange:
    """As `PurgeExchange`, in memory."""

    def __init__(self, server):
        self._server = server

    async def poll(self):
        server = self._server
        state = PurgeState(str(server.generation), server.number, server.last)
        return state if server.is_on else None

    async def read(self):
        swept = [replace(one, is_swept=True) for one in self._server.purges.values()]
        purges = sorted(swept, key=lambda one: one.at)
        return SharedPurges(self._server.floor, purges) if self._server.is_on else None

    async def add(self, purges):
        if not self._server.is_on:
            return False
        for one in purges:
            if one.id not in self._server.purges:
                self._server.purges[one.id] = decode(one.encode())
                self._server.number += 1
                self._server.last = one.id
        return True

    async def compact(self, shared):
        if len(shared.purges) > purge_log.MAX_PURGES:
            for one in shared.purges[: len(shared.purges) - purge_log.MAX_PURGES]:
                del self._server.purges[one.id]
                self._server.floor = max(self._server.floor, one.at)

    async def swept(self, purges):
        return {one.id for one in purges} if self._server.is_on else None

    async def acknowledge(self, purge, receipt):
        return self._server.is_on


class Registry:
    """As `Registry`, of which only the time matters here."""

    def __init__(self, world):
        self._world = world

    async def beat(self):
        return Beat(1, "", self._world.now, 0.0) if self._world.server.is_on else None

    async def leave(self):
        pass

    def forget_told(self):
        pass

    async def tell_sums(self, sums, days):
        return True


class Store:
    """Records by address: partition and time. The memory before them is emptied by a purge."""

    def __init__(self, folder):
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.records = {}
        self.memory = {}
        self.on_purge = self.memory.clear

    async def announce_purge(self):
        self.on_purge()
        return True

    async def purge(self, choice, before, _):
        rules = PurgeRules([LoggedPurge("", choice, before)])
        gone = [
            address
            for address, (partition, stored) in self.records.items()
            if rules.is_purged(partition, address, stored)
        ]
        for address in gone:
            del self.records[address]
        self.on_purge()
        return len(gone)

    async def ledger(self, *_):
        return []


class Node:
    """A node: its store stays over restarts."""

    def __init__(self, world, folder):
        self._world = world
        self.store = Store(folder / "v1")
        self.membership = None

    async def start(self):
        if self.membership is not None:
            return
        self.store.memory.clear()
        self.store.on_purge = self.store.memory.clear
        budgets = SimpleNamespace(publish=_nothing)
        client = SimpleNamespace(key=lambda *_: b"")
        membership = Membership(client, self.store, budgets, NodeName("id", "name"))
        membership.exchange, membership.registry = (
            Exchange(self._world.server),
            Registry(self._world),
        )
        await membership.__aenter__()
        membership._ticking.cancel()
        with suppress(asyncio.CancelledError):
            await membership._ticking
        membership._ticking = None
        self.membership = membership
        await self.settle()

    async def stop(self):
        if self.membership is not None:
            await self.membership.__aexit__(None, None, None)
        self.membership = None

    async def settle(self):
        if self.membership is not None:
            await self.membership.tick()
            if self.membership._applying is not None:
                await self.membership._applying

    def buy(self, partition, address):
        record = partition, self._world.now
        self.store.records[address] = self.store.memory[address] = record
        self._world.server.late.append((address, record))

    def serves(self, partition, address):
        """Return when what is served was stored; None if nothing is. As `Tiers` does it."""
        found = self.store.memory.get(address)
        if found is not None and found[0] == partition:
            return found[1]
        server = self._world.server
        for records in (self.store.records, server.records if server.is_on else {}):
            known = records.get(address)
            if known is None or known[0] != partition:
                continue
            is_purged = (
                self.membership.is_purged
                if records is self.store.records
                else self.membership.is_purged_shared
            )
            if is_purged(partition, address, known[1]):
                continue
            self.store.records.setdefault(address, known)
            self.store.memory[address] = known
            return known[1]
        return None


async def _nothing(**_):
    return None


class World:
    """Three nodes and a server; time moves with each event."""

    def __init__(self, folder):
        self.now = 1000.0
        self.server = Server()
        self.nodes = [Node(self, folder / str(number)) for number in range(3)]
        self.purges = []
        self.bought = {}

    async def play(self, event):
        """Let one thing happen."""
        self.now += 1.0
        kind, number, choice, namespace, text = event
        node = self.nodes[number]
        partition, address = _partition(namespace), namespace.encode() + text
        if kind == "flush":
            self.server.empty()
        elif kind == "save":
            self.server.save()
        elif kind == "restore":
            self.server.restore()
        elif kind == "switch":
            self.server.is_on = not self.server.is_on
        elif kind == "arrive" and self.server.late and self.server.is_on:
            self.server.records.update([self.server.late.pop(number % len(self.server.late))])
        elif kind == "start":
            await node.start()
        elif kind == "stop":
            await node.stop()
        elif node.membership is not None:
            await self._play_at(kind, node, choice, partition, address)

    async def _play_at(self, kind, node, choice, partition, address):
        if kind == "buy":
            node.buy(partition, address)
            self.bought[address] = self.now
        elif kind == "ask":
            node.serves(partition, address)
        elif kind == "tick":
            await node.settle()
        elif kind == "purge":
            wanted = {
                "all": PurgeFilter(),
                "namespace": PurgeFilter(namespace=partition.namespace),
                "input": PurgeFilter(address=address),
                "old": PurgeFilter(stored_before=self.now - 5),
            }[choice]
            purge = LoggedPurge(f"p{len(self.purges)}", wanted, self.now)
            self.purges.append(purge)
            node.membership.log.change(lambda record: record.add([purge]))
            await node.store.announce_purge()

    async def end(self):
        """Let everybody hear of everything."""
        self.server.is_on = True
        for node in self.nodes:
            await node.start()
        for _ in range(3):
            for node in self.nodes:
                await node.settle()
        for write in self.server.late:
            self.server.records.update([write])


EVENTS = st.tuples(
    st.sampled_from(
        [
            *("buy", "buy", "ask", "tick", "tick", "purge", "arrive"),
            *("flush", "save", "restore", "switch", "stop", "start"),
        ]
    ),
    st.integers(0, 2),
    st.sampled_from(["all", "namespace", "input", "old"]),
    st.sampled_from(NAMESPACES),
    st.sampled_from(TEXTS),
)


@pytest.fixture(autouse=True)
def in_memory(monkeypatch):
    """Let nothing wait for a disk or for a sweep."""
    write = purge_log.atomic_file.write

    def quick(path, content):
        path.write_bytes(content)

    assert write is not quick
    monkeypatch.setattr(purge_log.atomic_file, "write", quick)

    async def claim(*_):
        return False

    monkeypatch.setattr(membership_module.sweep, "claim", claim)
    monkeypatch.setattr(membership_module, "START_S", 0.0)


def _run(events):
    async def run():
        with tempfile.TemporaryDirectory() as folder:
            world = World(Path(folder))
            for node in world.nodes:
                await node.start()
            for event in events:
                await world.play(event)
            await world.end()
            rules = PurgeRules(world.purges)
            try:
                _check(world, rules)
            finally:
                for node in world.nodes:
                    await node.stop()

    asyncio.run(run())


def _check(world, rules):
    for node in world.nodes:
        assert {one.id for one in world.purges} <= node.membership.log.read().purges.keys()
        assert not node.membership._pending
        for address, (partition, stored) in node.store.records.items():
            assert not rules.is_purged(partition, address, stored), "still on disk"
        for namespace in NAMESPACES:
            for text in TEXTS:
                partition, address = _partition(namespace), namespace.encode() + text
                stored = node.serves(partition, address)
                assert stored is None or not rules.is_purged(partition, address, stored)
    for address, stored in world.bought.items():
        # The last purchase of a text is kept, unless it was purged.
        partition = _partition("a" if address.startswith(b"a") else "")
        if not rules.is_purged(partition, address, stored):
            assert any(node.serves(partition, address) == stored for node in world.nodes)


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.lists(EVENTS, max_size=40))
def test_what_was_purged_is_served_nowhere_in_the_end(events):
    """Whatever came in between; and what was not purged is still there."""
    _run(events)


def test_an_emptied_server_and_a_node_that_was_away():
    """The node that was away comes last, and hears of it from the one that is left."""
    _run(
        [
            ("buy", 0, "all", "", b"1"),
            ("stop", 0, "all", "", b"1"),
            ("purge", 1, "all", "", b"1"),
            ("tick", 1, "all", "", b"1"),
            ("tick", 2, "all", "", b"1"),
            ("stop", 1, "all", "", b"1"),
            ("flush", 0, "all", "", b"1"),
            ("tick", 2, "all", "", b"1"),
            ("start", 0, "all", "", b"1"),
        ]
    )


def test_a_node_that_was_away_too_long_drops_all(monkeypatch):
    """Purges that everybody was let forget may have been about anything that it has."""
    monkeypatch.setattr(purge_log, "MAX_PURGES", 4)

    async def run():
        with tempfile.TemporaryDirectory() as folder:
            world = World(Path(folder))
            for node in world.nodes:
                await node.start()
            await world.play(("buy", 0, "all", "", b"1"))
            await world.nodes[0].stop()
            for _ in range(8):
                await world.play(("purge", 1, "input", "a", b"2"))
                await world.play(("tick", 1, "all", "", b""))
                await world.play(("tick", 2, "all", "", b""))
            await world.play(("buy", 2, "all", "", b"3"))
            await world.end()
            assert world.nodes[0].store.records == {}
            assert world.nodes[2].store.records.keys() == {b"3"}
            for node in world.nodes:
                assert len(node.membership.log.read().purges) <= 5
                await node.stop()

    asyncio.run(run())


@given(
    st.lists(
        st.tuples(
            st.sampled_from([None, "", "a"]),
            st.sampled_from([None, "m", "m?x=~12549ea7d2d841ef", "n"]),
            st.sampled_from([None, 10.0, 30.0]),
            st.sampled_from([None, b"1", b"2"]),
            st.floats(0, 50),
        ),
        max_size=6,
    ),
    st.sampled_from(["", "a", "b"]),
    st.sampled_from(["m", "m?x=~12549ea7d2d841ef", "n", "n?y=~12549ea7d2d841ef"]),
    st.sampled_from([b"1", b"3"]),
    st.floats(0, 50),
)
def test_rules_are_those_of_each_purge(purges, namespace, space, address, stored):
    """The rules of many purges are what each of them says by itself."""
    logged = [
        LoggedPurge(str(i), PurgeFilter(n, s, before, None, a), at)
        for i, (n, s, before, a, at) in enumerate(purges)
    ]
    rules = PurgeRules(logged)

    def is_purged_by(one):
        n, s, before, a, at = one
        if a is not None:
            is_chosen = a == address
        else:
            is_chosen = n in (None, namespace) and s in (None, space, space.partition("?")[0])
        return is_chosen and stored < min(at, at if before is None else before)

    expected = any(map(is_purged_by, purges))
    assert rules.is_purged(Partition(namespace, space, 4), address, stored) == expected


def test_a_log_that_is_damaged_is_learned_anew(tmp_path, caplog):
    """It is a copy of what the nodes know together; nobody fails for it."""
    log = PurgeLog(tmp_path)
    purge = LoggedPurge("p", PurgeFilter(namespace="a"), 5.0)
    log.change(lambda record: record.add([purge]))
    assert log.refresh()
    assert not log.refresh()
    assert log.read().purges == {"p": purge}
    log.path.write_bytes(log.path.read_bytes()[:-9])
    assert log.read() == PurgeRecord()
    assert "damaged" in caplog.text
    log.change(lambda record: record.add([purge]))
    log.mark_done("p")
    assert log.read().purges["p"].is_done
