"""Reads when a rate limit ends where no Retry-After says so (OpenAI's x-ratelimit headers)."""

from collections.abc import Mapping

from providers.routing.throttle import duration

_LONGEST = 2 * 86_400.0
"""Seconds; a larger number is a point in time rather than a wait."""
_LIMITS = ("requests", "tokens")


def reset_after(headers: Mapping[str, str], kind: object) -> float | None:
    """Return the seconds until the limit that was hit is whole again, or None.

    Which one it was is told by the error's type (`requests`, `tokens`), else by what remains; if
    neither tells, it is the one that takes longer.
    """
    waits = {
        limit: seconds
        for limit in _LIMITS
        if (value := headers.get(f"x-ratelimit-reset-{limit}")) is not None
        and (seconds := duration(value)) is not None
        and seconds <= _LONGEST
    }
    if kind in waits:
        return waits[str(kind)]
    spent = [
        seconds
        for limit, seconds in waits.items()
        if headers.get(f"x-ratelimit-remaining-{limit}") == "0"
    ]
    return max(spent or waits.values(), default=None)
