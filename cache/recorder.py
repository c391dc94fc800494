"""Keeps what a fill brings, whenever it comes: entries in the tiers, charges in the ledger.

A call that nobody waits for any more may bring its answer after the end of its fill. It is kept and
billed like any other. Whatever is being written is written to its end.
"""

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, TypeAlias

from providers.base import Bill, Context, Embedded, Space, Vector

from .flight import Fill, Flights
from .key import Key, Keyring
from .ledger import Purchase
from .record import Entry
from .row import Partition
from .tiers import Tiers
from .usage import Usage

OnWidth: TypeAlias = Callable[[Space, int], Awaitable[None]]
"""Takes a space that has no width yet, and the width of its first vector. Never raises."""


async def ignore_width(_space: Space, _width: int) -> None:
    """Take no note of it."""


class Recorder:
    """Records what one fill gets for its keys, and hands it to those who wait for the fill.

    `wanted` are the keys that a provider is asked for, in the order of the inputs of that call.
    """

    def __init__(  # noqa: PLR0913, PLR0917 - where all of it goes
        self,
        fill: Fill[Any],
        flights: Flights[Any],
        tiers: Tiers,
        ring: Keyring,
        wanted: Sequence[Key],
        context: Context,
        on_width: OnWidth,
    ) -> None:
        self._fill = fill
        self._flights = flights
        self._tiers = tiers
        self._ring = ring
        self._wanted = wanted
        self._context = context
        self._on_width = on_width
        self._purchase = Purchase(tiers.count, ring.partition, context.account)
        self._writes: list[asyncio.Task[None]] = []
        self._is_closed = False
        self.bought: set[Key] = set()
        """Keys whose entries have come."""

    @property
    def charged(self) -> Usage:
        """The sums of all charges so far."""
        return self._purchase.charged

    def begin(self, places: Sequence[int]) -> None:
        """Note that a call for the inputs at these places is about to be sent."""
        self._fill.begun.update(self._wanted[place] for place in places)

    def charge(self, bill: Bill) -> None:
        """Count a charge, and tell `on_charge` of the context."""
        self._purchase.charge(bill)
        if self._context.on_charge is not None:
            self._context.on_charge(bill)
        if self._is_closed:
            self._flights.write(self._tiers.flush_counts())

    async def keep(self, places: Sequence[int], part: Embedded) -> None:
        """Keep the answer to the inputs at these places, and hand it out; once for each input."""
        rows = zip(places, part.vectors, part.tokens, strict=True)
        new = [row for row in rows if self._wanted[row[0]] not in self.bought]
        if not new:
            return
        entries = {
            (key := self._wanted[place]): Entry(vector, tokens, part.counted, key.digest)
            for place, vector, tokens in new
        }
        self.bought.update(entries)
        self._purchase.bought([place for place, *_ in new], len(part.vectors[0]) // 4)
        # Who brings it may be called off while it is written; it is bought all the same.
        write = self._flights.write(self._put(entries, part.vectors[0]))
        self._writes.append(write)
        await asyncio.shield(write)

    async def _put(self, entries: Mapping[Key, Entry], vector: Vector) -> None:
        if not self._ring.space.dimensions:
            await self._on_width(self._ring.space, len(vector) // 4)
        if self._context.terms.write:
            # What was charged so far goes into the same transaction.
            self._purchase.is_written = True
        await self._tiers.put_many(entries, partition(self._ring, vector), self._context.terms)
        self._flights.give(self._fill, entries)

    async def close(self) -> None:
        """Wait until all that has come so far is on disk, charges too, as far as it takes them."""
        self._is_closed = True
        self._purchase.close()
        await asyncio.shield(asyncio.gather(*self._writes))
        if not self._purchase.is_written:
            await asyncio.shield(self._flights.write(self._tiers.flush_counts()))


def partition(ring: Keyring, vector: Vector) -> Partition:
    """Return where entries belong; the width is the vector's where the space has none yet."""
    return ring.partition._replace(dimensions=ring.partition.dimensions or len(vector) // 4)
