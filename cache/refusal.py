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
    ProviderError,
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


class KeyRefused(InputRefused):
    """One input of a fill is refused; by its key, each who waits knows whether it is its own."""

    def __init__(self, refusal: InputRefused, key: Key) -> None:
        super().__init__(str(refusal))
        self.refusal = refusal
        self.key = key


def named(refusal: InputRefused, place: int, inputs: int) -> InputRefused:
    """Return a refusal that says which input of the client's it is about, if there are several."""
    if inputs == 1:
        return refusal.at(place)
    naming = refusal.at(place, f"{refusal} (input {place})")
    naming.param = naming.param or "input"
    return naming


def renamed(refusal: InputRefused, whole: Sequence[int], inputs: int) -> InputRefused:
    """Return a refusal as it reads in a larger request, whose inputs at `whole` were asked for."""
    if refusal.index is None:
        return refusal
    cause = refusal.__cause__
    bare = cause.refusal if isinstance(cause, KeyRefused) else refusal
    return named(bare, whole[refusal.index], inputs)


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
    if fill.credential != credential and isinstance(
        error, AllResting | ClientKeyRefused | ProviderError
    ):
        return True
    if isinstance(error, KeyRefused):
        return error.key not in wanted
    if isinstance(error, InputRefused):
        return not fill.keys <= set(wanted)
    if isinstance(error, DeadlineExceeded | UpstreamTimeout):
        now = asyncio.get_running_loop().time()
        return fill.deadline is not None and fill.deadline <= now + _TICK
    return False
