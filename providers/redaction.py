"""Removes known secrets from what an upstream says, before a client or the log gets it.

Secrets are searched for, not guessed: as they are, as JSON, HTML, URLs and base64 write them, cut
short, and masked as vendors show them (`sk-ab***yz`). The time is linear in the length of the text.
"""

import base64
import html
import re
from collections.abc import Iterable
from urllib.parse import quote, quote_plus, unquote

import orjson

MAX_BYTES = 1 << 20
"""A longer text is cut here before it is searched."""
MASK = b"***"

# A shorter secret may be a part of any word, and so may a shorter beginning of one.
_MIN_SECRET = 8
_BEGINNING = 8
# A secret of this length is no word: it is removed from good replies, too.
_MIN_UNMISTAKABLE = 16
# Characters of a secret beside a mask by which the masked text is known to be it.
_MIN_HEAD, _MIN_TAIL = 3, 3
_DELIMITER = re.compile(rb'[\s"\\]')
# Each alternative is tried only where a word begins, and none gives back what it has taken.
_MASKED = re.compile(
    rb'(?<![^\s"\\])(?:[^\s"\\*]++|\*{1,2}+(?!\*))*+\*{3}[^\s"\\]*+'
    rb"|(?<![\w-])[\w-]{2,}+\.{3}[\w-]{2,}+"
)


class Redactor:
    """Removes some secrets. Those of fewer than 8 bytes are no secrets: they occur in any text."""

    def __init__(self, *secrets: str, every_mask: bool = False) -> None:
        """`every_mask`: also remove what looks masked and is no known secret."""
        self._secrets = [s.encode() for s in dict.fromkeys(secrets) if len(s) >= _MIN_SECRET]
        forms = {form for secret in self._secrets for form in _forms(secret)}
        self._forms = sorted(forms, key=len, reverse=True)
        self._every_mask = every_mask

    def redact(self, body: bytes) -> bytes:
        """Return a text without the secrets, of at most MAX_BYTES.

        >>> Redactor("sk-123456789xyz").redact(b"Wrong: sk-12***xyz, sk-123456789xyz.")
        b'Wrong: *** ***.'
        """
        body = body[:MAX_BYTES]
        if not self._secrets:
            return self._without_masks(body)
        body = self._without_masks(body)
        for form in self._forms:
            body = body.replace(form, MASK)
        for secret in self._secrets:
            if len(secret) > _BEGINNING:
                body = _without_beginnings(secret[:_BEGINNING], body)
        return body

    def redact_text(self, text: str) -> str:
        """Return a text without the secrets; the whole is a mask where they are well hidden."""
        found = self.redact(text.encode(errors="replace"))
        return found.decode(errors="replace") if self.is_clean(found) else MASK.decode()

    def is_clean(self, body: bytes) -> bool:
        """Tell whether no secret shows in a text when it is decoded as JSON, HTML or a URL.

        Such a text may hold an encoding that `redact` does not know.
        """
        if not self._secrets:
            return True
        text = body.decode(errors="replace")
        readings = [unquote(text), _unescaped(text), *_json_strings(body)]
        return not any(s.decode() in one for s in self._secrets for one in readings)

    def overwrite(self, text: str) -> str:
        """Return a good message as `stream` does: with stars in place of secrets."""
        passing = self.stream()
        return (passing.feed(text.encode()) + passing.finish()).decode()

    def stream(self) -> "RedactedStream":
        """Return what redacts a good reply as it passes."""
        return RedactedStream([s for s in self._secrets if len(s) >= _MIN_UNMISTAKABLE])

    def _without_masks(self, body: bytes) -> bytes:
        if not (self._secrets or self._every_mask):
            return body
        return _MASKED.sub(lambda found: MASK if self._is_ours(found[0]) else found[0], body)

    def _is_ours(self, masked: bytes) -> bool:
        return self._every_mask or any(_may_be(masked, secret) for secret in self._secrets)


class RedactedStream:
    """Overwrites secrets in bytes that pass, each by as many stars: no length changes."""

    def __init__(self, secrets: Iterable[bytes]) -> None:
        self._secrets = list(secrets)
        self._held = b""

    def feed(self, chunk: bytes) -> bytes:
        """Return what can be sent on; an end that may begin a secret is held back."""
        data = self._held + chunk
        for secret in self._secrets:
            data = data.replace(secret, b"*" * len(secret))
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
    longest = min(len(secret) - 1, len(data))
    return next((n for n in range(longest, 0, -1) if data.endswith(secret[:n])), 0)


def _forms(secret: bytes) -> Iterable[bytes]:
    """Yield a secret as it is written in a text, in JSON, HTML, URLs and base64."""
    text = secret.decode()
    yield secret
    yield orjson.dumps(text)[1:-1]
    yield orjson.dumps(text)[1:-1].replace(b"/", b"\\/")
    yield html.escape(text).encode()
    for quoted in (quote(text, safe=""), quote_plus(text)):
        yield quoted.encode()
        yield re.sub("%..", lambda found: found[0].lower(), quoted).encode()
    for before in range(3):
        # Of what stands in base64 amid other bytes, the digits that depend on the secret alone.
        padded = b"\0" * before + secret
        whole = len(padded) // 3 * 3
        first = (0, 2, 3)[before]
        for encode in (base64.b64encode, base64.urlsafe_b64encode):
            digits = encode(padded[:whole])[first:]
            if len(digits) >= _MIN_SECRET:
                yield digits


def _without_beginnings(beginning: bytes, body: bytes) -> bytes:
    """Return a text without the words that begin so, from there to their ends."""
    pieces = []
    at = 0
    while (found := body.find(beginning, at)) >= 0:
        end = _DELIMITER.search(body, found)
        pieces += [body[at:found], MASK]
        at = len(body) if end is None else end.start()
    return b"".join([*pieces, body[at:]])


def _may_be(masked: bytes, secret: bytes) -> bool:
    """Tell whether a masked word shows the beginning or the end of a secret."""
    word = masked.strip(b"'`.,:;()<>[]{}")
    head, tail = word.split(b"***")[0].split(b"...")[0], re.split(rb"\*{3,}|\.{3}", word)[-1]
    begins = len(head) >= _MIN_HEAD and secret.startswith(head)
    return begins or (len(tail) >= _MIN_TAIL and secret.endswith(tail))


def _unescaped(text: str) -> str:
    """Return a text with HTML's references resolved, or as it is where that is not possible."""
    try:
        return html.unescape(text)
    except ValueError:
        # Python reads no number of thousands of digits.
        return text


def _json_strings(body: bytes) -> Iterable[str]:
    """Yield all strings of a JSON text, names of fields too; none if it is no JSON."""
    try:
        values: list[object] = [orjson.loads(body)]
    except orjson.JSONDecodeError:
        return
    while values:
        value = values.pop()
        if isinstance(value, str):
            yield value
        elif isinstance(value, dict):
            values += [*value, *value.values()]
        elif isinstance(value, list):
            values += value
