"""Allowances per minute: a bucket of one process, and what several nodes share.

`SharedAllowance` is what `cache.shared` gives: the limits of one provider, counted for all nodes.
`SharedLimits` takes from it, and keeps what one process needs while it cannot be asked.
"""

import asyncio
from collections.abc import Callable, Mapping
from typing import NamedTuple, Protocol


class Bucket:
    """An allowance that refills evenly; one call larger than all of it may overdraw it."""

    def __init__(self, capacity: float, level: float, per_s: float, now: float) -> None:
        self.capacity = capacity
        self._level = level
        self._per_s = per_s
        self._at = now

    def _refill(self, now: float) -> None:
        self._level = min(self.capacity, self._level + max(0.0, now - self._at) * self._per_s)
        self._at = now

    def wait(self, cost: float, ahead: float, now: float) -> float:
        """Return the seconds until `cost` may be taken after `ahead` has been."""
        self._refill(now)
        missing = ahead + min(cost, self.capacity) - self._level
        return 0.0 if missing <= 0 else missing / self._per_s

    def take(self, cost: float, now: float) -> None:
        """Take `cost`, below zero if need be."""
        self._refill(now)
        self._level -= cost

    def deficit(self, now: float) -> float:
        """Return how much of it is used up."""
        self._refill(now)
        return self.capacity - self._level

    def forgive(self, now: float) -> None:
        """Raise a level below zero to zero."""
        self._refill(now)
        self._level = max(self._level, 0.0)


class Reservation(NamedTuple):
    """What a `SharedAllowance` answers."""

    wait_s: float
    """Until the call may begin."""
    is_reserved: bool
    """Whether room is reserved for it then."""


class SharedAllowance(Protocol):
    """The declared limits of one provider, for all nodes together. For one event loop."""

    @property
    def nodes(self) -> int:
        """How many nodes share it, as far as is known; at least 1."""

    async def reserve(
        self,
        cost: Mapping[str, float],
        max_wait_s: float,
        deficits: Mapping[str, float],
        untold: Mapping[str, float],
    ) -> Reservation | None:
        """Reserve room for one call, if it need not wait, or less than `max_wait_s`.

        `deficits` are what this process has taken of late, for an allowance that has lost its
        count; `untold` is what it has taken since the allowance could last be asked. None = it
        cannot be asked now; that takes a few milliseconds at most. Never raises.
        """

    def give_back(self, cost: Mapping[str, float]) -> None:
        """Give back what was reserved for a call that was not made."""


class SharedLimits:
    """What one process takes of a `SharedAllowance`, and its share while that cannot be asked.

    Kept in two sets of buckets of the share of one node: what was taken of late, and what was taken
    and not told.
    """

    def __init__(self, allowance: SharedAllowance, declared: Mapping[str, float | None]) -> None:
        self._allowance = allowance
        self._declared = {kind: limit for kind, limit in declared.items() if limit is not None}
        self.share: dict[str, Bucket] = {}
        """The limits of this process while it is on its own."""
        self._untold: dict[str, Bucket] = {}
        self._nodes = 0
        self._is_alone = False
        self._abandoned: set[asyncio.Task[Reservation | None]] = set()
        """Exchanges for calls that were cancelled meanwhile."""

    async def reserve(
        self, cost: Mapping[str, int], max_wait_s: float, clock: Callable[[], float]
    ) -> Reservation | None:
        """Reserve room for a call. None = the limits are those of `share` now.

        If it is cancelled, the exchange goes on, and what it has reserved is given back: before its
        end nobody knows what the allowance was told.
        """
        exchange = asyncio.create_task(self._reserve(cost, max_wait_s, clock))
        try:
            return await asyncio.shield(exchange)
        except asyncio.CancelledError:

            def give_back(done: asyncio.Task[Reservation | None]) -> None:
                self._abandoned.discard(done)
                if done.cancelled() or done.exception() is not None:
                    return
                reservation = done.result()
                if reservation is not None and reservation.is_reserved:
                    self.give_back(cost, clock())

            self._abandoned.add(exchange)
            exchange.add_done_callback(give_back)
            raise

    async def _reserve(
        self, cost: Mapping[str, int], max_wait_s: float, clock: Callable[[], float]
    ) -> Reservation | None:
        now = clock()
        self._resize(now)
        deficits = {kind: bucket.deficit(now) for kind, bucket in self.share.items()}
        untold = {kind: bucket.deficit(now) for kind, bucket in self._untold.items()}
        # Calls at the same time do not tell it a second time.
        self._untold = _buckets(self._declared, self._nodes, now)
        reservation = await self._allowance.reserve(cost, max_wait_s, deficits, untold)
        now = clock()
        if reservation is None:
            self._note(self._untold, untold, now)
            if not self._is_alone:
                for bucket in self.share.values():
                    # What others left is no debt: nobody waits for it now.
                    bucket.forgive(now)
            self._is_alone = True
            return None
        self._is_alone = False
        if reservation.is_reserved:
            self._note(self.share, cost, now)
        return reservation

    def _resize(self, now: float) -> None:
        """Make buckets of the share of one node when the number of nodes changes."""
        nodes = self._allowance.nodes
        if nodes == self._nodes:
            return
        self._nodes, before = nodes, self.share
        self.share = _buckets(self._declared, nodes, now)
        for kind, bucket in before.items():
            self.share[kind].take(bucket.deficit(now), now)
        if not self._is_alone:
            self._untold = _buckets(self._declared, nodes, now)

    def note_untold(self, cost: Mapping[str, int], now: float) -> None:
        """Note what was taken of `share`."""
        self._note(self._untold, cost, now)

    @staticmethod
    def _note(buckets: Mapping[str, Bucket], cost: Mapping[str, float], now: float) -> None:
        for kind, bucket in buckets.items():
            bucket.take(cost[kind], now)

    def give_back(self, cost: Mapping[str, int], now: float) -> None:
        """Give back what was reserved, or taken, for a call that was not made."""
        returned = {kind: -number for kind, number in cost.items()}
        self._note(self.share, returned, now)
        if self._is_alone:
            self._note(self._untold, returned, now)
        else:
            self._allowance.give_back(cost)


def _buckets(limits: Mapping[str, float], nodes: int, now: float) -> dict[str, Bucket]:
    return {
        kind: Bucket(limit / nodes, limit / nodes, limit / nodes / 60, now)
        for kind, limit in limits.items()
    }
