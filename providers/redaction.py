"""Removes inputs and secrets from what an upstream says, before a client or the log gets it. Pure.

Inputs: one call may hold the texts of several clients, and each of them gets its error. So an error
repeats no input, not even to the client that sent it. If an input is found only after decoding, the
whole message is left out.

Secrets: known secrets are searched for, not guessed: as they are, as JSON, HTML, URLs and base64
write them, cut short, and masked as vendors show them (`sk-ab***yz`). What is left is decoded; a
text that still holds a secret is not shown.

`decodings` decodes a text in every encoding that may hide a secret: URLs, HTML, JSON, base64,
hexadecimal digits, and each of these within another. A text does not say which of them it is in, so
all are tried. Time is linear in the length of the text throughout.
"""

import base64
import html
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from urllib.parse import quote, quote_plus, unquote

import orjson

MASK = "***"
"""Replaces a removed input or secret."""
_MASK_BYTES = MASK.encode()

MAX_DEPTH = 3
"""Levels of encodings within encodings."""
_FACTOR, _MIN_CHARACTERS = 6, 1 << 16
"""Bound of the characters of all decodings: `_FACTOR` times the text, or `_MIN_CHARACTERS`."""

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


def decodings(text: str) -> Iterator[str]:
    """Yield a text as it is, and then all that can be decoded from it, MAX_DEPTH deep.

    Of a long text that is encoded throughout, not every decoding of a decoding is tried.

    >>> any("sk-1234/56789" in one for one in decodings("c2stMTIzNC81Njc4OQ%253D%253D"))
    True
    """
    yield text
    room = max(_FACTOR * len(text), _MIN_CHARACTERS)
    level = [text]
    for _ in range(MAX_DEPTH):
        texts: list[str] = []
        for text_of_level in level:
            for decode in _DECODERS:
                decoded = decode(text_of_level)
                if not decoded or decoded == text_of_level:
                    continue
                room -= len(decoded)
                if room < 0:
                    return
                texts.append(decoded)
                yield decoded
        level = texts


def _unescape(text: str) -> str:
    return _ESCAPE.sub(_character, text) if "\\" in text else ""


def _character(match: re.Match[str]) -> str:
    digits = match[1] or match[2] or match[3]
    if not digits:
        return {"b": "\b", "f": "\f", "n": "\n", "r": "\r", "t": "\t"}.get(match[4], match[4])
    number = int(digits, 16)
    return chr(number) if number <= 0x10FFFF else ""


def _unescape_html(text: str) -> str:
    if "&" not in text:
        return ""
    # Python refuses numbers of thousands of digits.
    return html.unescape(_LONG_NUMBER.sub("", _ZEROS.sub(r"\1", text)))


def _unquote_url(text: str) -> str:
    return unquote(text) if "%" in text else ""


def _remove_blanks(text: str) -> str:
    """Return a text without separators: of a folded header, a wrapped line, UTF-16 as bytes."""
    return _BLANK.sub("", text)


