"""Cache keys, and the partition that an entry belongs to. Pure.

A key is made of an embedding space, a namespace and an input. It has an address, under which every
tier stores the record, and a check digest, which proves that a record is of this input.

The only importer of xxhash. Everything that decides a vector's numbers is hashed, each part typed
and length-prefixed, so that two different lists of parts never give the same bytes; nothing else is
hashed. The input's bytes are taken as they are: no trimming, no case folding, no Unicode
normalisation.

XXH3-128 finds a record quickly but proves nothing: anyone can make texts of equal hash. The check
digest, BLAKE2b keyed with the namespace's secret over the same parts, is the proof.
"""

import asyncio
import hashlib
import struct
from bisect import bisect_left
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from typing import NamedTuple, overload

import xxhash
from embedding_proxy.providers.base import Input, Space
from embedding_proxy.providers.errors import InvalidRequest

FORMAT = 1
"""Version of the bytes hashed here and of those in `record`; a change of either bumps it."""

MAX_KEPT_PARAMETERS = 4096
"""A keyring is kept for the next request if its parameters have at most so many bytes."""

# About a millisecond of work: so many inputs, or characters and ids in all.
_MANY = 256
_LONG = 1 << 17

_LENGTH = struct.Struct("<Q").pack
_TEXT = b"s"
_TOKENS = b"t"

RESERVED_NAMESPACES = "embedding-proxy/"
"""Prefix of the proxy's own namespaces; no client has one of these."""
OTHER_NAMESPACE = f"{RESERVED_NAMESPACES}other"
"""The namespace under which entries and sums beyond a bound are stored and counted together."""
OTHER = "other"
"""Stands for all further names that clients or upstreams chose."""


class Partition(NamedTuple):
    """The entries of one namespace in one space: what is counted, purged and exported together."""

    namespace: str
    space: str
    """The space's label (`Space.label`)."""
    dimensions: int


UNKNOWN = Partition("", "(not known)", 0)
"""The partition of entries and sums whose own one is not known."""


class Row(NamedTuple):
    """One entry as a store or an archive holds it."""

    address: bytes
    """16 bytes, see `key`."""
    record: bytes
    """See `record`."""
    stored: float
    """When it was bought, in seconds since 1970."""
    partition: Partition | None
    """None if it is not known: an early version wrote the row, or it was salvaged without it."""


class Key(NamedTuple):
    """The address of one entry, and the check digest of its input."""

    address: bytes
    """XXH3-128 of the parts, 16 bytes big-endian: where the record lies, in every tier."""
    digest: bytes
    """BLAKE2b-128 of the same parts, keyed: stored in the record, compared on every read."""


class Keys(Sequence[Key]):
    """The keys of several inputs, in two lists: most lookups need no `Key` object."""

    __slots__ = ("addresses", "digests")

    def __init__(self, addresses: list[bytes], digests: list[bytes]) -> None:
        self.addresses = addresses
        self.digests = digests

    @classmethod
    def from_keys(cls, keys: Collection[Key]) -> "Keys":
        """Return a sequence of these keys."""
        addresses, digests = zip(*keys, strict=True) if keys else ((), ())
        return cls(list(addresses), list(digests))

    @overload
    def __getitem__(self, index: int) -> Key: ...
    @overload
    def __getitem__(self, index: slice) -> "Keys": ...
    def __getitem__(self, index: int | slice) -> "Key | Keys":
        if isinstance(index, slice):
            return Keys(self.addresses[index], self.digests[index])
        return Key(self.addresses[index], self.digests[index])

    def __iter__(self) -> Iterator[Key]:
        return map(Key, self.addresses, self.digests)

    def __len__(self) -> int:
        return len(self.addresses)


@dataclass(frozen=True, slots=True)
class Namespace:
    """A tenant's isolated part of the cache. The default one has an empty secret."""

    name: str = ""
    secret: bytes = b""
    """At most 64 bytes (BLAKE2b's key)."""


DEFAULT_NAMESPACE = Namespace()


