"""One vector for two inputs: a fault where the inputs differ in what every model reads."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from providers.batching import twins

A, B = b"a" * 64, b"b" * 64


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("yes", "no"),
        ("a cat", "a dog"),
        ("", "something"),
        ("room 1", "room 2"),
        ((1, 2), (1, 3)),
        ("text", (1, 2)),
        ("👍", "good"),
        ("x" * 1000 + " y", "z"),
    ],
)
def test_different_inputs_have_different_vectors(one, other):
    """Whatever the model, words and ids that differ give vectors that differ."""
    assert twins.find([one, other], [A, A]) == (0, 1)
    assert twins.find([one, other], [A, B]) is None


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("same", "same"),
        ("US", "us"),
        ("a  b", " a\tb\n"),
        ("cafés", "cafes"),
        ("a b", "b a"),
        ("yes", "yes yes"),
        ("👍", "👎"),
        ("猫", "狗"),
        ("word " * 300 + "end", "word " * 300 + "other end"),
        ("x" * 500, "y" * 500),
        (f"file {'a' * 128}", f"file {'b' * 128}"),
        (tuple(range(200)), (*range(200), 7)),
    ],
)
def test_what_a_model_may_overlook_is_no_difference(one, other):
    """Case, accents, space, order, the far end, and what is in no vocabulary may be overlooked."""
    assert twins.find([one, other], [A, A]) is None


def test_the_first_two_that_clash_are_named():
    """The places are those in the call."""
    assert twins.find(["a", "b", "c", "d"], [A, B, B, A]) == (1, 2)


def test_vectors_that_begin_alike_are_not_taken_for_one():
    """Two vectors are one only if all their bytes are."""
    assert twins.find(["a", "b"], [bytes(64) + b"1", bytes(64) + b"2"]) is None


@given(st.lists(st.text(max_size=5), max_size=8))
def test_distinct_vectors_are_never_a_clash(texts):
    """Whatever the texts, vectors that differ are left alone."""
    assert twins.find(texts, [bytes([i]) * 64 for i in range(len(texts))]) is None
