"""Reads an upstream's error reply: its reason, its codes, and what kind of failure it is.

Upstreams share no shape. This module reads OpenAI's `error` object, FastAPI's `detail`, a top-level
`message`, `error` as a string, `{"object": "error"}` (vLLM, Mistral), Google's list of one error,
`errors`, a JSON string, plain text, and the title of an HTML page.

The status alone does not tell the kind of failure. Some upstreams answer 400 for a bad key, an
unpaid bill or an unknown model, 401 for a model, and 403 for an input or a model. The fields for
codes decide first (`error_words`). Where a provider sends no code, the sentence that it is known to
begin its message with decides (`SENTENCES`). The rest of a message decides nothing: it may quote
the user's input. A 403 that says nothing known is a PermissionDenied, never a refused key: one
client may cause it by the model or the input that it sends.

Pure: bytes in, an error of `providers.errors` out. Each text in it is one line, bounded, and
without keys.
"""

import codecs
import contextlib
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from urllib.parse import urlsplit

import orjson
from embedding_proxy.providers.errors import (
    AuthenticationError,
    EmbeddingError,
    InvalidRequest,
    ModelNotFound,
    PermissionDenied,
    ProviderError,
    QuotaExceeded,
    RateLimited,
    Refusal,
    ScopedQuotaExceeded,
    UpstreamError,
)

from .error_words import (
    BUDGET_WORDS,
    CODE_WORDS,
    MODERATION_WORDS,
    SCOPED_QUOTA_WORDS,
    SENTENCES_OF,
)
from .retry_after import reset_after, retry_after, seconds_until

MAX_REASON = 500
"""Characters of a reason that clients and the log get."""
_MAX_CODE = 100
"""Characters of a code, a type or the name of a parameter."""
_MAX_READ = 4096
"""Characters of a text that are read. Keys are removed before it is cut to its final length."""
_MAX_PARTS = 5
"""Entries of a list of errors that are joined."""
_MAX_DEPTH = 8

Redact = Callable[[str], str]
"""Removes keys from a text that goes to clients and into the log."""

_NOT_FINITE = re.compile(rb"-?\b(?:NaN|Infinity)\b")
"""Python's json module writes these. They are not JSON; the rest of the body still is."""
_BOMS = (
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)
_MARKS = tuple(mark for mark, _ in _BOMS)
_HTML = re.compile(r"\s*<(?:!doctype|html|head|body|\?xml)\b", re.IGNORECASE)
_TITLE = re.compile(r"<(title|h1)\b[^>]{0,200}>([^<]*)<", re.IGNORECASE)
_MAX_TEXT = 300
"""Characters of a plain text body; a longer one is not an error message."""

_REASONS = (
    "message",
    "detail",
    "details",
    "msg",
    "error_message",
    "error_msg",
    "error_description",
    "description",
    "title",
    "reason",
    "error",
    "errors",
)
"""Fields that hold a reason, in the order in which they are tried."""
_CODES = ("code", "type", "status", "reason", "error_code", "error_type", "errorCode")
"""Fields that hold a code."""
_CODE = re.compile(r"[\w.:/#-]+(?: [\w.:/#-]+){0,2}")
"""A code has one to three words. A longer text, or one with quotation marks, may quote an input."""
_HTTP_STATUS = re.compile(r"[45]\d\d", re.ASCII)
_NO_NAMES = ("None", "null")
"""LiteLLM sends these strings where a type or a parameter is missing."""

_ABOUT_THE_CALL = (400, 401, 403, 404, 412, 422)
"""Statuses that some upstreams give for a failure of the key or the model, not of the input."""
_BY_STATUS: dict[int, type[ProviderError]] = {
    401: AuthenticationError,
    402: QuotaExceeded,
    403: PermissionDenied,
    404: ModelNotFound,
    429: RateLimited,
}


