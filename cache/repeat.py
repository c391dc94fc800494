"""The same answer once more: nothing is parsed or hashed, only looked at whether it still holds."""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from operator import attrgetter

from providers.base import NORMAL, Vector

from .key import Keys
from .ledger import Heading
from .row import Partition
from .tiered import LOT, Tiers
from .usage import Usage

_VECTOR = attrgetter("vector")


@dataclass(frozen=True, slots=True)
class Repeat:
    """What an answer was about that came from the cache alone, to a request without own terms.

    Whoever keeps something that was made of such an answer asks here before giving it out once
    more. So purges, expiry and newer purchases hold for it as they do for the entries themselves.
    """

    tiers: Tiers
    keys: Keys
    partition: Partition
    heading: Heading
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

    def serials_of(self, vectors: Sequence[Vector]) -> list[int] | None:
        """Return by which numbers `still` knows an answer again; None if it is another already."""
        return self.tiers.serials_of(self.keys.addresses, vectors)

    def still(self, serials: Sequence[int]) -> bool:
        """Tell whether the answer is the same as ever; if so, count it."""
        if not self.tiers.holds(self.keys.addresses, serials, self.partition):
            return False
        self.count()
        return True

    def count(self) -> None:
        """Count an answer that is given."""
        self.tiers.count(self.heading, self.usage)
