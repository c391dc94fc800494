"""One client connection: aiohttp's, with three gaps closed.

aiohttp drops a connection whose client stops in the midst of a body and listens on; here the
request fails, so that the client hears why. What is no HTTP at all is refused in OpenAI's shape
too. And bodies come as they were sent: who wants them decompressed does so (`body`). How requests
that come again are answered is told in `repeating`.
"""

import asyncio
import logging
from collections.abc import Callable
from typing import Any

from aiohttp import StreamReader, web
from aiohttp.abc import AbstractStreamWriter
from aiohttp.http import HttpProcessingError, RawRequestMessage

from proxy.errors import INTERNAL, Failure, new_request_id

from .heads import Heads
from .repeating import Repeating
from .replies import Replies

log = logging.getLogger("embedding_proxy.connection")

REPLIES = web.AppKey("replies", Replies)
HEADS = web.AppKey("heads", Heads)
_MAX_PROBLEM = 200
"""Characters of what aiohttp says is wrong with a request."""


TIMED_OUT = Failure(504, "The request timed out.", "server_error", code="timeout", retry_after=1)


def _problem(message: str) -> str:
    """Return what is wrong with a request, without what was sent: it may hold a password."""
    # The beginning says what is wrong; the rest quotes.
    problem = (message.splitlines() or [""])[0].partition(": b")[0].rstrip(":. ")
    is_quoted = "/" in problem or "@" in problem or not problem.isprintable() or problem == "*"
    return "its target cannot be read" if is_quoted or not problem else problem[:_MAX_PROBLEM]


class Connection(Repeating):
    """aiohttp's protocol object; there is one for each connection."""

    __slots__ = ("body", "has_left", "on_leave")

    def __init__(self, *args: Any, **kwargs: Any) -> None:  # noqa: ANN401 - aiohttp's own
        super().__init__(*args, **{**kwargs, "auto_decompress": False})
        self.body: StreamReader | None = None
        """The body of the request that was taken up last."""
        self.has_left = False
        """Whether the client sends no more; mostly it does not listen either."""
        self.on_leave: Callable[[], None] | None = None
        """Called as soon as the client has left; for the request in progress to set and unset."""

    def eof_received(self) -> bool | None:  # type: ignore[override]
        """Take note that the client sends no more; return True to keep the way back open."""
        super().eof_received()
        # The body that is arriving is that of the newest request, taken up already or not.
        body = self._messages[-1][1] if self._messages else self.body
        # aiohttp waits for a request only when there is none in progress.
        if body is None or (self._waiter is not None and not self._messages):
            return None
        self.close()
        if body.is_eof():
            self._leave()
            return True
        body.set_exception(web.RequestPayloadError("the body broke off"))
        # Nothing more is to be read, nor to be waited for after the reply.
        body.feed_eof()
        return True

    def connection_lost(self, exc: BaseException | None) -> None:
        """Take note that the connection is no more."""
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
            return self._sent(INTERNAL if status != 504 else TIMED_OUT)
        problem = _problem(message or "")
        log.info("a request that is no HTTP was refused: %s", problem)
        told = f"The request is not valid HTTP: {problem}."
        return self._sent(Failure(status, told, "invalid_request_error"))

    def _sent(self, failure: Failure) -> web.Response:
        """Return the last reply of this connection."""
        response = failure.response()
        response.headers["x-request-id"] = new_request_id()
        response.force_close()
        return response

    async def finish_response(
        self, request: web.BaseRequest, resp: web.StreamResponse, start_time: float | None
    ) -> tuple[web.StreamResponse, bool]:
        """Send a reply; an error that aiohttp made before any handler is put into OpenAI's shape.

        So it does for an expectation that it does not know (417).
        """
        if isinstance(resp, web.HTTPException) and resp.status >= 400:
            failure = Failure(resp.status, f"{resp.reason}.", "invalid_request_error")
            resp = self._sent(failure)
        return await super().finish_response(request, resp, start_time)

    def log_exception(self, *args: object, **kwargs: object) -> None:
        """Log what aiohttp found wrong; for a client's own mistakes a line without traceback."""
        error = kwargs.get("exc_info")
        if isinstance(error, web.RequestPayloadError | ConnectionError):
            log.info("a connection was closed: %s", error)
            return
        super().log_exception(*args, **kwargs)


class Server(web.Server):
    """aiohttp's server over such connections, which share the replies and heads that are kept."""

    def __init__(self, replies: Replies, heads: Heads, *args: Any, **kwargs: Any) -> None:  # noqa: ANN401
        super().__init__(*args, **kwargs)
        self._replies = replies
        self._heads = heads

    def __call__(self) -> Connection:
        """Return the protocol object for a new connection."""
        return Connection(self._replies, self._heads, self, loop=self._loop, **self._kwargs)


class Runner(web.AppRunner):
    """aiohttp's runner over such a server."""

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
            return plain.request_factory(message, body, connection, writer, task)

        replies = self.app.get(REPLIES, Replies(0))
        return Server(
            replies,
            self.app.get(HEADS, Heads(replies, lambda *_: None)),
            plain.request_handler,
            request_factory=make_request,
            loop=plain._loop,  # noqa: SLF001 - aiohttp has no other way to choose the protocol
            **plain._kwargs,  # noqa: SLF001
        )