class Keyring:
    """Makes the keys of one namespace and one space; their common parts are hashed once."""

    def __init__(self, space: Space, namespace: Namespace = DEFAULT_NAMESPACE) -> None:
        self.space = space
        self.partition = Partition(namespace.name, space.label, space.dimensions)
        """The partition of the entries."""
        parts = [part(b"v", struct.pack("<I", FORMAT)), part(b"n", namespace.name.encode())]
        parts.append(part(b"m", space.name.encode()))
        for name, value in space.parameters:
            parts += part(b"p", name.encode()), part(b"=", value)
        self._head = b"".join(parts)
        self._digest = hashlib.blake2b(self._head, digest_size=16, key=namespace.secret)

    def key(self, item: Input) -> Key:
        """Return the key of one input."""
        (key,) = self.keys_at_once((item,))
        return key

    async def keys(self, items: Sequence[Input]) -> Keys:
        """Return the keys of several inputs; long work yields to the event loop in between."""
        if len(items) <= _MANY and sum(map(len, items)) <= _LONG:
            return self.keys_at_once(items)
        addresses: list[bytes] = []
        digests: list[bytes] = []
        for some in _lots(items):
            part = self.keys_at_once(some)
            addresses += part.addresses
            digests += part.digests
            await asyncio.sleep(0)
        return Keys(addresses, digests)

    def keys_at_once(self, items: Sequence[Input]) -> Keys:
        """Return the keys of a few inputs. Raises InvalidRequest."""
        head, new_digest = self._head, self._digest.copy
        addresses: list[bytes] = []
        digests: list[bytes] = []
        for item in items:
            tail = input_part(item)
            digest = new_digest()
            digest.update(tail)
            addresses.append(xxhash.xxh3_128_digest(head + tail))
            digests.append(digest.digest())
        return Keys(addresses, digests)


def keyring(space: Space, namespace: Namespace = DEFAULT_NAMESPACE) -> Keyring:
    """Return the keyring of a namespace and a space, from a cache unless its parameters are large.

    A client's parameters may be as long as a request.
    """
    if space.parameters and sum(len(n) + len(v) for n, v in space.parameters) > MAX_KEPT_PARAMETERS:
        return Keyring(space, namespace)
    return _kept_keyring(space, namespace)


_kept_keyring = lru_cache(maxsize=1024)(Keyring)


def _lots(items: Sequence[Input]) -> Iterator[Sequence[Input]]:
    """Yield the items in lots of about a millisecond's work each, in their order."""
    ends = list(accumulate(map(len, items)))
    start = before = 0
    while start < len(items):
        end = min(bisect_left(ends, before + _LONG, start) + 1, start + _MANY, len(items))
        yield items[start:end]
        start, before = end, ends[end - 1]


def part(tag: bytes, data: bytes) -> bytes:
    r"""Return one part: what it is (1 byte), how long it is (8 bytes), and itself.

    >>> part(b"s", b"US")
    b's\x02\x00\x00\x00\x00\x00\x00\x00US'
    """
    return tag + _LENGTH(len(data)) + data


def input_part(item: Input) -> bytes:
    """Return the part for an input: a text's UTF-8 bytes, or token ids of 4 bytes each.

    Raises InvalidRequest for what has no such bytes.
    """
    try:
        if isinstance(item, str):
            return part(_TEXT, item.encode())
        if not isinstance(item, tuple | list):  # Bytes are integers, too.
            raise InvalidRequest("An input is no text and no token array.", param="input")
        return part(_TOKENS, struct.pack(f"<{len(item)}I", *item))
    except UnicodeEncodeError as error:
        message = "A text holds half of a surrogate pair, which is no Unicode."
        raise InvalidRequest(message, param="input") from error
    except struct.error as error:
        raise InvalidRequest("A token is no token of any model.", param="input") from error


def checksum(data: bytes | memoryview) -> bytes:
    """Return XXH3-64 of `data`, 8 bytes: finds damage, not malice."""
    return xxhash.xxh3_64_digest(data)
