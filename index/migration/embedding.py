"""Embeds texts for a migration, with retries.

A rejection because of one text concerns that text alone; passing failures are waited out.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from embedding_proxy.providers.base import Space, Vector
from embedding_proxy.providers.errors import (
    DeadlineExceeded,
    InvalidRequest,
    NoProviderAvailable,
    TransientError,
)
from embedding_proxy.providers.failure_backoff import Backoff

log = logging.getLogger("embedding_proxy.migrate")

MAX_ATTEMPTS = 12
"""Attempts of one call; with the waits between them about eight minutes."""
MAX_WAIT_S = 60.0

Sleep = Callable[[float], Awaitable[None]]


class Look(Protocol):
    """The preview of one text: nothing is bought for it."""

    @property
    def key(self) -> bytes:
        """Equal for two texts only if one purchase serves both."""
        ...

    @property
    def tokens(self) -> int:
        """The tokens that it costs if it is bought."""
        ...

    @property
    def cached(self) -> bool:
        """Whether it need not be bought."""
        ...


class Model(Protocol):
    """The target model of a migration, behind our own cache and routes."""

    name: str
    requested_name: str
    """The name that the user gave, which may name a provider."""
    space: Space
    dimensions: int
    """The width of its vectors."""

    async def embed(
        self, texts: Sequence[str], *, anew: bool = False
    ) -> tuple[Sequence[Vector], int]:
        """Return a vector for each of 1…N texts, and the number bought; `anew` buys all.

        Raises EmbeddingError.
        """
        ...

    async def look(self, texts: Sequence[str]) -> Sequence[Look]:
        """Return the preview of each text; nothing is bought, and nothing changes."""
        ...


@dataclass(frozen=True, slots=True)
class Rejection:
    """The reason why a text has no vector."""

    why: str


@dataclass(slots=True)
class RetryingEmbedder:
    """Embeds with retries; counts the inputs that were bought."""

    model: Model
    sleep: Sleep = asyncio.sleep
    bought: int = 0
    answered: bool = False
    """Whether any text has got a vector. Until then a rejection may concern all texts."""

    async def embed(self, texts: Sequence[str], *, anew: bool = False) -> list[Vector | Rejection]:
        """Return a vector or a rejection for each text; `anew` does not read the cache.

        Raises EmbeddingError if no text can be embedded just now.
        """
        if not texts:
            return []
        try:
            vectors = await self._ask(texts, anew=anew)
        except InvalidRequest as error:
            return await self._without(texts, error, anew=anew)
        self.answered = True
        return list(vectors)

    async def _ask(self, texts: Sequence[str], *, anew: bool) -> Sequence[Vector]:
        backoff = Backoff(1, MAX_WAIT_S)
        for attempt in range(1, MAX_ATTEMPTS + 1):
            try:
                vectors, bought = await self.model.embed(texts, anew=anew)
            except (TransientError, NoProviderAvailable, DeadlineExceeded) as error:
                if attempt == MAX_ATTEMPTS:
                    raise
                wait_s = backoff.fail()
                wait_s = min(MAX_WAIT_S, getattr(error, "retry_after", None) or wait_s)
                log.warning("%s; trying again in %.0f s", error, wait_s)
                await self.sleep(wait_s)
            else:
                self.bought += bought
                return vectors
        raise AssertionError("the last try returns or raises")

    async def _without(
        self, texts: Sequence[str], error: InvalidRequest, *, anew: bool
    ) -> list[Vector | Rejection]:
        """Embed all but the rejected texts. What was bought before is in the cache."""
        if error.index is None and error.param is not None and not error.param.startswith("input"):
            raise error  # of the model or the width: no text is to blame
        if len(texts) == 1:
            if error.index is None and not self.answered:
                raise error
            return [Rejection(str(error))]
        if error.index is None:
            half = len(texts) // 2
            halves = texts[:half], texts[half:]
            return [answer for part in halves for answer in await self.embed(part, anew=anew)]
        index = error.index
        rest = await self.embed([*texts[:index], *texts[index + 1 :]], anew=anew)
        return [*rest[:index], Rejection(str(error)), *rest[index:]]
