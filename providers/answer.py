"""Reads what an upstream sent back: vectors that passed every check, or an error of our tree.

Pure: bytes in, values out. What is checked here is everything that stands between an upstream and
the cache: nothing unchecked leaves this file. What an error says is read by `error_body`.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from . import error_body, vector
from .base import Charge, Input, InvalidAnswer, ProviderError, Space, Unreadable, Vector
from .batching import twins
from .bill import MOST_NANODOLLARS, NANO

_MAX_USD = MOST_NANODOLLARS / NANO
_MAX_TOKENS = 1 << 31
"""A total beyond it is no count; the answer is good without."""
_WHOLE = re.compile(r"0|[1-9]\d{0,9}", re.ASCII)
_MAX_WHOLE = float(1 << 53)
_MAX_NAMED = 3
"""Bad vectors that an error describes; it counts the others."""


@dataclass(frozen=True, slots=True)
class Answer:
    """The checked content of a reply.

    Of n inputs, `places` and `problems` name each exactly once, and there is at least one good one.
    """

    vectors: list[Vector]
    """The good vectors, in the order of their inputs."""
    places: Sequence[int]
    """The places of their inputs in the call, ascending: 0…n-1 if all are good."""
    problems: Mapping[int, str]
    """What is wrong with each of the other vectors, by the place of its input."""
    charge: Charge | None
    """What the upstream says it charged, for all inputs."""
    model: str | None
    """Which model the upstream says it asked."""
    is_numbered: bool
    """Whether each embedding bore its index; else the missing ones were deduced."""


def read(  # noqa: PLR0913 - who was asked what, and what came back
    provider: str,
    space: Space,
    inputs: Sequence[Input],
    headers: Mapping[str, str],
    body: bytes,
    *,
    status: int = 200,
    unit_norm: bool = False,
    redact: error_body.Redact = error_body.keep,
    url: str = "",
) -> Answer:
    """Take a reply with a status of success apart and check it against what was asked for.

    A vector is good if it has the width of the space, if that is known, is finite and not zero, has
    length 1 if `unit_norm`, and came for no other input that differs from its own.

    Raises Unreadable unless the reply is a JSON object; InvalidAnswer unless that holds exactly one
    embedding an input, whose indices are a permutation or can be deduced, and at least one of them
    is good; the error that fits if the reply is one (OpenRouter, vLLM). What such a reply was
    charged is in the error.
    """
    try:
        reply = error_body.parsed(body)
    except ValueError as error:
        raise Unreadable(provider, _no_json(body, status, redact)) from error
    if error_body.is_error(reply):
        failure = error_body.refusal(provider, status, headers, body, redact=redact, url=url)
        if isinstance(failure, ProviderError) and isinstance(reply, dict):
            failure.charge = _charge(reply.get("usage"))
        raise failure
    if not isinstance(reply, dict):
        raise Unreadable(provider, "the answer is not a JSON object")
    charge = _charge(reply.get("usage"))
    try:
        items, is_numbered = _placed(provider, reply, len(inputs))
        vectors, problems = _well_formed(space, items, unit_norm=unit_norm)
        shared = _shared(inputs, vectors)
        vectors = {place: numbers for place, numbers in vectors.items() if place not in shared}
        problems |= shared
        if not vectors:
            bad = InvalidAnswer(provider, problems[min(problems)])
            bad.indices = tuple(shared) if len(shared) == len(inputs) else ()
            raise bad
    except InvalidAnswer as error:
        error.charge = charge
        raise
    model = reply.get("model")
    return Answer(
        vectors=[vectors[place] for place in sorted(vectors)],
        places=sorted(vectors),
        problems=dict(sorted(problems.items())),
        charge=charge,
        model=redact(model) if isinstance(model, str) and model else None,
        is_numbered=is_numbered,
    )


def bad_vectors(provider: str, answer: Answer) -> InvalidAnswer:
    """Return the error for those inputs of an answer whose vectors are bad."""
    error = InvalidAnswer(provider, _described(answer.problems))
    error.indices = tuple(answer.problems)
    error.index = error.indices[0]
    return error


def _no_json(body: bytes, status: int, redact: error_body.Redact) -> str:
    """Say why a reply is no JSON, as far as it can be told."""
    if not body.strip():
        return f"the answer is empty (status {status}), not JSON"
    reason = error_body.reason_of(body, redact)
    return "the answer is not JSON" if reason is None else f"the answer is not JSON: {reason}"


def _charge(usage: object) -> Charge | None:
    """Return what a reply says of its price: tokens, by some in total only; by OpenRouter USD.

    A usage of 0 is none: gateways say so of what they served from a cache of their own.
    """
    if not isinstance(usage, dict):
        return None
    told = (_whole(usage.get("prompt_tokens")), _whole(usage.get("total_tokens")))
    tokens = next((n for n in told if n is not None and 0 < n <= _MAX_TOKENS), None)
    cost = usage.get("cost")
    if isinstance(cost, bool) or not isinstance(cost, int | float) or not 0 <= cost <= _MAX_USD:
        return None if tokens is None else Charge(tokens)
    return Charge(tokens, round(cost * NANO))


def _whole(value: object) -> int | None:
    """Return a whole number from 0, however JSON writes it: 1, 1.0 or "1"; else None.

    >>> _whole(1), _whole(1.0), _whole("1"), _whole(True), _whole("01"), _whole(-1), _whole(0.5)
    (1, 1, 1, None, None, None, None)
    """
    if isinstance(value, str):
        return int(value) if _WHOLE.fullmatch(value) else None
    if isinstance(value, float):
        return int(value) if 0 <= value <= _MAX_WHOLE and value.is_integer() else None
    return value if type(value) is int and value >= 0 else None


def _placed(
    provider: str, reply: Mapping[str, object], count: int
) -> tuple[list[Mapping[str, object]], bool]:
    """Return the embeddings by their indices, and whether each bore its own.

    Where indices are there, the order in which the embeddings came proves nothing. An index that is
    missing or null is deduced where that leaves no doubt: where all are missing the order counts,
    and where one is, the place that is left (protocol buffers leave out 0: Google). Raises
    InvalidAnswer.
    """
    items = reply.get("data")
    if not isinstance(items, list) or not all(isinstance(item, dict) for item in items):
        raise InvalidAnswer(provider, "the answer holds no list of embeddings")
    if len(items) != count:
        raise InvalidAnswer(provider, f"{len(items)} embeddings for {count} inputs")
    numbered = [item for item in items if item.get("index") is not None]
    if not numbered:
        return items, False
    placed: dict[int | None, Mapping[str, object]] = {
        _whole(item["index"]): item for item in numbered
    }
    free = [place for place in range(count) if place not in placed]
    # Of each number one embedding, none beyond the last, and at most one place to be deduced.
    if len(placed) != len(numbered) or len(free) != count - len(numbered) or len(free) > 1:
        raise InvalidAnswer(provider, "the indices of the embeddings are no permutation")
    if free:
        placed[free[0]] = next(item for item in items if item.get("index") is None)
    return [placed[place] for place in range(count)], not free


def _well_formed(
    space: Space, items: Sequence[Mapping[str, object]], *, unit_norm: bool
) -> tuple[dict[int, Vector], dict[int, str]]:
    """Return the vectors that are good by themselves, and what is wrong with the others."""
    vectors: dict[int, Vector] = {}
    problems: dict[int, str] = {}
    for place, item in enumerate(items):
        try:
            numbers = vector.from_wire(item.get("embedding"))
            vector.check(numbers, space.dimensions or len(numbers) // 4, unit_norm=unit_norm)
        except vector.VectorError as error:
            problems[place] = f"embedding {place}: {error}"
        else:
            vectors[place] = numbers
    return vectors, problems


def _shared(inputs: Sequence[Input], vectors: Mapping[int, Vector]) -> dict[int, str]:
    """Return the places of vectors that came for several inputs, which differ, and say so.

    All of them are bad, also the first: whose vector it is, if anybody's, is not known.
    """
    shared = {
        place: f"embeddings {places[0]} and {places[1]} are one, of different inputs"
        for places in twins.find_duplicate_vectors(inputs, vectors)
        for place in places
    }
    return dict(sorted(shared.items()))


def _described(problems: Mapping[int, str]) -> str:
    """Say what is wrong with some vectors: the first few in words, the others by their number."""
    told = list(dict.fromkeys(problems[place] for place in sorted(problems)))
    more = len(told) - _MAX_NAMED
    text = "; ".join(told[:_MAX_NAMED])
    return f"{text}; and {more} more" if more > 0 else text
