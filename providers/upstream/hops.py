"""Which proxies a request has passed: a header of our own, as `CDN-Loop` (RFC 8586) is for CDNs.

Each installation adds its id to `x-embedding-proxy-hop` on every call that it makes for a request.
So a request that comes back to its sender is recognised (`proxy.http.loop_guard`). The chain of the
request in progress is a context variable: tasks that are made for a request inherit it.
"""

from collections.abc import Iterable
from contextvars import ContextVar, Token

HEADER = "x-embedding-proxy-hop"
MAX_HOPS = 5
"""Proxies that a request may pass. A longer chain is a loop whose ids do not repeat."""

_chain: ContextVar[tuple[str, ...]] = ContextVar("hops", default=())


def parse(values: Iterable[str]) -> tuple[str, ...]:
    """Return the ids in the header's values, first sender first; at most MAX_HOPS + 1.

    >>> parse(["a, b", "c"])
    ('a', 'b', 'c')
    """
    ids = [id_ for value in values for part in value.split(",") if (id_ := part.strip())]
    return tuple(ids[: MAX_HOPS + 1])


def enter(chain: tuple[str, ...]) -> Token[tuple[str, ...]]:
    """Make this the chain of the calls that follow in this context; `leave` undoes it."""
    return _chain.set(chain)


def leave(token: Token[tuple[str, ...]]) -> None:
    """Restore the chain that was there before `enter`."""
    _chain.reset(token)


def chain() -> tuple[str, ...]:
    """Return the chain of the request in progress."""
    return _chain.get()


def headers() -> dict[str, str]:
    """Return what is sent with a call: the header, or nothing outside of a proxy's request."""
    chain = _chain.get()
    return {HEADER: ", ".join(chain)} if chain else {}
