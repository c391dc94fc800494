"""What operators' tools ask: is the process alive, does it take requests, what does it serve."""

from functools import cache
from importlib.metadata import version
from pathlib import Path

import orjson
from aiohttp import web

from .caller import CALLER

LIVE_PATHS = ("/livez", "/healthz", "/health")
"""Other tools' names for the first lead to the same answer."""
DESCRIPTION_PATH = "/openapi.json"
OPEN_PATHS = frozenset({*LIVE_PATHS, "/readyz", DESCRIPTION_PATH})
"""Answered without a key: probes have none, and the description is that of every installation."""
ROOT = "/"
"""Answered without a key, too: whoever opens the address in a browser sends none."""

_PLACES = {
    "embeddings": "POST /v1/embeddings",
    "models": "GET /v1/models",
    "status": "GET /status",
    "metrics": "GET /metrics",
    "probes": "GET /livez, GET /readyz",
    "description": "GET /openapi.json",
}


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


async def root(request: web.Request) -> web.Response:
    """Answer with what this is and where to look, as JSON that people can read.

    The version is for those who may use the proxy: for others it would be a hint at its faults.
    """
    caller = request.get(CALLER)
    content: dict[str, object] = {"name": "embedding-proxy"}
    if caller is not None:
        content["version"] = version("embedding-proxy")
    else:
        content["key"] = "send one of this proxy's keys as `Authorization: Bearer KEY`"
    content["base_url"] = "this address, with /v1 appended"
    content["routes"] = _PLACES
    body = orjson.dumps(content, option=orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE)
    return web.Response(body=body, content_type="application/json", charset="utf-8")
