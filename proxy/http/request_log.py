"""The id of each request, and a log line for each.

A client may choose the id (`X-Request-Id`, or OpenAI's `X-Client-Request-Id`), so that its own log
and the proxy's name a request alike. The line of an error tells id, method, path, model, status and
code. It repeats no message: an upstream's may quote the input. The line of any other request tells
what came from the cache and what was billed. No line holds an input or a key.
"""

import logging
import re
import time
from collections.abc import Mapping

import orjson
from aiohttp import web
from embedding_proxy.providers import request_context
from embedding_proxy.proxy.service.request import CALLER

from . import errors
from .response_cache import Answer

log = logging.getLogger("embedding_proxy.requests")

HEADER = "x-request-id"
CLIENT_HEADERS = ("X-Request-Id", "X-Client-Request-Id")
"""Where a client may name its request; the first that holds a well-formed id counts."""
_WELL_FORMED = re.compile(r"[A-Za-z0-9._:/+=@-]{1,128}")
MAX_LINES_S = 1000
"""Lines of requests that are written in a second, at most: each takes some 20 us."""
_HEADER = re.compile(r"(x-[a-z-]+): *([^\r\n]*)")
_MODEL = re.compile(rb'"model":("(?:[^"\\]|\\.)*")')
_TAIL = 4096
"""Bytes at the end of a response's body that hold the name of the model."""
_MAX_SHOWN = 200
"""Characters of a path or a model that a line repeats."""

REQUEST_ID = web.RequestKey("request_id", str)
MODEL = web.RequestKey("model", str)
"""The model that a request asks for, as soon as it is known."""
USD = web.RequestKey("usd", float)
"""What it was billed, in US dollars."""
BEGIN = web.RequestKey("begin", float)
"""When its answer began, on the clock of `perf_counter`, where that was before its handler."""
STARTED = web.RequestKey("started", bool)
"""Set when a reply has begun."""


def identify(request: web.Request) -> None:
    """Give a request its id: the client's own if that is well-formed, a new one otherwise."""
    chosen = (value for name in CLIENT_HEADERS for value in request.headers.getall(name, ()))
    own = next((value for value in chosen if _WELL_FORMED.fullmatch(value)), None)
    request[REQUEST_ID] = own = own or request.get(REQUEST_ID) or errors.new_request_id()
    request_context.request_id.set(own)
    parent = request.headers.get(request_context.TRACEPARENT, "")
    request_context.traceparent.set(request_context.parse_traceparent(parent))


def has_own_id(request: web.BaseRequest) -> bool:
    """Tell whether a request may bring an id of its own, which its reply repeats."""
    return any(name in request.headers for name in CLIENT_HEADERS)


async def add_request_id(request: web.Request, response: web.StreamResponse) -> None:
    """Give every response its request's id, streamed ones too; an upstream's own is kept."""
    own = request.get(REQUEST_ID) or errors.new_request_id()
    response.headers.setdefault(HEADER, own)
    request[STARTED] = True


