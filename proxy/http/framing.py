"""Where the requests in a client's bytes begin and end (RFC 9112). Pure.

The end of a head is told here; whether it is well formed, and how long its body is, aiohttp tells.
"""

import enum
import re
from collections.abc import Mapping
from typing import NamedTuple

from .errors import Failure

HEAD_END = b"\r\n\r\n"
_CRLF = b"\r\n"
_MAX_HEAD = 1 << 16
_MAX_LINE = 8190
"""Of a head; the same as aiohttp's."""
_MAX_CHUNK_LINE = 4096
_MAX_TRAILERS = 1 << 15
# What a method may be made of (RFC 9110, 5.6.2), to the end of the line.
_FIRST_LINE = re.compile(rb"[A-Z]+ [!-~\x80-\xff]+ HTTP/1\.[01]\r\n")
# The one line in which the heads of a client's requests may differ. A head with two of them is
# refused, and so is never known.
_LENGTH = re.compile(rb"\r\ncontent-length:[ \t]*([0-9]{1,9})[ \t]*\r\n", re.IGNORECASE)
# Python reads no number of thousands of digits; a body is at most as long as the largest file.
_NUMBER = re.compile("[0-9]{1,20}")
_CHUNK_SIZE = re.compile(rb"([0-9a-fA-F]{1,16})[ \t]*(?:;[\t -~\x80-\xff]*)?")
_TRAILER = re.compile(rb"[!#$%&'*+.^_`|~0-9A-Za-z-]+:[\t -~\x80-\xff]*")
_MAX_PROBLEM = 200
"""Characters of what aiohttp says is wrong with a request."""


class MalformedChunks(ValueError):
    """The chunks of a body are malformed; the message says why."""


class PlainRequest(NamedTuple):
    """A request with a body of a told length."""

    head: bytes
    """All of the head but the digits of that length: they decide nothing."""
    begin: int
    """Where its body begins."""
    end: int
    """Where it ends."""


def plain_request(data: bytes, head_end: int, max_body: int) -> PlainRequest | None:
    """Return the POST request at the beginning of some data; None for any other request.

    `head_end` is where the end of its head begins. The body need not have come. One of more than
    `max_body` bytes is for aiohttp, whose handler refuses it.
    """
    if not data.startswith(b"POST "):
        return None
    # Without regard to case, it takes longer to find than all the rest.
    place = max(data.find(b"\r\nContent-Length:", 0, head_end), 0)
    match = _LENGTH.search(data, place, head_end + len(_CRLF))
    if match is None or int(match[1]) > max_body:
        return None
    head = data[: match.start(1)] + data[match.end(1) : head_end]
    begin = head_end + len(HEAD_END)
    return PlainRequest(head, begin, begin + int(match[1]))


def is_expecting(head: bytes) -> bool:
    """Tell whether a head may say that its client waits before it sends the body."""
    return b"\r\nexpect:" in head.lower()


def is_unusual(data: bytes) -> bool:
    """Tell whether the beginning of a head is none that aiohttp should wait with.

    It is too long, or what it holds can be refused before its end has come.
    """
    if len(data) > _MAX_LINE and len(data) - data.rfind(b"\n") > _MAX_LINE:
        return True
    if b"\n" not in data:
        return not data[:1].isalpha()
    if len(data) > _MAX_HEAD or data.count(b"\n") != data.count(_CRLF):
        return True
    return _FIRST_LINE.match(data) is None


def refusal(problem: str) -> Failure:
    """Return what a client is told of bytes that cannot be read, for the reason aiohttp gives.

    What was sent is not repeated: it may hold a password.
    """
    # The beginning says what is wrong; the rest quotes.
    problem = (problem.splitlines() or [""])[0].partition(": b")[0].rstrip(":. ")
    is_quoted = "/" in problem or "@" in problem or not problem.isprintable() or problem == "*"
    reason = "its target cannot be read" if is_quoted or not problem else problem[:_MAX_PROBLEM]
    return Failure(400, f"The request is not valid HTTP: {reason}.", "invalid_request_error")


