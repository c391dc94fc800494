"""Tells what a refusal is about: the size of the call, one of its inputs, or all of them."""

import re
from typing import TypeGuard

from embedding_proxy.providers.errors import InvalidRequest, UpstreamError

_INPUT = re.compile(r"(\$\.)?input($|[.\[])")


_TOO_MANY = re.compile(
    r"batch[ _-]?size|in one batch|more batches|batch (is )?too (large|big|long)"
    r"|too many (inputs|texts|items|documents|elements)"
    r"|number of (inputs|texts|items|documents|elements)"
    r"|(at most|maximum of|up to|more than) \d+ (inputs|texts|items|documents|elements|requests)"
    r"|array too long|array with maximum length|batch of \d+",
    re.IGNORECASE,
)
"""How upstreams say that a call has too many inputs: DashScope, TEI, Gemini, Cohere, OpenAI,
Voyage, Mistral, and whatever is made with pydantic."""
_NUMBER = re.compile(r"(?<![\w.])\d{1,6}(?![\w])")
_MAX_MESSAGE = 1000


def is_about_size(failure: Exception) -> TypeGuard[InvalidRequest]:
    """Tell whether a call was refused as too large, which its parts may not be."""
    if not isinstance(failure, InvalidRequest):
        return False
    if failure.status == 413 or "max_tokens_per_request" in (failure.kind, failure.code):
        return True
    return _TOO_MANY.search(str(failure)[:_MAX_MESSAGE]) is not None


def is_quoted(failure: InvalidRequest, payload: bytes) -> bool:
    """Tell whether the words on the size of a call may be quoted from the call itself.

    `payload` is its body. What a client writes must teach no limit that holds for others.

    >>> is_quoted(InvalidRequest("bad input: 'batch size 1'"), b'{"input": ["Batch size 1"]}')
    True
    """
    match = _TOO_MANY.search(str(failure)[:_MAX_MESSAGE])
    return match is not None and match[0].lower().encode() in payload.lower()


def is_about_tokens(failure: InvalidRequest) -> bool:
    """Tell whether a refusal speaks of tokens: then it says nothing of the number of inputs."""
    return "token" in f"{failure.kind} {failure.code} {failure}"[:_MAX_MESSAGE].lower()


def named_batch_limit(failure: InvalidRequest, count: int) -> int | None:
    """Return the number of inputs that a refusal of so many names as the most; None for none.

    >>> named_batch_limit(InvalidRequest("batch size 33 > maximum allowed batch size 32"), 33)
    32
    """
    message = str(failure)[:_MAX_MESSAGE]
    if not _TOO_MANY.search(message):
        return None
    numbers = (int(number) for number in _NUMBER.findall(message))
    return max((number for number in numbers if 0 < number < count), default=None)


def is_about_an_input(failure: Exception) -> TypeGuard[InvalidRequest]:
    """Tell whether a call was refused for one of its inputs, and it is not said which."""
    if not isinstance(failure, InvalidRequest) or is_about_size(failure):
        return False
    return failure.index is None and not is_about_a_field(failure)


def is_internal_error(failure: Exception) -> bool:
    """Tell whether the upstream failed with 500, which one input may be the cause of."""
    if not isinstance(failure, UpstreamError) or failure.index is not None:
        return False
    return failure.refusal is not None and failure.refusal.status == 500


def is_about_a_field(failure: InvalidRequest) -> bool:
    """Tell whether what is refused is not the input: then it is refused with every input."""
    if failure.status not in (400, 403, 413, 422):
        return True
    return failure.param is not None and not _INPUT.match(failure.param)
