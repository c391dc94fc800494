"""Cache hits against the limit of the stack, as ratios of one run. `make bench`.

Both servers run as processes of their own; rounds alternate between them, so that a change in the
machine's speed falls on both; medians are compared. The load comes from raw sockets in this
process, which competes for the same cores, for both alike.
"""

import asyncio
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import uvloop

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


CASES = (
    Case("1 input, memory hit", 1, "base64", 4000, 16),
    Case("2,000 inputs, base64", 2000, "base64", 10, 1),
    Case("2,000 inputs, floats", 2000, "float", 5, 1),
)


@contextmanager
def server(command: list[str], prefix: str) -> Iterator[int]:
    """Run a server and give its port, which it prints behind `prefix`."""
    environment = {**os.environ, "OPENAI_API_KEY": "", "OPENROUTER_API_KEY": ""}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment
    ) as process:
        line = process.stdout.readline().strip()
        try:
            yield int(line.removeprefix(prefix).removesuffix("/v1"))
        finally:
            process.terminate()


def request_of(case: Case) -> bytes:
    """Return the whole HTTP request of a case."""
    texts = [f"input {i} of the bench" for i in range(case.inputs)]
    fields = {"model": MODEL, "input": texts, "encoding_format": case.encoding}
    body = json.dumps(fields).encode()
    head = (
        "POST /v1/embeddings HTTP/1.1",
        "Host: bench",
        "Content-Type: application/json",
        f"Content-Length: {len(body)}",
    )
    return "\r\n".join(head).encode() + b"\r\n\r\n" + body


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


async def measure(case: Case, port: int) -> dict[str, object]:
    """Return the medians of both servers and their ratio."""
    size = await size_of(port, case)
    with server([sys.executable, str(BENCH / "bare.py"), str(size)], "") as bare:
        times: dict[int, list[float]] = {port: [], bare: []}
        for target in times:
            await load(target, case, case.connections)
        for _ in range(ROUNDS):
            for target, taken in times.items():
                taken.append(await load(target, case, case.requests))
    ours, limit = statistics.median(times[port]), statistics.median(times[bare])
    return {
        "case": case.name,
        "reply_bytes": size,
        "proxy_ms": round(ours * 1e3, 4),
        "bare_ms": round(limit * 1e3, 4),
        "time_ratio": round(ours / limit, 2),
    }


def main() -> None:
    """Run all cases; print a table, or JSON with --json."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        config = folder / "config.yaml"
        config.write_text(f"cache: {{directory: {folder}}}\n")
        command = [sys.executable, "-m", "proxy", "serve", "--port", "0", "--config", str(config)]
        port = stack.enter_context(server(command, "export OPENAI_BASE_URL=http://127.0.0.1:"))
        rows = [uvloop.run(measure(case, port)) for case in CASES]
    if "--json" in sys.argv:
        print(json.dumps({"python": platform.python_version(), "rows": rows}, indent=2))
        return
    print(f"{'case':24} {'proxy':>12} {'bare':>12} {'time ratio':>11}")
    for row in rows:
        proxy, bare = (f"{row[key]:.3f} ms" for key in ("proxy_ms", "bare_ms"))
        print(f"{row['case']:24} {proxy:>12} {bare:>12} {row['time_ratio']:>10} ×")


if __name__ == "__main__":
    main()
