"""The tiers as one: memory before disk before the shared one, every record verified on its way in.

There is one look-up. It keeps what memory has, and asks the disk once for the rest: in the event
loop where that is quick, else in a thread. It awaits nothing as long as nothing has to be awaited.
What the disk lacks too is asked of the shared tier, if there is one, in one go. What comes from
there is kept in memory, and on disk a moment later, with the time of its purchase.

Failure policy: what cannot be read, or does not verify, is a miss; what cannot be written is kept
as far as it can be. Neither raises.
"""

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import TYPE_CHECKING

from embedding_proxy.providers.base import NORMAL, CachePolicy

from . import record
from .disk.store import Store
from .disk.write_batch import PendingRecord, StoredRecord
from .key import Key, Keys, Partition
from .ledger import LedgerKey, Usage
from .memory import Memory
from .record import Entry

if TYPE_CHECKING:
    from .shared.tier import SharedEntry, SharedTier

log = logging.getLogger("embedding_proxy.store")

LOT = 256
"""Keys that are looked up in one go; between two goes, others get their turn."""
_MAX_WRITTEN = 512
"""Entries that are kept in one go."""
_MAX_TOLD = 100
MAX_COPIES = 8192
"""Entries of the shared tier that wait to be written to disk; further ones are not."""
COPY_DELAY_S = 0.2
"""So long they wait: the reply goes first, and what comes together is written together."""


@dataclass(slots=True)
class TierCounters:
    """Counts of distinct inputs since the start; look-ups = the hits of all tiers + misses."""

    memory_hits: int = 0
    disk_hits: int = 0
    shared_hits: int = 0
    misses: int = 0
    mismatches: int = 0
    """Records on disk that were there but damaged, or about something else."""


@dataclass(slots=True)
class Lookup:
    """What the tiers have of some keys."""

    keys: Keys
    """All of one partition, and different."""
    entries: list[Entry | None]
    """In the order of the keys; None where no tier has one that the terms take."""
    missing: list[int]
    """The indices of the keys without an entry."""
    is_complete: bool = True
    """Whether the disk was asked for what memory lacks; False = that has to be awaited."""
    disk_hits: int = 0
    damaged: dict[bytes, bytes] | None = None
    """Records that do not verify, by address."""
    mark: int = 0
    """`InFlight.landed` when the look-up began."""
    begun: float | None = None
    """When it began, on the event loop's clock; None = not known."""


