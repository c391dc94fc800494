"""The last uses of entries: what protects them from eviction before it is written."""

from collections.abc import Iterable, Iterator, Mapping
from itertools import islice

from cache.disk.changes import Use

MOST = 50_000
"""About how many uses are remembered at most. Of those noted last, at least half as many are."""


class Uses(Mapping[bytes, Use]):
    """Uses by address, in two generations: to note thousands costs no more than two calls.

    Each is given out once to be written, and remembered still.
    """

    def __init__(self) -> None:
        self._young: dict[bytes, Use] = {}
        self._old: dict[bytes, Use] = {}
        self._unwritten: dict[bytes, object] = {}

    def note(self, addresses: Iterable[bytes], use: Use) -> None:
        """Note that entries were used."""
        new = dict.fromkeys(addresses, use)
        self._young.update(new)
        self._unwritten.update(new)
        if 2 * len(self._young) > MOST:
            self._old, self._young = self._young, {}
            self._unwritten = {a: None for a in self._unwritten if a in self._old}

    def take(self, most: int) -> dict[bytes, Use]:
        """Return uses that were not given out before, oldest first, at most so many."""
        taken = {address: self[address] for address in islice(self._unwritten, most)}
        for address in taken:
            del self._unwritten[address]
        return taken

    def __getitem__(self, address: bytes) -> Use:
        use = self._young.get(address)
        return self._old[address] if use is None else use

    def __iter__(self) -> Iterator[bytes]:
        return iter(self._old | self._young)

    def __len__(self) -> int:
        return len(self._old.keys() | self._young.keys())
