"""Counting against known counts; token arrays become text only where that loses nothing."""

from fractions import Fraction

import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from providers import tokens

# Ids of cl100k_base, known from OpenAI's own tokenizer.
KNOWN = {
    "hello world": (15339, 1917),
    "antidisestablishmentarianism": (519, 85342, 34500, 479, 8997, 2191),
    "2 + 2 = 4": (17, 489, 220, 17, 284, 220, 19),
    "お誕生日おめでとう": (33334, 45918, 243, 21990, 9080, 33334, 62004, 16556, 78699),
}


def ids_of(text: str) -> tuple[int, ...]:
    """Return the token array a client would send for a text."""
    return tuple(tokens._tokenizer(tokens.CL100K).encode_ordinary(text))


@pytest.mark.parametrize("text", KNOWN)
def test_counts_and_texts_of_known_tokens(text):
    """Texts have the number of tokens that OpenAI counts, and their arrays are those texts."""
    assert tokens.count([text, KNOWN[text]]) == [len(KNOWN[text])] * 2
    assert tokens.as_text(KNOWN[text]) == text


@pytest.mark.parametrize("text", ["<|endoftext|>", "<|fim_prefix|>", "a <|endofprompt|> b"])
def test_a_special_token_in_a_text_is_plain_text(text):
    """The name of a special token, typed by a client, is counted as the letters it is made of."""
    ids = ids_of(text)
    assert len(ids) > 3
    assert max(ids) < 100256
    assert tokens.count([text]) == [len(ids)]
    assert tokens.as_text(ids) == text


@given(st.lists(st.text(max_size=30) | st.lists(st.integers(0, 100255), max_size=9).map(tuple)))
@settings(deadline=None)
def test_counts_are_those_of_each_input_alone(inputs):
    """Inputs are counted one by one, arrays by their length, in order."""
    expected = [len(ids_of(i)) if isinstance(i, str) else len(i) for i in inputs]
    assert tokens.count(inputs) == expected


@given(st.text(min_size=1))
@example("\x00 \u200b \ufeff")
@example("  trailing \n\n ")
@example("👩‍👩‍👧 e\u0301")
@settings(deadline=None)
def test_the_array_of_a_text_is_that_text(text):
    """A client that sends a text's own tokens is given the text's vector, whatever the text."""
    assert tokens.as_text(ids_of(text)) == text


@given(st.lists(st.integers(0, 100300), max_size=6).map(tuple))
@settings(deadline=None)
def test_an_array_becomes_only_the_text_that_encodes_to_it(item):
    """Any other array stays what it is: its text would have another vector."""
    result = tokens.as_text(item)
    assert result is item or ids_of(result) == item


@given(st.text(max_size=9), st.characters(codec="utf-8", min_codepoint=0x2E80), st.data())
@settings(deadline=None)
def test_an_array_cut_inside_a_character_stays_an_array(text, character, data):
    """LangChain's chunks may end in the middle of a character; no text stands for those."""
    parts = ids_of(character)
    assume(len(parts) > 1)
    item = ids_of(text) + parts[: data.draw(st.integers(1, len(parts) - 1))]
    assert tokens.as_text(item) is item


@pytest.mark.parametrize(
    "item",
    [
        (),
        (100257,),  # <|endoftext|>
        (15339, 100276),
        (100256,),  # no such token
        (4294967295,),
        (1 << 40,),
        (1 << 80,),
        (-1,),
        (71, 4896),  # not how "hello" is encoded
        (33334, 45918),  # ends inside a character
    ],
)
def test_an_array_without_an_exact_text_stays_an_array(item):
    """Nothing, special tokens, unknown ids, torn characters and odd splits are left alone."""
    assert tokens.as_text(item) is item


def test_a_text_is_its_own_text():
    """A string is handed back untouched, though it may look like an array."""
    assert tokens.as_text("[15339, 1917]") == "[15339, 1917]"


INPUTS = st.text(max_size=12) | st.lists(st.integers(0, 9), max_size=6).map(tuple)


def size_of(item: str | tuple[int, ...]) -> int:
    """Return the bytes an input counts for: those of its text, or four a token."""
    return len(item.encode()) if isinstance(item, str) else 4 * len(item)


@given(st.integers(0, 2**63), st.lists(INPUTS, min_size=1, max_size=20))
@settings(deadline=None)
def test_shares_of_a_total_add_up_to_it(total, inputs):
    """Every share is the exact one rounded down or up, and together they are the total."""
    assume(any(inputs))
    shares = tokens.apportion(total, inputs)
    whole = sum(map(size_of, inputs))
    assert sum(shares) == total
    for share, item in zip(shares, inputs, strict=True):
        assert abs(share - Fraction(total * size_of(item), whole)) < 1


@pytest.mark.parametrize(
    ("total", "inputs", "shares"),
    [
        (0, ["a", "b"], [0, 0]),
        (3, ["a", "b"], [2, 1]),
        (10, ["a", "bb", "cccccc"], [1, 2, 7]),
        (10, ["é", "日", "aaaaa"], [2, 3, 5]),
        (8, [(1, 2, 3), "abcd"], [6, 2]),
        (5, ["", "abc"], [0, 5]),
        (7, ["x"], [7]),
    ],
)
def test_a_total_is_shared_by_size(total, inputs, shares):
    """Shares follow bytes, four for a token; what is left goes to the largest remainders first."""
    assert tokens.apportion(total, inputs) == shares


def test_empty_inputs_share_a_total_too():
    """A total is never lost, though there is no size to share it by."""
    assert sum(tokens.apportion(10, ["", ""])) == 10
