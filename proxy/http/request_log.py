"""The id of each request, and a log line for each one that is answered with an error.

A client may choose the id (`X-Request-Id`, or OpenAI's `X-Client-Request-Id`), so that its own log
and the proxy's name a request alike. The line tells id, method, path, model, status and code. It
repeats no message: an upstream's may quote the input.
"""

import logging
import re

import orjson
from aiohttp import web

from . import errors

log = logging.getLogger("embedding_proxy.requests")

HEADER = "x-request-id"
CLIENT_HEADERS = ("X-Request-Id", "X-Client-Request-Id")
"""Where a client may name its request; the first that holds a well-formed id counts."""
_WELL_FORMED = re.compile(r"[A-Za-z0-9._:/+=@-]{1,128}")
_MAX_SHOWN = 200
"""Characters of a path or a model that a line repeats."""

REQUEST_ID = web.RequestKey("request_id", str)
MODEL = web.RequestKey("model", str)
"""The model that a request asks for, as soon as it is known."""
STARTED = web.RequestKey("started", bool)
"""Set when a reply has begun."""


def identify(request: web.Request) -> None:
    """Give a request its id: the client's own if that is well-formed, a new one otherwise."""
    chosen = (value for name in CLIENT_HEADERS for value in request.headers.getall(name, ()))
    own = next((value for value in chosen if _WELL_FORMED.fullmatch(value)), None)
    request[REQUEST_ID] = own or errors.new_request_id()


def has_own_id(request: web.BaseRequest) -> bool:
    """Tell whether a request may bring an id of its own, which its reply repeats."""
    return any(name in request.headers for name in CLIENT_HEADERS)


async def add_request_id(request: web.Request, response: web.StreamResponse) -> None:
    """Give every response its request's id, streamed ones too; an upstream's own is kept."""
    own = request.get(REQUEST_ID) or errors.new_request_id()
    response.headers.setdefault(HEADER, own)
    request[STARTED] = True


def log_request(request: web.Request, response: web.StreamResponse) -> None:
    """Log a request that is answered with an error; as a warning if that is not the client's.

    A passed-through reply keeps the upstream's id, which is told beside the request's own.
    """
    if response.status < 400:
        return
    value = response.headers.get(HEADER, "")
    is_foreign = value not in ("", request[REQUEST_ID])
    log.log(
        logging.WARNING if response.status >= 500 else logging.INFO,
        "request %s%s: %s %s, model %s: status %d, code %s",
        request[REQUEST_ID],
        f" ({value[:_MAX_SHOWN]} upstream)" if is_foreign else "",
        request.method,
        request.path[:_MAX_SHOWN],
        request.get(MODEL, "unknown")[:_MAX_SHOWN],
        response.status,
        _code(response),
    )


def _code(response: web.StreamResponse) -> str:
    """Return the code of an error of the proxy's own; `none` if it has none, or is not JSON."""
    if isinstance(response, web.Response) and isinstance(response.body, bytes):
        try:
            return str(orjson.loads(response.body)["error"]["code"] or "none")[:_MAX_SHOWN]
        except (orjson.JSONDecodeError, KeyError, TypeError):
            return "none"
    return "none"
