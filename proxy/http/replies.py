"""Replies that were given before, to requests that come again byte for byte.

What is the same in every byte, its key included, was let in, understood and answered before, and
would be again: only whether the answer still holds is asked each time. A request is known by a
digest (SHA-256 behind a secret of this process), so that no text and no key is kept here.
"""

import hashlib
import secrets
from collections.abc import Callable
from typing import NamedTuple

from .pool import Pool

# What a reply takes besides its bytes: digest, tuples, what counts it, and its place in the map.
# And what each of its inputs takes: an address, a digest, a number, and their places.
_OVERHEAD = 1000
_A_INPUT = 200
LONGEST_REQUEST = 1 << 16
"""Bytes; longer ones are not looked up."""
LONGEST_REPLY = 1 << 18
"""Bytes in all; longer ones are not kept."""


class Reply(NamedTuple):
    """A reply, but for what each has of its own: the time, and an id."""

    head: bytes
    """From the status line on; each line ends with CRLF."""
    body: bytes
    again: Callable[[], bool] | None
    """Tells whether the reply still holds, and if it does, counts it (see `cache.repeat`).

    None for one that holds this once."""
    inputs: int = 1


class Replies:
    """A map of at most `limit` bytes, least recently used out first. For one thread."""

    def __init__(self, limit: int, *, is_enabled: bool = True) -> None:
        """`is_enabled` is `server.fast_path`: whether replies may be given again at all."""
        self.is_enabled = is_enabled
        # A whole block, which is hashed once. Nobody is shown a digest, to lengthen its request.
        self._begun = hashlib.sha256(secrets.token_bytes(64))
        self.pool = Pool(limit)
        """Where they are kept, with whatever else was rendered."""

    def digest(self, request: bytes) -> bytes:
        """Return what a request is known by; `request` is all of it, head and body."""
        digest = self.begin()
        digest.update(request)
        return digest.digest()

    def begin(self) -> "hashlib._Hash":
        """Return a digest of nothing yet, for a request that is taken in piece by piece."""
        return self._begun.copy()

    def find(self, digest: bytes) -> Reply | None:
        """Return the reply to give, already counted; None if the request has to be answered."""
        reply: Reply | None = self.pool.get(digest)
        if reply is not None and not (reply.again and reply.again()):
            self.pool.drop(digest)
            return None
        return reply

    def keep(self, digest: bytes, reply: Reply) -> None:
        """Keep a reply, unless it is long, or holds just once."""
        if reply.again is None:
            return
        size = len(reply.head) + len(reply.body) + _A_INPUT * reply.inputs + _OVERHEAD
        if size <= LONGEST_REPLY:
            self.pool.keep(digest, reply, size)
