"""Ways to bring vectors to another width that installed packages bring, beside our own policies.

A package brings one by an entry point of the group `embedding_proxy.widths`. Its name is what a
model's `width` may say; it leads to an object as `Strategy` tells, or to a class that makes one
without arguments. It is loaded when a configuration names it.

What a strategy gives is a space of its own, named after it and its version: such vectors compare
with one another, and neither with the model's own nor with those of another version.
"""

from functools import lru_cache
from typing import Protocol, runtime_checkable

from embedding_proxy.providers import plugins
from embedding_proxy.providers.vector import Floats

GROUP = "embedding_proxy.widths"


@runtime_checkable
class Strategy(Protocol):
    """A way to bring vectors to another width. It must give the same numbers each time."""

    version: str
    """Another one whenever it gives other numbers than before."""

    def can_give(self, native: int, dimensions: int) -> bool:
        """Tell whether vectors of `native` numbers can be brought to `dimensions`."""
        ...

    def bring(self, vectors: Floats, dimensions: int) -> Floats:
        """Return n vectors, shape (n, native), in shape (n, dimensions). Called in a thread."""
        ...


class UnknownStrategy(LookupError):
    """There is no such strategy, or the package that brings it brings something else."""


@lru_cache
def find(name: str) -> Strategy:
    """Return a strategy by its name. Raises UnknownStrategy, with a message for people."""
    absent = "expected strict, truncate or pad, or a strategy that an installed package brings"
    where, strategy = plugins.load(GROUP, name, UnknownStrategy, absent)
    if not isinstance(strategy, Strategy) or not str(strategy.version):
        raise UnknownStrategy(f"{where} has no version, can_give and bring")
    return strategy
