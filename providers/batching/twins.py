"""One vector for different texts: a fault of some upstreams, told apart from what models may do.

Models may give one vector to different texts, and rightly so: those that fold case and accents, cut
long texts, average words, or know neither emoji nor a script, give it to what differs in these
alone. So texts count as different only if the sets of their first words, in ASCII and folded, are.
"""

import re
import unicodedata
from collections.abc import Sequence

from providers.base import Input, Vector

_WORDS = re.compile(r"[a-z0-9]+")
_FIRST = 1024
"""Characters that are looked at; no model reads less."""
_LONGEST_WORD = 64
"""Characters; models of the BERT family take any longer word for one and the same."""
_MOST_WORDS = 100
_PREFIX = 64
"""Bytes by which two vectors are told apart at first."""


def find(inputs: Sequence[Input], vectors: Sequence[Vector]) -> tuple[int, int] | None:
    """Return the places of two inputs that differ but have one vector; None if there are none.

    >>> find(["yes", "no"], [b"same", b"same"])
    (0, 1)
    >>> find(["Yes", "yes!"], [b"same", b"same"])
    """
    if len({vector[:_PREFIX] for vector in vectors}) == len(vectors):
        return None
    first: dict[Vector, int] = {}
    for i, vector in enumerate(vectors):
        j = first.setdefault(vector, i)
        if i != j and _gist(inputs[i]) != _gist(inputs[j]):
            return j, i
    return None


def _gist(item: Input) -> frozenset[str | int]:
    """Return what no model may overlook of an input."""
    if not isinstance(item, str):
        return frozenset(item[:_MOST_WORDS])
    plain = unicodedata.normalize("NFKD", item[:_FIRST]).encode("ascii", "ignore").decode()
    words = [word for word in _WORDS.findall(plain.lower()) if len(word) <= _LONGEST_WORD]
    return frozenset(words[:_MOST_WORDS])
