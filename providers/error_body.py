"""Reads the error that an upstream answers with: its reason, its codes, and what it is about.

Upstreams agree on no shape. Read are OpenAI's `error` object, FastAPI's `detail`, a top-level
`message`, `error` as a string, `{"object": "error"}` (vLLM, Mistral), Google's list with one error,
`errors`, plain text and the title of an HTML page. The status is not always the truth either: some
upstreams answer 400 for a bad key or an unpaid bill, and 403 for an input or a model. What an error
is about is read from its fields for codes alone, never from its free text, which may quote the
user's input; a few whole sentences that upstreams are known to begin with are the exception.

Pure: bytes in, an error of our tree out. All text in it is one line, bounded, and without keys.
"""

import codecs
import contextlib
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from urllib.parse import urlsplit

import orjson

from .base import (
    CredentialsRefused,
    EmbeddingError,
    InputRefused,
    ModelNotFound,
    OutOfCredit,
    ProviderError,
    RateLimited,
    Refusal,
    UpstreamFault,
)
from .ratelimit import reset_after, retry_after

MAX_REASON = 500
"""Characters of a reason that are handed on."""
_MAX_CODE = 100
"""Characters of a code, a type or the name of a parameter."""
_MAX_READ = 4096
"""Characters of a text that are looked at; a key is taken out of them before they are cut."""
_MAX_PARTS = 5
"""Entries of a list of errors that are joined."""
_MAX_DEPTH = 8

Redact = Callable[[str], str]
"""Takes the keys out of a text that goes to clients and into the log."""

_NOT_FINITE = re.compile(rb"-?\b(?:NaN|Infinity)\b")
"""As Python's json writes them. No JSON has them, and the rest of the body can be read."""
_BOMS = (
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)
_HTML = re.compile(r"\s*<(?:!doctype|html|head|body|\?xml)\b", re.IGNORECASE)
_TITLE = re.compile(r"<(title|h1)\b[^>]*>([^<]*)<", re.IGNORECASE)
_MAX_TEXT = 300
"""Characters of a plain text; a longer body is no message for people."""

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
"""Fields that hold a reason, the likeliest first."""
_CODES = ("code", "type", "status", "reason", "error_code", "error_type", "errorCode")
"""Fields that hold a code."""
_CODE = re.compile(r"[\w.:/#-]+(?: [\w.:/#-]+){0,2}")
"""A code has up to three words; a longer text, or one with quotation marks, may quote an input."""

# What codes mean, in lower case and without punctuation.
_BILLING = re.compile(
    r"arrear|overdue|billing|payment|insufficient\w*(?:quota|balance|credit|fund)"
    r"|outofcredit|nocredit|creditbalance|balancenotenough|exceededcurrentquota|freetieronly"
)
_KEY = re.compile(
    r"(?:invalid|incorrect|expired|missing)apikey|apikey(?:invalid|incorrect|expired|notfound"
    r"|missing|revoked|disabled|serviceblocked)|^keyinvalid|^keyexpired|^unauthenticated"
    r"|authenticationerror|invalidauthentication|authenticationfailed|accountdeactivated"
    r"|consumersuspended|consumerinvalid"
)
_MODEL = re.compile(
    r"model(?:id|name)?(?:is|does)?(?:not(?:found|exist|allowed|available|open|supported|permitted)"
    r"|(?:access|permission)(?:denied|error)|forbidden|restricted|disabled)"
    r"|(?:unsupported|unknown|invalid)model(?:id|name|error)?$|noaccesstomodel|nosuchmodel"
)
_CONTENT = re.compile(
    r"contentpolicy|contentfilter|contentviolation|moderation|flagged|datainspection"
    r"|responsibleai|prohibitedcontent|promptblocked|unsafe|^safety"
)
_RATE = re.compile(r"ratelimit|throttl|toomanyrequests")


def _sentences(*texts: str) -> re.Pattern[str]:
    """Return what matches a reason that is one of these sentences, or begins with it."""
    return re.compile(rf"(?:{'|'.join(map(re.escape, texts))})(?:$|[.,:;!(])", re.IGNORECASE)


_BILLING_SENTENCES = _sentences(
    "Access denied, please make sure your account is in good standing",
    "Access denied due to overdue account",
    "Your account is not active, please check your billing details on our website",
    "Your account balance is insufficient",
    "Sorry, your account balance is insufficient",
    "Insufficient balance",
)
_KEY_SENTENCES = _sentences(
    "API key not valid",
    "API key not found",
    "API key expired",
    "Incorrect API key provided",
    "Invalid API key",
)
_MODEL_SENTENCES = _sentences("Model access denied", "Access to model denied")
_NO_SENTENCES = re.compile(r"(?!)")

_ABOUT_THE_CALL = (400, 403, 404, 412, 422)
"""Statuses that some upstreams give for what concerns the key or the model, not the input."""
_BY_STATUS: dict[int, type[ProviderError]] = {
    401: CredentialsRefused,
    402: OutOfCredit,
    403: CredentialsRefused,
    404: ModelNotFound,
    429: RateLimited,
}


