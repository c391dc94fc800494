"""File descriptors: how many this process may open, and what it means when none is left.

Each connection, of a client or to an upstream, takes one. A call that fails for want of one says
nothing about the upstream: no circuit breaker counts it, and the client is told that the proxy is
overloaded. An event loop does not always tell when it cannot accept a connection (libuv closes it
in silence), so whoever serves asks `is_exhausted` now and then.
"""

import errno
import importlib
import logging
import os
import socket
import time
from collections.abc import Callable
from typing import Any

import aiohttp

# Windows has no such limit.
resource: Any = importlib.import_module("resource") if os.name == "posix" else None

log = logging.getLogger("embedding_proxy.descriptors")

WARNING_INTERVAL_S = 60.0
_EXHAUSTED = (errno.EMFILE, errno.ENFILE)
_MAX_RAISED = 1 << 16
"""As far as a limit is raised: some systems allow a thousand million."""
_UNLIMITED = 1 << 16


class Interval:
    """Tells whether a line is to be logged: the first, and then one each WARNING_INTERVAL_S."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._next = float("-inf")

    def is_due(self) -> bool:
        """Return True for the first call, and for the first one after each interval."""
        now = self._clock()
        if now < self._next:
            return False
        self._next = now + WARNING_INTERVAL_S
        return True


_warnings = Interval()


def raise_limit() -> None:
    """Raise this process's soft limit on open files to the hard one, as servers do."""
    if resource is None:
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    target = _MAX_RAISED if hard == resource.RLIM_INFINITY else min(hard, _MAX_RAISED)
    if soft != resource.RLIM_INFINITY and soft < target:
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (target, hard))
        except (OSError, ValueError) as error:
            log.info("the limit on open files stays %s: %s", soft, error)


def limit() -> int:
    """Return how many descriptors this process may have open."""
    if resource is None:
        return _UNLIMITED
    soft: int = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return _UNLIMITED if soft == resource.RLIM_INFINITY else soft


def left() -> int:
    """Return how many more descriptors this process may open, about."""
    try:
        # A new one has the lowest number that is free.
        lowest = os.open(os.devnull, os.O_RDONLY)
    except OSError:
        return 0
    os.close(lowest)
    return max(0, limit() - lowest)


def is_exhausted() -> bool:
    """Tell whether this process, or the system, can open no further file now."""
    try:
        os.close(os.open(os.devnull, os.O_RDONLY))
    except OSError as error:
        return error.errno in _EXHAUSTED
    return False


def is_cause(error: BaseException) -> bool:
    """Tell whether a connection failed because no descriptor was left."""
    inner = error.os_error if isinstance(error, aiohttp.ClientConnectorError) else error
    if isinstance(inner, OSError) and inner.errno in _EXHAUSTED:
        return True
    # A resolver that cannot open its files, and errors of several addresses, say something else.
    is_vague = isinstance(inner, socket.gaierror) or getattr(inner, "errno", None) is None
    return isinstance(error, aiohttp.ClientConnectorError) and is_vague and is_exhausted()


def warn(what: str) -> None:
    """Log that something cannot be done for want of a descriptor; once a minute at most."""
    if _warnings.is_due():
        log.warning(
            "no file descriptor is left: %s; raise the limit on open files (ulimit -n), or lower"
            " server.max_connections",
            what,
        )
