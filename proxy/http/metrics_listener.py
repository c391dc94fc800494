"""Serves metrics and probes at a second address, without a key: `server.metrics_listen`.

It is for Prometheus in a network that nobody else reaches. All workers accept connections on one
socket; whichever answers tells the sums of all.
"""

import socket
from collections.abc import AsyncIterator

from aiohttp import web
from aiohttp.typedefs import Handler

from . import status
from .app_runner import Runner
from .middleware import METRICS_PATH

GRACE_S = 1.0
"""For a scrape to end when the proxy stops."""


class MetricsListener:
    """Answers on a socket that listens already, for as long as an application runs."""

    def __init__(self, listening: socket.socket, metrics: Handler) -> None:
        """`metrics` answers with the metrics."""
        self._listening = listening
        self._metrics = metrics

    async def run(self, app: web.Application) -> AsyncIterator[None]:
        """Answer until the application ends; the socket stays open for its successor."""
        own = web.Application()
        own[status.READINESS] = app[status.READINESS]
        own.router.add_get(METRICS_PATH, self._metrics)
        own.router.add_get("/readyz", status.ready)
        for path in status.LIVE_PATHS:
            own.router.add_get(path, status.live)
        runner = Runner(own, shutdown_timeout=GRACE_S)
        await runner.setup()
        try:
            await runner.listen(self._listening.dup())
            yield
        finally:
            await runner.cleanup()
