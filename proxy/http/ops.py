"""What operators' tools ask: is the process alive, does it take requests, what does it serve."""

from functools import cache
from pathlib import Path

from aiohttp import web

DESCRIPTION_PATH = "/openapi.json"
OPEN_PATHS = frozenset({"/livez", "/readyz", DESCRIPTION_PATH})
"""Answered without a key: probes have none, and the description is that of every installation."""


async def live(_: web.Request) -> web.Response:
    """Answer 200 as long as the event loop turns."""
    return web.json_response({"status": "ok"})


async def ready(_: web.Request) -> web.Response:
    """Answer 200: the store was opened before the port was. It never depends on a provider."""
    return web.json_response({"status": "ok"})


async def describe(_: web.Request) -> web.Response:
    """Answer with the OpenAPI description of the proxy's own routes."""
    return web.Response(body=description(), content_type="application/json")


@cache
def description() -> bytes:
    """Return the OpenAPI description: the file `openapi.json` beside this one, as it stands."""
    return Path(__file__).with_name("openapi.json").read_bytes()
