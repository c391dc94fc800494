"""Which headers of a passed-through call go on, in both directions.

Everything does but what is listed here: applications and SDKs use headers that nobody can foresee.
(Upstream calls for embeddings are the opposite: they are built from a list.)
"""

import time
from collections.abc import Iterable, Mapping

from embedding_proxy.providers.ratelimit import told_header
from multidict import CIMultiDict, CIMultiDictProxy

KEY_HEADERS = ("x-proxy-key", "api-key", "x-api-key")
"""Where a client may give its key, besides `Authorization: Bearer …`."""

# Of one connection, not of the message (RFC 9110, 7.6.1).
_HOP_BY_HOP = frozenset(
    {
        "connection",
        "keep-alive",
        "proxy-authenticate",
        "proxy-authentication-info",
        "proxy-authorization",
        "proxy-connection",
        "te",
        "trailer",
        "transfer-encoding",
        "upgrade",
    }
)
# Meant for this proxy, or telling of who and what stands before it.
_NOT_FORWARDED = _HOP_BY_HOP | {
    *KEY_HEADERS,
    "authorization",
    "cookie",
    "expect",
    "forwarded",
    "host",
    "origin",
    "referer",
    "true-client-ip",
    "via",
    "x-goog-api-key",
    "x-real-ip",
}
_NOT_FORWARDED_BEGINNINGS = (
    "access-control-",
    "cf-",
    "sec-fetch-",
    "sec-websocket-",
    "x-forwarded-",
)

# What an upstream says of its own origin would here be said of ours.
_NOT_RETURNED = _HOP_BY_HOP | {"alt-svc", "strict-transport-security"}
_NOT_RETURNED_BEGINNINGS = ("access-control-",)


def forwarded(headers: CIMultiDictProxy[str], own: Mapping[str, str]) -> CIMultiDict[str]:
    """Return what an upstream is sent of a client's headers, and `own` in place of its like."""
    kept = _kept(headers, _NOT_FORWARDED, _NOT_FORWARDED_BEGINNINGS)
    for name, value in own.items():
        kept[name] = value
    return kept


def returned(headers: CIMultiDictProxy[str], now: float | None = None) -> CIMultiDict[str]:
    """Return what a client is sent of an upstream's headers; waits are bounded.

    `now` is the present time in seconds since 1970.
    """
    now = time.time() if now is None else now
    kept = _kept(headers, _NOT_RETURNED, _NOT_RETURNED_BEGINNINGS)
    told = ((name, told_header(name.lower(), value, now)) for name, value in kept.items())
    return CIMultiDict((name, value) for name, value in told if value is not None)


def _kept(
    headers: CIMultiDictProxy[str], unwanted: frozenset[str], beginnings: tuple[str, ...]
) -> CIMultiDict[str]:
    # A message may name further ones that are of its connection.
    named = set(_listed(headers.getall("Connection", ())))
    return CIMultiDict(
        (name, value)
        for name, value in headers.items()
        if (lower := name.lower()) not in unwanted
        and lower not in named
        and not lower.startswith(beginnings)
    )


def _listed(values: Iterable[str]) -> Iterable[str]:
    return (part.strip().lower() for value in values for part in value.split(","))
