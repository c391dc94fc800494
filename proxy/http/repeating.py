"""A connection that answers what comes again byte for byte at once, and all else as aiohttp does.

A reply is looked for where whole requests come one at a time: when the last one was answered, and
what arrives begins a new one (see `boundary`). Whatever is unusual goes aiohttp's way. Its private
parts are read here and in `draining` alone: whether it waits for a request, and when it will not.
With `server.fast_path: false` every request goes aiohttp's way; both ways answer alike.
"""

import asyncio
import re
from collections.abc import Callable, Mapping
from typing import Any

from aiohttp import HttpVersion11, web
from aiohttp.helpers import rfc822_formatted_time
from aiohttp.http import RawRequestMessage

from proxy.errors import new_request_id

from .boundary import Boundary
from .draining import Draining
from .heads import ADMITTED, Heads
from .replies import LONGEST_REQUEST, Replies, Reply
from .request_log import has_own_id

AGAIN: web.RequestKey[tuple[Callable[[], bool], int]] = web.RequestKey("again")
"""Set on a request whose reply may be given again: the last two fields of a `Reply`."""

HELD = 0.01
"""Seconds for which a head waits for its body: many clients send them apart."""
_BODY_FOLLOWS = re.compile(rb"\r\ncontent-length:[ \t]*0*[1-9]", re.IGNORECASE)
_OWN = frozenset(("date", "x-request-id"))
"""Headers that each reply has of its own."""


