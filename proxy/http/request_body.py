"""Reads request bodies: decompressed, bounded in size and in patience."""

import asyncio
import zlib
from collections.abc import Iterator

from aiohttp import web
from embedding_proxy.providers.errors import InvalidRequest

from .pace import MIN_BYTES_PER_S, Pace

MIB = 1 << 20

# Decompressed at a time: some two milliseconds of work.
_PIECE = MIB
_GZIP = b"\x1f\x8b"
"""The first bytes of a gzip member (RFC 1952)."""


class MalformedBody(web.RequestPayloadError):
    """The chunks of a body are malformed; the message says why."""


class BodyRefused(InvalidRequest):
    """A body that was not read to its end: nothing more can be asked on its connection."""


async def read(request: web.Request, max_bytes: int, patience_s: float) -> bytes:
    """Read a whole body of at most `most` bytes, decompressed.

    Raises BodyRefused for one that is larger, that breaks off, that arrives too slowly (`pace`,
    with a budget of `patience_s`), or whose compression is not known here.
    """
    inflater = _Inflater(request.headers.get("Content-Encoding", ""))
    try:
        announced = request.content_length or 0
    except ValueError as error:
        # Python reads no number of thousands of digits, though most of them are zeros.
        raise BodyRefused("The request's Content-Length is not a plain number.") from error
    if announced > max_bytes:
        raise _too_large(max_bytes)
    pace = Pace(patience_s)
    chunks: list[bytes] = []
    size = received = 0
    try:
        while chunk := await _next(request, pace):
            received += len(chunk)
            if received > max_bytes:
                # What is compressed may come to nothing, and go on for ever.
                raise _too_large(max_bytes)
            for piece in inflater.pieces(chunk):
                size += len(piece)
                if size > max_bytes:
                    raise _too_large(max_bytes)
                chunks.append(piece)
                if len(piece) == _PIECE:
                    await asyncio.sleep(0)
        inflater.finish()
    except TimeoutError as error:
        raise too_slow(patience_s) from error
    except (web.RequestPayloadError, OSError, zlib.error) as error:
        message = "The request body broke off or could not be decoded."
        raise BodyRefused(str(error) if isinstance(error, MalformedBody) else message) from error
    return b"".join(chunks)


async def _next(request: web.Request, pace: Pace) -> bytes:
    """Return the next part of a body, nothing at its end. Raises TimeoutError.

    Raises what it broke off with, also where nothing of it came.
    """
    if request.content.at_eof():
        broken = request.content.exception()
        if broken is not None:
            raise broken
        return b""
    return await pace.read(request.content)


def too_slow(timeout_s: float) -> BodyRefused:
    """Return the error of a body that stopped arriving, or only drips."""
    message = (
        f"The request body arrived too slowly: nothing came for {timeout_s:g} s, or less than"
        f" {MIN_BYTES_PER_S} bytes a second (server.body_timeout_s)."
    )
    return BodyRefused(message, status=408)


def _too_large(max_bytes: int) -> BodyRefused:
    limit = f"{max_bytes / MIB:g} MiB (server.max_body_mib)"
    return BodyRefused(f"The request body is larger than {limit}.", status=413)


class _Inflater:
    """Undoes the compression that a `Content-Encoding` names, if any.

    Of gzip there may be several members, one behind another (RFC 1952, 2.2), as tools make them
    that compress a body piece by piece; they stand for one body. Zeros may follow the last one.
    """

    def __init__(self, encoding: str) -> None:
        encoding = encoding.strip().lower()
        if encoding not in ("", "identity", "gzip", "x-gzip", "deflate"):
            raise BodyRefused(
                "The request body is compressed in a way that is not known here: send it plain,"
                " or as gzip or deflate.",
                status=415,
            )
        self._compressed = encoding not in ("", "identity")
        self._zlib: zlib._Decompress | None = None
        self._begun = b""
        """The first byte of a further member, while its second has not come."""
        self._is_padding = False

    def pieces(self, chunk: bytes) -> Iterator[bytes]:
        """Yield what a part of the body stands for, little by little. Raises zlib.error."""
        if not self._compressed:
            yield chunk
            return
        if self._zlib is None and chunk:
            # Some send deflate without the head that says so (RFC 1950: the low bits are 8).
            bare = chunk[0] & 0x0F != 8 and chunk[0] != 0x1F
            self._zlib = zlib.decompressobj(-zlib.MAX_WBITS if bare else zlib.MAX_WBITS | 32)
        while self._zlib is not None:
            if self._zlib.eof:
                chunk = self._next_member(chunk)
                if not chunk:
                    return
            piece = self._zlib.decompress(chunk, _PIECE)
            yield piece
            chunk = self._zlib.unused_data if self._zlib.eof else self._zlib.unconsumed_tail
            if len(piece) < _PIECE and not chunk:
                return

    def _next_member(self, chunk: bytes) -> bytes:
        """Begin another member if one follows; return what is to be decompressed of it."""
        chunk = self._begun + chunk
        if not self._is_padding:
            self._is_padding = chunk.startswith(b"\0")
        if self._is_padding:
            if chunk.strip(b"\0"):
                raise zlib.error("something follows the compressed body")
            return b""
        self._begun = chunk if len(chunk) < len(_GZIP) else b""
        if not _GZIP.startswith(chunk[: len(_GZIP)]):
            raise zlib.error("something follows the compressed body")
        if self._begun or not chunk:
            return b""
        self._zlib = zlib.decompressobj(zlib.MAX_WBITS | 16)
        return chunk

    def finish(self) -> None:
        """Take note of the end of the body. Raises zlib.error if something is missing."""
        if self._begun or (self._zlib is not None and not self._zlib.eof):
            raise zlib.error("the compressed body broke off")
