"""Real nodes with one real Redis, and what the simulation says of the same requests. `make nodes`.

python -m bench.nodes [--nodes 1,2,3] [--texts N] [--inputs N] [--records]

Each node is a proxy with a folder of its own. One request after the other goes to the node that the
simulation has drawn for it, with one input and a body that was never sent before. So the machine's
cores are not the bound: hits, bytes and processor time are what is measured, not requests a second.

--records  measures what a record takes in Redis instead
--costs    measures the processor time of an input by the tier that answers, alone and in lists
"""

import argparse
import asyncio
import http.client
import itertools
import json
import os
import re
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path

import uvloop
from embedding_proxy.cache.record import Entry
from embedding_proxy.cache.shared.address import RedisOptions, parse
from embedding_proxy.cache.shared.client import RedisClient
from embedding_proxy.cache.shared.tier import SharedTier

from .client import HIT, Client
from .material import RING, TOKENS, VECTOR_BYTES, asking, make, prove, say
from .process import CLIENT_KEY, LOADING, Server, cpu_seconds, on, proxy, upstream
from .record import Machine
from .scale_simulation import COSTS, GIB, MIB, TIERS, Costs, Fleet, Workload, draw, simulate
from .table import number

RECORDS = (10_000, 100_000)
LOT = 500
ADMIN = {"keys": [{"key": CLIENT_KEY, "name": "bench", "admin": True}]}
SINGLES, BULK, BULKS, CONNECTIONS = 2_000, 2_000, 3, 16
MISS = b"\r\nx-cache: miss"
TIMEOUT_MS = 1000
"""For the shared tier: on a machine that others use, Redis does not answer within the usual 5."""
SETTLE_SECONDS = 3.0
"""Until a node has written in the background what it has bought, and its leases in the shared tier
have expired."""
HEADINGS = ("nodes", "shared, MB", "", *TIERS, "disk entries", "shared entries")
LOOKUP = re.compile(r'^embedding_proxy_cache_lookups_total\{result="(\w+)"\} (\S+)$', re.MULTILINE)
ENTRIES = re.compile(r"^embedding_proxy_cache_entries(?:\{[^}]*\})? (\S+)$", re.MULTILINE)


@dataclass(frozen=True)
class Redis:
    """A server that runs."""

    port: int
    pid: int

    @property
    def url(self) -> str:
        """Its address."""
        return f"redis://127.0.0.1:{self.port}"

    def info(self) -> dict[str, float]:
        """Return what INFO tells in numbers."""
        with socket.create_connection(("127.0.0.1", self.port)) as talk:
            talk.sendall(b"*2\r\n$4\r\nINFO\r\n$3\r\nall\r\n")
            reader = talk.makefile("rb")
            text = reader.read(int(reader.readline()[1:])).decode()
        # `db0:keys=…` is the number of keys.
        figures = r"^(\w+):(?:keys=)?(\d+(?:\.\d+)?)(?:,.*)?\r?$"
        found = re.findall(figures, text, re.MULTILINE)
        return {name: float(value) for name, value in found}


@contextmanager
def redis(max_bytes: float = 0) -> Iterator[Redis]:
    """Run a Redis that keeps nothing on disk, and at its limit drops what was used longest ago."""
    program = shutil.which("redis-server") or shutil.which("valkey-server")
    if program is None:
        raise SystemExit("bench: there is no redis-server")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    command = [program, "--bind", "127.0.0.1", "--port", str(port), "--save", ""]
    command += ["--appendonly", "no", "--maxmemory", str(int(max_bytes))]
    command += ["--maxmemory-policy", "allkeys-lru"]
    with on(LOADING):
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, cwd="/")
    running = Redis(port, process.pid)
    try:
        while True:
            with suppress(OSError):
                running.info()
                break
            time.sleep(0.01)
        yield running
    finally:
        process.terminate()
        process.wait()


async def put(running: Redis, numbers: Sequence[int], *, is_float16: bool = False) -> None:
    """Write records into a Redis, as a node does."""
    options = RedisOptions(parse(running.url), limit_s=1.0)
    async with SharedTier(RedisClient(options), is_float16=is_float16) as tier:
        for start in range(0, len(numbers), LOT):
            keys = [RING.key(f"text {n}") for n in numbers[start : start + LOT]]
            entries = {
                key.address: Entry(RING.vector(n), TOKENS, counted=True, digest=key.digest)
                for n, key in zip(numbers[start:], keys, strict=False)
            }
            tier.put(entries, RING.partition)
            await tier.flush()
        if tier.counters.writes != len(numbers):
            raise RuntimeError(f"{tier.counters} are not {len(numbers)} records")


