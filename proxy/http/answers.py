"""What bodies asked for that came before: answered again without being parsed or hashed anew.

For many inputs in one request, whose replies are too long to be kept (see `replies`): here it is
kept which entries answer it, and in which form. They are looked up each time.
"""

import asyncio
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from cache.ledger import Again
from providers.base import Vector
from proxy.wire import Form

from .caller import Caller
from .replies import Replies

SHORTEST = 1 << 10
"""Bytes; shorter bodies are parsed as quickly."""
# Of a body: some fraction of a millisecond's work.
_PIECE = 1 << 18
# What an answer takes for each of its inputs, and besides: an address, a digest, places in lists.
_A_INPUT = 120
_OVERHEAD = 1500


class Answer(NamedTuple):
    """How a request is answered, but for the vectors."""

    form: Form
    headers: Mapping[str, str]
    again: Again | None
    """None if the same request has to be asked anew."""


class Answers:
    """Answers by the digests of requests, kept in the pool of the replies."""

    def __init__(self, replies: Replies) -> None:
        self._replies = replies

    async def digest(
        self, body: bytes, caller: Caller, control: str, model: str | None
    ) -> bytes | None:
        """Return what a request is known by: all that decides its answer.

        None if the body is short, or replies are not given again.
        """
        if len(body) < SHORTEST or not self._replies.is_enabled:
            return None
        parts = [caller.namespace, caller.client, caller.api_key, control, model or ""]
        head = "".join(f"{len(part)}:{part}" for part in parts)
        digest = self._replies.begin()
        digest.update(head.encode(errors="surrogateescape"))
        rest = memoryview(body)
        while len(rest) > _PIECE:
            digest.update(rest[:_PIECE])
            rest = rest[_PIECE:]
            await asyncio.sleep(0)
        digest.update(rest)
        return digest.digest()

    async def find(self, digest: bytes | None) -> tuple[Answer, Sequence[Vector]] | None:
        """Return an answer and its vectors, already counted; None if it has to be asked for."""
        if digest is None:
            return None
        answer: Answer | None = self._replies.pool.get(("answer", digest))
        if answer is None or answer.again is None:
            return None
        vectors = await answer.again.vectors()
        if vectors is None:
            self._replies.pool.drop(("answer", digest))
            return None
        return answer, vectors

    def keep(self, digest: bytes | None, answer: Answer, inputs: int) -> None:
        """Keep an answer that can be given again."""
        if digest is not None and answer.again is not None:
            self._replies.pool.keep(("answer", digest), answer, _OVERHEAD + _A_INPUT * inputs)
