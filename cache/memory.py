"""The memory tier: entries by address, bounded in bytes, least recently used out first."""

from collections import OrderedDict

from .record import Entry

# What an entry takes besides its vector: a tuple, an address, a digest, two numbers, and its place
# in the map. Measured with sys.getsizeof on CPython 3.11, 64 bit.
_OVERHEAD = 360


class Memory:
    """A map of at most `limit` bytes. For one thread: the event loop's.

    It keeps entries whose record was verified; the caller compares the digest on every read.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._size = 0
        self._entries: OrderedDict[bytes, Entry] = OrderedDict()

    @property
    def size(self) -> int:
        """Bytes in use."""
        return self._size

    def __len__(self) -> int:
        return len(self._entries)

    def get(self, address: bytes) -> Entry | None:
        """Return an entry and note that it was used."""
        entry = self._entries.get(address)
        if entry is not None:
            self._entries.move_to_end(address)
        return entry

    def put(self, address: bytes, entry: Entry) -> None:
        """Keep an entry, and drop the least recently used ones for it as needed."""
        size = len(entry.vector) + _OVERHEAD
        if size > self._limit:
            return
        replaced = self._entries.pop(address, None)
        if replaced is not None:
            self._size -= len(replaced.vector) + _OVERHEAD
        self._entries[address] = entry
        self._size += size
        while self._size > self._limit:
            _, dropped = self._entries.popitem(last=False)
            self._size -= len(dropped.vector) + _OVERHEAD
