"""OpenAI's JSON in and out: what is taken, what is refused and how, and that no bit is lost."""

import base64
import json

import numpy as np
import pytest
from embedding_proxy.providers.errors import InvalidRequest
from embedding_proxy.proxy.http import openai_format
from embedding_proxy.proxy.http.openai_format import (
    ResponseFormat,
    parse,
    render,
)
from embedding_proxy.proxy.service.request import MAX_INPUTS, EmbeddingRequest
from hypothesis import example, given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

MODEL = "text-embedding-3-small"


def _body(**fields) -> bytes:
    return json.dumps({"model": MODEL, "input": "a", **fields}).encode()


@pytest.mark.parametrize(
    ("given_input", "inputs"),
    [
        ("a", ["a"]),
        (" A\u0000\n", [" A\u0000\n"]),
        (["a", "b", "a"], ["a", "b", "a"]),
        (["1", "[1]"], ["1", "[1]"]),
        ([1, 2, 0], [(1, 2, 0)]),
        ([[1], [2, 4294967295]], [(1,), (2, 4294967295)]),
        (["x"] * MAX_INPUTS, ["x"] * MAX_INPUTS),
        ([7] * MAX_INPUTS, [(7,) * MAX_INPUTS]),
        ([[7] * (MAX_INPUTS + 1)], [(7,) * (MAX_INPUTS + 1)]),
    ],
    ids=str,
)
def test_all_four_forms_are_read(given_input, inputs):
    """A string, strings, tokens and token arrays become inputs, nothing changed, in order."""
    assert parse(_body(input=given_input), MAX_INPUTS).inputs == inputs


@pytest.mark.parametrize(("item", "count"), [("x", MAX_INPUTS + 1), (7, 1), ([7], MAX_INPUTS + 1)])
def test_without_a_limit_any_number_is_read(item, count):
    """More inputs than OpenAI takes, and a token array as long as a model's context, are read."""
    assert len(parse(_body(input=[item] * (MAX_INPUTS + 1))).inputs) == count


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, EmbeddingRequest(MODEL, ["a"], None, "float", None, {})),
        (
            {"dimensions": 1, "encoding_format": "base64", "user": "u"},
            EmbeddingRequest(MODEL, ["a"], 1, "base64", "u", {}),
        ),
        (
            {"dimensions": None, "encoding_format": None, "user": None, "task": None},
            EmbeddingRequest(MODEL, ["a"], None, "float", None, {}),
        ),
        (
            {"task": "q", "provider": {"only": [None]}, "": 0},
            EmbeddingRequest(
                MODEL,
                ["a"],
                None,
                "float",
                None,
                {"task": "q", "provider": {"only": [None]}, "": 0},
            ),
        ),
    ],
)
def test_other_fields_have_their_place(fields, expected):
    """Known fields are read, null means absent, and all others are kept to be sent on."""
    assert parse(_body(**fields)) == expected


