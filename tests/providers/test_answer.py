"""Every check between an upstream's reply and the cache, each failed on purpose, one at a time."""

import base64
import json
import math
import re
import struct
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime

import pytest
from embedding_proxy.providers.base import Space
from embedding_proxy.providers.charge import Charge
from embedding_proxy.providers.errors import (
    AuthenticationError,
    EmbeddingError,
    InvalidAnswer,
    InvalidRequest,
    MalformedResponse,
    ModelNotFound,
    PermissionDenied,
    ProviderError,
    QuotaExceeded,
    RateLimited,
    TransientError,
    UpstreamError,
)
from embedding_proxy.providers.upstream import response
from embedding_proxy.providers.upstream.error_reply import refusal
from embedding_proxy.providers.upstream.retry_after import MAX_TOLD_WAIT, retry_after
from hypothesis import assume, given, settings
from hypothesis import strategies as st

SPACE = Space("vendor/model", 3)
NOW = datetime(2026, 3, 1, 12, 0, 0, tzinfo=UTC)


def numbers_of(index: int) -> list[float]:
    """Return the right vector of the input at `index`: numbers that float32 holds exactly."""
    return [index + 0.5, -1.0, 0.25]


def packed(numbers: list[float]) -> bytes:
    """Return float32 bytes, by the standard library."""
    return struct.pack(f"<{len(numbers)}f", *numbers)


def base64_of(numbers: list[float]) -> str:
    """Return a vector as `encoding_format: base64` has it."""
    return base64.b64encode(packed(numbers)).decode()


def item(index: object, embedding: object) -> dict[str, object]:
    """Return one element of `data`."""
    return {"object": "embedding", "index": index, "embedding": embedding}


def items(count: int) -> list[dict[str, object]]:
    """Return a right `data` for so many inputs."""
    return [item(i, numbers_of(i)) for i in range(count)]


def body_of(data: object, **fields: object) -> bytes:
    """Return a reply; NaN and infinities are written as Python's json writes them."""
    return json.dumps({"object": "list", "data": data, "model": "m", **fields}).encode()


def read(body: bytes, count: int = 2) -> response.CheckedReply:
    """Read a reply to `count` inputs."""
    return response.read("acme", SPACE, ["one text"] * count, {}, body)


@pytest.mark.parametrize("form", [list, base64_of], ids=["floats", "base64"])
def test_a_right_answer_is_read_in_either_form(form):
    """Floats and base64 give the same bytes, whichever was asked for."""
    data = [item(i, form(numbers_of(i))) for i in range(3)]
    checked = read(body_of(data, usage={"prompt_tokens": 7, "total_tokens": 7}), 3)
    assert checked.vectors == [packed(numbers_of(i)) for i in range(3)]
    assert checked.charge == Charge(7)


def test_forms_may_be_mixed_in_one_answer():
    """Each embedding is read by the form it has."""
    data = [item(0, numbers_of(0)), item(1, base64_of(numbers_of(1)))]
    assert read(body_of(data)).vectors == [packed(numbers_of(0)), packed(numbers_of(1))]


@given(st.integers(1, 12).flatmap(lambda n: st.permutations(range(n))))
@settings(deadline=None)
def test_vectors_are_placed_by_index(order):
    """In whatever order the embeddings come, each input gets the one that bears its index."""
    data = [item(i, numbers_of(i)) for i in order]
    checked = read(body_of(data), len(order))
    assert checked.vectors == [packed(numbers_of(i)) for i in range(len(order))]


@given(st.lists(st.integers(-2, 5), min_size=1, max_size=5))
@settings(deadline=None)
def test_indices_are_a_permutation_or_the_answer_is_refused(indices):
    """Any other numbering, with gaps, doubles or numbers out of range, gives no vector at all."""
    body = body_of([item(i, numbers_of(0)) for i in indices])
    if sorted(indices) == list(range(len(indices))):
        assert len(read(body, len(indices)).vectors) == len(indices)
    else:
        with pytest.raises(InvalidAnswer, match="permutation"):
            read(body, len(indices))


@pytest.mark.parametrize(
    "index", ["one", "", "01", " 1", "-1", "٣", 0.5, True, -1, 2, [1], 1 << 70]
)
def test_an_index_is_a_whole_number_in_range(index):
    """JSON's true is no 1, and a text that is no number is refused, not guessed."""
    with pytest.raises(InvalidAnswer, match="permutation"):
        read(body_of([item(0, numbers_of(0)), item(index, numbers_of(1))]))