def _from_base64(text: str) -> str:
    """Return the words of a text decoded as base64, each from its first four digits on."""
    pieces = []
    for match in _BASE64.finditer(text):
        word = match[0].translate(_URLSAFE)
        for first in range(4):
            digits = word[first:]
            whole = digits[: len(digits) // 4 * 4] if len(digits) % 4 == 1 else digits
            pieces.append(base64.b64decode(whole + "=" * (-len(whole) % 4)))
    return b"\n".join(pieces).decode(errors="replace")


def _from_hex(text: str) -> str:
    pieces: list[str] = []
    for match in _HEX.finditer(text):
        digits = _NO_HEX.sub("", match[0])
        even = len(digits) % 2 == 0
        pieces += [digits if even else digits[:-1], digits[1:-1] if even else digits[1:]]
    return b"\n".join(map(bytes.fromhex, pieces)).decode(errors="replace")


_DECODERS: tuple[Callable[[str], str], ...] = (
    _unquote_url,
    _unescape_html,
    _unescape,
    _remove_blanks,
    _from_base64,
    _from_hex,
)


NOT_SHOWN = "(the message repeats an input, and is not shown)"
MIN_QUOTED = 16
"""Characters of an input that identify it. A shorter text may be a part of any sentence."""
_MAX_PIECES = 1 << 18


class QuotedInputs:
    """Finds the texts of one call in messages. Nothing is prepared before the first message.

    Blanks and upper or lower case make no difference. A part of a text is found if it is twice as
    long as MIN_QUOTED, and a shorter one if a text begins with it; in calls of more than 4 million
    characters only longer ones are.
    """

    def __init__(self, inputs: Iterable[object]) -> None:
        self._inputs = inputs
        self._texts: Sequence[str] = ()
        self._pieces: dict[str, tuple[int, int]] | None = None

    def hide(self, message: str) -> str:
        """Return a message of at most a few thousand characters with a mask for each quotation.

        >>> QuotedInputs(["my diary of this year"]).hide("Too long: 'My diary of this year'.")
        "Too long: '***'."
        """
        if len(message) < MIN_QUOTED:
            return message
        masked = self._masked(message)
        is_shown = all(self._masked(decoded) is decoded for decoded in decodings(masked))
        return masked if is_shown else NOT_SHOWN

    def _masked(self, message: str) -> str:
        """Return a message with a mask for each quotation; the same object if it has none."""
        pieces = self._prepared()
        if not pieces:
            return message
        line = " ".join(message.split())
        lower = line.lower()
        if len(lower) != len(line):
            # Some letters have two lower-case ones, so that positions differ.
            line = lower
        pieces_kept: list[str] = []
        end = at = 0
        while at <= len(lower) - MIN_QUOTED:
            starts = pieces.get(lower[at : at + MIN_QUOTED])
            if starts is None:
                at += 1
                continue
            text, index = self._texts[starts[0]], starts[1]
            # No more of a long text is copied than the length of the message.
            begin = max(0, index - (at - end))
            before = _common(lower[end:at][::-1], text[begin:index][::-1])
            after = _common(lower[at:], text[index : index + len(lower) - at])
            pieces_kept += [line[end : at - before], MASK]
            end = at = at + after
        return "".join([*pieces_kept, line[end:]]) if pieces_kept else message

    def _prepared(self) -> dict[str, tuple[int, int]]:
        """Return pieces of the texts, MIN_QUOTED characters at equal steps, by position."""
        if self._pieces is None:
            self._texts = [_plain(item) for item in self._inputs if isinstance(item, str)]
            size = sum(map(len, self._texts))
            step = MIN_QUOTED * (1 + size // (MIN_QUOTED * _MAX_PIECES))
            self._pieces = {
                text[at : at + MIN_QUOTED]: (i, at)
                for i, text in enumerate(self._texts)
                for at in range(0, len(text) - MIN_QUOTED + 1, step)
            }
        return self._pieces


def _common(one: str, other: str) -> int:
    """Return how many characters two texts have in common at their beginnings."""
    differing = (i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b)
    return next(differing, min(len(one), len(other)))


def _plain(text: str) -> str:
    """Return a text in lower case, each run of blanks one blank."""
    return " ".join(text.split()).lower()


MAX_BYTES = 1 << 20
"""A longer text is cut here before it is searched."""

# A shorter secret, or a shorter beginning of one, may be a part of any word.
_MIN_SECRET = 8
_BEGINNING = 8
# A secret of this length is no word, so it is removed from good replies, too.
_MIN_UNMISTAKABLE = 16
# So much of a secret, in whatever encoding, is a leak if it begins or ends at most 8 characters
# from its beginning or its end.
_PART = 12
_OFFSETS = (0, 4, 8)
# Characters of a secret beside a mask by which the masked text is known to be it.
_MIN_HEAD, _MIN_TAIL = 3, 3
_DELIMITER = re.compile(rb'[\s"\\]')
# Each alternative is tried only where a word begins, and none gives back what it has taken.
_MASKED = re.compile(
    rb'(?<![^\s"\\])(?:[^\s"\\*]++|\*{1,2}+(?!\*))*+\*{3}[^\s"\\]*+'
    rb"|(?<![\w-])[\w-]{2,}+(?:\.{3}|\xe2\x80[\xa2\xa6])[\w-]{2,}+"
)
_GAP = re.compile(rb"\*{3,}|\.{3}|\xe2\x80[\xa2\xa6]")


class Redactor:
    """Removes secrets. Those of fewer than 8 bytes are ignored: they occur in any text."""

    def __init__(self, *secrets: str, every_mask: bool = False) -> None:
        """`every_mask`: also remove what looks masked and is no known secret."""
        self._secrets = [s.encode() for s in dict.fromkeys(secrets) if len(s) >= _MIN_SECRET]
        forms = {form for secret in self._secrets for form in _forms(secret)}
        self._forms = sorted(forms, key=len, reverse=True)
        texts = [secret.decode() for secret in self._secrets]
        self._short = [one for one in texts if len(one) < _MIN_UNMISTAKABLE]
        long = [one for one in texts if len(one) >= _MIN_UNMISTAKABLE]
        lower = [one.lower() for one in long]
        self._parts = {part for one in lower for part in _parts(one)}
        passing = {form for one in long for form in _forms(one.encode())}
        self._passing = [f for f in self._forms if f in passing and len(f) >= _MIN_UNMISTAKABLE]
        self._every_mask = every_mask

    def redact(self, body: bytes) -> bytes:
        """Return a text without the secrets, of at most MAX_BYTES.

        >>> Redactor("sk-123456789xyz").redact(b"Wrong: sk-12***xyz, sk-123456789xyz.")
        b'Wrong: *** ***.'
        """
        body = body[:MAX_BYTES]
        if not self._secrets:
            return self._remove_masked(body)
        body = self._remove_masked(body)
        for form in self._forms:
            body = body.replace(form, _MASK_BYTES)
        for secret in self._secrets:
            if len(secret) > _BEGINNING:
                body = _remove_beginnings(secret[:_BEGINNING], body)
        return body

    def redact_text(self, text: str) -> str:
        """Return a text without the secrets; only a mask if it hides one in another encoding."""
        redacted = self.redact(text.encode(errors="replace"))
        return redacted.decode(errors="replace") if self.is_clean(redacted) else MASK

    def is_clean(self, body: bytes) -> bool:
        """Tell whether no secret shows in a text, nor in what it can be decoded to.

        A long secret is told from a part near its beginning or end, in upper or lower case. Such a
        text may hold an encoding that `redact` does not know, or one within another.
        """
        return not self._secrets or not any(
            map(self._shows, decodings(body.decode(errors="replace")))
        )

    def _shows(self, text: str) -> bool:
        if any(secret in text for secret in self._short):
            return True
        lower = text.lower() if self._parts else ""
        return any(part in lower for part in self._parts)

    def overwrite(self, text: str) -> str:
        """Return a good message as `stream` does: with stars in place of secrets."""
        return self.overwrite_bytes(text.encode()).decode()

    def overwrite_bytes(self, body: bytes) -> bytes:
        """Return a good message of bytes as `stream` does."""
        passing = self.stream()
        return passing.feed(body) + passing.finish()

    def stream(self) -> "RedactedStream":
        """Return what redacts a good reply as it passes."""
        return RedactedStream(self._passing)

    @property
    def watches_good_replies(self) -> bool:
        """Whether any secret is long enough to be removed from good replies."""
        return bool(self._passing)

    def _remove_masked(self, body: bytes) -> bytes:
        if not (self._secrets or self._every_mask):
            return body
        return _MASKED.sub(lambda match: _MASK_BYTES if self._is_ours(match[0]) else match[0], body)

    def _is_ours(self, masked: bytes) -> bool:
        return self._every_mask or any(_may_be(masked, secret) for secret in self._secrets)


class RedactedStream:
    """Overwrites secrets in bytes that pass, each by as many stars: no length changes."""

    def __init__(self, secrets: Iterable[bytes]) -> None:
        self._secrets = list(secrets)
        self._held = b""
        self.found = False
        """Whether anything was overwritten."""

    @property
    def is_holding(self) -> bool:
        """Whether an end is held back that may begin a secret."""
        return bool(self._held)

    def feed(self, chunk: bytes) -> bytes:
        """Return what can be sent; an end that may begin a secret is held back."""
        data = self._held + chunk
        for secret in self._secrets:
            if secret in data:
                data = data.replace(secret, b"*" * len(secret))
                self.found = True
        held = max((_held(secret, data) for secret in self._secrets), default=0)
        end = len(data) - held
        self._held = data[end:]
        return data[:end]

    def finish(self) -> bytes:
        """Return what was held back."""
        held, self._held = self._held, b""
        return held


def _held(secret: bytes, data: bytes) -> int:
    """Return the length of the longest end of the data that begins the secret."""
    end = data[max(0, len(data) - len(secret) + 1) :]
    at = end.find(secret[:1])
    while at >= 0:
        if secret.startswith(end[at:]):
            return len(end) - at
        at = end.find(secret[:1], at + 1)
    return 0


def _forms(secret: bytes) -> Iterable[bytes]:
    """Yield a secret as it is written in a text, in JSON, HTML, URLs and base64."""
    text = secret.decode()
    yield secret
    yield orjson.dumps(text)[1:-1]
    # An error in JSON, as the message of another.
    yield orjson.dumps(orjson.dumps(text)[1:-1].decode())[1:-1]
    yield orjson.dumps(text)[1:-1].replace(b"/", b"\\/")
    yield html.escape(text).encode()
    for quoted in (quote(text, safe=""), quote_plus(text)):
        yield quoted.encode()
        yield re.sub("%..", lambda match: match[0].lower(), quoted).encode()
    for before in range(3):
        # Of what stands in base64 amid other bytes, the digits that depend on the secret alone.
        padded = b"\0" * before + secret
        whole = len(padded) // 3 * 3
        first = (0, 2, 3)[before]
        for encode in (base64.b64encode, base64.urlsafe_b64encode):
            digits = encode(padded[:whole])[first:]
            if len(digits) >= _MIN_SECRET:
                yield digits


def _parts(secret: str) -> Iterable[str]:
    """Yield the parts of a long secret by which it is known."""
    for offset in _OFFSETS:
        yield from (secret[offset : offset + _PART], secret[: len(secret) - offset][-_PART:])


def _remove_beginnings(beginning: bytes, body: bytes) -> bytes:
    """Return a text without the words that begin so, from there to their ends."""
    pieces = []
    at = 0
    while (start := body.find(beginning, at)) >= 0:
        end = _DELIMITER.search(body, start)
        pieces += [body[at:start], _MASK_BYTES]
        at = len(body) if end is None else end.start()
    return b"".join([*pieces, body[at:]])


def _may_be(masked: bytes, secret: bytes) -> bool:
    """Tell whether a masked word shows the beginning or the end of a secret."""
    word = masked.strip(b"'`.,:;()<>[]{}")
    shown = _GAP.split(word)
    head, tail = shown[0], shown[-1]
    begins = len(head) >= _MIN_HEAD and secret.startswith(head)
    return begins or (len(tail) >= _MIN_TAIL and secret.endswith(tail))
