"""Growing waits after failures in a row: of the disk, of Qdrant, of an upstream."""

import time
from collections.abc import Callable

THRESHOLD = 3
"""Failures in a row that say more than one does."""
MIN_SECONDS = 1.0
MAX_SECONDS = 30.0


class Backoff:
    """A wait of `min_s` seconds after `threshold` failures in a row, doubled by each further one.

    No wait is longer than `max_s`. `clock` returns seconds.
    """

    def __init__(
        self,
        min_s: float | None = None,
        max_s: float | None = None,
        *,
        threshold: int = 1,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._min_s = MIN_SECONDS if min_s is None else min_s
        self._max_s = MAX_SECONDS if max_s is None else max_s
        self._threshold = threshold
        self._clock = clock
        self._until = 0.0
        self.failures = 0
        """In a row."""

    @property
    def is_waiting(self) -> bool:
        """Whether it is too early for another attempt."""
        return self.failures >= self._threshold and self._clock() < self._until

    def fail(self) -> float:
        """Note a failure; return the seconds until the next attempt."""
        self.failures += 1
        doublings = self.failures - self._threshold
        if doublings < 0:
            return 0.0
        wait = min(self._min_s * 2.0 ** min(doublings, 50), self._max_s)
        self._until = self._clock() + wait
        return wait

    def succeed(self) -> None:
        """Note a success: the next failure is the first in a row."""
        self.failures = 0
