"""Errors of Qdrant, as a small tree: passing failures, and lasting ones.

`translated` makes such a failure of what the client raises: one line, and no key.
"""

import sqlite3
import time

import orjson
from embedding_proxy.providers.upstream.rate_limit_headers import seconds_until

_LONGEST = 300
"""Characters of Qdrant's own words in a message."""
_PASSING = frozenset({408, 425, 429, 502, 503, 504, 507})


class QdrantFailure(Exception):
    """Qdrant did not do what it was asked for; the message is one line, without key and payload."""


class Unavailable(QdrantFailure):
    """It cannot be reached, is overloaded, or takes too long: the same call may succeed later."""

    def __init__(self, message: str, retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s
        """Seconds after which it said to come back; None where it said nothing."""


class ServerFault(Unavailable):
    """It failed in its own code (HTTP 500): perhaps over what it was sent."""


class InUse(Unavailable):
    """The folder of the embedded mode is open in another process, and only one may have it."""


class Denied(QdrantFailure):
    """The key is missing, or is not allowed this: somebody has to change something."""


class Rejected(QdrantFailure):
    """The call itself is wrong: it will fail in the same way each time."""


class Missing(Rejected):
    """There is no collection or alias of that name."""


class Exists(Rejected):
    """There is a collection or alias of that name already."""


class OtherSpace(QdrantFailure):
    """A collection holds vectors of another space or width, or of nobody knows which."""


class NotInstalled(QdrantFailure):
    """The package that speaks with Qdrant is not installed; the message holds the command."""

    def __init__(self) -> None:
        super().__init__("Qdrant needs more: pip install 'qdrant-client>=1.16'")


class Unusable(QdrantFailure):
    """The outbox cannot be opened, so nothing could be indexed."""


def translated(error: Exception, place: str = "") -> Exception:  # noqa: PLR0911 - a table
    """Return a failure in our words; an error of the caller's own code stays what it is.

    `place` is the host and port of the server, for a failure to reach it.
    """
    if isinstance(error, QdrantFailure):
        return error
    from qdrant_client.common.client_exceptions import (  # noqa: PLC0415 - an extra, and slow to import
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
