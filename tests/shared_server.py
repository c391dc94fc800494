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

from tests.ports import own_port

BINARY = shutil.which("redis-server") or shutil.which("valkey-server")

needs_redis = pytest.mark.skipif(BINARY is None, reason="there is no redis-server here")


class PlainClient:
    """An `Exchanger` on one connection, and a switch that makes the server unavailable."""

    def __init__(self, port: int) -> None:
        self.redis = redis.asyncio.Redis(port=port, socket_timeout=5)
        self.is_available = True
        self.exchanges = 0

    def key(self, name: str) -> bytes:
        """Return the key of that name."""
        return b"test:" + name.encode()

    async def exchange(self, commands: Sequence[Sequence[Any]]) -> list[Any] | None:
        """Return the replies; None while the server is unavailable."""
        self.exchanges += 1
        if not self.is_available:
            return None
        try:
            return [await self.redis.execute_command(*command) for command in commands]
        except (redis.exceptions.ConnectionError, redis.exceptions.TimeoutError):
            return None

    async def aclose(self) -> None:
        """Close the connection."""
        await self.redis.aclose()


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
async def clients(count: int) -> AsyncIterator[list[PlainClient]]:
    """Give clients of one server."""
    async with redis_port() as port, contextlib.AsyncExitStack() as stack:
        opened = [PlainClient(port) for _ in range(count)]
        for client in opened:
            stack.push_async_callback(client.aclose)
        yield opened
