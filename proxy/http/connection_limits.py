"""How many client connections there may be, in all and from one address, and which one gives way.

Each connection takes a file descriptor, and a call upstream may need another. Where there is no
room for a new connection, one that has waited MIN_WAIT_S for a request is closed for it: first one
on which no request was ever read, then the one that has been idle for longest. So silent
connections starve nobody. One that is younger, or has sent what was not read yet, is never closed:
its client would get no reply. If no connection may be closed, the new one is refused with 503.
"""

import asyncio
import logging
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Protocol

from embedding_proxy.providers import descriptors
from embedding_proxy.proxy.config.schema import Server

from .errors import RETRY_SECONDS, Failure, new_request_id
from .pace import Timer

log = logging.getLogger("embedding_proxy.connection")

NO_ROOM = Failure(
    503,
    "The proxy is overloaded: it has no room for another connection (server.max_connections).",
    "server_error",
    code="proxy_overloaded",
    retry_after=RETRY_SECONDS,
)
_PER_ADDRESS_SHARE = 0.75
"""Of all connections, those from one address, where `max_connections_per_address` is not set."""
MAX_REFUSED_S = 1.0
"""Seconds for which a refused connection is read: its client may be sending its request."""
MAX_REFUSED = 4096
"""Refused connections that are read for a while, at most."""
_REFUSED_SHARE = 8
"""They take at most this part (1/8) of the file descriptors that are left."""
MIN_WAIT_S = 1.0
"""Seconds for which a connection waits at least before it is closed for another: a client sends its
request soon after it has connected."""


class Closable(Protocol):
    """A connection, as far as it matters here."""

    @property
    def has_unread(self) -> bool:
        """Whether its client has sent what was not read yet."""

    def evict(self) -> None:
        """Close it at once, for another."""


class _Waiting:
    """Connections that wait for a request, with the time since when; those that had none first."""

    def __init__(self) -> None:
        self._new: dict[Closable, float] = {}
        self._idle: dict[Closable, float] = {}

    def add(self, connection: Closable, since: float, *, is_new: bool) -> None:
        (self._new if is_new else self._idle)[connection] = since

    def discard(self, connection: Closable) -> None:
        self._new.pop(connection, None)
        self._idle.pop(connection, None)

    def first(self, before: float) -> Closable | None:
        """Return the first one that has waited since before that time; None if there is none."""
        for waiting in (self._new, self._idle):
            for connection, since in waiting.items():
                if since < before:
                    return connection
                break  # They are in the order of time.
        return None


class _Address:
    """The connections from one address."""

    def __init__(self) -> None:
        self.count = 0
        self.waiting = _Waiting()


