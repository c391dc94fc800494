"""Retry-After: how long an upstream asks to be left alone, and what the proxy does about it.

1. `seconds_until`, here, reads every wait, whether a header or an error body holds it. The reading
   is pure: text and the present time in, bounded numbers out. No result is negative, NaN or
   infinite; no wait exceeds MAX_TOLD_WAIT, and none that the proxy itself keeps exceeds MAX_WAIT.
2. The input whose call has failed: `routing.policy` decides whether it waits for that time, or goes
   to the next route (`next_step`, `_retry_wait`).
3. All others, after a rate limit: `routing.health` begins one of the `Cooldowns` kept here.
   Until its end no call is made for the model, or for the client's key. Where an upstream names no
   time, the cooldown doubles each time that the next call meets the limit again. Calls that queue
   for the provider wait as well (`rate_limiter`: `pause`).
4. The client, if its request fails: `client_wait` bounds what it is told.
"""

import re
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime

from embedding_proxy.providers.lru_cache import LRUCache

MAX_WAIT = 3600.0
"""Seconds. No header makes the proxy wait longer: after that time the upstream is asked again."""
MAX_TOLD_WAIT = 86_400.0
"""Seconds. No client is told to wait longer."""

PROBE_COOLDOWN_S = 1.0
"""At least, after a probe that met a rate limit: it proved nothing."""
FIRST_COOLDOWN = 0.2
MAX_COOLDOWN = 60.0
"""Seconds of cooldown after a rate limit that names no time: doubled each time that the next call
meets it again, up to the second."""
MAX_LIMITS_IN_A_ROW = 20

_UNITS = {
    "d": 86_400.0,
    "h": 3600.0,
    "m": 60.0,
    "s": 1.0,
    "ms": 1e-3,
    "us": 1e-6,
    "µs": 1e-6,
    "ns": 1e-9,
}
_PART = re.compile(r"(\d{1,9}(?:\.\d{1,9})?)(ms|us|µs|ns|[dhms])")
_DURATION = re.compile(r"(?:\d{1,9}(?:\.\d{1,9})?(?:ms|us|µs|ns|[dhms])){1,7}", re.ASCII)
_NUMBER = re.compile(r"\d{1,20}(?:\.\d{1,12})?", re.ASCII)
_QUANTITY = re.compile(r"\d{1,15}(?:\.\d{1,9})?", re.ASCII)
_ISO_DATE = re.compile(r"\d{4}-\d\d-\d\d[T ]\d\d:", re.ASCII)
_MAX_LENGTH = 64
"""Characters of a header value that is read."""

_MIN_EPOCH = 1e8
"""A larger number is a point in time, not a duration: seconds since 1970, or a fraction of them."""
_EPOCH_UNITS = ((1e11, 1.0), (1e14, 1e3), (1e17, 1e6), (1e20, 1e9))
"""Below each bound, how many of the number's units one second has: s, ms, µs, ns."""

_LIMITS = ("requests", "tokens")
_RESETS = ("x-ratelimit-reset", "ratelimit-reset")
"""How the names of all headers begin that say when a limit is whole again. By themselves, without
the kind of limit, they are of upstreams that have only one."""


def seconds_until(text: str, now: float) -> float | None:
    """Return the seconds until a wait is over, 0…MAX_TOLD_WAIT; None if the text says no time.

    Reads seconds (`1.5`), durations (`6m0s`, `12ms`), and points in time: seconds, milliseconds,
    microseconds or nanoseconds since 1970, ISO 8601, HTTP dates (RFC 9110). A point in the past is
    a wait of 0. `now` is the present time in seconds since 1970.

    >>> seconds_until("6m0s", 0.0), seconds_until("1772366430", 1772366400.0)
    (360.0, 30.0)
    >>> seconds_until("9999h", 0.0), seconds_until("soon", 0.0), seconds_until("-1", 0.0)
    (86400.0, None, None)
    """
    text = text.strip()
    if not text or len(text) > _MAX_LENGTH:
        return None
    if _NUMBER.fullmatch(text):
        seconds = _seconds_of(float(text), now)
    elif _DURATION.fullmatch(text):
        seconds = sum(float(number) * _UNITS[unit] for number, unit in _PART.findall(text))
    else:
        instant = _instant(text)
        if instant is None:
            return None
        seconds = instant - now
    return min(max(seconds, 0.0), MAX_TOLD_WAIT)


_FIRST_INSTANT = 1_262_304_000.0
"""2010, in seconds since 1970; a number that would be an earlier point in time is none."""


def _seconds_of(number: float, now: float) -> float:
    """Return the seconds that a bare number stands for."""
    if number < _MIN_EPOCH:
        return number
    scale = next((scale for bound, scale in _EPOCH_UNITS if number < bound), None)
    if scale is None:
        return MAX_TOLD_WAIT
    instant = number / scale
    # No upstream is that far behind: it is an absurdly long wait.
    return MAX_TOLD_WAIT if instant < _FIRST_INSTANT else instant - now


def _instant(text: str) -> float | None:
    """Return a date as seconds since 1970, or None; a date without a zone is one of UTC."""
    try:
        if _ISO_DATE.match(text):
            date = datetime.fromisoformat(text)
        else:
            date = parsedate_to_datetime(text)
        date = date if date.tzinfo else date.replace(tzinfo=UTC)
        return date.timestamp()
    except (ValueError, OverflowError, TypeError, IndexError):
        return None


