"""Work that outlives the command that began it, by as long as it takes to keep what is paid for.

Nothing a process does can keep an answer that comes after it was killed. So the work is done by a
second process, in a session of its own. The first one waits for it; when it ends before, however
it ends, the pipe between them does, too: then the second begins nothing new, sees through what it
has begun, says nothing more, and ends.
"""

import asyncio
import os
import signal
import sys
import threading
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from types import FrameType
from typing import Any, TypeVar

import typer

from .common import WorkFailed

T = TypeVar("T")

_TO_STOP = (
    (signal.SIGINT, signal.SIGTERM)
    if sys.platform == "win32"
    else (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
)


def run_detached() -> int | None:
    """Return in the second process: the end of the pipe that says when it is left.

    The first one waits here, passes signals on, and exits as the second does; 128 + its number
    after a signal. A second signal ends the second process at once. Where there is no fork, or
    signals go to another thread, there is one process, and None is returned. Raises WorkFailed if
    the second process was killed.
    """
    if sys.platform == "win32" or threading.current_thread() is not threading.main_thread():
        return None
    sys.stdout.flush()
    sys.stderr.flush()
    here, there = os.pipe()
    signal.pthread_sigmask(signal.SIG_BLOCK, _TO_STOP)
    worker = os.fork()
    if worker == 0:
        os.setsid()
        os.close(there)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _TO_STOP)
        return here
    os.close(here)
    code, told = _wait(worker, there)
    if told is not None:
        sys.exit(128 + told)
    if code < 0:
        raise WorkFailed(f"killed by {signal.Signals(-code).name}; run it again to go on")
    sys.exit(code)


def _wait(worker: int, life: int) -> tuple[int, int | None]:
    """Return how the worker ended, and the signal that was passed on to it."""
    told: int | None = None

    def stop(number: int, _: FrameType | None) -> None:
        nonlocal told
        if told is not None:
            os.kill(worker, signal.SIGKILL)
            return
        told = number
        os.close(life)
        typer.echo("keeping what has been asked for; once more to lose it", err=True)

    for number in _TO_STOP:
        signal.signal(number, stop)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _TO_STOP)
    _, status = os.waitpid(worker, 0)
    return os.waitstatus_to_exitcode(status), told


@asynccontextmanager
async def until_left(life: int | None) -> AsyncIterator[None]:
    """Cancel the current task, and say nothing from then on, when the first process has ended."""
    task = asyncio.current_task()
    if life is None or task is None:
        yield
        return
    loop = asyncio.get_running_loop()

    def left() -> None:
        loop.remove_reader(life)
        # Whoever read what we print may be gone as well.
        nowhere = os.open(os.devnull, os.O_WRONLY)
        for number in (sys.stdout.fileno(), sys.stderr.fileno()):
            os.dup2(nowhere, number)
        os.close(nowhere)
        task.cancel()

    loop.add_reader(life, left)
    try:
        yield
    finally:
        loop.remove_reader(life)


class ShieldedTask:
    """Work that goes on to its end though whoever waits for it is called off."""

    def __init__(self) -> None:
        self._begun: set[asyncio.Future[Any]] = set()

    async def __call__(self, work: Coroutine[Any, Any, T]) -> T:
        """Return what the work gives."""
        task = asyncio.ensure_future(work)
        self._begun.add(task)
        task.add_done_callback(self._begun.discard)
        return await asyncio.shield(task)

    async def over(self, limit_s: float) -> None:
        """Wait until nothing is under way, for so long; then call off what is left."""
        left = set(self._begun)
        if left:
            _, late = await asyncio.wait(left, timeout=limit_s)
            for task in late:
                task.cancel()
            await asyncio.gather(*left, return_exceptions=True)
