"""A connection that answers what it has begun to read before the server stops.

aiohttp stops reading as soon as it is told to shut down: a body that is still arriving is dropped,
and its request fails after some time. Here a request is in progress from the moment when its head
was read. Such requests are read to their end and answered within the grace period, the last one
with `Connection: close`; connections without one are closed at once. What has no end of its own, a
WebSocket, is told that the grace period is over, and has a moment to say so to both sides.

What is used of aiohttp's private parts: `_messages`, the requests that were read and not begun, and
`_task_handler`, which takes them up.
"""

import asyncio
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from aiohttp import web

from .framing import Framing

_LAST_SECONDS = 0.1
"""For a handler to end after the grace period is over and its request was cancelled."""


_GOODBYE_SECONDS = 1.0
"""For what is told that the grace period is over."""


class Draining(Framing):
    """aiohttp's protocol object; there is one for each connection."""

    __slots__ = ("_closed", "_is_answering", "_to_answer", "on_grace_over")

    def __init__(self, *args: Any, **kwargs: Any) -> None:  # noqa: ANN401 - aiohttp's own
        super().__init__(*args, **kwargs)
        self._is_answering = False
        self._to_answer = 0
        """Once the connection is to be closed: the requests that are still to be answered."""
        self._closed: asyncio.Event | None = None
        """Set when the connection is lost; made when it is drained."""
        self.on_grace_over: Callable[[], None] | None = None
        """Called when the grace period is over; for the request in progress to set and unset."""

    def begin(self) -> None:
        """Take note that a request is handed to its handler."""
        self._is_answering = True

    def drain(self) -> None:
        """Answer the requests whose head was read, then close; close at once if there is none."""
        if self.end_after_replies() and self.transport is not None:
            self._closed = asyncio.Event()
        else:
            self.close()

    def end_after_replies(self) -> int:
        """Close the connection behind the last reply; return how many are still to be given."""
        self._to_answer = len(self._messages) + self._is_answering
        return self._to_answer

    async def shutdown(self, timeout: float | None = 15.0) -> None:  # noqa: ASYNC109 - aiohttp's
        """Wait up to `timeout` seconds for the requests in progress, then end them."""
        if self._closed is not None:
            with suppress(TimeoutError):
                async with asyncio.timeout(timeout):
                    await self._closed.wait()
            if self.on_grace_over is not None:
                self.on_grace_over()
                with suppress(TimeoutError):
                    async with asyncio.timeout(_GOODBYE_SECONDS):
                        await self._closed.wait()
        last = _LAST_SECONDS if timeout is None else min(timeout, _LAST_SECONDS)
        await super().shutdown(last)

    async def finish_response(
        self, request: web.BaseRequest, resp: web.StreamResponse, start_time: float | None
    ) -> tuple[web.StreamResponse, bool]:
        """Send a reply; while the connection is drained, the last one closes it."""
        if self._to_answer:
            self._to_answer -= 1
            if not self._to_answer:
                resp.force_close()
        try:
            return await super().finish_response(request, resp, start_time)
        finally:
            self._is_answering = False

    def connection_lost(self, exc: BaseException | None) -> None:
        """Take note that there is nobody to answer."""
        if self._messages and not self._is_answering and self._task_handler is not None:
            # Else aiohttp's task would take up a request that came in the same moment, and fail.
            self._task_handler.cancel()
        super().connection_lost(exc)
        if self._closed is not None:
            self._closed.set()
