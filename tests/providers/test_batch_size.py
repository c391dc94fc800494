"""Batches are what the limits allow, in order, nothing left out and nothing twice."""

from itertools import chain

import pytest
from embedding_proxy.providers.base import Context, Space
from embedding_proxy.providers.profile import Limits
from embedding_proxy.providers.scheduling import batch_size
from hypothesis import given
from hypothesis import strategies as st

COUNTED = Space("m", 2, tokenizer="cl100k_base")
UNKNOWN = Space("m", 2)
SIZES = st.lists(st.integers(0, 50), min_size=1, max_size=200)


@given(SIZES, st.integers(1, 60), st.none() | st.integers(1, 120))
def test_any_inputs_are_cut_within_the_limits(sizes, inputs, tokens):
    """The batches are a partition in order; each fits, or is one input that fits nowhere."""
    limits = Limits(inputs=inputs, tokens=tokens)
    batches = batch_size.split(len(sizes), limits, sizes)
    assert list(chain.from_iterable(batches)) == list(range(len(sizes)))
    for batch in batches:
        assert 1 <= len(batch) <= inputs
        if tokens is not None:
            assert len(batch) == 1 or sum(sizes[i] for i in batch) <= tokens


@given(st.integers(1, 5000), st.integers(1, 300))
def test_batches_without_tokens_are_few_and_even(count, inputs):
    """There are no more batches than the inputs need, and none is twice as large as another."""
    batches = batch_size.split(count, Limits(inputs=inputs), [0] * count)
    assert len(batches) <= -(-count // inputs)
    assert max(map(len, batches)) <= batch_size.balance(count, inputs)


@given(st.integers(1, 5000), st.integers(1, 40), st.integers(1, 3000))
def test_speed_makes_no_small_batches(count, concurrency, max_inputs):
    """Cutting for speed gives at most as many batches as go at once, and none too small."""
    limits = Limits(inputs=max_inputs, concurrency=concurrency)
    share = batch_size.share(count, limits)
    assert share <= max_inputs
    needed = -(-count // min(max_inputs, batch_size.MAX_INPUTS))
    batches = -(-count // share)
    assert batches <= max(needed, min(concurrency, -(-count // batch_size.MIN_INPUTS)))
    if count >= concurrency * batch_size.MIN_INPUTS:
        assert batches >= min(needed, concurrency)


@pytest.mark.parametrize(("rate", "batches"), [(None, 8), (6000, 8), (240, 4), (60, 1), (1, 1)])
def test_a_rate_limit_is_not_spent_for_speed(rate, batches):
    """No more calls are made at once than the upstream allows in a second."""
    limits = Limits(concurrency=8, requests_per_minute=rate, tokens=7)
    assert -(-2000 // batch_size.share(2000, limits)) == batches


async def test_what_cannot_pass_the_limit_is_not_counted(monkeypatch):
    """No token is shorter than a byte: where the bytes fit, nobody counts."""
    monkeypatch.setattr("embedding_proxy.providers.tokens.count", None)
    sizes = await batch_size.sizes(COUNTED, ["abcd", (1, 2, 3, 4)], 12, Context())
    assert sizes == ([6, 6], False)
    assert await batch_size.sizes(COUNTED, ["abcd"] * 100, None, Context()) == ([0] * 100, False)


async def test_tokens_are_counted_where_the_tokenizer_is_known():
    """The model's own tokenizer decides, and an array is as long as it is."""
    sizes = await batch_size.sizes(COUNTED, ["hello world", (5,) * 9], 10, Context())
    assert sizes == ([2, 9], True)


@given(st.lists(st.text(max_size=40), min_size=1))
async def test_an_estimate_never_saves_on_ordinary_text(texts):
    """Without a tokenizer at least one token in two bytes is assumed, and what frames an input."""
    sizes, are_exact = await batch_size.sizes(UNKNOWN, texts, 0, Context())
    assert not are_exact
    for text, size in zip(texts, sizes, strict=True):
        assert len(text.encode()) / 2 + 2 <= size <= len(text.encode()) / 2 + 3
    assert await batch_size.sizes(UNKNOWN, [(1,) * 9], 10, Context()) == ([11], False)
