"""Reads request bodies: bounded in size and in patience."""

import asyncio

from aiohttp import web

from providers.base import InputRefused

MIB = 1 << 20


async def expect(request: web.Request) -> None:
    """Tell a client that waits for it to go on; other expectations may be ignored (RFC 9110)."""
    if request.headers.get("Expect", "").lower() == "100-continue":
        await request.writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        # What was sent is no part of the reply.
        request.writer.output_size = 0


class BodyRefused(InputRefused):
    """A body that was not read to its end: nothing more can be asked on its connection."""


async def read(request: web.Request, most: int, patience_s: float) -> bytes:
    """Read a whole body of at most `most` bytes, decompressed.

    Raises BodyRefused for one that is larger, that breaks off, or of which nothing more arrives
    for `patience_s` seconds.
    """
    if (request.content_length or 0) > most:
        raise _too_large(most)
    chunks: list[bytes] = []
    size = 0
    try:
        while not request.content.at_eof():
            async with asyncio.timeout(patience_s):
                chunk = await request.content.readany()
            size += len(chunk)
            if size > most:
                raise _too_large(most)
            chunks.append(chunk)
    except TimeoutError as error:
        message = f"The request body stopped arriving; nothing came for {patience_s:g} s."
        raise BodyRefused(message, status=408) from error
    except (web.RequestPayloadError, OSError) as error:
        raise BodyRefused("The request body broke off or could not be decoded.") from error
    return b"".join(chunks)


def _too_large(most: int) -> BodyRefused:
    limit = f"{most / MIB:g} MiB (server.max_body_mib)"
    return BodyRefused(f"The request body is larger than {limit}.", status=413)
