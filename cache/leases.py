"""Leases: who buys a text, among all processes that share a cache.

Whoever holds the lease of an address buys its record, writes it, and then gives the lease back.
Whoever does not get it looks for the record now and then, and tries again: see `in_flight.Fetch`.

A look-up that found nothing says nothing of a record that was written after it. So a lease is kept
for GRACE_S after the record was written: whoever gets one less than FRESH_S after the request
began, has looked at a time when nobody had written that record. Later it has to look once more.

Leases are a matter of money, never of answers: where none can be had, all are granted.
"""

from collections.abc import Collection, Iterator, Sequence
from typing import Protocol

GRACE_S = 0.25
"""How long a lease is kept after its record was written, in seconds."""
FRESH_S = 0.1
"""How long a look-up may be trusted once the lease is held. The difference to GRACE_S is room for
timers, and for a look-up just before the request's time began."""
MIN_PAUSE_S = 0.005
MAX_PAUSE_S = 0.1
"""How long one waits between two attempts to find a record or to get its lease, in seconds."""


class Leases(Protocol):
    """The leases that this process holds, or asks for. For one event loop. Never raises."""

    async def acquire(self, addresses: Sequence[bytes]) -> Collection[bytes]:
        """Take the leases that no other process holds; return their addresses. It waits for nobody.

        What this process holds already is granted again: inside it, `InFlight` says who buys. Each
        grant is given back once.
        """
        ...

    def lapsed_s(self, addresses: Collection[bytes]) -> float:
        """Return for how long one of the leases held here may have been another process's.

        In seconds, of the one that lapsed first; 0 where none has.
        """
        ...

    def release(self, addresses: Collection[bytes], *, is_written: bool) -> None:
        """Give leases back: at once, or after GRACE_S if their records were written."""
        ...


def pauses() -> Iterator[float]:
    """Yield the pauses of one who waits, in seconds.

    >>> from itertools import islice
    >>> [*islice(pauses(), 6)]
    [0.005, 0.01, 0.02, 0.04, 0.08, 0.1]
    """
    pause = MIN_PAUSE_S
    while True:
        yield pause
        pause = min(2 * pause, MAX_PAUSE_S)
