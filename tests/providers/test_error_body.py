"""What an upstream's error says, in every shape that upstreams send, and what it is about."""

import json

import pytest
from embedding_proxy.providers.errors import (
    AuthenticationError,
    EmbeddingError,
    InvalidRequest,
    ModelNotFound,
    PermissionDenied,
    ProviderError,
    QuotaExceeded,
    RateLimited,
    ScopedQuotaExceeded,
    UpstreamError,
)
from embedding_proxy.providers.upstream.error_reply import (
    MAX_REASON,
    is_error,
    parse_reason,
    refusal,
)
from embedding_proxy.providers.upstream.retry_after import MAX_TOLD_WAIT
from hypothesis import given, settings
from hypothesis import strategies as st

GOOGLE_KEY = {
    "error": {
        "code": 400,
        "message": "API key not valid. Please pass a valid API key.",
        "status": "INVALID_ARGUMENT",
        "details": [
            {"@type": "type.googleapis.com/google.rpc.ErrorInfo", "reason": "API_KEY_INVALID"}
        ],
    }
}


def body_of(value: object) -> bytes:
    """Return a body: bytes as they are, else JSON."""
    return value if isinstance(value, bytes) else json.dumps(value).encode()


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ({"error": {"message": "no such field", "type": "t"}}, "no such field"),
        ({"error": "model is loading"}, "model is loading"),
        ({"error": ["one", "two"]}, "one; two"),
        ({"detail": "Not Found"}, "Not Found"),
        (
            {"detail": [{"loc": ["body", "input", 3], "msg": "field required", "type": "missing"}]},
            "body.input.3: field required",
        ),
        (
            {"detail": [{"loc": ["body", "a"], "msg": "one"}, {"loc": ["body"], "msg": "two"}]},
            "body.a: one; body: two",
        ),
        ({"detail": {"message": "too long", "code": "x"}}, "too long"),
        ({"message": "invalid api token"}, "invalid api token"),
        ({"object": "error", "message": "out of memory", "code": 500}, "out of memory"),
        ({"object": "error", "message": {"detail": [{"loc": ["n"], "msg": "no"}]}}, "n: no"),
        ({"object": "error", "message": '{"detail": [{"loc": ["n"], "msg": "no"}]}'}, "n: no"),
        ([{"error": {"code": 400, "message": "from a list"}}], "from a list"),
        (GOOGLE_KEY, "API key not valid. Please pass a valid API key."),
        ({"errors": ["one", "two"]}, "one; two"),
        ({"errors": [{"message": "one"}, {"detail": "two"}]}, "one; two"),
        ({"errors": [{"title": "Bad", "status": "400"}]}, "Bad"),
        ({"title": "Forbidden", "status": 403, "detail": "by policy"}, "by policy"),
        ({"timestamp": 1, "status": 404, "error": "Not Found", "path": "/"}, "Not Found"),
        ({"statusCode": 401, "message": "invalid subscription key"}, "invalid subscription key"),
        ({"error_msg": "quota", "error_code": 17}, "quota"),
        (
            {"error": {"message": "Provider returned error", "metadata": {"raw": "too long"}}},
            "Provider returned error: too long",
        ),
        (
            {"error": {"message": "failed", "metadata": {"raw": '{"error": {"message": "m"}}'}}},
            "failed: m",
        ),
        (b"upstream connect error", "upstream connect error"),
        (b"\xef\xbb\xbfa text with a mark", "a text with a mark"),
        (b'\xef\xbb\xbf{"error": "marked"}', "marked"),
        ('{"error": "wide"}'.encode("utf-16"), "wide"),
        (b"<html><head><title>502 Bad Gateway</title></head>", "502 Bad Gateway"),
        (b"<!DOCTYPE html>\n<html><body><h1>Sorry</h1>", "Sorry"),
        (b"  <HTML><TITLE lang=en>\n Sign\n in </TITLE>", "Sign in"),
        ({"error": {"message": "a\x00b\x1b[31m\n\tc\u202e\u200b  d"}}, "ab[31m c d"),
        ({"error": {"message": ""}, "detail": "said elsewhere"}, "said elsewhere"),
        (b"", None),
        (b"<html>", None),
        (b"<html><title></title>", None),
        (b"\x1f\x8b\x08\x00\xff\xfe\xfd", None),
        (b'{"object": "list", "da', None),
        (b"x" * 5000, None),
        (b'"Invalid token"', "Invalid token"),
        ({"detail": {"error": "Not authenticated"}}, "Not authenticated"),
        ({"message": '{"error": "/embeddings: no"}'}, "/embeddings: no"),
        ({}, None),
        ([], None),
        ({"error": 7}, None),
        ({"detail": []}, None),
        ([1, 2], None),
    ],
)
def test_a_reason_is_found_in_every_shape(value, reason):
    """Whoever refuses, and in whatever form: the words for people are read, on one line."""
    assert parse_reason(body_of(value)) == reason


