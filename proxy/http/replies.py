"""Replies that were given before, to requests that come again byte for byte.

What is the same in every byte, its key included, was let in, understood and answered before, and
would be again: only whether the answer still holds is asked each time. A request is known by a
digest (BLAKE2b-128, keyed anew in each process), so that no text and no key is kept here.
"""

import hashlib
import secrets
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import NamedTuple

from providers.base import Vector

# What a reply takes besides its bytes and vectors: digest, tuples, what counts it, and its place in
# the map. And what a vector takes: its entry, and its address.
_OVERHEAD = 1000
_A_VECTOR = 260
LONGEST_REQUEST = 1 << 16
"""Bytes; longer ones are not looked up."""
LONGEST_REPLY = 1 << 18
"""Bytes, vectors included; longer ones are not kept."""


class Reply(NamedTuple):
    """A reply, but for what each has of its own: the time, and an id."""

    head: bytes
    """From the status line on; each line ends with CRLF."""
    body: bytes
    again: Callable[[], bool]
    """Tells whether the reply still holds, and if it does, counts it (see `cache.repeat`)."""
    vectors: Sequence[Vector] = ()
    """Those that `again` keeps alive, though the cache may have dropped them."""


class Replies:
    """A map of at most `limit` bytes, least recently used out first. For one thread."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._secret = secrets.token_bytes(32)
        self._replies: OrderedDict[bytes, Reply] = OrderedDict()
        self._size = 0

    @property
    def size(self) -> int:
        """Bytes in use."""
        return self._size

    def __len__(self) -> int:
        return len(self._replies)

    def digest(self, request: bytes) -> bytes:
        """Return what a request is known by; `request` is all of it, head and body."""
        return hashlib.blake2b(request, digest_size=16, key=self._secret).digest()

    def find(self, digest: bytes) -> Reply | None:
        """Return the reply to give, already counted; None if the request has to be answered."""
        reply = self._replies.get(digest)
        if reply is None:
            return None
        if not reply.again():
            self._drop(digest)
            return None
        self._replies.move_to_end(digest)
        return reply

    def keep(self, digest: bytes, reply: Reply) -> None:
        """Keep a reply, and drop the least recently used ones for it as needed."""
        size = _size(reply)
        if size > min(self._limit, LONGEST_REPLY):
            return
        if digest in self._replies:
            self._drop(digest)
        self._replies[digest] = reply
        self._size += size
        while self._size > self._limit:
            self._drop(next(iter(self._replies)))

    def _drop(self, digest: bytes) -> None:
        self._size -= _size(self._replies.pop(digest))


def _size(reply: Reply) -> int:
    vectors = sum(map(len, reply.vectors)) + _A_VECTOR * len(reply.vectors)
    return len(reply.head) + len(reply.body) + vectors + _OVERHEAD