def record_lines() -> Iterator[tuple[str, ...]]:
    """Yield what a record takes in Redis, by how many there are."""
    yield ("vectors", "records", "bytes a record", "resident bytes a record", "bytes a byte")
    for name, is_float16, size in (
        ("float32", False, VECTOR_BYTES),
        ("float16", True, VECTOR_BYTES // 2),
    ):
        for count in RECORDS:
            with redis() as running:
                before = running.info()
                asyncio.run(put(running, range(count), is_float16=is_float16))
                after = running.info()
            each, resident = (
                (after[key] - before[key]) / count for key in ("used_memory", "used_memory_rss")
            )
            yield name, number(count), number(each), number(resident), number(each / size)


def cost_lines(folder: Path) -> Iterator[tuple[str, ...]]:
    """Yield the processor time of an input in a node, by the tier that answers."""
    singles = range(SINGLES)
    lists = [range(n, n + BULK) for n in range(SINGLES, SINGLES + BULKS * BULK, BULK)]
    yield (
        "tier",
        "alone, µs",
        f"in lists of {BULK:,}, µs",
        "Redis alone, µs",
        "Redis in lists, µs",
    )
    with ExitStack() as stack:
        provider = stack.enter_context(upstream())
        running = stack.enter_context(redis())

        def costs(node: Server, expects: bytes = HIT) -> tuple[str, ...]:
            """Ask for all, first alone, then in lists."""
            found = []
            for inputs, connections, requests in (
                (1, CONNECTIONS, [asking(n, user=f"{next(users):09}") for n in singles]),
                (BULK, 1, [asking(some, user=f"{next(users):09}") for some in lists]),
            ):
                before = cpu_seconds(running.pid)
                with Client(node, connections, expects=expects) as client:
                    taken = client.load(requests)
                time.sleep(SETTLE_SECONDS)
                spent = (cpu_seconds(running.pid) - before) / len(requests)
                found.append((1e6 * taken.cpu_seconds / inputs, 1e6 * spent / inputs))
            (alone, redis_alone), (listed, redis_listed) = found
            return tuple(map(number, (alone, listed, redis_alone, redis_listed)))

        users = itertools.count()
        shared = {"url": running.url, "timeout_ms": TIMEOUT_MS}
        with proxy(folder / "first", provider=provider, shared=shared) as node:
            yield "provider", *costs(node, MISS)
            yield "memory", *costs(node)
        with proxy(folder / "first", memory_mib=0, shared=shared) as node:
            yield "disk", *costs(node)
        with proxy(folder / "second", shared=shared) as node:
            yield "shared", *costs(node)
    made = uvloop.run(make(folder / "known", 1))
    with proxy(made.directory) as node:
        sizes = [prove(node, [0], encoding) for encoding in ("base64", "float")]
    say("the body of a reply with one vector: {:,} bytes in base64, {:,} as floats".format(*sizes))


def counted(node: Server) -> tuple[dict[str, float], float]:
    """Return how many inputs each tier of a node has answered, and its entries on disk."""
    client = http.client.HTTPConnection("127.0.0.1", node.port)
    client.request("GET", "/metrics", headers={"Authorization": f"Bearer {CLIENT_KEY}"})
    text = client.getresponse().read().decode()
    client.close()
    entries = ENTRIES.search(text)
    return (
        {name: float(value) for name, value in LOOKUP.findall(text)},
        float(entries[1]) if entries else 0.0,
    )


def bought(provider: Server) -> int:
    """Return how many inputs a provider has sold since it was last asked."""
    client = http.client.HTTPConnection("127.0.0.1", provider.port)
    client.request("GET", "/v1/calls")
    calls = json.loads(client.getresponse().read())
    client.close()
    return sum(calls)


@dataclass(frozen=True)
class Measured:
    """What became of a run."""

    inputs: tuple[float, float, float, float]
    """By the tier that answered."""
    disk_entries: float
    shared_entries: float
    figures: Mapping[str, float]


def run(folder: Path, load: Workload, fleet: Fleet) -> Measured:
    """Ask real nodes for a workload, one input after the other."""
    requests = draw(load, fleet.nodes).tolist()
    with ExitStack() as stack:
        provider = stack.enter_context(upstream())
        running = stack.enter_context(redis(fleet.shared)) if fleet.shared else None
        shared = {"shared": {"url": running.url, "timeout_ms": TIMEOUT_MS}} if running else {}
        nodes = [
            stack.enter_context(
                proxy(
                    folder / f"node-{place}",
                    provider=provider,
                    section=ADMIN,
                    memory_mib=int(fleet.memory / MIB),
                    size_limit_gib=fleet.disk / GIB,
                    **shared,
                )
            )
            for place in range(fleet.nodes)
        ]
        clients = [stack.enter_context(Client(node, 1, expects=b"")) for node in nodes]
        before = running.info() if running else {}
        cpu = [cpu_seconds(node.pid) for node in nodes]
        redis_cpu = cpu_seconds(running.pid) if running else 0.0
        for place, (text, slot) in enumerate(requests):
            clients[slot].ask(asking(text, user=f"{place:09}"))
        node_us = 1e6 * sum(
            cpu_seconds(node.pid) - was for node, was in zip(nodes, cpu, strict=True)
        )
        # Each node writes to the shared tier in the background.
        time.sleep(SETTLE_SECONDS)
        after = running.info() if running else {}
        redis_us = 1e6 * (cpu_seconds(running.pid) - redis_cpu) if running else 0.0
        results, entries = zip(*map(counted, nodes), strict=True)
        sold = bought(provider)
    tiers = [sum(one.get(name, 0.0) for one in results) for name in TIERS[:3]]
    sent = (
        sum(
            after[f"total_net_{way}_bytes"] - before[f"total_net_{way}_bytes"]
            for way in ("input", "output")
        )
        if running
        else 0.0
    )
    return Measured(
        (tiers[0], tiers[1], tiers[2], float(sold)),
        max(entries),
        after.get("db0", 0.0),
        {
            "node CPU, µs an input": node_us / len(requests),
            "Redis CPU, µs an exchange": redis_us / max(tiers[2] + sold, 1.0),
            "bytes an exchange": sent / max(tiers[2] + sold, 1.0),
            "Redis memory, MB": after.get("used_memory", 0.0) / 1e6,
        },
    )


def node_lines(load: Workload, fleets: Sequence[Fleet], costs: Costs) -> Iterator[tuple[str, ...]]:
    """Yield what the simulation says of each fleet, and what was measured."""
    yield (*HEADINGS, "")
    for fleet in fleets:
        said = simulate(load, fleet, costs, sample=load.texts)
        with tempfile.TemporaryDirectory(prefix="bench-") as name:
            found = run(Path(name), load, fleet)
        head = str(fleet.nodes), number(fleet.shared / 1e6)
        for who, one, more in (
            ("simulated", said, {}),
            ("measured", found, found.figures),
        ):
            figures = ", ".join(f"{key} {number(value)}" for key, value in more.items())
            counts = (*one.inputs, one.disk_entries, one.shared_entries)
            yield (*head, who, *(f"{count:,.0f}" for count in counts), figures)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description="Nodes with a shared tier, and their simulation.")
    parser.add_argument("--nodes", default="1,2,3")
    parser.add_argument("--texts", type=int, default=10_000)
    parser.add_argument("--inputs", type=int, default=30_000)
    parser.add_argument("--memory-mib", type=int, default=8)
    parser.add_argument("--disk-mb", type=float, default=1000)
    parser.add_argument(
        "--disk-entries",
        type=float,
        help="that fit there, for the simulation: of a small disk the log takes a part",
    )
    parser.add_argument("--shared-mb", default="0,200")
    parser.add_argument("--records", action="store_true", help="what a record takes in Redis")
    parser.add_argument("--costs", action="store_true", help="processor time by tier")
    asked = parser.parse_args(arguments)
    machine = Machine()
    load = Workload(asked.texts, asked.inputs)
    fleets = [
        Fleet(
            int(nodes),
            memory=asked.memory_mib * MIB,
            disk=asked.disk_mb * 1e6,
            shared=float(size) * 1e6,
        )
        for nodes in asked.nodes.split(",")
        for size in asked.shared_mb.split(",")
    ]
    costs = COSTS
    if asked.disk_entries:
        costs = replace(COSTS, disk_bytes=asked.disk_mb * 1e6 / asked.disk_entries)
    os.sched_setaffinity(0, LOADING)
    with tempfile.TemporaryDirectory(prefix="bench-") as name:
        if asked.records:
            lines = record_lines()
        elif asked.costs:
            lines = cost_lines(Path(name))
        else:
            lines = node_lines(load, fleets, costs)
        for place, line in enumerate(lines):
            print(f"| {' | '.join(line)} |", flush=True)
            if not place:
                print(f"| {' | '.join(['---'] * len(line))} |")
    about = machine.told(1)
    say(", ".join(f"{name} {about[name]}" for name in ("date", "cpu", "cores", "commit")))
    say(f"{about['cores_used_by_others']} cores used by others")


if __name__ == "__main__":
    main()
