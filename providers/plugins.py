"""What other installed packages bring, by their entry points."""

import sys
from functools import lru_cache
from importlib.metadata import EntryPoint, EntryPoints, entry_points


def find(group: str, name: str) -> EntryPoint | None:
    """Return the entry point of a name, None if no package has one."""
    return next(iter(_all(group, tuple(sys.path)).select(name=name)), None)


@lru_cache(maxsize=8)
def _all(group: str, _path: tuple[str, ...]) -> EntryPoints:
    """Return all entry points of a group; for that the metadata of every package is read."""
    return entry_points(group=group)
