"""One client connection: aiohttp's, with five gaps closed.

aiohttp drops a connection whose client stops in the midst of a body and listens on; here the
request fails, so that the client hears why. What is no HTTP at all is refused in OpenAI's shape
too. A head has a time limit, before the first request too, a reply has to be taken in time
(`pace`), and the number of connections is bounded (`connection_limits`). And bodies come as they
were sent: who wants them decompressed does so (`body`). How requests that come again are answered
is told in `repeating`.
"""

import asyncio
import logging
from collections.abc import Callable
from typing import Any, cast

from aiohttp import HttpVersion10, HttpVersion11, StreamReader, web
from aiohttp.abc import AbstractStreamWriter
from aiohttp.http import HttpProcessingError, RawRequestMessage
from multidict import CIMultiDict, CIMultiDictProxy

from proxy.errors import INTERNAL, RETRY_SECONDS, Failure, new_request_id

from .body import MalformedBody
from .connection_limits import ConnectionLimits
from .heads import Heads
from .pace import SendWatch, UnreadReplies, reset
from .repeating import Repeating
from .replies import Replies

log = logging.getLogger("embedding_proxy.connection")

REPLIES = web.AppKey("replies", Replies)
HEADS = web.AppKey("heads", Heads)
LIMITS = web.AppKey("limits", ConnectionLimits)
HEAD_TIMEOUT_S = web.AppKey("head_timeout_s", float)
SEND_TIMEOUT_S = web.AppKey("send_timeout_s", float)
UNREAD = web.AppKey("unread", UnreadReplies)

LINGER_S = 3.0
"""How long the rest of a body is read and dropped behind a reply that did not wait for it. Else
the reset that answers it could overtake the reply. A slow body's time and this are a slow client's.
"""
_NO_LIMITS = 1 << 30
_HEAD_SECONDS = _SEND_SECONDS = 10.0
_OVERLOADED = Failure(
    503,
    "The proxy is overloaded: it has no room for another connection (server.max_connections).",
    "server_error",
    code="proxy_overloaded",
    retry_after=RETRY_SECONDS,
)
_VERSIONS = (HttpVersion10, HttpVersion11)
_HAS_OTHER_VERSION = web.RequestKey("has_other_version", bool)
_IS_WAITING = web.RequestKey("is_waiting", bool)
"""Whether the client waits to be told that it may send the body."""
_OTHER_VERSION = Failure(
    400,
    "The request is not valid HTTP: its version is neither HTTP/1.0 nor HTTP/1.1.",
    "invalid_request_error",
)
_MAX_PROBLEM = 200
"""Characters of what aiohttp says is wrong with a request."""


TIMED_OUT = Failure(504, "The request timed out.", "server_error", code="timeout", retry_after=1)


def _problem(message: str) -> str:
    """Return what is wrong with a request, without what was sent: it may hold a password."""
    # The beginning says what is wrong; the rest quotes.
    problem = (message.splitlines() or [""])[0].partition(": b")[0].rstrip(":. ")
    is_quoted = "/" in problem or "@" in problem or not problem.isprintable() or problem == "*"
    return "its target cannot be read" if is_quoted or not problem else problem[:_MAX_PROBLEM]


def _refused(message: str) -> str:
    """Return what a client is told of bytes that aiohttp cannot read, for the reason it gives."""
    return f"The request is not valid HTTP: {_problem(message)}."


def _break_off(body: StreamReader, error: web.RequestPayloadError) -> None:
    """Let who reads a body fail. Nothing more is read, nor waited for after the reply."""
    body.set_exception(error)
    body.feed_eof()


def last_reply(failure: Failure) -> web.Response:
    """Return an error without a handler, and log it; the connection is closed behind it."""
    response = failure.response()
    own = response.headers["x-request-id"] = new_request_id()
    log.info("request %s: status %d: %s", own, failure.status, failure.message)
    response.force_close()
    return response


def _reset_unsent(transport: asyncio.Transport) -> None:
    """End a connection that would else stay open until its client takes the rest."""
    if transport.get_write_buffer_size():
        reset(transport)