@pytest.mark.parametrize("status", [400, 404, 422, 429, 500, 503])
def test_reason_and_status_are_told(status):
    """A client that is refused is told why; of other failures the status too is part of it."""
    error = refusal("acme", status, {}, body_of({"detail": "it is so"}))
    if isinstance(error, InvalidRequest):
        assert (str(error), error.status) == ("it is so", status)
    else:
        assert str(error) == f"acme: status {status}: it is so"
        assert error.refusal.message == "it is so"
    bare = refusal("acme", status, {}, b"")
    assert str(bare) == f"acme: status {status}"


@pytest.mark.parametrize(
    ("url", "told"),
    [
        ("https://h.example/v1/embeddings", "(asked: POST https://h.example/v1/embeddings)"),
        ("https://h.example/v1beta/openai/embeddings", "/v1beta/openai/embeddings)"),
        ("http://h:9/embeddings", "h:9/embeddings; the base URL has no version path such as /v1)"),
        ("https://user:pass@h.example/embeddings?key=pass", "POST https://h.example/embeddings;"),
        ("https://h/openai/deployments/d/embeddings?api-version=1", "/deployments/d/embeddings)"),
    ],
)
def test_a_page_that_is_not_there_is_named(url, told):
    """The commonest cause of a 404 is a base URL without its version; no secret of it is told."""
    for status in (404, 405):
        message = str(refusal("acme", status, {}, b"", url=url))
        assert told in message
        assert "pass@" not in message
        assert "key=" not in message
    assert "asked" not in str(refusal("acme", 500, {}, b"", url=url))
    hidden = refusal("acme", 404, {}, b"", url=url, redact=lambda text: text.replace("h", "***"))
    assert "***" in str(hidden)
    model = body_of({"error": {"message": "no", "code": "model_not_found"}})
    assert "asked" not in str(refusal("acme", 404, {}, model, url=url))


def coded(code: object = None, message: str = "no", **fields: object) -> dict[str, object]:
    """Return an error in OpenAI's shape."""
    return {"error": {"message": message, "code": code, **fields}}


