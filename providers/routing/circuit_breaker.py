"""A circuit breaker: whether calls go through now. A state machine over a clock, without I/O.

Closed, calls go through. It opens after MAX_FAILURES failures in a row, or when FAILURE_SHARE of at
least MIN_CALLS calls within WINDOW_S failed. While it is open nothing goes through. Then it is
half-open: one call goes through as the probe; its success closes the breaker, its failure opens it
for twice as long as before. A call that began before the last change of state says nothing about
now, and is not counted.
"""

import enum
import random
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

MAX_FAILURES = 5
MIN_CALLS = 10
FAILURE_SHARE = 0.5
WINDOW_S = 30.0
FIRST_OPEN_S = 1.0
"""Doubled by each probe that fails."""
MAX_OPEN_S = 300.0
PROBE_WAIT_S = 1.0
"""What is told to those who come while a probe is under way."""
JITTER = 0.2
"""The part of a time that chance may take off, so that many proxies do not probe together."""


class State(enum.StrEnum):
    """Whether calls go through."""

    CLOSED = "closed"
    OPEN = "open"
    HALF_OPEN = "half-open"


class Verdict(enum.Enum):
    """What a call says about its provider."""

    SUCCESS = "success"
    FAILURE = "failure"
    NONE = "none"
    """Nothing: it was cancelled, or the call was refused and not the service at fault."""


@dataclass(frozen=True, eq=False, slots=True)
class Permit:
    """The right to make one call; given back by `release`, whatever becomes of the call."""

    era: int
    is_probe: bool


class CircuitBreaker:
    """The breaker of a provider, or of a model at a provider.

    `clock` gives seconds, `chance` a number in [0, 1).
    """

    def __init__(
        self, clock: Callable[[], float], chance: Callable[[], float] = random.random
    ) -> None:
        self._clock = clock
        self._chance = chance
        self._era = 0
        self._is_open = False
        self._until = 0.0
        self._open_s = 0.0
        self._probe: Permit | None = None
        self._recent: deque[tuple[float, bool]] = deque()
        self.failures = 0
        """Failures since the last success."""
        self.times_opened = 0
        self.reason = ""
        """Why it opened last, for people."""

    @property
    def state(self) -> State:
        """The state at this moment."""
        if not self._is_open:
            return State.CLOSED
        return State.OPEN if self._clock() < self._until else State.HALF_OPEN

    @property
    def wait_s(self) -> float:
        """Seconds until a call may go through; 0 when one may now."""
        seconds = self._until - self._clock() if self._is_open else 0.0
        return max(seconds, 0.0 if self._probe is None else PROBE_WAIT_S)

    @property
    def is_ready(self) -> bool:
        """Whether `acquire` would give a permit."""
        return not self._is_open or (self._probe is None and self._clock() >= self._until)

    def acquire(self) -> Permit | None:
        """Return the permit for one call, or None when none may be made now."""
        if self._is_open and not self.is_ready:
            return None
        permit = Permit(self._era, is_probe=self._is_open)
        if permit.is_probe:
            self._probe = permit
        return permit

    def release(self, permit: Permit, verdict: Verdict) -> None:
        """Note how a call ended. A probe without a verdict leaves its place to another."""
        if permit.era != self._era:
            return
        if permit.is_probe:
            self._probe = None
            if verdict is Verdict.SUCCESS:
                self._close()
            elif verdict is Verdict.FAILURE:
                self.failures += 1
                self._open(self._next_open_s(), "its probe failed")
        elif verdict is not Verdict.NONE:
            self._count(is_success=verdict is Verdict.SUCCESS)

    def record_failure(self) -> None:
        """Count a failure whose permit was released before it was known to be one."""
        if not self._is_open:
            self._count(is_success=False)

    def open(self, permit: Permit, seconds: float, reason: str) -> None:
        """Open for so long because of a call; then one probe decides. Releases the permit."""
        if permit.era == self._era:
            self._open(seconds, reason)

    def _count(self, *, is_success: bool) -> None:
        now = self._clock()
        self._recent.append((now, is_success))
        while self._recent[0][0] <= now - WINDOW_S:
            self._recent.popleft()
        if is_success:
            self.failures = 0
            return
        self.failures += 1
        failed = sum(not is_good for _, is_good in self._recent)
        if self.failures >= MAX_FAILURES:
            self._open(self._next_open_s(), f"it failed {self.failures} times in a row")
        elif len(self._recent) >= MIN_CALLS and failed >= FAILURE_SHARE * len(self._recent):
            self._open(
                self._next_open_s(), f"{failed} of its last {len(self._recent)} calls failed"
            )

    def _next_open_s(self) -> float:
        self._open_s = min(self._open_s * 2 or FIRST_OPEN_S, MAX_OPEN_S)
        return self._open_s * (1 - JITTER * self._chance())

    def _open(self, seconds: float, reason: str) -> None:
        self._change(is_open=True, reason=reason)
        self._until = self._clock() + seconds
        self.times_opened += 1

    def _close(self) -> None:
        self._change(is_open=False, reason="")
        self._open_s = 0.0
        self.failures = 0

    def _change(self, *, is_open: bool, reason: str) -> None:
        self._era += 1
        self._is_open = is_open
        self._probe = None
        self._recent.clear()
        self.reason = reason
