"""The process of a migration, which outlives its command, and the lock that keeps others out.

A killed process cannot keep an answer that comes later. So a second process does the work, in a
session of its own, and the first one waits for it. When the first one ends, however it ends, the
pipe between them closes. Then the second begins nothing new, keeps what it has paid for, prints
nothing more, and ends.

One process at a time works on a migration. The lock is on a file beside the journal, which says
FINISHING as soon as its holder begins nothing new any more. Another process waits then; while the
holder works, others are refused.
"""

import asyncio
import contextlib
import os
import signal
import sys
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import asynccontextmanager
from pathlib import Path
from types import FrameType
from typing import Any, TypeVar

import typer
from embedding_proxy.cache import private_files
from embedding_proxy.cache.disk.lock import WriterLock
from embedding_proxy.index.migration.runner import MigrationRefused
from embedding_proxy.index.migration.state import MigrationState, MigrationStateError

from .output import WorkFailed

T = TypeVar("T")
_TO_STOP = (
    (signal.SIGINT, signal.SIGTERM)
    if sys.platform == "win32"
    else (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
)
FINISHING = b"finishing\n"
NOTICED_S = 0.5
"""The time in which a process without a parent has written its note."""
_POLL_S = 0.05


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
    read_end, write_end = os.pipe()
    signal.pthread_sigmask(signal.SIG_BLOCK, _TO_STOP)
    worker = os.fork()
    if worker == 0:
        os.setsid()
        os.close(write_end)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _TO_STOP)
        return read_end
    os.close(read_end)
    code, stop_signal = _wait(worker, write_end)
    if stop_signal is not None:
        sys.exit(128 + stop_signal)
    if code < 0:
        raise WorkFailed(f"killed by {signal.Signals(-code).name}; run it again to go on")
    sys.exit(code)


def _wait(worker: int, life: int) -> tuple[int, int | None]:
    """Return the exit code of the worker, and the signal that was passed on to it."""
    stop_signal: int | None = None

    def stop(number: int, _: FrameType | None) -> None:
        nonlocal stop_signal
        if stop_signal is not None:
            os.kill(worker, signal.SIGKILL)
            return
        stop_signal = number
        os.close(life)
        typer.echo(
            "saving the replies of calls in progress; interrupt again to lose them", err=True
        )

    for number in _TO_STOP:
        signal.signal(number, stop)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _TO_STOP)
    _, status = os.waitpid(worker, 0)
    return os.waitstatus_to_exitcode(status), stop_signal


@asynccontextmanager
async def cancel_when_left(life: int | None) -> AsyncIterator[None]:
    """Cancel the current task, and print nothing more, when the first process has ended."""
    task = asyncio.current_task()
    if life is None or task is None:
        yield
        return
    loop = asyncio.get_running_loop()

    def cancel() -> None:
        loop.remove_reader(life)
        # The reader of our output may be gone too.
        nowhere = os.open(os.devnull, os.O_WRONLY)
        for number in (sys.stdout.fileno(), sys.stderr.fileno()):
            os.dup2(nowhere, number)
        os.close(nowhere)
        task.cancel()

    loop.add_reader(life, cancel)
    try:
        yield
    finally:
        loop.remove_reader(life)


class ShieldedTask:
    """Work that runs to its end even if its caller is cancelled."""

    def __init__(self) -> None:
        self._begun: set[asyncio.Future[Any]] = set()

    async def __call__(self, work: Coroutine[Any, Any, T]) -> T:
        """Return the result of the work."""
        task = asyncio.ensure_future(work)
        self._begun.add(task)
        task.add_done_callback(self._begun.discard)
        return await asyncio.shield(task)

    async def wait(self, limit_s: float) -> None:
        """Wait until no work is in progress, within a limit; then cancel the rest."""
        tasks = set(self._begun)
        if tasks:
            _, late = await asyncio.wait(tasks, timeout=limit_s)
            for task in late:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)


async def _do_nothing() -> None:
    """Return at once."""


async def wait_for_others(*journals: MigrationState) -> None:
    """Wait while processes without a parent store the replies of their calls.

    Raises MigrationStateError.
    """
    loop = asyncio.get_running_loop()
    deadline, has_said = loop.time() + NOTICED_S, False
    for path in map(_lock_path, journals):
        while path.exists() and not _is_free(path):
            if path.read_bytes() == FINISHING:
                if not has_said:
                    typer.echo("waiting for the last answers of a run that was stopped", err=True)
                has_said = True
            elif loop.time() >= deadline:
                break
            await asyncio.sleep(_POLL_S)


@asynccontextmanager
async def hold_lock(
    journal: MigrationState, finish: Callable[[], Awaitable[None]] = _do_nothing
) -> AsyncIterator[None]:
    """Hold the lock of a migration; run `finish` before it is released.

    Raises MigrationRefused, MigrationStateError.
    """
    path = _lock_path(journal)
    lock = _open_lock(path)
    try:
        lock.__enter__()
    except TimeoutError as error:
        lock.close()
        raise MigrationRefused(f"another process works on this migration ({path})") from error
    try:
        _write_note(path, b"")
        yield
    finally:
        _write_note(path, FINISHING)
        try:
            await finish()
        finally:
            lock.__exit__(None, None, None)
            lock.close()


def _lock_path(journal: MigrationState) -> Path:
    return journal.path.with_suffix(".lock")


def _is_free(path: Path) -> bool:
    lock = _open_lock(path)
    try:
        with lock:
            return True
    except TimeoutError:
        return False
    finally:
        lock.close()


def _open_lock(path: Path) -> WriterLock:
    try:
        private_files.make_folder(path.parent)
        return WriterLock(path, 0)
    except OSError as error:
        raise MigrationStateError(f"{path}: {error.strerror or error}") from error


def _write_note(path: Path, what: bytes) -> None:
    # On a full disk other processes are refused instead of waiting.
    with contextlib.suppress(OSError), open(path, "wb", opener=private_files.opener) as file:
        file.write(what)
