"""Clients that send a body, or take a reply, as slowly as they can: they are not waited for."""

import asyncio
import base64
import json
import os
import socket
from collections.abc import Callable

import pytest
from aiohttp import web
from any_server import AnyServer, echo
from clock import until
from embedding_proxy.proxy.config.schema import Settings
from embedding_proxy.proxy.http import app_runner
from embedding_proxy.proxy.http.app_runner import LIMITS
from embedding_proxy.proxy.http.pace import (
    MIN_BUSY_BYTES_PER_S,
    MIN_BYTES_PER_S,
    Pace,
    SendWatch,
    UnreadReplies,
)
from pydantic import ValidationError
from talk import Talk

MODEL = "text-embedding-3-small"
SECONDS = 60
SOON = 0.2
MANY = 500
"""Inputs whose vectors no buffer of a kernel holds: 15 MB as floats."""

LENGTH = b"Content-Length: 100000\r\n", b" "
CHUNKED = b"Transfer-Encoding: chunked\r\n", b"1\r\n \r\n"
NEVER = 3600


def _head(path: str, *lines: bytes) -> bytes:
    first = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    return b"".join((first.encode(), *lines, b"\r\n"))


def _request(body: object) -> bytes:
    content = json.dumps(body).encode()
    return _head("/v1/embeddings", b"Content-Length: %d\r\n" % len(content)) + content


BULK = _request(
    {"model": MODEL, "input": [str(i) for i in range(MANY)], "encoding_format": "float"}
)


# --- bodies ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["/v1/embeddings", "/v1/files"])
@pytest.mark.parametrize("form", [LENGTH, CHUNKED], ids=["length", "chunked"])
async def test_a_body_that_drips_is_a_408(form, path, start_proxy, monkeypatch):
    """A byte now and then wins no time, nor is the rest waited for long after the reply."""
    monkeypatch.setattr(app_runner, "LINGER_S", 0.2)
    line, drip = form
    async with AnyServer() as other:
        server = {"body_timeout_s": SOON}
        proxy = await start_proxy(openai=other, passthrough="openai", server=server)
        async with asyncio.timeout(SECONDS), Talk(proxy.url, _head(path, line)) as talk:
            reply = asyncio.create_task(talk.response())
            while not reply.done():
                await talk.send(drip)
                await asyncio.wait([reply], timeout=SOON / 2)
            status, headers, content = await reply
            assert (status, headers["connection"]) == (408, "close")
            assert content["error"].keys() == {"message", "type", "param", "code"}
            assert "server.body_timeout_s" in content["error"]["message"]
            assert await talk.is_over()
            await until(lambda: not len(proxy.app[LIMITS]))


@pytest.mark.parametrize("path", ["/v1/embeddings", "/v1/files"])
async def test_what_an_upload_waits_for_upstream_is_not_the_clients(path, start_proxy):
    """Only the waits for the client count."""
    body = json.dumps({"model": MODEL, "input": "a"}).encode()
    line = b"Content-Length: %d\r\n" % len(body)
    gate = asyncio.Event()

    async def act(request):
        await gate.wait()
        return await echo(request)

    async with AnyServer(act) as other:
        server = {"body_timeout_s": SOON, "head_timeout_s": SOON}
        proxy = await start_proxy(openai=other, passthrough="openai", server=server)
        async with asyncio.timeout(SECONDS), Talk(proxy.url, _head(path, line) + body) as talk:
            async with Talk(proxy.url, b"") as silent:
                assert await silent.is_over()
            gate.set()
            head = await talk.reader.readuntil(b"\r\n\r\n")
            assert b" 408 " not in head


def test_a_slow_line_has_all_the_time_it_needs():
    """An hour at a little over the least rate, with pauses; then a pause that is too long."""
    pace = Pace(10)
    for _ in range(360):
        assert pace.note(9.5, 0)
        assert pace.note(0.5, 10 * MIN_BYTES_PER_S)
    assert pace.left_s == 10
    assert not pace.note(10, 0)