class BodyFramer:
    """Finds the end of one body, in parts as they come."""

    def __init__(self, length: int | None) -> None:
        """`length` is in bytes; None = the body comes in chunks."""
        self.min_part = 0
        """Bytes of content that are held until more come, or the body is complete."""
        self._content = b""
        self._is_chunked = length is None
        self._left = length or 0
        """Bytes of the body, or of its current chunk, that have not come."""
        self.is_complete = length == 0
        self._line = b""
        self._is_behind_chunk = False
        self._trailer_bytes: int | None = None
        """Bytes of the lines behind the last chunk; None before it."""

    @classmethod
    def of(cls, headers: Mapping[str, str], *, is_chunked: bool) -> "BodyFramer | None":
        """Return that of a request; None if its length is no plain number."""
        length = headers.get("Content-Length", "0")
        if is_chunked:
            return cls(None)
        return cls(int(length)) if _NUMBER.fullmatch(length) else None

    def feed(self, data: bytes) -> tuple[bytes, bytes]:
        """Return what is to be handed on, and what comes behind the body.

        A body in chunks is handed on in chunks, which are well formed. Raises MalformedChunks.
        """
        content, remainder = (self._decode if self._is_chunked else self._count)(data)
        self._content = self._content + content if self._content else content
        if len(self._content) < self.min_part and not self.is_complete:
            return b"", remainder
        content, self._content = self._content, b""
        if self._is_chunked:
            content = b"%x\r\n%b\r\n" % (len(content), content) if content else b""
            content += b"0\r\n\r\n" if self.is_complete else b""
        return content, remainder

    def _count(self, data: bytes) -> tuple[bytes, bytes]:
        content = data if len(data) <= self._left else data[: self._left]
        self._left -= len(content)
        self.is_complete = not self._left
        return content, data[len(content) :]

    def _decode(self, data: bytes) -> tuple[bytes, bytes]:
        data, self._line = self._line + data, b""
        content: list[bytes] = []
        place = 0
        while not self.is_complete:
            if self._left:
                part = data[place : place + self._left]
                content.append(part)
                place += len(part)
                self._left -= len(part)
                if self._left:
                    break
            end = place if self._is_behind_chunk else data.find(_CRLF, place)
            if self._is_behind_chunk and data[place : place + 2] != _CRLF:
                if not _CRLF.startswith(data[place:]):
                    raise MalformedChunks("a chunk does not end where its size says")
                end = -1
            if end < 0:
                self._line = data[place:]
                if len(self._line) > _MAX_CHUNK_LINE:
                    raise MalformedChunks("a line of the body in chunks is too long")
                break
            if self._is_behind_chunk:
                self._is_behind_chunk = False
            else:
                self._take_line(data[place:end])
            place = end + len(_CRLF)
        return b"".join(content), data[place:] if self.is_complete else b""

    def _take_line(self, line: bytes) -> None:
        """Read the size of a chunk, or a line behind the last one, which counts for nothing."""
        if self._trailer_bytes is None:
            size = _CHUNK_SIZE.fullmatch(line)
            if size is None:
                raise MalformedChunks("a chunk size is no hexadecimal number")
            self._left = int(size[1], 16)
            self._is_behind_chunk = self._left > 0
            self._trailer_bytes = None if self._left else 0
        elif not line:
            self.is_complete = True
        else:
            self._trailer_bytes += len(line)
            if _TRAILER.fullmatch(line) is None or self._trailer_bytes > _MAX_TRAILERS:
                raise MalformedChunks("a trailer is no header, or they are too long")


class Phase(enum.Enum):
    """Where a connection is."""

    HEAD = enum.auto()
    """No request is in progress."""
    BODY = enum.auto()
    """One is: its head was handed on."""
    ANSWER = enum.auto()
    """One is: the server answers it without aiohttp."""
    THROUGH = enum.auto()
    """All that comes is handed on as it comes."""
    OVER = enum.auto()
    """Nothing that comes counts any more."""
