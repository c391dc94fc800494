"""WebSockets of passed-through calls (the Realtime API): two connections, and messages between."""

import asyncio
import logging
from contextlib import suppress
from functools import partial

import aiohttp
from aiohttp import WSCloseCode, WSMsgType, web
from multidict import CIMultiDict
from yarl import URL

from .errors import RETRY_SECONDS, Failure
from .idle_timeout import IdleTimeout
from .passthrough_upstream import PassthroughUpstream

log = logging.getLogger("embedding_proxy.passthrough")

# It would log the protocols that a client offers; browsers put their key among them.
logging.getLogger("aiohttp.websocket").setLevel(logging.ERROR)

_KEY_PROTOCOL = "openai-insecure-api-key."
_CLOSE_SECONDS = 2.0
_NORMAL, _BROKEN = 1000, 1011
# Bytes of the reason in a frame that closes (RFC 6455, 5.5).
_MAX_REASON = 123

_Socket = web.WebSocketResponse | aiohttp.ClientWebSocketResponse


def is_wanted(request: web.Request) -> bool:
    """Tell whether a call asks for a WebSocket."""
    return "Upgrade" in request.headers and bool(web.WebSocketResponse().can_prepare(request))


async def connect(  # noqa: PLR0913, PLR0917 - both ends of a call, and its bounds
    request: web.Request,
    origin: PassthroughUpstream,
    url: URL,
    headers: CIMultiDict[str],
    idle_timeout: IdleTimeout,
    max_message: int,
) -> web.StreamResponse:
    """Carry messages both ways until either side closes; a refused call is answered with why.

    A message is held until it is whole. One of `max_message` bytes or more, in however many
    fragments, closes both connections with 1009 (RFC 6455, 7.4.1). When the proxy stops, both are
    closed with 1001 after the grace period. Raises EmbeddingError.
    """
    offered = ", ".join(request.headers.getall("Sec-WebSocket-Protocol", ())).split(",")
    protocols = [
        protocol for protocol in map(str.strip, offered) if protocol and _may_go(origin, protocol)
    ]
    try:
        upstream = await origin.session.ws_connect(
            url,
            headers=headers,
            protocols=protocols,
            max_msg_size=max_message,
            timeout=aiohttp.ClientWSTimeout(ws_close=_CLOSE_SECONDS),
        )
    except aiohttp.WSServerHandshakeError as error:
        again = error.status == 429 or (error.status >= 500 and error.status != 508)
        return Failure(
            error.status if error.status >= 400 else 502,
            f"{origin.name}: the WebSocket was refused with status {error.status}.",
            "server_error" if again else "invalid_request_error",
            code="upstream_error",
            retry_after=RETRY_SECONDS if again else None,
        ).response()
    except (aiohttp.ClientError, OSError) as error:
        raise origin.failure(error) from error
    async with upstream:
        idle_timeout.note_progress()
        chosen = (upstream.protocol,) if upstream.protocol else ()
        client = web.WebSocketResponse(
            protocols=chosen, max_msg_size=max_message, compress=False, timeout=_CLOSE_SECONDS
        )
        await client.prepare(request)
        async with asyncio.TaskGroup() as pumps:
            pumps.create_task(_pump(client, upstream, idle_timeout, origin))
            pumps.create_task(_pump(upstream, client, idle_timeout, origin))
            idle_timeout.on_grace_over(partial(_go_away, pumps, client, upstream))
    return client


def _go_away(pumps: asyncio.TaskGroup, *sockets: _Socket) -> None:
    """Close both connections: the proxy stops."""
    for socket in sockets:
        pumps.create_task(_wait_closed(socket, WSCloseCode.GOING_AWAY))


async def _wait_closed(socket: _Socket, code: int, why: bytes = b"") -> None:
    with suppress(ConnectionError, aiohttp.ClientError):
        await socket.close(code=code, message=why)


def _may_go(origin: PassthroughUpstream, protocol: str) -> bool:
    secret = protocol.removeprefix(_KEY_PROTOCOL)
    return secret == protocol or origin.may_forward(secret)


async def _pump(
    source: _Socket, sink: _Socket, idle_timeout: IdleTimeout, origin: PassthroughUpstream
) -> None:
    """Send on what comes, and at last how it ended; a side that is gone ends it too."""
    code, why = _BROKEN, ""
    with suppress(ConnectionError, aiohttp.ClientError):
        while True:
            message = await source.receive()
            idle_timeout.note_progress()
            if message.type is WSMsgType.TEXT:
                await sink.send_str(origin.redactor.overwrite(message.data))
            elif message.type is WSMsgType.BINARY:
                await sink.send_bytes(origin.redactor.overwrite_bytes(message.data))
            else:
                break
        if message.type is WSMsgType.CLOSE:
            code, why = message.data or _NORMAL, message.extra or ""
        elif message.type is WSMsgType.CLOSING:  # It is this side that closes.
            code = WSCloseCode.GOING_AWAY
        elif _is_too_large(message.data):
            log.info("passthrough: a WebSocket message larger than the limit closed a connection")
            code, why = WSCloseCode.MESSAGE_TOO_BIG, "a message is too large"
    reason = origin.redactor.redact_text(why).encode()
    # What is no whole character at the end would break the frame.
    await _wait_closed(sink, code, reason[:_MAX_REASON].decode(errors="ignore").encode())


def _is_too_large(error: object) -> bool:
    """Tell whether a connection failed because a message passed the limit."""
    if not isinstance(error, aiohttp.WebSocketError):
        return False
    return error.code == WSCloseCode.MESSAGE_TOO_BIG
