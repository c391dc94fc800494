"""Whether a provider may be asked now: a state machine over a clock. Knows no error and no HTTP.

Closed, calls go through. The breaker opens after `IN_A_ROW` failures in a row, or when half of at
least `FEWEST` calls within `WINDOW` seconds failed. While it is open nothing goes through. Then it
is half-open: one call goes through as the probe; its success closes the breaker, its failure opens
it for twice as long as before. A call that began before the breaker last moved says nothing about
now, and is not counted.
"""

import enum
import random
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

IN_A_ROW = 5
FEWEST = 10
SHARE = 0.5
WINDOW = 30.0
FIRST_OPEN = 1.0
"""Seconds; doubled by each probe that fails."""
LONGEST_OPEN = 300.0
PROBE_WAIT = 1.0
"""Seconds to name to those who come while a probe is under way."""
JITTER = 0.2
"""The part of an opening that chance may take off, so that many proxies do not probe together."""


class State(enum.StrEnum):
    """What a provider is to those who want to ask it."""

    CLOSED = "closed"
    OPEN = "open"
    HALF_OPEN = "half-open"


class Verdict(enum.Enum):
    """What a call says about its provider."""

    GOOD = "good"
    BAD = "bad"
    NONE = "none"
    """Nothing: it was cancelled, or what was refused was the call and not the service."""


@dataclass(frozen=True, eq=False, slots=True)
class Permit:
    """The right to make one call; given back with `leave`, whatever becomes of it."""

    era: int
    probe: bool


class Breaker:
    """The breaker of one provider, or of one scope of it.

    `clock` gives seconds, `chance` a number in [0, 1).
    """

    def __init__(
        self, clock: Callable[[], float], chance: Callable[[], float] = random.random
    ) -> None:
        self._clock = clock
        self._chance = chance
        self._era = 0
        self._open = False
        self._until = 0.0
        self._length = 0.0
        self._probe: Permit | None = None
        self._recent: deque[tuple[float, bool]] = deque()
        self.in_a_row = 0
        """Failures since the last success."""
        self.opened = 0
        """How often it has opened since the start."""
        self.why = ""
        """Why calls were last held back, for people."""

    @property
    def state(self) -> State:
        """The state at this moment."""
        if not self._open:
            return State.CLOSED
        return State.OPEN if self._clock() < self._until else State.HALF_OPEN

    @property
    def wait(self) -> float:
        """Seconds until a call may go through; 0 when one may now."""
        left = self._until - self._clock() if self._open else 0.0
        return max(left, 0.0 if self._probe is None else PROBE_WAIT, 0.0)

    @property
    def is_clear(self) -> bool:
        """Whether it is closed, and no failure is counted."""
        return not self._open and not self.in_a_row

    def ready(self) -> bool:
        """Tell whether `enter` would give a permit."""
        return not self._open or (self._clock() >= self._until and self._probe is None)

    def enter(self) -> Permit | None:
        """Return the permit for one call, or None when none may be made now."""
        if not self.ready():
            return None
        permit = Permit(self._era, probe=self._open)
        if permit.probe:
            self._probe = permit
        return permit

    def leave(self, permit: Permit, verdict: Verdict) -> None:
        """Take note of how a call ended. A probe without a verdict leaves its place to another."""
        if permit.era != self._era:
            return
        if permit is self._probe:
            self._probe = None
            if verdict is Verdict.GOOD:
                self._close()
            elif verdict is Verdict.BAD:
                self.in_a_row += 1
                self._trip(self._next_length(), "its probe failed")
        elif verdict is not Verdict.NONE:
            self._count(good=verdict is Verdict.GOOD)

    def fail(self) -> None:
        """Count a failure whose permit was given back before anyone knew that it was one."""
        if not self._open:
            self._count(good=False)

    def trip(self, permit: Permit, seconds: float, why: str) -> None:
        """Open for so long on a call's account: afterwards one call has to prove that it is over.

        The permit is given back with it.
        """
        if permit.era == self._era:
            self._trip(seconds, why)

    def _count(self, *, good: bool) -> None:
        now = self._clock()
        self._recent.append((now, good))
        while self._recent[0][0] <= now - WINDOW:
            self._recent.popleft()
        self.in_a_row = 0 if good else self.in_a_row + 1
        if good:
            return
        bad = sum(1 for _, ended_well in self._recent if not ended_well)
        if self.in_a_row >= IN_A_ROW:
            self._trip(self._next_length(), f"it failed {self.in_a_row} times in a row")
        elif len(self._recent) >= FEWEST and bad >= SHARE * len(self._recent):
            self._trip(self._next_length(), f"{bad} of its last {len(self._recent)} calls failed")

    def _next_length(self) -> float:
        self._length = min(self._length * 2 or FIRST_OPEN, LONGEST_OPEN)
        return self._length * (1 - JITTER * self._chance())

    def _trip(self, seconds: float, why: str) -> None:
        self._era += 1
        self._open = True
        self._until = self._clock() + seconds
        self._probe = None
        self._recent.clear()
        self.opened += 1
        self.why = why

    def _close(self) -> None:
        self._era += 1
        self._open = False
        self._length = 0.0
        self._recent.clear()
        self.in_a_row = 0
        self.why = ""
