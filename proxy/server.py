"""Runs the application on a port, and stops it without dropping a request."""

import asyncio
import logging
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from aiohttp import web

from .app import build_app
from .connection import Runner
from .settings import Settings

log = logging.getLogger("embedding_proxy.server")

GRACE_SECONDS = 30.0
"""How long requests in progress may take after the signal to stop."""


class PortUnavailable(Exception):
    """The address cannot be listened on; the message says which and why."""


async def serve(settings: Settings, announce: Callable[[str], None]) -> signal.Signals:
    """Serve until SIGINT or SIGTERM, and return which it was.

    `announce` gets the base URL once requests are answered. Raises PortUnavailable, StoreError.
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
        with _signals() as told_to_stop:
            announce(_url(runner, host))
            told = await told_to_stop.get()
        log.info("stopping: requests in progress are finished first")
        return told
    finally:
        await runner.cleanup()


@contextmanager
def _signals() -> Iterator[asyncio.Queue[signal.Signals]]:
    """Give a queue of the signals to stop; after the first, a second ends the process at once."""
    told: asyncio.Queue[signal.Signals] = asyncio.Queue()
    loop = asyncio.get_running_loop()
    numbers = (signal.SIGINT, signal.SIGTERM)
    for number in numbers:
        loop.add_signal_handler(number, told.put_nowait, number)
    try:
        yield told
    finally:
        for number in numbers:
            loop.remove_signal_handler(number)


def _url(runner: web.AppRunner, host: str) -> str:
    """Return the base URL for clients, with the port that was really taken."""
    port = runner.addresses[0][1]
    shown = f"[{host}]" if ":" in host else host
    return f"http://{shown}:{port}/v1"
