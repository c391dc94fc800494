"""Hides what may be a key in the message of a configuration error. Pure.

A key is sometimes pasted where a name belongs: as the name of a provider, a model, a setting or a
variable. Messages repeat names. What looks like a key is replaced there; nothing else tells a name
from a key, so a key that is made of words is not recognised.
"""

import re

MASK = "***"
_PATH = re.compile(r"^[\"'`(]*(?:~?/|\.{1,2}/|[A-Za-z]:\\)|\.ya?ml(?::\d+)?\W*$")
_WORD = re.compile(r"\S+")
_TOKEN = re.compile(r"[A-Za-z0-9_+/=~-]{8,}")
_PART = re.compile(r"[A-Za-z0-9]+")
_PREFIXES = re.compile(
    r"(?:sk|pk|rk|gsk|xai|nvapi|pa)-[\w-]{6,}|(?:sk|pk|rk|gsk|hf|jina|fw|tgp|ghp|glpat|r8)_\w{6,}"
    r"|AIza[\w-]{10,}|AKIA[A-Z0-9]{8,}|eyJ[\w-]{8,}"
)
_JWT = re.compile(r"eyJ[\w-]{8,}(?:\.[\w-]{6,}){1,2}")
_UUID = re.compile(r"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}", re.IGNORECASE)
_MIN_RANDOM = 16
_MIN_DIGITS = 2


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


def hide_keys(message: str) -> str:
    """Return a message without what looks like a key; paths of files and addresses stay.

    Of an address the user, the query and the fragment may be a key as well.

    >>> hide_keys("/etc/proxy.yaml: providers.sk-proj-abcdef123.kind: is missing; add it")
    '/etc/proxy.yaml: providers.***.kind: is missing; add it'
    """
    return _WORD.sub(lambda word: _in_word(word[0]), message)


def _in_word(word: str) -> str:
    scheme, is_address, rest = word.partition("://")
    if is_address:
        user, at, place = rest.rpartition("@")
        end = min((i for mark in "?#" if (i := place.find(mark)) >= 0), default=len(place))
        return f"{scheme}://{MASK if user else user}{at}{place[:end]}{_hidden(place[end:])}"
    return word if _PATH.search(word) else _hidden(word)


def _hidden(word: str) -> str:
    word = _JWT.sub(MASK, word)
    return _TOKEN.sub(lambda found: MASK if looks_like_key(found[0]) else found[0], word)


def _is_random(part: str) -> bool:
    digits = sum(c.isdigit() for c in part)
    return len(part) >= _MIN_RANDOM and _MIN_DIGITS <= digits < len(part)
