"""Counts tokens, cuts by them, and turns token arrays into the text they stand for.

The only importer of splintr, whose wheel carries the vocabularies: nothing is downloaded. A
vocabulary (about 20 MB) is loaded at first use, which takes some 50 ms.

splintr holds the interpreter's lock while it encodes, so a thread alone keeps nobody from waiting:
a long text is encoded in pieces, between which other threads get their turn.
"""

import asyncio
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from types import MappingProxyType

from splintr import AnyTokenizer, Tokenizer

from .base import Input

CL100K = "cl100k_base"
"""The encoding of OpenAI's embedding models, and of the token arrays that clients send."""

PIECE = 32_768
"""Characters that are encoded at a time, or a few more: some 2 ms of work."""

LONGEST_STRETCH = 1 << 20
"""Characters, say of one word, that are encoded at a time at most: some 0.2 s of work. These are no
fewer than 8,192 tokens of cl100k, of which none has more than 128 bytes."""

# Below this many characters in all, counting is quicker than handing it to a thread.
_COUNT_INLINE = 16_384

# Where the splitting patterns of both encodings always part a text, whatever stands around: behind
# a letter or a number, before white space or punctuation (not an apostrophe: "it's" is one word).
_SEAM = re.compile(r"(?<=[^\W_])(?=[\s!-&(-/:-@\[-`{-~、。，！？])")

_NONE: Mapping[str, int] = MappingProxyType({})


@cache
def _tokenizer(encoding: str) -> AnyTokenizer:
    return Tokenizer.from_pretrained(encoding)


def pieces(text: str) -> Iterator[str]:
    """Yield a text in pieces whose tokens, one after another, are those of the text.

    A stretch without a seam stays whole up to LONGEST_STRETCH; a longer one is parted nevertheless,
    which may make a token more of it.
    """
    start = 0
    while len(text) - start > PIECE:
        seam = _SEAM.search(text, start + PIECE, start + LONGEST_STRETCH)
        end = seam.start() if seam else start + LONGEST_STRETCH
        if end >= len(text):
            break
        yield text[start:end]
        start = end
    yield text[start:]


def bound(item: Input) -> int:
    """Return how many tokens an input has at most: no token is shorter than a byte.

    >>> bound("été"), bound((1, 2))
    (5, 2)
    """
    if not isinstance(item, str) or item.isascii():
        return len(item)
    # What is no Unicode is refused by the cache, which says so.
    return len(item.encode(errors="surrogatepass"))


def count(
    inputs: Sequence[Input], encoding: str = CL100K, known: Mapping[str, int] = _NONE
) -> list[int]:
    """Return the exact number of tokens of each input; special tokens in a text are plain text.

    `known` are texts that were counted before, in the same encoding.

    >>> count(["hello world", (15339, 1917), "<|endoftext|>"])
    [2, 2, 7]
    """
    encode = _tokenizer(encoding).encode_ordinary
    counts = []
    for item in inputs:
        if not isinstance(item, str):
            counts.append(len(item))
        elif (number := known.get(item)) is not None:
            counts.append(number)
        elif len(item) <= PIECE:
            counts.append(len(encode(item)))
        else:
            counts.append(sum(len(encode(piece)) for piece in pieces(item)))
    return counts


async def count_inputs(
    inputs: Sequence[Input], encoding: str, known: Mapping[str, int] = _NONE
) -> list[int]:
    """Count like `count`, in a thread if it takes long."""
    if sum(map(len, inputs)) <= _COUNT_INLINE:
        return count(inputs, encoding, known)
    return await asyncio.to_thread(count, inputs, encoding, known)


def count_short_texts(
    inputs: Sequence[Input], encoding: str | None, counts: dict[str, int]
) -> None:
    """Add the tokens of texts to `counts`, if the encoding is known and it does not take long."""
    texts = [item for item in inputs if isinstance(item, str)] if encoding is not None else []
    if encoding is not None and sum(map(len, texts)) <= _COUNT_INLINE:
        counts.update(zip(texts, count(texts, encoding, counts), strict=True))


async def count_charged(
    inputs: Sequence[Input], total: int | None, encoding: str | None, counts: Mapping[str, int]
) -> tuple[list[int], bool]:
    """Return the tokens of each input of a call, and whether they are exact.

    They are where the model's encoding is known; else the total that the upstream told is shared
    out, or, if it told none, cl100k gives an estimate.
    """
    if encoding is None and total is not None:
        return apportion(total, inputs), False
    return await count_inputs(inputs, encoding or CL100K, counts), encoding is not None


def cut(item: Input, max_tokens: int, encoding: str = CL100K) -> Input:
    """Return the first `max_tokens` tokens of an input, as a text if they stand for one.

    A text ends with the last character that is whole within them, and has at most so many tokens
    itself. One whose first character alone has more is returned as it is.

    >>> cut("one two three", 2), cut("one", 2), cut((100257, 15339, 1917), 2)
    ('one two', 'one', (100257, 15339))
    """
    if bound(item) <= max_tokens:
        return item
    if not isinstance(item, str):
        return as_text(item[:max_tokens], encoding)
    tokenizer = _tokenizer(encoding)
    text = item
    while len(ids := _first(tokenizer, text, max_tokens + 1)) > max_tokens:
        # What is cut off may change how the end is encoded, even into more tokens than before.
        text = tokenizer.decode_bytes(ids[:max_tokens]).decode(errors="ignore")
    return text or item


def _first(tokenizer: AnyTokenizer, text: str, enough: int) -> list[int]:
    """Return the first tokens of a text: at least `enough`, or all it has."""
    ids: list[int] = []
    for piece in pieces(text):
        ids += tokenizer.encode_ordinary(piece)
        if len(ids) >= enough:
            break
    return ids


def as_text(item: Input, encoding: str = CL100K) -> Input:
    """Return the text a token array stands for, where that is exact; else the array itself.

    Exact means: the bytes are valid UTF-8 and encode back to the same ids. LangChain's chunks may
    end inside a character, and special tokens have no plain text; those stay arrays.

    >>> as_text((15339, 1917)), as_text((100257,)), as_text("hello")
    ('hello world', (100257,), 'hello')
    """
    if isinstance(item, str):
        return item
    tokenizer = _tokenizer(encoding)
    try:
        text = tokenizer.decode_bytes(list(item)).decode()
    except (UnicodeDecodeError, ValueError, OverflowError):
        return item
    return text if text and tuple(_first(tokenizer, text, len(item) + 1)) == item else item


def apportion(total: int, inputs: Sequence[Input]) -> list[int]:
    """Share a batch's token total among its inputs by size, largest remainders first.

    The parts add up to `total`; used where a model's own tokenizer is not known.

    >>> apportion(10, ["a", "bb", "cccccc"])
    [1, 2, 7]
    """
    sizes = [len(item.encode()) if isinstance(item, str) else 4 * len(item) for item in inputs]
    return share(total, sizes)


def share(total: int, sizes: Sequence[int]) -> list[int]:
    """Divide a total in proportion to sizes, largest remainders first; equally if all are 0.

    >>> share(7, [1, 1, 5]), share(8, [1, 1, 5]), share(3, [0, 0])
    ([1, 1, 5], [1, 1, 6], [2, 1])
    """
    if len(sizes) == 1:
        return [total]
    if not any(sizes):
        sizes = [1] * len(sizes)
    whole = sum(sizes) or 1
    parts = [total * size // whole for size in sizes]
    by_remainder = sorted(range(len(sizes)), key=lambda i: -(total * sizes[i] % whole))
    for i in by_remainder[: total - sum(parts)]:
        parts[i] += 1
    return parts