@pytest.mark.parametrize(
    ("status", "value", "kind", "told"),
    [
        # An account without credit, under statuses that say something else.
        (400, coded("Arrearage"), QuotaExceeded, 402),
        (400, {"code": "Arrearage", "message": "Access denied."}, QuotaExceeded, 402),
        (400, coded(None, type="Arrearage"), QuotaExceeded, 402),
        (400, coded("insufficient_quota"), QuotaExceeded, 402),
        (403, coded("insufficient_quota"), QuotaExceeded, 402),
        (403, coded("insufficient_user_quota"), QuotaExceeded, 402),
        (400, coded("billing_hard_limit_reached"), QuotaExceeded, 402),
        (429, coded(None, type="billing_not_active"), QuotaExceeded, 429),
        (429, coded(None, type="exceeded_current_quota_error"), QuotaExceeded, 429),
        (403, coded("AccountOverdueError"), QuotaExceeded, 402),
        (403, coded("AllocationQuota.FreeTierOnly"), ScopedQuotaExceeded, 402),
        (403, coded(None, status="BILLING_DISABLED"), QuotaExceeded, 402),
        (403, coded(403, details=[{"reason": "BILLING_DISABLED"}]), QuotaExceeded, 402),
        (403, {"code": 30001, "message": "Sorry, your account balance is insufficient"},
         QuotaExceeded, 402),
        (400, {"message": "Access denied, please make sure your account is in good standing."},
         QuotaExceeded, 402),
        (422, coded("insufficient_balance"), QuotaExceeded, 402),
        (400, {"reason": "insufficient balance"}, QuotaExceeded, 402),
        (403, coded(None, "Insufficient Balance"), QuotaExceeded, 402),
        (200, coded("insufficient_quota"), QuotaExceeded, 402),
        (402, coded("anything"), QuotaExceeded, 402),
        (400, coded("400", "Budget has been exceeded! Current cost: 2", type="budget_exceeded"),
         QuotaExceeded, 402),
        (400, coded("400", type="budget_exceeded"), ScopedQuotaExceeded, 402),
        (400, coded("400", "Budget has been exceeded! Tag=x Current cost: 2",
                    type="budget_exceeded"), ScopedQuotaExceeded, 402),
        (402, coded(402, "This request requires more credits, or fewer max_tokens."),
         ScopedQuotaExceeded, 402),
        (402, coded(402, metadata={"provider_name": "Other"}), ScopedQuotaExceeded, 402),
        (402, coded(402, metadata={"provider_name": None}), QuotaExceeded, 402),
        (429, coded(429, "Your prepayment credits are depleted. Please go to AI Studio."),
         QuotaExceeded, 429),
        (429, coded("1113", "余额不足或无可用资源包,请充值。"), QuotaExceeded, 429),
        (403, coded(403, "Key limit exceeded (monthly limit). Manage it."), QuotaExceeded, 402),
        # A key that is not accepted.
        (400, GOOGLE_KEY, AuthenticationError, 401),
        (400, [GOOGLE_KEY], AuthenticationError, 401),
        (400, coded(400, "API key not valid. Please pass a valid API key."),
         AuthenticationError, 401),
        (400, {"code": "Client specified an invalid argument",
               "error": "Incorrect API key provided: ab***yz."}, AuthenticationError, 401),
        (400, coded("invalid_api_key"), AuthenticationError, 401),
        (400, coded("InvalidApiKey"), AuthenticationError, 401),
        (400, coded(None, errors=[{"reason": "keyInvalid"}]), AuthenticationError, 401),
        (403, coded(None, "Access denied"), PermissionDenied, 403),
        (403, b"", PermissionDenied, 403),
        (403, coded(None, type="permission_error"), PermissionDenied, 403),
        (403, coded(403, details=[{"reason": "IAM_PERMISSION_DENIED"}]), PermissionDenied, 403),
        (401, coded(401, metadata={"provider_name": "Other"}), PermissionDenied, 403),
        (401, coded(401, metadata={"provider_name": None}), AuthenticationError, 401),
        (403, coded("unsupported_country_region_territory"), AuthenticationError, 403),
        (403, {"detail": {"error": "Not authenticated"}}, AuthenticationError, 403),
        (401, coded("401", type="key_model_access_denied", param="model"), ModelNotFound, 404),
        (401, coded("401", param="model"), ModelNotFound, 404),
        (401, coded("invalid_api_key", param="model"), AuthenticationError, 401),
        (403, coded(403, "This model is not available in your region."), ModelNotFound, 403),
        # A model, and no other.
        (403, coded("model_not_found"), ModelNotFound, 403),
        (403, coded("Model.AccessDenied"), ModelNotFound, 403),
        (403, coded("access_denied", "Model access denied."), ModelNotFound, 403),
        (400, coded("model_not_found"), ModelNotFound, 404),
        (400, coded("model_not_supported"), ModelNotFound, 404),
        (400, coded(None, type="invalid_model"), ModelNotFound, 404),
        (400, coded(400, "qwen/qwen3-embedding:8b is not a valid model ID"), ModelNotFound, 404),
        (400, {"detail": "Model 'm' is not supported. Supported models are ['a', 'b']."},
         ModelNotFound, 404),
        (400, coded(400, "Invalid model: Engine for model name `m` not found."),
         ModelNotFound, 404),
        (400, coded(None, "Invalid model: m", param="model"), ModelNotFound, 404),
        (400, {"error": "No models loaded. Please load a model."}, ModelNotFound, 404),
        (403, coded(None, "You are not allowed to generate embeddings from this model"),
         ModelNotFound, 403),
        (400, {"detail": "[RID: 06b5f7bdde6ea380] Invalid API key"}, AuthenticationError, 401),
        # A rate limit.
        (403, coded(None, errors=[{"reason": "rateLimitExceeded"}]), RateLimited, 429),
        (400, coded("Throttling.RateQuota"), RateLimited, 429),
        (429, coded("RESOURCE_EXHAUSTED", "You exceeded your current quota, please check your "
                    "plan and billing details."), RateLimited, 429),
        # An input that a provider does not want.
        (403, coded("content_policy_violation"), InvalidRequest, 403),
        (403, coded("content_filter"), InvalidRequest, 403),
        (403, coded(None, type="moderation_blocked"), InvalidRequest, 403),
        (403, coded(403, metadata={"reasons": ["violence"], "flagged_input": "a text"}),
         InvalidRequest, 403),
        (200, coded(403, metadata={"flagged_input": "a text"}), InvalidRequest, 403),
        (
            403,
            coded(None, innererror={"code": "ResponsibleAIPolicyViolation"}),
            InvalidRequest,
            403,
        ),
        (400, coded("DataInspectionFailed"), InvalidRequest, 400),
    ],
)  # fmt: skip
def test_what_an_error_is_about_is_read_from_its_codes(status, value, kind, told):
    """A code says more than a status; the client is told a status that it reads rightly."""
    error = refusal("acme", status, {}, body_of(value))
    assert type(error) is kind
    assert (error if kind is InvalidRequest else error.refusal).status == told
    if kind is not InvalidRequest and status >= 400:
        assert str(error).startswith(f"acme: status {status}")


