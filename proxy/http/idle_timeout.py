"""Cancels a passed-through call when no bytes move for too long, or when its client leaves."""

import asyncio
from collections.abc import Callable
from types import TracebackType
from typing import Self

from aiohttp import web

from .app_runner import CONNECTION


class IdleTooLong(TimeoutError):
    """Nothing moved in either direction for too long."""


class ClientGone(ConnectionAbortedError):
    """The client is gone; nobody is left to tell."""


class IdleTimeout:
    """Cancels what is done inside `async with` when the client leaves, or nothing moves any more.

    A client that only stops sending, its request being whole, counts as one that left: it cannot be
    told from one that closed, and what an upstream does for nobody is paid for. Raises ClientGone,
    IdleTooLong.
    """

    def __init__(self, request: web.Request, idle_s: float) -> None:
        self._connection = request.get(CONNECTION)
        self._idle_s = idle_s
        self._clock = asyncio.get_running_loop().time
        self._scope = asyncio.timeout(idle_s)
        self._left = False
        self._over = False

    async def __aenter__(self) -> Self:
        await self._scope.__aenter__()
        if self._connection is not None:
            self._connection.on_leave = self._leave
            if self._connection.has_left:
                self._leave()
        return self

    def note_progress(self) -> None:
        """Take note that something was sent or received."""
        self._end_in(self._idle_s)

    def on_grace_over(self, call: Callable[[], None]) -> None:
        """Have something called if the proxy stops, and the grace period is over."""
        if self._connection is not None:
            self._connection.on_grace_over = call

    def _leave(self) -> None:
        self._left = True
        self._end_in(0)

    def _end_in(self, seconds: float) -> None:
        if not self._over and not self._scope.expired():
            self._scope.reschedule(self._clock() + (0 if self._left else seconds))

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._over = True
        if self._connection is not None:
            self._connection.on_leave = self._connection.on_grace_over = None
        try:
            await self._scope.__aexit__(kind, error, trace)
        except TimeoutError as timeout:
            if self._left:
                raise ClientGone("the client is gone") from timeout
            raise IdleTooLong(f"nothing moved for {self._idle_s:g} s") from timeout
