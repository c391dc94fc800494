"""The file of clients' keys: digests of keys, each with its settings, as `keys add` writes them.

A key is `ep-` and 32 random bytes in hexadecimal. The file holds its SHA-256: of 256 random bits a
digest without salt and stretching is enough, for nobody can try them all. So the file lets nobody
in who reads it, and a key that is lost cannot be shown again. One name may have several keys, which
is how a key is replaced by another while clients still use it.
"""

import hashlib
import re
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, date, datetime, time, timedelta
from pathlib import Path
from typing import Any, TypeAlias, get_args

from embedding_proxy.cache import atomic_file, private_files
from embedding_proxy.cache.disk.lock import WriterLock
from embedding_proxy.cache.key import RESERVED_NAMESPACES
from embedding_proxy.providers.charge import NANO, Period, SpendingLimit

from . import yaml_file
from .errors import ConfigError, KeyPath, looks_like_key
from .yaml_file import YamlError, YamlFile

FILE_NAME = "keys.yaml"
PREFIX = "ep-"
MAX_NAME = 100
"""Characters of a name."""
MAX_USD = 1e6
LOCK_S = 10.0
"""Seconds to wait for another command that changes the file."""
_MISSING = (FileNotFoundError, NotADirectoryError)
_KEY = re.compile(rf"{PREFIX}[0-9a-f]{{64}}")
_DIGEST = re.compile(r"[0-9a-f]{64}")
_LIMIT = re.compile(r"\s*(\d{1,7}(?:\.\d{1,9})?)\s*(?:/\s*([a-z]+))?\s*")
_HEADING = """\
# Clients' keys of embedding-proxy: digests, of which no key can be told. `embedding-proxy keys`
# writes this file; a running proxy heeds what changes in it within two seconds.
"""


@dataclass(frozen=True, slots=True)
class StoredKey:
    """One key of the file."""

    name: str
    digest: bytes
    """SHA-256 of the key, 32 bytes."""
    created: datetime
    namespace: str = ""
    is_admin: bool = False
    limit: SpendingLimit | None = None
    expires: datetime | None = None
    """The time from which the key is refused; None = it does not expire."""

    def is_valid(self, now: datetime) -> bool:
        """Tell whether the key has not expired."""
        return self.expires is None or now < self.expires


def new_key() -> str:
    """Return a random key."""
    return PREFIX + secrets.token_hex(32)


def is_key(text: str) -> bool:
    """Tell whether a text has the form of a key that `new_key` makes."""
    return _KEY.fullmatch(text) is not None


def digest(key: str) -> bytes:
    """Return the stored form of a key: its SHA-256, 32 bytes."""
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()


def parse_limit(text: str) -> SpendingLimit:
    """Return the limit that a text such as `5/day`, `12.50/month` or `100` means, in US dollars.

    Raises ValueError.

    >>> parse_limit("2.50/day")
    SpendingLimit(nanodollars=2500000000, period='day')
    """
    match = _LIMIT.fullmatch(text)
    period: Any = (match and match[2]) or "ever"
    if match is None or period not in get_args(Period) or float(match[1]) > MAX_USD:
        raise ValueError("expected US dollars, as in 5/day, 100/month, or 500 in all")
    return SpendingLimit(round(float(match[1]) * NANO), period)


def limit_text(limit: SpendingLimit) -> str:
    """Return what `parse_limit` reads.

    >>> limit_text(parse_limit("2.50/day")), limit_text(parse_limit("100"))
    ('2.5/day', '100')
    """
    usd = f"{limit.nanodollars / NANO:.9f}".rstrip("0").rstrip(".")
    return usd if limit.period == "ever" else f"{usd}/{limit.period}"


def name_mistake(name: str) -> str:
    """Return the fault of a key's name; empty if there is none."""
    if not name or name != name.strip() or not name.isprintable() or len(name) > MAX_NAME:
        return f"expected a name of at most {MAX_NAME} printable characters"
    if looks_like_key(name):
        return "looks like a key; expected a name, which bills and logs show"
    return ""


