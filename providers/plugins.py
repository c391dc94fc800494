"""Loads what other installed packages provide by entry points."""

import sys
from functools import lru_cache
from importlib.metadata import EntryPoints, entry_points
from typing import Any


def load(
    group: str, name: str, failure: type[Exception], absent: str, *, makes: bool = True
) -> tuple[str, Any]:
    """Return where an entry point leads, and what is there; `makes`: of a class, an object of it.

    Raises `failure`, with a message for people, which is `absent` if there is no such entry point.
    """
    # The metadata of all packages is read once, unless another folder may hold packages since.
    found = next(iter(_all(group, tuple(sys.path)).select(name=name)), None)
    if found is None:
        raise failure(absent)
    try:
        brought = found.load()
        return found.value, brought() if makes and isinstance(brought, type) else brought
    except Exception as error:
        raise failure(f"{found.value} cannot be loaded: {error}") from error


@lru_cache(maxsize=8)
def _all(group: str, _path: tuple[str, ...]) -> EntryPoints:
    return entry_points(group=group)
