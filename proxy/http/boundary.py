"""Where on a connection one request ends and the next begins, told from the outside.

The parser of HTTP does not say how far it has read. Here it is counted, for requests whose length
can be told from their head; after anything else it is unknown to the end of the connection.
"""

import re
from collections.abc import Mapping

# Python reads no number of thousands of digits, zeros that lead it included.
_LENGTH = re.compile("[0-9]{1,20}")


class Boundary:
    """Counts what is left of the request in progress."""

    def __init__(self) -> None:
        self._left: int | None = 0
        self.is_passed = False
        """Whether bytes are known to have come that belong to the next request."""

    @property
    def reached(self) -> bool:
        """Whether the next byte is the first of a request."""
        return self._left == 0

    def begin(self, data: bytes, headers: Mapping[str, str] | None) -> None:
        """Take note of bytes that came when it was reached.

        `headers` are those of the one request that was found in them; None if none, or more than
        one, was found, or one that leads to something else than HTTP.
        """
        whole = None if headers is None else _length(data, headers)
        left = -1 if whole is None else whole - len(data)
        self.is_passed = whole is not None and left < 0
        self._left = left if left >= 0 else None

    def go_on(self, data: bytes) -> None:
        """Take note of bytes that came when it was not."""
        if self._left is not None:
            left = self._left - len(data)
            self.is_passed = left < 0
            self._left = left if left >= 0 else None


def _length(data: bytes, headers: Mapping[str, str]) -> int | None:
    """Return the bytes of the request at the beginning of some data; None if that is not told."""
    # Empty lines before a request are passed over, and are not the end of its head.
    end = data.find(b"\r\n\r\n", len(data) - len(data.lstrip(b"\r\n")))
    length = headers.get("Content-Length", "0")
    if end < 0 or "Transfer-Encoding" in headers or not _LENGTH.fullmatch(length):
        return None
    return end + 4 + int(length)
