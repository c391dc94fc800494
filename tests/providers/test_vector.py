"""The codec of vectors, against struct, base64 and json, which know nothing of numpy."""

import base64
import json
import math
import struct
from decimal import Decimal

import numpy as np
import pytest
from embedding_proxy.providers import vector
from embedding_proxy.providers.dimensions import check_heads, cut, derive
from embedding_proxy.providers.vector import VectorError
from hypothesis import assume, given, settings
from hypothesis import strategies as st

FLOAT32 = st.floats(width=32, allow_nan=False, allow_infinity=False)
VECTORS = st.lists(FLOAT32, min_size=1, max_size=40)
LARGEST = 3.4028234663852886e38
SMALLEST = 1.401298464324817e-45


def packed(*numbers: float) -> bytes:
    """Return float32 bytes in little-endian order, by the standard library."""
    return struct.pack(f"<{len(numbers)}f", *numbers)


@given(VECTORS)
@settings(deadline=None)
def test_base64_is_the_bytes_themselves(numbers):
    """Base64 goes both ways without touching a bit, and reads what others wrote."""
    raw = packed(*numbers)
    assert vector.to_base64(raw) == base64.b64encode(raw)
    assert vector.from_wire(base64.b64encode(raw).decode()) == raw


def test_base64_keeps_the_bits_of_any_float():
    """A NaN's payload, a negative zero and a subnormal come through: decoding is not checking."""
    raw = bytes.fromhex("0100c07f 00000080 01000000 ffff7f7f")
    assert vector.from_base64(base64.b64encode(raw).decode()) == raw


@given(VECTORS)
@settings(deadline=None)
def test_json_reads_back_to_the_same_float32(numbers):
    """A rendered vector, read by json and rounded to float32, has every bit of the original."""
    raw = packed(*numbers)
    text = vector.to_json(raw)
    assert packed(*json.loads(text)) == raw
    assert vector.from_wire(json.loads(text)) == raw


@given(FLOAT32)
@settings(deadline=None)
def test_json_is_the_shortest_form(number):
    """No digit more is sent than it takes to name the float32."""
    (item,) = json.loads(vector.to_json(packed(number)), parse_float=Decimal, parse_int=Decimal)
    assert item == Decimal(str(np.float32(number)))


@given(st.lists(st.floats(-LARGEST, LARGEST) | st.integers(-(2**63), 2**63), max_size=40))
@settings(deadline=None)
def test_numbers_are_rounded_to_the_nearest_float32(numbers):
    """JSON's doubles and integers become float32 as the standard library rounds them."""
    assert vector.from_numbers(numbers) == packed(*numbers)


@pytest.mark.parametrize("number", [1e39, -1e39, 10**400, -(10**400)])
def test_a_number_beyond_float32_never_passes_for_a_vector(number):
    """An overflow is found, at the latest by the check that follows every conversion."""
    with pytest.raises(VectorError, match="not finite"):
        vector.check(vector.from_numbers([1.0, number]), 2)


@pytest.mark.parametrize(
    "item", [None, True, False, "1.0", "NaN", [1.0], {}, b"1", 1j, np.float64(1)]
)
def test_a_list_holds_numbers_and_nothing_else(item):
    """JSON's booleans, nulls, strings and lists are no numbers, though numpy would take them."""
    with pytest.raises(VectorError, match="not a number"):
        vector.from_wire([0.5, item])


@pytest.mark.parametrize("embedding", [None, 1.0, {}, b"AAAA", ()])
def test_an_embedding_is_a_string_or_a_list(embedding):
    """Any other JSON value, or none, is a missing embedding."""
    with pytest.raises(VectorError, match="is missing"):
        vector.from_wire(embedding)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("AACAPw=", "base64"),
        ("AACAPw", "base64"),
        ("AACA Pw==", "base64"),
        ("AACAPw==\n", "base64"),
        ("AAC-Pw==", "base64"),
        ("AAC_Pw==", "base64"),
        ("ÄACAPw==", "base64"),
        ("AAA=", "2 bytes"),
        ("AACAPwA=", "5 bytes"),
    ],
)
def test_damaged_base64_is_refused(text, problem):
    """Missing padding, blanks, another alphabet and a torn float are errors, not other numbers."""
    with pytest.raises(VectorError, match=problem):
        vector.from_wire(text)


@pytest.mark.parametrize(
    "numbers",
    [[LARGEST] * 64, [0.0] * 63 + [SMALLEST], [-SMALLEST] + [0.0] * 63, [0.6, -0.8] + [0.0] * 62],
)
def test_a_vector_may_reach_to_the_ends_of_float32(numbers):
    """Neither the largest numbers pass for infinite nor the smallest for zero."""
    vector.check(packed(*numbers), 64)


@pytest.mark.parametrize(
    ("raw", "problem"),
    [
        (packed(1, 0, 0), "3 dimensions instead of 4"),
        (packed(1, 0, 0, 0, 0), "5 dimensions instead of 4"),
        (b"", "0 dimensions instead of 4"),
        (packed(1, 0, 0, 0) + b"\0", "dimensions"),
        (packed(1, 0, 0, math.nan), "not finite"),
        (packed(math.inf, 0, 0, 0), "not finite"),
        (packed(1, -math.inf, 0, 0), "not finite"),
        (packed(math.inf, -math.inf, 0, 0), "not finite"),
        (packed(0, 0, 0, 0), "zero"),
        (packed(-0.0, 0, -0.0, 0), "zero"),
    ],
)
def test_an_unusable_vector_is_refused(raw, problem):
    """Wrong width, NaN, infinities and nothing but zeros are told apart and refused."""
    with pytest.raises(VectorError, match=problem):
        vector.check(raw, 4)