class Repeating(Draining):
    """aiohttp's protocol object; there is one for each connection."""

    __slots__ = (
        "_answered",
        "_boundary",
        "_digest",
        "_head",
        "_heads",
        "_held",
        "_release_by",
        "_replies",
    )

    def __init__(
        self,
        replies: Replies,
        heads: Heads,
        *args: Any,  # noqa: ANN401 - aiohttp's own
        **kwargs: Any,  # noqa: ANN401
    ) -> None:
        super().__init__(*args, **kwargs)
        self._replies = replies
        self._heads = heads
        self._boundary = Boundary()
        self._answered = False
        """Whether the last request has been, though aiohttp may not wait for the next one yet."""
        self._digest: bytes | None = None
        """Of the request in progress; None if it did not come alone and whole."""
        self._head: bytes | None = None
        """The same of its head."""
        self._held = b""
        self._release_by: asyncio.TimerHandle | None = None

    def data_received(self, data: bytes) -> None:
        """Answer a request that is known, or let aiohttp read on."""
        # Without data, aiohttp asks itself to go on with what it has.
        if not (data and self._boundary.reached):
            self._boundary.go_on(data)
            super().data_received(data)
            self._has_read(data)
            return
        if not self._replies.is_enabled:
            self._read(data)
            return
        idle = self._is_idle
        if self._held:
            data = self._taken() + data
        elif idle and _is_bare_head(data):
            self._held = data
            # It is no longer idle, so it is not closed for that before it is read.
            self._stay_open()
            self._release_by = self._loop.call_later(HELD, self._release)
            return
        if not (idle and data.startswith(b"POST ") and len(data) <= LONGEST_REQUEST):
            self._read(data)
            return
        digest, head = self._replies.digest(data), None
        reply = self._replies.find(digest)
        if reply is not None:
            self._repeat(reply)
            return
        parts = self._heads.split(data)
        if parts is not None:
            head, body = parts
            reply = self._heads.reply(head, body)
            if reply is not None:
                self._replies.keep(digest, reply)
                self._give(reply)
                return
        self._read(data, digest, head)

    def drain(self) -> None:
        """Take up what is held before the server stops: its head was read."""
        self._release()
        super().drain()

    def eof_received(self) -> None:
        """Read what is held, for nothing follows it."""
        self._release()
        super().eof_received()

    def connection_lost(self, exc: BaseException | None) -> None:
        """Drop what is held: nobody waits for an answer."""
        self._taken()
        super().connection_lost(exc)

    async def finish_response(
        self, request: web.BaseRequest, resp: web.StreamResponse, start_time: float | None
    ) -> tuple[web.StreamResponse, bool]:
        """Send a reply, and keep it if it may be given again."""
        digest, head = self._digest, self._head
        resp, failed = await super().finish_response(request, resp, start_time)
        again = request.get(AGAIN)
        # One that came in the meantime is answered before any that is yet to come.
        self._answered = bool(resp.keep_alive) and not failed and not self._messages
        if not digest or has_own_id(request):
            return resp, failed
        if failed or request.version != HttpVersion11 or not resp.keep_alive:
            return resp, failed
        if isinstance(resp, web.Response) and isinstance(resp.body, bytes) and resp.status == 200:
            if again:
                self._replies.keep(digest, Reply(_head(resp), resp.body, *again))
            if head and ADMITTED in request:
                self._heads.keep(head, request[ADMITTED], resp)
        return resp, failed

    @property
    def is_amid_head(self) -> bool:
        """Whether the head of a request has begun to arrive, and no request is in progress.

        False where that cannot be told from outside of aiohttp's parser.
        """
        is_between = not (self._boundary.reached or self._is_answering or self._messages)
        return is_between and not self._held

    @property
    def has_rest(self) -> bool:
        """Whether bytes of a next request came behind the one that was answered last."""
        return self._boundary.is_passed and not self._messages

    @property
    def _is_idle(self) -> bool:
        """Whether no request is in progress, and the client takes what it is sent."""
        waits = self._answered or (self._waiter is not None and not self._waiter.done())
        return waits and not (self._messages or self._close or self._force_close or self._paused)

    def _read(self, data: bytes, digest: bytes | None = None, head: bytes | None = None) -> None:
        self._answered = False
        before = len(self._messages)
        super().data_received(data)
        headers: Mapping[str, str] | None = None
        if len(self._messages) == before + 1:
            message, _ = self._messages[-1]
            if isinstance(message, RawRequestMessage) and not message.upgrade:
                headers = message.headers
        self._boundary.begin(data, headers)
        self._digest, self._head = (digest, head) if self._boundary.reached else (None, None)
        self._has_read(data)

    def _has_read(self, data: bytes) -> None:
        """Take note of what aiohttp was given to read: no request that is known."""

    def _repeat(self, reply: Reply) -> None:
        self._give(reply)

    def _give(self, reply: Reply) -> None:
        assert self.transport is not None and self._manager is not None  # noqa: S101, PT018
        own = f"x-request-id: {new_request_id()}\r\nDate: {rfc822_formatted_time()}\r\n\r\n"
        self.transport.write(b"".join((reply.head, own.encode(), reply.body)))
        self._manager.requests_count += 1
        self._stay_open()

    def _stay_open(self) -> None:
        self._next_keepalive_close_time = self._loop.time() + self._keepalive_timeout

    def _release(self) -> None:
        held = self._taken()
        if held:
            self._read(held)

    def _taken(self) -> bytes:
        if self._release_by is not None:
            self._release_by.cancel()
            self._release_by = None
        held, self._held = self._held, b""
        return held


def _is_bare_head(data: bytes) -> bool:
    """Tell whether data is a head alone, to be followed by a body without further ado."""
    if not (data.startswith(b"POST ") and data.endswith(b"\r\n\r\n")):
        return False
    if len(data) > LONGEST_REQUEST or data.find(b"\r\n\r\n") < len(data) - 4:
        return False
    # Nothing is gained by holding one without a body, or with one in chunks: none such is kept.
    return _BODY_FOLLOWS.search(data) is not None and b"100-continue" not in data.lower()


def _head(response: web.StreamResponse) -> bytes:
    lines = [f"HTTP/1.1 {response.status} {response.reason}"]
    lines += [f"{k}: {v}" for k, v in response.headers.items() if k.lower() not in _OWN]
    return "".join(f"{line}\r\n" for line in lines).encode()