@pytest.mark.parametrize(("size", "seconds"), [(0, 10), (1, 11), (MIN_BYTES_PER_S // 2, 20)])
def test_what_drips_ends_soon(size, seconds):
    """Much that came at once wins no more time than the budget."""
    pace = Pace(10)
    assert pace.note(1, 50_000_000)
    waits = 1
    while pace.note(1, size):
        waits += 1
    assert seconds - 1 <= waits <= seconds


# --- replies --------------------------------------------------------------------------------------


async def _lost(proxy) -> None:
    await until(lambda: not len(proxy.app[LIMITS]))


def _deaf(url: str, sent: bytes) -> socket.socket:
    """Return a connection of which nothing is read."""
    host, _, port = url.removeprefix("http://").partition("/")[0].partition(":")
    deaf = socket.create_connection((host, int(port)))
    deaf.sendall(sent)
    return deaf


def _ends_in_reset(deaf: socket.socket) -> bool:
    """Tell whether what comes ends in disorder, so that nobody takes it for a whole reply."""
    try:
        while deaf.recv(1 << 20):
            pass
    except ConnectionResetError:
        return True
    return False


@pytest.mark.parametrize("request_", [BULK, _head("/v1/files", b"Content-Length: 0\r\n")])
async def test_a_reply_that_nobody_reads_is_cut(request_, start_proxy, upstream):
    """A long one of our own, or one that is passed on; the connection is gone, not half closed."""

    async def act(_):
        return web.Response(body=b"x" * (32 << 20))

    async with AnyServer(act) as other:
        proxy = await start_proxy(
            openai=upstream if request_ is BULK else other,
            passthrough="openai",
            server={"send_timeout_s": SOON},
        )
        async with asyncio.timeout(SECONDS):
            with _deaf(proxy.url, request_) as deaf:
                await until(lambda: len(proxy.app[LIMITS]))
                await _lost(proxy)
                assert _ends_in_reset(deaf)


class FakeLoop:
    """Time that passes when it is told to."""

    now = 0.0
    due: Callable[[], None] | None = None

    def time(self) -> float:
        return self.now

    def call_later(self, seconds: float, call: Callable[..., None], *args: object) -> "FakeLoop":
        self.due, self._in = (lambda: call(*args)), seconds
        return self

    def cancel(self) -> None:
        self.due = None

    def pass_on(self) -> float:
        """Let the next timer run out; return how long it was."""
        call, self.due = self.due, None
        self.now += self._in
        call()
        return self._in


class FakeTransport:
    """A connection with so much to send."""

    is_aborted = False

    def __init__(self, size: int) -> None:
        self.size = size

    def get_write_buffer_size(self) -> int:
        return self.size

    def get_extra_info(self, _: str) -> None:
        return None

    def abort(self) -> None:
        self.is_aborted = True


def _watched(size: int, unread: UnreadReplies | None = None) -> tuple[FakeLoop, FakeTransport]:
    loop, transport = FakeLoop(), FakeTransport(size)
    SendWatch(loop, 10, unread or UnreadReplies(1 << 30)).start(transport)
    return loop, transport


@pytest.mark.parametrize(("rate", "seconds"), [(0, 10), (1, 11), (2 * MIN_BYTES_PER_S, NEVER)])
def test_who_takes_too_little_is_cut(rate, seconds):
    """In about the time that is configured, if next to nothing is taken."""
    loop, transport = _watched(1 << 30)
    while loop.due is not None and loop.now < seconds:
        transport.size -= rate
        loop.pass_on()
    assert transport.is_aborted is (seconds < NEVER)


def test_who_takes_a_reply_slowly_gets_all_of_it():
    """At a little over the least rate, for as long as it takes."""
    size = 3600 * MIN_BYTES_PER_S
    loop, transport = _watched(size)
    while loop.due is not None:
        transport.size = max(0, int(size - loop.now * MIN_BYTES_PER_S * 1.01))
        loop.pass_on()
    assert not transport.is_aborted
    assert loop.now > 3500


@pytest.mark.parametrize(
    ("held", "rate", "is_cut"),
    [(101, 0, True), (101, MIN_BUSY_BYTES_PER_S, False), (100, 0, False)],
)
def test_where_unread_replies_hold_too_much_more_is_asked(held, rate, is_cut):
    """Who takes next to nothing in a second makes room; who goes on reading is let alone."""
    unread = UnreadReplies(100)
    with unread.hold(held):
        loop, transport = _watched(1 << 30, unread)
        transport.size -= rate
        assert loop.pass_on() == 1
    assert transport.is_aborted is is_cut
    assert not unread.is_over


async def test_the_vectors_of_an_unread_reply_are_counted(start_proxy, upstream):
    """Beyond `server.max_unread_mib` it is cut though its time is not over."""
    server = {"send_timeout_s": NEVER, "max_unread_mib": 1}
    proxy = await start_proxy(openai=upstream, server=server)
    async with asyncio.timeout(SECONDS):
        with _deaf(proxy.url, BULK):
            await until(lambda: len(proxy.app[LIMITS]))
            await _lost(proxy)


async def test_a_stream_without_news_is_not_cut(start_proxy):
    """Who waits for the next event of a stream takes all that it is sent."""
    gate = asyncio.Event()

    async def act(request):
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        await response.write(b"data: 1\n\n")
        await gate.wait()
        await response.write(b"data: 2\n\n")
        return response

    async with AnyServer(act) as other:
        server = dict.fromkeys(("head_timeout_s", "body_timeout_s", "send_timeout_s"), SOON)
        proxy = await start_proxy(openai=other, passthrough="openai", server=server)
        async with asyncio.timeout(SECONDS):
            response = await proxy.http.post(f"{proxy.url}/responses", json={"stream": True})
            assert await response.content.readline() == b"data: 1\n"
            for _ in range(3):
                async with Talk(proxy.url, b"") as silent:
                    assert await silent.is_over()
            gate.set()
            assert (await response.content.read()).endswith(b"data: 2\n\n")


async def test_a_websocket_that_nobody_reads_is_cut(start_proxy):
    """The upstream's connection ends with it."""
    over = asyncio.Event()

    async def act(request):
        sink = web.WebSocketResponse()
        await sink.prepare(request)
        try:
            while True:
                await sink.send_bytes(b"x" * (1 << 20))
        finally:
            over.set()

    lines = (
        b"GET /v1/realtime HTTP/1.1\r\nHost: localhost\r\nConnection: Upgrade\r\n"
        b"Upgrade: websocket\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: "
    )
    handshake = lines + base64.b64encode(os.urandom(16)) + b"\r\n\r\n"
    async with AnyServer(act) as other:
        proxy = await start_proxy(
            openai=other, passthrough="openai", server={"send_timeout_s": SOON}
        )
        async with asyncio.timeout(SECONDS):
            with _deaf(proxy.url, handshake):
                await over.wait()
                await _lost(proxy)


@pytest.mark.parametrize("key", ["body_timeout_s", "send_timeout_s", "max_unread_mib"])
def test_a_limit_is_above_zero(key):
    """Zero would serve nobody."""
    with pytest.raises(ValidationError, match=key):
        Settings.model_validate({"server": {key: 0}})


class FakeSocket:
    """Notes what is set."""

    def __init__(self) -> None:
        self.options: list[int] = []

    def setsockopt(self, _level: int, name: int, _value: int) -> None:
        self.options.append(name)


@pytest.mark.skipif(not hasattr(socket, "TCP_NOTSENT_LOWAT"), reason="the system has no such bound")
def test_the_kernel_keeps_little_only_while_many_are_waited_for():
    """Each watch counts once, and no longer when it ends, in whichever way."""
    unread = UnreadReplies(1 << 30)
    fakes = [FakeTransport(1000) for _ in range(40)]
    loops = [FakeLoop() for _ in fakes]
    watches = [SendWatch(one, 10, unread) for one in loops]
    deaf = FakeSocket()
    transport = FakeTransport(0)
    transport.get_extra_info = lambda _: deaf
    unread.bound(transport)
    assert deaf.options == []
    for watch, fake in zip(watches, fakes, strict=True):
        watch.start(fake)
        watch.start(fake)
    assert unread.waited_for == 40
    unread.bound(transport)
    assert deaf.options == [socket.TCP_NOTSENT_LOWAT]
    for watch in watches[:20]:
        watch.stop()
        watch.stop()
    fakes[20].size = 0
    loops[20].pass_on()
    while loops[21].due is not None:
        loops[21].pass_on()
    assert unread.waited_for == 18
    unread.bound(transport)
    assert deaf.options == [socket.TCP_NOTSENT_LOWAT]


async def test_drips_wake_nobody(start_proxy, upstream, monkeypatch):
    """A body of single bytes is handed on in parts worth reading, and answered as any other."""
    handed: list[int] = []
    receive = web.RequestHandler.data_received

    def noted(inner: web.RequestHandler, data: bytes) -> None:
        handed.append(len(data))
        receive(inner, data)

    monkeypatch.setattr(web.RequestHandler, "data_received", noted)
    proxy = await start_proxy(openai=upstream)
    body = json.dumps({"model": "text-embedding-3-small", "input": "a" * 1000}).encode()
    for form, last in (
        (b"Content-Length: %d\r\n" % len(body), b""),
        (b"Transfer-Encoding: chunked\r\n", b"0\r\n\r\n"),
    ):
        handed.clear()
        async with asyncio.timeout(SECONDS), Talk(proxy.url, _head("/v1/embeddings", form)) as talk:
            await until(lambda: handed)
            for place in range(len(body)):
                drip = body[place : place + 1]
                await talk.send(b"1\r\n%b\r\n" % drip if last else drip)
                await asyncio.sleep(0)
            await talk.send(last)
            assert (await talk.response())[0] == 200
        # The head, each 500 bytes, and the rest; nothing is known of how many of the first bytes
        # came before the body was asked for.
        assert len(handed) < 60
