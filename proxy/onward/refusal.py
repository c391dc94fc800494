"""Refusals of a passed-through call, without the provider's key.

An upstream may repeat a key that it refuses. So a reply with another status than 2xx is gathered,
searched, and then sent. Without a secret in it, it is sent as it came, to the byte. One that cannot
be searched is replaced by an error in OpenAI's shape, with its status.
"""

from collections.abc import AsyncIterator

from aiohttp import web
from multidict import CIMultiDict

from providers.content_encoding import DecodeError, Decoder
from providers.redaction import MAX_BYTES, Redactor
from proxy.errors import body as error_body

_OF_THE_BODY = ("Content-Encoding", "Content-Length", "Content-MD5", "Digest", "ETag")


def redacted_headers(headers: CIMultiDict[str], redactor: Redactor) -> CIMultiDict[str]:
    """Return the headers of a reply without secrets."""
    return CIMultiDict((name, redactor.redact_text(value)) for name, value in headers.items())


async def redacted_reply(
    status: int,
    reason: str | None,
    headers: CIMultiDict[str],
    chunks: AsyncIterator[bytes],
    redactor: Redactor,
) -> web.Response:
    """Return a whole reply without secrets. `headers` have none any more.

    Raises what `chunks` raises.
    """
    raw = await _gathered(chunks)
    body = None if raw is None else _decoded(raw, headers.get("Content-Encoding", ""))
    problem = None
    if raw is None or body is None:
        problem = f"is longer than {MAX_BYTES >> 20} MiB" if raw is None else "cannot be decoded"
    elif (found := redactor.redact(body)) != body or not redactor.is_clean(body):
        raw, body = found, found
        _drop(headers, *_OF_THE_BODY)
        if not redactor.is_clean(body):
            problem = "holds the key of the proxy"
    if problem is not None:
        _drop(headers, *_OF_THE_BODY, "Content-Type")
        headers["Content-Type"] = "application/json"
        text = f"The provider answered with status {status}; its reply {problem}, and is not shown."
        raw = error_body(text, "server_error", code="upstream_error")
    return web.Response(status=status, reason=reason, headers=headers, body=raw)


async def _gathered(chunks: AsyncIterator[bytes]) -> bytes | None:
    """Return a whole body; None if it is longer than MAX_BYTES."""
    pieces: list[bytes] = []
    size = 0
    async for chunk in chunks:
        pieces.append(chunk)
        size += len(chunk)
        if size > MAX_BYTES:
            return None
    return b"".join(pieces)


def _decoded(raw: bytes, encoding: str) -> bytes | None:
    """Return what a body stands for; None if it cannot be read, or is longer than MAX_BYTES."""
    decoder = Decoder(encoding)
    body = bytearray()
    try:
        for step in (decoder.feed(raw), decoder.finish()):
            for piece in step:
                body += piece
                if len(body) > MAX_BYTES:
                    return None
    except DecodeError:
        return None
    return bytes(body)


def _drop(headers: CIMultiDict[str], *names: str) -> None:
    for name in names:
        headers.popall(name, None)


def redacted_reason(reason: str | None, redactor: Redactor) -> str | None:
    """Return the reason phrase of a status line without secrets."""
    return None if reason is None else redactor.redact_text(reason)