class ConnectionLimits:
    """Counts connections and makes room for new ones. For one event loop."""

    def __init__(
        self,
        max_connections: int,
        max_per_address: int | None = None,
        *,
        max_refused: int = MAX_REFUSED,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`max_per_address` is three quarters of `max_connections` where it is None.

        `max_refused` bounds the refused connections that are read for a while, and `clock` gives
        seconds.
        """
        if max_per_address is None:
            max_per_address = int(max_connections * _PER_ADDRESS_SHARE)
        self.max_connections = max(1, max_connections)
        self.max_per_address = max(1, min(max_per_address, self.max_connections))
        self.clock = clock
        self._of: dict[Closable, str] = {}
        self._max_refused = max_refused
        self._refused: set[RefusedConnection] = set()
        self._addresses: dict[str, _Address] = {}
        self._waiting = _Waiting()
        self.is_tight = False
        """Whether more than a quarter of all connections are taken; else the order of those that
        wait does not matter."""
        self._warnings = descriptors.Interval()

    @classmethod
    def of(cls, server: Server, left: Callable[[], int] = descriptors.left) -> "ConnectionLimits":
        """Return the limits of a configuration, lowered to what the limit on open files allows.

        Half of the descriptors that are left, as `left` tells, are for clients: a request may need
        a connection to a provider.
        """
        descriptors_left = left()
        room = max(1, descriptors_left // 2)
        if room < server.max_connections:
            log.warning(
                "the limit on open files (ulimit -n) allows %s connections of clients, less than"
                " server.max_connections (%s)",
                room,
                server.max_connections,
            )
        return cls(
            min(server.max_connections, room),
            server.max_connections_per_address,
            max_refused=min(MAX_REFUSED, descriptors_left // _REFUSED_SHARE),
        )

    def resize(self, limits: "ConnectionLimits") -> None:
        """Take over the numbers of other limits; connections that are there stay."""
        self.max_connections = limits.max_connections
        self.max_per_address = limits.max_per_address
        self._note_room()

    def __len__(self) -> int:
        """Return how many connections there are, without those refused."""
        return len(self._of)

    def enter(self, connection: Closable, address: str) -> bool:
        """Count a new connection, and tell whether there is room for it."""
        of_address = self._addresses.get(address)
        if of_address is not None and of_address.count >= self.max_per_address:
            self._warn("server.max_connections_per_address", self.max_per_address)
            if not self._make_room(of_address.waiting):
                return False
        if len(self._of) >= self.max_connections:
            self._warn("server.max_connections", self.max_connections)
            if not self._make_room(self._waiting):
                return False
        # It may have been dropped with its last connection just now.
        of_address = self._addresses.setdefault(address, _Address())
        of_address.count += 1
        self._of[connection] = address
        self._note_room()
        self._wait(connection, is_new=True)
        return True

    def hold_refused(self, connection: "RefusedConnection") -> bool:
        """Tell whether a refused connection may be read for a while; if so, count it."""
        has_room = len(self._refused) < self._max_refused
        if has_room:
            self._refused.add(connection)
        return has_room

    def release_refused(self, connection: "RefusedConnection") -> None:
        """Count a refused connection no longer; one that was not counted is no error."""
        self._refused.discard(connection)

    def close_refused(self) -> None:
        """Close the refused connections: the proxy stops."""
        for connection in self._refused:
            connection.close()

    def leave(self, connection: Closable) -> None:
        """Count a connection no longer; one that was not counted is no error."""
        address = self._of.pop(connection, None)
        if address is None:
            return
        self._note_room()
        self._waiting.discard(connection)
        of_address = self._addresses[address]
        of_address.waiting.discard(connection)
        of_address.count -= 1
        if not of_address.count:
            del self._addresses[address]

    def busy(self, connection: Closable) -> None:
        """Take note that a request was read: the connection is not closed for another."""
        address = self._of.get(connection)
        if address is not None:
            self._waiting.discard(connection)
            self._addresses[address].waiting.discard(connection)

    def idle(self, connection: Closable) -> None:
        """Take note that a request was answered just now."""
        if connection in self._of:
            self.busy(connection)
            self._wait(connection, is_new=False)

    def _note_room(self) -> None:
        self.is_tight = len(self._of) * 4 > self.max_connections

    def _wait(self, connection: Closable, *, is_new: bool) -> None:
        now = self.clock()
        self._waiting.add(connection, now, is_new=is_new)
        self._addresses[self._of[connection]].waiting.add(connection, now, is_new=is_new)

    def _make_room(self, waiting: _Waiting) -> bool:
        before = self.clock() - MIN_WAIT_S
        while (connection := waiting.first(before)) is not None:
            if not connection.has_unread:
                self.leave(connection)
                connection.evict()
                return True
            # Its request is about to be read: its wait begins anew.
            self.idle(connection)
        return False

    def _warn(self, key: str, limit: int) -> None:
        if self._warnings.is_due():
            log.warning(
                "%s (%s) is reached: connections that wait for a request are closed for new ones,"
                " or new ones are refused with 503",
                key,
                limit,
            )


def write_refusal(transport: asyncio.Transport, failure: Failure) -> None:
    """Write a reply without a request, behind which the connection is closed."""
    own = new_request_id()
    log.info("request %s: status %d: %s", own, failure.status, failure.message)
    transport.write(failure.last_bytes(own))


class RefusedConnection(asyncio.Protocol):
    """Takes over a connection for which there is no room: writes the 503, and reads on for a while.

    Were the connection closed with something unread, the client would get a reset, and many an HTTP
    client then does not read the reply. A client closes it by itself when it has the reply.
    """

    def __init__(self, limits: ConnectionLimits, transport: asyncio.Transport) -> None:
        self._limits = limits
        self._transport = transport
        self._end = Timer(asyncio.get_running_loop(), transport.abort)
        transport.set_protocol(self)
        write_refusal(transport, NO_ROOM)
        if limits.hold_refused(self):
            self._end.start(MAX_REFUSED_S)
            with suppress(OSError):  # The client may be gone.
                transport.write_eof()
        else:
            transport.close()

    def connection_lost(self, _: BaseException | None) -> None:
        """Take note that the connection is no more."""
        self._end.stop()
        self._limits.release_refused(self)

    def close(self) -> None:
        """Close the connection."""
        self._transport.close()
