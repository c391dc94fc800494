"""How many extra calls all requests together may make: at most a fifth, and a few in any case.

A *call* is the first attempt of a request; an *extra* is every further one: the second try at the
same provider, a hedge, and going on to a provider that has not just proved to be well. Within any
`WINDOW` seconds before an extra there are at most `max(FLOOR, SHARE * calls)` of them, so an outage
of everything makes at most 1.2 calls out of one once there are 50 a window. Requests that are
refused without being sent earn nothing.

Going on to the next provider needs a thought of its own, since two promises meet there. When
the first provider is dead and the second is well, no client may fail; when both are dead, what goes
on must stay within the budget. At the moment when 50 requests at once have failed at the first,
and the second has not been asked for an hour, nobody can know which case it is. So:

- who goes on to a provider that answered well in the last seconds, and has not failed since, goes
  at once and for nothing (should it fail all the same, it is charged afterwards);
- who goes on to any other provider is a *scout* and is charged; a scout that comes back well is
  refunded, since then it was no amplification of a fault, and its provider is proved well;
- who cannot be paid for waits for the news of a scout, and then goes for nothing, or asks again;
- when there is no scout, one may go though nothing is left. That one place a provider is what keeps
  the first promise on an empty budget. What it may cost beyond the budget is bounded by the
  provider's breaker: five failures in a row, and then a probe after 1, 2, 4 … seconds. A refusal
  that does not count there, such as a rate limit, speaks for all who wait with that model, for a
  second.

Who goes on because a queue of our own was full goes for nothing: no provider was asked so far.

A burst of 50 after a cold start into two dead providers is thus 50 calls, up to 10 second tries and
scouts, and no more, since their failures open the breakers; into a dead and a living one it is 50
calls, up to 10 scouts, and 40 or more who go on when the first of these has answered.
"""

from collections import deque
from collections.abc import Callable

WINDOW = 10.0
SHARE = 0.2
FLOOR = 10
_SLOT = 1.0


class Budget:
    """Calls and extras of the last seconds, all models and providers together."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._calls: deque[tuple[float, int]] = deque()
        self._extras: deque[float] = deque()

    @property
    def calls(self) -> int:
        """First attempts within the window, rounded down to whole slots."""
        self._forget()
        return sum(count for _, count in self._calls)

    @property
    def extras(self) -> int:
        """Extras within the window."""
        self._forget()
        return len(self._extras)

    def call(self) -> float:
        """Count the first attempt of a request; return the receipt, should it not be made."""
        slot = self._clock() // _SLOT * _SLOT
        if self._calls and self._calls[-1][0] == slot:
            self._calls[-1] = (slot, self._calls[-1][1] + 1)
        else:
            self._forget()
            self._calls.append((slot, 1))
        return slot

    def take_back(self, receipt: float) -> None:
        """Count a call no more that was not made after all."""
        self._calls = deque((slot, count - (slot == receipt)) for slot, count in self._calls)

    def affords(self) -> bool:
        """Tell whether one more extra is within the budget."""
        return self.extras < max(FLOOR, int(SHARE * self.calls))

    def spend(self) -> float:
        """Count an extra, whether or not it is affordable; return the receipt for a refund."""
        now = self._clock()
        self._extras.append(now)
        return now

    def refund(self, receipt: float) -> None:
        """Take an extra back, if it is still counted."""
        if receipt in self._extras:
            self._extras.remove(receipt)

    def _forget(self) -> None:
        start = self._clock() - WINDOW
        while self._calls and self._calls[0][0] < start:
            self._calls.popleft()
        while self._extras and self._extras[0] <= start:
            self._extras.popleft()
