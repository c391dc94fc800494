"""What a client is told of each error, and whether it should ask again."""

import json

import pytest
from embedding_proxy.providers import errors
from embedding_proxy.providers.errors import (
    EmbeddingError,
    InvalidRequest,
    NoProviderAvailable,
    OutOfDescriptors,
    ProviderError,
    QuotaExceeded,
    RateLimited,
    Refusal,
    UpstreamTimeout,
)
from embedding_proxy.proxy.http.errors import INTERNAL, RETRY_SECONDS, Failure, error_body, failure


def _leaves(cls: type) -> list[type]:
    """Return the classes of the error tree without subclasses there."""
    below = [child for child in cls.__subclasses__() if child.__module__ == errors.__name__]
    return [leaf for child in below for leaf in _leaves(child)] if below else [cls]


RAISED = [*_leaves(EmbeddingError), RateLimited, QuotaExceeded, UpstreamTimeout]


def _made(cls: type, refusal: Refusal | None = None) -> EmbeddingError:
    if issubclass(cls, ProviderError):
        return cls("acme", "said no", refusal)
    if cls is OutOfDescriptors:
        return cls()
    return cls("said no", 2.5) if cls is NoProviderAvailable else cls("said no")


# Error, what the upstream said, then status, type, code, and the seconds to wait (None: never).
TABLE = [
    ("InvalidRequest", None, 400, "invalid_request_error", None, None),
    ("ClientKeyRefused", None, 401, "invalid_request_error", "invalid_api_key", None),
    ("NoRoute", None, 403, "server_error", "provider_not_configured", None),
    ("DeadlineExceeded", None, 504, "server_error", "timeout", RETRY_SECONDS),
    ("NoProviderAvailable", None, 503, "server_error", "upstream_unavailable", 2.5),
    ("AuthenticationError", None, 403, "server_error", "upstream_auth", None),
    ("AuthenticationError", Refusal(401, "m", "t", "invalid_api_key"), 403, "server_error",
     "upstream_auth", None),
    ("OutOfDescriptors", None, 503, "server_error", "proxy_overloaded", RETRY_SECONDS),
    ("PermissionDenied", None, 403, "invalid_request_error", "upstream_permission_denied", None),
    ("PermissionDenied", Refusal(403, "m", "t", "c"), 403, "t", "c", None),
    ("ScopedQuotaExceeded", None, 429, "insufficient_quota", "insufficient_quota", None),
    ("ScopedQuotaExceeded", Refusal(402, "m"), 402, "insufficient_quota", "insufficient_quota",
     None),
    ("ConnectionTimeout", None, 504, "server_error", "upstream_timeout", RETRY_SECONDS),
    ("QuotaExceeded", None, 429, "insufficient_quota", "insufficient_quota", None),
    ("QuotaExceeded", Refusal(402, "m"), 402, "insufficient_quota", "insufficient_quota", None),
    ("QuotaExceeded", Refusal(429, "m", "insufficient_quota", "x", 9), 429, "insufficient_quota",
     "x", None),
    ("ModelNotFound", None, 404, "invalid_request_error", "model_not_found", None),
    ("ModelNotFound", Refusal(404, "m", "t", "c"), 404, "t", "c", None),
    ("LoopDetected", None, 508, "server_error", "loop_detected", None),
    ("RateLimited", None, 429, "requests", "rate_limit_exceeded", RETRY_SECONDS),
    ("RateLimited", Refusal(429, "m", "tokens", None, 20.5), 429, "tokens", "rate_limit_exceeded",
     20.5),
    ("RateLimited", Refusal(429, "m", retry_after=0.0), 429, "requests", "rate_limit_exceeded", 0),
    ("LocalQueueFull", None, 429, "requests", "rate_limit_exceeded", RETRY_SECONDS),
    ("LocalQueueFull", Refusal(429, "m", "requests", "rate_limit_exceeded", 9.5), 429, "requests",
     "rate_limit_exceeded", 9.5),
    ("UpstreamError", None, 502, "server_error", "upstream_error", None),
    ("UpstreamError", Refusal(500, "m", "t", "c", 3), 502, "server_error", "upstream_error", 3),
    ("UpstreamError", Refusal(503, "m"), 503, "server_error", "upstream_error", RETRY_SECONDS),
    ("UpstreamError", Refusal(504, "m"), 504, "server_error", "upstream_error", RETRY_SECONDS),
    ("UpstreamError", Refusal(418, "m"), 502, "server_error", "upstream_error", None),
    ("UpstreamTimeout", None, 504, "server_error", "upstream_timeout", RETRY_SECONDS),
    ("Unreachable", None, 502, "server_error", "upstream_unreachable", RETRY_SECONDS),
    ("MalformedResponse", None, 502, "server_error", "upstream_invalid_answer", RETRY_SECONDS),
    ("InvalidAnswer", None, 502, "server_error", "upstream_invalid_answer", RETRY_SECONDS),
]  # fmt: skip


