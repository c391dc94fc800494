"""One vector for two inputs: a fault where the inputs differ in what every model reads."""

import pytest
from embedding_proxy.providers.upstream.duplicate_vectors import find_duplicate_vectors
from hypothesis import given
from hypothesis import strategies as st

A, B = b"a" * 64, b"b" * 64
LINES = "\n".join(
    f"2026-03-01T12:00:0{i} INFO worker-{i} finished job {i}000 in 12 ms" for i in range(5)
)
"""The lines that two chunks of a log share; models that cut at 128 tokens read no further."""


def places(inputs, vectors):
    """Return the places of what shares a vector though it differs."""
    return find_duplicate_vectors(inputs, dict(enumerate(vectors)))


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
        ("deadbeef" * 8, "cafebabe" * 8),
        ("4" * 30, "7" * 30),
        (
            "The annual report of the company says of its sales: more than ever, in all regions",
            "The annual report of the company says of its costs: less than ever, in all regions",
        ),
        (f"first {LINES}", f"second {LINES}"),
    ],
)
def test_different_inputs_have_different_vectors(one, other):
    """Whatever the model, words and ids that differ give vectors that differ."""
    assert places([one, other], [A, A]) == [[0, 1]]
    assert places([one, other], [A, B]) == []


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
        (LINES + "\nthe last one failed", LINES + "\nall is well"),
        ("0" * 64 + " one", "0" * 64 + " two"),
        (" 7" * 64 + " one", " 7" * 64 + " two"),
        ("猫" * 40 + " one", "猫" * 40 + " two"),
        ("QUJDRE" * 21 + "/one", "QUJDRE" * 21 + "/two"),
        ("if(a){b();}" * 12 + "one", "if(a){b();}" * 12 + "two"),
        ("a   word", "a word" + " " * 30),
        ("one two three " * 9 + "four", "one  two  three  " * 9 + "four"),
        ("x" * 500, "y" * 500),
        (f"file {'a' * 128}", f"file {'b' * 128}"),
        (tuple(range(200)), (*range(200), 7)),
    ],
)
def test_what_a_model_may_overlook_is_no_difference(one, other):
    """Case, accents, space, order, the far end, and what is in no vocabulary may be overlooked."""
    assert places([one, other], [A, A]) == []


def test_all_places_of_a_vector_are_told():
    """Of each vector that is shared, all places in the call, in order."""
    assert places(["a", "b", "c", "d", "e"], [A, B, B, A, B]) == [[0, 3], [1, 2, 4]]
    assert find_duplicate_vectors(["a", "b", "c"], {2: A, 0: A}) == [[0, 2]]


def test_what_is_cut_at_128_tokens_is_no_difference():
    """Where each letter or digit is a token, a text of 126 is read by every model, not more."""
    for start in ("qqqqqq " * 21, "7" * 126):
        assert places([f"{start}one", f"{start}two"], [A, A]) == []


def test_vectors_that_begin_alike_are_not_taken_for_one():
    """Two vectors are one only if all their bytes are."""
    assert places(["a", "b"], [bytes(64) + b"1", bytes(64) + b"2"]) == []


@given(st.lists(st.text(max_size=5), max_size=8))
def test_distinct_vectors_are_never_a_clash(texts):
    """Whatever the texts, vectors that differ are left alone."""
    assert places(texts, [bytes([i]) * 64 for i in range(len(texts))]) == []


@given(st.text(max_size=300), st.text(max_size=300))
def test_no_text_is_too_strange_to_compare(one, other):
    """Any two texts can be compared; a text and itself in another case never differ."""
    assert places([one, other], [A, A]) in ([], [[0, 1]])
    assert places([one, f"  {one} "], [A, A]) == []


def exact(one, other):
    """Tell whether two texts differ for a model whose tokenizer is known."""
    return find_duplicate_vectors([one, other], {0: A, 1: A}, "cl100k_base") == [[0, 1]]


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("yes", "no"),
        ("a b", "b a"),
        ("yes", "yes yes"),
        ("cafés", "cafes"),
        ("yes", "yes!"),
        ("👍", "👎"),
        ("猫", "狗"),
        ("سلام", "مرحبا"),
        ("кошка", "собака"),
        ("นก", "ปลา"),
        ("", "猫"),
        ("猫" * 30 + "一", "猫" * 30 + "二"),
        ("x" * 64 + "a", "x" * 64 + "b"),
        ("猫 " + "x" * 5000, "狗 " + "x" * 5000),
        ("猫" * 3, "猫" * 3000),
    ],
)
def test_a_known_tokenizer_tells_texts_of_every_script_apart(one, other):
    """Its first tokens differ, so the vectors of a right answer do."""
    assert exact(one, other)
    assert exact(other, one)
    assert find_duplicate_vectors([one, other], {0: A, 1: B}, "cl100k_base") == []


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("same", "same"),
        ("US", "us"),
        ("Straße", "STRASSE"),
        ("a  b", " a\tb\n"),
        ("ﬁne Ａ", "fine A"),
        ("caf\u00e9", "cafe\u0301"),
        ("a\u200bb", "ab\ufeff"),
        ("", " \n"),
        ("猫" * 2000 + "一", "猫" * 2000 + "二"),
        ("word " * 300 + "end", "word  " * 300 + "other end"),
        ("e\u0301" * 400, " " + "\u00e9" * 400 + "x"),
    ],
)
def test_what_a_gateway_may_change_is_no_difference(one, other):
    """Case, white space, what is invisible, forms of Unicode, and what is far down the text."""
    assert not exact(one, other)
    assert not exact(other, one)


@given(st.text(max_size=300), st.text(max_size=300), st.sampled_from(["", " ", "\n", "\u200b"]))
def test_a_known_tokenizer_compares_any_texts(one, other, space):
    """Both ways alike; a text and itself in other white space never differ."""
    assert exact(one, other) == exact(other, one)
    assert not exact(one, f"{space}{one}{space}")
    assert not exact(f"{one}{other}", f"{one}{space}{other}")
