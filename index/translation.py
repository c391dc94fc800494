"""What the client of Qdrant raises, in our own words: one line each, and no key."""

import sqlite3
import time

import orjson

from providers.ratelimit import seconds_until

from .failures import (
    Denied,
    Exists,
    InUse,
    Missing,
    QdrantFailure,
    Rejected,
    ServerFault,
    Unavailable,
)

_LONGEST = 300
"""Characters of Qdrant's own words in a message."""
_PASSING = frozenset({408, 425, 429, 502, 503, 504, 507})


def translated(error: Exception, place: str = "") -> Exception:  # noqa: PLR0911 - a table
    """Return a failure in our words; an error of the caller's own code stays what it is.

    `place` is the host and port of the server, for a failure to reach it.
    """
    if isinstance(error, QdrantFailure):
        return error
    from qdrant_client.common.client_exceptions import (  # noqa: PLC0415 - see above
        QdrantException,
        ResourceExhaustedResponse,
    )
    from qdrant_client.http.exceptions import (  # noqa: PLC0415
        ResponseHandlingException,
        UnexpectedResponse,
    )

    if isinstance(error, UnexpectedResponse):
        return _refusal(error.status_code or 0, error.content, error.headers.get("retry-after"))
    if isinstance(error, ResourceExhaustedResponse):
        return Unavailable(
            f"overloaded: {_short(error)}", seconds_until(str(error.retry_after_s), time.time())
        )
    if isinstance(error, ResponseHandlingException):
        return Unavailable(_unreached(error.source, place))
    if isinstance(error, RuntimeError) and "already accessed" in str(error):
        return InUse("the folder is open in another process; only one can have it (see `url`)")
    if isinstance(error, QdrantException | OSError | sqlite3.Error | TimeoutError):
        return Unavailable(_short(error) or type(error).__name__)
    if isinstance(error, ValueError | KeyError):
        # The embedded mode has no statuses.
        return _by_words(_short(error))
    return error


def _unreached(source: BaseException, place: str) -> str:
    """Return why a server gave no answer, with its host and port."""
    why = _short(source) or type(source).__name__
    if "refused" in why.lower() or why == "All connection attempts failed":
        # The second is what the client says where a name has several addresses.
        return f"connection refused by {place}" if place else why
    return f"{why} ({place})" if place else why


def _refusal(status: int, content: bytes, wait: str | None) -> QdrantFailure:
    words = f"HTTP {status}: {_said(content)}"
    if status in (401, 403):
        return Denied(f"the key is not accepted: {words}")
    if status == 500:
        return ServerFault(words)
    if status in _PASSING:
        return Unavailable(words, seconds_until(wait or "", time.time()))
    if status == 404:
        return Missing(words)
    if status == 409 or b"already exists" in content:
        return Exists(words)
    return _by_words(words)


def _by_words(words: str) -> QdrantFailure:
    if "already exists" in words:
        return Exists(words)
    if "not found" in words or "doesn't exist" in words:
        return Missing(words)
    return Rejected(words)


def _said(content: bytes) -> str:
    """Return what an error's body says, in one line."""
    try:
        said = orjson.loads(content)["status"]["error"]
    except (ValueError, KeyError, TypeError):
        said = content.decode("utf-8", "replace")
    return _short(said)


def _short(said: object) -> str:
    return " ".join(str(said).split())[:_LONGEST]
