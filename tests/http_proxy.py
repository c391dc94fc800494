"""Servers in between, on real sockets: an HTTP proxy, and a relay to a port known later."""

import asyncio
import base64
import contextlib
from dataclasses import dataclass, field
from typing import Self


@dataclass
class _Between:
    """Takes connections, each in a task of its own. Use it with `async with`."""

    connections: int = 0
    _server: asyncio.Server | None = None
    _tasks: set[asyncio.Task[None]] = field(default_factory=set)

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._tasks.add(asyncio.current_task())
        self.connections += 1
        # The stream server of Python 3.11 would log a cancelled task as an error.
        ends = (ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError)
        with contextlib.suppress(*ends):
            await self._answer(reader, writer)
        await _closed(writer)

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        raise NotImplementedError

    @property
    def port(self) -> int:
        return self._server.sockets[0].getsockname()[1]


@dataclass
class Relay(_Between):
    """An address that leads to the port `to`, which may be set later."""

    to: int = 0

    @property
    def url(self) -> str:
        """The base URL for a provider."""
        return f"http://127.0.0.1:{self.port}/v1"

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await _joined("127.0.0.1", self.to, reader, writer)


@dataclass
class HttpProxy(_Between):
    """It forwards and opens tunnels. With `credentials` ("user:password") it asks for these."""

    credentials: str | None = None
    asked: list[str] = field(default_factory=list)
    """Method and target of each request, such as `CONNECT localhost:443`."""
    heads: list[bytes] = field(default_factory=list)

    @property
    def url(self) -> str:
        """The address with the right credentials."""
        return f"http://{f'{self.credentials}@' if self.credentials else ''}127.0.0.1:{self.port}"

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        self.heads.append(head)
        method, target, _ = head.split(b"\r\n")[0].decode().split(" ")
        self.asked.append(f"{method} {target}")
        wanted = base64.b64encode((self.credentials or "").encode())
        if self.credentials and b"Proxy-Authorization: Basic " + wanted not in head:
            writer.write(b"HTTP/1.1 407 Proxy Authentication Required\r\nContent-Length: 0\r\n\r\n")
            return
        if method == "CONNECT":
            host, _, port = target.rpartition(":")
            first = b""
        else:
            host, _, port = target.removeprefix("http://").partition("/")[0].partition(":")
            path = "/" + target.removeprefix("http://").partition("/")[2]
            first = head.replace(target.encode(), path.encode(), 1)
        if method == "CONNECT":
            writer.write(b"HTTP/1.1 200 Connection established\r\n\r\n")
        await _joined(host, int(port), reader, writer, first)


async def _joined(
    host: str,
    port: int,
    reader: asyncio.StreamReader,
    writer: asyncio.StreamWriter,
    first: bytes = b"",
) -> None:
    """Carry bytes both ways until both sides have ended."""
    reader_there, writer_there = await asyncio.open_connection(host, port)
    try:
        writer_there.write(first)
        await asyncio.gather(_pump(reader, writer_there), _pump(reader_there, writer))
    finally:
        await _closed(writer_there)


async def _pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(ConnectionError):
        while data := await reader.read(1 << 16):
            writer.write(data)
            await writer.drain()
        writer.write_eof()


async def _closed(writer: asyncio.StreamWriter) -> None:
    writer.close()
    with contextlib.suppress(ConnectionError, asyncio.CancelledError):
        await writer.wait_closed()
