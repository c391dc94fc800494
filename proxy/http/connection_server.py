"""What the connections of a server share, and what they have it do.

The interface of `app_runner.Runner`, as `connection` sees it.
"""

import asyncio
from typing import Protocol, TypeVar

from aiohttp import web

from .connection_limits import ConnectionLimits
from .pace import UnreadReplies
from .response_cache import CachedResponse, RequestKey, ResponseCache

C = TypeVar("C")
"""A connection."""


class ConnectionServer(Protocol[C]):
    """What the connections of a server share."""

    limits: ConnectionLimits
    unread: UnreadReplies
    responses: ResponseCache
    head_timeout_s: float
    send_timeout_s: float
    connections: set[C]
    fronts: dict[web.RequestHandler, C]
    """The connection in front of each of aiohttp's protocol objects."""
    is_retiring: bool
    """Whether each connection is closed behind its next reply, which says so."""
    is_lost: asyncio.Event
    """Set whenever one of the connections is no more."""

    def new_inner(self) -> web.RequestHandler:
        """Return another protocol object of aiohttp's."""

    def note_hit(self, key: RequestKey, response: CachedResponse, own: str, start: float) -> None:
        """Count a request that was answered here; `start` is on the clock of `perf_counter`."""

    def answer(self, connection: C, key: RequestKey, start: float) -> None:
        """Begin to answer a request whose head is known, and have `end_answer` called."""
