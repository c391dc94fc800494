"""The transport that aiohttp is given: the real one, with our connection in between.

What aiohttp writes, and when it would close the connection or read no more, the connection decides
with what else it knows.
"""

import asyncio
from collections.abc import Callable, Iterable
from typing import Any


class InnerTransport(asyncio.Transport):
    """Hands on what aiohttp asks of a transport."""

    def __init__(
        self,
        transport: asyncio.Transport,
        write: Callable[[list[bytes]], None],
        close: Callable[[], None],
        set_reading: Callable[[bool], None],
    ) -> None:
        """All but the three is the real transport's."""
        super().__init__()
        self._transport = transport
        self._write = write
        self._close = close
        self._set_reading = set_reading

    def write(self, data: Any) -> None:  # noqa: ANN401 - asyncio's
        """Write bytes."""
        self._write([data])

    def writelines(self, list_of_data: Iterable[Any]) -> None:
        """Write several at once."""
        self._write(list(list_of_data))

    def close(self) -> None:
        """Close the connection behind what was written."""
        self._close()

    def pause_reading(self) -> None:
        """Read no more of the body."""
        self._set_reading(False)  # noqa: FBT003

    def resume_reading(self) -> None:
        """Read on."""
        self._set_reading(True)  # noqa: FBT003

    def abort(self) -> None:
        """Close the connection at once."""
        self._transport.abort()

    def get_extra_info(self, name: str, default: Any = None) -> Any:  # noqa: ANN401 - asyncio's
        """Return what is known of the connection."""
        return self._transport.get_extra_info(name, default)

    def is_closing(self) -> bool:
        """Tell whether the connection is closed, or about to be."""
        return self._transport.is_closing()

    def is_reading(self) -> bool:
        """Tell whether bytes are read."""
        return self._transport.is_reading()

    def get_write_buffer_size(self) -> int:
        """Return how many bytes the kernel has not taken."""
        return self._transport.get_write_buffer_size()

    def get_write_buffer_limits(self) -> tuple[int, int]:
        """Return the bounds at which writing is paused, and goes on."""
        return self._transport.get_write_buffer_limits()

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        """Set these bounds."""
        self._transport.set_write_buffer_limits(high, low)

    def can_write_eof(self) -> bool:
        """Tell that one direction is not closed alone."""
        return False
