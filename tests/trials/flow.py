"""Large bodies through the proxy, up and down: how fast, and how much memory it takes.

    python flow.py [MEGABYTES]

The proxy is a process of its own; what is said of its memory is the peak beyond that at rest, read
from /proc (Linux). `tests/test_flow.py` does the same with less.
"""

import asyncio
import os
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import aiohttp
from aiohttp import web
from any_server import AnyServer

ROOT = Path(__file__).parents[2]
MB = 1_000_000
PIECE = bytes(range(250)) * 4000


@dataclass
class Flow:
    """What one transfer took; `grown` is in bytes."""

    moved: int
    seconds: float
    grown: int


async def _act(request: web.Request) -> web.StreamResponse:
    """Count what is uploaded, or send as many pieces as are asked for."""
    if request.method == "POST":
        size = 0
        async for part in request.content.iter_any():
            size += len(part)
        return web.Response(text=str(size))
    response = web.StreamResponse()
    await response.prepare(request)
    for _ in range(int(request.query["pieces"])):
        await response.write(PIECE)
    await response.write_eof()
    return response


@asynccontextmanager
async def serving(directory: Path, upstream: AnyServer) -> AsyncIterator[tuple[int, str]]:
    """Run the command `serve` before an upstream; give its process id and its base URL."""
    config = directory / "config.yaml"
    config.write_text(
        f"cache: {{directory: '{directory / 'cache'}'}}\n"
        f"providers: {{openai: {{base_url: '{upstream.url}'}}}}\npassthrough: openai\n"
    )
    command = [
        sys.executable,
        "-m",
        "embedding_proxy",
        "serve",
        "--port",
        "0",
        "--config",
        str(config),
    ]
    process = await asyncio.create_subprocess_exec(
        *command,
        stdout=asyncio.subprocess.PIPE,
        cwd=ROOT,
        env={**os.environ, "OPENAI_API_KEY": "flow-secret"},
    )
    try:
        line = (await process.stdout.readline()).decode().strip()
        yield process.pid, line.removeprefix("export OPENAI_BASE_URL=")
    finally:
        process.terminate()
        await process.wait()


def _memory(pid: int, field: str) -> int:
    for line in Path(f"/proc/{pid}/status").read_text(encoding="ascii").splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise LookupError(field)


def _memory_at_rest(pid: int) -> int:
    """Return what the process takes now; from here on its peak is counted anew."""
    Path(f"/proc/{pid}/clear_refs").write_text("5", encoding="ascii")
    return _memory(pid, "VmRSS")


async def measure(pid: int, url: str, pieces: int) -> tuple[Flow, Flow]:
    """Send that many pieces up, then down."""
    timeout = aiohttp.ClientTimeout(total=300)

    async def body() -> AsyncIterator[bytes]:
        for _ in range(pieces):
            yield PIECE

    async with aiohttp.ClientSession(timeout=timeout) as session:

        async def up(count: int) -> int:
            data = body() if count == pieces else PIECE
            async with session.post(f"{url}/files", data=data) as reply:
                return int(await reply.text())

        async def down(count: int) -> int:
            size = 0
            async with session.get(f"{url}/files/f/content", params={"pieces": count}) as reply:
                async for part in reply.content.iter_any():
                    size += len(part)
            return size

        flows = []
        for transfer in (up, down):
            await transfer(1)
            rest, begin = _memory_at_rest(pid), time.perf_counter()
            moved = await transfer(pieces)
            seconds = time.perf_counter() - begin
            flows.append(Flow(moved, seconds, _memory(pid, "VmHWM") - rest))
    return flows[0], flows[1]


async def _main(megabytes: int) -> None:
    with tempfile.TemporaryDirectory() as directory:
        async with AnyServer(_act) as upstream, serving(Path(directory), upstream) as (pid, url):
            for name, flow in zip(("up", "down"), await measure(pid, url, megabytes), strict=True):
                print(
                    f"{name}: {flow.moved / MB:.0f} MB in {flow.seconds:.2f} s,"
                    f" {flow.moved / MB / flow.seconds:.0f} MB/s;"
                    f" memory grew by {flow.grown / MB:.1f} MB"
                )


if __name__ == "__main__":
    asyncio.run(_main(int(sys.argv[1]) if len(sys.argv) > 1 else 100))