@pytest.mark.parametrize(
    ("indices", "order", "is_numbered"),
    [
        ([0, 1, 2], [0, 1, 2], True),
        (["0", "1", "2"], [0, 1, 2], True),
        (["2", 0.0, 1], [2, 0, 1], True),
        ([None, None, None], [0, 1, 2], False),
        ([..., ..., ...], [0, 1, 2], False),
        ([..., None, ...], [0, 1, 2], False),
        ([..., 1, 2], [0, 1, 2], False),
        ([2, ..., 1], [2, 0, 1], False),
        ([2, 0, None], [2, 0, 1], False),
        ([...], [0], False),
        ([None], [0], False),
    ],
)
def test_a_missing_index_is_deduced_where_there_is_no_doubt(indices, order, is_numbered):
    """All missing: the order counts. One missing: the place that is left (Google leaves out 0)."""
    data = [item(index, numbers_of(place)) for index, place in zip(indices, order, strict=True)]
    for one in data:
        if one["index"] is ...:
            del one["index"]
    checked = read(body_of(data), len(order))
    assert checked.vectors == [packed(numbers_of(place)) for place in range(len(order))]
    assert checked.is_numbered is is_numbered


@pytest.mark.parametrize(
    "indices",
    [[None, None, 2], [..., 1, 1], [..., 3, 1], [..., "x", 1], [1, None], [None, 0, 0], [7]],
)
def test_a_missing_index_is_not_guessed(indices):
    """Several missing of more, a double, a hole or no number: nobody knows whose vector it is."""
    data = [item(index, numbers_of(0)) for index in indices]
    for one in data:
        if one["index"] is ...:
            del one["index"]
    count = len(data) if indices != [1, None] else 3
    with pytest.raises(InvalidAnswer, match=r"permutation|2 embeddings for 3"):
        read(body_of(data), count)


BOMS = {"utf-8": b"\xef\xbb\xbf", "utf-16-le": b"\xff\xfe", "utf-16-be": b"\xfe\xff"}


@pytest.mark.parametrize("encoding", BOMS)
def test_a_byte_order_mark_is_read(encoding):
    """A body that begins with one is read, in the encoding that it names."""
    body = BOMS[encoding] + body_of(items(2)).decode().encode(encoding)
    assert read(body).vectors == [packed(numbers_of(0)), packed(numbers_of(1))]


@pytest.mark.parametrize("sent", [0, 1, 3, 4])
def test_the_number_of_vectors_is_the_number_of_inputs(sent):
    """Too few, too many or no embeddings at all are refused, with both numbers."""
    with pytest.raises(InvalidAnswer, match=f"{sent} embeddings for 2 inputs"):
        read(body_of(items(sent)))


GOOD = base64.b64encode(packed([1.0, 2.0, 3.0])).decode()


@pytest.mark.parametrize(
    ("embedding", "problem"),
    [
        ([1.0, 2.0], "2 dimensions instead of 3"),
        ([1.0, 2.0, 3.0, 4.0], "4 dimensions instead of 3"),
        ([], "0 dimensions instead of 3"),
        ("", "0 dimensions instead of 3"),
        (base64_of([1.0, 2.0]), "2 dimensions instead of 3"),
        (base64_of([1.0] * 6), "6 dimensions instead of 3"),
        (base64.b64encode(b"\0" * 11).decode(), "11 bytes"),
        (GOOD[:-1], "not valid base64"),
        (GOOD[:-1] + "!", "not valid base64"),
        (f" {GOOD}", "not valid base64"),
        (base64_of([1.0, math.nan, 3.0]), "not finite"),
        (base64_of([1.0, 2.0, -math.inf]), "not finite"),
        ([1.0, 1e39, 3.0], "not finite"),
        ([1.0, None, 3.0], "not a number"),
        ([1.0, "2.0", 3.0], "not a number"),
        ([1.0, True, 3.0], "not a number"),
        ([[1.0, 2.0, 3.0]], "not a number"),
        ([0, 0.0, -0.0], "zero"),
        ([1e-60, 0.0, 0.0], "zero"),
        (base64_of([0.0] * 3), "zero"),
        (None, "is missing"),
        ({"values": [1.0, 2.0, 3.0]}, "is missing"),
        (1.0, "is missing"),
    ],
)
def test_one_bad_vector_spoils_its_input_alone_and_is_named(embedding, problem):
    """Width, form, finiteness and zeros are checked for each; the others are good."""
    data = [item(0, numbers_of(0)), item(1, embedding), item(2, numbers_of(2))]
    checked = read(body_of(data, usage={"prompt_tokens": 7}), 3)
    assert checked.vectors == [packed(numbers_of(0)), packed(numbers_of(2))]
    assert list(checked.indices) == [0, 2]
    assert [*checked.problems] == [1]
    assert re.match(rf"embedding 1: .*{problem}", checked.problems[1])
    assert checked.charge == Charge(7)
    error = response.bad_vectors("acme", checked)
    assert re.match(rf"acme: embedding 1: .*{problem}", str(error))
    assert (error.index, error.indices) == (1, (1,))


