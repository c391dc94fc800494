"""Telling systemd how the proxy is: ready, reloading, stopping, alive (sd_notify(3)).

Nothing is sent where systemd has not asked for it by NOTIFY_SOCKET.
"""

import asyncio
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

_SOCKET, _WATCHDOG, _WATCHDOG_PID = "NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID"


def notify(state: str) -> None:
    """Send a state; where that fails, nothing happens."""
    address = os.environ.get(_SOCKET, "")
    if not address or not hasattr(socket, "AF_UNIX"):
        return
    if address.startswith("@"):
        address = "\0" + address[1:]
    with suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as client:
        client.connect(address)
        client.sendall(state.encode())


@contextmanager
def reloading() -> Iterator[None]:
    """Say that the configuration is read anew while the block runs."""
    notify(f"RELOADING=1\nMONOTONIC_USEC={time.monotonic_ns() // 1000}")
    try:
        yield
    finally:
        notify("READY=1")


def watchdog_interval() -> float | None:
    """Return how often, in seconds, systemd wants to hear of us; None if it does not."""
    wanted = os.environ.get(_WATCHDOG, "")
    if not wanted.isdecimal() or os.environ.get(_WATCHDOG_PID, str(os.getpid())) != str(
        os.getpid()
    ):
        return None
    # Half of what it grants, as sd_watchdog_enabled(3) advises.
    return int(wanted) / 2e6 or None


async def keep_watchdog_calm() -> None:
    """Say that the event loop turns, as long as it does."""
    interval = watchdog_interval()
    while interval is not None:
        notify("WATCHDOG=1")
        await asyncio.sleep(interval)
