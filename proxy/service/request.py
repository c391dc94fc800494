"""What a request says: its inputs, its client, its cache policy, its index options.

`http.openai_format` reads the JSON around them.

The cache policy follows from `cache.mode` and the header `Cache-Control`. Source of the rules:
RFC 9111, 5.2 and 5.2.1. As it recommends, directives that are unknown or not well formed are
ignored, and names are case-insensitive.

The field `index` says which points are written to Qdrant, under which ids, and with what beside::

    extra_body={"index": {"collection": "docs", "ids": [1, 2], "payload": [{"lang": "en"}, {}]}}
    extra_body={"index": {"ids": [1], "update": True, "group_id": "acme",
                          "sparse_vectors": [{"bm25": {"indices": [7], "values": [0.5]}}]}}
    extra_body={"index": False}
"""

import array
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from functools import lru_cache
from numbers import Integral
from typing import Any, Literal, NamedTuple, TypeAlias
from uuid import UUID

from aiohttp import web
from embedding_proxy.cache.tiers import Lookup
from embedding_proxy.index.collection import LONGEST_NAME, not_in_names
from embedding_proxy.index.point import MAX_ID, PointId
from embedding_proxy.providers.base import CachePolicy, Input
from embedding_proxy.providers.billing import SpendingLimit
from embedding_proxy.providers.errors import InvalidRequest
from embedding_proxy.proxy.config.fields import Honor, Mode

# What stands between commas. One inside quotes parts nothing; quotes that are never closed take in
# all that follows.
_ITEM = re.compile(r'(?:[^",]++|"(?:[^"\\]++|\\.)*+"?)++', re.DOTALL)
_SECONDS = re.compile(r"[0-9]+")
_KEYS = ("collection", "ids", "payload", "sparse_vectors", "group_id", "update")
_MAX_INDEX = (1 << 32) - 1
_TAKEN = "only text and token ids are taken"

Inputs: TypeAlias = str | Iterable[str | int | Iterable[int]]
"""One text, one token array, or several texts or token arrays, as Python code gives them."""
MAX_INPUTS = 2048
"""At OpenAI: inputs in one request, and ids in a token array that stands alone."""
Encoding: TypeAlias = Literal["float", "base64"]


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
    limit: SpendingLimit | None = None
    """The budget of its key; None = it has none."""


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
        raise _index_error("must be false, or an object with collection, ids, payload …", "")
    fields = {name: given for name, given in value.items() if given is not None}
    for name in fields:
        if name not in _KEYS:
            raise _index_error(f"has an unknown key; known are {', '.join(_KEYS)}", f".{name}")
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
        raise _index_error("must be a non-empty string", where)
    if len(name) > LONGEST_NAME:
        raise _index_error(f"must be of at most {LONGEST_NAME} characters", where)
    if name in (".", "..") or not_in_names(name):
        raise _index_error("holds a character that Qdrant allows in no name", where)
    return name


def _each(value: object, name: str, inputs: int) -> Sequence[object]:
    if not isinstance(value, list | tuple):
        raise _index_error("must be an array, one item for each input", f".{name}")
    if len(value) != inputs:
        raise _index_error(
            f"must have one item for each input: {inputs}, and not {len(value)}", f".{name}"
        )
    return value


def _id(value: object, index: int) -> PointId:
    # bool is an int to Python, not to JSON.
    if type(value) is int and 0 <= value <= MAX_ID:
        return value
    if isinstance(value, UUID):
        return value
    if isinstance(value, str):
        try:
            return UUID(value)
        except ValueError:
            pass
    raise _index_error("must be an unsigned integer of 64 bits or a UUID", f".ids[{index}]")


def _object(value: object, index: int) -> Mapping[str, object]:
    if not isinstance(value, Mapping):
        raise _index_error("must be an object", f".payload[{index}]")
    return value


