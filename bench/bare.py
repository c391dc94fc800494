"""The limit of the stack: an aiohttp application that reads the body and answers constant bytes.

python -m bench.bare BYTES — answers every POST with that many bytes; prints its port.
"""

import asyncio
import sys

import uvloop
from aiohttp import web


async def main(size: int) -> None:
    """Serve until killed."""
    body = b"x" * size

    async def answer(request: web.Request) -> web.Response:
        await request.read()
        return web.Response(body=body, content_type="application/json")

    app = web.Application(client_max_size=1 << 30)
    app.router.add_post("/v1/embeddings", answer)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    print(runner.addresses[0][1], flush=True)
    await asyncio.Event().wait()


if __name__ == "__main__":
    uvloop.run(main(int(sys.argv[1])))
