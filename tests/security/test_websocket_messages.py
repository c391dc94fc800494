"""WebSocket messages that never end, of a client or of an upstream: closed with 1009."""

import asyncio
import os
from contextlib import suppress

import pytest
from aiohttp import WSCloseCode, WSMsgType, web
from any_server import AnyServer
from talk import Talk

MIB = 1 << 20
SECONDS = 60
HANDSHAKE = (
    b"GET /v1/realtime HTTP/1.1\r\nHost: localhost\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
    b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
)
CONTINUATION, BINARY = 0x0, 0x2
MASK = 0x80


def _fragment(opcode: int, size: int) -> bytes:
    """Return a frame of zeros that is not the last one, masked with zeros as clients must."""
    return bytes([opcode, MASK | 126]) + size.to_bytes(2, "big") + bytes(4) + bytes(size)


@pytest.fixture
async def other():
    """Give an upstream with a WebSocket; it puts how each one ended into `ended`."""
    async with AnyServer() as server:
        server.ended = asyncio.Queue()

        async def act(request: web.Request) -> web.StreamResponse:
            socket = web.WebSocketResponse(max_msg_size=0)
            await socket.prepare(request)
            async for message in socket:
                if message.type is WSMsgType.TEXT and message.data == "flood":
                    await socket.send_bytes(bytes(2 * MIB))
                else:
                    await socket.send_bytes(message.data)
            server.ended.put_nowait(socket.close_code)
            return socket

        server.act = act
        yield server


async def _start(start_proxy, other, **sections):
    return await start_proxy(openai=other, passthrough="openai", **sections)


async def test_endless_fragments_are_closed_with_1009(start_proxy, other):
    """Whoever sends fragments without a last one is cut off at the limit."""
    proxy = await _start(start_proxy, other, passthrough_max_message_mib=1)
    async with asyncio.timeout(SECONDS), Talk(proxy.url, HANDSHAKE) as talk:
        assert b" 101 " in await talk.reader.readuntil(b"\r\n\r\n")
        for number in range(16):
            await talk.send(_fragment(CONTINUATION if number else BINARY, 0xFFFF))
        # The head of the one that would pass the limit is enough.
        await talk.send(_fragment(CONTINUATION, 0xFFFF)[:8])
        # FIN and close, then a length and the code in two bytes.
        answer = await talk.reader.readexactly(4)
        assert answer[0] == 0x88
        assert int.from_bytes(answer[2:4], "big") == WSCloseCode.MESSAGE_TOO_BIG
        assert await other.ended.get() == WSCloseCode.MESSAGE_TOO_BIG


async def test_one_frame_over_the_limit_is_closed_with_1009(start_proxy, other):
    """The default is 16 MiB; what is below it passes, whole or in fragments."""
    proxy = await _start(start_proxy, other)
    async with (
        asyncio.timeout(SECONDS),
        proxy.http.ws_connect(f"{proxy.url}/realtime", max_msg_size=0) as socket,
    ):
        part = os.urandom(15 * MIB)
        await socket.send_bytes(part)
        assert (await socket.receive()).data == part
        # It may be cut off while it is sent.
        with suppress(ConnectionError):
            await socket.send_bytes(bytes(17 * MIB))
        assert await other.ended.get() == WSCloseCode.MESSAGE_TOO_BIG


async def test_an_upstream_is_bounded_too(start_proxy, other):
    """A hostile upstream is closed with 1009, and so is its client."""
    proxy = await _start(start_proxy, other, passthrough_max_message_mib=1)
    async with (
        asyncio.timeout(SECONDS),
        proxy.http.ws_connect(f"{proxy.url}/realtime", max_msg_size=0) as socket,
    ):
        await socket.send_str("flood")
        message = await socket.receive()
        assert (message.type, message.data) == (WSMsgType.CLOSE, WSCloseCode.MESSAGE_TOO_BIG)
        assert await other.ended.get() == WSCloseCode.MESSAGE_TOO_BIG
