"""What people already own: a text and its vector, read one by one from somewhere. Pure.

Only the form is checked here: a text is text, a vector is numbers. Whether a vector is of the right
width, finite and of this model is for whoever takes the pairs in.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from embedding_proxy.providers.base import Vector
from embedding_proxy.providers.vector import VectorError, from_wire

_MOST_NAMES = 12


class Pair(NamedTuple):
    """A text and its vector."""

    text: str
    vector: Vector


@dataclass(frozen=True, slots=True)
class RejectedPair:
    """A pair that cannot be used. The next one may be usable."""

    where: str
    """`line 17`, `row 5`, `point 3`; lines and rows are counted from 1."""
    why: str


class SourceError(Exception):
    """The source cannot be read, or not to its end. One line, with the remedy."""


class Source(Protocol):
    """Pairs that can be read several times, each time from the start, one by one."""

    @property
    def name(self) -> str:
        """The name of the source in messages."""
        ...

    def __iter__(self) -> Iterator[Pair | RejectedPair]:
        """Yield one item for each pair. Raises SourceError if reading cannot continue."""
        ...


def to_pair(where: str, text: object, vector: object) -> Pair | RejectedPair:
    r"""Make a pair of what was read; `vector` is a list of numbers, base64, or float32 bytes.

    >>> to_pair("line 1", "a", [1, 2])
    Pair(text='a', vector=b'\x00\x00\x80?\x00\x00\x00@')
    >>> to_pair("line 2", "", [1, 2])
    RejectedPair(where='line 2', why='the text is empty')
    """
    text = to_text(where, text)
    if isinstance(text, RejectedPair):
        return text
    if isinstance(vector, bytes):
        return Pair(text, vector)
    try:
        return Pair(text, from_wire(vector))
    except VectorError as error:
        return RejectedPair(where, f"the vector: {error}")


def to_text(where: str, text: object) -> str | RejectedPair:
    """Return the text if it is one."""
    if text is None:
        return RejectedPair(where, "the text is missing")
    if not isinstance(text, str):
        return RejectedPair(where, "the text is not a string")
    if not text:
        return RejectedPair(where, "the text is empty")
    try:
        text.encode()
    except UnicodeEncodeError:
        return RejectedPair(where, "the text holds half of a surrogate pair")
    return text


def quote_names(names: Iterable[str]) -> str:
    """Return names for the end of a message: sorted, and not too many.

    >>> quote_names({"b", "a"})
    '`a`, `b`'
    """
    quoted = [f"`{name}`" for name in sorted(set(names))]
    rest = len(quoted) - _MOST_NAMES
    return ", ".join(quoted[:_MOST_NAMES]) + (f" and {rest} more" if rest > 0 else "")
