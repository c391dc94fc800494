"""Mistakes of a configuration: one of them with its place, and the error that carries them all.

A validator of a section raises `Problems` where it finds several mistakes at once, or where a
mistake belongs to one key of the section. pydantic reports it as it does any ValueError.
"""

import difflib
from collections.abc import Collection, Iterable
from typing import NamedTuple

from .pasted_keys import MASK, hide_keys

KeyPath = tuple[str | int, ...]
"""The place of a key: the names of sections, keys and list positions that lead to it."""


class Problem(NamedTuple):
    """One mistake: where it is, and what is wrong with the remedy."""

    path: KeyPath
    message: str
    hides_name: bool = False
    """Whether the last name of the path is not shown: it may be a key that was pasted there."""
    needs: tuple[KeyPath, ...] = ()
    """The other keys that it depends on: where one of them is wrong itself, it is not told."""
    meant: str = ""
    """The known key that a misspelt one stands for."""

    @property
    def key(self) -> str:
        """The place as text: `models.m.routes.0.provider`; empty for the whole file."""
        path = (*self.path[:-1], MASK) if self.hides_name else self.path
        return ".".join(map(str, path))

    def below(self, path: Iterable[str | int]) -> "Problem":
        """Return the same problem as seen from a section further up."""
        start = tuple(path)
        needs = tuple((*start, *need) for need in self.needs)
        return self._replace(path=(*start, *self.path), needs=needs)

    def follows(self, wrong: Collection[KeyPath]) -> bool:
        """Tell whether it is a consequence of other mistakes, whose places are given."""
        places = (self.path, *self.needs)
        return any(place[:n] in wrong for place in places for n in range(1, len(place) + 1))


class Problems(ValueError):
    """What is wrong with a section; paths are relative to it."""

    def __init__(self, problems: Iterable[Problem]) -> None:
        self.problems = tuple(problems)
        super().__init__(
            "; ".join(
                f"{one.key}: {one.message}" if one.path else one.message for one in self.problems
            )
        )


class ConfigError(Exception):
    """The configuration cannot be used.

    `problems` has a line for each mistake, with file, line, key and remedy, as far as they are
    known. No line holds a key.
    """

    def __init__(self, *problems: str) -> None:
        self.problems = tuple(
            hide_keys(problem).replace("\r", "\\r").replace("\n", "\\n") for problem in problems
        )
        super().__init__("\n".join(self.problems))


def refuse(problems: Iterable[Problem]) -> None:
    """Raise Problems if there are any."""
    found = tuple(problems)
    if found:
        raise Problems(found)


def nearest(name: str, known: Iterable[str], cutoff: float = 0.7) -> str:
    """Return the known name that a name is most like; empty if it is like none.

    >>> nearest("opnai", ["local", "openai"]), nearest("mine", ["local", "openai"])
    ('openai', '')
    """
    return next(iter(difflib.get_close_matches(name, list(known), n=1, cutoff=cutoff)), "")


def suggestion(name: str, known: Iterable[str]) -> str:
    """Return what to add to a message that a name is unknown; empty if it is like none.

    >>> suggestion("opnai", ["local", "openai"])
    '; did you mean openai?'
    """
    near = nearest(name, known)
    return f"; did you mean {near}?" if near else ""