# The bad field, the `param` that names it, and what the message must say, position included.
BAD = {
    "no input": ({"input": None}, "input", "'$.input' is invalid: it must be a string, an array"),
    "input is a number": ({"input": 5}, "input", "'$.input' is invalid: it must be a string, an"),
    "input is an object": ({"input": {"a": 1}}, "input", "'$.input' is invalid"),
    "input is a boolean": ({"input": True}, "input", "'$.input' is invalid: it must be a string"),
    "empty string": ({"input": ""}, "input", "'$.input' is invalid: it must not be an empty str"),
    "empty list": ({"input": []}, "input", "'$.input' is invalid: it must not be an empty array"),
    "too many": (
        {"input": ["x"] * (MAX_INPUTS + 1)},
        "input",
        "'$.input' is invalid: it is an array too long: 2049 items, and a maximum of 2048",
    ),
    "too many tokens": (
        {"input": [1] * (MAX_INPUTS + 1)},
        "input",
        "2049 items, and a maximum of 2048",
    ),
    "empty string inside": (
        {"input": ["a", "b", ""]},
        "input",
        "'$.input[2]' is invalid: it must n",
    ),
    "number among strings": ({"input": ["a", 1]}, "input", "'$.input[1]' is invalid: it must be a"),
    "null among strings": ({"input": ["a", None]}, "input", "'$.input[1]' is invalid: it must be"),
    "list among strings": ({"input": ["a", ["b"]]}, "input", "'$.input[1]' is invalid: it must be"),
    "null first": ({"input": [None, "a"]}, "input", "'$.input[0]' is invalid: it must be a string"),
    "object first": ({"input": [{}]}, "input", "'$.input[0]' is invalid: it must be a string"),
    "string among tokens": ({"input": [1, "2"]}, "input", "'$.input[1]' is invalid: it must be an"),
    "fraction among tokens": ({"input": [1, 2.0]}, "input", "'$.input[1]' is invalid: it must be"),
    "boolean among tokens": ({"input": [1, True]}, "input", "'$.input[1]' is invalid: it must be"),
    "negative token": ({"input": [3, -1]}, "input", "'$.input[1]' is invalid: it is no token of"),
    "token beyond 32 bits": (
        {"input": [1 << 32]},
        "input",
        "'$.input[0]' is invalid: it is no tok",
    ),
    "empty array inside": (
        {"input": [[1], []]},
        "input",
        "'$.input[1]' is invalid: it must not be",
    ),
    "token among arrays": (
        {"input": [[1], 2]},
        "input",
        "'$.input[1]' is invalid: it must be an ar",
    ),
    "string in an array": (
        {"input": [[1], [2, "a"]]},
        "input",
        "'$.input[1][1]' is invalid: it mu",
    ),
    "array in an array": ({"input": [[[1]]]}, "input", "'$.input[0][0]' is invalid: it must be an"),
    "no model": ({"model": None}, "model", "You must provide a model parameter"),
    "empty model": ({"model": ""}, "model", "'model' must be a non-empty string"),
    "model is a number": ({"model": 3}, "model", "'model' must be a non-empty string"),
    "dimensions are negative": ({"dimensions": -1}, "dimensions", "an integer of at least 1"),
    "dimensions are zero": ({"dimensions": 0}, "dimensions", "an integer of at least 1"),
    "dimensions are a boolean": ({"dimensions": True}, "dimensions", "an integer of at least 1"),
    "dimensions are a fraction": ({"dimensions": 256.0}, "dimensions", "an integer of at least 1"),
    "dimensions are a string": ({"dimensions": "256"}, "dimensions", "an integer of at least 1"),
    "dimensions beyond 64 bits": ({"dimensions": 1 << 64}, "dimensions", "an integer of at least"),
    "unknown encoding": ({"encoding_format": "hex"}, "encoding_format", "'float' or 'base64'"),
    "encoding is a list": ({"encoding_format": ["float"]}, "encoding_format", "'float' or 'base"),
    "user is a number": ({"user": 3}, "user", "'user' must be a string"),
}


@pytest.mark.parametrize(("fields", "param", "message"), BAD.values(), ids=BAD)
def test_bad_fields_are_refused_by_name_and_place(fields, param, message):
    """Each bad field gets a 400 that names it, and the place inside it."""
    with pytest.raises(InvalidRequest) as caught:
        parse(_body(**fields), MAX_INPUTS)
    error = caught.value
    assert (error.status, error.kind, error.param) == (400, "invalid_request_error", param)
    assert message in str(error)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"", "could not be parsed as JSON"),
        (b"{", "could not be parsed as JSON"),
        (b'{"model": NaN}', "could not be parsed as JSON"),
        (b'{"input": "\xff"}', "could not be parsed as JSON"),
        (b"[" * 100_000, "could not be parsed as JSON"),
        (b"null", "must be a JSON object"),
        (b'["a"]', "must be a JSON object"),
        (b'"a"', "must be a JSON object"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_a_body_that_is_no_json_object_is_refused(body, message):
    """What is not a JSON object in UTF-8 gets a 400 that says so, and names no field."""
    with pytest.raises(InvalidRequest, match=message) as caught:
        parse(body)
    assert (caught.value.status, caught.value.param) == (400, None)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=8,
)
FIELD_NAMES = ("model", "input", "dimensions", "encoding_format", "user", "x")
FIELDS = st.fixed_dictionaries({}, optional=dict.fromkeys(FIELD_NAMES, JSON))


def _checked(body: bytes) -> None:
    """Parse; whatever comes of it must be a request as promised, or InvalidRequest."""
    try:
        request = parse(body, MAX_INPUTS)
    except InvalidRequest as error:
        assert error.status == 400  # noqa: PT017 - either outcome is fine, each has its rule
        return
    assert 1 <= len(request.inputs) <= MAX_INPUTS
    assert all(request.inputs)
    assert all(
        isinstance(item, str) or all(type(token) is int and token >= 0 for token in item)
        for item in request.inputs
    )
    assert request.model
    assert request.encoding in ("float", "base64")
    assert request.dimensions is None or request.dimensions >= 1


