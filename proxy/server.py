"""Runs the application on a port, and stops it without dropping a request."""

import asyncio
import logging
import signal
from collections.abc import Callable

from aiohttp import web

from .app import build_app
from .connection import Runner
from .settings import Settings

log = logging.getLogger("embedding_proxy.server")

GRACE_SECONDS = 30.0
"""How long requests in progress may take after the signal to stop."""


class PortUnavailable(Exception):
    """The address cannot be listened on; the message says which and why."""


async def serve(settings: Settings, announce: Callable[[str], None]) -> None:
    """Serve until SIGINT or SIGTERM. `announce` gets the base URL once requests are answered.

    Raises PortUnavailable, StoreError.
    """
    app = build_app(settings)
    # The log of accesses would cost as much as a hit; what matters is in the reply's headers.
    runner = Runner(app, access_log=None, shutdown_timeout=GRACE_SECONDS)
    await runner.setup()
    try:
        host, port = settings.server.host, settings.server.port
        site = web.TCPSite(runner, host, port, reuse_address=True)
        try:
            await site.start()
        except OSError as error:
            reason = error.strerror or str(error)
            raise PortUnavailable(f"cannot listen on {host}:{port}: {reason}") from error
        stop = asyncio.Event()
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, stop.set)
        announce(_url(runner, host))
        await stop.wait()
        # A second signal ends the process at once.
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.remove_signal_handler(number)
        log.info("stopping: requests in progress are finished first")
    finally:
        await runner.cleanup()


def _url(runner: web.AppRunner, host: str) -> str:
    """Return the base URL for clients, with the port that was really taken."""
    port = runner.addresses[0][1]
    shown = f"[{host}]" if ":" in host else host
    return f"http://{shown}:{port}/v1"
