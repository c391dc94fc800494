"""What parts side by side save, and what gathering does. Not part of `make bench`.

python bench/batches.py — T6: 2,000 misses against one direct call, at an upstream that takes 20 ms
and 1 ms an input; T5: a miss of one input against a direct call; T7: calls for 1,000 requests at
once. The upstream is a process of its own.
"""

import asyncio
import base64
import contextlib
import math
import os
import statistics
import struct
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import aiohttp
import uvloop
from aiohttp import web

MODEL = "text-embedding-3-small"
WIDTH = 1536
ROUNDS = 5


async def upstream() -> None:
    """Serve until killed: 20 ms and 1 ms an input, unlike vectors; GET tells the calls."""
    calls: list[int] = []
    # Three numbers are sixteen characters of base64, so only the first of them are made anew.
    zeros = base64.b64encode(bytes(4 * (WIDTH - 3))).decode()

    def encoded(text: str) -> str:
        angle = zlib.crc32(text.encode()) / 2**30
        head = struct.pack("<3f", math.cos(angle), math.sin(angle), 0.0)
        return base64.b64encode(head).decode() + zeros

    async def embed(request: web.Request) -> web.Response:
        inputs = (await request.json())["input"]
        inputs = [inputs] if isinstance(inputs, str) else inputs
        calls.append(len(inputs))
        await asyncio.sleep(0.020 + 0.001 * len(inputs))
        rows = ",".join(
            f'{{"object":"embedding","index":{i},"embedding":"{encoded(text)}"}}'
            for i, text in enumerate(inputs)
        )
        usage = f'"usage":{{"prompt_tokens":{len(inputs)},"total_tokens":{len(inputs)}}}'
        text = f'{{"object":"list","model":"{MODEL}","data":[{rows}],{usage}}}'
        return web.Response(text=text, content_type="application/json")

    async def told(_: web.Request) -> web.Response:
        answer = web.json_response(calls)
        calls.clear()
        return answer

    app = web.Application(client_max_size=1 << 30)
    app.router.add_post("/v1/embeddings", embed)
    app.router.add_get("/v1/calls", told)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0, backlog=2048)
    await site.start()
    print(runner.addresses[0][1], flush=True)
    await asyncio.Event().wait()


@contextlib.asynccontextmanager
async def process(*command: str, **env: str) -> AsyncIterator[str]:
    """Run a server; give the last word of the first line that it prints."""
    with subprocess.Popen(  # noqa: ASYNC220 - nothing else runs yet
        command, stdout=subprocess.PIPE, text=True, env={**os.environ, **env}
    ) as running:
        try:
            yield (running.stdout.readline() if running.stdout else "").strip()
        finally:
            running.terminate()


async def main() -> None:
    """Measure and print."""
    folder = Path(tempfile.mkdtemp())
    connector = aiohttp.TCPConnector(limit=0)
    async with (
        process(sys.executable, __file__, "upstream") as port,
        aiohttp.ClientSession(connector=connector) as session,
    ):
        up = f"http://127.0.0.1:{port}/v1"

        async def ask(url: str, inputs: object) -> float:
            start = time.perf_counter()
            body = {"model": MODEL, "input": inputs, "encoding_format": "base64"}
            async with session.post(f"{url}/embeddings", json=body) as reply:
                await reply.read()
                reply.raise_for_status()
            return time.perf_counter() - start

        async def calls() -> list[int]:
            async with session.get(f"{up}/calls") as reply:
                return list(await reply.json())

        async def median(url: str, make: Callable[[int], object], rounds: int) -> float:
            return statistics.median([await ask(url, make(i)) for i in range(rounds)])

        for gather_ms in (0, 5, 50):
            config = folder / f"{gather_ms}.yaml"
            config.write_text(
                f"server: {{port: 0, gather_ms: {gather_ms}}}\n"
                f"cache: {{directory: {folder}/{gather_ms}}}\n"
                f"providers: {{openai: {{base_url: '{up}'}}}}\n"
            )
            command = (sys.executable, "-m", "proxy", "serve", "--config", str(config))
            async with process(*command, OPENAI_API_KEY="k", PYTHONPATH=".") as line:
                ours = line.partition("OPENAI_BASE_URL=")[2]
                await ask(ours, ["first"])
                await calls()
                print(f"gather_ms {gather_ms}")
                direct = await median(up, lambda r: [f"{r} {i}" for i in range(2000)], ROUNDS)
                through = await median(ours, lambda r: [f"{r} {i}" for i in range(2000)], ROUNDS)
                await calls()
                print(
                    f"  T6  2,000 misses: direct {direct * 1e3:.0f} ms,"
                    f" ours {through * 1e3:.0f} ms, {direct / through:.2f} × faster"
                )
                direct = await median(up, lambda i: [f"one {i}"], 200)
                through = await median(ours, lambda i: [f"one {i}"], 200)
                await calls()
                added = (through - direct) * 1e3
                print(f"  T5  one miss: direct {direct * 1e3:.2f} ms, {added:+.2f} ms through us")
                start = time.perf_counter()
                await asyncio.gather(*(ask(ours, "same") for _ in range(1000)))
                same = await calls()
                print(f"  T7  1,000 same: {len(same)} calls, {time.perf_counter() - start:.2f} s")
                start = time.perf_counter()
                await asyncio.gather(*(ask(ours, f"own {i}") for i in range(1000)))
                own = await calls()
                print(
                    f"      1,000 different: {len(own)} calls of {own[:20]}…,"
                    f" {time.perf_counter() - start:.2f} s"
                )


if __name__ == "__main__":
    uvloop.run(upstream() if sys.argv[1:] == ["upstream"] else main())
