"""A connection of bare bytes, for requests that no client library would make."""

import asyncio
import json
import socket
import struct
from typing import Self

from clock import FOR_EVER


class Talk:
    """A connection of bare bytes; what comes back is read response by response."""

    def __init__(self, url: str, sent: bytes, *, end: bool = False) -> None:
        host, _, port = url.removeprefix("http://").partition("/")[0].partition(":")
        self._address = (host, int(port))
        self._sent = sent
        self._end = end

    async def __aenter__(self) -> Self:
        self.reader, self.writer = await asyncio.open_connection(*self._address)
        self.writer.write(self._sent)
        if self._end:
            self.writer.write_eof()
        await self.writer.drain()
        return self

    async def __aexit__(self, *_: object) -> None:
        self.writer.close()

    async def send(self, more: bytes) -> None:
        """Send more, in a segment of its own if what went before has been read."""
        self.writer.write(more)
        await self.writer.drain()

    async def response(self) -> tuple[int, dict[str, str], dict]:
        """Return status, headers (names in lower case) and JSON of the next response."""
        async with asyncio.timeout(FOR_EVER):
            head = (await self.reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
            fields = (line.partition(": ") for line in head[1:] if line)
            headers = {name.lower(): value for name, _, value in fields}
            body = await self.reader.readexactly(int(headers["content-length"]))
        return int(head[0].split()[1]), headers, json.loads(body)

    async def is_over(self) -> bool:
        """Return whether the server has closed the connection and sent nothing more."""
        async with asyncio.timeout(FOR_EVER):
            return await self.reader.read() == b""

    def reset(self) -> None:
        """Close hard: the server gets a reset, not an orderly end."""
        linger = struct.pack("ii", 1, 0)
        self.writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        self.writer.transport.abort()