@dataclass(frozen=True, slots=True)
class _Said:
    """What an error body says; each text is clean, bounded and without keys."""

    reason: str | None
    status: int
    kind: str | None
    code: str | None
    param: str | None
    codes: tuple[str, ...]
    """All codes, in lower case and without punctuation."""
    is_moderated: bool


def keep(text: str) -> str:
    """Redact nothing."""
    return text


def parsed(body: bytes) -> object:
    """Return what a JSON body holds; a number that is not finite is null.

    A byte order mark is read as what it is. Raises ValueError for what is no JSON.
    """
    for mark, encoding in _BOMS:
        if body.startswith(mark):
            body = body[len(mark) :].decode(encoding).encode()
            break
    with contextlib.suppress(orjson.JSONDecodeError):
        return orjson.loads(body)
    return orjson.loads(_NOT_FINITE.sub(b"null", body))


def refusal(  # noqa: PLR0913 - the reply, and who gave it
    provider: str,
    status: int,
    headers: Mapping[str, str],
    body: bytes,
    *,
    redact: Redact = keep,
    url: str = "",
    now: float | None = None,
) -> EmbeddingError:
    """Translate a reply that is an error into the error tree.

    An integer `code` in the body counts as the status (OpenRouter, also in a reply of status 200).
    `url` is the address that was asked; an error about a missing page names it. `now` is the
    present time in seconds since 1970, for headers that name a point in time.
    """
    now = time.time() if now is None else now
    said = _said(body, status, redact)
    status = said.status
    reason = f"status {status}" if said.reason is None else f"status {status}: {said.reason}"
    if status in (404, 405) and url and not _speaks_of(said, _MODEL, _MODEL_SENTENCES):
        reason = f"{reason} ({redact(_asked(url))})"
    if _is_about_input(said):
        message = said.reason if said.reason is not None else f"{provider}: status {status}"
        kind = said.kind or "invalid_request_error"
        return InputRefused(message, status=status, kind=kind, param=said.param, code=said.code)
    error = _class_of(said)
    wait = retry_after(headers, now)
    if wait is None and error is RateLimited:
        wait = reset_after(headers, said.kind, now)
    told = Refusal(
        status=_status_of(error, status),
        message=said.reason if said.reason is not None else f"status {status}",
        kind=said.kind,
        code=said.code,
        retry_after=wait,
    )
    return error(provider, reason, told)


def reason_of(body: bytes, redact: Redact = keep) -> str | None:
    """Return the reason that a body gives, as one short line without keys, or None."""
    return _said(body, 200, redact).reason


def is_error(reply: object) -> bool:
    """Tell whether the JSON of a reply with a status of success is an error all the same."""
    if isinstance(reply, list):
        return len(reply) == 1 and isinstance(reply[0], dict) and is_error(reply[0])
    if not isinstance(reply, dict):
        return False
    if reply.get("error") or reply.get("object") == "error":
        return True
    return not isinstance(reply.get("data"), list) and any(reply.get(name) for name in _REASONS)


def _class_of(said: _Said) -> type[ProviderError]:
    """Return the kind of failure; codes say more than the status."""
    if _speaks_of(said, _BILLING, _BILLING_SENTENCES):
        return OutOfCredit
    if said.status in _ABOUT_THE_CALL:
        if _speaks_of(said, _KEY, _KEY_SENTENCES):
            return CredentialsRefused
        if _speaks_of(said, _MODEL, _MODEL_SENTENCES):
            return ModelNotFound
        if _speaks_of(said, _RATE):
            return RateLimited
    return _BY_STATUS.get(said.status, UpstreamFault)


def _is_about_input(said: _Said) -> bool:
    """Tell whether it is the request that is refused, rather than the proxy's key or the model."""
    if said.status in (400, 413, 422):
        return _class_of(said) is UpstreamFault
    is_moderation = said.is_moderated or _speaks_of(said, _CONTENT)
    return said.status == 403 and is_moderation and _class_of(said) is CredentialsRefused


def _speaks_of(
    said: _Said, words: re.Pattern[str], sentences: re.Pattern[str] = _NO_SENTENCES
) -> bool:
    if any(words.search(code) for code in said.codes):
        return True
    return said.reason is not None and sentences.match(said.reason) is not None


def _status_of(error: type[ProviderError], status: int) -> int:
    """Return the status that a client is told of a failure: one that it reads rightly."""
    if error is OutOfCredit and status != 429:
        return 402
    if error is CredentialsRefused and status != 403:
        return 401
    if error is RateLimited:
        return 429
    if error is ModelNotFound and status != 403:
        return 404
    return status


def _asked(url: str) -> str:
    """Name the address that was asked, without secrets, and the commonest mistake in it."""
    parts = urlsplit(url)
    host = parts.netloc.rpartition("@")[2]
    text = f"asked: POST {parts.scheme}://{host}{parts.path}"
    if re.search(r"/v\d", parts.path) or "api-version" in parts.query:
        return text
    return f"{text}; the base URL has no version path such as /v1"


