"""Spans of time as people write them on a command line."""

import re

from embedding_proxy.proxy.config import ConfigError

_SECONDS = {"s": 1, "min": 60, "h": 3600, "d": 86_400, "w": 7 * 86_400}


def seconds(text: str, option: str) -> float:
    """Return the length of a span such as `90d`, in seconds. Raises ConfigError.

    >>> seconds("1.5h", "--older-than")
    5400.0
    """
    found = re.fullmatch(r"(\d{1,12}(?:\.\d{1,12})?)\s*([a-z]+)", text.strip())
    if not found or found[2] not in _SECONDS:
        raise ConfigError(f"{option}: expected a number and one of s, min, h, d, w, as in 90d")
    return float(found[1]) * _SECONDS[found[2]]


def before(now: float, text: str | None, option: str) -> float | None:
    """Return the moment a span ago; None without one. Raises ConfigError."""
    return None if text is None else max(0.0, now - seconds(text, option))
