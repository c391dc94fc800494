"""What `cache.mode` and a request's `Cache-Control` say of one request. Pure; imports no HTTP.

Source of the rules: RFC 9111, 5.2 and 5.2.1. As it recommends, what is not known or not well formed
is passed over, and names are read in any case.
"""

import math
import re
from functools import lru_cache
from typing import Literal, NamedTuple, TypeAlias

from embedding_proxy.providers.base import CachePolicy

Mode: TypeAlias = Literal["normal", "frozen", "refresh", "off"]

MEANING: dict[Mode, str] = {
    "normal": "what is not cached is bought, once",
    "frozen": "nothing is bought; what is not cached is an error",
    "refresh": "everything is bought anew, and replaced in the cache",
    "off": "everything is bought; nothing is read from the cache or kept in it",
}

# What stands between commas. One inside quotes parts nothing; quotes that are never closed take in
# all that follows.
_ITEM = re.compile(r'(?:[^",]++|"(?:[^"\\]++|\\.)*+"?)++', re.DOTALL)
_SECONDS = re.compile(r"[0-9]+")


Honor: TypeAlias = Literal["admin"] | bool
"""`server.honor_cache_control`: whether a request's header counts, or only that of an admin."""


def counted(header: str, honor: Honor, *, is_admin: bool) -> str:
    """Return the header's value, or nothing where it does not count.

    >>> counted("no-cache", "admin", is_admin=False), counted("no-cache", True, is_admin=False)
    ('', 'no-cache')
    """
    return header if honor is True or (honor == "admin" and is_admin) else ""


class CacheControl(NamedTuple):
    """What the header says, as far as it is of use here."""

    max_age: float = math.inf
    """Seconds; `no-cache` is 0. Of several the least."""
    no_store: bool = False
    only_if_cached: bool = False


def parse_cache_control(header: str) -> CacheControl:
    """Read the header's value; several headers are joined with commas.

    >>> parse('No-Cache, max-age="60", private="no-store"')
    CacheControl(max_age=0.0, no_store=False, only_if_cached=False)
    """
    said: dict[str, float] = {}
    for item in _ITEM.findall(header):
        name, _, argument = item.partition("=")
        name = name.strip().lower()
        if name == "max-age":
            digits = _SECONDS.fullmatch(_unquoted(argument.strip()))
            if digits is None:
                continue
            # A number beyond all bounds becomes infinite, as the RFC wants it.
            said[name] = min(float(digits[0]), said.get(name, math.inf))
        else:
            said[name] = 0.0
    return CacheControl(
        0.0 if "no-cache" in said else said.get("max-age", math.inf),
        "no-store" in said,
        "only-if-cached" in said,
    )


def _unquoted(argument: str) -> str:
    if len(argument) < 2 or not argument[0] == argument[-1] == '"':
        return argument
    return re.sub(r"\\(.)", r"\1", argument[1:-1])


@lru_cache(maxsize=64)  # most requests say nothing, or all the same
def to_cache_policy(mode: Mode, header: str) -> CachePolicy:
    """Return how a request with this header may be answered.

    The mode is the operator's: a request may ask for less than it allows, never for more. Only
    `only-if-cached` takes what is there though the mode is `refresh`, as nothing is bought then.
    """
    said = parse_cache_control(header)
    reads = mode in ("normal", "frozen") or (mode == "refresh" and said.only_if_cached)
    return CachePolicy(
        max_age=said.max_age if reads else 0.0,
        write=mode != "off" and not said.no_store,
        frozen=mode == "frozen",
        only_if_cached=said.only_if_cached,
    )
