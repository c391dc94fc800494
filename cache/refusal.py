"""Inputs that get no vector: refused by a provider, or not to be bought. And whose fault it was."""

import asyncio
import math
from collections.abc import Collection, Sequence
from typing import Any

from providers.base import (
    AllResting,
    ClientKeyRefused,
    Credential,
    DeadlineExceeded,
    EmbeddingError,
    InputRefused,
    PermissionDenied,
    ProviderError,
    ScopedQuotaExceeded,
    Terms,
    UpstreamTimeout,
)

from .flight import Fill
from .key import Key

# Timers may go off early by as much, in seconds: uvloop's count whole milliseconds.
_TICK = 0.01


class NotCached(InputRefused):
    """Inputs are not in the cache, and for this request nothing is bought; `index` is the first's.

    `only-if-cached` gets the 504 that RFC 9111, 5.2.1.7, asks for. A frozen proxy answers 404, for
    no client tries that again: OpenAI's do so after 408, 409, 429 and 5xx unless they are told not
    to, and what is built around them does not always listen.
    """

    def __init__(self, terms: Terms, missing: Sequence[int], inputs: int) -> None:
        """`missing` are the places among so many inputs."""
        self.terms = terms
        self.missing = missing
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


class KeyFailed(EmbeddingError):
    """A fill failed because of one input; by its key, each who waits knows if it is its own."""

    def __init__(self, failure: EmbeddingError, key: Key) -> None:
        super().__init__(str(failure))
        self.failure = failure
        self.key = key


def named(failure: EmbeddingError, place: int, inputs: int) -> EmbeddingError:
    """Return a failure that says which input of the client's it is about, if there are several."""
    if inputs == 1:
        return failure.at(place)
    naming = failure.at(place, f"{failure} (input {place})")
    if naming.param is None or naming.param.startswith("input"):
        # The upstream's own place, `input[0]`, is that in a call of ours.
        naming.param = "input"
    return naming


def renamed(failure: EmbeddingError, whole: Sequence[int], inputs: int) -> EmbeddingError:
    """Return a failure as it reads in a larger request, whose inputs at `whole` were asked for."""
    if failure.index is None:
        return failure
    cause = failure.__cause__
    bare = cause.failure if isinstance(cause, KeyFailed) else failure
    return named(bare, whole[failure.index], inputs)


def is_the_leaders_own(
    error: EmbeddingError,
    fill: Fill[Any],
    wanted: Collection[Key],
    credential: Credential | None = None,
) -> bool:
    """Tell whether a fill failed for a reason that need not hold for one who joined it.

    What was refused may be another's input that was bought along; or the leader's time was up; or
    its own key is refused, or has used up its limits. `credential` is that of who joined.
    """
    failure = error.failure if isinstance(error, KeyFailed) else error
    if fill.credential != credential and isinstance(
        failure, AllResting | ClientKeyRefused | ProviderError
    ):
        return True
    if isinstance(error, KeyFailed):
        return error.key not in wanted
    if isinstance(error, InputRefused | PermissionDenied | ScopedQuotaExceeded):
        return not fill.keys <= set(wanted)
    if fill.abandoned:
        # It was joined after everybody had gone, and was not asked for again when it failed.
        return True
    if isinstance(error, DeadlineExceeded | UpstreamTimeout):
        now = asyncio.get_running_loop().time()
        return fill.deadline is not None and fill.deadline <= now + _TICK
    return False