def _sparse(one: object, place: int) -> Mapping[str, object]:
    where = f".sparse_vectors[{place}]"
    if not isinstance(one, Mapping) or not all(isinstance(name, str) and name for name in one):
        raise _index_error("must be an object with sparse vectors by their names", where)
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
            raise _index_error(
                "must have indices, distinct unsigned integers of 32 bits, and as many values",
                f"{where}.{name}",
            )
    return one


def _group(value: object) -> str | int | None:
    if value is None or (isinstance(value, str) and value) or type(value) is int:
        return value
    raise _index_error("must be a non-empty string or an integer", ".group_id")


def _flag(value: object) -> bool:
    if isinstance(value, bool):
        return value
    raise _index_error("must be true or false", ".update")


def _index_error(problem: str, where: str) -> InvalidRequest:
    return InvalidRequest(f"'$.index{where}' is invalid: it {problem}.", param="index")


@dataclass(slots=True)
class EmbeddingRequest:
    """A request that is well formed; whether the model can answer it is not known here."""

    model: str
    inputs: list[Input]
    dimensions: int | None
    encoding: Encoding
    user: str | None
    parameters: Mapping[str, object]
    """Further fields that may change the numbers: sent on, and part of the space."""
    index: IndexOptions = NO_INDEX_OPTIONS
    """What is to be indexed; it is for the proxy, and sent to nobody."""
    neutral: Mapping[str, object] = field(default_factory=dict)
    """Further fields that change no number: for providers that declare them."""
    lookup: Lookup | None = None
    """What was found of the inputs, if they were looked up and could not be answered at once."""


def convert_input(  # noqa: PLR0911 - one for each kind of value
    value: object, where: str = "", depth: int = 2
) -> object:
    """Return an input given in Python as JSON would have it: a copy, for `parse_input`.

    Texts and integers may be of any class; a list may be any sequence, an iterator, or an array
    with `tolist`. Raises InvalidRequest for what would be a list of something else than is meant:
    bytes, which are integers, a mapping, of which only the keys are, and a set, which has no order.
    What else is no input is returned as it is, for `parse_input` to refuse.

    >>> convert_input(("a", "b")), convert_input(range(3)), convert_input(iter([(1, 2)]))
    (['a', 'b'], [0, 1, 2], [[1, 2]])
    """
    if isinstance(value, str):
        return str.__str__(value)
    number = _integer(value)
    if number is not None:
        return number
    if isinstance(value, bytes | bytearray | memoryview | array.array):
        raise _input_error("is binary data; decode it to a string", where)
    if isinstance(value, Mapping | AbstractSet):
        raise _input_error(
            f"is a {type(value).__name__}; give a list of texts, in the order of the vectors", where
        )
    if not isinstance(value, Sequence | Iterator):
        convert = getattr(value, "tolist", None)
        if convert is None:
            return value
        value = convert()
        if not isinstance(value, list):
            return convert_input(value, where, depth)
    if type(value) is list and set(map(type, value)) in ({str}, {int}):
        return value.copy()
    if depth == 0:
        return value
    return [convert_input(item, f"{where}[{i}]", depth - 1) for i, item in enumerate(value)]


def _integer(value: object) -> int | None:
    """Return an integer of any class as int; None for what is none, and for a truth value."""
    # bool is an int to Python, not to JSON.
    return int(value) if not isinstance(value, bool) and isinstance(value, Integral) else None