def test_of_many_bad_vectors_a_few_are_described():
    """The error names all places, describes the first three, and counts the others."""
    data = [item(place, numbers_of(place) if place == 1 else []) for place in range(6)]
    error = response.bad_vectors("acme", read(body_of(data), 6))
    assert (error.index, error.indices) == (0, (0, 2, 3, 4, 5))
    problem = "0 dimensions instead of 3"
    told = "; ".join(f"embedding {place}: {problem}" for place in (0, 2, 3))
    assert str(error) == f"acme: {told}; and 2 more"


def test_an_answer_without_a_good_vector_is_refused_as_a_whole():
    """Where every vector has another width, it is another model's: no single input is to blame."""
    data = [item(place, [1.0, 2.0]) for place in range(5)]
    with pytest.raises(
        InvalidAnswer, match=r"^acme: embedding 0: 2 dimensions instead of 3$"
    ) as caught:
        read(body_of(data), 5)
    assert (caught.value.index, caught.value.indices) == (None, ())


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
def test_numbers_that_are_not_json_are_refused(number):
    """NaN and Infinity, as some servers write them, are a fault of the vector they stand in."""
    checked = read(body_of([item(0, numbers_of(1)), item(1, [1.0, number, 3.0])]))
    assert checked.problems == {1: "embedding 1: holds something that is not a number"}


@pytest.mark.parametrize(
    ("body", "problem"),
    [
        (b"", "not JSON"),
        (b"<html><body>Bad gateway</body></html>", "not JSON"),
        (body_of(items(2))[:-20], "not JSON"),
        (body_of(items(2)) + b"}", "not JSON"),
        (b'{"data": "\xff"}', "not JSON"),
        (b"[" * 100_000, "not JSON"),
        (b"null", "not a JSON object"),
        (b"[]", "not a JSON object"),
        (b'"data"', "not a JSON object"),
    ],
)
def test_what_is_no_json_object_is_a_gateways_or_cut(body, problem):
    """HTML and cut JSON are no answer of the model at all, and another call may bring one."""
    with pytest.raises(MalformedResponse, match=problem):
        read(body)


@pytest.mark.parametrize(
    ("body", "problem"),
    [
        (b"{}", "no list of embeddings"),
        (b'{"data": null}', "no list of embeddings"),
        (b'{"data": {"0": []}}', "no list of embeddings"),
        (body_of([numbers_of(0), numbers_of(1)]), "no list of embeddings"),
        (body_of([items(1)[0], None]), "no list of embeddings"),
    ],
)
def test_what_is_no_answer_at_all_is_refused(body, problem):
    """JSON of another shape holds no vector, and the error says so."""
    with pytest.raises(InvalidAnswer, match=problem):
        read(body)


@pytest.mark.parametrize("error", [None, {}, "", False])
def test_an_empty_error_is_no_error(error):
    """Some upstreams send `"error": null` beside the vectors."""
    assert len(read(body_of(items(2), error=error)).vectors) == 2


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        ({"code": 429, "message": "slow"}, RateLimited),
        ({"code": 402, "message": "pay"}, QuotaExceeded),
        ({"code": 404, "message": "who?"}, ModelNotFound),
        ({"code": 400, "message": "no"}, InvalidRequest),
        ({"code": 502, "message": "gone"}, UpstreamError),
        ({"code": 200, "message": "odd"}, UpstreamError),
        ({"code": 4290, "message": "odd"}, UpstreamError),
        ({"code": True, "message": "odd"}, UpstreamError),
        ({"code": "429", "message": "slow"}, RateLimited),
        ({"code": "4290", "message": "odd"}, UpstreamError),
        ({"message": "no code"}, UpstreamError),
        ("just a text", UpstreamError),
        (["a list"], UpstreamError),
        (17, UpstreamError),
    ],
)
def test_an_error_inside_a_200_counts_as_what_it_says(error, kind):
    """A reply that holds an error is that error, even with vectors beside it."""
    with pytest.raises(kind) as caught:
        read(body_of(items(2), error=error))
    assert type(caught.value) is kind


