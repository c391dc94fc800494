"""Reads the body of a 2xx reply: vectors that passed every check, or an error.

Pure: bytes in, values out. These are all the checks between an upstream and the cache. No unchecked
vector leaves this module. `error_reply` reads the replies that are errors.
"""

import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from embedding_proxy.providers import vector
from embedding_proxy.providers.base import Input, Space, Vector
from embedding_proxy.providers.charge import MAX_NANODOLLARS, NANO, Charge
from embedding_proxy.providers.errors import InvalidAnswer, MalformedResponse, ProviderError

from . import duplicate_vectors, error_reply

_MAX_USD = MAX_NANODOLLARS / NANO
_MAX_TOKENS = 1 << 31
"""A larger total is not a token count, and is ignored."""
_WHOLE = re.compile(r"0|[1-9]\d{0,9}", re.ASCII)
_MAX_WHOLE = float(1 << 53)
_MAX_NAMED = 3
"""Bad vectors that an error describes; of the others it gives the number."""


class CheckedReply(NamedTuple):
    """The checked content of a reply.

    Of n inputs, `indices` and `problems` name each exactly once, and there is at least one good
    one.
    """

    vectors: list[Vector]
    """The good vectors, in the order of their inputs."""
    indices: Sequence[int]
    """The indices of their inputs in the call, ascending: 0…n-1 if all are good."""
    problems: Mapping[int, str]
    """What is wrong with each of the other vectors, by the index of its input."""
    charge: Charge | None
    """What the upstream charged for all inputs; None if it does not say."""
    model: str | None
    """The model that the upstream names; None if it names none."""
    is_numbered: bool
    """Whether each embedding had its index; else the missing ones were deduced."""


def read(  # noqa: PLR0913 - who was asked what, and what came back
    provider: str,
    space: Space,
    inputs: Sequence[Input],
    headers: Mapping[str, str],
    body: bytes,
    *,
    status: int = 200,
    unit_norm: bool = False,
    model: str = "",
    redact: error_reply.Redact = error_reply.redact_nothing,
    hide: error_reply.Redact = error_reply.redact_nothing,
    url: str = "",
) -> CheckedReply:
    """Return the checked content of a reply with status 2xx.

    A vector is good if it has the width of the space (where that is known), is finite and not zero,
    has length 1 if `unit_norm`, and is not also the vector of a different input.

    Raises MalformedResponse for a body that is not a JSON object. Raises InvalidAnswer unless there
    is exactly one embedding for each input, the indices are a permutation or can be deduced, and at
    least one vector is good. Raises the error that the reply holds, if it holds one (OpenRouter,
    vLLM). `model` is the one that was asked for. `redact` and `hide` are those of
    `error_reply.refusal`. The `charge` of these errors is what the reply says that it cost.
    """
    try:
        reply = error_reply.parse_json(body)
    except ValueError as error:
        raise MalformedResponse(provider, _describe_non_json(body, status, redact, hide)) from error
    if error_reply.is_error(reply):
        failure = error_reply.refusal(
            provider, status, headers, body, redact=redact, hide=hide, url=url
        )
        if isinstance(failure, ProviderError) and isinstance(reply, dict):
            failure.charge = _parse_charge(reply.get("usage"))
        raise failure
    if not isinstance(reply, dict):
        raise MalformedResponse(provider, "the answer is not a JSON object")
    charge = _parse_charge(reply.get("usage"))
    try:
        items, is_numbered = _order_by_index(provider, reply, len(inputs))
        vectors, problems = _validate_vectors(space, items, unit_norm=unit_norm)
        shared = _find_shared_vectors(inputs, vectors, duplicate_vectors.exact_tokenizer(space))
        vectors = {index: numbers for index, numbers in vectors.items() if index not in shared}
        problems |= shared
        if not vectors:
            bad = InvalidAnswer(provider, problems[min(problems)])
            bad.indices = tuple(shared) if len(shared) == len(inputs) else ()
            raise bad
    except InvalidAnswer as error:
        error.charge = charge
        raise
    name = reply.get("model")
    if name != model:
        name = redact(name) if isinstance(name, str) else None
    indices = sorted(vectors)
    return CheckedReply(
        vectors=[vectors[index] for index in indices],
        indices=indices,
        problems=dict(sorted(problems.items())),
        charge=charge,
        model=name or None,
        is_numbered=is_numbered,
    )