@pytest.mark.parametrize(
    "value",
    [
        coded(None, "Invalid input: 'insufficient_quota, billing, API key not valid'"),
        coded("invalid_input", "The text 'Access denied, please make sure your account is in good "
              "standing.' is too long"),
        coded(None, "input 3 is too long: API_KEY_INVALID Arrearage model_not_found"),
        coded("invalid_request_error", "model_not_found", param="billing"),
        coded("context_length_exceeded"),
        coded("model_dimensions_not_supported"),
        coded("invalid_model_input"),
        {"detail": [{"loc": ["body", "billing"], "msg": "insufficient_quota", "type": "value",
                     "input": "invalid_api_key"}]},
        {"message": "your input speaks of an insufficient balance"},
        coded(None, "Invalid model: Engine for model name `m` not found.", param="input"),
        coded(None, "No models loaded.", param="$.input[3]"),
        coded(None, "'m is not a valid model ID' is too long"),
        coded(None, "a text m is not a valid model ID"),
        coded(None, 'The text "No models loaded. Please load a model" is too long'),
        coded(None, "Invalid model input"),
        coded(None, "Model inputs are not supported. Supported models are below"),
        coded(None, "This model does not support specifying dimensions."),
        coded(None, "Budget has been exceeded by a word in the input"),
        {"detail": [{"loc": ["body", "input", 0], "msg": "Invalid model: m", "type": "value"}]},
        {"detail": "Invalid input: User location is not supported for the API use."},
        {"message": "Insufficient balance of quotation marks in the input"},
        {"code": "bad_input", "reason": "text 'billing' is too long"},
        {"code": "bad_input", "reason": "the text about billing is too long"},
        {"code": "the input overdue payment is too long"},
        b"insufficient_quota",
        coded("insufficient_quota " * 20),
        GOOGLE_KEY["error"] | {"details": [], "message": "Invalid value: API_KEY_INVALID"},
    ],
)  # fmt: skip
def test_an_honest_400_is_about_the_input_whatever_it_quotes(value):
    """Free text may quote the user: no word in it takes a provider out of service."""
    assert type(refusal("acme", 400, {}, body_of(value))) is InvalidRequest


