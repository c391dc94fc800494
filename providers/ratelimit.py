"""Reads when a rate limit ends where no Retry-After says so (OpenAI's x-ratelimit headers)."""

import re
from collections.abc import Mapping

_UNITS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86_400.0, "": 1.0}
_PART = re.compile(r"(\d{1,12}(?:\.\d{0,9})?)(ms|s|m|h|d|)", re.ASCII)
_WHOLE = re.compile(rf"(?:{_PART.pattern})+", re.ASCII)
_LONGEST = 2 * 86_400.0
"""Seconds; a larger number is a point in time rather than a wait."""
_LIMITS = ("requests", "tokens")


def duration(value: str) -> float | None:
    """Return the seconds of a duration such as `1s`, `6m0s`, `12ms` or `2.5`; None if it is none.

    >>> duration("6m0.5s")
    360.5
    """
    value = value.strip()
    if not _WHOLE.fullmatch(value):
        return None
    seconds = sum(float(number) * _UNITS[unit] for number, unit in _PART.findall(value))
    return seconds if seconds <= _LONGEST else None


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
    }
    if kind in waits:
        return waits[str(kind)]
    spent = [
        seconds
        for limit, seconds in waits.items()
        if headers.get(f"x-ratelimit-remaining-{limit}") == "0"
    ]
    return max(spent or waits.values(), default=None)
