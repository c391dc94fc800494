"""Counts tokens, and turns token arrays into the text they stand for.

The only importer of splintr, whose wheel carries the cl100k vocabulary: nothing is downloaded. The
vocabulary (about 20 MB) is loaded at first use, which takes some 50 ms.
"""

from collections.abc import Sequence
from functools import cache

from splintr import AnyTokenizer, Tokenizer

from .base import Input

CL100K = "cl100k_base"
"""The encoding of OpenAI's embedding models, and of the token arrays that clients send."""


@cache
def _tokenizer(encoding: str) -> AnyTokenizer:
    return Tokenizer.from_pretrained(encoding)


def count(inputs: Sequence[Input], encoding: str = CL100K) -> list[int]:
    """Return the exact number of tokens of each input; special tokens in a text are plain text.

    >>> count(["hello world", (15339, 1917), "<|endoftext|>"])
    [2, 2, 7]
    """
    encode = _tokenizer(encoding).encode_ordinary
    return [len(encode(item)) if isinstance(item, str) else len(item) for item in inputs]


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
    return text if text and tuple(tokenizer.encode_ordinary(text)) == item else item


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
    if not any(sizes):
        sizes = [1] * len(sizes)
    whole = sum(sizes) or 1
    parts = [total * size // whole for size in sizes]
    by_remainder = sorted(range(len(sizes)), key=lambda i: -(total * sizes[i] % whole))
    for i in by_remainder[: total - sum(parts)]:
        parts[i] += 1
    return parts
