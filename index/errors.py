"""Errors of Qdrant, as a small tree: passing failures, and lasting ones.

`translate` makes such a failure of what the client raises: one line, and no key. The statuses of
Qdrant do not tell enough: a limit of strict mode is a 400 or a 403, by version. So its words count
first, then its status.
"""

import re
import sqlite3
import time
from typing import Any, NamedTuple

import orjson
from embedding_proxy.providers.upstream.retry_after import seconds_until

_LONGEST = 300
"""Characters of Qdrant's own words in a message."""
_PASSING = frozenset({408, 425, 502, 503, 504})

# A limit of strict mode on one request: "Limit exceeded 200 > 100 for "upsert limit"".
_EXCEEDED = re.compile(r'Limit exceeded \d+ > (\d+) for "(?:limit|upsert limit)"')
_TOO_LARGE = re.compile(
    r"larger than rate limiter capacity|larger than allowed \(limit|larger than max", re.IGNORECASE
)
# What says that the server, or the whole collection, takes no more points now.
_LIMIT_REACHED = re.compile(
    r"limit of \S+ reached|exceeding the configured limit|usage is at \d+ ?%|quota|read[- ]only"
    r"|No space left on device|available disk space",
    re.IGNORECASE,
)
_CERTIFICATE = re.compile(r"CERTIFICATE_VERIFY_FAILED|certificate verify failed", re.IGNORECASE)
_NO_TLS = re.compile(r"WRONG_VERSION_NUMBER|RECORD_LAYER_FAILURE", re.IGNORECASE)
# What httpx calls a connection that ends before its answer.
_CUT = frozenset({"ReadError", "WriteError", "CloseError", "RemoteProtocolError"})


class QdrantFailure(Exception):
    """Qdrant did not do what it was asked for; the message is one line, without key and payload."""


