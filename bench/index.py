"""What indexing adds to a hit. Not part of `make bench`.

PYTHONPATH=.:tests python bench/index.py — two proxies, one of which indexes; hits of 1, 100 and
2,048 inputs go to the one and the other in turn. Then the same while the indexing one sends a long
backlog. Upstream and Qdrant are in this process; the width is 1536.
"""

import asyncio
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import aiohttp
import orjson
from fault_server import FaultServer
from qdrant_server import QdrantServer

MODEL = "text-embedding-3-small"
INPUTS = 2048
ROUNDS = {1: 1500, 100: 300, 2048: 30}
BACKLOG = 4000


@asynccontextmanager
async def proxy(folder: Path, upstream: str, qdrant: str | None) -> AsyncIterator[str]:
    """Run a proxy of its own process; give its address."""
    config = folder / "config.yaml"
    folder.mkdir()  # noqa: ASYNC240 - nothing else runs yet
    content = {
        "cache": {"directory": str(folder / "cache")},
        "providers": {"openai": {"base_url": upstream}},
        "index": {"qdrant": qdrant and {"url": qdrant}},
    }
    config.write_bytes(orjson.dumps(content))
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "embedding_proxy", "serve", "--port", "0", "--config", str(config)),
        stdout=subprocess.PIPE,
        env={**os.environ, "OPENAI_API_KEY": "k"},
    )
    assert process.stdout is not None  # noqa: S101
    try:
        line = (await process.stdout.readline()).decode()
        yield line.strip().removeprefix("export OPENAI_BASE_URL=")
    finally:
        process.terminate()
        await process.wait()


async def ask(session: aiohttp.ClientSession, url: str, texts: list[str]) -> float:
    """Return the seconds that a request took."""
    body = orjson.dumps({"model": MODEL, "input": texts, "encoding_format": "base64"})
    begun = time.perf_counter()
    async with session.post(f"{url}/embeddings", data=body) as response:
        content = await response.read()
        if response.status != 200:
            raise RuntimeError(content[:500])
    return time.perf_counter() - begun


async def compare(session: aiohttp.ClientSession, urls: list[str], texts: list[str]) -> None:
    """Print what hits take at each, and the ratios."""
    for count, rounds in ROUNDS.items():
        taken: list[list[float]] = [[], []]
        for number in range(rounds):
            for place in (0, 1) if number % 2 else (1, 0):
                taken[place].append(1000 * await ask(session, urls[place], texts[:count]))
        told = []
        for percent in (50, 99):
            without, indexing = (statistics.quantiles(t, n=100)[percent - 1] for t in taken)
            told.append(
                f"p{percent} {without:.2f} -> {indexing:.2f} ms, ratio {indexing / without:.2f}"
            )
        print(f"{count:5} inputs: {'; '.join(told)}", flush=True)


async def main() -> None:
    """Measure hits, at rest and while a backlog is sent."""
    texts = [f"text number {n} of the bench" for n in range(INPUTS)]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        async with (
            FaultServer() as upstream,
            QdrantServer() as qdrant,
            proxy(folder / "without", upstream.url, None) as without,
            proxy(folder / "indexing", upstream.url, qdrant.url) as indexing,
            aiohttp.ClientSession() as session,
        ):
            for url in (without, indexing):
                await ask(session, url, texts)
            await arrived(session, indexing)
            print("at rest")
            await compare(session, [without, indexing], texts)
            gate = qdrant.gate = asyncio.Event()
            for start in range(0, BACKLOG, 1000):
                more = [f"backlog {start + n}" for n in range(1000)]
                await ask(session, indexing, more)
            gate.set()
            print(f"while {BACKLOG} points are sent, by servers in this same process")
            await compare(session, [without, indexing], texts)
            await arrived(session, indexing)


async def arrived(session: aiohttp.ClientSession, url: str) -> None:
    """Wait until nothing waits."""
    while True:
        async with session.get(url.replace("/v1", "/status")) as response:
            if not (await response.json())["index"]["backlog_points"]:
                return
        await asyncio.sleep(0.2)


if __name__ == "__main__":
    asyncio.run(main())
