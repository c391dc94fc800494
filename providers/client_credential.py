"""A client's own key, for providers that hold none: it pays for its request, and nobody sees it.

Limits, rests and budgets belong to the key; what keeps them by key remembers the newest so many.
"""

import re
from dataclasses import dataclass, field

from .redaction import Redactor

MOST_KEYS = 1000
"""Keys of which something is remembered; those used longest ago are forgotten."""

_QUOTES = frozenset(
    "'\"`\u2018\u2019\u201a\u201b\u201c\u201d\u201e\u201f\u00ab\u00bb\u2039\u203a\u2032\u2033"
)
"""Quotation marks, also those that word processors put in their place."""

_VARIABLE = re.compile(r"\$[A-Za-z_]\w*|%[A-Za-z_]\w*%")


@dataclass(frozen=True, slots=True)
class Credential:
    """A client's key; two are equal if their names are."""

    secret: str = field(repr=False, compare=False)
    name: str
    """A digest that tells it from others, and tells nothing of it: for logs and the ledger."""
    is_exclusive: bool = False
    """Whether only providers that take it are to be asked: then an answer proves it."""

    def redacted(self, body: bytes) -> bytes:
        """Return what an upstream said, without the key, or the parts of it that vendors show.

        >>> Credential("sk-123456789xyz", "key-1").redacted(b"Wrong: sk-12***xyz, sk-123456789xyz.")
        b'Wrong: *** ***.'
        """
        return (
            Redactor(self.secret, every_mask=True)
            .redact_text(body.decode(errors="replace"))
            .encode()
        )


def key_mistake(key: str, variable: str = "") -> str:  # noqa: PLR0911 - one for each mistake
    """Return what is probably wrong with a key from a variable, and the remedy; else nothing.

    The key is not shown.

    >>> key_mistake("'sk-123'")
    'its value stands in quotes; set it without them'
    >>> key_mistake("sk-123")
    ''
    """
    lower = key.lower()
    if not _QUOTES.isdisjoint((key[:1], key[-1:])):
        return "its value stands in quotes; set it without them"
    if any(ord(sign) < 32 or ord(sign) == 127 for sign in key):
        return "its value is no key: it holds a line break or the like"
    if variable and key.startswith(f"{variable}="):
        return f"its value begins with {variable}= itself; set what stands behind that"
    for word in ("authorization:", "bearer ", "bearer:", "export "):
        if lower.startswith(word):
            return f"its value begins with `{key[: len(word)].rstrip()}`; set the key alone"
    if key.startswith(("$", "%")):
        return "its value is the name of another variable, not expanded; set the key itself"
    if not key.isascii():
        return "its value is no key: it holds a character that is not ASCII; set the key alone"
    if " " in key:
        return "its value is no key: it holds a blank; set the key alone"
    return ""


def client_key_mistake(key: str) -> str:
    """Return what is probably wrong with a key that clients are to send; else nothing.

    It is whoever runs the proxy that chooses it, so more is allowed than in a vendor's key. The
    key is not shown.

    >>> client_key_mistake("$TEAM_KEY")
    'is the name of a variable, not expanded; write ${NAME}'
    >>> client_key_mistake("Schl\u00fcssel")
    ''
    """
    key = key.strip()
    if not key:
        return "holds nothing but blanks; set the key, or remove the entry"
    if not _QUOTES.isdisjoint((key[0], key[-1])):
        return "stands in quotes that belong to its value; write it without them"
    if _VARIABLE.fullmatch(key):
        return "is the name of a variable, not expanded; write ${NAME}"
    if key.lower().startswith(("bearer ", "authorization:")):
        return "holds more than the key; write the key alone"
    if " " in key or not key.isprintable():
        return "holds a blank or a line break, and no client can send that; choose another key"
    return ""
