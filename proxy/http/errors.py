"""One table: what went wrong -> status, OpenAI error body, and what the client should do next.

Every error a client sees is made here, whoever's fault it was.
"""

import math
import random
from dataclasses import dataclass

import orjson
from aiohttp import web
from aiohttp.helpers import rfc822_formatted_time
from embedding_proxy.providers.errors import (
    AuthenticationError,
    ClientKeyRefused,
    DeadlineExceeded,
    EmbeddingError,
    InvalidAnswer,
    InvalidRequest,
    LoopDetected,
    MalformedResponse,
    ModelNotFound,
    NoProviderAvailable,
    NoRoute,
    OutOfDescriptors,
    PermissionDenied,
    ProviderError,
    QuotaExceeded,
    RateLimited,
    Unreachable,
    UpstreamError,
    UpstreamTimeout,
)
from embedding_proxy.providers.routing.policy import is_transient
from embedding_proxy.providers.upstream.retry_after import client_wait

RETRY_SECONDS = 1
"""What `Retry-After` says of a passing failure when the upstream said nothing."""


@dataclass(frozen=True, slots=True)
class Failure:
    """An error as the client will see it."""

    status: int
    message: str
    kind: str
    param: str | None = None
    code: str | None = None
    retry_after: float | None = None
    """Seconds until another try makes sense; None when it never will."""

    def response(self) -> web.Response:
        """Return the HTTP response; its headers tell OpenAI's clients whether to try again."""
        headers = {}
        if self.retry_after is None:
            headers["x-should-retry"] = "false"
        else:
            # Whole seconds (RFC 9110), rounded up; the exact wait where clients know the header.
            wait = client_wait(self.retry_after)
            headers["Retry-After"] = str(math.ceil(wait))
            headers["retry-after-ms"] = str(round(wait * 1000))
        return web.Response(
            status=self.status,
            body=error_body(self.message, self.kind, self.param, self.code),
            content_type="application/json",
            headers=headers,
        )

    def last_bytes(self, request_id: str) -> bytes:
        """Return a whole HTTP/1.1 response, for a connection that is closed behind it."""
        response = self.response()
        content = response.body if isinstance(response.body, bytes) else b""
        lines = [f"HTTP/1.1 {response.status} {response.reason}"]
        lines += [f"{name}: {value}" for name, value in response.headers.items()]
        lines += [f"Content-Length: {len(content)}", f"x-request-id: {request_id}"]
        lines += [f"Date: {rfc822_formatted_time()}", "Connection: close"]
        return "\r\n".join(lines).encode() + b"\r\n\r\n" + content


def new_request_id() -> str:
    """Return an id for a request, as the reply and the log will name it."""
    return f"req_{random.getrandbits(128):032x}"


def error_body(message: str, kind: str, param: str | None = None, code: str | None = None) -> bytes:
    """Return an error in OpenAI's shape: four keys, always."""
    error = {"message": message, "type": kind, "param": param, "code": code}
    return orjson.dumps({"error": error})


# (status, type, code, whether another try may help) of each error that is not the client's own.
# The first class that fits counts.
_TABLE: tuple[tuple[type[EmbeddingError], int, str, str, bool], ...] = (
    (NoRoute, 403, "server_error", "provider_not_configured", False),
    (DeadlineExceeded, 504, "server_error", "timeout", True),
    (OutOfDescriptors, 503, "server_error", "proxy_overloaded", True),
    (NoProviderAvailable, 503, "server_error", "upstream_unavailable", True),
    (AuthenticationError, 403, "server_error", "upstream_auth", False),
    (PermissionDenied, 403, "invalid_request_error", "upstream_permission_denied", False),
    (QuotaExceeded, 429, "insufficient_quota", "insufficient_quota", False),
    (ModelNotFound, 404, "invalid_request_error", "model_not_found", False),
    (LoopDetected, 508, "server_error", "loop_detected", False),
    (RateLimited, 429, "requests", "rate_limit_exceeded", True),
    (UpstreamTimeout, 504, "server_error", "upstream_timeout", True),
    (MalformedResponse, 502, "server_error", "upstream_invalid_answer", True),
    (InvalidAnswer, 502, "server_error", "upstream_invalid_answer", True),
    (Unreachable, 502, "server_error", "upstream_unreachable", True),
    (UpstreamError, 502, "server_error", "upstream_error", True),
)


def failure(error: EmbeddingError) -> Failure:
    """Return what a client is told of an error."""
    if isinstance(error, InvalidRequest):
        return Failure(error.status, str(error), error.kind, error.param, error.code)
    if isinstance(error, ClientKeyRefused):
        return Failure(error.status, str(error), error.kind, None, error.code)
    row = next((row for row in _TABLE if isinstance(error, row[0])), None)
    if row is None:
        return INTERNAL
    _, status, type_, code, again = row
    refusal = error.refusal if isinstance(error, ProviderError) else None
    if refusal is not None and isinstance(
        error, QuotaExceeded | RateLimited | ModelNotFound | PermissionDenied
    ):
        # These are for the client to act on: it gets the upstream's own words and codes.
        status, type_, code = refusal.status, refusal.kind or type_, refusal.code or code
    elif refusal is not None and isinstance(error, UpstreamError) and refusal.status in (503, 504):
        status = refusal.status
    if isinstance(error, UpstreamError) and not is_transient(error):
        again = False
    wait = None
    if again:
        retry_after = (
            error.retry_after if isinstance(error, NoProviderAvailable | ProviderError) else None
        )
        wait = RETRY_SECONDS if retry_after is None else retry_after
    return Failure(status, str(error), type_, error.param, code, wait)


INTERNAL = Failure(
    500, "The proxy failed to handle this request; its log says why.", "server_error"
)
