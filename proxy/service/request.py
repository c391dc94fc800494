"""What a request says beside its inputs: its client, its cache policy, its index options.

The cache policy follows from `cache.mode` and the header `Cache-Control`. Source of the rules:
RFC 9111, 5.2 and 5.2.1. As it recommends, directives that are unknown or not well formed are
ignored, and names are case-insensitive.

The field `index` says which points are written to Qdrant, under which ids, and with what beside::

    extra_body={"index": {"collection": "docs", "ids": [1, 2], "payload": [{"lang": "en"}, {}]}}
    extra_body={"index": {"ids": [1], "update": True, "group_id": "acme",
                          "sparse_vectors": [{"bm25": {"indices": [7], "values": [0.5]}}]}}
    extra_body={"index": False}
"""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, NamedTuple, TypeAlias
from uuid import UUID

from aiohttp import web
from embedding_proxy.index.collection import LONGEST_NAME, not_in_names
from embedding_proxy.index.point import MAX_ID, PointId
from embedding_proxy.providers.base import CachePolicy
from embedding_proxy.providers.errors import InvalidRequest

Mode: TypeAlias = Literal["normal", "frozen", "refresh", "off"]
MEANING: dict[Mode, str] = {
    "normal": "what is not cached is bought, once",
    "frozen": "nothing is bought; what is not cached is an error",
    "refresh": "everything is bought anew, and replaced in the cache",
    "off": "everything is bought; nothing is read from the cache or kept in it",
}
Honor: TypeAlias = Literal["admin"] | bool
"""`server.honor_cache_control`: whether a request's header counts, or only that of an admin."""
# What stands between commas. One inside quotes parts nothing; quotes that are never closed take in
# all that follows.
_ITEM = re.compile(r'(?:[^",]++|"(?:[^"\\]++|\\.)*+"?)++', re.DOTALL)
_SECONDS = re.compile(r"[0-9]+")
_KEYS = ("collection", "ids", "payload", "sparse_vectors", "group_id", "update")
_MAX_INDEX = (1 << 32) - 1


class Secret(str):
    """A key; it is not shown where values are."""

    __slots__ = ()

    def __repr__(self) -> str:
        return "'***'"


class Client(NamedTuple):
    """The one who sent a request."""

    namespace: str = ""
    """The part of the cache that is the caller's."""
    client: str = ""
    """The name of the caller's key in the ledger; empty where no key is asked for."""
    api_key: Secret = Secret()
    """The caller's own key for a provider; empty where it sent none, or none is used."""
    is_admin: bool = False
    """Whether the caller may do what is the operator's: its key says `admin: true`, or no key is
    asked for."""
    retries: int | None = None
    """0 = the caller repeats requests by itself, and this is its first try; 1 = a later one; None =
    it is not known to do so."""
    is_connected: Callable[[], bool] | None = None
    """Tells whether the caller still waits for the answer; None = it does."""


CALLER = web.RequestKey("caller", Client)
"""Where the middleware puts the client of a request that it admits."""


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
    said: dict[str, float] = {}
    for item in _ITEM.findall(header):
        name, _, argument = item.partition("=")
        name = name.strip().lower()
        if name == "max-age":
            digits = _SECONDS.fullmatch(_unquote(argument.strip()))
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
    said = parse_cache_control(header)
    reads = mode in ("normal", "frozen") or (mode == "refresh" and said.only_if_cached)
    return CachePolicy(
        max_age=said.max_age if reads else 0.0,
        write=mode != "off" and not said.no_store,
        frozen=mode == "frozen",
        only_if_cached=said.only_if_cached,
    )


@dataclass(frozen=True, slots=True)
class IndexOptions:
    """What a request says about its indexing."""

    is_enabled: bool = True
    collection: str | None = None
    """None = the collection that the configuration gives."""
    ids: Sequence[PointId] | None = None
    """One an input; None = each id follows from its input."""
    payload: Sequence[Mapping[str, object]] | None = None
    """One an input, kept beside the vector."""
    sparse_vectors: Sequence[Mapping[str, object]] | None = None
    """One an input: `indices` and `values` by the names of the vectors."""
    group_id: str | int | None = None
    """The tenant that the points belong to."""
    is_update: bool = False
    """Whether points that are there keep what the request does not name."""

    @property
    def names_content(self) -> bool:
        """Whether the content of a point, or its id, does not follow from its input alone."""
        return (
            self.ids is not None
            or self.payload is not None
            or self.sparse_vectors is not None
            or self.group_id is not None
        )


