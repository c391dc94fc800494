"""Says in the log when no connection can be accepted for want of a file descriptor.

libuv does not tell the application: it closes such connections in silence. So it is tried each
second whether a file can be opened. asyncio stops listening for a second, and would log a traceback
each time; its exception handler says it in one line instead.
"""

import asyncio
from collections.abc import AsyncIterator
from contextlib import suppress
from typing import Any

from aiohttp import web
from embedding_proxy.providers import descriptors

INTERVAL_S = 1.0
_WHAT = "connections of clients cannot be accepted"


def check() -> None:
    """Log a warning if no descriptor is left."""
    if descriptors.is_exhausted():
        descriptors.warn(_WHAT)


def _handle(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    """Log what failed outside of any task, as the loop does; a want of descriptors in one line."""
    error = context.get("exception")
    if isinstance(error, OSError) and descriptors.is_cause(error):
        descriptors.warn(_WHAT)
    else:
        loop.default_exception_handler(context)


async def watch_descriptors(_: web.Application) -> AsyncIterator[None]:
    """Check each second while the application runs; a cleanup context of aiohttp."""

    async def watch() -> None:
        while True:
            check()
            await asyncio.sleep(INTERVAL_S)

    loop = asyncio.get_running_loop()
    before = loop.get_exception_handler()
    if before is None:
        loop.set_exception_handler(_handle)
    task = asyncio.create_task(watch())
    yield
    task.cancel()
    loop.set_exception_handler(before)
    with suppress(asyncio.CancelledError):
        await task