@pytest.mark.parametrize(
    ("usage", "charge"),
    [
        ({"prompt_tokens": 7}, Charge(7)),
        ({"prompt_tokens": 7, "total_tokens": 9}, Charge(7)),
        ({"prompt_tokens": 0}, None),
        ({"prompt_tokens": 2**31}, Charge(2**31)),
        ({"prompt_tokens": 2**31 + 1}, None),
        ({"prompt_tokens": 10**30}, None),
        ({"prompt_tokens": -1}, None),
        ({"prompt_tokens": 7.0}, Charge(7)),
        ({"prompt_tokens": 7.5}, None),
        ({"prompt_tokens": True}, None),
        ({"prompt_tokens": "7"}, Charge(7)),
        ({"prompt_tokens": "seven"}, None),
        ({"prompt_tokens": "7" * 5000}, None),
        ({"prompt_tokens": 0, "total_tokens": 0}, None),
        ({"prompt_tokens": None, "total_tokens": None}, None),
        ("7", None),
        ({"prompt_tokens": None, "total_tokens": 7}, Charge(7)),
        ({"total_tokens": 7}, Charge(7)),
        ({"prompt_tokens": 7, "cost": 0.00000014}, Charge(7, 140)),
        ({"prompt_tokens": 7, "cost": 1}, Charge(7, 1_000_000_000)),
        ({"prompt_tokens": 7, "cost": 0}, Charge(7, 0)),
        ({"cost": 1.4e-7}, Charge(None, 140)),
        ({"prompt_tokens": 7, "cost": -1e-9}, Charge(7)),
        ({"prompt_tokens": 7, "cost": 1e300}, Charge(7)),
        ({"prompt_tokens": 7, "cost": True}, Charge(7)),
        ({"prompt_tokens": 7, "cost": "0.1"}, Charge(7)),
        ({"prompt_tokens": 7, "cost": {"total": 0.1}}, Charge(7)),
        ({}, None),
        (None, None),
        ([7], None),
        (7, None),
    ],
)
def test_a_charge_is_taken_when_it_is_one(usage, charge):
    """A strange usage is no usage, a strange cost no cost; the vectors beside it are good."""
    checked = read(body_of(items(2), usage=usage))
    assert checked.charge == charge
    assert len(checked.vectors) == 2


def test_usage_may_be_missing():
    """OpenRouter's reply need not have one."""
    assert read(body_of(items(2))).charge is None


@pytest.mark.parametrize("usage", [{"prompt_tokens": 7, "cost": 1e-9}, None])
@pytest.mark.parametrize(
    "body",
    [
        {"data": items(1)},
        {"data": [items(2)[0], items(2)[0]]},
        {"data": None},
        {"data": [{**one, "embedding": [0.0] * 3} for one in items(2)]},
        {"data": items(2), "error": {"message": "busy", "code": 503}},
    ],
    ids=["one too few", "no permutation", "no list", "zeros", "an error"],
)
def test_an_answer_that_is_no_good_was_charged_all_the_same(body, usage):
    """What a refused answer says of its price is in the error; without a word there is none."""
    with pytest.raises(ProviderError) as caught:
        read(body_of(**body, usage=usage))
    assert caught.value.charge == (Charge(7, 1) if usage else None)


def error_body(code: object = None, kind: str = "some_type", **fields: object) -> bytes:
    """Return an error in OpenAI's shape."""
    error = {"message": "made up", "type": kind, "param": None, "code": code, **fields}
    return json.dumps({"error": error}).encode()


