"""A provider that does as it is told, in OpenAI's format: unlike vectors for unlike inputs.

python -m bench.upstream [CALL_MS INPUT_MS [WIDTH]] — waits so long for a call, and for each of its
inputs; prints its port. GET /v1/calls tells how many inputs each call had since it was last asked.
"""

import asyncio
import base64
import hashlib
import math
import struct
import sys
from functools import cache

import orjson
import uvloop
from aiohttp import web

WIDTH = 1536
TURN = math.tau / 2**32


@cache
def zeros(width: int) -> str:
    """Return the end of a vector: of three numbers, which are sixteen characters, each is new."""
    return base64.b64encode(bytes(4 * (width - 3))).decode()


def encoded(given: object, width: int = WIDTH) -> str:
    """Return the vector of an input, of length 1: a point of a sphere."""
    digest = hashlib.blake2b(orjson.dumps(given), digest_size=8).digest()
    along, up = (number * TURN for number in struct.unpack("<2I", digest))
    numbers = math.cos(along) * math.cos(up), math.sin(along) * math.cos(up), math.sin(up)
    return base64.b64encode(struct.pack("<3f", *numbers)).decode() + zeros(width)


async def main(call_ms: float, input_ms: float, width: int) -> None:
    """Serve until killed."""
    calls: list[int] = []

    async def embed(request: web.Request) -> web.Response:
        asked = orjson.loads(await request.read())
        inputs = asked["input"]
        # One input may come alone: a text, or the ids of one.
        if isinstance(inputs, str) or isinstance(inputs[0], int):
            inputs = [inputs]
        calls.append(len(inputs))
        if wait_ms := call_ms + input_ms * len(inputs):
            await asyncio.sleep(wait_ms / 1000)
        rows = ",".join(
            f'{{"object":"embedding","index":{i},"embedding":"{encoded(given, width)}"}}'
            for i, given in enumerate(inputs)
        )
        usage = f'"usage":{{"prompt_tokens":{len(inputs)},"total_tokens":{len(inputs)}}}'
        text = f'{{"object":"list","model":"{asked["model"]}","data":[{rows}],{usage}}}'
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
    await web.TCPSite(runner, "127.0.0.1", 0, backlog=2048).start()
    print(runner.addresses[0][1], flush=True)
    await asyncio.Event().wait()


if __name__ == "__main__":
    waits = (*map(float, sys.argv[1:3]), 0.0, 0.0)
    uvloop.run(main(*waits[:2], int(*sys.argv[3:4]) or WIDTH))
