"""The request that the code in progress works for: its id, and its place in a distributed trace.

They are context variables. Tasks that are made for a request inherit them, so a line of the log
names the request wherever it is written, and a call of a provider carries the trace on. A call that
serves several requests belongs to the one that began it.
"""

import re
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from contextvars import ContextVar
from typing import Protocol, TypeAlias

TRACEPARENT = "traceparent"
"""The header of W3C Trace Context (https://www.w3.org/TR/trace-context/#traceparent-header)."""
_WELL_FORMED = re.compile(
    r"(?!ff)[0-9a-f]{2}-(?!0{32})([0-9a-f]{32})-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}"
)

request_id: ContextVar[str] = ContextVar("request_id", default="")
traceparent: ContextVar[str] = ContextVar("traceparent", default="")
"""Well-formed, or empty."""


def parse_traceparent(value: str) -> str:
    """Return a value of the header if it is well-formed; else "".

    >>> parse_traceparent("00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01")
    '00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01'
    >>> parse_traceparent("00-00000000000000000000000000000000-00f067aa0ba902b7-01")
    ''
    """
    return value if _WELL_FORMED.fullmatch(value) else ""


def trace_id() -> str:
    """Return the id of the trace in progress; "" outside of one."""
    match = _WELL_FORMED.fullmatch(traceparent.get())
    return match[1] if match else ""


def headers() -> dict[str, str]:
    """Return what a call of a provider carries on of the trace."""
    value = traceparent.get()
    return {TRACEPARENT: value} if value else {}


class CallSpan(Protocol):
    """What a trace is told of one call of a provider."""

    def answered(self, tokens: int | None, dimensions: int) -> None:
        """Note what the call was charged, in tokens, and the width of its vectors."""


class _NoSpan:
    def answered(self, tokens: int | None, dimensions: int) -> None:
        """Note nothing."""


CallObserver: TypeAlias = Callable[[str, str, int], AbstractContextManager[CallSpan]]
"""Begins the span of a call, from the provider, its name of the model, and the number of inputs."""
_NOBODY = nullcontext(_NoSpan())


class Observer:
    """Who is told of calls: nobody, unless traces are on."""

    begin_call: CallObserver = staticmethod(lambda _provider, _model, _inputs: _NOBODY)


observer = Observer()
