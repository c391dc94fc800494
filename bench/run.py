"""The figures of this machine against their targets, as ratios of one run. `make bench`.

python bench/run.py [--only hits|store] [--entries N] [--json]

Here: cache hits against the limit of the stack; `store` has what depends on the store's size. Both
servers run as processes of their own; rounds alternate between them, so that a change in the
machine's speed falls on both; medians are compared. The load comes from raw sockets in this
process, which competes for the same cores, for both alike.
"""

import argparse
import asyncio
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import store
import uvloop
from common import PROC, Row, print_table, processors, proxy, request, server

MODEL = "wordllama-embed"
ROUNDS = 7
BENCH = Path(__file__).parent


@dataclass(frozen=True)
class Case:
    """A load: `requests` of `inputs` each per round, over `connections`."""

    name: str
    inputs: int
    encoding: str
    requests: int
    connections: int
    target: str
    most: float
    """Times the bare server's time."""


CASES = (
    Case("1 input, memory hit", 1, "base64", 4000, 16, "T1", 1.0),
    Case("2,000 inputs, base64", 2000, "base64", 10, 1, "T3", 1.0),
    Case("2,000 inputs, floats", 2000, "float", 5, 1, "T4", 1.8),
)


def request_of(case: Case) -> bytes:
    """Return the whole HTTP request of a case."""
    texts = [f"input {i} of the bench" for i in range(case.inputs)]
    return request(MODEL, texts, case.encoding)


async def exchange(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, request: bytes
) -> int:
    """Send one request, read the whole reply, and return the length of its body."""
    writer.write(request)
    head = (await reader.readuntil(b"\r\n\r\n")).lower()
    if not head.startswith(b"http/1.1 200"):
        raise RuntimeError(head.decode())
    if b"content-length: " in head:
        length = int(head.split(b"content-length: ")[1].split(b"\r\n")[0])
        await reader.readexactly(length)
        return length
    length = 0
    while size := int(await reader.readuntil(b"\r\n"), 16):
        await reader.readexactly(size + 2)
        length += size
    await reader.readexactly(2)
    return length


async def load(port: int, case: Case, count: int) -> float:
    """Make `count` requests and return the seconds one took, all connections together."""
    request = request_of(case)

    async def client(requests: int) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1 << 24)
        for _ in range(requests):
            await exchange(reader, writer, request)
        writer.close()

    start = time.perf_counter()
    await asyncio.gather(*(client(count // case.connections) for _ in range(case.connections)))
    return (time.perf_counter() - start) / count


async def size_of(port: int, case: Case) -> int:
    """Fill the cache, and return the size of the reply."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1 << 24)
    size = await exchange(reader, writer, request_of(case))
    writer.close()
    return size


async def measure(case: Case, port: int) -> Row:
    """Return the ratio of the medians of both servers."""
    size = await size_of(port, case)
    with server([sys.executable, str(BENCH / "bare.py"), str(size)], "") as bare:
        times: dict[int, list[float]] = {port: [], bare.port: []}
        for target in times:
            await load(target, case, case.connections)
        for _ in range(ROUNDS):
            for target, taken in times.items():
                taken.append(await load(target, case, case.requests))
    ours, limit = (statistics.median(taken) for taken in times.values())
    figures = {
        "proxy_ms": round(ours * 1e3, 4),
        "bare_ms": round(limit * 1e3, 4),
        "reply_bytes": size,
    }
    return Row(case.name, ours / limit, "×", figures, case.target, case.most)


def hits() -> list[Row]:
    """Run all cases."""
    with tempfile.TemporaryDirectory() as folder, proxy(Path(folder) / "hits") as running:
        return [uvloop.run(measure(case, running.port)) for case in CASES]


def main() -> None:
    """Run what was asked for; print a table, or JSON with --json."""
    parser = argparse.ArgumentParser(description="The figures of this machine, and their targets.")
    parser.add_argument("--only", choices=("hits", "store"), help="half of it")
    parser.add_argument(
        "--entries", type=int, default=store.LARGE, help="of the large store (default: %(default)s)"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    asked = parser.parse_args()
    if asked.entries < store.FEWEST:
        parser.error(f"--entries: at least {store.FEWEST}")
    if asked.only != "hits" and not PROC.exists():
        parser.error("the store's half needs Linux's /proc: --only hits")
    before, load_before = processors(), os.getloadavg()[0]
    rows = [] if asked.only == "store" else hits()
    rows += [] if asked.only == "hits" else store.rows(asked.entries)
    passed, busy, own = (b - a for a, b in zip(before, processors(), strict=True))
    machine = {
        "python": platform.python_version(),
        "cores": os.cpu_count(),
        "seconds": round(passed),
        "load_before": round(load_before, 2),
        "cores_used_by_others": round(max(0, busy - own) / passed, 2),
    }
    if asked.json:
        print(json.dumps({**machine, "rows": [row.as_json() for row in rows]}, indent=2))
        return
    print("  ".join(f"{name} {value}" for name, value in machine.items()))
    print_table(rows)


if __name__ == "__main__":
    main()