@dataclass(frozen=True, slots=True)
class _ErrorBody:
    """The content of an error body. Each text is one line, bounded, and without keys."""

    status: int
    """The HTTP status; that in the body, if it names one."""
    reason: str | None
    kind: str | None = None
    """OpenAI's `type`."""
    code: str | None = None
    param: str | None = None
    codes: tuple[str, ...] = ()
    """All codes, in lower case and without punctuation."""
    retry_delay: str | None = None
    """The wait in google.rpc.RetryInfo, as it stands there: `37s`."""
    is_moderated: bool = False
    is_of_inner_provider: bool = False
    """Whether a gateway passes on what a provider behind it said (OpenRouter's `provider_name`)."""

    def means(self, error: type[ProviderError]) -> bool:
        """Tell whether a code, or else the message, has this meaning.

        A message does not count where `param` blames the input: it may quote it.
        """
        return self.has_code(CODE_WORDS[error]) or self.has_sentence(error)

    def has_sentence(self, error: type[ProviderError]) -> bool:
        """Tell whether the message begins with a known sentence of this meaning."""
        sentences = SENTENCES_OF.get(error)
        if sentences is None or self.reason is None:
            return False
        blames_input = (self.param or "").removeprefix("$.").startswith("input")
        return not blames_input and sentences.match(self.reason) is not None

    def hidden(self, hide: Redact) -> "_ErrorBody":
        """Return the same with each text that may be shown passed through `hide`."""
        texts = (self.reason, self.kind, self.code, self.param)
        reason, kind, code, param = (text and hide(text) for text in texts)
        return replace(self, reason=reason, kind=kind, code=code, param=param)

    def has_code(self, words: re.Pattern[str]) -> bool:
        """Tell whether some code matches."""
        return any(words.search(code) for code in self.codes)


def redact_nothing(text: str) -> str:
    """Return the text as it is."""
    return text


def parse_json(body: bytes) -> object:
    """Return the JSON value of a body; NaN and Infinity are null, a byte order mark is skipped.

    Raises ValueError for a body that is not JSON.
    """
    if body.startswith(_MARKS):
        mark, encoding = next(bom for bom in _BOMS if body.startswith(bom[0]))
        body = body[len(mark) :].decode(encoding).encode()
    try:
        return orjson.loads(body)
    except orjson.JSONDecodeError:
        return orjson.loads(_NOT_FINITE.sub(b"null", body))


def refusal(  # noqa: PLR0913 - the reply, and who gave it
    provider: str,
    status: int,
    headers: Mapping[str, str],
    body: bytes,
    *,
    redact: Redact = redact_nothing,
    hide: Redact = redact_nothing,
    url: str = "",
    now: float | None = None,
) -> EmbeddingError:
    """Return the error for an error reply.

    `redact` takes out keys before anything is read from the reply; `hide` takes out the inputs,
    once it is known what the reply means: an input may hold any sentence.

    A `code` in the body that is an HTTP status, as a number or a string, replaces `status`
    (OpenRouter, Azure, LiteLLM; also in a reply of status 200). `url` is the address that was
    asked; the error for a missing page names it. `now` is the present time in seconds since 1970,
    for headers that name a point in time.
    """
    now = time.time() if now is None else now
    body_fields = _parse(body, status, redact)
    status = body_fields.status
    is_missing = status in (404, 405) and bool(url) and not body_fields.means(ModelNotFound)
    is_about_input, error = _is_about_input(body_fields), _class_of(body_fields)
    wait = _wait(body_fields, headers, now, is_limit=error is RateLimited)
    body_fields = body_fields.hidden(hide)
    reason = (
        f"status {status}"
        if body_fields.reason is None
        else f"status {status}: {body_fields.reason}"
    )
    if is_missing:
        reason = f"{reason} ({redact(_describe_url(url))})"
    if is_about_input:
        message = (
            body_fields.reason if body_fields.reason is not None else f"{provider}: status {status}"
        )
        kind = body_fields.kind or "invalid_request_error"
        return InvalidRequest(
            message, status=status, kind=kind, param=body_fields.param, code=body_fields.code
        )
    result = Refusal(
        status=_status_of(error, status),
        message=body_fields.reason if body_fields.reason is not None else f"status {status}",
        kind=body_fields.kind,
        code=body_fields.code,
        retry_after=wait,
    )
    return error(provider, reason, result)


def parse_reason(body: bytes, redact: Redact = redact_nothing) -> str | None:
    """Return the reason in an error body as one short line without keys, or None."""
    return _parse(body, 200, redact).reason


def is_error(reply: object) -> bool:
    """Tell whether the JSON value of a reply with status 2xx is an error."""
    if isinstance(reply, list):
        return len(reply) == 1 and isinstance(reply[0], dict) and is_error(reply[0])
    if not isinstance(reply, dict):
        return False
    if reply.get("error") or reply.get("object") == "error":
        return True
    return not isinstance(reply.get("data"), list) and any(reply.get(name) for name in _REASONS)


