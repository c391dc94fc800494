"""Clients of a real Redis for tests of what nodes share."""

import contextlib
from collections.abc import AsyncIterator, Sequence
from typing import Any

from embedding_proxy.cache.shared.address import parse
from embedding_proxy.cache.shared.client import (
    UNAVAILABLE,
    Answer,
    Command,
    RedisClient,
    RedisOptions,
)

from tests.redis_server import redis_server


class SwitchedClient(RedisClient):
    """A client that waits long enough for a slow machine, and can be made unavailable."""

    def __init__(self, port: int) -> None:
        super().__init__(RedisOptions(parse(f"redis://127.0.0.1:{port}"), limit_s=20.0))
        self.is_off = False
        self.exchanges = 0
        self.fails = 0
        """Exchanges that are still to fail."""

    async def exchange(
        self, commands: Sequence[Command], limit_s: float | None = None
    ) -> list[Answer]:
        """Return the replies; UNAVAILABLE for each while it is off."""
        self.exchanges += 1
        if self.is_off or self.fails:
            self.fails = max(0, self.fails - 1)
            return [UNAVAILABLE] * len(commands)
        return await super().exchange(commands, None if limit_s is None else 20.0)

    async def command(self, *words: bytes | str | float) -> Any:
        """Return the reply to one command."""
        (answer,) = await super().exchange([Command(None, words)])
        return answer


@contextlib.asynccontextmanager
async def clients(count: int) -> AsyncIterator[list[SwitchedClient]]:
    """Give clients of one server."""
    with redis_server() as server:
        async with contextlib.AsyncExitStack() as stack:
            yield [
                await stack.enter_async_context(SwitchedClient(server.port)) for _ in range(count)
            ]
