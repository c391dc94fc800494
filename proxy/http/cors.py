"""CORS: which web pages may call from a browser. Off unless origins are configured."""

from collections.abc import Collection

from aiohttp import web

_DAY = "86400"


class Cors:
    """Answers preflights, and marks replies, for the configured origins; `*` stands for all."""

    def __init__(self, origins: Collection[str]) -> None:
        self._origins = frozenset(origins)

    def preflight(self, request: web.Request) -> web.Response | None:
        """Return the answer to a browser that asks whether it may call; None for other requests.

        Browsers send no key with that question.
        """
        method = request.headers.get("Access-Control-Request-Method")
        if request.method != "OPTIONS" or method is None or not self._allowed(request):
            return None
        headers = {
            "Access-Control-Allow-Methods": method,
            "Access-Control-Max-Age": _DAY,
            "Vary": "Access-Control-Request-Method, Access-Control-Request-Headers",
        }
        names = request.headers.get("Access-Control-Request-Headers")
        if names:
            # Named one by one: `*` does not stand for Authorization.
            headers["Access-Control-Allow-Headers"] = names
        return web.Response(status=204, headers=headers)

    async def mark(self, request: web.Request, response: web.StreamResponse) -> None:
        """Tell the browser that the page may read the reply, headers included."""
        if not self._origins:
            return
        response.headers.add("Vary", "Origin")
        allowed = self._allowed(request)
        if allowed:
            response.headers["Access-Control-Allow-Origin"] = allowed
            response.headers["Access-Control-Expose-Headers"] = "*"

    def is_allowed(self, request: web.Request) -> bool:
        """Tell whether the configuration lets the page that sent this call; `*` lets all."""
        return "*" in self._origins or self._allowed(request) is not None

    def _allowed(self, request: web.Request) -> str | None:
        origin = request.headers.get("Origin")
        if origin is None or not ({"*", origin} & self._origins):
            return None
        return "*" if "*" in self._origins else origin
