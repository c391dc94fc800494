"""How a request may use the cache: by `cache.mode`, and by its header `Cache-Control`.

`to_cache_policy` joins both to a CachePolicy, which `cache.embedder` obeys. What the modes change:

- `normal`: cache hits are served; a cache miss is bought and stored.
- `frozen`: cache hits are served; a cache miss is an error (404 `not_cached`, `cache.errors`).
  Nothing costs money: no provider is opened or needs a key, no call is passed through, no drift
  check runs (`embedding_service`, `http.passthrough`, `cli.startup`). Keys that clients send for
  a provider are not verified (`client_keys`). Every model counts as usable, also without a
  provider (`model_registry`), and `/v1/models` lists all (`http.models`). Records older than
  `cache.ttl_days` are not served, and not deleted either (`storage`).
- `refresh`: every input is bought, and replaces its record.
- `off`: every input is bought; nothing is read from the cache or stored.

The rules of the header are those of RFC 9111, 5.2 and 5.2.1. As it recommends, directives that are
unknown or not well formed are ignored, and names are case-insensitive.
"""

import math
import re
from functools import lru_cache
from typing import NamedTuple

from embedding_proxy.providers.base import CachePolicy
from embedding_proxy.proxy.config.fields import Honor, Mode

# What stands between commas. One inside quotes parts nothing; quotes that are never closed take in
# all that follows.
_ITEM = re.compile(r'(?:[^",]++|"(?:[^"\\]++|\\.)*+"?)++', re.DOTALL)
_SECONDS = re.compile(r"[0-9]+")


def effective_cache_control(header: str, honor: Honor, *, is_admin: bool) -> str:
    """Return the header's value, or nothing where it does not count.

    >>> effective_cache_control("no-cache", "admin", is_admin=False)
    ''
    >>> effective_cache_control("no-cache", True, is_admin=False)
    'no-cache'
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

    >>> parse_cache_control('No-Cache, max-age="60", private="no-store"')
    CacheControl(max_age=0.0, no_store=False, only_if_cached=False)
    """
    directives: dict[str, float] = {}
    for item in _ITEM.findall(header):
        name, _, argument = item.partition("=")
        name = name.strip().lower()
        if name == "max-age":
            digits = _SECONDS.fullmatch(_unquote(argument.strip()))
            if digits is None:
                continue
            # A number beyond all bounds becomes infinite, as the RFC wants it.
            directives[name] = min(float(digits[0]), directives.get(name, math.inf))
        else:
            directives[name] = 0.0
    return CacheControl(
        0.0 if "no-cache" in directives else directives.get("max-age", math.inf),
        "no-store" in directives,
        "only-if-cached" in directives,
    )


def _unquote(argument: str) -> str:
    if len(argument) < 2 or not argument[0] == argument[-1] == '"':
        return argument
    return re.sub(r"\\(.)", r"\1", argument[1:-1])


@lru_cache(maxsize=64)  # most requests say nothing, or all the same
def to_cache_policy(mode: Mode, header: str) -> CachePolicy:
    """Return how a request with this header may be answered.

    The mode is the operator's: a request may ask for less than it allows, never for more. Only
    `only-if-cached` takes what is there though the mode is `refresh`, as nothing is bought then.
    """
    control = parse_cache_control(header)
    reads = mode in ("normal", "frozen") or (mode == "refresh" and control.only_if_cached)
    return CachePolicy(
        max_age=control.max_age if reads else 0.0,
        write=mode != "off" and not control.no_store,
        frozen=mode == "frozen",
        only_if_cached=control.only_if_cached,
    )
