"""OpenAI's embeddings JSON <-> our values. Pure: bytes in, values out; imports no HTTP library.

Source of the rules: OpenAI's API reference for `POST /v1/embeddings` (autumn 2026).
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import orjson
from embedding_proxy.providers import vector
from embedding_proxy.providers.base import Vector
from embedding_proxy.providers.dimensions import derive
from embedding_proxy.providers.errors import InvalidRequest
from embedding_proxy.proxy.request_fields import classify
from embedding_proxy.proxy.service.index_options import parse_index_options
from embedding_proxy.proxy.service.request import (
    EmbeddingRequest,
    Encoding,
    parse_dimensions,
    parse_input,
    parse_model,
    parse_string,
)

CHUNK = 96 << 10
"""About how many bytes of a reply are made at a time. From 128 KiB on the C library takes fresh
memory for each, and to fault that in takes four times as long as to fill it."""

_HEAD = b'{"object":"list","data":['
_TAIL = b'],"model":%b,"usage":{"prompt_tokens":%d,"total_tokens":%d}}'
_ITEM = b'{"object":"embedding","index":%d,"embedding":'
_CLOSING: Mapping[str, bytes] = {"base64": b'"}', "float": b"}"}
# Bytes; in a longer body that cannot be read, half of a surrogate pair is not looked for.
_MAX_EXPLAINED = 8 << 20
_POWERS = (10, 100, 1000, 10_000, 100_000, 1_000_000, 10_000_000)


def parse(
    body: bytes,
    max_inputs: int | None = None,
    model: str | None = None,
    on_model: Callable[[str], None] | None = None,
) -> EmbeddingRequest:
    """Read a request body. Raises InvalidRequest, status 400, for whatever OpenAI would refuse.

    A field that is null is taken as absent. `max_inputs` is the longest `input`; None = any.
    `model` is what the path names, for older forms of the API; it counts before the body's.
    `on_model` is told the model as soon as it is known, also of a request that is refused then.
    Further fields are placed by `request_fields`.
    """
    try:
        fields = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise _unreadable(body, error) from error
    if not isinstance(fields, dict):
        raise InvalidRequest("The request body must be a JSON object.")
    if None in fields.values():
        fields = {name: value for name, value in fields.items() if value is not None}
    named = fields.pop("model", None)
    model = named if model is None else model
    if model is None:
        raise InvalidRequest("You must provide a model parameter.", param="model")
    model = parse_model(model)
    if on_model is not None:
        on_model(model)
    dimensions = parse_dimensions(fields.pop("dimensions", None))
    encoding = fields.pop("encoding_format", "float")
    if encoding not in ("float", "base64"):
        raise InvalidRequest(
            "'encoding_format' must be 'float' or 'base64'.", param="encoding_format"
        )
    user = fields.pop("user", None)
    if user is not None:
        user = parse_string("user", user)
    value, index_field = fields.pop("input", None), fields.pop("index", None)
    further = classify(fields)
    inputs = parse_input(value, max_inputs)
    index = parse_index_options(index_field, len(inputs))
    return EmbeddingRequest(
        model, inputs, dimensions, encoding, user, further.parameters, index, further.neutral
    )


def _unreadable(body: bytes, error: orjson.JSONDecodeError) -> InvalidRequest:
    """Return why a body cannot be read; half of a surrogate pair is named by its place.

    `json` reads it where orjson does not: it is well-formed JSON, but no Unicode.
    """
    try:
        if len(body) <= _MAX_EXPLAINED:
            path = _half_pair(json.loads(body.decode("utf-8", "surrogatepass")), ())
            if path is not None:
                location = "".join(
                    f"[{step}]" if type(step) is int else f".{step}" for step in path
                )
                return InvalidRequest(
                    f"'${location}' is invalid: it holds half of a surrogate pair, which is no"
                    " Unicode.",
                    param=str(path[0]) if path else None,
                )
    except (ValueError, RecursionError):
        pass
    return InvalidRequest(f"The request body could not be parsed as JSON: {error}.")


def _half_pair(value: object, path: tuple[str | int, ...]) -> tuple[str | int, ...] | None:
    """Return the place of the first text that has no UTF-8; None if each has."""
    if isinstance(value, str):
        return None if _is_unicode(value) else path
    if isinstance(value, list):
        paths = (_half_pair(item, (*path, i)) for i, item in enumerate(value))
    elif isinstance(value, dict):
        fields = ((ascii(name)[1:-1][:100], name, item) for name, item in value.items())
        paths = (
            _half_pair(item, (*path, plain)) if _is_unicode(name) else (*path, plain)
            for plain, name, item in fields
        )
    else:
        return None
    return next((found_path for found_path in paths if found_path is not None), None)


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


@dataclass(slots=True)
class ResponseFormat:
    """How a reply is given."""

    dimensions: int
    """The width to answer with; wider vectors are cut and renormalised, narrower ones padded."""
    encoding: Encoding
    model: str
    """The name that the client asked for."""
    prompt_tokens: int

    @property
    def vectors_a_chunk(self) -> int:
        """How many vectors are rendered at a time, in about a millisecond at most.

        >>> ResponseFormat(1536, "base64", "m", 1).vectors_a_chunk
        12
        >>> ResponseFormat(1536, "float", "m", 1).vectors_a_chunk
        5
        """
        numbers = self.dimensions * (12 if self.encoding == "float" else 5)
        return max(1, CHUNK // (numbers + 64))

    @property
    def tail(self) -> bytes:
        """What stands behind the vectors."""
        tokens = self.prompt_tokens
        return _TAIL % (orjson.dumps(self.model), tokens, tokens)

    def length(self, vectors: int) -> int | None:
        """Return the bytes of a whole reply; None where only rendering it tells."""
        if self.encoding == "float":
            return None
        base64 = (4 * self.dimensions + 2) // 3 * 4
        item = len(_ITEM) - len(b"%d") + len(b'""}') + base64
        digits = vectors + sum(max(0, vectors - power) for power in _POWERS)
        commas = vectors - 1
        return len(_HEAD) + vectors * item + digits + commas + len(self.tail)


def render(
    vectors: Sequence[Vector],
    form: ResponseFormat,
    to_json: Callable[[Vector], bytes] = vector.to_json,
) -> Iterator[bytes]:
    """Yield the reply in chunks of about `CHUNK` bytes, indices 0…n-1 in the order given.

    `to_json` writes vectors that need not be cut or padded.
    """
    step = form.vectors_a_chunk
    for start in range(0, len(vectors), step):
        yield b"".join(_items(vectors[start : start + step], form, to_json, start))
    yield _CLOSING[form.encoding] + form.tail


def render_whole(
    vectors: Sequence[Vector],
    form: ResponseFormat,
    to_json: Callable[[Vector], bytes] = vector.to_json,
) -> bytes:
    """Return a reply of few vectors, see `render`."""
    items = _items(vectors, form, to_json, 0)
    items += _CLOSING[form.encoding], form.tail
    return b"".join(items)


def _items(
    vectors: Sequence[Vector],
    form: ResponseFormat,
    to_json: Callable[[Vector], bytes],
    start: int,
) -> list[bytes]:
    """Return the bytes of vectors from the place `start` on, each behind what stands before it."""
    derived = derive(vectors, form.dimensions)
    if form.encoding == "base64":
        encode: Callable[[Vector], bytes] = vector.to_base64
    else:
        encode = to_json if derived is vectors else vector.to_json
    parts = [b""] * (2 * len(derived))
    parts[::2] = _openings(form.encoding, start, form.vectors_a_chunk)[: len(derived)]
    parts[1::2] = map(encode, derived)
    return parts


@lru_cache(maxsize=1024)
def _openings(encoding: Encoding, start: int, count: int) -> list[bytes]:
    """Return what stands before vectors, from the place `start` on, and behind those before."""
    before, quote = _CLOSING[encoding] + b",", b'"' if encoding == "base64" else b""
    indices = range(start, start + count)
    return [(before if index else _HEAD) + _ITEM % index + quote for index in indices]
