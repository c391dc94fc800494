r"""The log: one record a line, on stderr. The only place that makes lines of log records.

Much of what is logged was written by others: names of models, messages of upstreams, paths. So each
character that is no printable one is escaped: no text ends a line, begins another, or reaches the
terminal as a command. What stands where HTTP has a key is masked: errors of libraries show whole
requests. Long messages are cut. A message that comes again and again is written some
times, and then once in a while with the number of those left out.
"""

import logging
import re
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import TextIO, TypeAlias

MAX_MESSAGE = 2000
"""Characters of a message; what is cut off is counted."""
MAX_TRACEBACK = 20_000
"""Characters of a traceback, which may quote foreign text, too."""
BURST = 100
"""Records of one statement of the code that are written without a pause. At a start one statement
may have something to say of each provider and each model."""
INTERVAL_S = 1.0
"""Seconds between those that are written when there are more."""

MASK = "***"
_MIN_KEY = 6
# A header for keys with its value, as a mapping, a tuple or a request shows it.
_KEY_HEADER = re.compile(
    r"((?:authorization|x-proxy-key|(?:x-|x-goog-)?api-key)[\"']?\s{0,2}[:=,]\s{0,2}b?[\"']?"
    r"(?:(?:bearer|basic|token)\s{1,2})?)"
    rf"[^\s\"',)}}\]]{{{_MIN_KEY},}}+",
    re.IGNORECASE,
)
_USER = re.compile(r"://[^\s@'\"<>]{1,300}@")

_ExcInfo: TypeAlias = (
    tuple[type[BaseException], BaseException, TracebackType | None] | tuple[None, None, None]
)


def escape(text: str, max_length: int = MAX_MESSAGE) -> str:
    r"""Return a text as one line of printable characters, of at most `max_length`, and a note.

    >>> print(escape("a\r\nb\x1b[31m\u202e"))
    a\r\nb\x1b[31m\u202e
    """
    cut = f"… ({len(text) - max_length:,} more characters)" if len(text) > max_length else ""
    text = text[:max_length]
    if not text.isprintable():
        text = "".join(c if c.isprintable() else _escape_sign(c) for c in text)
    return text + cut


def hide_credentials(text: str) -> str:
    """Return a text without the values of headers that hold keys, and without users in addresses.

    Whose key it is does not matter; what an upstream says of one is redacted before.

    >>> hide_credentials("headers={'Authorization': 'Bearer sk-1234'} http://a:b@c/")
    "headers={'Authorization': 'Bearer ***'} http://***@c/"
    """
    return _USER.sub(f"://{MASK}@", _KEY_HEADER.sub(rf"\1{MASK}", text))


def _escape_sign(character: str) -> str:
    return character.encode("unicode_escape", "surrogatepass").decode("ascii")


class LineFormatter(logging.Formatter):
    """Makes one line of a record; each line of a traceback begins with a bar, as no record does."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s %(message)s")

    def format(self, record: logging.LogRecord) -> str:
        """Return a record as text; a traceback that another formatter has made is not used."""
        traceback_text, record.exc_text = record.exc_text, None
        try:
            return super().format(record)
        finally:
            record.exc_text = traceback_text

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 - logging's own name
        """Return the line of a record, with the number of those that were left out before it."""
        record.message = escape(hide_credentials(record.message))
        left_out = getattr(record, "left_out", 0)
        if left_out:
            record.message += f" ({left_out:,} more like this were not written)"
        return super().formatMessage(record)

    def formatException(self, ei: _ExcInfo) -> str:  # noqa: N802
        """Return a traceback, each of its lines escaped."""
        lines = hide_credentials(super().formatException(ei)[:MAX_TRACEBACK]).splitlines()
        return "\n".join(f"| {escape(line)}" for line in lines)

    def formatStack(self, stack_info: str) -> str:  # noqa: N802
        """Return a stack, each of its lines escaped."""
        return "\n".join(f"| {escape(line)}" for line in stack_info.splitlines())


@dataclass
class _Flow:
    """How often one statement has logged."""

    room: float = BURST
    at: float = 0.0
    left_out: int = 0


class RateLimit(logging.Filter):
    """Lets BURST records of one statement and level through, and then one in INTERVAL_S.

    Statements are told apart by their place in the code, not by their text: who sends requests
    chooses the text. A statement that logs at several levels has a flow for each, so that clients'
    mistakes do not keep warnings out of the log.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__()
        self._clock = clock
        self._flows: dict[tuple[str, int, int], _Flow] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        """Tell whether a record is written; note on it how many were not."""
        now = self._clock()
        source_line = (record.pathname, record.lineno, record.levelno)
        flow = self._flows.setdefault(source_line, _Flow(at=now))
        flow.room = min(flow.room + (now - flow.at) / INTERVAL_S, BURST)
        flow.at = now
        if flow.room < 1:
            flow.left_out += 1
            return False
        flow.room -= 1
        record.left_out, flow.left_out = flow.left_out, 0
        return True


def handler(
    stream: TextIO | None = None, clock: Callable[[], float] = time.monotonic
) -> logging.Handler:
    """Return what writes records to a stream, by default stderr."""
    made = logging.StreamHandler(sys.stderr if stream is None else stream)
    made.setFormatter(LineFormatter())
    made.addFilter(RateLimit(clock))
    return made
