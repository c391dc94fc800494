"""Mistakes of a configuration: one of them with its place, and the error that carries them all.

A validator of a section raises `Problems` where it finds several mistakes at once, or where a
mistake belongs to one key of the section. pydantic reports it as it does any ValueError.

`hide_keys` removes from a message what may be an API key. A key is sometimes pasted where a name
belongs: as the name of a provider, a model, a setting or a variable; and messages repeat names.
What looks like a key is replaced. Nothing else tells a name from a key, so a key that is made of
words is not recognised.
"""

import difflib
import re
from collections.abc import Collection, Iterable
from typing import NamedTuple

KeyPath = tuple[str | int, ...]
"""The place of a key: the names of sections, keys and list positions that lead to it."""
MASK = "***"
_PATH = re.compile(r"^[\"'`(]*(?:~?/|\.{1,2}/|[A-Za-z]:\\)|\.ya?ml(?::\d+)?\W*$")
_WORD = re.compile(r"\S+")
_TOKEN = re.compile(r"[A-Za-z0-9_+/=~-]{8,}")
_PART = re.compile(r"[A-Za-z0-9]+")
_PREFIXES = re.compile(
    r"(?:ep|sk|pk|rk|gsk|xai|nvapi|pa)-[\w-]{6,}|(?:sk|pk|rk|gsk|hf|jina|fw|tgp|ghp|glpat|r8)_\w{6,}"
    r"|AIza[\w-]{10,}|AKIA[A-Z0-9]{8,}|eyJ[\w-]{8,}"
)
_JWT = re.compile(r"eyJ[\w-]{8,}(?:\.[\w-]{6,}){1,2}")
_UUID = re.compile(r"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}", re.IGNORECASE)
_MIN_RANDOM = 16
_MIN_DIGITS = 2
_NAME = re.compile(r"[\w./:@+ -]{1,64}")
_NAME_PART = re.compile(r"[^\W_]+")
_MAX_WORD = 24
"""The most letters of a word in a name."""
_MAX_NUMBER = 8
"""The most characters of a part of a name with digits: a version, a size, a date."""
_MAX_MIXED = 3
"""The most parts of a name with letters and digits."""
_HUMP = re.compile(r"[a-z][A-Z]")
_MAX_HUMPS = 3


class Problem(NamedTuple):
    """One mistake: its place, and a message with the remedy."""

    path: KeyPath
    message: str
    hides_name: bool = False
    """Whether the last name of the path is not shown: it may be a key that was pasted there."""
    needs: tuple[KeyPath, ...] = ()
    """The other keys that it depends on. If one of them is wrong, this problem is not reported."""
    meant: str = ""
    """The known key that a misspelt one stands for."""

    @property
    def key(self) -> str:
        """The place as text: `models.m.routes.0.provider`; empty for the whole file."""
        path = (*self.path[:-1], MASK) if self.hides_name else self.path
        return ".".join(map(str, path))

    def add_prefix(self, path: Iterable[str | int]) -> "Problem":
        """Return the same problem with a path from an outer section."""
        start = tuple(path)
        needs = tuple((*start, *need) for need in self.needs)
        return self._replace(path=(*start, *self.path), needs=needs)

    def is_consequence_of(self, wrong: Collection[KeyPath]) -> bool:
        """Tell whether it is a consequence of other mistakes at the places in `wrong`."""
        paths = (self.path, *self.needs)
        return any(path[:n] in wrong for path in paths for n in range(1, len(path) + 1))


class Problems(ValueError):
    """The mistakes of a section; paths are relative to it."""

    def __init__(self, problems: Iterable[Problem]) -> None:
        self.problems = tuple(problems)
        super().__init__(
            "; ".join(
                f"{problem.key}: {problem.message}" if problem.path else problem.message
                for problem in self.problems
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
    problems_found = tuple(problems)
    if problems_found:
        raise Problems(problems_found)


def nearest(name: str, names: Iterable[str], cutoff: float = 0.7) -> str:
    """Return the known name that a name is most like; empty if it is like none.

    >>> nearest("opnai", ["local", "openai"]), nearest("mine", ["local", "openai"])
    ('openai', '')
    """
    return next(iter(difflib.get_close_matches(name, list(names), n=1, cutoff=cutoff)), "")


def suggestion(name: str, names: Iterable[str]) -> str:
    """Return what to add to a message that a name is unknown; empty if it is like none.

    >>> suggestion("opnai", ["local", "openai"])
    '; did you mean openai?'
    """
    near = nearest(name, names)
    return f"; did you mean {near}?" if near else ""


def looks_like_key(name: str) -> bool:
    """Tell whether a name begins as vendors' keys do, or holds a long random part.

    >>> looks_like_key("sk-proj-abcdef123"), looks_like_key("3f9a0c51b7e24d68a1f0")
    (True, True)
    >>> looks_like_key("sentence-transformers/paraphrase-multilingual-MiniLM-L12-v2")
    False
    """
    if _PREFIXES.match(name) or _UUID.search(name):
        return True
    return any(_is_random(part) for part in _PART.findall(name))


def is_plain_name(name: str) -> bool:
    """Tell whether a name is plainly no secret: a few words, versions and sizes.

    >>> [is_plain_name(name) for name in ("text-embedding-3-small", "gpt4", "BAAI/bge-m3", "llm_2")]
    [True, True, True, True]
    >>> [is_plain_name(name) for name in ("sk-abc", "qXvbTzKpWmNrLd", "ab12-cd34-ef56-gh78")]
    [False, False, False]
    """
    parts = _NAME_PART.findall(name)
    mixed = [part for part in parts if not part.isalpha() and not part.isdigit()]
    return (
        bool(_NAME.fullmatch(name))
        and all(len(part) <= (_MAX_WORD if part.isalpha() else _MAX_NUMBER) for part in parts)
        and len(mixed) <= _MAX_MIXED
        and len(_HUMP.findall(name)) <= _MAX_HUMPS
        and not name.startswith("sk-")
        and not _PREFIXES.match(name)
        and not _UUID.search(name)
    )


def hide_keys(message: str) -> str:
    """Return a message without what looks like a key; paths of files and addresses stay.

    Of an address the user, the query and the fragment may be a key as well.

    >>> hide_keys("/etc/proxy.yaml: providers.sk-proj-abcdef123.kind: is missing; add it")
    '/etc/proxy.yaml: providers.***.kind: is missing; add it'
    """
    return _WORD.sub(lambda word: _hide_in_word(word[0]), message)


def _hide_in_word(word: str) -> str:
    scheme, is_address, rest = word.partition("://")
    if is_address:
        user, at, host = rest.rpartition("@")
        end = min((i for mark in "?#" if (i := host.find(mark)) >= 0), default=len(host))
        return f"{scheme}://{MASK if user else user}{at}{host[:end]}{_hide_tokens(host[end:])}"
    return word if _PATH.search(word) else _hide_tokens(word)


def _hide_tokens(word: str) -> str:
    word = _JWT.sub(MASK, word)
    return _TOKEN.sub(lambda match: MASK if looks_like_key(match[0]) else match[0], word)


def _is_random(part: str) -> bool:
    digits = sum(c.isdigit() for c in part)
    return len(part) >= _MIN_RANDOM and _MIN_DIGITS <= digits < len(part)
