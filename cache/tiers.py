"""The tiers as one: memory before disk, every record verified on its way in.

Failure licence: what cannot be read, or does not verify, is a miss; what cannot be written is kept
as far as it can be. Neither raises.
"""

import asyncio
import logging
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from operator import attrgetter

from providers.base import NORMAL, Terms

from . import record
from .disk.store import Store
from .key import Key, Keys
from .ledger import Heading
from .memory import Memory
from .record import Entry
from .row import Partition
from .usage import Usage

log = logging.getLogger("embedding_proxy.store")

LOT = 256
"""Keys that are looked up in memory in one go; between two goes, others get their turn."""
# The same of entries that are looked up on disk as well, or are kept.
_AT_A_TIME = 512
_MAX_TOLD = 100
_DIGEST, _VECTOR = attrgetter("digest"), attrgetter("vector")


@dataclass(slots=True)
class TierCounters:
    """Counts of distinct inputs since the start; look-ups = memory_hits + disk_hits + misses."""

    memory_hits: int = 0
    disk_hits: int = 0
    misses: int = 0
    mismatches: int = 0
    """Records that were there but damaged, or about something else; each counts as a miss too."""


class Tiers:
    """Entries by key. For one thread: the event loop's."""

    def __init__(self, memory: Memory, store: Store) -> None:
        self._memory = memory
        self._store = store
        store.on_purge = memory.clear
        self.counters = TierCounters()
        self._told: set[tuple[int, int]] = set()

    async def get_many(
        self, keys: Sequence[Key], partition: Partition, terms: Terms = NORMAL
    ) -> dict[Key, Entry]:
        """Return the verified entries that are at hand and that the terms take.

        Those from disk are kept in memory, and all are noted as used, if the terms allow a trace.
        The keys are of one partition.
        """
        if terms.max_age <= 0:
            return {}
        not_before = time.time() - terms.max_age
        found: dict[Key, Entry] = {}
        for start in range(0, len(keys), _AT_A_TIME):
            if start:
                await asyncio.sleep(0)
            some = keys[start : start + _AT_A_TIME]
            found.update(await self._get_some(some, partition, terms, not_before))
        return found

    def at_hand(self, keys: Keys, partition: Partition, terms: Terms) -> list[Entry] | None:
        """Return the verified entries of distinct keys, in their order, if memory has them all.

        Their use is noted and counted. Else None: they are to be looked up one by one. So are they
        if the terms do not take every entry.
        """
        if terms.max_age != math.inf or not terms.write:
            return None
        entries = self._memory.all_of(keys.addresses)
        if entries is None or list(map(_DIGEST, entries)) != keys.digests:
            return None
        if set(map(len, map(_VECTOR, entries))) != {4 * partition.dimensions}:
            return None
        self.note(keys.addresses, partition)
        self.counters.memory_hits += len(keys)
        return entries

    def at_sight(self, keys: Keys, partition: Partition, terms: Terms) -> list[Entry] | None:
        """Return the same of a few keys if memory or the disk has each, and nobody need wait.

        What the disk had is kept in memory. Their use is noted, and counted here.
        """
        if terms.max_age != math.inf or not terms.write:
            return None
        size = 4 * partition.dimensions
        at_hand = self._memory.get_many(keys.addresses)
        lacking = {
            address: digest
            for address, digest, entry in zip(keys.addresses, keys.digests, at_hand, strict=True)
            if entry is None or entry.digest != digest or len(entry.vector) != size
        }
        read = self._read_at_sight(lacking, partition.dimensions) if lacking else {}
        if read is None:
            return None
        self._store.touch(keys.addresses, partition)
        self.counters.disk_hits += len(read)
        self.counters.memory_hits += len(keys) - len(read)
        both = zip(keys.addresses, at_hand, strict=True)
        return [entry for a, kept in both if (entry := read.get(a, kept)) is not None]

    def _read_at_sight(
        self, digests: Mapping[bytes, bytes], dimensions: int
    ) -> dict[bytes, Entry] | None:
        """Return the verified entries at these addresses, if the disk has all of them at once."""
        records = self._store.at_once(list(digests))
        if records is None or len(records) < len(digests):
            return None
        read: dict[bytes, Entry] = {}
        for address, digest in digests.items():
            entry = record.decode(records[address].record, digest, dimensions)
            if entry is None:
                return None
            read[address] = entry
        for address, entry in read.items():
            self._memory.put(address, entry, records[address].stored)
        return read

    @property
    def memory(self) -> Memory:
        """The first tier."""
        return self._memory

    def note(self, addresses: Sequence[bytes], partition: Partition) -> None:
        """Note that entries were used."""
        self._memory.note(addresses)
        self._store.touch(addresses, partition)

    async def _get_some(
        self, keys: Sequence[Key], partition: Partition, terms: Terms, not_before: float
    ) -> dict[Key, Entry]:
        found: dict[Key, Entry] = {}
        missing: list[Key] = []
        size = 4 * partition.dimensions
        at_hand = self._memory.get_many(
            [key.address for key in keys], not_before=not_before, note=terms.write
        )
        for key, entry in zip(keys, at_hand, strict=True):
            if entry is not None and entry.digest == key.digest and len(entry.vector) == size:
                found[key] = entry
            else:
                missing.append(key)
        self.counters.memory_hits += len(found)
        if missing:
            from_disk = await self._from_disk(missing, partition.dimensions, not_before, terms)
            found.update(from_disk)
        if terms.write:
            self._store.touch([key.address for key in found], partition)
        return found

    async def _from_disk(
        self, keys: Sequence[Key], dimensions: int, not_before: float, terms: Terms
    ) -> dict[Key, Entry]:
        """Return the entries on disk that verify and are new enough; delete the damaged records.

        A record of another width is a miss, and stays. A request that may not buy, or leaves no
        trace, deletes nothing: what it takes for damage may be all there is.
        """
        records = await self._store.get_many([key.address for key in keys])
        found: dict[Key, Entry] = {}
        damaged: dict[bytes, bytes] = {}
        for key in keys:
            raw = records.get(key.address)
            if raw is None:
                continue
            entry = record.decode(raw.record, key.digest, dimensions)
            if entry is None:
                if record.is_damaged(raw.record, key.digest):
                    damaged[key.address] = raw.record
                else:
                    self._warn_of_width(raw.record, dimensions)
            elif raw.stored >= not_before:
                if terms.write:
                    self._memory.put(key.address, entry, raw.stored)
                found[key] = entry
        self.counters.disk_hits += len(found)
        self.counters.misses += len(keys) - len(found)
        if damaged:
            self.counters.mismatches += len(damaged)
            if terms.spend and terms.write:
                await self._store.delete_many(damaged)
        return found

    def _warn_of_width(self, raw: bytes, dimensions: int) -> None:
        """Say once for each pair of widths that records are not served for their width's sake."""
        width = record.width(raw)
        if width is None or (width, dimensions) in self._told or len(self._told) >= _MAX_TOLD:
            return
        self._told.add((width, dimensions))
        log.warning(
            "the cache holds vectors of %d dimensions for a model that is configured with"
            " dimensions: %d; they are kept and not served",
            *(width, dimensions),
        )

    async def put_many(
        self, entries: Mapping[Key, Entry], partition: Partition, terms: Terms = NORMAL
    ) -> None:
        """Keep entries of one partition: on disk first, so that a restart forgets nothing served.

        What was counted before is written in the same transaction, or was in an earlier one; also
        if the terms let nothing be kept.
        """
        pairs = iter(entries.items())
        while some := dict(islice(pairs, _AT_A_TIME)):
            await self._put_some(some, partition, terms)

    async def _put_some(
        self, entries: Mapping[Key, Entry], partition: Partition, terms: Terms
    ) -> None:
        if not terms.write:
            return
        records = {key.address: record.encode(entry) for key, entry in entries.items()}
        await self._store.put_many(records, partition)
        for key, entry in entries.items():
            self._memory.put(key.address, entry)

    def count(self, heading: Heading, usage: Usage) -> None:
        """Add to the sums of what was answered."""
        self._store.count(heading, usage)

    async def flush_counts(self) -> None:
        """Wait until what was counted so far is on disk, or the disk does not take it."""
        await self._store.flush_counts()
