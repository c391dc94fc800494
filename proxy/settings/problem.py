"""Mistakes of a configuration: one of them with its place, and the error that carries them all.

A validator of a section raises `Problems` where it finds several mistakes at once, or where a
mistake belongs to one key of the section. pydantic reports it as it does any ValueError.
"""

from collections.abc import Iterable
from typing import NamedTuple

from .pasted_keys import MASK, hide_keys

Path = tuple[str | int, ...]
"""The place of a key: the names of sections, keys and list positions that lead to it."""


class Problem(NamedTuple):
    """One mistake: where it is, and what is wrong with the remedy."""

    path: Path
    message: str
    hides_name: bool = False
    """Whether the last name of the path is not shown: it may be a key that was pasted there."""

    @property
    def key(self) -> str:
        """The place as text: `models.m.routes.0.provider`; empty for the whole file."""
        path = (*self.path[:-1], MASK) if self.hides_name else self.path
        return ".".join(map(str, path))

    def below(self, path: Iterable[str | int]) -> "Problem":
        """Return the same problem as seen from a section further up."""
        return Problem((*path, *self.path), self.message, self.hides_name)


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