@given(st.data())
@settings(deadline=None)
def test_cut_vectors_are_exact_and_of_length_one(data):
    """A cut equals the same sum done in double precision by math, and has unit norm."""
    width = data.draw(st.integers(1, 24), "width")
    dimensions = data.draw(st.integers(1, width), "dimensions")
    rows = data.draw(st.lists(st.lists(FLOAT32, min_size=width, max_size=width), min_size=1))
    assume(all(any(row[:dimensions]) for row in rows))
    narrow = cut([packed(*row) for row in rows], dimensions)
    assert narrow.shape == (len(rows), dimensions)
    assert narrow.dtype == np.float32
    for got, row in zip(narrow.tolist(), rows, strict=True):
        length = math.hypot(*row[:dimensions])
        assert max(abs(a - b / length) for a, b in zip(got, row, strict=False)) <= 1e-7
        assert abs(math.hypot(*got) - 1) <= 1e-6


def test_a_real_vector_cut_at_every_width_is_of_length_one():
    """A long unit vector is as exact at each of the widths that clients ask for."""
    numbers = np.random.default_rng(7).standard_normal(3072)
    native = (numbers / np.linalg.norm(numbers)).astype("<f4")
    for dimensions in (1, 2, 256, 512, 1024, 1536, 3071):
        (narrow,) = derive([native.tobytes()], dimensions)
        head = native[:dimensions].astype(np.float64)
        oracle = head / math.sqrt(math.fsum(x * x for x in head.tolist()))
        got = np.frombuffer(narrow, dtype="<f4").astype(np.float64)
        assert np.abs(got - oracle).max() <= 1e-7
        assert abs(math.sqrt(math.fsum(x * x for x in got.tolist())) - 1) <= 1e-6


def test_a_head_of_zeros_cannot_be_cut():
    """A vector whose first numbers are all zero has no direction there, and is refused."""
    with pytest.raises(VectorError, match="first 2 numbers"):
        cut([packed(1, 0, 0), packed(0, 0, 1)], 2)


ROWS = st.lists(st.lists(st.sampled_from([0.0, -0.0, SMALLEST, 1.0]), min_size=3, max_size=3))


@given(ROWS, st.integers(1, 3))
@settings(deadline=None)
def test_heads_pass_exactly_when_they_can_be_cut(rows, dimensions):
    """The check before an answer refuses what the cut would refuse in the midst of it, no more."""
    vectors = [packed(*row) for row in rows]
    if all(any(row[:dimensions]) for row in rows):
        check_heads(vectors, dimensions)
        derive(vectors, dimensions)
    else:
        with pytest.raises(VectorError, match=f"first {dimensions} numbers"):
            check_heads(vectors, dimensions)


def test_the_native_width_is_not_touched():
    """A vector of the asked-for width is handed on as it is, even when its length is not 1."""
    vectors = [packed(3, 4), packed(1e-30, 0)]
    assert derive(vectors, 2) is vectors
    assert derive([], 2) == []


def test_derived_vectors_keep_their_order():
    """Each input gets the cut of its own vector."""
    vectors = [packed(0, 2, 9), packed(5, 0, 9), packed(0, -7, 9)]
    assert derive(vectors, 2) == [packed(0, 1), packed(1, 0), packed(0, -1)]


def test_vectors_stack_in_rows():
    """An array of n vectors has a row for each, in order."""
    array = vector.stack([packed(1, 2, 3), packed(4, 5, 6)])
    assert array.dtype == np.float32
    assert array.tolist() == [[1, 2, 3], [4, 5, 6]]


@given(VECTORS)
@settings(deadline=None)
def test_lengths_are_exact(numbers):
    """The length agrees with the standard library's, for the largest and smallest numbers too."""
    assert vector.length(packed(*numbers)) == pytest.approx(math.hypot(*numbers), rel=1e-12)


@given(st.data())
@settings(deadline=None)
def test_cosines_are_exact(data):
    """The cosine agrees with the same sum by the standard library, whatever the lengths are."""
    width = data.draw(st.integers(1, 24), "width")
    one, other = (
        data.draw(st.lists(FLOAT32, min_size=width, max_size=width).filter(any)) for _ in range(2)
    )
    a, b = ([x / math.hypot(*row) for x in row] for row in (one, other))
    oracle = math.fsum(x * y for x, y in zip(a, b, strict=True))
    assert vector.cosine(packed(*one), packed(*other)) == pytest.approx(oracle, abs=1e-9)


def test_the_cosine_tells_directions_apart():
    """Same, opposite and square directions are 1, −1 and 0, at any length."""
    north, east = packed(0, 3), packed(LARGEST, 0)
    assert vector.cosine(north, packed(0, SMALLEST)) == 1
    assert vector.cosine(north, packed(0, -0.5)) == -1
    assert vector.cosine(north, east) == 0
