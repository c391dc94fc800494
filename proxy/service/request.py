"""What a request says: its inputs, its client, its model and further parameters.

`http.openai_format` reads the JSON around them; `cache_policy` and `index_options` have the rest.
"""

import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from numbers import Integral
from typing import Any, Literal, NamedTuple, TypeAlias

from aiohttp import web
from embedding_proxy.cache.tiers import Lookup
from embedding_proxy.providers.base import Input
from embedding_proxy.providers.charge import SpendingLimit
from embedding_proxy.providers.errors import InvalidRequest

from .index_options import NO_INDEX_OPTIONS, IndexOptions

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
    return {name: content for name, content in value.items() if content is not None}


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