class Connection(Repeating):
    """aiohttp's protocol object; there is one for each connection."""

    __slots__ = (
        "_head_deadline",
        "_head_timeout_s",
        "_limits",
        "_send_watch",
        "_unread",
        "body",
        "has_left",
        "on_leave",
    )

    def __init__(
        self,
        limits: ConnectionLimits,
        head_timeout_s: float,
        send_timeout_s: float,
        unread: UnreadReplies,
        *args: Any,  # noqa: ANN401 - aiohttp's own
        **kwargs: Any,  # noqa: ANN401
    ) -> None:
        super().__init__(*args, **{**kwargs, "auto_decompress": False, "lingering_time": LINGER_S})
        self._limits = limits
        self._head_timeout_s = head_timeout_s
        self._head_deadline: asyncio.TimerHandle | None = None
        self._unread = unread
        self._send_watch = SendWatch(self._loop, send_timeout_s, unread)
        self.body: StreamReader | None = None
        """The body of the request that was taken up last."""
        self.has_left = False
        """Whether the client sends no more; mostly it does not listen either."""
        self.on_leave: Callable[[], None] | None = None
        """Called as soon as the client has left; for the request in progress to set and unset."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Take up a connection for which there is room; refuse it otherwise."""
        peer = transport.get_extra_info("peername")
        address = str(peer[0]) if isinstance(peer, tuple) else ""
        if not self._limits.enter(self, address):
            # What comes all the same is passed over.
            self._force_close = True
            self._say_last(transport, _OVERLOADED)
            transport.close()
            return
        super().connection_made(transport)
        self._await_head()

    def _has_read(self, data: bytes) -> None:
        """End a malformed body, and give the next head its time: from its first byte on."""
        self._end_malformed_body()
        if not data:
            return
        if not self.is_amid_head or (self.body is not None and not self.body.is_eof()):
            self._stop_head_deadline()
        elif data.strip(b"\r\n"):
            self._await_head()

    async def start(self) -> None:
        """Answer requests until the connection is closed; the last reply has its time, too."""
        await super().start()
        if self.transport is not None:
            # uvloop writes at the end of a turn.
            self._loop.call_soon(self._send_watch.start, self.transport)

    def pause_writing(self) -> None:
        """Give the client a time to take what waits for it."""
        super().pause_writing()
        if self.transport is not None:
            self._send_watch.start(self.transport)

    def resume_writing(self) -> None:
        """Write on: the client has taken most of it."""
        self._send_watch.stop()
        super().resume_writing()

    def force_close(self) -> None:
        """Close the connection at once; what the kernel does not take at once is dropped."""
        transport = self.transport
        super().force_close()
        if transport is not None:
            # uvloop writes at the end of a turn.
            self._loop.call_soon(_reset_unsent, transport)

    def begin(self) -> None:
        """Take note that a request is handed to its handler."""
        super().begin()
        self._stop_head_deadline()
        self._limits.busy(self)
        if self.transport is not None:
            self._unread.bound(self.transport)

    async def finish_response(
        self, request: web.BaseRequest, resp: web.StreamResponse, start_time: float | None
    ) -> tuple[web.StreamResponse, bool]:
        """Send a reply; what has come of the next head is given its time from now on.

        An error that aiohttp made outside of every handler is put into OpenAI's shape.
        """
        if isinstance(resp, web.HTTPException) and resp.status >= 400:
            failure = Failure(resp.status, f"{resp.reason}.", "invalid_request_error")
            resp = last_reply(failure)
        sent = await super().finish_response(request, resp, start_time)
        if not self._messages:
            self._limits.idle(self)
        if self.has_rest:
            self._await_head()
        return sent

    def _stay_open(self) -> None:
        # This is the way of hits: few steps. The order matters only where room is short.
        super()._stay_open()
        if self._head_deadline is not None:
            self._stop_head_deadline()
        if self._limits.is_tight:
            self._limits.idle(self)

    def _await_head(self) -> None:
        if self._head_deadline is None:
            self._head_deadline = self._loop.call_later(self._head_timeout_s, self._give_up_head)

    def _stop_head_deadline(self) -> None:
        if self._head_deadline is not None:
            self._head_deadline.cancel()
            self._head_deadline = None

    def _give_up_head(self) -> None:
        """Close the connection: no whole head came in time. Who has begun one is told so."""
        self._head_deadline = None
        if self.transport is None or self._is_answering:
            return
        if self.is_amid_head:
            log.info("a connection was closed: no whole request head came in time")
            message = f"No whole request head arrived within {self._head_timeout_s:g} s."
            self._say_last(self.transport, Failure(408, message, "invalid_request_error"))
        self.force_close()

    @staticmethod
    def _say_last(transport: asyncio.BaseTransport, failure: Failure) -> None:
        """Write a reply without a request; the connection is closed behind it."""
        response = failure.response()
        body = response.body if isinstance(response.body, bytes) else b""
        lines = [f"HTTP/1.1 {response.status} {response.reason}"]
        lines += [f"{name}: {value}" for name, value in response.headers.items()]
        lines += [f"Content-Length: {len(body)}", f"x-request-id: {new_request_id()}"]
        head = "\r\n".join((*lines, "Connection: close")) + "\r\n\r\n"
        cast("asyncio.WriteTransport", transport).write(head.encode() + body)

    def eof_received(self) -> bool | None:  # type: ignore[override]
        """Take note that the client sends no more; return True to keep the way back open."""
        super().eof_received()
        # The body that is arriving is that of the newest request, taken up already or not.
        body = self._messages[-1][1] if self._messages else self.body
        # aiohttp waits for a request only when there is none in progress.
        if body is None or (self._waiter is not None and not self._messages):
            return None
        if not self.end_after_replies():
            self.close()
        if body.is_eof():
            self._leave()
            return True
        _break_off(body, web.RequestPayloadError("the body broke off"))
        return True

    def _end_malformed_body(self) -> None:
        """Fail the request whose body turned out malformed; aiohttp would let it wait for more."""
        error = self._messages[-1][0] if self._messages else None
        if error is None or isinstance(error, RawRequestMessage):
            return
        body = self._messages[-2][1] if len(self._messages) > 1 else self.body
        if body is None or body.is_eof():
            return
        # It is told in the reply to that request.
        self._messages.pop()
        _break_off(body, MalformedBody(_refused(error.message)))
        if not self.end_after_replies():
            self.close()

    def connection_lost(self, exc: BaseException | None) -> None:
        """Take note that the connection is no more."""
        self._limits.leave(self)
        self._stop_head_deadline()
        self._send_watch.stop()
        super().connection_lost(exc)
        self._leave()

    def _leave(self) -> None:
        self.has_left = True
        if self.on_leave is not None:
            self.on_leave()

    def handle_error(
        self,
        request: web.BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,
    ) -> web.StreamResponse:
        """Return the reply to what could not be parsed as a request, and close the connection."""
        if status >= 500 or not isinstance(exc, HttpProcessingError):
            self.log_exception("a request failed outside of its handler", exc_info=exc)
            if request.writer.output_size > 0:
                raise ConnectionError("a reply has begun; there is no room for another")
            return last_reply(INTERNAL if status != 504 else TIMED_OUT)
        return last_reply(Failure(status, _refused(message or ""), "invalid_request_error"))

    def log_exception(self, *args: object, **kwargs: object) -> None:
        """Log what aiohttp found wrong; for a client's own mistakes a line without traceback."""
        error = kwargs.get("exc_info")
        if isinstance(error, web.RequestPayloadError | ConnectionError):
            log.info("a connection was closed: %s", error)
            return
        super().log_exception(*args, **kwargs)