class Tiers:
    """Entries by key. For one thread: the event loop's."""

    def __init__(self, memory: Memory, store: Store, shared: "SharedTier | None" = None) -> None:
        self.memory = memory
        self.shared = shared
        self._store = store
        self._copies: dict[bytes, tuple[Entry, Partition, float]] = {}
        """Entries of the shared tier that are to be written to disk, by address, with the time of
        their purchase."""
        self._copier: asyncio.Task[None] | None = None
        self._is_copy_due = asyncio.Event()
        store.on_purge = self._forget
        self.heed_purges = store.heed_purges
        """See `Store.heed_purges`."""
        self.is_purged: Callable[[Partition, bytes, float], bool] | None = None
        """Tells whether an entry on disk, stored at a time, was purged on another node, and is not
        deleted here yet; None where there are no other nodes."""
        self.is_purged_shared: Callable[[Partition, bytes, float], bool] | None = None
        """The same of an entry of the shared tier."""
        self.counters = TierCounters()
        self._told: set[tuple[int, int]] = set()

    async def lookup(self, keys: Keys, partition: Partition, terms: CachePolicy = NORMAL) -> Lookup:
        """Return the verified entries that the terms take, and which keys have none.

        Those from disk are kept in memory, and all are noted as used, if the terms allow a trace.
        The keys are of one partition, and differ. Damaged records are deleted, but not for a
        request that may not buy, or leaves no trace: what it takes for damage may be all there is.
        """
        if len(keys) <= LOT:
            return await self.finish(self.lookup_nowait(keys, partition, terms), partition, terms)
        whole = Lookup(keys, [], [])
        for start in range(0, len(keys), LOT):
            if start:
                await asyncio.sleep(0)
            lot = self.lookup_nowait(keys[start : start + LOT], partition, terms)
            await self._finish_on_disk(lot, partition, terms)
            whole.entries += lot.entries
            whole.missing += [start + index for index in lot.missing]
        await self._finish_shared(whole, partition, terms)
        return whole

    async def finish(self, lookup: Lookup, partition: Partition, terms: CachePolicy) -> Lookup:
        """Return a look-up after what it awaits, counted."""
        await self._finish_on_disk(lookup, partition, terms)
        if lookup.missing:
            await self._finish_shared(lookup, partition, terms)
        return lookup

    async def poll(self, keys: Keys, partition: Partition, terms: CachePolicy) -> Lookup:
        """Look up once more what was missing, at most LOT keys. It is not counted again."""
        lookup = self.lookup_nowait(keys, partition, terms)
        if not lookup.is_complete:
            await self._complete_on_disk(lookup, partition, terms)
        await self._complete_shared(lookup, partition, terms, is_counted=False)
        return lookup

    async def _finish_on_disk(
        self, lookup: Lookup, partition: Partition, terms: CachePolicy
    ) -> None:
        """Ask the disk for what has to be awaited, and count what was found so far."""
        if not lookup.is_complete:
            await self._complete_on_disk(lookup, partition, terms)
        self.count_lookup(lookup, partition, terms)
        if lookup.damaged and terms.spend and terms.write:
            await self._store.delete_many(lookup.damaged)

    async def _finish_shared(
        self, lookup: Lookup, partition: Partition, terms: CachePolicy
    ) -> None:
        """Ask the shared tier for what is missing, and count both."""
        asked = len(lookup.missing)
        await self._complete_shared(lookup, partition, terms)
        if terms.max_age > 0:
            self.counters.shared_hits += asked - len(lookup.missing)
            self.counters.misses += len(lookup.missing)

    async def _complete_on_disk(
        self, lookup: Lookup, partition: Partition, terms: CachePolicy
    ) -> None:
        addresses, epoch = lookup.keys.addresses, self._store.purge_epoch
        records = await self._store.lookup([addresses[index] for index in lookup.missing])
        # What was purged while it was read is not kept in memory.
        kept = terms if self._is_purge_epoch(epoch) else replace(terms, write=False)
        self._add_records(lookup, records, partition, kept)

    async def _complete_shared(
        self,
        lookup: Lookup,
        partition: Partition,
        terms: CachePolicy,
        *,
        is_counted: bool = True,
    ) -> None:
        if self.shared is None or not lookup.missing or terms.max_age <= 0:
            return
        missing, epoch = lookup.missing, self._store.purge_epoch
        addresses, digests = lookup.keys.addresses, lookup.keys.digests
        keys = Keys([addresses[i] for i in missing], [digests[i] for i in missing])
        width = partition.dimensions
        found = await self.shared.lookup(
            keys, width, lambda raw: self._warn_of_width(raw, width), is_counted=is_counted
        )
        await self._add_shared(lookup, found, partition, terms, epoch)

    async def _add_shared(
        self,
        lookup: Lookup,
        found: "Sequence[SharedEntry | None]",
        partition: Partition,
        terms: CachePolicy,
        epoch: int,
    ) -> None:
        """Add what the shared tier has of the missing entries, as far as it is new enough.

        It is kept unless something was purged since `epoch`.
        """
        not_before = time.time() - terms.max_age
        is_kept = terms.write and self._is_purge_epoch(epoch)
        addresses, is_purged = lookup.keys.addresses, self.is_purged_shared
        missing: list[int] = []
        for number, (index, one) in enumerate(zip(lookup.missing, found, strict=True)):
            if number % LOT == LOT - 1:
                await asyncio.sleep(0)
                is_kept = is_kept and self._is_purge_epoch(epoch)
            address = addresses[index]
            if (
                one is None
                or one.stored < not_before
                or (is_purged is not None and is_purged(partition, address, one.stored))
            ):
                missing.append(index)
                continue
            lookup.entries[index] = one.entry
            if is_kept:
                self.memory.put(address, one.entry, one.stored)
                if len(self._copies) < MAX_COPIES:
                    self._copies[address] = one.entry, partition, one.stored
        lookup.missing = missing
        if self._copies and self._copier is None:
            self._copier = asyncio.create_task(self._copy())

    async def _copy(self) -> None:
        """Write to disk what came from the shared tier, unless it is purged before."""
        try:
            while self._copies:
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(COPY_DELAY_S):
                        await self._is_copy_due.wait()
                while self._copies:
                    await self._copy_some()
        finally:
            self._copier = None

    async def _copy_some(self) -> None:
        self.heed_purges()
        pending = {}
        for address in list(islice(self._copies, LOT)):
            entry, partition, stored = self._copies.pop(address)
            pending[address] = PendingRecord(record.encode(entry), partition, stored)
        if pending:
            await self._store.put_older(pending, is_copied=True)

    def _forget(self) -> None:
        """Drop what another process may have purged."""
        self.memory.clear()
        self._copies.clear()

    async def flush_copies(self) -> None:
        """Wait until what came from the shared tier is on disk, or the disk does not take it."""
        self._is_copy_due.set()
        while self._copier is not None:
            await asyncio.wait([self._copier])
        self._is_copy_due.clear()

    def lookup_nowait(self, keys: Keys, partition: Partition, terms: CachePolicy) -> Lookup:
        """Return the same of a few keys as far as nothing has to be awaited.

        It is not counted, and nothing is noted as used on disk: `count_lookup` does both, where the
        entries are of use.
        """
        self.heed_purges()
        if terms.max_age <= 0:
            return Lookup(keys, [None] * len(keys), list(range(len(keys))))
        entries, missing = self.memory.lookup(
            keys, 4 * partition.dimensions, time.time() - terms.max_age, is_noted=terms.write
        )
        lookup = Lookup(keys, entries, missing)
        if missing:
            records = self._store.lookup_nowait([keys.addresses[index] for index in missing])
            if records is None:
                lookup.is_complete = False
            else:
                self._add_records(lookup, records, partition, terms)
        return lookup

    def _add_records(
        self,
        lookup: Lookup,
        records: Mapping[bytes, StoredRecord],
        partition: Partition,
        terms: CachePolicy,
    ) -> None:
        """Add what the disk has of the missing entries, as far as it verifies and is new enough.

        A record of another width is a miss, and stays.
        """
        dimensions, is_purged = partition.dimensions, self.is_purged
        not_before = time.time() - terms.max_age
        addresses, digests = lookup.keys.addresses, lookup.keys.digests
        missing: list[int] = []
        for index in lookup.missing:
            address, digest = addresses[index], digests[index]
            found = records.get(address)
            if found is None:
                missing.append(index)
                continue
            entry = record.decode(found.record, digest, dimensions)
            if entry is None and record.is_damaged(found.record, digest):
                lookup.damaged = {**(lookup.damaged or {}), address: found.record}
            elif entry is None:
                self._warn_of_width(found.record, dimensions)
            if (
                entry is None
                or found.stored < not_before
                or (is_purged is not None and is_purged(partition, address, found.stored))
            ):
                missing.append(index)
                continue
            if terms.write:
                self.memory.put(address, entry, found.stored)
            lookup.entries[index] = entry
        lookup.disk_hits = len(lookup.missing) - len(missing)
        lookup.missing = missing

    def count_lookup(
        self, lookup: Lookup, partition: Partition, terms: CachePolicy = NORMAL
    ) -> None:
        """Count the hits of a look-up in memory and on disk.

        The use of its entries is noted if the terms allow a trace.
        """
        if terms.max_age <= 0:
            return
        keys = lookup.keys
        self.counters.memory_hits += len(keys) - len(lookup.missing) - lookup.disk_hits
        self.counters.disk_hits += lookup.disk_hits
        self.counters.mismatches += len(lookup.damaged or ())
        if not terms.write:
            return
        if lookup.missing:
            both = zip(keys.addresses, lookup.entries, strict=True)
            self._store.touch([address for address, entry in both if entry], partition)
        else:
            self._store.touch(keys.addresses, partition)

    def note(self, addresses: Sequence[bytes], partition: Partition) -> None:
        """Note that entries were used."""
        self.memory.note(addresses)
        self._store.touch(addresses, partition)

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
        self, entries: Mapping[Key, Entry], partition: Partition, terms: CachePolicy = NORMAL
    ) -> None:
        """Keep entries of one partition: on disk first, so that a restart forgets nothing served.

        What was counted before is written in the same transaction, or was in an earlier one. If the
        terms let nothing be kept, nothing is done.
        """
        pairs = iter(entries.items() if terms.write else ())
        while some := dict(islice(pairs, _MAX_WRITTEN)):
            records = {key.address: record.encode(entry) for key, entry in some.items()}
            epoch = self._store.purge_epoch
            if self.shared is not None:
                self.shared.put({key.address: entry for key, entry in some.items()}, partition)
            await self._store.put_many(records, partition)
            if self._is_purge_epoch(epoch):
                for key, entry in some.items():
                    self.memory.put(key.address, entry)

    async def put_late(
        self, entries: Mapping[Key, Entry], partition: Partition, age_s: float
    ) -> None:
        """Keep entries that were bought too late, as if that long ago: they replace nothing newer.

        No counts are written along.
        """
        stored, epoch = time.time() - age_s, self._store.purge_epoch
        if self.shared is not None:
            own = {key.address: entry for key, entry in entries.items()}
            self.shared.put(own, partition, stored, replaces=False)
        await self._store.put_older(
            {
                key.address: PendingRecord(record.encode(entry), partition, stored)
                for key, entry in entries.items()
            }
        )
        if self._is_purge_epoch(epoch):
            for key, entry in entries.items():
                self.memory.put(key.address, entry, stored)

    async def find_width(self, key: Key) -> int:
        """Return the dimensions of the record of a key, if there is one; else 0."""
        widths: list[int] = []

        def note(raw: bytes) -> None:
            if not record.is_damaged(raw, key.digest):
                widths.append(record.width(raw) or 0)

        for found in (await self._store.lookup([key.address])).values():
            note(found.record)
        if not widths and self.shared is not None:
            await self.shared.lookup(Keys.from_keys([key]), 0, note, is_counted=False)
        return max(widths, default=0)

    def _is_purge_epoch(self, epoch: int) -> bool:
        """Tell whether another process has purged nothing since that epoch."""
        self.heed_purges()
        return self._store.purge_epoch == epoch

    def count(self, heading: LedgerKey, usage: Usage) -> None:
        """Add to the sums of what was answered."""
        self._store.count(heading, usage)

    async def flush_counts(self) -> None:
        """Wait until what was counted so far is on disk, or the disk does not take it."""
        await self._store.flush_counts()
