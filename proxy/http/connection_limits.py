"""How many client connections there may be, in all and from one address, and which one gives way.

Each connection takes a file descriptor, and a call upstream may need another. Where there is no
room for a new connection, one that waits for a request is closed for it: first one on which no
request was ever read, then the one that has been idle for longest. So silent connections starve
nobody. If all are busy, the new one is refused.
"""

import logging
from collections.abc import Callable
from typing import Protocol

from embedding_proxy.providers import descriptors
from embedding_proxy.proxy.config.schema import Server

from .errors import RETRY_SECONDS, Failure

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


class Closable(Protocol):
    """A connection, as far as it matters here."""

    def force_close(self) -> None:
        """Close it at once."""


class _Waiting:
    """Connections that wait for a request; those that had none come first."""

    def __init__(self) -> None:
        self._new: dict[Closable, None] = {}
        self._idle: dict[Closable, None] = {}

    def add(self, connection: Closable, *, is_new: bool) -> None:
        (self._new if is_new else self._idle)[connection] = None

    def discard(self, connection: Closable) -> None:
        self._new.pop(connection, None)
        self._idle.pop(connection, None)

    def first(self) -> Closable | None:
        """Return the one to close for another; None if all are busy."""
        return next(iter(self._new), None) or next(iter(self._idle), None)


class _Address:
    """The connections from one address."""

    def __init__(self) -> None:
        self.count = 0
        self.waiting = _Waiting()


class ConnectionLimits:
    """Counts connections and makes room for new ones. For one event loop."""

    def __init__(self, max_connections: int, max_per_address: int | None = None) -> None:
        """`max_per_address` is three quarters of `max_connections` where it is None."""
        if max_per_address is None:
            max_per_address = int(max_connections * _PER_ADDRESS_SHARE)
        self.max_connections = max(1, max_connections)
        self.max_per_address = max(1, min(max_per_address, self.max_connections))
        self._of: dict[Closable, str] = {}
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
        room = max(1, left() // 2)
        if room < server.max_connections:
            log.warning(
                "the limit on open files (ulimit -n) allows %s connections of clients, less than"
                " server.max_connections (%s)",
                room,
                server.max_connections,
            )
        return cls(min(server.max_connections, room), server.max_connections_per_address)

    def __len__(self) -> int:
        """Return how many connections there are."""
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
        self._waiting.add(connection, is_new=is_new)
        self._addresses[self._of[connection]].waiting.add(connection, is_new=is_new)

    def _make_room(self, waiting: _Waiting) -> bool:
        connection = waiting.first()
        if connection is None:
            return False
        self.leave(connection)
        connection.force_close()
        return True

    def _warn(self, key: str, limit: int) -> None:
        if self._warnings.is_due():
            log.warning(
                "%s (%s) is reached: connections that wait for a request are closed for new ones,"
                " or new ones are refused with 503",
                key,
                limit,
            )