def namespace_mistake(namespace: str) -> str:
    """Return the fault of a namespace; empty if there is none."""
    if namespace.startswith(RESERVED_NAMESPACES):
        return (
            f"namespaces that begin with {RESERVED_NAMESPACES} are the proxy's own; choose another"
            " name"
        )
    return ""


def to_time(value: date) -> datetime:
    """Return a time with a zone. A date means its beginning; without a zone it is UTC."""
    moment = value if isinstance(value, datetime) else datetime.combine(value, time())
    return moment.astimezone(UTC) if moment.tzinfo else moment.replace(tzinfo=UTC)


Edit: TypeAlias = Callable[[tuple[StoredKey, ...]], Sequence[StoredKey]]
"""Gets the keys of the file, and returns the new ones."""


class KeysFile:
    """A file of clients' keys. For one thread at a time."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._seen: tuple[int, ...] | None = None
        """The state of the file at the last read; None = there was no file."""

    @property
    def has_changed(self) -> bool:
        """Whether the file has changed since the last read. Raises OSError."""
        return self._state() != self._seen

    def read(self) -> tuple[StoredKey, ...] | None:
        """Return the keys, expired ones included; None if there is no file.

        Raises ConfigError, with a line for each mistake, and OSError.
        """
        self._seen = self._state()
        try:
            text = self.path.read_text(encoding="utf-8")
        except _MISSING:
            return None
        except UnicodeDecodeError as error:
            raise ConfigError(f"{self.path}: is not UTF-8 text; save it as UTF-8") from error
        try:
            file = yaml_file.parse(text, is_generated=True)
        except YamlError as error:
            place = f"{self.path}:{error.line}" if error.line else str(self.path)
            raise ConfigError(f"{place}: {error}") from error
        return _keys(file, self.path)

    def retry(self) -> None:
        """Treat the file as changed, because it could not be read."""
        self._seen = ()

    def change(self, edit: Edit) -> None:
        """Replace the keys by the result of `edit`, while no other process changes them.

        The file is written as a whole, for its owner alone. Raises ConfigError, OSError, and
        TimeoutError if another process keeps changing it.
        """
        with self._lock():
            keys = edit(self.read() or ())
            content = {"keys": [_plain(key) for key in keys]}
            atomic_file.write(self.path, (_HEADING + yaml_file.dump(content)).encode())

    @contextmanager
    def _lock(self) -> Iterator[None]:
        private_files.make_folder(self.path.parent)
        path = self.path.with_name(f"{self.path.name}.lock")
        with closing(WriterLock(path, LOCK_S)) as lock, lock:
            yield

    def _state(self) -> tuple[int, ...] | None:
        try:
            state = self.path.stat()
        except _MISSING:
            return None
        return state.st_ino, state.st_size, state.st_mtime_ns, state.st_ctime_ns


def _plain(key: StoredKey) -> dict[str, object]:
    """Return a key in YAML's own types, without default values."""
    fields: dict[str, object] = {
        "name": key.name,
        "digest": key.digest.hex(),
        "namespace": key.namespace,
        "admin": key.is_admin,
        "budget": key.limit and limit_text(key.limit),
        "created": key.created,
        "expires": key.expires,
    }
    return {name: value for name, value in fields.items() if value not in ("", False, None)}


def _keys(file: YamlFile, path: Path) -> tuple[StoredKey, ...]:
    """Return the keys of a file. Raises ConfigError."""
    problems = [(duplicate.path, duplicate.message) for duplicate in file.duplicates]
    keys: dict[bytes, StoredKey] = {}
    for i, entry in enumerate(_entries(file.content, problems)):
        mistakes = list(_mistakes(entry))
        problems += [(("keys", i, *below), problem) for below, problem in mistakes]
        if not mistakes:
            key = _key(entry)
            if keys.setdefault(key.digest, key) is not key:
                problems.append((("keys", i, "digest"), "is there twice; remove one"))
    if problems:
        raise ConfigError(*(_line(file, path, *problem) for problem in problems))
    return tuple(keys.values())


