r"""The log: one record a line, on stderr. The only place that makes lines of log records.

A line is text for people, or a JSON object for programs. Both name the request that is worked for.

Much of what is logged was written by others: names of models, messages of upstreams, paths. So each
character that is no printable one is escaped: no text ends a line, begins another, or reaches the
terminal as a command. What stands where HTTP has a key is masked: errors of libraries show whole
requests. Long messages are cut. A message that comes again and again is written some
times, and then once in a while with the number of those left out.
"""

import json
import logging
import re
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from types import TracebackType
from typing import TextIO, TypeAlias

from embedding_proxy.providers import request_context

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
_WORD = re.compile(r"[^\s\"=]*")
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
    """Makes one line of a record; each line of a traceback begins with a bar, as no record does.

    A record may have `fields`, a mapping of names to values: they follow the message. Its `data` is
    of the same kind, for lines that are JSON: the message says it, too.
    """

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
        text = hide_credentials(record.message)
        fields: Mapping[str, object] = getattr(record, "fields", {})
        text += "".join(f" {name}={_value(v)}" for name, v in fields.items() if v != "")
        record.message = escape(text)
        own = request_context.request_id.get()
        if own and own not in record.message:
            record.message += f" (request {own})"
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


class TerminalFormatter(LineFormatter):
    """Makes lines that are short where a record has a `short` text, as for each request."""

    def format(self, record: logging.LogRecord) -> str:
        """Return a record as text."""
        short = getattr(record, "short", "")
        if not short:
            return super().format(record)
        left_out = getattr(record, "left_out", 0)
        more = f" ({left_out:,} more)" if left_out else ""
        return f"{self.formatTime(record, '%H:%M:%S')} {escape(short)}{more}"


class JsonFormatter(LineFormatter):
    """Makes one JSON object of a record, in one line."""

    def format(self, record: logging.LogRecord) -> str:
        """Return a record as JSON."""
        known = {**getattr(record, "fields", {}), **getattr(record, "data", {})}
        fields = {name: _plain(value) for name, value in known.items()}
        content: dict[str, object] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": escape(hide_credentials(record.getMessage())),
            "request_id": request_context.request_id.get(),
            "trace_id": request_context.trace_id(),
            "left_out": getattr(record, "left_out", 0),
            **fields,
        }
        if record.exc_info:
            content["exception"] = self.formatException(record.exc_info)
        kept = {name: value for name, value in content.items() if value not in ("", None)}
        if not kept["left_out"]:
            del kept["left_out"]
        return json.dumps(kept, ensure_ascii=False)


def _plain(value: object) -> object:
    return escape(value) if isinstance(value, str) else value


def _value(value: object) -> str:
    """Return a value as text; with quotes where it would not be one word."""
    text = f"{value:g}" if isinstance(value, float) else str(value)
    return text if _WORD.fullmatch(text) else json.dumps(text, ensure_ascii=False)


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
        """Tell whether a record is written; note on it how many were not.

        One that has `left_out` already comes from whoever bounds its number itself.
        """
        if hasattr(record, "left_out"):
            return True
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


def formatter(kind: str, stream: TextIO) -> logging.Formatter:
    """Return what makes lines: `text`, `json`, or `auto`, which is short text on a terminal."""
    if kind == "json":
        return JsonFormatter()
    return TerminalFormatter() if kind == "auto" and stream.isatty() else LineFormatter()


def configure(level: str, kind: str) -> None:
    """Set from which level on, and in which form, the handlers of the process write."""
    root, number = logging.getLogger(), getattr(logging, level.upper())
    # What libraries say of their own work is of no use here.
    root.setLevel(max(number, logging.INFO))
    logging.getLogger("embedding_proxy").setLevel(number)
    for made in root.handlers:
        if isinstance(made, logging.StreamHandler):
            made.setFormatter(formatter(kind, made.stream))


def handler(
    stream: TextIO | None = None, clock: Callable[[], float] = time.monotonic
) -> logging.Handler:
    """Return what writes records to a stream, by default stderr, as text."""
    made = logging.StreamHandler(sys.stderr if stream is None else stream)
    made.setFormatter(LineFormatter())
    made.addFilter(RateLimit(clock))
    return made
