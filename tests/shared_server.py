"""A real Redis for tests of what nodes share; they are skipped where there is none."""

import asyncio
import contextlib
import shutil
import subprocess
from collections.abc import AsyncIterator, Sequence
from typing import Any

import pytest
import redis.asyncio
import redis.exceptions
from embedding_proxy.cache.shared.address import parse
from embedding_proxy.cache.shared.client import (
    UNAVAILABLE,
    Answer,
    Command,
    RedisClient,
    RedisOptions,
)

from tests.ports import own_port

BINARY = shutil.which("redis-server") or shutil.which("valkey-server")

needs_redis = pytest.mark.skipif(BINARY is None, reason="there is no redis-server here")


class SwitchedClient(RedisClient):
    """A client that waits long enough for a slow machine, and can be made unavailable."""

    def __init__(self, port: int) -> None:
        super().__init__(RedisOptions(parse(f"redis://127.0.0.1:{port}"), limit_s=20.0))
        self.is_off = False
        self.exchanges = 0

    async def exchange(
        self, commands: Sequence[Command], limit_s: float | None = None
    ) -> list[Answer]:
        """Return the replies; UNAVAILABLE for each while it is off."""
        self.exchanges += 1
        if self.is_off:
            return [UNAVAILABLE] * len(commands)
        return await super().exchange(commands, None if limit_s is None else 20.0)

    async def command(self, *words: bytes | str | float) -> Any:
        """Return the reply to one command."""
        (answer,) = await super().exchange([Command(None, words)])
        return answer


@contextlib.asynccontextmanager
async def redis_port() -> AsyncIterator[int]:
    """Give the port of a server of its own, which keeps nothing on disk."""
    port = own_port()
    arguments = ["--port", str(port), "--save", "", "--appendonly", "no", "--bind", "127.0.0.1"]
    server = subprocess.Popen(  # noqa: ASYNC220 - it runs beside the test
        [str(BINARY), *arguments], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        async with redis.asyncio.Redis(port=port) as probe:
            while True:
                with contextlib.suppress(redis.exceptions.ConnectionError):
                    await probe.ping()
                    break
                assert server.poll() is None, "redis-server ended"
                await asyncio.sleep(0.01)
        yield port
    finally:
        server.terminate()
        server.wait()


@contextlib.asynccontextmanager
async def clients(count: int) -> AsyncIterator[list[SwitchedClient]]:
    """Give clients of one server."""
    async with redis_port() as port, contextlib.AsyncExitStack() as stack:
        yield [await stack.enter_async_context(SwitchedClient(port)) for _ in range(count)]
