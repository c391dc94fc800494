"""Counting against known counts; token arrays become text only where that loses nothing."""

import json
from fractions import Fraction
from types import SimpleNamespace

import pytest
from embedding_proxy.providers import tokens
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st

from tests.providers import many_texts

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


TEXTS = many_texts.texts()
BY_TIKTOKEN = json.loads((many_texts.DATA / "tiktoken_counts.json").read_text(encoding="utf-8"))


def test_the_texts_are_those_that_tiktoken_counted():
    """The texts made here are those of which the counts were stored, and no two are the same."""
    assert len(set(TEXTS)) == many_texts.COUNT == 3000
    assert many_texts.digest(TEXTS) == BY_TIKTOKEN["digest"]


@pytest.mark.parametrize("piece", [tokens.PIECE, 8])
@pytest.mark.parametrize("encoding", many_texts.ENCODINGS)
def test_counts_are_tiktokens(encoding, piece, monkeypatch):
    """On 3,000 texts of every script counts equal tiktoken's, in pieces too (see many_texts)."""
    monkeypatch.setattr(tokens, "PIECE", piece)
    assert tokens.count(TEXTS, encoding) == BY_TIKTOKEN[encoding]


@pytest.mark.parametrize("encoding", many_texts.ENCODINGS)
def test_arrays_of_texts_of_every_script_are_those_texts(encoding):
    """What a client encodes with the model's tokenizer is decoded with it, for every script."""
    encode = tokens._tokenizer(encoding).encode_ordinary
    arrays = [tuple(encode(text)) for text in TEXTS[:1000]]
    assert [tokens.as_text(item, encoding) for item in arrays] == TEXTS[:1000]


def test_an_array_is_decoded_by_the_encoding_it_is_in():
    """One array stands for two texts in two encodings; it is never taken for the other's."""
    array = (24912, 2375)
    assert tokens.as_text(array, "o200k_base") == "hello world"
    assert tokens.as_text(array) != "hello world"


@pytest.mark.parametrize("item", [(199_999,), (200_018, 24912), (199_998,), (200_019,)])
def test_special_tokens_of_another_encoding_stay_too(item):
    """What is no plain text in o200k is left alone, as in cl100k."""
    assert tokens.as_text(item, "o200k_base") is item


TELLING = "aZé日가ſ0١½' \n\r\t\u00a0\u3000.,/-_!、。’👩\u200d\u0301"
ALPHABET = st.sampled_from(TELLING) | st.characters(codec="utf-8")


@given(st.text(ALPHABET, max_size=80), st.sampled_from(list(many_texts.ENCODINGS)))
@example("a\x1cb c\u0085d", "cl100k_base")
@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_pieces_are_parted_where_tokens_are(monkeypatch, text, encoding):
    """The tokens of the pieces, one after another, are the tokens of the text."""
    monkeypatch.setattr(tokens, "PIECE", 3)
    encode = tokens._tokenizer(encoding).encode_ordinary
    pieces = list(tokens.pieces(text))
    assert "".join(pieces) == text
    assert [id_ for piece in pieces for id_ in encode(piece)] == encode(text)


def test_a_long_text_comes_in_pieces():
    """No piece of prose is much longer than it may be; a word without an end stays whole."""
    pieces = list(tokens.pieces("some words, and more. " * 10_000))
    assert len(pieces) > 5
    assert max(map(len, pieces)) < tokens.PIECE + 10
    assert list(tokens.pieces("a" * 100_000)) == ["a" * 100_000]


@pytest.mark.parametrize("length", [1 << 20, (1 << 20) + 1, 3 << 20])
def test_no_word_is_encoded_for_ever(length):
    """A word of millions of characters comes in pieces too, and none of it is lost."""
    pieces = list(tokens.pieces("a" * length))
    assert max(map(len, pieces)) <= tokens.LONGEST_STRETCH
    assert "".join(pieces) == "a" * length


@given(st.text(ALPHABET, min_size=1, max_size=60), st.integers(1, 20))
@example("👩‍👩‍👧" * 3, 5)
@settings(deadline=None)
def test_a_text_is_cut_to_whole_characters_of_its_first_tokens(text, most):
    """A cut text begins the text, has at most so many tokens, and ends with a whole character."""
    cut = tokens.cut(text, most)
    ids = ids_of(text)
    if len(ids) <= most:
        assert cut == text
        return
    head = tokens._tokenizer(tokens.CL100K).decode_bytes(ids[:most])
    if cut == text:
        # Not one character is whole: what is left would be no input.
        assert not head.decode(errors="ignore")
        return
    assert text.startswith(cut)
    assert cut
    assert tokens.count([cut])[0] <= most
    assert head.startswith(cut.encode())
    if tokens.count([head.decode(errors="ignore")])[0] <= most:
        assert len(head) - len(cut.encode()) < 4


@pytest.mark.parametrize(
    ("text", "encoding", "cut"),
    [("обраЀ", "cl100k_base", "об"), ("無しぁ", "cl100k_base", "無"), ("იუბ", "o200k_base", "ი")],
)
def test_a_cut_text_is_counted_again(text, encoding, cut):
    """One token may hold a broken character and whole ones that are two tokens without it."""
    broken = tokens._tokenizer(encoding).encode_ordinary(text)[:1]
    head = tokens._tokenizer(encoding).decode_bytes(broken).decode(errors="ignore")
    assert tokens.count([head], encoding) == [2]
    assert tokens.cut(text, 1, encoding) == cut
    assert tokens.count([cut], encoding) == [1]


def test_what_is_cut_off_is_not_encoded():
    """Cutting a long text costs what is kept, so that its length does no harm."""
    text = "some words, and more. " * 20_000
    seen = []
    real = tokens._tokenizer(tokens.CL100K)
    spy = SimpleNamespace(
        encode_ordinary=lambda piece: seen.append(len(piece)) or real.encode_ordinary(piece),
        decode_bytes=real.decode_bytes,
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokens, "_tokenizer", lambda _: spy)
        cut = tokens.cut(text, 6)
    assert cut == "some words, and more."
    assert sum(seen) < 2 * tokens.PIECE


@pytest.mark.parametrize(
    ("item", "most", "cut"),
    [
        ((15339, 1917, 83739), 2, "hello world"),
        ((15339, 1917), 2, (15339, 1917)),
        ((100257, 15339, 1917), 2, (100257, 15339)),
        ((33334, 45918, 243), 2, (33334, 45918)),  # ends inside a character
    ],
)
def test_an_array_is_cut_to_its_first_tokens(item, most, cut):
    """Of an array the first ids are kept, as a text if they stand for one."""
    assert tokens.cut(item, most) == cut


async def test_what_was_counted_is_not_counted_again(monkeypatch):
    """Known counts are taken as they are; only the other texts are encoded."""
    known = {"hello world": 41}
    assert tokens.count(["hello world", "hello", (1, 2)], known=known) == [41, 1, 2]
    long = "hello " * 9000
    assert await tokens.count_inputs([long, "hello"], tokens.CL100K, {long: 7}) == [7, 1]
