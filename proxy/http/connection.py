"""One client connection: a protocol of ours, in front of aiohttp's.

It sees all bytes in both directions, and hands aiohttp one request at a time: a whole head, then
its body. What waits behind that is handed on when the reply was sent. So it always knows whether a
request is in progress: from the moment when its head has come. Where none is it may answer by
itself (`response_cache`), or have the server answer without aiohttp.

It closes gaps of aiohttp's: a head has a time limit, before the first request too; a reply has to
be taken in time (`pace`); the number of connections is bounded (`connection_limits`); who stops
sending amid a body is told so; what is no HTTP is refused in OpenAI's shape; drips cost next to
nothing; and when the proxy stops, what was begun is answered. What is unusual is handed through as
it comes, and the connection ends with it.
"""

import asyncio
import logging
from collections.abc import Callable
from time import perf_counter
from typing import cast

from aiohttp import StreamReader, web
from aiohttp.helpers import rfc822_formatted_time
from aiohttp.http import RawRequestMessage

from .connection_limits import NO_ROOM, RefusedConnection, write_refusal
from .connection_server import ConnectionServer
from .errors import Failure, new_request_id
from .framing import (
    HEAD_END,
    BodyFramer,
    MalformedChunks,
    Phase,
    is_expecting,
    is_unusual,
    plain_request,
    refusal,
)
from .inner_transport import InnerTransport
from .pace import SendWatch, Timer, keep_alive, reset_unsent, unread
from .request_body import MalformedBody
from .response_cache import MAX_REQUEST, CachedResponse, RequestKey

log = logging.getLogger("embedding_proxy.connection")

HOLD_S = 0.01
"""Seconds for which a head waits for its body: many clients send them apart."""
KEEPALIVE_S = 3630.0
"""Seconds for which a connection may be idle: mostly longer than in a load balancer before it."""
MAX_BUFFER = 1 << 16
"""Bytes that wait behind the request in progress; then no more is read."""