def _class_of(fields: _ErrorBody) -> type[ProviderError]:
    """Return the kind of failure: as narrow as what is said allows.

    What a gateway passes on of a provider behind it concerns the models of that provider, and not
    the gateway's own key and credit.
    """
    error = _named_class_of(fields)
    if issubclass(error, QuotaExceeded):
        return ScopedQuotaExceeded if _is_scoped_quota(fields) else error
    if error in (AuthenticationError, PermissionDenied) and fields.is_of_inner_provider:
        return PermissionDenied
    if error is AuthenticationError and fields.param == "model" and not fields.means(error):
        return ModelNotFound
    return error


def _named_class_of(fields: _ErrorBody) -> type[ProviderError]:
    """Return what codes and known sentences name, else what the status means."""
    for error in CODE_WORDS:
        if (error is QuotaExceeded or fields.status in _ABOUT_THE_CALL) and fields.means(error):
            return error
    return _BY_STATUS.get(fields.status, UpstreamError)


def _is_scoped_quota(fields: _ErrorBody) -> bool:
    """Tell whether credit is missing for one model, one end user, or so large a call alone."""
    if fields.is_of_inner_provider or fields.has_code(SCOPED_QUOTA_WORDS):
        return True
    if fields.has_sentence(ScopedQuotaExceeded):
        return True
    return fields.has_code(BUDGET_WORDS) and not fields.has_sentence(QuotaExceeded)


def _is_about_input(fields: _ErrorBody) -> bool:
    """Tell whether the request is refused, rather than the proxy's key or the model."""
    if fields.status in (400, 413, 422):
        return _class_of(fields) is UpstreamError
    is_moderation = fields.is_moderated or fields.has_code(MODERATION_WORDS)
    # OpenRouter names the provider behind it also where it has moderated the input itself.
    return fields.status == 403 and is_moderation and _named_class_of(fields) is PermissionDenied


def _wait(
    fields: _ErrorBody, headers: Mapping[str, str], now: float, *, is_limit: bool
) -> float | None:
    """Return the seconds that the upstream asks to wait, from its headers or its body; or None."""
    wait = retry_after(headers, now)
    if wait is None and fields.retry_delay is not None:
        wait = seconds_until(fields.retry_delay, now)
    if wait is None and is_limit:
        wait = reset_after(headers, fields.kind, now)
    return wait


def _status_of(error: type[ProviderError], status: int) -> int:
    """Return the status of a failure in OpenAI's terms, which clients know how to handle."""
    if issubclass(error, QuotaExceeded) and status != 429:
        return 402
    if error is AuthenticationError and status != 403:
        return 401
    if error is RateLimited:
        return 429
    if error is ModelNotFound and status != 403:
        return 404
    if error is PermissionDenied:
        return 403
    return status


def _describe_url(url: str) -> str:
    """Return the address that was asked, without secrets, and the most common mistake in it."""
    parts = urlsplit(url)
    host = parts.netloc.rpartition("@")[2]
    text = f"asked: POST {parts.scheme}://{host}{parts.path}"
    if re.search(r"/v\d", parts.path) or "api-version" in parts.query:
        return text
    return f"{text}; the base URL has no version path such as /v1"


def _parse(body: bytes, status: int, redact: Redact) -> _ErrorBody:
    """Read an error body of any shape."""
    try:
        reply = parse_json(body)
    except ValueError:
        return _ErrorBody(status, _parse_text(body, redact))
    if isinstance(reply, list) and len(reply) == 1:
        reply = reply[0]
    objects = list(_error_objects(reply))
    code = _innermost(objects, "code")
    if type(code) in (int, str) and _HTTP_STATUS.fullmatch(str(code)):
        status, code = int(str(code)), None
    delays = (detail.get("retryDelay") for content in objects for detail in _details(content))
    return _ErrorBody(
        status,
        reason=_clean(_reason(reply) or "", redact) or None,
        kind=_name(_innermost(objects, "type"), redact),
        code=_name(code, redact),
        param=_name(_innermost(objects, "param"), redact),
        codes=tuple(dict.fromkeys(match for content in objects for match in _codes(content))),
        retry_delay=next((delay for delay in delays if isinstance(delay, str)), None),
        is_moderated=any(_is_moderated(content.get("metadata")) for content in objects),
        is_of_inner_provider=any(_names_provider(content.get("metadata")) for content in objects),
    )


