"""Loads what other installed packages provide by entry points.

A package may provide a kind of provider (see `registry`), a strategy that changes the dimensions of
vectors (see `dimensions`), or a way to make the texts of a migration
(see `index.migration.text_template`). The name of an entry point is what a configuration says. It
is loaded only when a configuration names it.
"""

import sys
from functools import lru_cache
from importlib.metadata import EntryPoints, entry_points
from typing import Any

PROVIDERS = "embedding_proxy.providers"
DIMENSIONS = "embedding_proxy.widths"
TEXTS = "embedding_proxy.texts"
"""The groups of entry points."""


def load(
    group: str, name: str, failure: type[Exception], absent: str, *, makes: bool = True
) -> tuple[str, Any]:
    """Return where an entry point leads, and what is there; `makes`: of a class, an object of it.

    Raises `failure`, with a message for people, which is `absent` if there is no such entry point.
    """
    # The metadata of all packages is read once, unless another folder may hold packages since.
    entry_point = next(iter(_all(group, tuple(sys.path)).select(name=name)), None)
    if entry_point is None:
        raise failure(absent)
    try:
        plugin = entry_point.load()
        return entry_point.value, plugin() if makes and isinstance(plugin, type) else plugin
    except Exception as error:
        raise failure(f"{entry_point.value} cannot be loaded: {error}") from error


@lru_cache(maxsize=8)
def _all(group: str, _path: tuple[str, ...]) -> EntryPoints:
    return entry_points(group=group)