@given(FIELDS | JSON)
@example({"model": "m", "input": "a"})
def test_any_json_is_read_or_refused(value):
    """Whatever JSON comes, it is a well-formed request or InvalidRequest, never another error."""
    _checked(json.dumps(value).encode("utf-8", "surrogatepass"))


@given(st.binary())
def test_any_bytes_are_read_or_refused(body):
    """Whatever bytes come, alone or as an input, the answer is a request or InvalidRequest."""
    _checked(body)
    _checked(b'{"model":"m","input":"' + body + b'"}')
    _checked(b'{"model":"m","input":[' + body + b"]}")


NUMBERS = st.floats(width=32, allow_nan=False, allow_infinity=False)
CHUNK = 4
MATRICES = st.tuples(st.integers(1, 2 * CHUNK + 2), st.integers(1, 5)).flatmap(
    lambda shape: arrays(np.float32, shape, elements=NUMBERS)
)


def _ramp(count: int) -> np.ndarray:
    return np.arange(3 * count, dtype=np.float32).reshape(count, 3) / np.float32(7)


@given(MATRICES, st.sampled_from(["float", "base64"]))
@example(_ramp(CHUNK - 1), "float")
@example(_ramp(CHUNK), "float")
@example(_ramp(CHUNK), "base64")
@example(_ramp(CHUNK + 1), "float")
@example(_ramp(CHUNK + 1), "base64")
@example(_ramp(2 * CHUNK), "base64")
@example(_ramp(2 * CHUNK + 1), "float")
@example(np.array([[-0.0, 1e-45, 3.4028235e38, 0.1]], dtype=np.float32), "float")
def test_what_is_rendered_reads_back_bit_for_bit(matrix, encoding):
    """Any vectors, in any number, come back from the JSON with all bits and in their order."""
    width = matrix.shape[1]
    vectors = [row.astype("<f4").tobytes() for row in matrix]
    form = ResponseFormat(width, encoding, 'a"b\n', 5)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            openai_format, "CHUNK", CHUNK * (64 + width * (5 if encoding == "base64" else 12))
        )
        chunks = list(render(vectors, form))
    reply = json.loads(b"".join(chunks))
    assert len(chunks) == -(-len(vectors) // CHUNK) + 1
    assert form.length(len(vectors)) in (None, sum(map(len, chunks)))
    assert (form.length(len(vectors)) is None) == (encoding == "float")
    assert [item.pop("index") for item in reply["data"]] == list(range(len(vectors)))
    assert {item.pop("object") for item in reply["data"]} == {"embedding"}
    given_back = [item.pop("embedding") for item in reply["data"]]
    if encoding == "base64":
        assert [base64.b64decode(text, validate=True) for text in given_back] == vectors
    else:
        assert [np.array(numbers, "<f4").tobytes() for numbers in given_back] == vectors
    assert not any(reply.pop("data"))
    assert reply == {
        "object": "list",
        "model": 'a"b\n',
        "usage": {"prompt_tokens": 5, "total_tokens": 5},
    }


@pytest.mark.parametrize("encoding", ["float", "base64"])
def test_a_narrower_width_is_cut_in_every_chunk(encoding, monkeypatch):
    """Vectors wider than asked for are cut and renormalised, beyond the first chunk too."""
    monkeypatch.setattr(openai_format, "CHUNK", 300)
    vectors = [np.array([3, 4, i], "<f4").tobytes() for i in range(CHUNK + 2)]
    chunks = list(render(vectors, ResponseFormat(2, encoding, "m", 1)))
    assert len(chunks) > 2
    data = json.loads(b"".join(chunks))["data"]
    cut = np.array([0.6, 0.8], "<f4")
    wanted = base64.b64encode(cut.tobytes()).decode() if encoding == "base64" else [0.6, 0.8]
    assert [item["embedding"] for item in data] == [wanted] * len(vectors)


@given(st.integers(1, 20_000), st.integers(1, 9), st.integers(0, 10**6))
@example(10, 3, 1)
@example(11, 3, 1)
@example(10_001, 1, 99)
def test_the_length_is_known_before_a_reply_is_made(count, width, tokens):
    """It is told in the header of a streamed reply, so it has to be right to the byte."""
    form = ResponseFormat(width, "base64", "m", tokens)
    made = sum(map(len, render([bytes(4 * width)] * count, form)))
    assert form.length(count) == made
