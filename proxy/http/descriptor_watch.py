"""Says in the log when no connection can be accepted for want of a file descriptor.

Event loops do not tell the application: libuv closes such connections in silence, and asyncio stops
listening for a second. So it is tried each second whether a file can be opened.
"""

import asyncio
from collections.abc import AsyncIterator
from contextlib import suppress

from aiohttp import web

from providers import descriptors

INTERVAL_S = 1.0


def check() -> None:
    """Log a warning if no descriptor is left."""
    if descriptors.is_exhausted():
        descriptors.warn("connections of clients cannot be accepted")


async def watch_descriptors(_: web.Application) -> AsyncIterator[None]:
    """Check each second while the application runs; a cleanup context of aiohttp."""

    async def watch() -> None:
        while True:
            check()
            await asyncio.sleep(INTERVAL_S)

    task = asyncio.create_task(watch())
    yield
    task.cancel()
    with suppress(asyncio.CancelledError):
        await task
