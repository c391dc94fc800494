"""How many inputs go into one call: within what an upstream takes, and as pays to ask side by side.

Knows sizes and limits; asks nobody.
"""

from collections.abc import Sequence

from embedding_proxy.providers import tokens
from embedding_proxy.providers.base import Context, Input, Space
from embedding_proxy.providers.profile import Limits

MIN_INPUTS = 64
"""Inputs in a batch that is made for the sake of speed alone. Below it, what every call costs anew
(some 20 ms, and one of the requests that a rate limit counts) outweighs what is gained."""

MAX_INPUTS = 512
"""Inputs in a batch, unless calls are counted: a larger one is no quicker, and its answer of some
megabytes would hold up everybody else while it is read and kept."""

# Tokens that a model adds to each input (its first and last), which nobody's text shows.
_FRAME = 2
# No text of a size that matters has fewer bytes a token, in the tokenizers we know: prose has four,
# numbers digit by digit and rare scripts come near one in places.
_BYTES_A_TOKEN = 2


async def sizes(
    space: Space, inputs: Sequence[Input], limit: int | None, context: Context
) -> tuple[list[int], bool]:
    """Return the tokens of each input, and whether they were counted.

    They are counted where the model's tokenizer is known and all of them together could pass
    `limit`; else estimated, rather too many than too few.
    """
    if limit is None:
        return [0] * len(inputs), False
    # No token is shorter than a byte.
    bounds = [_estimate(item, bytes_a_token=1) for item in inputs]
    if sum(bounds) <= limit:
        return bounds, False
    if space.tokenizer is not None:
        return await tokens.count_inputs(inputs, space.tokenizer, context.counts), True
    return [_estimate(item, _BYTES_A_TOKEN) for item in inputs], False


def _estimate(item: Input, bytes_a_token: int) -> int:
    if not isinstance(item, str):
        return len(item) + _FRAME
    size = len(item) if item.isascii() else len(item.encode(errors="surrogatepass"))
    return -(-size // bytes_a_token) + _FRAME


def split(count: int, limits: Limits, sizes: Sequence[int]) -> list[range]:
    """Return the indices of `count` inputs in batches that the limits allow, as few as they allow.

    An input that is too large by itself is a batch of its own: the upstream will say so.

    >>> split(5, Limits(inputs=2), [0] * 5)
    [range(0, 2), range(2, 4), range(4, 5)]
    >>> split(5, Limits(tokens=10), [4, 6, 1, 12, 3])
    [range(0, 2), range(2, 3), range(3, 4), range(4, 5)]
    """
    max_inputs = balance(count, limits.inputs)
    batches: list[range] = []
    start = total = 0
    for index in range(count):
        size = sizes[index]
        is_over = limits.tokens is not None and total + size > limits.tokens
        if index > start and (index - start == max_inputs or is_over):
            batches.append(range(start, index))
            start, total = index, 0
        total += size
    batches.append(range(start, count))
    return batches


def balance(count: int, max_inputs: int) -> int:
    """Return the size of as few batches as there can be, all about equal.

    The largest batch is the one that is waited for.

    >>> balance(130, 64), balance(200, 64)
    (44, 50)
    """
    return -(-count // -(-count // max_inputs))


def share(count: int, limits: Limits, min_inputs: int = MIN_INPUTS) -> int:
    """Return the most inputs for a batch of `count`, so that it pays to ask for them side by side.

    That makes as many batches as may be under way at a time, but none below `min_inputs`, and no
    more than the upstream's rate allows in a second.

    >>> share(2000, Limits(concurrency=8))
    250
    >>> share(2000, Limits(concurrency=8, requests_per_minute=60))
    2000
    """
    lanes = limits.concurrency
    if limits.requests_per_minute is not None:
        lanes = min(lanes, max(1, int(limits.requests_per_minute // 60)))
    inputs = max(min_inputs, -(-count // lanes))
    if limits.requests_per_minute is None:
        inputs = min(inputs, max(min_inputs, MAX_INPUTS))
    return min(limits.inputs, inputs)
