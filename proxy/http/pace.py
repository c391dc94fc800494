"""How slowly a client may send a request body, and take a reply; what unread replies may hold.

A client has a budget of waiting time. The proxy's waits for the client are taken from it, and each
MIN_BYTES_PER_S bytes that move give one second back, up to the whole budget. So whatever does not
move ends after the budget, whatever drips ends about as soon, and a slow but steady line may take
as long as it needs, with pauses shorter than the budget.

Long replies are rendered as their client takes them, and hold their vectors until then. While all
that is held is more than `UnreadReplies.max_bytes`, a client has to take MIN_BUSY_BYTES_PER_S bytes
in each second.

The rule is that of a minimum data rate with a grace period, as in Kestrel's
`MinRequestBodyDataRate` and `MinResponseDataRate`, or `MinRate` of Apache's mod_reqtimeout.
"""

import asyncio
import logging
import os
import socket
import struct
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

from aiohttp import StreamReader

# Windows does not tell what a socket has not sent, or what was not read of it.
if os.name == "posix":
    from fcntl import ioctl
    from termios import FIONREAD, TIOCOUTQ

log = logging.getLogger("embedding_proxy.connection")

MIN_BYTES_PER_S = 500
"""The least rate at which a client sends a body, or takes a reply."""
MIN_BUSY_BYTES_PER_S = 1 << 16
"""The least rate at which a client takes a reply while unread replies hold too much."""
_MANY = 32
_MAX_UNSENT_BYTES = 1 << 18
_CHECK_S = 1.0
_CHECKS = 10
"""How often at least a reply is looked at within the budget."""


class Timer:
    """Calls something after a while, unless it is stopped before."""

    def __init__(self, loop: asyncio.AbstractEventLoop, call: Callable[[], None]) -> None:
        self._loop = loop
        self._call = call
        self._handle: asyncio.TimerHandle | None = None

    def start(self, seconds: float) -> None:
        """Begin to wait; one that waits already goes on."""
        if self._handle is None:
            self._handle = self._loop.call_later(seconds, self._end)

    def stop(self) -> bool:
        """Wait no longer; tell whether it did."""
        handle, self._handle = self._handle, None
        if handle is not None:
            handle.cancel()
        return handle is not None

    def _end(self) -> None:
        self._handle = None
        self._call()


class Pace:
    """The waiting time that one client has left."""

    def __init__(self, timeout_s: float) -> None:
        self._timeout_s = timeout_s
        self.left_s = timeout_s

    def note(self, waited_s: float, size: int) -> bool:
        """Take note of a wait and of the bytes that moved; tell whether time is left."""
        gained = size / MIN_BYTES_PER_S
        self.left_s = max(0.0, min(self._timeout_s, self.left_s - waited_s + gained))
        return self.left_s > 0

    async def read(self, content: StreamReader) -> bytes:
        """Return the next part of a body; empty at its end. Raises TimeoutError.

        What is done between two calls is no wait for the client.
        """
        clock = asyncio.get_running_loop().time
        begun = clock()
        async with asyncio.timeout(self.left_s):
            part = await content.readany()
        self.note(clock() - begun, len(part))
        return part


class UnreadReplies:
    """Counts what the long replies in progress hold in memory, and the clients that are waited for.

    For one event loop.
    """

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.waited_for = 0
        """Clients that have not taken what was sent."""
        self._held = 0

    @property
    def is_over(self) -> bool:
        """Whether it is too much."""
        return self._held > self.max_bytes

    @contextmanager
    def hold(self, size: int) -> Iterator[None]:
        """Count so many bytes until the block ends."""
        self._held += size
        try:
            yield
        finally:
            self._held -= size

    def bound(self, transport: asyncio.BaseTransport) -> None:
        """Let the kernel keep little of a reply that is about to be sent, if many are waited for.

        Else it keeps some 4 MB for each client that does not read. It costs a few per cent of a
        long reply, so it is not done for the few.
        """
        connection: Any = transport.get_extra_info("socket")
        if self.waited_for < _MANY or connection is None:
            return
        if hasattr(socket, "TCP_NOTSENT_LOWAT"):
            with suppress(OSError):  # Not over a Unix socket.
                connection.setsockopt(
                    socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, _MAX_UNSENT_BYTES
                )


