"""Replies to a passed-through call, without the provider's key.

An upstream may repeat a key that it refuses. So a reply with another status than 2xx is gathered,
searched, and then sent. Without a secret in it, it is sent as it came, to the byte. One that cannot
be searched is replaced by an error in OpenAI's shape, with its status.

A good reply is sent as it comes; keys in it are overwritten. In a compressed one that is not
possible: it ends where a key would follow.
"""

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import suppress

from aiohttp import web
from embedding_proxy.providers.redaction import MAX_BYTES, RedactedStream, Redactor
from embedding_proxy.providers.upstream.content_encoding import PIECE, DecodeError, Decoder
from multidict import CIMultiDict

from .errors import error_body

_MAX_INLINE = 1 << 15
"""Bytes that are searched at once; longer bodies are searched in a thread."""
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
    raw = await _gather(chunks)
    body = None if raw is None else _decode(raw, headers.get("Content-Encoding", ""))
    problem = None
    if raw is None or body is None:
        problem = f"is longer than {MAX_BYTES >> 20} MiB" if raw is None else "cannot be decoded"
    else:
        # A long body takes a while; others are served meanwhile.
        is_short = len(body) <= _MAX_INLINE
        redacted, is_clean = (
            _redact(body, redactor)
            if is_short
            else await asyncio.to_thread(_redact, body, redactor)
        )
        if redacted != body:
            raw = redacted
            _drop(headers, *_OF_THE_BODY)
        if not is_clean:
            problem = "holds the key of the proxy"
    if problem is not None:
        _drop(headers, *_OF_THE_BODY, "Content-Type")
        headers["Content-Type"] = "application/json"
        text = f"The provider answered with status {status}; its reply {problem}, and is not shown."
        raw = error_body(text, "server_error", code="upstream_error")
    return web.Response(status=status, reason=reason, headers=headers, body=raw)


class SecretFound(Exception):
    """A good reply cannot go on without telling a key."""


async def redacted_chunks(
    chunks: AsyncIterator[bytes], encoding: str, redactor: Redactor
) -> AsyncIterator[bytes]:
    """Yield a good reply as it comes. `encoding` is its `Content-Encoding`.

    A compressed one goes on unchanged as long as what it decodes to holds no key; raises
    SecretFound at the first key. One in an encoding that cannot be read here goes on unsearched.
    Raises what `chunks` raises.
    """
    passing = redactor.stream()
    if encoding and redactor.watches_good_replies:
        async for chunk in _stream_unchanged(chunks, Decoder(encoding), passing):
            yield chunk
        return
    async for chunk in chunks:
        if passed := passing.feed(chunk):
            yield passed
    if rest := passing.finish():
        yield rest


async def _stream_unchanged(
    chunks: AsyncIterator[bytes], decoder: Decoder | None, passing: RedactedStream
) -> AsyncIterator[bytes]:
    """Yield a compressed reply, each part when it is known to hold no key. Raises SecretFound."""
    held = b""
    async for chunk in chunks:
        held += chunk
        try:
            is_waiting = decoder is not None and await _is_waiting(decoder.feed(chunk), passing)
            # At a megabyte of what decodes to nothing, it is no matter of waiting.
            if is_waiting and len(held) < MAX_BYTES:
                continue
        except DecodeError:
            decoder = None
        yield held
        held = b""
    if decoder is not None:
        with suppress(DecodeError):
            await _is_waiting(decoder.finish(), passing)
    if held:
        yield held


async def _is_waiting(pieces: Iterator[bytes], passing: RedactedStream) -> bool:
    """Tell whether what was decoded is nothing, or ends as a key begins. Raises SecretFound."""
    is_waiting = True
    for piece in pieces:
        passing.feed(piece)
        is_waiting = passing.is_holding
        if passing.found:
            raise SecretFound
        if len(piece) == PIECE:
            await asyncio.sleep(0)
    return is_waiting


async def _gather(chunks: AsyncIterator[bytes]) -> bytes | None:
    """Return a whole body; None if it is longer than MAX_BYTES."""
    pieces: list[bytes] = []
    size = 0
    async for chunk in chunks:
        pieces.append(chunk)
        size += len(chunk)
        if size > MAX_BYTES:
            return None
    return b"".join(pieces)


def _redact(body: bytes, redactor: Redactor) -> tuple[bytes, bool]:
    """Return a body without secrets that can be removed, and whether none is left."""
    redacted = redactor.redact(body)
    return redacted, redactor.is_clean(redacted)


def _decode(raw: bytes, encoding: str) -> bytes | None:
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
