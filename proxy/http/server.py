"""Runs the application on a port, and stops it without dropping a request."""

import asyncio
import errno
import gc
import logging
import os
import signal
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from embedding_proxy.providers import descriptors
from embedding_proxy.proxy.config.schema import Settings
from embedding_proxy.proxy.http.runner import Runner

from .app import build_app

log = logging.getLogger("embedding_proxy.server")

GRACE_SECONDS = 30.0
"""How long requests in progress may take after the signal to stop. Then calls that were sent have
`attempts.CLOSE_S` seconds more to be answered, whether or not a client waits for them."""


_LOOPBACK = {"0.0.0.0": "127.0.0.1", "::": "::1"}  # noqa: S104 - nothing is bound here
IMPATIENT_SIGNALS = (signal.SIGINT, signal.SIGTERM)
"""The signals of which a second one ends the process at once."""
STOP_SIGNALS = (*IMPATIENT_SIGNALS, *([signal.SIGHUP] if hasattr(signal, "SIGHUP") else []))
"""The signals that end the proxy in good order. Windows has no SIGHUP.

SIGHUP is never the second signal: a terminal that is closed sends it twice, once by the kernel and
once by the shell, and systemd can send it right after SIGTERM."""
WORKER_SIGNALS = (signal.SIGTERM,)
"""The signals that end a worker, however often they come.

A terminal sends its signals to all processes of a job, and systemd to all of a unit: the worker
gets them beside those of its parent. So it leaves those of the terminal to the parent, and takes
none for a second one. The parent kills it when it has to end at once."""


class PortUnavailable(Exception):
    """The address cannot be listened on; the message says which and why."""


_REMEDIES: dict[object, str] = {
    errno.EADDRINUSE: "; --port 0 takes a free port",
    errno.EACCES: "; take a port of 1024 or more, or --port 0 for a free one",
    errno.EADDRNOTAVAIL: "; server.host is no address of this machine",
    socket.gaierror: "; server.host is no host name that this machine knows",
}
"""What to do, by the number of the error."""


def listen(settings: Settings) -> socket.socket:
    """Take the address. Raises PortUnavailable."""
    host, port = settings.server.host, settings.server.port
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=1024)
    except OSError as error:
        # The resolver's errors have numbers of their own, which `strerror` does not know.
        is_of_host = isinstance(error, socket.gaierror)
        reason = error.strerror if is_of_host or not error.errno else os.strerror(error.errno)
        remedy = _REMEDIES.get(socket.gaierror if is_of_host else error.errno, "")
        shown = f"[{host}]" if ":" in host else host
        raise PortUnavailable(
            f"cannot listen on {shown}:{port}: {reason or error}{remedy}"
        ) from error


def base_url(listening: socket.socket) -> str:
    """Return the base URL for clients of this machine, with the port that was really taken.

    A socket that listens on all addresses (0.0.0.0, ::) is reached by the loopback address.
    """
    host, port = listening.getsockname()[:2]
    host = _LOOPBACK.get(host, host)
    shown = f"[{host}]" if ":" in host else host
    return f"http://{shown}:{port}/v1"


async def serve(
    settings: Settings,
    listening: socket.socket,
    announce: Callable[[], None],
    *,
    is_worker: bool = False,
) -> signal.Signals:
    """Serve until one of STOP_SIGNALS, or of WORKER_SIGNALS, and return which it was.

    A second signal ends the process at once. But a worker is often told twice, by its parent and by
    whoever stops the whole group: its second SIGTERM means nothing more than the first.
    `announce` is called once requests are answered. Raises StoreError, ConfigError.
    """
    descriptors.raise_limit()
    app = build_app(settings)
    runner = Runner(app, shutdown_timeout=GRACE_SECONDS)
    await runner.setup()
    try:
        await runner.listen(listening)
        with _signals(is_worker=is_worker) as stop_signals:
            # What has been made so far stays for good: to look it all through for garbage, now and
            # then, would be a pause of tens of milliseconds for everybody.
            gc.freeze()
            announce()
            signal_number = await stop_signals.get()
        log.info("stopping: requests in progress are finished first")
        return signal_number
    finally:
        await runner.cleanup()


@contextmanager
def _signals(*, is_worker: bool) -> Iterator[asyncio.Queue[signal.Signals]]:
    """Give a queue of the signals to stop; after the first, a second may end the process at once.

    SIGHUP that was ignored from the start, as under `nohup`, stays ignored.
    """
    received: asyncio.Queue[signal.Signals] = asyncio.Queue()
    loop = asyncio.get_running_loop()
    numbers = WORKER_SIGNALS if is_worker else STOP_SIGNALS
    heeded = [
        signal_number
        for signal_number in numbers
        if signal_number in IMPATIENT_SIGNALS
        or signal.getsignal(signal_number) is not signal.SIG_IGN
    ]
    for number in heeded:
        loop.add_signal_handler(number, received.put_nowait, number)
    try:
        yield received
    finally:
        # The other handlers stay until the loop is closed.
        for number in () if is_worker else IMPATIENT_SIGNALS:
            loop.remove_signal_handler(number)
