"""Space + input -> the address under which a record lies, and the digest that proves it is ours.

The only importer of xxhash. Everything that decides a vector's numbers goes in, each part typed and
length-prefixed, so that no two different lists of parts give the same bytes; nothing else goes in.
The input's bytes are taken as they are: no trimming, no case folding, no Unicode normalisation.

xxHash finds a record quickly but proves nothing: texts with equal XXH3-128 can be made at will. The
check digest, BLAKE2b keyed with the namespace's secret over the same parts, is what is believed.
"""

import asyncio
import hashlib
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import xxhash

from providers.base import Input, InputRefused, Space

from .row import Partition

FORMAT = 1
"""Version of the bytes hashed here and of those in `record`; a change of either bumps it."""

# More inputs, or characters and ids in all, are more than a millisecond or two of work.
_MANY = 512
_LONG = 1 << 19

_TEXT = b"s"
_TOKENS = b"t"


class Key(NamedTuple):
    """The address of one entry, and the proof of what it is about."""

    address: bytes
    """XXH3-128 of the parts, 16 bytes big-endian: where the record lies, in every tier."""
    digest: bytes
    """BLAKE2b-128 of the same parts, keyed: stored in the record, compared on every read."""


@dataclass(frozen=True, slots=True)
class Namespace:
    """A tenant's part of the cache. The default one is open: its secret is empty."""

    name: str = ""
    secret: bytes = b""
    """At most 64 bytes (BLAKE2b's key)."""


DEFAULT_NAMESPACE = Namespace()


class Keyring:
    """Makes the keys of one namespace and one space; what they share is hashed once."""

    def __init__(self, space: Space, namespace: Namespace = DEFAULT_NAMESPACE) -> None:
        self.space = space
        self.partition = Partition(namespace.name, space.label, space.dimensions)
        """Where the entries belong: what is counted and purged together."""
        parts = [part(b"v", struct.pack("<I", FORMAT)), part(b"n", namespace.name.encode())]
        parts.append(part(b"m", space.name.encode()))
        for name, value in space.parameters:
            parts += part(b"p", name.encode()), part(b"=", value)
        head = b"".join(parts)
        self._address = xxhash.xxh3_128(head)
        self._digest = hashlib.blake2b(head, digest_size=16, key=namespace.secret)

    def key(self, item: Input) -> Key:
        """Return the key of one input."""
        tail = input_part(item)
        address, digest = self._address.copy(), self._digest.copy()
        address.update(tail)
        digest.update(tail)
        return Key(address.digest(), digest.digest())

    async def keys(self, items: Sequence[Input]) -> list[Key]:
        """Return the keys of several inputs; where they take long, others get their turn."""
        if len(items) <= _MANY and sum(map(len, items)) <= _LONG:
            return list(map(self.key, items))
        return await asyncio.to_thread(lambda: list(map(self.key, items)))


@lru_cache(maxsize=1024)
def keyring(space: Space, namespace: Namespace = DEFAULT_NAMESPACE) -> Keyring:
    """Return the keyring of a namespace and a space; those in use are kept."""
    return Keyring(space, namespace)


def part(tag: bytes, data: bytes) -> bytes:
    r"""Return one part: what it is (1 byte), how long it is (8 bytes), and itself.

    >>> part(b"s", b"US")
    b's\x02\x00\x00\x00\x00\x00\x00\x00US'
    """
    return tag + len(data).to_bytes(8, "little") + data


def input_part(item: Input) -> bytes:
    """Return the part for an input: a text's UTF-8 bytes, or token ids of 4 bytes each.

    Raises InputRefused for what has no such bytes.
    """
    try:
        if isinstance(item, str):
            return part(_TEXT, item.encode())
        return part(_TOKENS, struct.pack(f"<{len(item)}I", *item))
    except UnicodeEncodeError as error:
        message = "A text holds half of a surrogate pair, which is no Unicode."
        raise InputRefused(message, param="input") from error
    except struct.error as error:
        raise InputRefused("A token is no token of any model.", param="input") from error


def checksum(data: bytes | memoryview) -> bytes:
    """Return XXH3-64 of `data`, 8 bytes: finds damage, not malice."""
    return xxhash.xxh3_64_digest(data)
