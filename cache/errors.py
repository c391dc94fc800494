"""Errors of the cache: what may not be bought, and inputs that a provider rejects."""

import math
from collections.abc import Sequence

from embedding_proxy.providers.base import CachePolicy
from embedding_proxy.providers.errors import EmbeddingError, InvalidRequest

_UNNAMED = "unnamed"
"""Where a failure that names an input keeps the one that does not."""


class NotCached(InvalidRequest):
    """Inputs are not in the cache, and for this request nothing is bought; `index` is the first's.

    `only-if-cached` gets the 504 that RFC 9111, 5.2.1.7, asks for. A frozen proxy answers 404, for
    no client tries that again: OpenAI's do so after 408, 409, 429 and 5xx unless they are told not
    to, and what is built around them does not always listen.
    """

    def __init__(self, terms: CachePolicy, missing: Sequence[int], inputs: int) -> None:
        """`missing` are the indices of some of so many inputs."""
        count = f"{len(missing)} of {inputs} inputs {'is' if len(missing) == 1 else 'are'}"
        where = "in the cache" if terms.max_age == math.inf else "cached as newly as is asked for"
        which = f"input {missing[0]}" if len(missing) == 1 else f"the first is input {missing[0]}"
        why = (
            "the request says only-if-cached"
            if terms.only_if_cached
            else "cache.mode is frozen; ask once in the mode normal to have them cached"
        )
        super().__init__(
            f"{count} not {where} ({which}), and nothing is bought: {why}.",
            status=504 if terms.only_if_cached else 404,
            param="input",
            code="not_cached",
            index=missing[0],
        )


class BudgetExceeded(InvalidRequest):
    """The client has spent its budget, so nothing is bought for it. It says nothing of others."""

    def __init__(self, message: str) -> None:
        code = "insufficient_quota"
        super().__init__(message, status=429, kind=code, code=code)


def name_input(failure: EmbeddingError, index: int, inputs: int) -> EmbeddingError:
    """Return a failure that says which input of the client's it is about, if there are several.

    What was named in a part of a request is named anew.
    """
    bare: EmbeddingError = vars(failure).get(_UNNAMED, failure)
    if inputs == 1:
        return bare.with_index(index)
    named = bare.with_index(index, f"{bare} (input {index})")
    vars(named)[_UNNAMED] = bare
    if named.param is None or named.param.startswith("input"):
        # The upstream's own index, `input[0]`, is that in a call of ours.
        named.param = "input"
    return named
