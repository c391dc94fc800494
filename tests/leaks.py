"""Finds secrets in what comes out of the proxy, in whatever encoding; watches every test.

A secret is a key that some upstream of a test was sent: the upstreams tell (`WATCH.heard`). So are
the texts that were embedded, as far as logs, status and metrics go. What came out is noted while a
test runs (`WATCH.note`), and searched at its end; `conftest` does so for each test. The upstreams
repeat the key in headers and errors, in every encoding that is known here.
"""

import asyncio
import base64
import html
import json
import logging
import sqlite3
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import closing, suppress
from functools import lru_cache
from itertools import islice
from pathlib import Path
from urllib.parse import quote

from embedding_proxy.proxy.http.connection import Connection
from embedding_proxy.proxy.log import LineFormatter

MIN_SECRET = 12
"""Characters; what is shorter may come about by chance."""
MIN_TEXT = 24
MAX_SECRETS = 10
MAX_TEXTS = 100
"""Of one test; further ones are not searched for."""
MAX_REPLY = 1 << 14
"""Bytes of what one connection sends that are searched."""
MAX_REPLIES = 1 << 20
"""The same of all connections together."""
MAX_FILE = 1 << 24
KEY_HEADERS = ("authorization", "api-key", "x-api-key", "x-goog-api-key", "proxy-authorization")


@lru_cache(maxsize=256)
def spellings(secret: str) -> dict[str, str]:
    """Return a secret as it is, and in each encoding, by the encoding's name.

    Of base64 amid other bytes only the digits are given that depend on the secret alone.
    """
    raw = secret.encode()
    escaped = json.dumps(secret)[1:-1]
    found = {
        "plain": secret,
        "upper case": secret.upper(),
        "lower case": secret.lower(),
        "JSON": escaped,
        "JSON in JSON": json.dumps(escaped)[1:-1],
        "JSON with slashes": escaped.replace("/", r"\/"),
        "JSON numbers": "".join(f"\\u{ord(c):04x}" for c in secret),
        "JSON numbers in upper case": "".join(f"\\u{ord(c):04X}" for c in secret),
        "JavaScript": "".join(f"\\x{byte:02x}" for byte in raw),
        "URL": quote(secret, safe=""),
        "URL in lower case": quote(secret, safe="").lower(),
        "URL twice": quote(quote(secret, safe=""), safe=""),
        "whole URL": "".join(f"%{byte:02X}" for byte in raw),
        "whole URL in lower case": "".join(f"%{byte:02x}" for byte in raw),
        "HTML": html.escape(secret),
        "HTML numbers": "".join(f"&#{byte};" for byte in raw),
        "HTML hexadecimal": "".join(f"&#x{byte:02X};" for byte in raw),
        "hexadecimal": raw.hex(),
        "hexadecimal in upper case": raw.hex().upper(),
        "hexadecimal with blanks": raw.hex(" "),
        "base64 of base64": base64.b64encode(base64.b64encode(raw)).decode().rstrip("="),
        "URL of base64": quote(base64.b64encode(raw).decode().rstrip("="), safe=""),
    }
    for before in range(3):
        digits = base64.b64encode(b"\0" * before + raw).decode().rstrip("=")
        sure = digits[(0, 2, 3)[before] : len(digits) - 1]
        found[f"base64 at {before}"] = sure
        found[f"URL-safe base64 at {before}"] = sure.translate(str.maketrans("+/", "-_"))
    return found


def found_in(secret: str, blob: str) -> list[str]:
    """Return the names of the encodings in which a blob holds a secret."""
    return [name for name, spelled in spellings(secret).items() if spelled in blob]


def echo_headers(secret: str) -> Iterable[tuple[str, str]]:
    """Yield headers that repeat a secret in every encoding."""
    for i, spelled in enumerate(dict.fromkeys(spellings(secret).values())):
        yield f"x-echo-{i}", spelled


def keys_in(headers: Mapping[str, str]) -> Iterator[str]:
    """Yield the keys that a request came with, if they are long enough to be told from words."""
    for name, value in headers.items():
        key = (value.split() or [""])[-1]
        if name.lower() in KEY_HEADERS and len(key) >= MIN_SECRET:
            yield key