class RequestLog:
    """Writes a line for each request that is answered without an error.

    They are MAX_LINES_S a second at most; the next line tells how many were left out.
    """

    def __init__(self, *, is_enabled: bool = True) -> None:
        """Write nothing unless `is_enabled`."""
        self._is_enabled = is_enabled
        self._is_on = False
        """Whether lines are written in this second: the level of the log may change."""
        self._end = 0.0
        """Of this second."""
        self._lines = 0
        self._left_out = 0

    def has_room(self, now: float) -> bool:
        """Tell whether the line of a request is to be written; if there is no room, count it.

        `now` is on any clock that gives seconds, always the same.
        """
        if now >= self._end:
            self._end, self._lines = now + 1, 0
            self._is_on = self._is_enabled and log.isEnabledFor(logging.INFO)
        if not self._is_on:
            return False
        if self._lines >= MAX_LINES_S:
            self._left_out += 1
            return False
        self._lines += 1
        return True

    def write(self, request: web.Request, response: web.StreamResponse, seconds: float) -> None:
        """Write the line of a request whose reply is ready."""
        if not self.has_room(time.perf_counter()):
            return
        fields: dict[str, object] = {
            "request_id": request[REQUEST_ID],
            "client": request[CALLER].client if CALLER in request else "",
            "model": request.get(MODEL, ""),
        }
        headers = response.headers
        if "x-cache" not in headers:
            fields = {"method": request.method, "path": request.path[:_MAX_SHOWN], **fields}
        self._write(fields, headers, response.status, seconds, request.get(USD, 0.0))

    def write_hit(self, head: bytes, body: bytes, own: str, client: str, seconds: float) -> None:
        """Write the line of a request that was answered without a handler, if `has_room` says so.

        `head` and `body` are those of the response.
        """
        headers = dict(_HEADER.findall(head.decode("latin-1").lower()))
        model = _MODEL.search(body, max(0, len(body) - _TAIL))
        fields: dict[str, object] = {
            "request_id": own,
            "client": client,
            "model": "" if model is None else str(orjson.loads(model[1])),
        }
        self._write(fields, headers, 200, seconds, 0.0)

    def write_answer(self, own: str, client: str, answer: Answer, seconds: float) -> None:
        """Write the line of a request that was answered without aiohttp."""
        if self.has_room(time.perf_counter()):
            fields: dict[str, object] = {
                "request_id": own,
                "client": client,
                "model": answer.model,
            }
            self._write(fields, answer.headers, 200, seconds, answer.usd)

    def _write(
        self,
        fields: dict[str, object],
        headers: Mapping[str, str],
        status: int,
        seconds: float,
        usd: float,
    ) -> None:
        short = f"{status}  {fields.get('method')} {fields.get('path')}"
        if "x-cache" in headers:
            hits, joined, misses, billed, saved = (
                int(headers.get(name, 0))
                for name in (
                    "x-cache-hits",
                    "x-cache-joined",
                    "x-cache-misses",
                    "x-tokens-billed",
                    "x-tokens-saved",
                )
            )
            provider = headers.get("x-embedding-provider", "")
            fields |= {
                "inputs": hits + joined + misses,
                "hits": hits,
                "misses": misses,
                "coalesced": joined,
                "tokens_billed": billed,
                "tokens_saved": saved,
                "usd": usd,
                "provider": provider,
            }
            short = f"{headers['x-cache']} {hits}/{hits + joined + misses}"
            short += f"  billed {billed} tok at {provider}" if provider else ""
            short += f"  saved {saved} tok" if saved else ""
        milliseconds = round(1000 * seconds, 2)
        fields |= {"status": status, "ms": milliseconds}
        short += f"  {milliseconds:g} ms"
        left_out, self._left_out = self._left_out, 0
        log.info("request", extra={"fields": fields, "short": short, "left_out": left_out})


def log_request(request: web.Request, response: web.StreamResponse) -> None:
    """Log a request that is answered with an error; as a warning if that is not the client's.

    A passed-through reply keeps the upstream's id, which is told beside the request's own.
    """
    if response.status < 400:
        return
    value = response.headers.get(HEADER, "")
    code = _code(response)
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
        code,
        extra={
            "data": {
                "method": request.method,
                "path": request.path[:_MAX_SHOWN],
                "model": request.get(MODEL, "")[:_MAX_SHOWN],
                "client": request[CALLER].client if CALLER in request else "",
                "status": response.status,
                "code": code,
            }
        },
    )


def _code(response: web.StreamResponse) -> str:
    """Return the code of an error of the proxy's own; `none` if it has none, or is not JSON."""
    if isinstance(response, web.Response) and isinstance(response.body, bytes):
        try:
            return str(orjson.loads(response.body)["error"]["code"] or "none")[:_MAX_SHOWN]
        except (orjson.JSONDecodeError, KeyError, TypeError):
            return "none"
    return "none"
