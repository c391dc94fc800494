"""The memory tier: entries by address, bounded in bytes, least recently used out first."""

import math
import time
from collections import deque
from collections.abc import Callable, Iterable
from operator import is_
from typing import NamedTuple

from embedding_proxy.providers.lru_cache import LRUCache

from .key import Keys
from .record import Entry

# What an entry takes besides its vector: two tuples, an address, a digest, four numbers, and its
# place in the map. Measured with sys.getsizeof on CPython 3.11, 64 bit.
_OVERHEAD = 480
_MAX_EVICTED = 1 << 16


class _MemoryEntry(NamedTuple):
    entry: Entry
    stored: float
    """When it was bought, in seconds since 1970."""


class Memory:
    """A map of at most `limit` bytes. For one thread: the event loop's.

    It keeps entries whose record was verified; the caller compares the digest on every read.
    """

    def __init__(
        self, limit: int, ttl_s: float | None = None, clock: Callable[[], float] = time.time
    ) -> None:
        """`ttl_s` is the age, in seconds, beyond which an entry is not served."""
        self._ttl_s = ttl_s
        self.clock = clock
        self._entries = LRUCache[bytes, _MemoryEntry](limit, _size, self._note_evicted)
        self._evicted: dict[bytes, int] = {}
        """Digests of the content of entries that were dropped for room, by address."""
        self.epoch = 0
        """Changes whenever an entry that was here may have become wrong: everything was dropped, or
        another one replaced it. Dropping an entry for room, and expiry, do not change it. A stored
        response compares it."""

    @property
    def size(self) -> int:
        """Bytes in use."""
        return self._entries.size

    def __len__(self) -> int:
        return len(self._entries)

    def lookup(
        self, keys: Keys, size: int, not_before: float = -math.inf, *, is_noted: bool = True
    ) -> tuple[list[Entry | None], list[int]]:
        """Return the entries of some keys, in their order, and the indices of those without one.

        An entry has the key's digest and a vector of `size` bytes, and was not bought before
        `not_before`, in seconds since 1970. `is_noted`: it is used by this.
        """
        find, mark_used, expired = self._entries.peek, self._entries.mark_used, self._expired
        entries: list[Entry | None] = []
        missing: list[int] = []
        for address, digest in zip(keys.addresses, keys.digests, strict=True):
            slot = find(address)
            if slot is not None and slot.stored > expired:
                entry = slot.entry
                if (
                    entry.digest == digest
                    and len(entry.vector) == size
                    and slot.stored >= not_before
                ):
                    if is_noted:
                        mark_used(address)
                    entries.append(entry)
                    continue
            elif slot is not None:
                self._entries.pop(address)
            missing.append(len(entries))
            entries.append(None)
        return entries, missing

    def expiry_of(self, addresses: Iterable[bytes], vectors: Iterable[bytes]) -> float | None:
        """Return when the first of these entries expires, in seconds since 1970.

        None unless memory holds all of them with these same vectors.
        """
        slots = list(map(self._entries.peek, addresses))
        if not slots or not all(map(is_, (slot and slot.entry.vector for slot in slots), vectors)):
            return None
        if self._ttl_s is None:
            return math.inf
        first = min(slot.stored for slot in slots if slot is not None)
        return None if first <= self._expired else first + self._ttl_s

    def note(self, addresses: Iterable[bytes]) -> None:
        """Note the use of those entries that are here."""
        deque(map(self._entries.mark_used, filter(self._entries.peek, addresses)), 0)

    @property
    def _expired(self) -> float:
        """The time, in seconds since 1970: entries that were bought up to then are not served."""
        return -math.inf if self._ttl_s is None else self.clock() - self._ttl_s

    def put(self, address: bytes, entry: Entry, stored: float | None = None) -> None:
        """Store an entry, and drop the least recently used ones as needed.

        `stored` is when it was bought, in seconds since 1970; None = now. An entry that was bought
        later stays: it came while this one was being read.
        """
        if len(entry.vector) + _OVERHEAD > self._entries.max_size:
            return
        previous = self._entries.peek(address)
        if previous is not None:
            is_same = entry.digest == previous.entry.digest
            if is_same and stored is not None and stored < previous.stored:
                return
            if previous.entry != entry:
                self.epoch += 1
        elif self._evicted and self._evicted.pop(address, _content(entry)) != _content(entry):
            self.epoch += 1
        self._entries[address] = _MemoryEntry(entry, self.clock() if stored is None else stored)

    def clear(self) -> None:
        """Drop everything."""
        self._entries.clear()
        self._evicted.clear()
        self.epoch += 1

    def _note_evicted(self, address: bytes, slot: _MemoryEntry) -> None:
        if len(self._evicted) >= _MAX_EVICTED:
            self._evicted.clear()
            self.epoch += 1
        self._evicted[address] = _content(slot.entry)


def _size(_: bytes, slot: _MemoryEntry) -> int:
    return len(slot.entry.vector) + _OVERHEAD


def _content(entry: Entry) -> int:
    return hash((entry.vector, entry.tokens, entry.digest))
