"""GET /dashboard: a page for people, and what it reads: state, history, live events.

The page itself holds no figure and is answered without a key. Everything else is for admins: by the
headers that other routes take, or by the cookie of a session (`dashboard.session`), which
POST /dashboard/login gives for an admin's key. Without keys the proxy serves this machine alone,
and nobody has to log in.

No page of another origin gets anything, whatever `server.cors` says: browsers tell by
`Sec-Fetch-Site` or `Origin` who asks. The page may not be framed, and runs no script but its own.
"""

import asyncio
import logging
from collections.abc import AsyncIterator
from functools import cache
from importlib.resources import files
from typing import NamedTuple

import orjson
from aiohttp import web
from aiohttp.typedefs import Handler
from embedding_proxy.proxy.service.embedding_service import EmbeddingService
from embedding_proxy.proxy.service.request import CALLER, Client
from yarl import URL

from . import request_body
from .auth import Authenticator
from .dashboard.samples import Sampler, TooManyViewers
from .dashboard.session import COOKIE, SESSION_S, SIGNING_KEY_FILE, Session, Sessions
from .dashboard_figures import SPANS, Figures, csv
from .errors import Failure
from .request_metrics import RequestMetrics
from .status import READINESS, ROOT, root, usage_fields

log = logging.getLogger("embedding_proxy.dashboard")

PAGE = "/dashboard"
MAX_LOGIN_BYTES = 1 << 13
LOGIN_S = 10.0
"""Seconds for the body of a login."""
RETRY_MS = 1000
"""After which a page connects again whose events have ended."""
_FILES = {
    "index.html": "text/html",
    "icon.svg": "image/svg+xml",
    "dashboard.css": "text/css",
    "dashboard.js": "text/javascript",
    "charts.js": "text/javascript",
    "uPlot.iife.min.js": "text/javascript",
    "uPlot.min.css": "text/css",
}
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self';"
    " base-uri 'none'; form-action 'self'; frame-ancestors 'none'"
)
_HEADERS = {
    "Content-Security-Policy": _POLICY,
    "X-Frame-Options": "DENY",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cache-Control": "no-store",
}
_FRAMES = {"iframe", "frame", "embed", "object", "fencedframe"}
_LOG_IN = Failure(
    401,
    "Log in at /dashboard with the key of an admin, or send that key in the header `Authorization:"
    " Bearer KEY`.",
    "invalid_request_error",
    code="invalid_api_key",
)
_NO_ADMIN = Failure(
    403,
    "This key may not see the dashboard: that is for admins' keys, see `keys add --admin` and"
    " `admin: true` of server.keys.",
    "invalid_request_error",
    code="insufficient_permissions",
)
_FOREIGN = Failure(
    403,
    "Pages of other origins may not use the dashboard, nor show it in a frame.",
    "invalid_request_error",
    code="origin_not_allowed",
)
_FULL = Failure(
    503,
    "Too many pages show the dashboard already; close one.",
    "server_error",
    code="proxy_overloaded",
    retry_after=30,
)
_UNREADABLE = Failure(
    503, "The ledger cannot be read now.", "server_error", code="proxy_overloaded", retry_after=5
)


def is_dashboard(path: str) -> bool:
    """Tell whether a path is one of these routes, which ask for a key by themselves."""
    return path == PAGE or path.startswith(PAGE + "/")


class _Query(NamedTuple):
    span: str
    model: str | None
    client: str | None