STATUSES = [
    (400, None, InvalidRequest),
    (401, "invalid_api_key", AuthenticationError),
    (402, None, QuotaExceeded),
    (403, None, PermissionDenied),
    (404, "model_not_found", ModelNotFound),
    (408, None, UpstreamError),
    (409, None, UpstreamError),
    (413, None, InvalidRequest),
    (422, None, InvalidRequest),
    (429, "rate_limit_exceeded", RateLimited),
    (429, "insufficient_quota", QuotaExceeded),
    (500, None, UpstreamError),
    (502, None, UpstreamError),
    (503, None, UpstreamError),
    (504, None, UpstreamError),
    (524, None, UpstreamError),
    (529, None, UpstreamError),
]


@pytest.mark.parametrize(("status", "code", "kind"), STATUSES)
def test_a_refusal_is_known_by_its_status(status, code, kind):
    """Each status has one place in the tree; a quota that is used up is no passing limit."""
    error = refusal("acme", status, {}, error_body(code))
    assert type(error) is kind
    if isinstance(error, InvalidRequest):
        said = (error.status, error.kind, error.code, str(error))
        assert said == (status, "some_type", code, "made up")
    else:
        assert isinstance(error, ProviderError)
        assert (error.provider, str(error)) == ("acme", f"acme: status {status}: made up")
        said = error.refusal
        assert (said.status, said.kind, said.code) == (status, "some_type", code)
        assert said.message == "made up"


@pytest.mark.parametrize(("status", "code", "kind"), STATUSES)
def test_a_refusal_without_a_body_is_known_by_its_status_alone(status, code, kind):
    """Where nothing can be read, the status decides, and the message says which it was."""
    for body in (b"", b"<html>", b"[]", b'{"error": null}', b'{"error": 7}'):
        error = refusal("acme", status, {}, body)
        assert type(error) is (RateLimited if status == 429 else kind)
        assert str(error).endswith(f"status {status}")


@pytest.mark.parametrize(("status", "code", "kind"), [row for row in STATUSES if row[0] != 429])
def test_a_code_that_is_a_status_is_the_status(status, code, kind):
    """OpenRouter's `code` is the true status, as is Azure's and LiteLLM's string."""
    for written in (status, str(status)):
        error = refusal("acme", 200, {}, error_body(written))
        assert type(error) is kind
        said = error if isinstance(error, InvalidRequest) else error.refusal
        assert (said.status, said.code) == (status, None)


@pytest.mark.parametrize(
    ("code", "status"),
    [
        (399, 503),
        (400, 400),
        (599, 599),
        (600, 503),
        (True, 503),
        (429.0, 503),
        (10**18, 503),
        ("404", 404),
        ("0404", 503),
        ("404 ", 503),
        ("\u0664\u0660\u0664", 503),
    ],
)
def test_only_an_error_status_can_be_a_code(code, status):
    """Other numbers of an upstream's own do not hide the status it answered with."""
    error = refusal("acme", 503, {}, error_body(code))
    assert (error if isinstance(error, InvalidRequest) else error.refusal).status == status


def test_a_quota_may_stand_in_the_type_alone():
    """`insufficient_quota` counts as type and as code."""
    body = error_body(None, kind="insufficient_quota")
    assert type(refusal("acme", 429, {}, body)) is QuotaExceeded


def test_a_refused_input_keeps_what_openai_said():
    """Parameter, type and code of a refused request are the client's to read."""
    body = error_body("max_tokens_per_request", "max_tokens_per_request", param="input")
    error = refusal("acme", 400, {}, body)
    said = (error.param, error.kind, error.code)
    assert said == ("input", "max_tokens_per_request", "max_tokens_per_request")


def test_a_refused_input_has_openais_type_when_none_was_given():
    """The four keys of OpenAI's error never lack a type."""
    error = refusal("acme", 422, {}, b'{"error": {"message": "no", "param": 3}}')
    assert (error.kind, error.param, error.code) == ("invalid_request_error", None, None)


def test_a_bare_string_is_a_message():
    """`{"error": "text"}`, as Ollama sends it, is read."""
    assert str(refusal("acme", 503, {}, b'{"error": "loading"}')) == "acme: status 503: loading"


def test_a_message_is_not_handed_on_at_any_length():
    """An upstream that echoes a whole input in its error does not get it into log and reply."""
    for status in (400, 500):
        error = refusal("acme", status, {}, error_body(message="x" * 100_000))
        assert 400 < len(str(error)) < 600


@pytest.mark.parametrize("status", [402, 403, 404, 429, 500, 503])
def test_every_refusal_carries_the_wait(status):
    """Whoever handles the failure finds how long the upstream asked to wait."""
    error = refusal("acme", status, {"Retry-After": "7"}, b"")
    assert error.retry_after == 7