@pytest.mark.parametrize(
    "message",
    [
        "You have not yet added your payment method in the billing page and will have less.",
        "You exceeded your current quota, please check your plan and billing details.",
        "Resource has been exhausted (e.g. check quota).",
        "Your text says: Your prepayment credits are depleted.",
    ],
)
def test_a_rate_limit_that_mentions_billing_is_a_rate_limit(message):
    """Voyage and Gemini speak of billing in rate limits that pass."""
    for value in ({"detail": message}, coded(429, message, status="RESOURCE_EXHAUSTED")):
        assert type(refusal("acme", 429, {}, body_of(value))) is RateLimited


def retry_info(delay: object) -> list[object]:
    """Return Google's error with a RetryInfo."""
    kind = "type.googleapis.com/google.rpc."
    details = [{"@type": f"{kind}QuotaFailure"}, {"@type": f"{kind}RetryInfo", "retryDelay": delay}]
    return [coded(429, "slow", details=details)]


@pytest.mark.parametrize(
    ("delay", "wait"),
    [
        ("37s", 37.0),
        ("37.404580985s", pytest.approx(37.404580985)),
        ("0s", 0.0),
        ("9999999s", MAX_TOLD_WAIT),
        ("-5s", None),
        ("1e9s", None),
        ("soon", None),
        ("9" * 100_000 + "s", None),
        (37, None),
        ({"seconds": 37}, None),
        (None, None),
    ],
)
def test_googles_retry_delay_is_read(delay, wait):
    """Google sends no Retry-After; RetryInfo in the body says how long to wait, within bounds."""
    for status in (429, 503):
        value = json.loads(json.dumps(retry_info(delay)).replace("429", str(status)))
        assert refusal("acme", status, {}, body_of(value)).retry_after == wait
    both = refusal("acme", 429, {"Retry-After": "2"}, body_of(retry_info(delay)))
    assert both.retry_after == 2


def test_a_missing_name_as_a_string_is_none():
    """LiteLLM writes Python's None as a string; clients do not get it."""
    value = coded("None", type="None", param="None")
    error = refusal("acme", 400, {}, body_of(value))
    assert (error.kind, error.code, error.param) == ("invalid_request_error", None, None)


@pytest.mark.parametrize(
    "body",
    [
        b"<html>" + b"<h1" * 350_000,
        b"<html>" + b"<title>" * 150_000,
        b" " * 1_000_000 + b"<html",
        b'{"message": "' + b"<h1 " * 250_000 + b'"}',
        b"-" * 1_000_000 + b"NaN",
        b"-NaN" * 250_000,
        b"[" * 1_000_000,
        b'{"error":' * 110_000,
        b'{"message": "' + b"a " * 500_000 + b'"}',
        b'{"message": "' + b"\\u0000" * 160_000 + b'"}',
        b'{"message": "' + b"model " * 160_000 + b"is not a valid model ID" + b'"}',
        b'{"message": "' + b"[RID: a] " * 110_000 + b'"}',
        b'{"code": "' + b"model" * 200_000 + b'"}',
        b'{"code": "' + b"4" * 1_000_000 + b'"}',
        b'{"errors": [' + b'{"reason": ["a", "b"]},' * 40_000 + b"0]}",
        b'{"details": [' + b'{"retryDelay": 1},' * 55_000 + b"0]}",
    ],
    ids=lambda body: repr(body[:24]),
)
def test_a_megabyte_of_anything_is_read_in_linear_time(body):
    """No hostile body keeps the reader busy: a quadratic step would take hours here."""
    for status in (200, 400, 404, 429):
        error = refusal("acme", status, {}, body, url="http://h/embeddings")
        assert len(str(error)) <= MAX_REASON + 150


