"""Work that goes on though whoever began it may be gone."""

import asyncio
from collections.abc import Coroutine
from typing import Any


class Tasks:
    """Tasks that end by themselves, or when they are closed."""

    def __init__(self) -> None:
        self._tasks: set[asyncio.Task[None]] = set()

    def start(self, work: Coroutine[Any, Any, None]) -> None:
        """Start a task, and keep it until it ends."""
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def close(self) -> None:
        """Cancel what is under way, and wait until it has ended."""
        while tasks := list(self._tasks):
            # A task that is cancelled before its first step never runs its own cleaning up.
            await asyncio.sleep(0)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