def test_a_date_counts_from_now():
    """A refusal with a date asks to wait from the moment it is read."""
    later = format_datetime(datetime.now(UTC) + timedelta(seconds=90), usegmt=True)
    wait = refusal("acme", 429, {"Retry-After": later}, b"").retry_after
    assert 60 < wait <= 90


@pytest.mark.parametrize(
    ("status", "headers", "wait"),
    [
        (429, {"x-ratelimit-reset-requests": "6m0s"}, 360.0),
        (429, {"x-ratelimit-reset-requests": "6m0s", "Retry-After": "2"}, 2.0),
        (429, {"x-ratelimit-reset-requests": "6m0s", "Retry-After": "soon"}, 360.0),
        (503, {"x-ratelimit-reset-requests": "6m0s"}, None),
    ],
)
def test_a_rate_limit_says_when_it_ends_even_without_retry_after(status, headers, wait):
    """OpenAI's reset headers stand in for Retry-After on a 429, and on nothing else."""
    assert refusal("acme", status, headers, b"").retry_after == wait


@pytest.mark.parametrize(
    ("headers", "wait"),
    [
        ({}, None),
        ({"Retry-After": "7"}, 7.0),
        ({"Retry-After": "0"}, 0.0),
        ({"Retry-After": "1.25"}, 1.25),
        ({"Retry-After": " 3 "}, 3.0),
        ({"Retry-After": "86400"}, MAX_TOLD_WAIT),
        ({"retry-after-ms": "250"}, 0.25),
        ({"retry-after-ms": "0.5"}, 0.0005),
        ({"retry-after-ms": "250", "Retry-After": "9"}, 0.25),
        ({"retry-after-ms": "soon", "Retry-After": "9"}, 9.0),
        ({"retry-after-ms": "-1", "Retry-After": "9"}, 9.0),
        ({"Retry-After": "Sun, 01 Mar 2026 12:00:30 GMT"}, 30.0),
        ({"Retry-After": "Sun, 01 Mar 2026 13:00:30 +0100"}, 30.0),
        ({"Retry-After": "Sunday, 01-Mar-26 12:00:30 GMT"}, 30.0),
        ({"Retry-After": "Sun, 01 Mar 2026 11:59:59 GMT"}, 0.0),
        ({"Retry-After": "Sat, 31 Feb 2026 12:00:00 GMT"}, None),
        ({"Retry-After": "-1"}, None),
        ({"Retry-After": "nan"}, None),
        ({"Retry-After": "inf"}, None),
        ({"Retry-After": "1e400"}, None),
        ({"Retry-After": "6m0s"}, 360.0),
        ({"Retry-After": "1772366430"}, 30.0),
        ({"Retry-After": "1772366430000"}, 30.0),
        ({"Retry-After": "2026-03-01T12:00:30Z"}, 30.0),
        ({"Retry-After": "Sun, 01 Mar 2066 12:00:30 GMT"}, MAX_TOLD_WAIT),
        ({"Retry-After": "9" * 20}, MAX_TOLD_WAIT),
        ({"Retry-After": "9" * 400}, None),
        ({"retry-after-ms": "99999999999999"}, MAX_TOLD_WAIT),
        ({"retry-after-ms": "nan", "Retry-After": "nan"}, None),
        ({"Retry-After": "tomorrow"}, None),
        ({"Retry-After": ""}, None),
        ({"x-ratelimit-reset-tokens": "9"}, None),
    ],
)
def test_the_wait_an_upstream_asks_for(headers, wait):
    """Seconds, fractions, milliseconds and dates are read; whatever else stands there is none."""
    assert retry_after(headers, NOW.timestamp()) == wait


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-600, 600) | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                ["error", "code", "type", "message", "param", "data", "index", "embedding", "usage"]
            ),
            inner,
            max_size=5,
        )
    ),
    max_leaves=12,
)


@given(JSON, st.sampled_from([200, 400, 401, 429, 500]))
@settings(deadline=None)
def test_whatever_json_comes_the_error_is_of_our_tree(value, status):
    """No body, however strange, makes the reader fail in a way that nobody handles."""
    body = json.dumps(value).encode()
    assert isinstance(refusal("acme", status, {}, body), EmbeddingError)
    with pytest.raises(EmbeddingError):
        read(body)


