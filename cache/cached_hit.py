"""Repeats an answer that came from the cache alone: nothing is parsed or hashed again."""

import asyncio
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from operator import attrgetter

from embedding_proxy.providers.base import NORMAL, Vector

from .key import Keys, Partition
from .ledger import LedgerKey, Usage
from .tiers import LOT, Tiers

_VECTOR = attrgetter("vector")
TOUCH_S = 1.0
"""Seconds between two times that the use of the entries is noted for one kept answer."""


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
        self.count()
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
        heed_purges = tiers.heed_purges

        def reuse() -> bool:
            nonlocal noted
            now = clock()
            if heed_purges() or memory.epoch != epoch or now >= expires:
                return False
            if not 0 <= now - noted < TOUCH_S:
                noted = now
                tiers.note(addresses, self.partition)
            tiers.counters.memory_hits += inputs
            tiers.count(self.heading, self.usage)
            return True

        return reuse

    def count(self) -> None:
        """Count an answer that is given."""
        self.tiers.count(self.heading, self.usage)
