"""Finds one vector for different inputs: a fault of some upstreams, and what some models may do.

A model may give one vector to different texts. Models fold case and accents, average words, and
know neither emoji nor every script. Many cut long texts without a word: the MiniLM family at 128 or
256 tokens, the BERT family at 512, text encoders of image models at 64 or 77. So two texts count as
different only if a plain ASCII word near the beginning of one, where every model still reads,
stands nowhere in the other.

Of a model whose tokenizer is known more is known: it has a token for every character of every
script, and the order of the tokens counts. Two texts of such a model count as different if their
first tokens stand for different characters. Case, white space, invisible characters and forms of
Unicode make no difference: a gateway before the model may change them.
"""

import re
import unicodedata
from collections.abc import Mapping, Sequence

from embedding_proxy.providers import tokens
from embedding_proxy.providers.base import Input, Space, Vector

_WORDS = re.compile(r"[a-z0-9]+")
_PIECES = re.compile(r"[A-Za-z]+|\s+|.", re.DOTALL)
_MAX_TOKENS = 60.0
"""Estimated tokens at the beginning of a text that every model reads.

Letters count half a token, so the true number is 120 at most, where each letter is one (base64,
hashes): still below the smallest cut of a text model, 128, with its two special tokens. In prose it
is about 150 characters and 30 tokens.
"""
_TOKENS_A_LETTER = 0.5
_TOKENS_A_SPACE = 1.0
"""Of a run of white space longer than one character; a single space costs nothing."""
_MAX_IDS = 48
"""Tokens of a token array that every model reads."""
_MAX_EXACT_TOKENS = 120
"""Tokens at the beginning of a text that every model whose tokenizer is known reads."""
_SEARCHED = 2048
"""Characters of the other text in which a word is looked for."""
_MAX_WORD = 64
"""Characters; models of the BERT family take any longer word for one and the same."""
_PREFIX = 64
"""Bytes by which two vectors are told apart at first."""


def exact_tokenizer(space: Space) -> str | None:
    """Return the encoding whose first tokens decide a space's vectors; None where that is unknown.

    Further fields of a request may let an upstream read less of a text, say its first token.
    """
    return None if space.parameters else space.tokenizer


def find_duplicate_vectors(
    inputs: Sequence[Input], vectors: Mapping[int, Vector], tokenizer: str | None = None
) -> list[list[int]]:
    """Return the groups of places that share one vector although their inputs differ.

    `vectors` holds the vectors by place. `tokenizer` is that of `exact_tokenizer`. Places come in
    ascending order. Which input of a group the vector belongs to, if to any, is not known.

    >>> find_duplicate_vectors(["yes", "no", "maybe"], {0: b"same", 1: b"same", 2: b"other"})
    [[0, 1]]
    >>> find_duplicate_vectors(["Yes", "yes!"], {0: b"same", 1: b"same"})
    []
    >>> find_duplicate_vectors(["猫", "狗"], {0: b"same", 1: b"same"}, "cl100k_base")
    [[0, 1]]
    """
    if len({vector[:_PREFIX] for vector in vectors.values()}) == len(vectors):
        return []
    groups: dict[Vector, list[int]] = {}
    for index in sorted(vectors):
        groups.setdefault(vectors[index], []).append(index)
    return [
        indices
        for indices in groups.values()
        if any(
            _are_different(inputs[indices[0]], inputs[index], tokenizer) for index in indices[1:]
        )
    ]


def _are_different(one: Input, other: Input, tokenizer: str | None) -> bool:
    """Tell whether no published model could take two inputs for the same."""
    if one == other:
        return False
    if isinstance(one, str) and isinstance(other, str):
        if tokenizer is not None:
            return _begin_differently(one, other, tokenizer)
        return _has_own_word(one, other) or _has_own_word(other, one)
    if isinstance(one, str) or isinstance(other, str):
        return True
    return not ({*one[:_MAX_IDS]} <= {*other} and {*other[:_MAX_IDS]} <= {*one})


def _begin_differently(one: str, other: str, tokenizer: str) -> bool:
    """Tell whether the first tokens of two texts stand for different characters."""
    if _normalized(one[:_SEARCHED]) == _normalized(other[:_SEARCHED]):
        return False
    heads = [
        str(tokens.cut(text[:_SEARCHED], _MAX_EXACT_TOKENS, tokenizer)) for text in (one, other)
    ]
    ends = [head == text for head, text in zip(heads, (one, other), strict=True)]
    first, second = map(_normalized, heads)
    # Where white space differs, as many tokens hold more characters of one text than of the other.
    if len(first) <= len(second):
        return not second.startswith(first) or (ends[0] and first != second)
    return not first.startswith(second) or ends[1]


def _normalized(text: str) -> str:
    """Return a text without case, forms of Unicode, white space, and what is invisible."""
    folded = unicodedata.normalize("NFKD", text.casefold())
    return "".join(sign for sign in folded if sign.isprintable() and not sign.isspace())


def _has_own_word(text: str, other: str) -> bool:
    """Tell whether a word at the beginning of a text stands nowhere in the other."""
    plain = _folded(text[:_SEARCHED])
    end = len(_folded(text[: _length_read(text)]))
    words = set(_WORDS.findall(_folded(other[:_SEARCHED])))
    for match in _WORDS.finditer(plain):
        if match.start() >= end:
            break
        word = match[0]
        if len(word) > _MAX_WORD or word in words:
            continue
        # Of a word that is read in part, only that part is known to tell.
        part = plain[match.start() : min(match.end(), end)]
        if part == word or not any(another.startswith(part) for another in words):
            return True
    return False


def _length_read(text: str) -> int:
    """Return how many characters at the beginning of a text every model reads."""
    tokens = 0.0
    for match in _PIECES.finditer(text, 0, _SEARCHED):
        piece = match[0]
        if piece.isspace():
            tokens += _TOKENS_A_SPACE if len(piece) > 1 else 0.0
        elif piece.isascii() and piece.isalpha():
            room = int((_MAX_TOKENS - tokens) / _TOKENS_A_LETTER)
            if len(piece) > room:
                return match.start() + room
            tokens += len(piece) * _TOKENS_A_LETTER
        else:
            # No token is shorter than a byte.
            tokens += len(piece.encode(errors="surrogatepass"))
        if tokens > _MAX_TOKENS:
            return match.start()
    return min(len(text), _SEARCHED)


def _folded(text: str) -> str:
    """Return a text without case, accents, and what is not ASCII."""
    return unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode().lower()
