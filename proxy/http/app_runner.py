"""aiohttp's server behind our connections: how requests get to the application, and errors back.

The parser reads requests of HTTP/0.9, 2.0 and others too; they are refused, under HTTP/1.1.
`Expect` is dealt with here: a client that waits is told to go on, other expectations are ignored
(RFC 9110, 10.1.1). aiohttp would do so route by route, and fail at what is no UTF-8. Bodies come as
they were sent: who wants them decompressed does so (`request_body`).
"""

import asyncio
import logging
import socket
import ssl
from collections.abc import Awaitable, Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from time import perf_counter

from aiohttp import HttpVersion10, HttpVersion11, StreamReader, web
from aiohttp.abc import AbstractStreamWriter
from aiohttp.http import HttpProcessingError, RawRequestMessage
from multidict import CIMultiDict, CIMultiDictProxy

from .connection import Connection
from .connection_limits import ConnectionLimits
from .errors import INTERNAL, Failure, new_request_id
from .pace import UnreadReplies
from .request_log import BEGIN, REQUEST_ID, RequestLog, has_own_id
from .request_metrics import CLIENT_GONE, EMBEDDINGS, RequestMetrics
from .response_cache import CachedResponse, RequestKey, ResponseCache

log = logging.getLogger("embedding_proxy.connection")

RESPONSES = web.AppKey("responses", ResponseCache)
LIMITS = web.AppKey("limits", ConnectionLimits)
REQUESTS = web.AppKey("requests", RequestMetrics)
LINES = web.AppKey("lines", RequestLog)
HEAD_TIMEOUT_S = web.AppKey("head_timeout_s", float)
SEND_TIMEOUT_S = web.AppKey("send_timeout_s", float)
UNREAD = web.AppKey("unread", UnreadReplies)
CONNECTION = web.RequestKey("connection", Connection)
"""The connection that a request came on."""

LINGER_S = 3.0
"""How long the rest of a body is read and dropped behind a reply that did not wait for it. Else
the reset that answers it could overtake the reply. A slow body's time and this are a slow client's.
"""
_NO_LIMITS = 1 << 30
_HEAD_SECONDS = _SEND_SECONDS = 10.0
_FOREVER_S = 1e9
"""The front closes idle connections, not aiohttp."""
_GOODBYE_SECONDS = 1.0
"""For what is told that the grace period is over."""
_LAST_SECONDS = 0.1
"""For a handler to end after the grace period is over and its request was cancelled."""
_BACKLOG = 128
_VERSIONS = (HttpVersion10, HttpVersion11)
_HAS_OTHER_VERSION = web.RequestKey("has_other_version", bool)
_IS_WAITING = web.RequestKey("is_waiting", bool)
"""Whether the client waits to be told that it may send the body."""
_OTHER_VERSION = Failure(
    400,
    "The request is not valid HTTP: its version is neither HTTP/1.0 nor HTTP/1.1.",
    "invalid_request_error",
)
TIMED_OUT = Failure(504, "The request timed out.", "server_error", code="timeout", retry_after=1)


def last_reply(failure: Failure) -> web.Response:
    """Return an error without a handler, and log it; the connection is closed behind it."""
    response = failure.response()
    own = response.headers["x-request-id"] = new_request_id()
    log.info("request %s: status %d: %s", own, failure.status, failure.message)
    response.force_close()
    return response


class _HandlerLog(logging.Filter):
    """What aiohttp logs of requests: no traceback for a client's own mistakes, and no bytes."""

    def filter(self, record: logging.LogRecord) -> bool:
        error = record.exc_info[1] if record.exc_info else None
        if isinstance(error, HttpProcessingError):
            return False  # The connection tells of it.
        if isinstance(error, web.RequestPayloadError | ConnectionError):
            record.levelno, record.levelname = logging.INFO, "INFO"
            record.msg, record.args, record.exc_info = f"a connection was closed: {error}", (), None
        return log.isEnabledFor(record.levelno)


