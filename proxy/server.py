"""Runs the application on a port, and stops it without dropping a request."""

import asyncio
import gc
import logging
import os
import signal
import socket
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

from aiohttp import web

from providers import descriptors
from proxy.http.connection import Runner
from proxy.settings.schema import Settings

from .app import build_app

log = logging.getLogger("embedding_proxy.server")

GRACE_SECONDS = 30.0
"""How long requests in progress may take after the signal to stop. Then calls that were sent have
`attempts.CLOSE_S` seconds more to be answered, whether or not a client waits for them."""


_TO_STOP = (signal.SIGINT, signal.SIGTERM)


class PortUnavailable(Exception):
    """The address cannot be listened on; the message says which and why."""


def listen(settings: Settings) -> socket.socket:
    """Take the address. Raises PortUnavailable."""
    host, port = settings.server.host, settings.server.port
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=1024)
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno else str(error)
        raise PortUnavailable(f"cannot listen on {host}:{port}: {reason}") from error


def base_url(listening: socket.socket) -> str:
    """Return the base URL for clients, with the port that was really taken."""
    host, port = listening.getsockname()[:2]
    shown = f"[{host}]" if ":" in host else host
    return f"http://{shown}:{port}/v1"


async def serve(
    settings: Settings,
    listening: socket.socket,
    announce: Callable[[], None],
    *,
    is_worker: bool = False,
) -> signal.Signals:
    """Serve until SIGINT or SIGTERM, and return which it was.

    A second signal ends the process at once. But a worker is often told twice, by its parent and by
    whoever stops the whole group: its second SIGTERM means nothing more than the first.
    `announce` is called once requests are answered. Raises StoreError, ConfigError.
    """
    descriptors.raise_limit()
    app = build_app(settings)
    # The log of accesses would cost as much as a hit; what matters is in the reply's headers.
    runner = Runner(app, access_log=None, shutdown_timeout=GRACE_SECONDS)
    await runner.setup()
    try:
        await web.SockSite(runner, listening).start()
        with _signals((signal.SIGINT,) if is_worker else _TO_STOP) as told_to_stop:
            # What has been made so far stays for good: to look it all through for garbage, now and
            # then, would be a pause of tens of milliseconds for everybody.
            gc.freeze()
            announce()
            told = await told_to_stop.get()
        log.info("stopping: requests in progress are finished first")
        return told
    finally:
        await runner.cleanup()


@contextmanager
def _signals(final: Iterable[signal.Signals]) -> Iterator[asyncio.Queue[signal.Signals]]:
    """Give a queue of the signals to stop; after the block `final` ones end the process at once."""
    told: asyncio.Queue[signal.Signals] = asyncio.Queue()
    loop = asyncio.get_running_loop()
    for number in _TO_STOP:
        loop.add_signal_handler(number, told.put_nowait, number)
    try:
        yield told
    finally:
        for number in final:
            loop.remove_signal_handler(number)
