"""Reads what an upstream sent back: vectors that passed every check, or an error of our tree.

Pure: bytes in, values out. What is checked here is everything that stands between an upstream and
the cache: nothing unchecked leaves this file.
"""

import contextlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime

import orjson

from . import ratelimit, vector
from .base import (
    Charge,
    CredentialsRefused,
    EmbeddingError,
    Input,
    InputRefused,
    InvalidAnswer,
    ModelNotFound,
    OutOfCredit,
    ProviderError,
    RateLimited,
    Refusal,
    Space,
    Unreadable,
    UpstreamFault,
    Vector,
)
from .batching import twins
from .bill import MOST_NANODOLLARS, NANO

_LONGEST_MESSAGE = 500
_MOST_USD = MOST_NANODOLLARS / NANO
_NOT_FINITE = re.compile(rb"-?\b(?:NaN|Infinity)\b")
"""As Python's json writes them; no JSON has them, and the rest of the answer can be read."""
_MOST_TOKENS = 1 << 31
"""A total beyond it is no count; the answer is good without."""


@dataclass(frozen=True, slots=True)
class Answer:
    """The checked content of a reply: vectors in the order of the inputs, and the token total."""

    vectors: list[Vector]
    charge: Charge | None
    """What the upstream says it charged."""
    model: str | None
    """Which model the upstream says it asked."""


def read(  # noqa: PLR0913 - who was asked what, and what came back
    provider: str,
    space: Space,
    inputs: Sequence[Input],
    headers: Mapping[str, str],
    body: bytes,
    *,
    unit_norm: bool = False,
) -> Answer:
    """Take a reply of status 200 apart and check it against what was asked for.

    Raises Unreadable unless it is a JSON object; InvalidAnswer unless that holds exactly one vector
    an input, whose indices are a permutation, each of the width of the space if known, finite and
    not zero, of length 1 if `unit_norm`, and none for two different inputs; the error that fits if
    the reply is one, also inside a status of 200 (OpenRouter). What such a reply was charged is in
    the error.
    """
    reply = _parsed(provider, body)
    if not isinstance(reply, dict):
        raise Unreadable(provider, "the answer is not a JSON object")
    charge = _charge(reply.get("usage"))
    try:
        if reply.get("error"):
            raise refusal(provider, 200, headers, body)
        vectors = _vectors(provider, space, inputs, reply, unit_norm)
    except ProviderError as error:
        error.charge = charge
        raise
    model = reply.get("model")
    return Answer(vectors, charge, model if isinstance(model, str) and model else None)


def _charge(usage: object) -> Charge | None:
    """Return what a reply says of its price: tokens, by some in total only; by OpenRouter USD."""
    if not isinstance(usage, dict):
        return None
    told = (usage.get("prompt_tokens"), usage.get("total_tokens"))
    tokens = next((n for n in told if type(n) is int and 0 < n <= _MOST_TOKENS), None)
    cost = usage.get("cost")
    if isinstance(cost, bool) or not isinstance(cost, int | float) or not 0 <= cost <= _MOST_USD:
        return None if tokens is None else Charge(tokens)
    return Charge(tokens, round(cost * NANO))


def _vectors(
    provider: str,
    space: Space,
    inputs: Sequence[Input],
    reply: Mapping[str, object],
    unit_norm: bool,  # noqa: FBT001
) -> list[Vector]:
    """Return the vectors of a reply in the order of the inputs, each of them checked."""
    items = reply.get("data")
    if not isinstance(items, list) or not all(isinstance(item, dict) for item in items):
        raise InvalidAnswer(provider, "the answer holds no list of embeddings")
    if len(items) != len(inputs):
        raise InvalidAnswer(provider, f"{len(items)} embeddings for {len(inputs)} inputs")
    embeddings = [item.get("embedding") for item in _placed(provider, items)]
    vectors = [_vector(provider, space, i, e, unit_norm) for i, e in enumerate(embeddings)]
    same = twins.find(inputs, vectors)
    if same is not None:
        i, j = same
        raise InvalidAnswer(provider, f"embeddings {i} and {j} are one, of different inputs")
    return vectors


