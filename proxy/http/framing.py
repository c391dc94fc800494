"""A connection that hands its parser one part of a request at a time: a head, or a body.

What a client sends in one segment may hold several requests. aiohttp's parser takes a segment as a
whole: where one request in it is malformed, those before it are lost, and what follows a request
that asks for an upgrade to an unknown protocol, say `h2c`, is dropped. The client of a lost request
waits for ever. Here segments are cut where requests end, so that each request is answered, however
the network has joined them.

What is used of aiohttp's private parts: `_messages`, the requests that were read and not begun.
"""

import re
from typing import Any

from aiohttp import web
from aiohttp.http import RawRequestMessage

_END = b"\r\n\r\n"
"""The end of a head, and of a body in chunks (RFC 9112, 2.1 and 7.1)."""
_MAX_FRUITLESS = 8
"""Cuts of a segment at which no request ends; what is left goes as a whole. A body in chunks may be
full of empty lines; to hand it to the parser line by line would cost a hundred times as much."""
# Python reads no number of thousands of digits; a body is at most as long as the largest file.
_LENGTH = re.compile("[0-9]{1,20}")


class Framing(web.RequestHandler):
    """aiohttp's protocol object; there is one for each connection."""

    __slots__ = ("_body_left", "_head_tail", "_is_broken")

    def __init__(self, *args: Any, **kwargs: Any) -> None:  # noqa: ANN401 - aiohttp's own
        super().__init__(*args, **kwargs)
        self._body_left = 0
        """Bytes of a body of a known length that have not come yet."""
        self._head_tail = b""
        """The last bytes of what came, where the end of a head may be begun."""
        self._is_broken = False
        """Whether the parser has failed."""

    def data_received(self, data: bytes) -> None:
        """Hand bytes to the parser, part by part."""
        if self._is_broken:
            return
        if not data:
            # aiohttp asks itself to go on with what it has.
            super().data_received(data)
            return
        start = fruitless = 0
        while start < len(data) and not self._is_broken:
            is_body = self._body_left > 0
            is_cut = fruitless < _MAX_FRUITLESS
            end = self._end_of_part(data, start) if is_cut else len(data)
            count = len(self._messages)
            super().data_received(data if end - start == len(data) else data[start:end])
            if len(self._messages) > count:
                message, _ = self._messages[-1]
                # What goes as a whole may hold the body, or a part of it, already.
                self._body_left = _length(message) if is_cut else 0
                # Nothing can be read behind what was no HTTP.
                self._is_broken = not isinstance(message, RawRequestMessage)
            elif not is_body:
                fruitless += 1
            start = end

    def _end_of_part(self, data: bytes, start: int) -> int:
        """Return where the part ends that begins, or goes on, at `start`."""
        if self._body_left:
            end = min(len(data), start + self._body_left)
            self._body_left -= end - start
            return end
        kept, self._head_tail = self._head_tail, b""
        found = (kept + data[start : start + len(_END)]).find(_END) if kept else -1
        if 0 <= found < len(kept):
            return start + found + len(_END) - len(kept)
        found = data.find(_END, start)
        if found >= 0:
            return found + len(_END)
        self._head_tail = (kept + data[start:])[1 - len(_END) :]
        return len(data)


def _length(message: object) -> int:
    """Return the length of a request's body; 0 where it has none, or its end is to be found."""
    if not isinstance(message, RawRequestMessage) or message.chunked:
        return 0
    length = message.headers.get("Content-Length", "")
    return int(length) if _LENGTH.fullmatch(length) else 0
