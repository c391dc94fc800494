"""The base URL of an upstream: addresses are built below it, and a key goes to its origin only.

An address is built from parsed parts, never by joining texts: after `https://api.acme.com` a path
without its slash would name another host.
"""

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