class Connection(asyncio.Protocol):
    """The protocol object of one connection."""

    def __init__(self, server: ConnectionServer["Connection"]) -> None:
        self._server = server
        self._loop = asyncio.get_running_loop()
        self.transport: asyncio.Transport | None = None
        self._inner: web.RequestHandler | None = None
        """aiohttp's protocol; made when there is something for it."""
        self._phase = Phase.HEAD
        self._received = b""
        """What has come and was not handed on."""
        self._read = 0
        """Bytes that have come in all."""
        self._drained_at: int | None = None
        """How many they were when the connection was to be drained: no head behind them counts."""
        self._has_ended = False
        """Whether the client sends no more."""
        self._is_writing_paused = self._is_body_paused = False
        self._send_watch = SendWatch(self._loop, server.send_timeout_s, server.unread)
        self._head_deadline = Timer(self._loop, self._give_up_head)
        self._hold = Timer(self._loop, self._hand_head_on)
        self._keepalive = Timer(self._loop, self._check_idle)
        self._idle_since = self._loop.time()
        # Of the request in progress:
        self._size = 0  # Bytes of the one that the server answers: they stand before all others.
        self._body: StreamReader | None = None
        self._framer = BodyFramer(0)
        self.key: RequestKey | None = None
        """What it is known by; None if it is not to be answered from what was kept."""
        self.is_handled = False
        """Whether it has a handler: what is written is its reply."""
        self._is_answered = self._is_upgrade = self._is_broken = self._is_closing = False
        self._unhandled: list[bytes] = []
        """What aiohttp wrote without any handler: why a request cannot be read."""
        self.has_left = False
        """Whether the client sends no more; mostly it does not listen either."""
        self.on_leave: Callable[[], None] | None = None
        """Called as soon as the client has left; for the request in progress to set and unset."""
        self.on_grace_over: Callable[[], None] | None = None
        """Called when the proxy stops, and the grace period is over; set and unset likewise."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Take up a connection for which there is room; refuse it otherwise."""
        self.transport = cast("asyncio.Transport", transport)
        peer = transport.get_extra_info("peername")
        if not self._server.limits.enter(self, str(peer[0]) if isinstance(peer, tuple) else ""):
            RefusedConnection(self._server.limits, self.transport)
            return
        self._server.connections.add(self)
        keep_alive(transport)
        self._keepalive.start(KEEPALIVE_S)
        self._head_deadline.start(self._server.head_timeout_s)

    def connection_lost(self, exc: BaseException | None) -> None:
        """Take note that the connection is no more."""
        self._server.limits.leave(self)
        for timer in (self._head_deadline, self._hold, self._keepalive, self._send_watch):
            timer.stop()
        self.transport = None
        self._phase = Phase.OVER
        if self._inner is not None:
            # aiohttp would fail at a request that it has read and not taken up.
            self._loop.call_soon(self._lose_inner, exc)
        self._leave()
        self._server.connections.discard(self)
        self._server.is_lost.set()

    def _lose_inner(self, exc: BaseException | None) -> None:
        if self._inner is not None:
            self._inner.connection_lost(exc)
            self._server.fronts.pop(self._inner, None)
            self._inner = None

    def close(self) -> None:
        """Close the connection; what was written has the usual time to be taken."""
        self._phase = Phase.OVER
        if self.transport is not None and not self.transport.is_closing():
            self.transport.close()
            # uvloop writes at the end of a turn.
            self._loop.call_soon(self._send_watch.start, self.transport)

    def force_close(self) -> None:
        """Close the connection at once; what the kernel does not take at once is dropped."""
        self._phase = Phase.OVER
        if self.transport is not None:
            self.transport.close()
            self._loop.call_soon(reset_unsent, self.transport)

    @property
    def has_unread(self) -> bool:
        """Whether the client has sent what was not read yet, or a request that was not begun."""
        return HEAD_END in self._received or unread(self.transport) > 0

    def evict(self) -> None:
        """Close the connection at once, for another one; who has begun a request is told so."""
        if self._received:
            self._refuse(NO_ROOM)
        self.force_close()

    def _refuse(self, failure: Failure) -> None:
        """Write a reply without a request; the connection is closed behind it."""
        if self.transport is not None:
            write_refusal(self.transport, failure)
            self.close()

    def _check_idle(self) -> None:
        is_idle = self._phase is Phase.HEAD and not self._received
        left = self._idle_since + KEEPALIVE_S - self._loop.time() if is_idle else KEEPALIVE_S
        if left <= 0:
            self.force_close()
        self._keepalive.start(max(1.0, left))

    def data_received(self, data: bytes) -> None:
        """Answer a request that is known, or hand on what has come."""
        self._read += len(data)
        if self._phase is Phase.HEAD:
            self._received = self._received + data if self._received else data
            self._take_head()
            if len(self._received) > MAX_BUFFER:
                self._balance_reading()
        elif self._phase is Phase.THROUGH:
            if self._inner is not None:
                self._inner.data_received(data)
        elif self._phase is not Phase.OVER and not self._is_broken:
            self._received = self._received + data if self._received else data
            if self._body is not None and not self._framer.is_complete:
                self._hand_body_on()
            self._balance_reading()

    def _take_head(self) -> None:
        """Answer the next request, or hand its head on, if that has come."""
        if self._phase is not Phase.HEAD or self._is_writing_paused:
            return
        data = self._received
        if data[:1] in {b"\r", b"\n"}:
            # Empty lines before a request are passed over, and are not the end of its head.
            data = self._received = data.lstrip(b"\r\n")
        start = perf_counter()
        end = data.find(HEAD_END)
        if end < 0 or not self._may_begin(end):
            self._wait_for_head()
            return
        responses = self._server.responses
        request = plain_request(data, end, responses.max_body) if responses.is_enabled else None
        if request is not None and request.end <= min(len(data), MAX_REQUEST):
            body = data[request.begin : request.end]
            key = responses.key(request.head, body)
            response = responses.get(key, body)
            if response is not None:
                self._received = data[request.end :]
                own = new_request_id()
                self._reply(response, own)
                self._server.note_hit(key, response, own, start)
                return
            self.key = key
            if key.is_parsed:
                self._phase, self._size, self._framer = Phase.ANSWER, request.end, BodyFramer(0)
                self._hold.stop()
                self._head_deadline.stop()
                self._server.limits.busy(self)
                self._server.answer(self, key, start)
                return
        elif request is not None and request.end <= MAX_REQUEST and not is_expecting(request.head):
            self._server.limits.busy(self)
            self._head_deadline.start(self._server.head_timeout_s)
            self._hold.start(HOLD_S)
            return
        self._hand_head_on()

    def _may_begin(self, end: int) -> bool:
        """Tell whether the head that ends there came before the connection was to be drained."""
        begun = self._read - len(self._received) + end + len(HEAD_END)
        return self._drained_at is None or begun <= self._drained_at

    def _wait_for_head(self) -> None:
        if self._has_ended or self._drained_at is not None:
            self.close()
        elif self._received and is_unusual(self._received):
            self._hand_on(len(self._received), Phase.THROUGH)
        elif self._received:
            self._head_deadline.start(self._server.head_timeout_s)

    def end_answer(self, response: CachedResponse | None, own: str) -> None:
        """Write what the server has answered; None = aiohttp has to take the request up."""
        if self._phase is not Phase.ANSWER:
            return
        self._phase = Phase.HEAD
        if response is None:
            self._hand_head_on()
        else:
            self.key, self._received = None, self._received[self._size :]
            self._reply(response, own)
            self._server.limits.idle(self)
        self._balance_reading()

    @property
    def is_listening(self) -> bool:
        """Whether the client is there, and has not closed its direction of the connection."""
        return not (self.has_left or self.transport is None or self.transport.is_closing())

    def _reply(self, response: CachedResponse, own: str) -> None:
        """Write a response with this id."""
        assert self.transport is not None  # noqa: S101
        ids = f"x-request-id: {own}\r\nDate: {rfc822_formatted_time()}\r\n".encode()
        last = b"Connection: close\r\n" if self.is_last else b""
        self.transport.write(b"".join((response.head, ids, last, b"\r\n", response.body)))
        self._idle_since = self._loop.time()
        self._head_deadline.stop()
        if self._hold.stop() or self._server.limits.is_tight:
            self._server.limits.idle(self)
        # Who was told that the connection is closed sends nothing more on it.
        self._has_ended |= bool(last)
        if self._received or last:
            self._loop.call_soon(self._take_next)

    def _hand_head_on(self) -> None:
        """Hand a whole head to aiohttp; if it is unusual, with all that comes behind it."""
        end = self._received.find(HEAD_END) + len(HEAD_END)
        if is_unusual(self._received[:end]):
            self._hand_on(len(self._received), Phase.THROUGH)
        else:
            self._hand_on(end, Phase.BODY)

    def _hand_on(self, size: int, phase: Phase) -> None:
        """Hand so many bytes to aiohttp, which takes a request up in the next turn of the loop.

        Until then the time for the head goes on.
        """
        self._hold.stop()
        self._head_deadline.start(self._server.head_timeout_s)
        self._phase = phase
        data, self._received = self._received[:size], self._received[size:]
        self._body, self._framer = None, BodyFramer(0)
        if phase is Phase.THROUGH:
            self.key = None
        self._is_answered = self._is_upgrade = False
        self._server.limits.busy(self)
        assert self.transport is not None  # noqa: S101 - else nothing would come
        self._server.unread.bound(self.transport)
        if self._inner is None:
            self._inner = self._server.new_inner()
            self._server.fronts[self._inner] = self
            hooks = (self._write, self._close_inner, self._set_body_reading)
            self._inner.connection_made(InnerTransport(self.transport, *hooks))
            if self._is_writing_paused:
                self._inner.pause_writing()
        self._inner.data_received(data)

    def begin(self, message: RawRequestMessage, body: StreamReader) -> None:
        """Hand the body on: aiohttp has read a head, or failed to."""
        self._head_deadline.stop()
        self.is_handled = False
        self._body = body
        self._is_upgrade = bool(message.upgrade)
        if self._phase is not Phase.BODY:
            return
        framer = BodyFramer.of(message.headers, is_chunked=message.chunked)
        if framer is None:
            self._phase = Phase.THROUGH
            self._hand_rest_on()
            return
        self._framer = framer
        # What follows a CONNECT is for whom no connection is made to.
        self._is_broken = message.method == "CONNECT"
        self._hand_body_on()
        if self._has_ended:
            self._end_input()

    def _hand_body_on(self) -> None:
        if self._received and not self._framer.is_complete:
            try:
                body, self._received = self._framer.feed(self._received)
            except MalformedChunks as error:
                # It is told in the reply to that request.
                self._break_off(MalformedBody(refusal(str(error)).message))
                return
            if body and self._inner is not None:
                self._inner.data_received(body)
        self._finish()

    def _break_off(self, error: web.RequestPayloadError) -> None:
        """Let who reads the body fail; the connection is closed behind the reply."""
        self._is_broken = True
        self._received = b""
        if self._body is not None and not self._body.is_eof():
            self._body.set_exception(error)
            self._body.feed_eof()
        self._finish()

    @property
    def is_last(self) -> bool:
        """Whether the connection is to be closed behind the reply to the request in progress."""
        if self._is_broken or self._phase is Phase.THROUGH:
            return True
        is_over = self._has_ended or self._drained_at is not None or self._server.is_retiring
        return is_over and not self._has_next

    @property
    def _has_next(self) -> bool:
        """Whether the head of another request has come that is to be answered, too."""
        if not self._framer.is_complete:
            return False
        rest = self._received.lstrip(b"\r\n")
        end = rest.find(HEAD_END)
        return end >= 0 and self._may_begin(end + len(self._received) - len(rest))

    def hold_body(self, max_bytes: int) -> None:
        """Hand on no less than so many bytes of the body at a time, but for the last.

        For who reads a body as a whole: to wake it for each byte would cost ten times as much.
        """
        self._framer.min_part = max_bytes

    def finish(self, *, is_kept_open: bool) -> None:
        """Take note that the whole reply was written."""
        self._is_answered = True
        self._is_closing |= not is_kept_open
        self._finish()

    def _finish(self) -> None:
        done = self._is_answered and (self._framer.is_complete or self._is_broken)
        if done and self._phase is Phase.BODY:
            # aiohttp is to end its own work on it first.
            self._loop.call_soon(self._go_on)

    def _go_on(self) -> None:
        if self._phase is not Phase.BODY:
            return
        self._body = self.key = None
        if self._is_broken:
            self.close()
        elif self._is_closing:
            self._phase = Phase.OVER  # aiohttp closes it.
        else:
            self._phase = Phase.HEAD
            self._idle_since = self._loop.time()
            self._server.limits.idle(self)
            self._take_next()

    def _take_next(self) -> None:
        self._take_head()
        self._balance_reading()

    def _write(self, parts: list[bytes]) -> None:
        """Write what aiohttp has to say; what it says without a handler takes another form."""
        if not self.is_handled:
            self._unhandled += parts
            return
        if self.transport is None:
            return
        self.transport.writelines(parts)
        if self._is_upgrade and self._phase is Phase.BODY and parts[0].startswith(b"HTTP/1.1 101"):
            # What follows is no HTTP; aiohttp is about to say to whom it goes.
            self._phase = Phase.THROUGH
            self._loop.call_soon(self._hand_rest_on)

    def _hand_rest_on(self) -> None:
        data, self._received = self._received, b""
        if data and self._inner is not None:
            self._inner.data_received(data)

    def _close_inner(self) -> None:
        """Close the connection as aiohttp wants it; refuse a request that it could not read."""
        if self.is_handled or not self._unhandled:
            self.close()
            return
        _, _, why = b"".join(self._unhandled).partition(HEAD_END)
        self._unhandled = []
        self._refuse(refusal(why.decode(errors="replace")))

    def _set_body_reading(self, is_reading: bool) -> None:  # noqa: FBT001
        """Read on, or no more: who reads the body is behind."""
        self._is_body_paused = not is_reading
        self._balance_reading()

    def _balance_reading(self) -> None:
        should_read = len(self._received) <= MAX_BUFFER and not self._is_body_paused
        if self.transport is None or self.transport.is_closing():
            return
        if self.transport.is_reading() != should_read:
            if should_read:
                self.transport.resume_reading()
            else:
                self.transport.pause_reading()

    def pause_writing(self) -> None:
        """Give the client a time to take what waits for it."""
        self._is_writing_paused = True
        if self._inner is not None:
            self._inner.pause_writing()
        if self.transport is not None:
            self._send_watch.start(self.transport)

    def resume_writing(self) -> None:
        """Write on: the client has taken most of it."""
        self._is_writing_paused = False
        self._send_watch.stop()
        if self._inner is not None:
            self._inner.resume_writing()
        self._loop.call_soon(self._take_next)

    def eof_received(self) -> bool:
        """Take note that the client sends no more; return True to keep the way back open."""
        self._has_ended = True
        if self._hold.stop():
            self._hand_head_on()
        if self._phase is Phase.HEAD:
            return HEAD_END in self._received
        if self._phase is Phase.OVER:
            return False
        # Else aiohttp may refuse in the next turn what it has read.
        if self._body is not None or self._phase is Phase.ANSWER:
            self._end_input()
        return True

    def _end_input(self) -> None:
        body = self._body if self._phase is Phase.THROUGH else None
        if self._framer.is_complete if body is None else body.is_eof():
            self._leave()
        else:
            self._break_off(web.RequestPayloadError("the body broke off"))

    def _leave(self) -> None:
        self.has_left = True
        if self.on_leave is not None:
            self.on_leave()

    def drain(self) -> None:
        """Answer the requests whose head has come, then close; close at once if there is none."""
        if self._hold.stop():
            self._hand_head_on()
        self._drained_at = self._read
        if self._phase is Phase.HEAD:
            if HEAD_END in self._received:
                self._take_head()
            else:
                self.close()
        elif self._phase is Phase.THROUGH and self._body is None:
            self.close()

    def _give_up_head(self) -> None:
        """Close the connection: no whole head came in time. Who has begun one is told so."""
        if self._received or self._phase is not Phase.HEAD:
            log.info("a connection was closed: no whole request head came in time")
            message = f"No whole request head arrived within {self._server.head_timeout_s:g} s."
            self._refuse(Failure(408, message, "invalid_request_error"))
        self.force_close()
