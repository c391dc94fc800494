"""T17: hits of the shared tier, of 1 and 2,000 inputs, beside those of the disk.

A redis-server of its own holds what the store holds. One proxy has the store and no memory; another
one has neither, and is started anew before everything has come to its own disk.
"""

import shutil
import socket
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import uvloop
from embedding_proxy.cache.shared.address import RedisOptions, parse
from embedding_proxy.cache.shared.client import Command, RedisClient
from embedding_proxy.cache.shared.value import KIND, pack

from .client import Client
from .material import RING, Made, asking, make, prove, say
from .process import LOADING, on, proxy
from .table import Row

KNOWN = 10_000
BULK = 2_000
BULKS_A_ROUND = 3
SINGLES_A_ROUND = 1_000
WARM_UPS = 20
COPY_S = 0.5
PATIENCE_S = 30.0
TIMEOUT_MS = 1000
"""Of the tier: whoever else uses the machine must not turn hits into misses."""


def rows(folder: Path, rounds: int, wanted: Callable[[str], bool]) -> Iterator[Row]:
    """Measure what is wanted, where there is a redis-server."""
    if not wanted("T17"):
        return
    if shutil.which("redis-server") is None:
        say("T17 is left out: there is no redis-server")
        return
    say("T17 hits of the shared tier beside the disk's")
    with redis_server() as url:
        made = uvloop.run(make(folder / "shared-known", KNOWN))
        uvloop.run(fill(url))
        yield from compared(folder, made, url, rounds)


@contextmanager
def redis_server() -> Iterator[str]:
    """Run a server that keeps nothing on disk; give its address."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    with on(LOADING):
        process = subprocess.Popen(
            ["redis-server", "--port", str(port), "--bind", "127.0.0.1", "--save", ""],  # noqa: S607
            stdout=subprocess.DEVNULL,
        )
    try:
        yield f"redis://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait()


async def fill(url: str) -> None:
    """Write all known inputs to the server, once it answers. Raises RuntimeError."""
    options = RedisOptions(parse(url), limit_s=PATIENCE_S)
    async with RedisClient(options) as client:
        while not client.is_available:
            await client.nodes[client.name].open()
        for first in range(0, KNOWN, BULK):
            records = RING.records(range(first, first + BULK))
            now = time.time()
            values = {client.key(KIND, a): pack(r, now, RING.partition) for a, r in records.items()}
            sets = [Command(key, (b"SET", key, value or b"")) for key, value in values.items()]
            if await client.exchange(sets) != [b"OK"] * len(sets):
                raise RuntimeError("the server takes no records")


def compared(folder: Path, made: Made, url: str, rounds: int) -> Iterator[Row]:
    """Ask both proxies in turns, each input once."""
    times: dict[str, tuple[list[float], list[float]]] = {"one": ([], []), "bulk": ([], [])}
    cpu: dict[str, list[float]] = {"one": [0.0, 0.0], "bulk": [0.0, 0.0]}
    shared = {"url": url, "timeout_ms": TIMEOUT_MS}
    with proxy(made.directory, memory_mib=0) as disk:
        for number in range(rounds):
            numbers = made.some(KNOWN)
            with (
                proxy(folder / f"shared-{number}", shared=shared) as other,
                Client(disk, 1) as first,
                Client(other, 1) as second,
            ):
                prove(other, [numbers.pop() for _ in range(WARM_UPS)])
                for _ in range(WARM_UPS):
                    request = asking(numbers.pop())
                    first.ask(request)
                    second.ask(request)
                for kind, count, size in (
                    ("one", SINGLES_A_ROUND, 1),
                    ("bulk", BULKS_A_ROUND, BULK),
                ):
                    for _ in range(count):
                        some = [numbers.pop() for _ in range(size)]
                        request = asking(some if size > 1 else some[0])
                        before = disk.cpu_seconds, other.cpu_seconds
                        times[kind][0].append(first.ask(request))
                        times[kind][1].append(second.ask(request))
                        if kind == "bulk":
                            # What came is written to the node's own disk a moment after the reply.
                            time.sleep(COPY_S)
                        cpu[kind][0] += disk.cpu_seconds - before[0]
                        cpu[kind][1] += other.cpu_seconds - before[1]
    for kind, what, most in (
        ("one", "one input, shared hit, added to a disk hit", 1.0),
        ("bulk", "2,000 inputs base64, shared hits, added to disk hits", 30.0),
    ):
        on_disk, on_shared = times[kind]
        figures = {
            "shared_ms": 1e3 * statistics.median(on_shared),
            "disk_ms": 1e3 * statistics.median(on_disk),
            "shared_p99_ms": 1e3 * statistics.quantiles(on_shared, n=100)[98],
            "disk_p99_ms": 1e3 * statistics.quantiles(on_disk, n=100)[98],
        }
        # The copies to the node's own disk are in it.
        figures["shared_cpu_ms"] = 1e3 * cpu[kind][1] / len(on_shared)
        figures["disk_cpu_ms"] = 1e3 * cpu[kind][0] / len(on_disk)
        value = figures["shared_ms"] - figures["disk_ms"]
        yield Row(target="T17", what=what, value=value, unit="ms", most=most, figures=figures)
