"""Cooldowns: how long a model, or a client's key for it, is left alone after a rate limit.

An upstream says how long by `Retry-After` and other headers, which
`upstream.rate_limit_headers` reads; here that is obeyed. Where it says nothing, the cooldown
doubles each time that the next call meets the limit again.
"""

from collections.abc import Callable

from embedding_proxy.providers.lru_cache import LRUCache

MAX_COOLDOWN_TOLD_S = 3600.0
"""An upstream that names next year is asked again within the hour."""
PROBE_COOLDOWN_S = 1.0
"""At least, after a probe that met a rate limit: it proved nothing."""
FIRST_COOLDOWN = 0.2
MAX_COOLDOWN = 60.0
"""Seconds of cooldown after a rate limit that names no time: doubled each time that the next call
meets it again, up to the second."""
MAX_LIMITS_IN_A_ROW = 20


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

    def left(self) -> dict[str, float]:
        """Return the seconds that are left, by key, of those that have some."""
        return {key: round(left, 3) for key in self._until if (left := self.rest(key))}

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
        until = self._clock() + min(wait, MAX_COOLDOWN_TOLD_S)
        self._until[key] = max(self._until.peek(key) or until, until)
