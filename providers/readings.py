"""What a text says when it is decoded: encodings in which a secret may hide. Pure.

URLs, HTML, JSON, base64, hexadecimal digits, and each of these within another. Nobody says which
of them a text is in, so every one is tried. The time is linear in the length of the text.
"""

import base64
import html
import re
from collections.abc import Callable, Iterator
from urllib.parse import unquote

MAX_DEPTH = 3
"""Encodings within encodings."""
_FACTOR, _LEAST = 6, 1 << 16
"""The characters of all readings together: so many times the text, but not fewer than the other."""

_ESCAPE = re.compile(
    r"\\(?:u\{([0-9A-Fa-f]{1,6})\}|u([0-9A-Fa-f]{4})|x([0-9A-Fa-f]{2})|([\"'\\/bfnrt]))"
)
_BASE64 = re.compile(r"[A-Za-z0-9+/_-]{11,}")
_HEX = re.compile(r"[0-9A-Fa-f](?:[ :,]?[0-9A-Fa-f]){15,}+")
_NO_HEX = re.compile(r"[ :,]")
_BLANK = re.compile(r"[\s\0\u00ad\u200b-\u200d\u2060\ufeff]+")
_ZEROS = re.compile(r"(&#[xX]?)0++")
_LONG_NUMBER = re.compile(r"&#[xX]?[0-9A-Fa-f]{9,}+")
_URLSAFE = str.maketrans("-_", "+/")


def readings(text: str) -> Iterator[str]:
    """Yield a text as it is, and then all that can be decoded from it, MAX_DEPTH deep.

    Of a long text that is encoded all over, not every reading of a reading is tried.

    >>> any("sk-1234/56789" in one for one in readings("c2stMTIzNC81Njc4OQ%253D%253D"))
    True
    """
    yield text
    left = max(_FACTOR * len(text), _LEAST)
    line = [text]
    for _ in range(MAX_DEPTH):
        found: list[str] = []
        for one in line:
            for decode in _DECODERS:
                decoded = decode(one)
                if not decoded or decoded == one:
                    continue
                left -= len(decoded)
                if left < 0:
                    return
                found.append(decoded)
                yield decoded
        line = found


def _unescaped(text: str) -> str:
    return _ESCAPE.sub(_character, text) if "\\" in text else ""


def _character(found: re.Match[str]) -> str:
    digits = found[1] or found[2] or found[3]
    if not digits:
        return {"b": "\b", "f": "\f", "n": "\n", "r": "\r", "t": "\t"}.get(found[4], found[4])
    number = int(digits, 16)
    return chr(number) if number <= 0x10FFFF else ""


def _without_references(text: str) -> str:
    if "&" not in text:
        return ""
    # Python refuses numbers of thousands of digits.
    return html.unescape(_LONG_NUMBER.sub("", _ZEROS.sub(r"\1", text)))


def _unquoted(text: str) -> str:
    return unquote(text) if "%" in text else ""


def _joined(text: str) -> str:
    """Return a text without what separates: a folded header, a wrapped line, UTF-16 as bytes."""
    return _BLANK.sub("", text)


def _from_base64(text: str) -> str:
    """Return what the words of a text are in base64, each read from its first four digits."""
    pieces = []
    for found in _BASE64.finditer(text):
        word = found[0].translate(_URLSAFE)
        for first in range(4):
            digits = word[first:]
            whole = digits[: len(digits) // 4 * 4] if len(digits) % 4 == 1 else digits
            pieces.append(base64.b64decode(whole + "=" * (-len(whole) % 4)))
    return b"\n".join(pieces).decode(errors="replace")


def _from_hex(text: str) -> str:
    pieces: list[str] = []
    for found in _HEX.finditer(text):
        digits = _NO_HEX.sub("", found[0])
        even = len(digits) % 2 == 0
        pieces += [digits if even else digits[:-1], digits[1:-1] if even else digits[1:]]
    return b"\n".join(map(bytes.fromhex, pieces)).decode(errors="replace")


_DECODERS: tuple[Callable[[str], str], ...] = (
    _unquoted,
    _without_references,
    _unescaped,
    _joined,
    _from_base64,
    _from_hex,
)