class Server(web.Server):
    """aiohttp's server over such connections.

    They share the limits, and the replies and heads that are kept.
    """

    connection_type = Connection

    def __init__(
        self,
        app: web.Application,
        *args: Any,  # noqa: ANN401 - aiohttp's own
        **kwargs: Any,  # noqa: ANN401
    ) -> None:
        super().__init__(*args, **kwargs)
        self._limits = app.get(LIMITS, ConnectionLimits(_NO_LIMITS))
        self._head_timeout_s = app.get(HEAD_TIMEOUT_S, _HEAD_SECONDS)
        self._send_timeout_s = app.get(SEND_TIMEOUT_S, _SEND_SECONDS)
        self._unread = app.get(UNREAD, UnreadReplies(_NO_LIMITS))
        self._replies = app.get(REPLIES, Replies(0))
        self._heads = app.get(HEADS, Heads(self._replies, lambda *_: None))

    def pre_shutdown(self) -> None:
        """Let every connection answer what it has begun to read."""
        for connection in self.connections:
            if isinstance(connection, Connection):
                connection.drain()

    def __call__(self) -> Connection:
        """Return the protocol object for a new connection."""
        return self.connection_type(
            self._limits,
            self._head_timeout_s,
            self._send_timeout_s,
            self._unread,
            self._replies,
            self._heads,
            self,
            loop=self._loop,
            **self._kwargs,
        )


class Runner(web.AppRunner):
    """aiohttp's runner over such a server.

    The parser reads requests of HTTP/0.9, 2.0 and others too; they are refused, under HTTP/1.1.
    `Expect` is dealt with here: a client that waits is told to go on, other expectations are
    ignored (RFC 9110, 10.1.1). aiohttp would do so route by route, and fail at what is no UTF-8.
    """

    async def _make_server(self) -> web.Server:
        plain = await super()._make_server()

        def make_request(
            message: RawRequestMessage,
            body: StreamReader,
            connection: web.RequestHandler,
            writer: AbstractStreamWriter,
            task: asyncio.Task[None],
        ) -> web.BaseRequest:
            if isinstance(connection, Connection):
                connection.body = body
                connection.begin()
            is_known = message.version in _VERSIONS
            if not is_known:
                message = message._replace(version=HttpVersion11, should_close=True)
            expected = message.headers.get("Expect")
            if expected is not None:
                headers = CIMultiDict(message.headers)
                headers.popall("Expect")
                message = message._replace(headers=CIMultiDictProxy(headers))
            request = plain.request_factory(message, body, connection, writer, task)
            request[_HAS_OTHER_VERSION] = not is_known
            request[_IS_WAITING] = expected is not None and expected.lower() == "100-continue"
            return request

        async def handle(request: web.BaseRequest) -> web.StreamResponse:
            if request[_HAS_OTHER_VERSION]:
                return last_reply(_OTHER_VERSION)
            if request[_IS_WAITING] and request.version == HttpVersion11:
                await request.writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
                # What was sent is no part of the reply.
                request.writer.output_size = 0
            return await plain.request_handler(request)

        return Server(
            self.app,
            handle,
            request_factory=make_request,
            loop=plain._loop,  # noqa: SLF001 - aiohttp has no other way to choose the protocol
            **plain._kwargs,  # noqa: SLF001
        )