def parse_input(
    value: Any,  # noqa: ANN401 - whatever JSON holds
    max_items: int | None = None,
) -> list[Input]:
    """Return the inputs that the `input` field stands for, in any of its four forms.

    `max_items` bounds an array: its inputs, or the ids of a token array that stands alone.

    >>> parse_input("a"), parse_input(["a", "b"]), parse_input([1, 2]), parse_input([[1], [2, 3]])
    (['a'], ['a', 'b'], [(1, 2)], [(1,), (2, 3)])
    """
    if isinstance(value, str):
        return [_text(value, "")]
    if not isinstance(value, list):
        raise _input_error("must be a string, an array of strings or an array of tokens", "")
    if not value:
        raise _input_error("must not be an empty array", "")
    if max_items is not None and len(value) > max_items:
        raise _input_error(
            f"is an array too long: {len(value)} items, and a maximum of {max_items}", ""
        )
    first = type(value[0])
    if first is str:
        if set(map(type, value)) == {str} and all(value):
            return value
        return [_text(item, f"[{i}]") for i, item in enumerate(value)]
    if first is list:
        return [_tokens(item, f"[{i}]") for i, item in enumerate(value)]
    if first is not int:
        raise _input_error(f"must be a string or an integer token; {_TAKEN}", "[0]")
    return [_tokens(value, "")]


def parse_text(value: object) -> str:
    """Return the one text that stands alone. Raises InvalidRequest."""
    if not isinstance(value, str):
        raise _input_error("must be a string", "")
    return _text(str.__str__(value), "")


def parse_texts(value: object) -> list[str]:
    """Return a list of texts, which may be empty. Raises InvalidRequest."""
    texts = convert_input(value)
    if not isinstance(texts, list):
        raise _input_error("must be an array of strings", "")
    for i, text in enumerate(texts):
        if not isinstance(text, str):
            raise _input_error("must be a string", f"[{i}]")
    return texts


def parse_dimensions(value: object) -> int | None:
    """Return the width that is asked for; None if none is. Raises InvalidRequest.

    >>> parse_dimensions(256), parse_dimensions(None)
    (256, None)
    """
    if value is None:
        return None
    return parse_count("dimensions", value)


def parse_count(name: str, value: object, min_value: int = 1) -> int:
    """Return a parameter that is an integer of at least `min_value`. Raises InvalidRequest."""
    number = _integer(value)
    if number is not None and number >= min_value:
        return number
    raise InvalidRequest(f"'{name}' must be an integer of at least {min_value}.", param=name)


def parse_string(name: str, value: object) -> str:
    """Return a parameter that is a string. Raises InvalidRequest."""
    if not isinstance(value, str):
        raise InvalidRequest(f"'{name}' must be a string.", param=name)
    return str.__str__(value)


def parse_parameters(value: object) -> dict[str, object]:
    """Return the further fields of a request; one that is None is absent. Raises InvalidRequest."""
    if value is None:
        return {}
    if not isinstance(value, Mapping) or not all(isinstance(name, str) for name in value):
        raise InvalidRequest(
            "'parameters' must be a mapping from names of fields to values.", param="parameters"
        )
    return {name: given for name, given in value.items() if given is not None}


def parse_model(value: object) -> str:
    """Return the name of a model. Raises InvalidRequest."""
    if not isinstance(value, str) or not value:
        raise InvalidRequest("'model' must be a non-empty string.", param="model")
    return str.__str__(value)


def _text(item: object, where: str) -> str:
    if not isinstance(item, str):
        raise _input_error(f"must be a string, like the items before it; {_TAKEN}", where)
    if not item:
        raise _input_error("must not be an empty string", where)
    return item


def _tokens(item: object, where: str) -> tuple[int, ...]:
    if not isinstance(item, list):
        raise _input_error(f"must be an array of tokens, like the items before it; {_TAKEN}", where)
    if not item:
        raise _input_error("must not be an empty array", where)
    if set(map(type, item)) == {int} and min(item) >= 0 and max(item) < 1 << 32:
        return tuple(item)
    for i, token in enumerate(item):
        # bool is an int to Python, not to JSON.
        if type(token) is not int:
            raise _input_error(f"must be an integer token; {_TAKEN}", f"{where}[{i}]")
        if not 0 <= token < 1 << 32:
            raise _input_error("is no token of any model", f"{where}[{i}]")
    return tuple(item)


def _input_error(problem: str, where: str) -> InvalidRequest:
    return InvalidRequest(f"'$.input{where}' is invalid: it {problem}.", param="input")
