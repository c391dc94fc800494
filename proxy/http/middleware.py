"""Middleware of every request: checks target, host, origin and key; gives errors OpenAI's shape."""

import logging
from time import perf_counter
from typing import TYPE_CHECKING, NamedTuple

from aiohttp import web
from aiohttp.typedefs import Handler, Middleware
from embedding_proxy.providers.errors import EmbeddingError, InvalidRequest
from embedding_proxy.proxy.service.request import CALLER, Client

from . import errors, status, target
from .auth import KEY_HEADERS, Authenticator
from .cors import Cors
from .dashboard_routes import is_dashboard
from .errors import Failure
from .origin_check import OriginCheck
from .request_body import BodyRefused
from .request_log import BEGIN, REQUEST_ID, STARTED, RequestLog, identify, log_request
from .request_metrics import CLIENT_GONE, LOGGED_ROUTES, RequestMetrics, route_name
from .target import REMEDY, may_be_embeddings

if TYPE_CHECKING:
    from .tracing import Tracing

log = logging.getLogger("embedding_proxy.guard")

METRICS_PATH = "/metrics"
"""Where `server.metrics_token` counts, and nowhere else."""


class Observers(NamedTuple):
    """Who is told of each request."""

    metrics: RequestMetrics
    lines: RequestLog
    tracing: "Tracing | None"


def request_middleware(
    access: Authenticator, cors: Cors, origin_check: OriginCheck, observers: Observers
) -> Middleware:
    """Return the middleware around everything: target, host, origin and key are checked first.

    It gives every error OpenAI's shape. Of `status.OPEN_PATHS` only the target is checked, and
    `status.ROOT` and the dashboard are answered without a key, and have no CALLER in their request
    then.
    """
    requests, lines, tracing = observers

    @web.middleware
    async def handle(request: web.Request, handler: Handler) -> web.StreamResponse:
        identify(request)
        status, verdict, start = CLIENT_GONE, None, request.get(BEGIN) or perf_counter()
        requests.in_flight += 1
        try:
            refused = _refuse(request, access, cors, origin_check)
            response: web.StreamResponse
            if refused is not None:
                response = refused
            elif tracing is None:
                response = await _respond(request, handler)
            else:
                with tracing.request(request) as span:
                    response = span.response = await _respond(request, handler)
            status, verdict = response.status, response.headers.get("x-cache")
        finally:
            requests.in_flight -= 1
            seconds = perf_counter() - start
            requests.observe(route_name(request), status, seconds, verdict)
        if response.status >= 400:
            log_request(request, response)
        elif route_name(request) in LOGGED_ROUTES:
            lines.write(request, response, seconds)
        return response

    return handle


def _refuse(
    request: web.Request, access: Authenticator, cors: Cors, origin_check: OriginCheck
) -> web.Response | None:
    """Return the reply to a request that no handler gets to see; None to all others."""
    try:
        target.check(request.method, request.raw_path)
    except InvalidRequest as error:
        return errors.failure(error).response()
    is_open = request.path in status.OPEN_PATHS
    refusal = None if is_open else origin_check.refusal(request)
    if refusal is not None:
        return refusal.response()
    preflight = cors.preflight(request)
    if preflight is not None or is_open:
        return preflight
    authorization = request.headers.get("Authorization")
    if request.path == METRICS_PATH and access.has_metrics_token(authorization):
        request[CALLER] = Client(is_admin=True)
        return None
    admitted = access.admit(
        authorization,
        *(value for name in KEY_HEADERS for value in request.headers.getall(name, ())),
    )
    if isinstance(admitted, Failure):
        is_open = request.path == status.ROOT or is_dashboard(request.path)
        return None if is_open else admitted.response()
    request[CALLER] = admitted
    return None


async def _respond(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Return the reply of a handler, or the one that explains its error."""
    try:
        return await handler(request)
    except ConnectionError:
        # The client is gone, perhaps in the midst of a reply; nobody is left to tell.
        raise
    except Exception as error:
        response = _explain(request, error)
        if request.get(STARTED):
            # Amid a reply there is no room for another; only a cut tells that it is not whole.
            raise ConnectionAbortedError("the reply could not be finished") from error
        return response


def admin_only(handler: Handler) -> Handler:
    """Return a handler that serves admins alone: keys with `admin: true`, or all without keys."""

    async def handle(request: web.Request) -> web.StreamResponse:
        if not request[CALLER].is_admin:
            return Failure(
                403,
                f"This key may not read {request.path}: that is for admins' keys, see"
                " `keys add --admin` and `admin: true` of server.keys.",
                "invalid_request_error",
                code="insufficient_permissions",
            ).response()
        return await handler(request)

    return handle


def _explain(request: web.Request, error: Exception) -> web.Response:
    """Return the response that tells of an error."""
    if isinstance(error, EmbeddingError):
        response = errors.failure(error).response()
        if isinstance(error, BodyRefused):
            response.force_close()
        return response
    if isinstance(error, web.HTTPException):
        response = _not_found(request, error).response()
        if "Allow" in error.headers:
            response.headers["Allow"] = error.headers["Allow"]
        return response
    # Whatever else it is, it is ours: the log gets the traceback, the client does not.
    log.error("request %s failed", request[REQUEST_ID], exc_info=error)
    return errors.INTERNAL.response()


def _not_found(request: web.Request, error: web.HTTPException) -> Failure:
    """Return the error for a request that no handler takes."""
    what = f"({request.method} {request.path[:200]})"
    if error.status == 404 and may_be_embeddings(request.method, request.raw_path):
        what += f"; {REMEDY}"
    if error.status == 405:
        return Failure(405, f"Not allowed to do this here {what}.", "invalid_request_error")
    if error.status == 404:
        return Failure(404, f"Invalid URL {what}", "invalid_request_error", code="unknown_url")
    return Failure(error.status, error.reason, "invalid_request_error")
