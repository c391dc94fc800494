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
from .tiers import LOT, Lookup, Tiers

_VECTOR = attrgetter("vector")
TOUCH_S = 1.0
"""Seconds between two notes of a use of the entries of one stored answer."""


class Reusable(Protocol):
    """Answers the same request again: a `CachedHit`, or a wrapper that adds a condition."""

    async def vectors(self) -> Sequence[Vector] | None:
        """Return the vectors and count the answer; None if a new lookup is needed.

        Many vectors are read in steps that yield to the event loop.
        """

    def count(self) -> None:
        """Count one more answer."""

    def reuse_of(self, vectors: Sequence[Vector]) -> Callable[[], bool] | None:
        """Return a function that tells whether these vectors are still valid, and counts the use.

        None if they are not valid any more.
        """


@dataclass(slots=True, kw_only=True)
class CountedEmbeddings(Embedded):
    """Vectors, and the usage of the request that they answer."""

    usage: Usage
    keys: Sequence[Key] = ()
    """The key of each vector; empty if more than one lookup was needed."""
    cached_hit: Reusable | None = None
    """Answers the same request again; None if that needs a new lookup."""


@dataclass(slots=True)
class CachedHit:
    """What an answer from the cache alone was made of, for a request without its own cache policy.

    A stored response asks here before it is sent again. So purges, expiry and newer purchases apply
    to it as they do to the entries.
    """

    tiers: Tiers
    keys: Keys
    partition: Partition
    heading: LedgerKey
    usage: Usage
    lookup: Lookup | None = None
    """The lookup that `count` counts with the answer; None if it is counted already."""

    async def vectors(self) -> list[Vector] | None:
        """Return the present vectors of the same request, and count the answer.

        None if a new lookup is needed. A long list is read in steps that yield to the event loop.
        """
        vectors: list[Vector] = []
        while len(vectors) < len(self.keys):
            if vectors:
                await asyncio.sleep(0)
            lot = self.keys[len(vectors) : len(vectors) + LOT]
            lookup = self.tiers.lookup_nowait(lot, self.partition, NORMAL)
            if lookup.missing:
                return None
            self.tiers.count_lookup(lookup, self.partition)
            vectors += map(_VECTOR, lookup.entries)
        self.tiers.count(self.heading, self.usage)
        return vectors

    def reuse_of(self, vectors: Sequence[Vector]) -> Callable[[], bool] | None:
        """Return a function that tells whether these vectors are still the answer, and counts it.

        None if they are not, or memory does not hold them. They are the answer until the epoch of
        the memory tier changes, or the first of them expires.
        """
        memory = self.tiers.memory
        expires = memory.expiry_of(self.keys.addresses, vectors)
        return None if expires is None else _Reuse(self, memory.epoch, expires)

    def count(self) -> None:
        """Count the answer that this hit was made with, when it is sent."""
        if self.lookup is not None:
            self.tiers.count_lookup(self.lookup, self.partition)
            self.lookup = None
        self.tiers.count(self.heading, self.usage)


@dataclass(slots=True)
class _Reuse:
    """Tells whether some vectors are still the answer. One object, because there may be many."""

    hit: CachedHit
    epoch: int
    """The epoch of the memory tier when it held the vectors."""
    expires: float
    """When the first of them expires, in seconds since 1970."""
    noted: float = -math.inf
    """When their use was last noted, in seconds since 1970."""

    def __call__(self) -> bool:
        hit, tiers = self.hit, self.hit.tiers
        memory, addresses = tiers.memory, hit.keys.addresses
        now = memory.clock()
        if tiers.heed_purges() or memory.epoch != self.epoch or now >= self.expires:
            return False
        if not 0 <= now - self.noted < TOUCH_S:
            self.noted = now
            tiers.note(addresses, hit.partition)
        tiers.counters.memory_hits += len(addresses)
        tiers.count(hit.heading, hit.usage)
        return True