_handler_log = logging.getLogger("embedding_proxy.connection.handler")
_handler_log.addFilter(_HandlerLog())


class _Generation:
    """An application that is open, and the requests that it answers."""

    def __init__(self, app: web.Application) -> None:
        self.app = app
        self.runner = web.AppRunner(app)
        self.requests = 0
        self.is_idle = asyncio.Event()
        self.is_idle.set()

    async def open(self) -> None:
        """Start the application; on a failure nothing of it is left open."""
        try:
            await self.runner.setup()
        except BaseException:
            await self.runner.cleanup()
            raise

    @property
    def server(self) -> web.Server:
        """What makes and handles its requests."""
        server = self.runner.server
        assert server is not None  # noqa: S101 - there are no requests before it is open
        return server

    @contextmanager
    def request(self) -> Iterator[None]:
        """Count a request for as long as the block runs."""
        self.requests += 1
        self.is_idle.clear()
        try:
            yield
        finally:
            self.requests -= 1
            if not self.requests:
                self.is_idle.set()


class Runner:
    """Serves an application, on sockets that it is given.

    Another application may take its place: no connection is closed for it. Requests that were begun
    are answered by the one that they were begun with.
    """

    def __init__(self, app: web.Application, *, shutdown_timeout: float = 60.0) -> None:
        """`shutdown_timeout` is how long requests in progress have to end, in seconds."""
        self._generation = _Generation(app)
        self._retiring: set[asyncio.Task[None]] = set()
        """What waits for the end of former applications."""
        self._answers: set[asyncio.Task[None]] = set()
        """The requests that are answered without aiohttp."""
        self._is_stopping = asyncio.Event()
        self._shutdown_timeout = shutdown_timeout
        self.limits = app.get(LIMITS, ConnectionLimits(_NO_LIMITS))
        self._adopt(app)
        self.is_retiring = False
        self.connections: set[Connection] = set()
        self.fronts: dict[web.RequestHandler, Connection] = {}
        self._server: web.Server | None = None
        self._listening: list[asyncio.Server] = []
        self.is_lost = asyncio.Event()

    @property
    def addresses(self) -> list[tuple[str, int]]:
        """The addresses that are listened on."""
        return [socket.getsockname() for server in self._listening for socket in server.sockets]

    async def setup(self) -> None:
        """Start the application."""
        await self._generation.open()
        self._server = web.Server(
            self._handle,
            request_factory=self._make_request,
            access_log=None,
            auto_decompress=False,
            keepalive_timeout=_FOREVER_S,
            lingering_time=LINGER_S,
            logger=_handler_log,
            tcp_keepalive=False,
        )

    def _adopt(self, app: web.Application) -> None:
        """Take over what an application says of connections."""
        self.head_timeout_s = app.get(HEAD_TIMEOUT_S, _HEAD_SECONDS)
        self.send_timeout_s = app.get(SEND_TIMEOUT_S, _SEND_SECONDS)
        self.unread = app.get(UNREAD, UnreadReplies(_NO_LIMITS))
        self.requests = app.get(REQUESTS, RequestMetrics())
        self.lines = app.get(LINES, RequestLog(is_enabled=False))
        self.responses = app.get(RESPONSES, ResponseCache(0, is_enabled=False))

    async def replace(
        self, app: web.Application, drain: Callable[[web.Application], Awaitable[None]]
    ) -> None:
        """Let another application answer the requests that begin from now on.

        It is opened first: if that fails, all is as it was, and the failure is raised. The former
        one is closed once its requests are answered and `drain` has returned.
        """
        new = _Generation(app)
        await new.open()
        old, self._generation = self._generation, new
        self.limits.resize(app.get(LIMITS, ConnectionLimits(_NO_LIMITS)))
        self._adopt(app)
        task = asyncio.create_task(self._retire(old, drain))
        self._retiring.add(task)
        task.add_done_callback(self._retiring.discard)

    async def _retire(
        self, old: _Generation, drain: Callable[[web.Application], Awaitable[None]]
    ) -> None:
        async def finish() -> None:
            await old.is_idle.wait()
            await drain(old.app)

        both = {asyncio.create_task(finish()), asyncio.create_task(self._is_stopping.wait())}
        await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
        for task in both:
            task.cancel()
        await asyncio.gather(*both, return_exceptions=True)
        await old.runner.cleanup()

    async def retire(self, timeout_s: float) -> None:
        """Close connections behind their next reply, for so many seconds, until there is none.

        New ones are still answered.
        """
        self.is_retiring = True
        await self._until_lost(timeout_s)

    def stop_listening(self) -> None:
        """Accept no further connection."""
        for server in self._listening:
            server.close()

    async def listen(
        self,
        listening: socket.socket | None = None,
        host: str = "127.0.0.1",
        port: int = 0,
        *,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        """Accept connections on a socket, or on an address; encrypted if `tls` is given."""
        loop = asyncio.get_running_loop()
        where = {"host": host, "port": port} if listening is None else {"sock": listening}
        server = await loop.create_server(
            lambda: Connection(self), backlog=_BACKLOG, ssl=tls, **where
        )
        self._listening.append(server)

    async def cleanup(self) -> None:
        """Stop: answer what was begun within the time for that, then end the application.

        Connections without a request are closed at once. What has no end of its own, a WebSocket,
        is told that the time is over, and has a moment to say so to both sides.
        """
        self.stop_listening()
        # What has arrived is read first.
        await asyncio.sleep(0)
        for connection in list(self.connections):
            connection.drain()
        self.limits.close_refused()
        await self._until_lost(self._shutdown_timeout)
        callbacks = [
            open_connection.on_grace_over
            for open_connection in self.connections
            if open_connection.on_grace_over is not None
        ]
        for tell in callbacks:
            tell()
        if callbacks:
            await self._until_lost(_GOODBYE_SECONDS)
        for task in self._answers:
            task.cancel()
        if self._server is not None:
            await self._server.shutdown(min(self._shutdown_timeout, _LAST_SECONDS))
        if self._answers:
            await asyncio.wait(self._answers, timeout=_LAST_SECONDS)
        for connection in list(self.connections):
            connection.force_close()
        self._is_stopping.set()
        if self._retiring:
            await asyncio.wait(self._retiring)
        await self._generation.runner.cleanup()

    async def _until_lost(self, timeout_s: float) -> None:
        """Wait until there is no connection, for so many seconds at most."""
        with suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                while self.connections:
                    self.is_lost.clear()
                    await self.is_lost.wait()

    def new_inner(self) -> web.RequestHandler:
        """Return another protocol object of aiohttp's."""
        assert self._server is not None  # noqa: S101 - there are no connections before `setup`
        return self._server()

    def note_hit(self, key: RequestKey, response: CachedResponse, own: str, start: float) -> None:
        """Count a request that a connection has answered by itself, and log it."""
        now = perf_counter()
        seconds = now - start
        self.requests.observe_hit(seconds)
        if self.lines.has_room(now):
            context = self.responses.heads.get(key.head)
            client = "" if context is None else context.caller.client
            self.lines.write_hit(response.head, response.body, own, client, seconds)

    def answer(self, connection: Connection, key: RequestKey, start: float) -> None:
        """Answer a request whose head is known, without aiohttp; see `connection.Server`."""
        key.start, key.request_id = start, new_request_id()
        # From this moment on it is a request of this application, which may be replaced.
        requests = ExitStack()
        requests.enter_context(self._generation.request())
        work = self._answer_known(connection, key, self.responses)
        task = asyncio.get_running_loop().create_task(work)
        self._answers.add(task)
        task.add_done_callback(self._answers.discard)
        task.add_done_callback(lambda _: requests.close())

    async def _answer_known(
        self, connection: Connection, key: RequestKey, responses: ResponseCache
    ) -> None:
        """Answer a parsed request; if that fails, its handler raises the failure."""
        requests, lines, response = self.requests, self.lines, None
        requests.in_flight += 1
        try:
            answer = await responses.answer(key, lambda: connection.is_listening)
            response = answer.response
        except Exception as error:  # noqa: BLE001 - the handler raises it
            key.failure = error
        finally:
            requests.in_flight -= 1
        transport = connection.transport
        is_lost = transport is None or transport.is_closing()
        connection.end_answer(response, key.request_id)
        seconds = perf_counter() - key.start
        if response is None:
            if is_lost:
                reason = type(key.failure).__name__
                log.info("request %s failed when its client had left: %s", key.request_id, reason)
                requests.observe(EMBEDDINGS, CLIENT_GONE, seconds)
            return
        requests.observe(EMBEDDINGS, 200, seconds, answer.headers.get("x-cache"))
        client = "" if key.context is None else key.context.caller.client
        lines.write_answer(key.request_id, client, answer, seconds)

    def _make_request(
        self,
        message: RawRequestMessage,
        body: StreamReader,
        inner: web.RequestHandler,
        writer: AbstractStreamWriter,
        task: asyncio.Task[None],
    ) -> web.BaseRequest:
        connection = self.fronts.get(inner)
        if connection is not None:
            connection.begin(message, body)
        is_known = message.version in _VERSIONS
        if not is_known:
            message = message._replace(version=HttpVersion11, should_close=True)
        expected = message.headers.get("Expect")
        if expected is not None:
            headers = CIMultiDict(message.headers)
            headers.popall("Expect")
            message = message._replace(headers=CIMultiDictProxy(headers))
        request = self._generation.server.request_factory(message, body, inner, writer, task)
        request[_HAS_OTHER_VERSION] = not is_known
        request[_IS_WAITING] = expected is not None and expected.lower() == "100-continue"
        if connection is not None:
            request[CONNECTION] = connection
            key = connection.key
            if key is not None and key.failure is not None:
                request[REQUEST_ID], request[BEGIN] = key.request_id, key.start
        return request

    async def _handle(self, request: web.BaseRequest) -> web.StreamResponse:
        """Answer a request to the last byte, so that the connection knows when that was sent."""
        connection = request[CONNECTION]
        connection.is_handled = True
        generation = self._generation
        with generation.request():
            return await self._answer(request, connection, generation)

    async def _answer(
        self, request: web.BaseRequest, connection: Connection, generation: _Generation
    ) -> web.StreamResponse:
        response = await self._respond(request, generation.server)
        if connection.is_last:
            response.force_close()
        try:
            await response.prepare(request)
            await response.write_eof()
        except ConnectionError:
            return response  # aiohttp comes to the same conclusion.
        if connection.is_last:
            response.force_close()
        is_kept_open = bool(response.keep_alive)
        key = connection.key
        if (
            key is not None
            and is_kept_open
            and response.status == 200
            and isinstance(response, web.Response)
            and request.version == HttpVersion11
            and not has_own_id(request)
            and generation is self._generation
        ):
            self.responses.learn(key, request, response)
        connection.finish(is_kept_open=is_kept_open)
        return response

    async def _respond(self, request: web.BaseRequest, server: web.Server) -> web.StreamResponse:
        """Return the application's reply, or an error in OpenAI's shape.

        Raises ConnectionError where a reply has begun that cannot be ended.
        """
        if request[_HAS_OTHER_VERSION]:
            return last_reply(_OTHER_VERSION)
        if request[_IS_WAITING] and request.version == HttpVersion11:
            await request.writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
            # What was sent is no part of the reply.
            request.writer.output_size = 0
        try:
            return await server.request_handler(request)
        except web.HTTPException as error:
            if error.status < 400:
                return error
            return last_reply(Failure(error.status, f"{error.reason}.", "invalid_request_error"))
        except Exception as error:
            _handler_log.exception("a request failed outside of its handler")
            if request.writer.output_size > 0:
                raise ConnectionError("a reply has begun; there is no room for another") from error
            return last_reply(TIMED_OUT if isinstance(error, TimeoutError) else INTERNAL)
