"""A bounded LRU map: for values whose keys come from outside, or that take much memory."""

from collections import OrderedDict
from collections.abc import Callable, ItemsView, Iterator
from typing import Generic, TypeVar

K = TypeVar("K")
V = TypeVar("V")


class LRUCache(Generic[K, V]):
    """Values by key, of a bounded total size; the least recently used are evicted first.

    No value is None. For one thread.

    >>> cache = LRUCache[str, int](2)
    >>> cache["a"], cache["b"] = 1, 2
    >>> cache.get("a"), cache.peek("b")
    (1, 2)
    >>> cache["c"] = 3
    >>> cache.get("b"), list(cache)
    (None, ['a', 'c'])
    """

    def __init__(
        self,
        max_size: int,
        size_of: Callable[[K, V], int] = lambda _key, _value: 1,
        on_evict: Callable[[K, V], None] = lambda _key, _value: None,
    ) -> None:
        """`size_of` gives the size of a key with its value, always the same for the same ones.

        `on_evict` is called with what was evicted to make room.
        """
        self._items: OrderedDict[K, V] = OrderedDict()
        self._size_of = size_of
        self._on_evict = on_evict
        self.max_size = max_size
        self.size = 0
        """Of all values together."""
        self.peek: Callable[[K], V | None] = self._items.get
        """Return the value of a key, None if there is none; it does not count as a use."""
        self.mark_used: Callable[[K], None] = self._items.move_to_end
        """Let a key that is here be the most recently used."""

    def __len__(self) -> int:
        return len(self._items)

    def __contains__(self, key: K) -> bool:
        return key in self._items

    def __iter__(self) -> Iterator[K]:
        """Give the keys, the least recently used first."""
        return iter(self._items)

    def items(self) -> ItemsView[K, V]:
        """Return the keys with their values, the least recently used first."""
        return self._items.items()

    def get(self, key: K) -> V | None:
        """Return the value of a key, None if there is none; it is the most recently used now."""
        value = self._items.get(key)
        if value is not None:
            self._items.move_to_end(key)
        return value

    def get_or_make(self, key: K, make: Callable[[], V]) -> V:
        """Return the value of a key, made if there is none."""
        value = self.get(key)
        if value is None:
            value = self[key] = make()
        return value

    def __setitem__(self, key: K, value: V) -> None:
        """Put a value, in place of the key's former one; one that is too large is not kept."""
        replaced = self._items.pop(key, None)
        if replaced is not None:
            self.size -= self._size_of(key, replaced)
        size = self._size_of(key, value)
        if size > self.max_size:
            return
        self._items[key] = value
        self.size += size
        while self.size > self.max_size:
            evicted = self._items.popitem(last=False)
            self.size -= self._size_of(*evicted)
            self._on_evict(*evicted)

    def pop(self, key: K) -> V | None:
        """Remove a key and return its value; None if there is none."""
        value = self._items.pop(key, None)
        if value is not None:
            self.size -= self._size_of(key, value)
        return value

    def clear(self) -> None:
        """Remove everything."""
        self._items.clear()
        self.size = 0