def _said(body: bytes, status: int, redact: Redact) -> _Said:
    """Read an error body, whatever its shape."""
    try:
        reply = parsed(body)
    except ValueError:
        return _Said(_plain(body, redact), status, None, None, None, (), False)  # noqa: FBT003
    if isinstance(reply, list) and len(reply) == 1:
        reply = reply[0]
    objects = list(_error_objects(reply))
    code = _innermost(objects, "code")
    if type(code) is int and 400 <= code <= 599:
        status, code = code, None
    codes = tuple(dict.fromkeys(found for one in objects for found in _codes(one)))
    return _Said(
        reason=_clean(_reason(reply) or "", redact) or None,
        status=status,
        kind=_name(_innermost(objects, "type"), redact),
        code=_name(code, redact),
        param=_name(_innermost(objects, "param"), redact),
        codes=codes,
        is_moderated=any(_is_moderated(one.get("metadata")) for one in objects),
    )


def _error_objects(reply: object) -> Iterator[dict[str, object]]:
    """Yield the objects of a reply that may hold codes, from the outermost to the innermost."""
    for _ in range(_MAX_DEPTH):
        if not isinstance(reply, dict):
            return
        yield reply
        inner = (reply.get(name) for name in ("error", "detail", "message"))
        reply = next((value for value in inner if isinstance(value, dict)), None)


def _innermost(objects: Sequence[Mapping[str, object]], name: str) -> object:
    """Return what the innermost object that has such a field holds in it, or None."""
    return next((one[name] for one in reversed(objects) if one.get(name) is not None), None)


def _codes(error: Mapping[str, object]) -> Iterator[str]:
    """Yield what stands in an error's fields for codes, and in those of its details (Google)."""
    for name in _CODES:
        value = error.get(name)
        if isinstance(value, str) and len(value) <= _MAX_CODE and _CODE.fullmatch(value):
            yield re.sub(r"[\W_]+", "", value.lower())
    for name in ("details", "errors", "innererror"):
        details = error.get(name)
        for detail in details[:_MAX_PARTS] if isinstance(details, list) else [details]:
            if isinstance(detail, dict):
                yield from _codes({key: detail.get(key) for key in ("reason", "code")})


def _is_moderated(metadata: object) -> bool:
    """Tell whether OpenRouter says by its metadata that an input was flagged."""
    return isinstance(metadata, dict) and ("flagged_input" in metadata or "reasons" in metadata)


def _reason(value: object, depth: int = 0) -> str | None:
    """Return the reason that some JSON holds, as it stands there, or None."""
    if depth > _MAX_DEPTH:
        return None
    if isinstance(value, str):
        return _unwrapped(value, depth)
    if isinstance(value, list):
        found = [_reason(one, depth + 1) for one in value[:_MAX_PARTS]]
        return "; ".join(one for one in found if one) or None
    if not isinstance(value, dict):
        return None
    found_first = (_reason(value.get(name), depth + 1) for name in _REASONS)
    reason = next((one for one in found_first if one), None)
    location = value.get("loc")
    if reason is not None and isinstance(location, list) and location:
        reason = f"{'.'.join(str(part)[:_MAX_CODE] for part in location[:10])}: {reason}"
    metadata = value.get("metadata")
    raw = _reason(metadata.get("raw"), depth + 1) if isinstance(metadata, dict) else None
    # OpenRouter's own message says only that a provider failed; `raw` is what that one said.
    return f"{reason}: {raw}" if reason is not None and raw else reason


def _unwrapped(text: str, depth: int) -> str:
    """Return a text, or the reason in it where it is JSON in a string (Mistral, Google)."""
    if text.lstrip()[:1] in ("{", "[") and len(text) <= _MAX_READ:
        with contextlib.suppress(orjson.JSONDecodeError):
            return _reason(orjson.loads(text), depth + 1) or text
    return text


def _plain(body: bytes, redact: Redact) -> str | None:
    """Return what a body says that is no JSON: a short text, or the title of a page."""
    text = body[:_MAX_READ].decode(errors="replace").removeprefix("\ufeff")
    if _HTML.match(text):
        title = _TITLE.search(text)
        return (_clean(title[2], redact) or None) if title else None
    is_text = "\ufffd" not in text and text.lstrip()[:1] not in ("{", "[", "<")
    return (_clean(text, redact) or None) if is_text and len(text) <= _MAX_TEXT else None


def _name(value: object, redact: Redact) -> str | None:
    """Return a code, a type or the name of a parameter, if it is a text."""
    return _clean(value, redact, _MAX_CODE) or None if isinstance(value, str) else None


def _clean(text: str, redact: Redact, limit: int = MAX_REASON) -> str:
    """Return a text as one line without control characters and keys, at most `limit` long."""
    text = text[:_MAX_READ]
    printable = "".join(c for c in text if c.isprintable() or c.isspace())
    line = redact(" ".join(printable.split()))
    return line if len(line) <= limit else f"{line[: limit - 1]}…"