class Dashboard:
    """The routes, and what they share."""

    def __init__(
        self,
        service: EmbeddingService,
        access: Authenticator,
        figures: Figures,
        requests: RequestMetrics,
        is_encrypted: bool,  # noqa: FBT001 - of the socket
    ) -> None:
        self._service = service
        self._access = access
        self._figures = figures
        self._requests = requests
        self._is_encrypted = is_encrypted
        self._own_sessions: Sessions | None = None
        self._sampler: Sampler | None = None

    def add_routes(self, app: web.Application) -> None:
        """Add all routes, that of the root among them."""
        get, post = app.router.add_get, app.router.add_post
        get(ROOT, self._root)
        get(PAGE, self._guarded(self._page))
        get(PAGE + "/static/{name}", self._guarded(self._file))
        post(PAGE + "/login", self._guarded(self._login))
        post(PAGE + "/logout", self._guarded(self._logout))
        get(PAGE + "/state", self._guarded(self._admin_only(self._state)))
        get(PAGE + "/history", self._guarded(self._admin_only(self._history)))
        get(PAGE + "/history.csv", self._guarded(self._admin_only(self._history_csv)))
        get(PAGE + "/events", self._guarded(self._admin_only(self._events)))

    async def run(self, app: web.Application) -> AsyncIterator[None]:
        """Serve viewers for as long as the application runs."""
        readiness = app[READINESS]
        self._sampler = Sampler(
            self._figures.read, self._figures.state, lambda: readiness.is_stopping
        )
        yield
        self.end_streams()
        await self._sampler.wait_closed()

    def end_streams(self) -> None:
        """Let all viewers go: they connect again, to whoever answers then."""
        if self._sampler is not None:
            self._sampler.close()

    @property
    def _sessions(self) -> Sessions:
        if self._own_sessions is None:
            storage = self._service.storage
            folder = self._service.settings.cache.directory
            folder = folder if storage is None else storage.store.folder
            self._own_sessions = Sessions(folder / SIGNING_KEY_FILE)
        return self._own_sessions

    def _guarded(self, handler: Handler) -> Handler:
        """Return a handler that answers no page of another origin, and no frame."""

        async def handle(request: web.Request) -> web.StreamResponse:
            response = _FOREIGN.response() if _is_foreign(request) else await handler(request)
            if not response.prepared:
                response.headers.update(_HEADERS)
            return response

        return handle

    def _admin_only(self, handler: Handler) -> Handler:
        async def handle(request: web.Request) -> web.StreamResponse:
            await asyncio.to_thread(self._sessions.load)
            caller = self._caller(request)
            if caller is None:
                return _LOG_IN.response()
            return await handler(request) if caller.is_admin else _NO_ADMIN.response()

        return handle

    def _caller(self, request: web.Request) -> Client | None:
        """Return who asks: by a key, or by a session whose key is still an admin's."""
        caller: Client | None = request.get(CALLER)
        if caller is not None:
            return caller
        sessions = self._sessions
        session = sessions.read(request.cookies.get(COOKIE, ""))
        return None if session is None else self._client_of(session)

    def _client_of(self, session: Session) -> Client | None:
        tag_of = self._sessions.tag_of
        client = self._access.find(lambda digest: tag_of(digest) == session.tag)
        return client if client is not None and client.is_admin else None

    async def _root(self, request: web.Request) -> web.StreamResponse:
        """Answer browsers with the page, and programs with what this is."""
        if not _wants_page(request):
            response = await root(request)
            response.headers["Vary"] = "Accept"
            return response
        page = await self._guarded(self._page)(request)
        page.headers["Vary"] = "Accept"
        return page

    async def _page(self, _: web.Request) -> web.Response:
        return _static("index.html")

    async def _file(self, request: web.Request) -> web.Response:
        name = request.match_info["name"]
        if name not in _FILES:
            raise web.HTTPNotFound
        return _static(name)

    async def _login(self, request: web.Request) -> web.StreamResponse:
        """Give a cookie for an admin's key: `{"key": …}` in JSON."""
        content = await request_body.read(request, MAX_LOGIN_BYTES, LOGIN_S)
        try:
            key = orjson.loads(content)["key"]
        except (orjson.JSONDecodeError, KeyError, TypeError, IndexError):
            key = None
        if not isinstance(key, str):
            message = 'Send {"key": "…"} as JSON.'
            return Failure(400, message, "invalid_request_error").response()
        admitted = self._access.admit(f"Bearer {key.strip()}")
        if isinstance(admitted, Failure):
            return admitted.response()
        if not admitted.is_admin:
            return _NO_ADMIN.response()
        response = web.json_response({"status": "ok"})
        if not self._access.is_open:
            await asyncio.to_thread(self._sessions.load)
            self._set_cookie(
                request, response, self._sessions.sign(self._access.digest_of(key)), SESSION_S
            )
        return response

    async def _logout(self, request: web.Request) -> web.StreamResponse:
        response = web.json_response({"status": "ok"})
        self._set_cookie(request, response, "", 0)
        return response

    def _set_cookie(
        self, request: web.Request, response: web.Response, value: str, max_age: int
    ) -> None:
        """Set the session's cookie; it is Secure where the browser speaks TLS, if to a gateway.

        Without a path it is that of this folder, wherever a gateway has put it; no other route gets
        it, and so no upstream.
        """
        told = request.headers.get("X-Forwarded-Proto", "")
        is_secure = self._is_encrypted or told.strip().lower() == "https"
        end = "; Secure" if is_secure else ""
        response.headers.add(
            "Set-Cookie", f"{COOKIE}={value}; Max-Age={max_age}; HttpOnly; SameSite=Strict{end}"
        )

    async def _state(self, request: web.Request) -> web.Response:
        state = await self._figures.state()
        has_session = request.get(CALLER) is None
        return _json({**state, "has_session": has_session})

    async def _history(self, request: web.Request) -> web.Response:
        query = _query(request)
        found = None if query is None else await self._figures.history(*query)
        if query is None or found is None:
            return (_SPAN if query is None else _UNREADABLE).response()
        unit, start, points = found
        fields = [(place, usage_fields(usage)) for place, usage in points]
        return _json(
            {
                "unit": unit,
                "start": start,
                "end": self._figures.end_of(unit),
                "points": [{unit: place, **sums} for place, sums in fields],
            }
        )

    async def _history_csv(self, request: web.Request) -> web.Response:
        query = _query(request)
        found = None if query is None else await self._figures.history(*query)
        if query is None or found is None:
            return (_SPAN if query is None else _UNREADABLE).response()
        unit, _, points = found
        name = f"embedding-proxy-{query.span}.csv"
        headers = {"Content-Disposition": f'attachment; filename="{name}"'}
        return web.Response(text=csv(unit, points), content_type="text/csv", headers=headers)

    async def _events(self, request: web.Request) -> web.StreamResponse:
        """Send live events until the viewer leaves, its session ends, or the proxy stops."""
        assert self._sampler is not None  # noqa: S101 - the application runs
        events = self._sampler.events()
        response = web.StreamResponse(headers=_HEADERS)
        response.content_type = "text/event-stream"
        response.headers["X-Accel-Buffering"] = "no"
        try:
            first = await anext(events, None)
        except TooManyViewers:
            return _FULL.response()
        with self._requests.look_on():
            try:
                await response.prepare(request)
                await response.write(b"retry: %d\n\n" % RETRY_MS)
                if first is not None:
                    await response.write(first)
                async for event in events:
                    caller = self._caller(request)
                    if caller is None or not caller.is_admin:
                        break
                    await response.write(event)
                await response.write_eof()
            except ConnectionError:
                pass  # The viewer has left.
            finally:
                await events.aclose()
        return response