def _error_objects(reply: object) -> Iterator[dict[str, object]]:
    """Yield the nested objects of a reply that may hold codes, the outermost first."""
    for _ in range(_MAX_DEPTH):
        if not isinstance(reply, dict):
            return
        yield reply
        inner = (reply.get(name) for name in ("error", "detail", "message"))
        reply = next((value for value in inner if isinstance(value, dict)), None)


def _innermost(objects: Sequence[Mapping[str, object]], name: str) -> object:
    """Return the value of a field in the innermost object that has it, or None."""
    return next(
        (content[name] for content in reversed(objects) if content.get(name) is not None), None
    )


def _codes(error: Mapping[str, object]) -> Iterator[str]:
    """Yield the codes in an error's own fields and in its details, normalized."""
    fields = [error.get(name) for name in _CODES]
    fields += [detail.get(name) for detail in _details(error) for name in ("reason", "code")]
    for value in fields:
        if isinstance(value, str) and len(value) <= _MAX_CODE and _CODE.fullmatch(value):
            yield re.sub(r"[\W_]+", "", value.lower())


def _details(error: Mapping[str, object]) -> Iterator[dict[str, object]]:
    """Yield the objects in an error's details: google.rpc in `details`, Azure's `innererror`."""
    for name in ("details", "errors", "innererror"):
        details = error.get(name)
        for detail in details[:_MAX_PARTS] if isinstance(details, list) else [details]:
            if isinstance(detail, dict):
                yield detail


def _is_moderated(metadata: object) -> bool:
    """Tell whether OpenRouter's metadata says that an input was flagged."""
    return isinstance(metadata, dict) and ("flagged_input" in metadata or "reasons" in metadata)


def _names_provider(metadata: object) -> bool:
    """Tell whether OpenRouter's metadata names a provider behind it that has answered so."""
    return isinstance(metadata, dict) and bool(metadata.get("provider_name"))


def _reason(value: object, depth: int = 0) -> str | None:
    """Return the reason in a JSON value, as it stands there, or None."""
    if depth > _MAX_DEPTH:
        return None
    if isinstance(value, str):
        return _unwrapped(value, depth)
    if isinstance(value, list):
        reasons = [_reason(text, depth + 1) for text in value[:_MAX_PARTS]]
        return "; ".join(text for text in reasons if text) or None
    if not isinstance(value, dict):
        return None
    found_first = (_reason(value.get(name), depth + 1) for name in _REASONS)
    reason = next((text for text in found_first if text), None)
    location = value.get("loc")
    if reason is not None and isinstance(location, list) and location:
        reason = f"{'.'.join(str(part)[:_MAX_CODE] for part in location[:10])}: {reason}"
    metadata = value.get("metadata")
    raw = _reason(metadata.get("raw"), depth + 1) if isinstance(metadata, dict) else None
    # OpenRouter's own message says only that a provider failed; `raw` is that provider's reason.
    return f"{reason}: {raw}" if reason is not None and raw else reason


def _unwrapped(text: str, depth: int) -> str:
    """Return a text, or the reason in it if it is JSON in a string (Mistral, Google, LiteLLM)."""
    if text.lstrip()[:1] in ("{", "[") and len(text) <= _MAX_READ:
        with contextlib.suppress(orjson.JSONDecodeError):
            return _reason(orjson.loads(text), depth + 1) or text
    return text


def _parse_text(body: bytes, redact: Redact) -> str | None:
    """Return the reason in a body that is not JSON: a short text, or the title of a page."""
    text = body[:_MAX_READ].decode(errors="replace").removeprefix("\ufeff")
    if _HTML.match(text):
        title = _TITLE.search(text)
        return (_clean(title[2], redact) or None) if title else None
    is_text = "\ufffd" not in text and text.lstrip()[:1] not in ("{", "[", "<")
    return (_clean(text, redact) or None) if is_text and len(text) <= _MAX_TEXT else None


def _name(value: object, redact: Redact) -> str | None:
    """Return a code, a type or the name of a parameter, if it is a text."""
    if not isinstance(value, str) or value in _NO_NAMES:
        return None
    return _clean(value, redact, _MAX_CODE) or None


def _clean(text: str, redact: Redact, limit: int = MAX_REASON) -> str:
    """Return a text as one line of at most `limit` characters, without keys."""
    text = text[:_MAX_READ]
    printable = "".join(c for c in text if c.isprintable() or c.isspace())
    line = redact(" ".join(printable.split()))
    return line if len(line) <= limit else f"{line[: limit - 1]}…"