class Unavailable(QdrantFailure):
    """It cannot be reached, is overloaded, or takes too long: the same call may succeed later."""

    def __init__(self, message: str, retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s
        """Seconds after which it said to come back; None where it said nothing."""


class Overloaded(Unavailable):
    """It asks for fewer calls (HTTP 429)."""


class ServerFault(Unavailable):
    """It failed with HTTP 500, perhaps because of the points in the call."""


class Disconnected(Unavailable):
    """The connection was cut during a call, perhaps because of the size of the call."""


class LimitReached(Unavailable):
    """It takes no more points: its disk or memory is full, a limit is reached, it is read-only.

    No single point is the cause. It ends when somebody makes room.
    """


class InUse(Unavailable):
    """The folder of the embedded mode is open in another process; only one can open it."""


class Denied(QdrantFailure):
    """The key is missing or lacks a right. Only a change of the configuration helps."""


class UntrustedCertificate(QdrantFailure):
    """The certificate of the server is not trusted. Only a change of the configuration helps."""


class WrongAddress(QdrantFailure):
    """Something answers at this address, and it is not Qdrant."""


class Rejected(QdrantFailure):
    """The call itself is wrong: it will fail in the same way each time."""


class TooLarge(Rejected):
    """The call is larger than the server takes: a smaller one may succeed."""

    def __init__(self, message: str, max_items: int | None = None) -> None:
        super().__init__(message)
        self.max_items = max_items
        """Points that it takes in one call; None where it does not say."""


class Missing(Rejected):
    """There is no collection, alias or point of that name."""


class Exists(Rejected):
    """There is a collection or alias of that name already."""


class OtherSpace(QdrantFailure):
    """A collection holds vectors of another space or width, or of an unknown space."""


class NotInstalled(QdrantFailure):
    """The client library of Qdrant is not installed; the message has the command."""

    def __init__(self) -> None:
        super().__init__("Qdrant needs more: pip install 'qdrant-client>=1.16'")


class Unusable(QdrantFailure):
    """The outbox cannot be opened, so nothing can be indexed."""


_BY_STATUS: dict[int, type[QdrantFailure]] = {
    404: Missing,
    409: Exists,
    413: TooLarge,
    500: ServerFault,
    507: LimitReached,
}
_BY_CODE: dict[str, type[QdrantFailure]] = {
    "RESOURCE_EXHAUSTED": Overloaded,
    "INTERNAL": ServerFault,
    "UNKNOWN": ServerFault,
    "NOT_FOUND": Missing,
    "ALREADY_EXISTS": Exists,
    "INVALID_ARGUMENT": Rejected,
    "FAILED_PRECONDITION": Rejected,
    "OUT_OF_RANGE": Rejected,
    "UNIMPLEMENTED": Rejected,
}
"""Failures by the status of gRPC."""


class Call(NamedTuple):
    """What a server is asked for."""

    doing: str = ""
    """In words: "writing points to docs"."""
    request: str = ""
    """Method and path."""


NO_CALL = Call()


def translate(error: Exception, place: str = "", call: Call = NO_CALL) -> Exception:  # noqa: PLR0911 - a table
    """Return the QdrantFailure of an error; an error of the caller's own code is returned as it is.

    `place` is the host and port of the server, for a failure to reach it.
    """
    doing = call.doing
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
        wait = error.headers.get("retry-after")
        return _refusal(error.status_code or 0, error.content, wait, place, call)
    if isinstance(error, ResourceExhaustedResponse):
        return Overloaded(
            f"overloaded: {_short(error)}", seconds_until(str(error.retry_after_s), time.time())
        )
    if isinstance(error, ResponseHandlingException):
        return _connection_failure(error.source, place, doing)
    if type(error).__name__ == "AioRpcError":
        return _rpc_failure(error, place, doing)
    if isinstance(error, RuntimeError) and "already accessed" in str(error):
        return InUse("the folder is open in another process; only one can have it (see `url`)")
    if isinstance(error, QdrantException | OSError | sqlite3.Error | TimeoutError):
        return Unavailable(_short(error) or type(error).__name__)
    if isinstance(error, ValueError | KeyError):
        # The embedded mode has no statuses.
        return _by_words(_short(error)) or Rejected(_short(error))
    return error


def _connection_failure(source: BaseException, place: str, doing: str) -> QdrantFailure:
    """Return the failure of a call without an answer; its message names host and call."""
    why, kind = _short(source), type(source).__name__
    whose = place or "Qdrant"
    during = f" while {doing}" if doing else ""
    cause = why if kind in why else f"{kind}: {why}" if why else kind
    if "refused" in why.lower() or why == "All connection attempts failed":
        # The second is what the client says where a name has several addresses.
        return Unavailable(f"connection refused by {whose}{during}")
    if _CERTIFICATE.search(why):
        return UntrustedCertificate(
            f"the certificate of {whose} is not trusted{during}: {why}; if its CA is your own,"
            " name it in ca_file"
        )
    if kind in _CUT:
        return Disconnected(f"the connection to {whose} was cut{during} ({cause})")
    words = f"no answer from {whose}{during}"
    if _NO_TLS.search(why):
        words = f"{whose} does not speak TLS{during}: its url begins with http:"
    elif kind.endswith("Timeout"):
        words = f"no answer from {whose} in time{during}"
    elif kind == "ValidationError":
        words = f"the answer of {whose} is not one of Qdrant's{during}"
    return Unavailable(f"{words} ({cause})")


def _refusal(
    status: int, content: bytes, wait: str | None, place: str, call: Call
) -> QdrantFailure:
    message = _message_of(content)
    words = f"HTTP {status}: {message}"
    if status == 404 and not message:
        return WrongAddress(
            f"HTTP 404 from {place or 'the server'} for {call.request or 'a call'}, and not in"
            " Qdrant's words: its url is that of something else, or has a path too much"
        )
    if message is None:
        words = f"HTTP {status}: {_short(content.decode('utf-8', 'replace'))}"
    failure = _by_words(words, status)
    if failure is not None:
        return failure
    if status in (401, 403):
        return Denied(
            f"the key is not accepted{f' for {call.doing}' if call.doing else ''}: {words}"
        )
    if status == 429:
        return Overloaded(words, seconds_until(wait or "", time.time()))
    if status in _PASSING:
        return Unavailable(words, seconds_until(wait or "", time.time()))
    return _BY_STATUS.get(status, Rejected)(words)


def _by_words(words: str, status: int = 0) -> QdrantFailure | None:
    """Return the failure that Qdrant's message names, for any status; None if it names none."""
    exceeded = _EXCEEDED.search(words)
    if exceeded:
        return TooLarge(words, int(exceeded[1]))
    if _TOO_LARGE.search(words):
        return TooLarge(words)
    if _LIMIT_REACHED.search(words) and status != 401:
        return LimitReached(words)
    if "already exists" in words:
        return Exists(words)
    if status < 500 and ("not found" in words or "doesn't exist" in words):
        return Missing(words)
    return None


def _rpc_failure(error: Any, place: str, doing: str) -> QdrantFailure:  # noqa: ANN401 - grpc's
    """Return the failure of a call by gRPC, an AioRpcError."""
    code = error.code().name
    details = _short(error.details() or "")
    words = f"gRPC {code}: {details}"
    during = f" while {doing}" if doing else ""
    failure = _by_words(words)
    if failure is not None:
        return failure
    if _CERTIFICATE.search(details):
        return UntrustedCertificate(f"the certificate of {place} is not trusted{during}: {details}")
    if code in ("UNAUTHENTICATED", "PERMISSION_DENIED"):
        return Denied(f"the key is not accepted{during}: {words}")
    kind = _BY_CODE.get(code)
    if kind is not None:
        return kind(words)
    return Unavailable(f"no answer from {place}{during} ({words})")


def _message_of(content: bytes) -> str | None:
    """Return the message of an error's body, in one line; None if the body is not Qdrant's."""
    try:
        message = orjson.loads(content)["status"]["error"]
    except (ValueError, KeyError, TypeError):
        return None
    return _short(message)


def _short(message: object) -> str:
    return " ".join(str(message).split())[:_LONGEST]
