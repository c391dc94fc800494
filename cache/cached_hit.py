"""Answers with their usage, and what repeats one that came from the cache alone.

Then nothing is parsed or hashed again.
"""

import asyncio
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Protocol

from embedding_proxy.providers.base import NORMAL, Embedded, Vector

from .key import Key, Keys, Partition
from .ledger import LedgerKey, Usage
from .tiered import LOT, Lookup, Tiers

_VECTOR = attrgetter("vector")
TOUCH_S = 1.0
"""Seconds between two times that the use of the entries is noted for one kept answer."""


class Reusable(Protocol):
    """Answers the same request again: a `CachedHit`, or what adds a condition to one."""

    async def vectors(self) -> Sequence[Vector] | None:
        """Return the vectors and count the answer; None if a new lookup is needed.

        Many vectors are read in steps that yield to the event loop.
        """

    def count(self) -> None:
        """Count one more answer."""

    def reuse_of(self, vectors: Sequence[Vector]) -> Callable[[], bool] | None:
        """Return what tells whether these vectors are still valid, and then counts the answer.

        None if they are not valid any more.
        """


@dataclass(frozen=True, slots=True, kw_only=True)
class CountedEmbeddings(Embedded):
    """Vectors, and the usage of the request that they answer."""

    usage: Usage
    keys: Sequence[Key] = ()
    """The key of each vector; empty if more than one lookup was needed."""
    cached_hit: Reusable | None = None
    """Answers the same request again; None if that needs a new lookup."""


@dataclass(frozen=True, slots=True)
class CachedHit:
    """What an answer was about that came from the cache alone, to a request without own terms.

    Whoever keeps something that was made of such an answer asks here before giving it out once
    more. So purges, expiry and newer purchases hold for it as they do for the entries themselves.
    """

    tiers: Tiers
    keys: Keys
    partition: Partition
    heading: LedgerKey
    usage: Usage
    lookup: Lookup | None = None
    """The look-up that `count` counts with the answer; None if that is counted."""

    async def vectors(self) -> list[Vector] | None:
        """Return what the same request is answered with now, and count it.

        None if it has to be asked anew. Where there are many, others get their turn.
        """
        vectors: list[Vector] = []
        while len(vectors) < len(self.keys):
            if vectors:
                await asyncio.sleep(0)
            some = self.keys[len(vectors) : len(vectors) + LOT]
            lookup = self.tiers.lookup_nowait(some, self.partition, NORMAL)
            if lookup.missing:
                return None
            self.tiers.count_lookup(lookup, some, self.partition)
            vectors += map(_VECTOR, lookup.entries)
        self.tiers.count(self.heading, self.usage)
        return vectors

    def reuse_of(self, vectors: Sequence[Vector]) -> Callable[[], bool] | None:
        """Return what tells whether these vectors are still the answer, and if so, counts it.

        None if they are not the answer any more, or memory does not hold them. They are until the
        epoch of the memory tier changes, or the first of them expires.
        """
        tiers, memory, addresses = self.tiers, self.tiers.memory, self.keys.addresses
        expires = memory.expiry_of(addresses, vectors)
        if expires is None:
            return None
        epoch, clock, inputs, noted = memory.epoch, memory.clock, len(addresses), -math.inf

        def reuse() -> bool:
            nonlocal noted
            now = clock()
            if memory.epoch != epoch or now >= expires:
                return False
            if not 0 <= now - noted < TOUCH_S:
                noted = now
                tiers.note(addresses, self.partition)
            tiers.counters.memory_hits += inputs
            tiers.count(self.heading, self.usage)
            return True

        return reuse

    def count(self) -> None:
        """Count the answer that this was made with, when it is given."""
        if self.lookup is not None:
            self.tiers.count_lookup(self.lookup, self.keys, self.partition)
        self.tiers.count(self.heading, self.usage)