class Watch(logging.Handler):
    """What the upstreams of one test were sent, and what came out of the proxy meanwhile."""

    def __init__(self) -> None:
        super().__init__(logging.NOTSET)
        self.setFormatter(LineFormatter())
        self.begin()

    def begin(self) -> None:
        """Forget everything."""
        self.secrets: dict[str, None] = {}
        self.texts: dict[str, None] = {}
        self._told: list[tuple[str, str]] = []
        """Where, and what: for nobody's secrets and nobody's texts."""
        self._replies: list[bytearray] = []
        self._reply_bytes = 0

    def heard(self, headers: Mapping[str, str], texts: Iterable[object] = ()) -> str | None:
        """Take note of what an upstream was sent; return the key in it."""
        keys = list(keys_in(headers))
        long = (one for one in texts if isinstance(one, str) and len(one) >= MIN_TEXT)
        for known, found, most in (
            (self.secrets, keys, MAX_SECRETS),
            (self.texts, long, MAX_TEXTS),
        ):
            if len(known) < most:
                known.update(dict.fromkeys(islice(found, most)))
        return keys[0] if keys else None

    def note(self, where: str, told: str) -> None:
        """Take note of something that came out."""
        self._told.append((where, told))

    def emit(self, record: logging.LogRecord) -> None:
        """Take note of a record: as a library's user gets it, and as the proxy writes it."""
        place = f"the log ({record.name}:{record.lineno})"
        if record.name.startswith("embedding_proxy"):
            self.note(place, record.getMessage())
        self.note(place, self.format(record))

    def reply(self) -> Callable[[bytes], None]:
        """Return what takes note of the bytes that a new connection sends."""
        sent = bytearray()
        self._replies.append(sent)

        def keep(data: bytes) -> None:
            room = min(MAX_REPLY - len(sent), MAX_REPLIES - self._reply_bytes)
            if room > 0:
                sent.extend(data[:room])
                self._reply_bytes += min(len(data), room)

        return keep

    def problems(self, directory: Path | None = None) -> list[str]:
        """Return what has come out that should not; `directory` is that of the cache."""
        told = list(self._told)
        files: list[Path] = []
        if directory is not None and directory.is_dir():
            files = [path for path in directory.rglob("*") if path.is_file()]
            told += [("a file's name", str(path.relative_to(directory))) for path in files]
            told += [("the outbox", reason) for reason in _reasons(directory)]
        told += [("a reply", sent.decode(errors="replace")) for sent in self._replies]
        # Most tests have nothing to report, and one search tells so.
        everything = "\n".join(text for _, text in told)
        problems = []
        for secret in self.secrets:
            for name in found_in(secret, everything):
                spelled = spellings(secret)[name]
                problems += [
                    f"{where} holds a key: {name}" for where, text in told if spelled in text
                ]
        for one in self.texts:
            if one in everything:
                places = (where for where, text in told if where != "a reply" and one in text)
                problems += [f"{where} holds a text: {one!r}" for where in places]
        for path in files:
            with suppress(OSError):
                if path.stat().st_size <= MAX_FILE:
                    held = path.read_bytes()
                    problems += [f"{path} holds a key" for s in self.secrets if s.encode() in held]
        return list(dict.fromkeys(problems))


def _reasons(directory: Path) -> list[str]:
    """Return why points were refused, as an outbox tells it."""
    path = directory / "index-outbox.db"
    if not path.is_file():
        return []
    try:
        with closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True, timeout=0)) as sql:
            return [reason for (reason,) in sql.execute("SELECT reason FROM dead") if reason]
    except sqlite3.Error:
        return []


WATCH = Watch()


def watch_connections() -> None:
    """Have what every connection of the proxy sends noted, from now on."""
    made = Connection.connection_made

    def connection_made(self: Connection, transport: asyncio.Transport) -> None:
        with suppress(AttributeError):  # another event loop's has no room for attributes
            _tap(transport, WATCH.reply())
        made(self, transport)

    Connection.connection_made = connection_made


def _tap(transport: asyncio.Transport, keep: Callable[[bytes], None]) -> None:
    write: Callable[[bytes], None] = transport.write
    writelines = transport.writelines

    def tapped(data: bytes) -> None:
        keep(data)
        write(data)

    def tapped_lines(lines: Iterable[bytes]) -> None:
        lines = list(lines)
        for data in lines:
            keep(data)
        writelines(lines)

    transport.write, transport.writelines = tapped, tapped_lines
