"""A map that is bounded in bytes, least recently used out first."""

from collections import OrderedDict
from collections.abc import Hashable
from typing import Any


class Pool:
    """What several kinds of things are kept in, within one limit. For one thread."""

    def __init__(self, limit: int) -> None:
        """`limit` is in bytes; what they are of is up to those who keep something here."""
        self._limit = limit
        self._kept: OrderedDict[Hashable, tuple[Any, int]] = OrderedDict()
        self.size = 0
        """Bytes in use."""

    def __len__(self) -> int:
        return len(self._kept)

    def get(self, key: Hashable) -> Any:  # noqa: ANN401 - whatever was kept
        """Return what is kept under a key, and note that it was used; None if nothing is."""
        kept = self._kept.get(key)
        if kept is None:
            return None
        self._kept.move_to_end(key)
        return kept[0]

    def keep(self, key: Hashable, value: object, size: int) -> None:
        """Keep something of that many bytes, in place of what was there."""
        self.drop(key)
        if size > self._limit:
            return
        self._kept[key] = (value, size)
        self.size += size
        while self.size > self._limit:
            self.drop(next(iter(self._kept)))

    def drop(self, key: Hashable) -> None:
        """Keep nothing under a key."""
        kept = self._kept.pop(key, None)
        if kept is not None:
            self.size -= kept[1]
