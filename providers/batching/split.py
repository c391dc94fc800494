"""Cuts a call into parts that an upstream takes, each small enough to gain by going side by side.

Knows sizes and limits; asks nobody.
"""

from collections.abc import Sequence

from providers import tokens
from providers.base import Context, Input, Space
from providers.limits import Limits

LEAST = 64
"""Inputs in a part that is made for the sake of speed alone. Below it, what every call costs anew
(some 20 ms, and one of the requests that a rate limit counts) outweighs what is gained."""

MOST = 512
"""Inputs in a part, unless calls are counted: a larger one is no quicker, and its answer, megabytes
of it, would hold up everybody else while it is read and kept."""

# Tokens that a model adds to each input (its first and last), which nobody's text shows.
_FRAME = 2
# No text of a size that matters has fewer bytes a token, in the tokenizers we know: prose has four,
# numbers digit by digit and rare scripts come near one in places.
_BYTES_A_TOKEN = 2


async def sizes(
    space: Space, inputs: Sequence[Input], limit: int | None, context: Context
) -> list[int] | None:
    """Return the tokens of each input; None when together they cannot pass `limit`.

    They are counted where the model's tokenizer is known; else estimated, rather too many than too
    few.
    """
    if limit is None:
        return None
    # No token is shorter than a byte.
    if sum(_estimate(item, bytes_a_token=1) for item in inputs) <= limit:
        return None
    if space.tokenizer is not None:
        return await tokens.counted(inputs, space.tokenizer, context.counts)
    return [_estimate(item, _BYTES_A_TOKEN) for item in inputs]


def _estimate(item: Input, bytes_a_token: int) -> int:
    if not isinstance(item, str):
        return len(item) + _FRAME
    size = len(item) if item.isascii() else len(item.encode(errors="surrogatepass"))
    return -(-size // bytes_a_token) + _FRAME


def split(count: int, limits: Limits, sizes: Sequence[int] | None = None) -> list[range]:
    """Return the places of `count` inputs in parts that the limits allow, as few as they allow.

    An input that is too large by itself is a part of its own: the upstream will say so.

    >>> split(5, Limits(inputs=2))
    [range(0, 2), range(2, 4), range(4, 5)]
    >>> split(5, Limits(tokens=10), [4, 6, 1, 12, 3])
    [range(0, 2), range(2, 3), range(3, 4), range(4, 5)]
    """
    # As even as can be: the largest part is the one that is waited for.
    pieces = -(-count // limits.inputs)
    most = -(-count // pieces)
    parts: list[range] = []
    start = total = 0
    for place in range(count):
        size = sizes[place] if sizes is not None else 0
        over = limits.tokens is not None and total + size > limits.tokens
        if place > start and (place - start == most or over):
            parts.append(range(start, place))
            start, total = place, 0
        total += size
    parts.append(range(start, count))
    return parts


def side_by_side(count: int, limits: Limits, least: int = LEAST) -> Limits:
    """Return limits that cut `count` inputs into as many parts as it pays to ask for at once.

    That is as many as may be in the air, but none below `least` inputs, and no more at once than
    the upstream's rate allows in a second.

    >>> side_by_side(2000, Limits(concurrency=8)).inputs
    250
    >>> side_by_side(2000, Limits(concurrency=8, requests_per_minute=60)).inputs
    2000
    """
    lanes = limits.concurrency
    if limits.requests_per_minute is not None:
        lanes = min(lanes, max(1, limits.requests_per_minute // 60))
    share = max(least, -(-count // lanes))
    if limits.requests_per_minute is None:
        share = min(share, max(least, MOST))
    return Limits(min(limits.inputs, share), limits.tokens, limits.concurrency)


def halves(places: range) -> tuple[range, range]:
    """Return the two halves of more than one place.

    >>> halves(range(3, 6))
    (range(3, 4), range(4, 6))
    """
    middle = len(places) // 2
    return places[:middle], places[middle:]
