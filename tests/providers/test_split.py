"""Parts are what the limits allow, in order, nothing left out and nothing twice."""

from itertools import chain

import pytest
from hypothesis import given
from hypothesis import strategies as st

from providers.base import Context, Space
from providers.batching import split
from providers.limits import Limits

COUNTED = Space("m", 2, tokenizer="cl100k_base")
UNKNOWN = Space("m", 2)
SIZES = st.lists(st.integers(0, 50), min_size=1, max_size=200)


@given(SIZES, st.integers(1, 60), st.none() | st.integers(1, 120), st.booleans())
def test_any_inputs_are_cut_within_the_limits(sizes, inputs, tokens, counted):
    """The parts are a partition in order; each fits, or is one input that fits nowhere."""
    limits = Limits(inputs=inputs, tokens=tokens)
    parts = split.split(len(sizes), limits, sizes if counted else None)
    assert list(chain.from_iterable(parts)) == list(range(len(sizes)))
    for part in parts:
        assert 1 <= len(part) <= inputs
        if counted and tokens is not None:
            assert len(part) == 1 or sum(sizes[i] for i in part) <= tokens


@given(st.integers(1, 5000), st.integers(1, 300))
def test_parts_without_tokens_are_few_and_even(count, inputs):
    """There are no more parts than the inputs need, and none is twice as large as another."""
    parts = split.split(count, Limits(inputs=inputs))
    assert len(parts) <= -(-count // inputs)
    assert max(map(len, parts)) <= -(-count // -(-count // inputs))


@given(st.integers(1, 5000), st.integers(1, 40), st.integers(1, 3000))
def test_speed_makes_no_small_parts(count, concurrency, most):
    """Cutting for speed gives at most as many parts as go at once, none for less than it costs."""
    limits = Limits(inputs=most, concurrency=concurrency)
    cut = split.side_by_side(count, limits)
    assert cut.inputs <= most
    needed = -(-count // min(most, split.MOST))
    parts = split.split(count, cut)
    assert len(parts) <= max(needed, min(concurrency, -(-count // split.LEAST)))
    if count >= concurrency * split.LEAST:
        assert len(parts) >= min(needed, concurrency)


@pytest.mark.parametrize(("rate", "parts"), [(None, 8), (6000, 8), (240, 4), (60, 1), (1, 1)])
def test_a_rate_limit_is_not_spent_for_speed(rate, parts):
    """No more calls are made at once than the upstream allows in a second."""
    limits = Limits(concurrency=8, requests_per_minute=rate, tokens=7)
    cut = split.side_by_side(2000, limits)
    assert len(split.split(2000, cut)) == parts
    assert (cut.tokens, cut.concurrency) == (7, 8)


async def test_what_cannot_pass_the_limit_is_not_counted(monkeypatch):
    """No token is shorter than a byte: where the bytes fit, nobody counts."""
    monkeypatch.setattr("providers.tokens.count", None)
    assert await split.sizes(COUNTED, ["abcd", (1, 2, 3, 4)], 12, Context()) is None
    assert await split.sizes(COUNTED, ["abcd"] * 100, None, Context()) is None


async def test_tokens_are_counted_where_the_tokenizer_is_known():
    """The model's own tokenizer decides, and an array is as long as it is."""
    assert await split.sizes(COUNTED, ["hello world", (5,) * 9], 10, Context()) == [2, 9]


@given(st.lists(st.text(max_size=40), min_size=1))
async def test_an_estimate_never_saves_on_ordinary_text(texts):
    """Without a tokenizer at least one token in two bytes is assumed, and what frames an input."""
    sizes = await split.sizes(UNKNOWN, texts, 0, Context())
    for text, size in zip(texts, sizes, strict=True):
        assert len(text.encode()) / 2 + 2 <= size <= len(text.encode()) / 2 + 3
    assert await split.sizes(UNKNOWN, [(1,) * 9], 10, Context()) == [11]


@given(st.integers(2, 100), st.integers(0, 50))
def test_halves_are_all_of_it(count, start):
    """Two halves, none empty, make the whole."""
    places = range(start, start + count)
    left, right = split.halves(places)
    assert [*left, *right] == list(places)
    assert 0 <= len(right) - len(left) <= 1
    assert len(left)
