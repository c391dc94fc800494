"""The way to an upstream: its base URL, the HTTP proxy before it, and the trusted certificates.

Addresses are built below the base URL, and a key goes to its origin only. An address is built from
parsed parts, never by joining texts: after `https://api.acme.com` a path without its slash would
name another host.

By default an upstream is reached directly, and the certificates that Python's `ssl` trusts are
trusted: the system's, or those that the variables SSL_CERT_FILE and SSL_CERT_DIR name.
"""

import base64
import ssl
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any
from urllib.request import getproxies, proxy_bypass

import aiohttp
from aiohttp import ClientError, ClientHandlerType, ClientRequest, ClientResponse, hdrs
from aiohttp.client_exceptions import WSServerHandshakeError
from yarl import URL


class ForeignOrigin(ClientError):
    """A call was about to go to another origin than the configured one; it was not sent."""


class BaseUrl:
    """A parsed base URL, `http` or `https`, without user, query and fragment."""

    def __init__(self, text: str) -> None:
        self._url = URL(text)
        self._path = self._url.raw_path.rstrip("/")
        self._origin = self._url.origin()

    def __str__(self) -> str:
        return f"{self._origin}{self._path}"

    def join(self, target: str) -> URL:
        """Return the address of a path, and its query if it has one, byte for byte, below the base.

        Raises ValueError for a target that does not begin with a slash, and ForeignOrigin for one
        that leads to another origin.
        """
        path, _, query = target.partition("#")[0].partition("?")
        if not path.startswith("/"):
            raise ValueError("a target begins with a slash")
        url = URL.build(
            scheme=self._origin.scheme,
            authority=self._origin.raw_authority,
            path=self._path + path,
            query_string=query,
            encoded=True,
        )
        self.verify(url)
        return url

    def verify(self, url: URL) -> None:
        """Raise ForeignOrigin unless the address has this scheme, host and port, and no user."""
        if url.raw_user is not None or url.raw_password is not None:
            raise ForeignOrigin("the address holds a user name")
        if url.origin() != self._origin:
            raise ForeignOrigin(f"the address is not one of {self._origin}")

    async def guard(self, request: ClientRequest, send: ClientHandlerType) -> ClientResponse:
        """Send a call if it goes to this origin: a client middleware, for every hop of a call.

        aiohttp follows the redirects of a WebSocket's handshake, and removes `Authorization` but no
        other header that may hold a key. So a redirect ends the handshake. Raises ForeignOrigin,
        WSServerHandshakeError.
        """
        self.verify(request.url)
        response = await send(request)
        if 300 <= response.status < 400 and hdrs.UPGRADE in request.headers:
            response.close()
            raise WSServerHandshakeError(
                response.request_info,
                response.history,
                message="redirect",
                status=response.status,
                headers=response.headers,
            )
        return response


@dataclass(frozen=True, slots=True, kw_only=True)
class Network:
    """The way to one upstream. The credentials in `proxy` are never shown."""

    proxy: str | None = field(default=None, repr=False)
    """The URL of an HTTP proxy, with its credentials if it wants any."""
    trust_env: bool = False
    """Whether HTTP_PROXY, HTTPS_PROXY, ALL_PROXY and NO_PROXY of the environment are obeyed."""
    ca_file: str | None = None
    """A PEM file; certificates are checked against this file alone. None: Python's default."""

    def proxy_for(self, base_url: str) -> URL | None:
        """Return the proxy for calls to this address, or None.

        Raises ValueError for a proxy of the environment that cannot be used; the message shows no
        credentials.
        """
        if self.proxy is not None:
            return URL(self.proxy)
        if not self.trust_env:
            return None
        url = URL(base_url)
        host = url.host or ""
        if proxy_bypass(host) or proxy_bypass(f"{host}:{url.port}"):
            return None
        proxies = getproxies()
        name = url.scheme if url.scheme in proxies else "all"
        if name not in proxies:
            return None
        address = proxies[name]
        try:
            proxy = URL(address if "://" in address else f"http://{address}")
            # A bare word is no address: neither a scheme nor a port says that it is meant as one.
            usable = proxy.scheme in ("http", "https") and bool(proxy.host) and proxy.port != 0
            usable = usable and ("://" in address or proxy.explicit_port is not None)
            usable = usable and len(address.split()) == 1
        except ValueError:
            usable = False
        if not usable:
            raise ValueError(
                f"the variable {name.upper()}_PROXY holds no address of an HTTP proxy;"
                f" expected http://host:port"
            )
        return proxy

    def secrets(self, base_url: str) -> Iterator[str]:
        """Yield what only the HTTP proxy may see: its password, and what is sent in its place.

        An HTTP proxy passes on what it was sent where it should not, and an upstream may repeat it.
        A user name without a password is a token.
        """
        with suppress(ValueError):
            proxy = self.proxy_for(base_url)
            if proxy is None or proxy.user is None:
                return
            pair = f"{proxy.user}:{proxy.password or ''}"
            yield proxy.password or proxy.user
            yield base64.b64encode(pair.encode("latin1", "replace")).decode()

    def address_of(self, base_url: str) -> str:
        """Return the host and port that connections are made to, for people."""
        proxy = self.proxy_for(base_url)
        url = proxy or URL(base_url)
        return f"{'HTTP proxy ' if proxy else ''}{url.host_subcomponent}:{url.port}"

    def open_session(
        self,
        base_url: str,
        *,
        connections: int,
        middlewares: Sequence[aiohttp.ClientMiddlewareType] = (),
        **options: Any,  # noqa: ANN401 - aiohttp's own
    ) -> aiohttp.ClientSession:
        """Return a session whose calls to `base_url` go this way; it keeps no cookies.

        A call to another origin fails with ForeignOrigin.

        `connections` is how many it opens at most, 0 = any number. `options` are aiohttp's. Raises
        ValueError as `proxy_for` does, OSError if `ca_file` cannot be read or holds no certificate.
        """
        trusted: ssl.SSLContext | bool = True
        if self.ca_file is not None:
            trusted = ssl.create_default_context(cafile=self.ca_file)
        return aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=connections, ttl_dns_cache=60, ssl=trusted),
            cookie_jar=aiohttp.DummyCookieJar(),
            proxy=self.proxy_for(base_url),
            auto_decompress=False,
            middlewares=(BaseUrl(base_url).guard, *middlewares),
            **options,
        )