def quantity(text: str) -> float | None:
    """Return a number of requests or tokens, or None if the text is no such number.

    >>> quantity("500"), quantity("-1"), quantity("500, 500;w=60"), quantity("nan")
    (500.0, None, None, None)
    """
    if not text:
        return None
    text = text.strip()
    return float(text) if _QUANTITY.fullmatch(text) else None


def retry_after(headers: Mapping[str, str], now: float) -> float | None:
    """Return the seconds that a reply asks to wait by `retry-after-ms` or `Retry-After`, or None.

    `retry-after-ms` (OpenAI) is read first, and is a number of milliseconds.

    >>> retry_after({"retry-after-ms": "250", "Retry-After": "9"}, 0.0)
    0.25
    """
    milliseconds = quantity(headers.get("retry-after-ms", ""))
    if milliseconds is not None:
        return min(milliseconds / 1000, MAX_TOLD_WAIT)
    return seconds_until(headers.get("Retry-After", ""), now)


def client_wait(seconds: float) -> float:
    """Return a wait as a client may be told it: 0…MAX_TOLD_WAIT, whatever the number is.

    >>> client_wait(7.5), client_wait(1e308), client_wait(-1.0), client_wait(float("nan"))
    (7.5, 86400.0, 0.0, 86400.0)
    """
    return max(seconds, 0.0) if seconds <= MAX_TOLD_WAIT else MAX_TOLD_WAIT


def client_header(name: str, value: str, now: float) -> str | None:
    """Return a header of a reply that is passed on; None for a wait that no client should read.

    `name` is in lower case. A wait beyond MAX_TOLD_WAIT is replaced by that; other headers, and
    waits within it, stay as they are.

    >>> client_header("retry-after", "1e308", 0.0), client_header("retry-after", "9999999", 0.0)
    (None, '86400')
    """
    if name == "retry-after-ms":
        milliseconds = quantity(value)
        wait = None if milliseconds is None else milliseconds / 1000
    elif name == "retry-after" or name.startswith(_RESETS):
        wait = seconds_until(value, now)
    else:
        return value
    if wait is None:
        return None
    unit = 1000 if name == "retry-after-ms" else 1
    return value if wait < MAX_TOLD_WAIT else f"{MAX_TOLD_WAIT * unit:.0f}"


def reset_after(headers: Mapping[str, str], kind: object, now: float) -> float | None:
    """Return the seconds until the rate limit that was hit is whole again, or None.

    `kind` is the error's type. If it names a limit (`requests`, `tokens`), that one counts; else
    those of which nothing remains; else all. Of several the longest wait is returned.
    """
    waits = {
        limit: seconds
        for limit in _LIMITS
        if (seconds := seconds_until(headers.get(f"x-ratelimit-reset-{limit}", ""), now))
        is not None
    }
    if not waits:
        shared = (seconds_until(headers.get(name, ""), now) for name in _RESETS)
        return next((seconds for seconds in shared if seconds is not None), None)
    if kind in waits:
        return waits[str(kind)]
    spent = [
        seconds
        for limit, seconds in waits.items()
        if quantity(headers.get(f"x-ratelimit-remaining-{limit}", "")) == 0
    ]
    return max(spent or waits.values())


class Cooldowns:
    """The cooldowns of one provider, of at most `max_keys` models and keys. For one thread."""

    def __init__(self, max_keys: int, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._until = LRUCache[str, float](max_keys)
        """Until when a key is left alone."""
        self._limits = LRUCache[str, int](max_keys)
        """How often in a row a key was rate limited, counting once for each cooldown."""

    def __len__(self) -> int:
        return len(self._until)

    def rest(self, key: str) -> float:
        """Return the seconds that are left of a cooldown."""
        until = self._until.peek(key) if self._until else None
        return 0.0 if until is None else max(until - self._clock(), 0.0)

    def waits(self) -> dict[str, float]:
        """Return the seconds that are left, by key, of those that have some."""
        return {key: round(seconds, 3) for key in self._until if (seconds := self.rest(key))}

    def is_limited(self, key: str) -> bool:
        """Tell whether the last call met a rate limit."""
        return self._limits.peek(key) is not None

    def succeeded(self, key: str) -> None:
        """Note a good answer."""
        if self._limits:
            self._limits.pop(key)

    def begin(self, key: str, wait: float | None, min_wait: float) -> None:
        """Begin a cooldown: as long as was asked for, else longer each time in a row."""
        # Looked at once: a cooldown may end between two looks.
        is_cooling = self.rest(key) > 0
        limits = self._limits.peek(key) or 0
        if not is_cooling:
            # Calls that were under way together meet one limit once.
            limits = self._limits[key] = min(limits + 1, MAX_LIMITS_IN_A_ROW)
        if not wait:
            if is_cooling:
                return
            wait = min(FIRST_COOLDOWN * 2 ** (limits - 1), MAX_COOLDOWN)
            wait = max(wait, min_wait)
        until = self._clock() + min(wait, MAX_WAIT)
        self._until[key] = max(self._until.peek(key) or until, until)