def test_the_users_text_in_a_moderation_error_is_not_repeated():
    """OpenRouter sends the flagged input along; neither log nor reply get it."""
    value = coded(403, "flagged", metadata={"reasons": ["x"], "flagged_input": "my secret text"})
    assert str(refusal("acme", 403, {}, body_of(value))) == "flagged"


@pytest.mark.parametrize(
    ("reply", "found"),
    [
        ({"error": "x"}, True),
        ({"error": {"message": "x"}, "data": []}, True),
        ({"object": "error", "message": "x"}, True),
        ({"object": "error", "data": []}, True),
        ({"detail": "x"}, True),
        ({"message": "x", "data": None}, True),
        ({"errors": ["x"]}, True),
        ([{"error": {"message": "x"}}], True),
        ({"error": None, "data": []}, False),
        ({"message": "x", "data": []}, False),
        ({"data": None}, False),
        ({}, False),
        ([], False),
        ([{"embedding": []}], False),
        ("error", False),
        (None, False),
    ],
)
def test_an_error_under_a_status_of_success_is_told_apart(reply, found):
    """What holds no list of embeddings but a reason is an error; a remark beside them is none."""
    assert is_error(reply) is found


def test_a_reply_that_is_an_error_counts_as_what_it_says():
    """The error object of vLLM under status 200, with its code, is that refusal."""
    body = body_of({"object": "error", "message": "too long", "code": 400, "type": "BadRequest"})
    error = refusal("acme", 200, {}, body)
    assert (type(error), error.status, str(error), error.kind) == (
        InvalidRequest,
        400,
        "too long",
        "BadRequest",
    )
    error = refusal("acme", 200, {}, body_of({"object": "error", "message": "broken"}))
    assert (type(error), str(error)) == (UpstreamError, "acme: status 200: broken")


@pytest.mark.parametrize("field", ["message", "code", "type", "param"])
def test_every_text_is_bounded_clean_and_without_keys(field):
    """A megabyte in any field comes out as one short line, its keys taken out before it is cut."""
    text = "x" * 490 + " sk-secret-key \x00\n" + "y" * 1_000_000
    body = body_of({"error": {"message": "m", field: text}})
    for status in (400, 500):
        error = refusal(
            "acme", status, {}, body, redact=lambda said: said.replace("sk-secret-key", "***")
        )
        said = error if isinstance(error, InvalidRequest) else error.refusal
        for told in (str(error), said.code, said.kind, str(getattr(said, "param", ""))):
            assert told is None or len(told) <= MAX_REASON + 30
            assert told is None or not {"sk-secr", "\x00", "\n"} & {told, *told}
            assert "sk-" not in (told or "")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-600, 600) | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                ["error", "code", "type", "status", "message", "detail", "details", "errors",
                 "loc", "msg", "metadata", "raw", "reason", "param", "object", "innererror"]
            ),
            inner,
            max_size=5,
        )
    ),
    max_leaves=15,
)  # fmt: skip


@given(JSON, st.sampled_from([200, 201, 400, 401, 403, 404, 413, 422, 429, 500]))
@settings(deadline=None)
def test_whatever_comes_is_an_error_of_our_tree(value, status):
    """No shape makes the reader fail, and no text in what it reads is long or of several lines."""
    error = refusal("acme", status, {}, body_of(value), url="http://h/embeddings")
    assert isinstance(error, EmbeddingError)
    assert isinstance(error, InvalidRequest | ProviderError)
    assert str(error).isprintable()


@given(st.binary(max_size=200), st.sampled_from([200, 400, 403, 500]))
@settings(deadline=None)
def test_whatever_bytes_come_are_an_error_of_our_tree(body, status):
    """Nor do bytes that are no JSON, nor a text, nor anything."""
    error = refusal("acme", status, {}, body)
    assert isinstance(error, InvalidRequest | ProviderError)
    assert str(error).isprintable()
