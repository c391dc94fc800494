"""Protects an open proxy from web pages: the check of `Host`, `Origin` and `Sec-Fetch-Site`.

A proxy without keys serves whoever reaches its loopback address. A browser on this machine
reaches it too, on behalf of every page that it shows: simple requests are sent without asking, and
a name of the page's own can be made to resolve to 127.0.0.1 (DNS rebinding), so that the page and
the proxy look like one origin. Therefore an open proxy answers only under host names that belong to
it, and refuses what a page of another machine sends. With keys no check is needed: a page has none.

Sources of the rules: Fetch, "Origin" header; W3C Fetch Metadata, 2.2; RFC 9110, 15.5.20 (421).
"""

import ipaddress
from collections.abc import Iterable

from aiohttp import web
from embedding_proxy.proxy.config.schema import Server
from yarl import URL

from .auth import Authenticator
from .cors import Cors
from .errors import Failure

_MAX_SHOWN = 100
"""Characters of a foreign host name that an error repeats."""


class HostNames:
    """The host names that stand for this machine, or for this proxy by configuration."""

    def __init__(self, names: Iterable[str]) -> None:
        self._names = frozenset(_plain(name) for name in names)

    def __contains__(self, name: str) -> bool:
        """Tell whether a host name without its port is one of them, or is loopback.

        >>> names = HostNames(["proxy.internal"])
        >>> [one in names for one in ("Proxy.Internal.", "127.0.0.2", "[::1]", "a.localhost")]
        [True, True, True, True]
        >>> [one in names for one in ("localhost.example", "127.0.0.1.nip.io", "0.0.0.0", "")]
        [False, False, False, False]
        """
        name = _plain(name)
        if name in self._names or name == "localhost" or name.endswith(".localhost"):
            return True
        try:
            return ipaddress.ip_address(name).is_loopback
        except ValueError:
            return False


class OriginCheck:
    """Decides which requests an open proxy does not serve. With keys it refuses none."""

    def __init__(self, server: Server, cors: Cors, access: Authenticator) -> None:
        self._access = access
        self._names = HostNames((server.host, *server.allowed_hosts))
        self._cors = cors

    def refusal(self, request: web.Request) -> Failure | None:
        """Return the error of a request that is not to be served: 421 or 403; None otherwise."""
        if not self._access.is_open:
            return None
        for host in request.headers.getall("Host", ()):
            if _host_name(host) not in self._names:
                return Failure(
                    421,
                    f"This proxy does not serve the host name {_host_name(host)[:_MAX_SHOWN]!r}:"
                    " name it in server.allowed_hosts, or set server.keys.",
                    "invalid_request_error",
                    code="host_not_allowed",
                )
        if self._is_foreign(request):
            return Failure(
                403,
                "Web pages may not call this proxy: name their origin in server.cors, or set"
                " server.keys.",
                "invalid_request_error",
                code="origin_not_allowed",
            )
        return None

    def _is_foreign(self, request: web.Request) -> bool:
        """Tell whether a page of another machine sent a request, one that is not allowed to."""
        if self._cors.is_allowed(request):
            return False
        origins = request.headers.getall("Origin", ())
        if origins:
            return any(self._is_foreign_origin(origin) for origin in origins)
        # Browsers send no Origin with simple GET and HEAD requests.
        sites = request.headers.getall("Sec-Fetch-Site", ())
        return any(site.strip().lower() == "cross-site" for site in sites)

    def _is_foreign_origin(self, origin: str) -> bool:
        origin = origin.strip().lower()
        if origin == "null":
            return True
        if not origin.startswith(("http://", "https://")):
            return False  # An application that is installed here.
        try:
            return (URL(origin).host or "") not in self._names
        except ValueError:
            return True


def _host_name(host: str) -> str:
    """Return the value of a `Host` header without its port.

    >>> [_host_name(host) for host in ("localhost:8080", "[::1]:8080", "[::1]", "::1", "a:b")]
    ['localhost', '[::1]', '[::1]', '::1', 'a:b']
    """
    name, colon, port = host.strip().rpartition(":")
    is_port = colon and (not port or (port.isascii() and port.isdigit()))
    is_address = ":" in name and not name.endswith("]")
    return name if is_port and not is_address else host.strip()


def _plain(name: str) -> str:
    """Return a host name in lower case, without the brackets of IPv6 and the dot of the root."""
    name = name.strip().lower().removesuffix(".")
    return name[1:-1] if name.startswith("[") and name.endswith("]") else name
