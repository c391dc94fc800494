"""Leaving alone what keeps failing, and trying it again in a while."""

import time
from collections.abc import Callable

FAILURES_IN_A_ROW = 3
SHORTEST_SECONDS = 1.0
LONGEST_SECONDS = 30.0


class Rest:
    """After some failures in a row a rest of a second, then twice as long each time, up to 30."""

    def __init__(
        self, clock: Callable[[], float] = time.monotonic, *, failures: int = FAILURES_IN_A_ROW
    ) -> None:
        """`failures` is after how many there is a rest."""
        self._clock = clock
        self._most = failures
        self._failures = 0
        self._until = 0.0

    @property
    def resting(self) -> bool:
        """Whether it is still too early for another try."""
        return self._failures >= self._most and self._clock() < self._until

    def failed(self) -> None:
        """Note a failure."""
        self._failures += 1
        doublings = min(self._failures - self._most, 10)
        if doublings >= 0:
            self._until = self._clock() + min(SHORTEST_SECONDS * 2**doublings, LONGEST_SECONDS)

    def succeeded(self) -> None:
        """Note that all is well."""
        self._failures = 0