@given(st.sampled_from(["object", "index", "embedding"]), st.integers(0, 1), JSON)
@settings(deadline=None)
def test_one_strange_value_never_becomes_another_vector(field, position, value):
    """With one value of a right answer replaced, it is refused or the vectors are still right."""
    assume(not isinstance(value, list) or len(value) != 3)  # that may be a vector
    data = items(2)
    data[position][field] = value
    try:
        checked = read(body_of(data))
    except TransientError:
        return
    right = [packed(numbers_of(0)), packed(numbers_of(1))]
    assert checked.vectors == [right[place] for place in checked.indices]
    assert checked.vectors == right or field == "embedding"


@pytest.mark.parametrize(
    ("value", "wait"),
    [
        ("Sun Mar  1 12:00:30 2026", 30.0),
        ("Sun, 01 Mar 2026 12:00:30 -0000", 30.0),
        ("Sun, 01 Mar 2026 12:00:30 +99999999999999", None),
    ],
)
def test_a_date_without_a_zone_is_utc(value, wait):
    """The older forms of an HTTP date are read, and nonsense is no wait."""
    assert retry_after({"Retry-After": value}, NOW.timestamp()) == wait


UNIT = [0.6, 0.8, 0.0]


@pytest.mark.parametrize(
    ("scale", "good"), [(1.0, True), (1.009, True), (0.991, True), (1.02, False), (0.98, False)]
)
def test_a_length_is_1_where_it_is_promised(scale, good):
    """A hundredth is what rounding to 16 bits may cost; more is another vector, and named."""
    body = body_of([item(0, UNIT), item(1, [scale * number for number in UNIT])])

    def checked(*, unit_norm):
        return response.read("acme", SPACE, ["a", "a"], {}, body, unit_norm=unit_norm)

    assert len(checked(unit_norm=False).vectors) == 2
    if good:
        assert len(checked(unit_norm=True).vectors) == 2
    else:
        assert re.match(r"embedding 1: length \d", checked(unit_norm=True).problems[1])


def test_one_vector_for_two_texts_is_neithers():
    """Whose it is nobody knows: both are asked for again, and the third is kept."""
    body = body_of([item(0, numbers_of(0)), item(1, numbers_of(1)), item(2, numbers_of(0))])
    assert len(response.read("acme", SPACE, ["a", "b", "A"], {}, body).vectors) == 3
    checked = response.read("acme", SPACE, ["a", "b", "c"], {}, body)
    assert checked.vectors == [packed(numbers_of(1))]
    assert list(checked.indices) == [1]
    error = response.bad_vectors("acme", checked)
    assert str(error) == "acme: embeddings 0 and 2 are one, of different inputs"
    assert (error.index, error.indices) == (0, (0, 2))


def test_one_vector_for_all_texts_is_no_answer():
    """Nothing of it is used, and the places say that each input may be asked for alone."""
    body = body_of([item(place, numbers_of(0)) for place in range(3)])
    with pytest.raises(InvalidAnswer, match="acme: embeddings 0 and 1 are one") as caught:
        response.read("acme", SPACE, ["a", "b", "c"], {}, body)
    assert (caught.value.index, caught.value.indices) == (None, (0, 1, 2))
    assert len(response.read("acme", SPACE, ["a"], {}, body_of(items(1))).vectors) == 1


@pytest.mark.parametrize(("told", "model"), [("m", "m"), ("", None), (None, None), (7, None)])
def test_the_model_is_told(told, model):
    """What the upstream says it asked is handed on; a strange value is none."""
    assert read(body_of(items(2), model=told)).model == model


def test_one_vector_in_any_script_is_neithers_where_the_tokenizer_is_known():
    """Of another model nobody knows whether it reads the script."""
    body = body_of([item(0, numbers_of(0)), item(1, numbers_of(1)), item(2, numbers_of(0))])
    texts = ["猫", "鳥", "狗"]
    assert len(response.read("acme", SPACE, texts, {}, body).vectors) == 3
    exact = replace(SPACE, tokenizer="cl100k_base")
    assert list(response.read("acme", exact, texts, {}, body).indices) == [1]
    # A field of the request may have let the model read less.
    cut = replace(exact, parameters=(("truncate_prompt_tokens", b"1"),))
    assert len(response.read("acme", cut, texts, {}, body).vectors) == 3