def _line(file: YamlFile, path: Path, key_path: KeyPath, problem: str) -> str:
    line = file.line_of(key_path)
    place = f"{path}:{line}" if line else str(path)
    return ": ".join(part for part in (place, ".".join(map(str, key_path)), problem) if part)


def _entries(content: object, problems: list[tuple[KeyPath, str]]) -> list[Any]:
    """Return the list of keys of a file; mistakes of the file are added to `problems`."""
    if content is None:
        return []
    entries = content.get("keys", []) if isinstance(content, dict) else None
    if not isinstance(content, dict) or not isinstance(entries, list):
        problems.append((("keys",), "expected a list of keys, as `keys add` writes it"))
        return []
    others = (str(name) for name in content if name != "keys")
    problems += [((name,), "unknown key; known here: keys") for name in others]
    return entries


def _limit_mistake(value: object) -> str:
    try:
        parse_limit(str(value))
    except ValueError as error:
        return str(error)
    return ""


def _time_mistake(value: object) -> str:
    is_time = isinstance(value, date)
    return "" if is_time else "expected a date or a time, as in 2027-01-31T12:00:00Z"


_FIELDS: Mapping[str, Callable[[Any], str]] = {
    "name": lambda value: name_mistake(str(value)),
    "digest": lambda value: (
        "" if _DIGEST.fullmatch(str(value)) else "expected the SHA-256 of a key: 64 digits of 0-f"
    ),
    "namespace": lambda value: namespace_mistake(str(value)),
    "admin": lambda value: "" if isinstance(value, bool) else "expected true or false",
    "budget": _limit_mistake,
    "created": _time_mistake,
    "expires": _time_mistake,
}
"""The fields of an entry, each with a function that returns the fault of a value, or an empty
text."""


def _mistakes(entry: object) -> Iterator[tuple[KeyPath, str]]:
    """Yield the mistakes of an entry: the path of a field, and the problem."""
    if not isinstance(entry, dict):
        yield (), "expected keys with values below it: name, digest"
        return
    for name in ("name", "digest"):
        if name not in entry:
            yield (), f"{name} is missing; remove this entry, and add the key anew"
    for name, value in entry.items():
        check = _FIELDS.get(str(name))
        if check is None:
            yield (str(name),), f"unknown key; known here: {', '.join(_FIELDS)}"
        elif mistake := check(value):
            yield (str(name),), mistake


def _key(entry: dict[str, Any]) -> StoredKey:
    """Return the key of an entry without mistakes."""
    limit, expires = entry.get("budget"), entry.get("expires")
    return StoredKey(
        name=str(entry["name"]),
        digest=bytes.fromhex(str(entry["digest"])),
        created=to_time(entry.get("created", date(1970, 1, 1))),
        namespace=str(entry.get("namespace", "")),
        is_admin=entry.get("admin", False),
        limit=None if limit is None else parse_limit(str(limit)),
        expires=None if expires is None else to_time(expires),
    )


def rotate(
    keys: Sequence[StoredKey], name: str, key: str, now: datetime, grace: timedelta
) -> list[StoredKey]:
    """Return keys in which a new key of a name has the settings of its newest one.

    The others of that name expire after the grace period at the latest. Raises KeyError for a
    name that has no key, and ValueError where the newest one has expired: so would the new one.
    """
    own = [entry for entry in keys if entry.name == name]
    if not own:
        raise KeyError(name)
    newest = max(own, key=lambda entry: entry.created)
    if not newest.is_valid(now):
        raise ValueError(name)
    end = now + grace
    old = [
        replace(entry, expires=end if entry.expires is None else min(entry.expires, end))
        if entry.name == name
        else entry
        for entry in keys
    ]
    others = [entry for entry in old if entry.name != name or entry.is_valid(now)]
    return [*others, replace(newest, digest=digest(key), created=now)]