NO_INDEX_OPTIONS = IndexOptions()


def parse_index_options(value: object, inputs: int) -> IndexOptions:
    """Read the field of a request with so many inputs; None counts as absent.

    Raises InvalidRequest.

    >>> options = parse_index_options({"ids": [7]}, 1)
    >>> parse_index_options(False, 1).is_enabled, options.ids
    (False, (7,))
    """
    if value is None or value is True:
        return NO_INDEX_OPTIONS
    if value is False:
        return IndexOptions(is_enabled=False)
    if not isinstance(value, Mapping):
        raise _invalid("must be false, or an object with collection, ids, payload …", "")
    fields = {name: given for name, given in value.items() if given is not None}
    for name in fields:
        if name not in _KEYS:
            raise _invalid(f"has an unknown key; known are {', '.join(_KEYS)}", f".{name}")
    ids, payload, sparse = (fields.get(name) for name in ("ids", "payload", "sparse_vectors"))
    return IndexOptions(
        collection=_collection(fields.get("collection")),
        ids=None if ids is None else tuple(map(_id, _each(ids, "ids", inputs), range(inputs))),
        payload=None
        if payload is None
        else tuple(map(_object, _each(payload, "payload", inputs), range(inputs))),
        sparse_vectors=None
        if sparse is None
        else tuple(map(_sparse, _each(sparse, "sparse_vectors", inputs), range(inputs))),
        group_id=_group(fields.get("group_id")),
        is_update=_flag(fields.get("update", False)),
    )


def _collection(name: object) -> str | None:
    if name is None:
        return None
    where = ".collection"
    if not isinstance(name, str) or not name:
        raise _invalid("must be a non-empty string", where)
    if len(name) > LONGEST_NAME:
        raise _invalid(f"must be of at most {LONGEST_NAME} characters", where)
    if name in (".", "..") or not_in_names(name):
        raise _invalid("holds a character that Qdrant allows in no name", where)
    return name


def _each(value: object, name: str, inputs: int) -> Sequence[object]:
    if not isinstance(value, list | tuple):
        raise _invalid("must be an array, one item for each input", f".{name}")
    if len(value) != inputs:
        raise _invalid(
            f"must have one item for each input: {inputs}, and not {len(value)}", f".{name}"
        )
    return value


def _id(one: object, place: int) -> PointId:
    # bool is an int to Python, not to JSON.
    if type(one) is int and 0 <= one <= MAX_ID:
        return one
    if isinstance(one, UUID):
        return one
    if isinstance(one, str):
        try:
            return UUID(one)
        except ValueError:
            pass
    raise _invalid("must be an unsigned integer of 64 bits or a UUID", f".ids[{place}]")


def _object(one: object, place: int) -> Mapping[str, object]:
    if not isinstance(one, Mapping):
        raise _invalid("must be an object", f".payload[{place}]")
    return one


def _sparse(one: object, place: int) -> Mapping[str, object]:
    where = f".sparse_vectors[{place}]"
    if not isinstance(one, Mapping) or not all(isinstance(name, str) and name for name in one):
        raise _invalid("must be an object with sparse vectors by their names", where)
    for name, sparse in one.items():
        found = sparse if isinstance(sparse, Mapping) else {}
        indices, values = found.get("indices"), found.get("values")
        if not (
            set(found) == {"indices", "values"}
            and isinstance(indices, list | tuple)
            and isinstance(values, list | tuple)
            and len(indices) == len(values) == len({*map(repr, indices)})
            and all(type(index) is int and 0 <= index <= _MAX_INDEX for index in indices)
            and all(type(value) in (int, float) and math.isfinite(value) for value in values)
        ):
            raise _invalid(
                "must have indices, distinct unsigned integers of 32 bits, and as many values",
                f"{where}.{name}",
            )
    return one


def _group(value: object) -> str | int | None:
    if value is None or (isinstance(value, str) and value) or type(value) is int:
        return value
    raise _invalid("must be a non-empty string or an integer", ".group_id")


def _flag(value: object) -> bool:
    if isinstance(value, bool):
        return value
    raise _invalid("must be true or false", ".update")


def _invalid(problem: str, where: str) -> InvalidRequest:
    return InvalidRequest(f"'$.index{where}' is invalid: it {problem}.", param="index")