@pytest.mark.parametrize(("name", "said", "status", "kind", "code", "wait"), TABLE)
def test_each_error_has_its_status_and_codes(*, name, said, status, kind, code, wait):
    """Each error becomes its status, type and code, and says when another try makes sense."""
    error = _made(getattr(errors, name), said)
    assert failure(error) == Failure(status, str(error), kind, None, code, wait)


def test_every_class_of_the_tree_stands_in_the_table():
    """No error that rooms below may raise is left to the 500 for what nobody foresaw."""
    assert {cls.__name__ for cls in RAISED} == {row[0] for row in TABLE}
    assert all(failure(_made(cls)) != INTERNAL for cls in RAISED)


def test_a_new_error_without_a_row_is_told_as_our_own_fault():
    """An error that no row fits is a 500 that repeats nothing of it."""
    assert failure(EmbeddingError("secret")) == INTERNAL
    assert INTERNAL.status == 500
    assert INTERNAL.retry_after is None


def test_a_refusal_keeps_what_was_said_of_the_input():
    """A refused input keeps its status, type, field and code, whoever refused it."""
    error = InvalidRequest("too long", status=413, kind="k", param="input", code="c")
    assert failure(error) == Failure(413, "too long", "k", "input", "c", None)


@pytest.mark.parametrize("leaf", RAISED)
def test_the_body_always_has_the_four_keys(leaf):
    """Message, type, param and code are there for every error, null where there is nothing."""
    response = failure(_made(leaf)).response()
    assert response.content_type == "application/json"
    content = json.loads(response.body)
    assert content.keys() == {"error"}
    assert content["error"].keys() == {"message", "type", "param", "code"}
    assert content["error"]["message"] == str(_made(leaf))


def test_a_body_of_only_a_message_has_nulls():
    """What is not known of an error is null, not left out."""
    assert json.loads(error_body("m", "t")) == {
        "error": {"message": "m", "type": "t", "param": None, "code": None}
    }


@pytest.mark.parametrize(
    ("wait", "headers"),
    [
        (None, {"x-should-retry": "false"}),
        (0, {"Retry-After": "0", "retry-after-ms": "0"}),
        (0.25, {"Retry-After": "1", "retry-after-ms": "250"}),
        (1, {"Retry-After": "1", "retry-after-ms": "1000"}),
        (20.0, {"Retry-After": "20", "retry-after-ms": "20000"}),
        (20.01, {"Retry-After": "21", "retry-after-ms": "20010"}),
    ],
)
def test_headers_tell_clients_whether_and_when_to_ask_again(wait, headers):
    """A terminal error says not to retry, a passing one when: whole seconds, rounded up, and ms."""
    response = Failure(503, "m", "t", retry_after=wait).response()
    names = ("x-should-retry", "Retry-After", "retry-after-ms")
    assert {name: response.headers[name] for name in names if name in response.headers} == headers
    assert response.status == 503
