"""OpenAI's embeddings JSON <-> our values. Pure: bytes in, values out; imports no HTTP library.

Source of the rules: OpenAI's API reference for `POST /v1/embeddings` (autumn 2026).
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import orjson

from providers import vector
from providers.base import Input, InputRefused, Vector

MOST_INPUTS = 2048
"""At OpenAI: inputs in one request, and ids in a token array that stands alone."""
VECTORS_A_CHUNK = 32
"""Vectors rendered at a time: some 260 kB of base64, less than 2 ms of work."""

Encoding: TypeAlias = Literal["float", "base64"]


@dataclass(frozen=True, slots=True)
class EmbeddingRequest:
    """A request that is well formed; whether the model can answer it is not known here."""

    model: str
    inputs: list[Input]
    dimensions: int | None
    encoding: Encoding
    user: str | None
    parameters: Mapping[str, object]
    """All other fields: they are sent on, and may change the numbers."""


def parse(
    body: bytes, most_inputs: int | None = None, model: str | None = None
) -> EmbeddingRequest:
    """Read a request body. Raises InputRefused, status 400, for whatever OpenAI would refuse.

    A field that is null is taken as absent. `most_inputs` is the longest `input`; None = any.
    `model` is what the path names, for older forms of the API; it counts before the body's.
    """
    try:
        fields = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise InputRefused(f"The request body could not be parsed as JSON: {error}.") from error
    if not isinstance(fields, dict):
        raise InputRefused("The request body must be a JSON object.")
    fields = {name: value for name, value in fields.items() if value is not None}
    named = fields.pop("model", None)
    model = named if model is None else model
    if model is None:
        raise InputRefused("You must provide a model parameter.", param="model")
    if not isinstance(model, str) or not model:
        raise InputRefused("'model' must be a non-empty string.", param="model")
    dimensions = fields.pop("dimensions", None)
    if dimensions is not None and (type(dimensions) is not int or dimensions < 1):
        raise InputRefused("'dimensions' must be an integer of at least 1.", param="dimensions")
    encoding = fields.pop("encoding_format", "float")
    if encoding not in ("float", "base64"):
        raise InputRefused(
            "'encoding_format' must be 'float' or 'base64'.", param="encoding_format"
        )
    user = fields.pop("user", None)
    if user is not None and not isinstance(user, str):
        raise InputRefused("'user' must be a string.", param="user")
    inputs = parse_input(fields.pop("input", None), most_inputs)
    return EmbeddingRequest(model, inputs, dimensions, encoding, user, fields)


def parse_input(
    value: Any,  # noqa: ANN401 - whatever JSON holds
    most: int | None = None,
) -> list[Input]:
    """Return the inputs that the `input` field stands for, in any of its four forms.

    `most` is how many items an array may have: inputs, or ids of a token array that stands alone.

    >>> parse_input("a"), parse_input(["a", "b"]), parse_input([1, 2]), parse_input([[1], [2, 3]])
    (['a'], ['a', 'b'], [(1, 2)], [(1,), (2, 3)])
    """
    if isinstance(value, str):
        return [_text(value, "")]
    if not isinstance(value, list):
        raise _invalid("must be a string, an array of strings or an array of tokens", "")
    if not value:
        raise _invalid("must not be an empty array", "")
    if most is not None and len(value) > most:
        raise _invalid(f"is an array too long: {len(value)} items, and a maximum of {most}", "")
    first = type(value[0])
    if first is str:
        if set(map(type, value)) == {str} and all(value):
            return value
        return [_text(item, f"[{i}]") for i, item in enumerate(value)]
    if first is list:
        return [_tokens(item, f"[{i}]") for i, item in enumerate(value)]
    return [_tokens(value, "")]


def _text(item: object, where: str) -> str:
    if not isinstance(item, str):
        raise _invalid("must be a string, like the items before it", where)
    if not item:
        raise _invalid("must not be an empty string", where)
    return item


def _tokens(item: object, where: str) -> tuple[int, ...]:
    if not isinstance(item, list):
        raise _invalid("must be an array of tokens, like the items before it", where)
    if not item:
        raise _invalid("must not be an empty array", where)
    if set(map(type, item)) == {int} and min(item) >= 0 and max(item) < 1 << 32:
        return tuple(item)
    for i, token in enumerate(item):
        # bool is an int to Python, not to JSON.
        if type(token) is not int:
            raise _invalid("must be an integer token", f"{where}[{i}]")
        if not 0 <= token < 1 << 32:
            raise _invalid("is no token of any model", f"{where}[{i}]")
    return tuple(item)


def _invalid(problem: str, where: str) -> InputRefused:
    return InputRefused(f"'$.input{where}' is invalid: it {problem}.", param="input")


def render(
    vectors: Sequence[Vector],
    *,
    dimensions: int,
    encoding: Encoding,
    model: str,
    prompt_tokens: int,
) -> Iterator[bytes]:
    """Yield the reply in chunks of a few hundred kB, indices 0…n-1 in the order given.

    `dimensions` is the width to answer with; wider vectors are cut and renormalised.
    """
    head = b'{"object":"list","data":['
    for start in range(0, len(vectors), VECTORS_A_CHUNK):
        some = vector.derive(vectors[start : start + VECTORS_A_CHUNK], dimensions)
        if encoding == "base64":
            items = [
                b'{"object":"embedding","index":%d,"embedding":"%b"}' % (i, vector.to_base64(v))
                for i, v in enumerate(some, start)
            ]
        else:
            items = [
                b'{"object":"embedding","index":%d,"embedding":%b}' % (i, vector.to_json(v))
                for i, v in enumerate(some, start)
            ]
        yield head + b",".join(items)
        head = b","
    yield b'],"model":%b,"usage":{"prompt_tokens":%d,"total_tokens":%d}}' % (
        orjson.dumps(model),
        prompt_tokens,
        prompt_tokens,
    )