def _parsed(provider: str, body: bytes) -> object:
    """Return what a body holds; a number that is not finite is null, for the checks to find."""
    try:
        with contextlib.suppress(orjson.JSONDecodeError):
            return orjson.loads(body)
        return orjson.loads(_NOT_FINITE.sub(b"null", body))
    except orjson.JSONDecodeError as error:
        raise Unreadable(provider, "the answer is not JSON") from error


def _placed(provider: str, items: Sequence[dict[str, object]]) -> list[dict[str, object]]:
    """Return the items by their index; the order in which they came proves nothing."""
    placed: list[dict[str, object] | None] = [None] * len(items)
    for item in items:
        index = item.get("index")
        if type(index) is not int or not 0 <= index < len(items) or placed[index] is not None:
            raise InvalidAnswer(provider, "the indices of the embeddings are no permutation")
        placed[index] = item
    return [item for item in placed if item is not None]


def _vector(
    provider: str,
    space: Space,
    index: int,
    embedding: object,
    unit_norm: bool,  # noqa: FBT001
) -> Vector:
    """Decode one embedding, whichever of the two forms the upstream chose, and check it."""
    try:
        numbers = vector.from_wire(embedding)
        vector.check(numbers, space.dimensions or len(numbers) // 4, unit_norm=unit_norm)
    except vector.VectorError as error:
        raise InvalidAnswer(provider, f"embedding {index}: {error}") from error
    return numbers


def refusal(provider: str, status: int, headers: Mapping[str, str], body: bytes) -> EmbeddingError:
    """Translate a refused call into the error tree.

    An integer `code` inside the body counts as the status (OpenRouter, also inside a 200).
    """
    error = _error_object(body)
    code = error.get("code")
    if type(code) is int and 400 <= code <= 599:
        status, code = code, None
    kind = error.get("type")
    message = error.get("message")
    wait = retry_after(headers, datetime.now(UTC))
    if wait is None and status == 429:
        wait = ratelimit.reset_after(headers, kind)
    said = Refusal(
        status=status,
        message=message[:_LONGEST_MESSAGE] if isinstance(message, str) else f"status {status}",
        kind=kind if isinstance(kind, str) else None,
        code=code if isinstance(code, str) else None,
        retry_after=wait,
    )
    if status in (400, 413, 422):
        param = error.get("param")
        return InputRefused(
            said.message,
            status=status,
            kind=said.kind or "invalid_request_error",
            param=param if isinstance(param, str) else None,
            code=said.code,
        )
    if status == 402 or (status == 429 and "insufficient_quota" in (said.kind, said.code)):
        return OutOfCredit(provider, said.message, said)
    kinds = {401: CredentialsRefused, 403: CredentialsRefused, 404: ModelNotFound, 429: RateLimited}
    return kinds.get(status, UpstreamFault)(provider, said.message, said)


def _error_object(body: bytes) -> dict[str, object]:
    """Return the `error` object of a reply; empty when there is none to be read."""
    with contextlib.suppress(orjson.JSONDecodeError):
        reply = orjson.loads(body)
        error = reply.get("error") if isinstance(reply, dict) else None
        if isinstance(error, dict):
            return error
        if isinstance(error, str):
            return {"message": error}
    return {}


def retry_after(headers: Mapping[str, str], now: datetime) -> float | None:
    """Return the seconds an upstream asks to wait, or None.

    Reads `retry-after-ms` (OpenAI) and `Retry-After` as seconds, fractions or a date (RFC 9110).

    >>> retry_after({"Retry-After": "1.5"}, datetime.now(UTC))
    1.5
    """
    for name, scale in (("retry-after-ms", 1000.0), ("Retry-After", 1.0)):
        value = headers.get(name)
        if value is None:
            continue
        with contextlib.suppress(ValueError):
            seconds = float(value) / scale
            if 0 <= seconds < float("inf"):
                return seconds
        # A date without a zone (asctime, `-0000`) is one of UTC.
        with contextlib.suppress(ValueError, OverflowError):
            date = parsedate_to_datetime(value)
            date = date if date.tzinfo else date.replace(tzinfo=UTC)
            return max(0.0, (date - now).total_seconds())
    return None
