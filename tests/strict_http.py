"""A strict client of HTTP/1.1: sends bytes in given pieces, and parses all that comes back.

It reads until the server closes the connection, and raises `Malformed` for whatever RFC 9112 does
not allow in a response.
"""

import asyncio
import re
import socket
from collections.abc import Sequence
from contextlib import suppress
from typing import NamedTuple

_STATUS_LINE = re.compile(rb"HTTP/1\.([01]) ([1-5][0-9]{2}) ([\t\x20-\x7e]*)")
_FIELD = re.compile(rb"([!#$%&'*+.^_`|~0-9A-Za-z-]+):[ \t]*([\x20-\x7e\t]*?)[ \t]*")
_LENGTH = re.compile(rb"0|[1-9][0-9]*")
_CHUNK = re.compile(rb"([0-9A-Fa-f]+)\r\n")
_SINGLE = ("content-length", "content-type", "date", "server", "x-request-id", "transfer-encoding")
"""Headers that a response has once at most."""


class Malformed(Exception):
    """What came is no sequence of whole HTTP responses."""


class Response(NamedTuple):
    """One response; names of headers are as they came."""

    status: int
    headers: tuple[tuple[str, str], ...]
    body: bytes
    is_old: bool = False
    """Whether it is HTTP/1.0."""

    def header(self, name: str) -> str | None:
        """Return the value of a header; None if it is not there."""
        return next((value for one, value in self.headers if one.lower() == name), None)

    @property
    def is_last(self) -> bool:
        """Whether the server says that it closes the connection."""
        told = (self.header("connection") or "").lower()
        return told != "keep-alive" if self.is_old else told == "close"


async def exchange(
    address: tuple[str, int],
    pieces: Sequence[bytes],
    *,
    gap_s: float = 0.0,
    is_ended: bool = False,
    timeout_s: float = 60.0,
) -> bytes:
    """Send the pieces, each in a segment of its own, and return all that comes until the close.

    `is_ended` closes the sending side behind them. What comes is read also when nothing can be sent
    any more. Raises TimeoutError if the server does not close the connection within `timeout_s`.
    """
    loop = asyncio.get_running_loop()
    with socket.socket() as connection:
        connection.settimeout(0)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        async with asyncio.timeout(timeout_s):
            await loop.sock_connect(connection, address)
            reading = asyncio.create_task(_read(connection))
            try:
                with suppress(OSError):
                    for number, piece in enumerate(pieces):
                        if number:
                            await asyncio.sleep(gap_s)
                        await loop.sock_sendall(connection, piece)
                    if is_ended:
                        connection.shutdown(socket.SHUT_WR)
                return await reading
            finally:
                reading.cancel()


async def _read(connection: socket.socket) -> bytes:
    received = bytearray()
    with suppress(OSError):
        while data := await asyncio.get_running_loop().sock_recv(connection, 1 << 16):
            received += data
    return bytes(received)


def parse(data: bytes, *, has_head: bool = False) -> list[Response]:
    """Return the responses in all that a server sent, without interim ones (1xx).

    `has_head` tells that one of the requests may be a HEAD, whose response has no body.
    Raises Malformed.
    """
    found: list[Response] = []
    while data:
        response, data = _first(data, has_head=has_head)
        if response.status >= 200:
            found.append(response)
    return found


def _first(  # noqa: C901 - one check after the other
    data: bytes, *, has_head: bool
) -> tuple[Response, bytes]:
    head, end, rest = data.partition(b"\r\n\r\n")
    if not end:
        raise Malformed(f"no end of a head: {data[:200]!r}")
    line, *fields = head.split(b"\r\n")
    status_line = _STATUS_LINE.fullmatch(line)
    if status_line is None:
        raise Malformed(f"status line {line[:200]!r}")
    headers = []
    for field in fields:
        match = _FIELD.fullmatch(field)
        if match is None:
            raise Malformed(f"header {field[:200]!r}")
        headers.append((match[1].decode(), match[2].decode()))
    status = int(status_line[2])
    names = [name.lower() for name, _ in headers]
    if twice := [name for name in _SINGLE if names.count(name) > 1]:
        raise Malformed(f"header {twice[0]} twice")
    values = dict(zip(names, (value for _, value in headers), strict=True))
    is_headless = has_head and (not rest or rest.startswith(b"HTTP/1."))
    if status < 200 or status in (204, 304) or is_headless:
        body = b""
    elif values.get("transfer-encoding", "").lower() == "chunked":
        if "content-length" in values:
            raise Malformed("Content-Length beside Transfer-Encoding")
        body, rest = _chunks(rest)
    else:
        length = values.get("content-length", "")
        if not _LENGTH.fullmatch(length.encode()):
            raise Malformed(f"Content-Length {length!r}")
        body, rest = rest[: int(length)], rest[int(length) :]
        if len(body) < int(length):
            raise Malformed(f"{len(body)} bytes of a body of {length}")
    return Response(status, tuple(headers), body, status_line[1] == b"0"), rest


def _chunks(data: bytes) -> tuple[bytes, bytes]:
    body = b""
    while True:
        size = _CHUNK.match(data)
        if size is None:
            raise Malformed(f"chunk {data[:50]!r}")
        data = data[size.end() :]
        chunk, data = data[: int(size[1], 16)], data[int(size[1], 16) :]
        if not data.startswith(b"\r\n"):
            raise Malformed("no end of a chunk")
        body, data = body + chunk, data[2:]
        if not chunk:
            return body, data
