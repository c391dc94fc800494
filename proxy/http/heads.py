"""Requests whose head came before: nothing but their bodies has to be understood.

Those of one client differ in their bodies, and in how long these are. All else that a head says is
the same again: who sends it and whether that is let in, what for, and how the reply is to be sent.
So a body is answered at once where nothing has to be waited for.
"""

import re
from collections.abc import Callable, Mapping
from typing import NamedTuple, TypeAlias

from aiohttp import web

from .caller import Caller
from .pool import Pool
from .replies import Replies, Reply


class Admitted(NamedTuple):
    """What a head said of its request."""

    caller: Caller
    control: str
    """Its `Cache-Control`."""
    model: str | None
    """The model that its path named."""


class Given(NamedTuple):
    """An answer, but for what is said of it to every client alike."""

    headers: Mapping[str, str]
    body: bytes
    again: Callable[[], bool] | None
    """As in a `Reply`."""
    inputs: int


AtOnce: TypeAlias = Callable[[bytes, Admitted], Given | None]
"""Answers a body, and counts the answer; None if there is more to do, and then nothing is done."""

ADMITTED = web.RequestKey("admitted", Admitted)
"""Set on a request that was answered well, if its head says the same whenever it comes."""

# The one line that may differ. A head with two of them is refused, and so is never known.
_LENGTH = re.compile(rb"\r\ncontent-length:[ \t]*([0-9]{1,9})[ \t]*\r\n", re.IGNORECASE)
_OF_THE_BODY = re.compile(r"(?i)x-(cache|embedding|tokens|request-id)|content-length|date$")
"""Headers that each reply has of its own."""

# All heads together; with it, what a head takes besides the lines of its replies.
_LIMIT = 1 << 20
_OVERHEAD = 1000


class _Known(NamedTuple):
    admitted: Admitted
    lines: bytes
    """From the status line on, what all replies have in common."""


class Heads:
    """Heads by digest, least recently used out first. For one thread."""

    def __init__(self, replies: Replies, at_once: AtOnce) -> None:
        self._replies = replies
        self._at_once = at_once
        self._pool = Pool(_LIMIT)

    def split(self, data: bytes) -> tuple[bytes, bytes] | None:
        """Return what a head is known by, and the body; None if that is not one whole request."""
        end = data.find(b"\r\n\r\n")
        length = _LENGTH.search(data, 0, end + 2)
        if length is None or end + 4 + int(length[1]) != len(data):
            return None
        # No digit of it decides anything: the length is as it should be.
        head = data[: length.start(1)] + data[length.end(1) : end]
        return self._replies.digest(head), data[end + 4 :]

    def reply(self, digest: bytes, body: bytes) -> Reply | None:
        """Return the reply to a body, already counted; None if the request has to be read."""
        known: _Known | None = self._pool.get(digest)
        given = known and self._at_once(body, known.admitted)
        if known is None or given is None:
            return None
        lines = [f"{name}: {value}\r\n" for name, value in given.headers.items()]
        lines.append(f"Content-Length: {len(given.body)}\r\n")
        head = known.lines + "".join(lines).encode()
        return Reply(head, given.body, given.again, given.inputs)

    def keep(self, digest: bytes, admitted: Admitted, response: web.Response) -> None:
        """Keep what a head said, and what the reply to it has in common with others."""
        lines = [f"HTTP/1.1 {response.status} {response.reason}\r\n"]
        lines += [f"{k}: {v}\r\n" for k, v in response.headers.items() if not _OF_THE_BODY.match(k)]
        known = _Known(admitted, "".join(lines).encode())
        self._pool.keep(digest, known, len(known.lines) + _OVERHEAD)
