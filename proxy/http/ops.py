"""What operators' tools ask: whether the process is alive, and whether it takes requests."""

from aiohttp import web

OPEN_PATHS = frozenset({"/livez", "/readyz"})
"""Answered without a key: probes have none."""


async def live(_: web.Request) -> web.Response:
    """Answer 200 as long as the event loop turns."""
    return web.json_response({"status": "ok"})


async def ready(_: web.Request) -> web.Response:
    """Answer 200: the store was opened before the port was. It never depends on a provider."""
    return web.json_response({"status": "ok"})