class SendWatch:
    """Aborts a connection whose client does not take what was sent, or takes it too slowly.

    Bytes count as taken when the peer has acknowledged them, where the system tells; else when the
    kernel has taken them. While it watches nothing more is written.
    """

    def __init__(
        self, loop: asyncio.AbstractEventLoop, timeout_s: float, unread: UnreadReplies
    ) -> None:
        self._loop = loop
        self._unread = unread
        self._timeout_s = timeout_s
        self._timer: asyncio.TimerHandle | None = None

    def start(self, transport: asyncio.Transport) -> None:
        """Watch until all is sent, or `stop`; one that watches goes on."""
        if self._timer is None and transport.get_write_buffer_size():
            self._unread.waited_for += 1
            self._check_later(transport, Pace(self._timeout_s), _buffered_bytes(transport))

    def stop(self) -> None:
        """Watch no longer."""
        if self._timer is not None:
            self._timer.cancel()
            self._end()

    def _end(self) -> None:
        self._timer = None
        self._unread.waited_for -= 1

    def _check_later(self, transport: asyncio.Transport, pace: Pace, buffered: int) -> None:
        interval, now = min(_CHECK_S, self._timeout_s / _CHECKS), self._loop.time()
        self._timer = self._loop.call_later(interval, self._check, transport, pace, buffered, now)

    def _check(self, transport: asyncio.Transport, pace: Pace, before: int, since: float) -> None:
        if not transport.get_write_buffer_size():
            self._end()
            return
        buffered, waited = _buffered_bytes(transport), self._loop.time() - since
        taken = max(0, before - buffered)
        is_crowding = self._unread.is_over and taken < MIN_BUSY_BYTES_PER_S * waited
        if pace.note(waited, taken) and not is_crowding:
            self._check_later(transport, pace, buffered)
            return
        self._end()
        log.info("a connection was closed: its client took a reply too slowly, or not at all")
        reset(transport)


def keep_alive(transport: asyncio.BaseTransport) -> None:
    """Let the kernel find out whether an idle client is still there."""
    connection = transport.get_extra_info("socket")
    if connection is not None:
        with suppress(OSError):
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)


def reset(transport: asyncio.Transport) -> None:
    """End a connection in disorder, without waiting for the client to take what was sent.

    Neither the event loop nor the kernel keeps the rest. And a client of HTTP/1.0 cannot take the
    end for that of a reply.
    """
    connection = transport.get_extra_info("socket")
    if connection is not None:
        linger = struct.pack("ii", 1, 0)
        with suppress(OSError):
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
    transport.abort()


def reset_unsent(transport: asyncio.Transport) -> None:
    """End a connection that would else stay open until its client takes the rest."""
    if transport.get_write_buffer_size():
        reset(transport)


def _buffered_bytes(transport: asyncio.Transport) -> int:
    """Return how many bytes the peer has not acknowledged."""
    number = _count(transport, TIOCOUTQ) if os.name == "posix" else 0
    return transport.get_write_buffer_size() + number


def unread(transport: asyncio.Transport | None) -> int:
    """Return how many bytes have come that the event loop has not read; 0 if it is not known."""
    return _count(transport, FIONREAD) if transport is not None and os.name == "posix" else 0


def _count(transport: asyncio.Transport, request: int) -> int:
    """Return what the kernel counts of a socket; 0 if it does not tell."""
    connection: Any = transport.get_extra_info("socket")
    if connection is not None:
        with suppress(OSError):
            return int.from_bytes(ioctl(connection.fileno(), request, bytes(4)), sys.byteorder)
    return 0