def bad_vectors(provider: str, answer: CheckedReply) -> InvalidAnswer:
    """Return the error for those inputs of an answer whose vectors are bad."""
    error = InvalidAnswer(provider, _describe_problems(answer.problems))
    error.indices = tuple(answer.problems)
    error.index = error.indices[0]
    return error


def _describe_non_json(
    body: bytes, status: int, redact: error_reply.Redact, hide: error_reply.Redact
) -> str:
    """Say why a body is not JSON, as far as the body tells."""
    if not body.strip():
        return f"the answer is empty (status {status}), not JSON"
    reason = error_reply.parse_reason(body, redact)
    return "the answer is not JSON" if reason is None else f"the answer is not JSON: {hide(reason)}"


def _parse_charge(usage: object) -> Charge | None:
    """Return what a reply was charged: tokens (some upstreams send only the total), or also USD.

    Only OpenRouter sends USD. A usage of 0 tokens counts as missing: LM Studio always sends 0.
    """
    if not isinstance(usage, dict):
        return None
    fields = (
        _parse_whole_number(usage.get("prompt_tokens")),
        _parse_whole_number(usage.get("total_tokens")),
    )
    tokens = next((n for n in fields if n is not None and 0 < n <= _MAX_TOKENS), None)
    cost = usage.get("cost")
    if isinstance(cost, bool) or not isinstance(cost, int | float) or not 0 <= cost <= _MAX_USD:
        return None if tokens is None else Charge(tokens)
    return Charge(tokens, round(cost * NANO))


def _parse_whole_number(value: object) -> int | None:
    """Return a whole number from 0, written as 1, 1.0 or "1"; else None.

    >>> [_parse_whole_number(value) for value in (1, 1.0, "1", True, "01", -1, 0.5)]
    [1, 1, 1, None, None, None, None]
    """
    if isinstance(value, str):
        return int(value) if _WHOLE.fullmatch(value) else None
    if isinstance(value, float):
        return int(value) if 0 <= value <= _MAX_WHOLE and value.is_integer() else None
    return value if type(value) is int and value >= 0 else None


def _order_by_index(
    provider: str, reply: Mapping[str, object], count: int
) -> tuple[list[Mapping[str, object]], bool]:
    """Return the embeddings in the order of their inputs, and whether each had its index.

    Where indices are given, they alone decide. Where all are missing or null, the order of the
    embeddings decides. Where one is missing, it is the one that is left: Google leaves out index 0,
    as protocol buffers do. Raises InvalidAnswer.
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
        _parse_whole_number(item["index"]): item for item in numbered
    }
    free = [index for index in range(count) if index not in placed]
    # No index twice, none beyond the last, and at most one to be deduced.
    if len(placed) != len(numbered) or len(free) != count - len(numbered) or len(free) > 1:
        raise InvalidAnswer(provider, "the indices of the embeddings are no permutation")
    if free:
        placed[free[0]] = next(item for item in items if item.get("index") is None)
    return [placed[index] for index in range(count)], not free


def _validate_vectors(
    space: Space, items: Sequence[Mapping[str, object]], *, unit_norm: bool
) -> tuple[dict[int, Vector], dict[int, str]]:
    """Return the vectors that are good by themselves, and the problem of each other one."""
    vectors: dict[int, Vector] = {}
    problems: dict[int, str] = {}
    for index, item in enumerate(items):
        try:
            numbers = vector.from_wire(item.get("embedding"))
            vector.check(numbers, space.dimensions or len(numbers) // 4, unit_norm=unit_norm)
        except vector.VectorError as error:
            which = f"embedding {index}: " if len(items) > 1 else ""
            problems[index] = f"{which}{error}"
        else:
            vectors[index] = numbers
    return vectors, problems


def _find_shared_vectors(
    inputs: Sequence[Input], vectors: Mapping[int, Vector], tokenizer: str | None
) -> dict[int, str]:
    """Return the problem of each vector that is also the vector of a different input, by index.

    All of these are bad, the first one too: nothing tells which input the vector belongs to.
    """
    shared = {
        index: f"embeddings {indices[0]} and {indices[1]} are one, of different inputs"
        for indices in duplicate_vectors.find_duplicate_vectors(inputs, vectors, tokenizer)
        for index in indices
    }
    return dict(sorted(shared.items()))


def _describe_problems(problems: Mapping[int, str]) -> str:
    """Describe the first few problems, and give the number of the others."""
    descriptions = list(dict.fromkeys(problems[index] for index in sorted(problems)))
    more = len(descriptions) - _MAX_NAMED
    text = "; ".join(descriptions[:_MAX_NAMED])
    return f"{text}; and {more} more" if more > 0 else text
