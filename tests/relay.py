"""A TCP relay that delays what passes through it."""

import asyncio
import contextlib
from collections.abc import Callable
from typing import Self


class Relay:
    """Passes bytes on to a port of this machine, each read after `delay()` seconds."""

    def __init__(self, port: int, delay: Callable[[], float] = lambda: 0.0) -> None:
        self.delay = delay
        self._target = port
        self._tasks: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)
        await self._server.wait_closed()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        try:
            with contextlib.suppress(OSError):
                there, back = await asyncio.open_connection("127.0.0.1", self._target)
                both = self._pass(reader, back), self._pass(there, writer)
                try:
                    await asyncio.gather(*both)
                finally:
                    back.close()
        except asyncio.CancelledError:
            pass  # asyncio would report it
        finally:
            writer.close()

    async def _pass(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(1 << 16):
                delay = self.delay()
                if delay:
                    await asyncio.sleep(delay)
                writer.write(data)
                await writer.drain()
        writer.close()