_SPAN = Failure(
    400,
    f"`span` must be one of {', '.join(SPANS)}; `model` and `client` are names of the ledger.",
    "invalid_request_error",
    param="span",
)


def _query(request: web.Request) -> _Query | None:
    span = request.query.get("span", "month")
    if span not in SPANS:
        return None
    return _Query(span, request.query.get("model"), request.query.get("client"))


def _json(content: object) -> web.Response:
    return web.Response(body=orjson.dumps(content), content_type="application/json")


@cache
def _content(name: str) -> bytes:
    return files(f"{__package__}.dashboard").joinpath("static", name).read_bytes()


def _static(name: str) -> web.Response:
    return web.Response(body=_content(name), content_type=_FILES[name], charset="utf-8")


def _wants_page(request: web.Request) -> bool:
    """Tell whether a browser asks: programs take anything, or JSON."""
    accepted = request.headers.get("Accept", "")
    return any(one.partition(";")[0].strip().lower() == "text/html" for one in accepted.split(","))


def _is_foreign(request: web.Request) -> bool:
    """Tell whether a page of another origin sent a request, or a frame would show the reply."""
    headers = request.headers
    if headers.get("Sec-Fetch-Dest", "").lower() in _FRAMES:
        return True
    site = headers.get("Sec-Fetch-Site", "").lower()
    if site and site not in {"same-origin", "none"}:
        # A link from elsewhere may lead to the page, which holds nothing.
        is_link = headers.get("Sec-Fetch-Mode", "").lower() == "navigate"
        return not (is_link and request.method == "GET" and request.path in {ROOT, PAGE})
    origin = headers.get("Origin")
    if site or origin is None:
        return False
    try:
        return URL(origin).authority != URL(f"//{headers.get('Host', '')}").authority
    except ValueError:
        return True
