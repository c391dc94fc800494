"""One process at a time works on a migration; one that was left may still be keeping its answers.

The lock is on a file beside the journal, which says FINISHING from when its holder begins nothing
new any more. Whoever comes then waits; while somebody works, others are refused.
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import typer
from embedding_proxy.cache import private_files
from embedding_proxy.cache.disk.lock import WriterLock
from embedding_proxy.index.migrate import MigrationRefused
from embedding_proxy.index.migration.journal import JournalError, MigrationState

FINISHING = b"finishing\n"
NOTICED_S = 0.5
"""In which a process that was left has said so."""
_POLL_S = 0.05


async def _nothing() -> None:
    """End at once."""


async def wait_for_others(*journals: MigrationState) -> None:
    """Wait while processes that were left keep what they have asked for. Raises JournalError."""
    loop = asyncio.get_running_loop()
    noticed, told = loop.time() + NOTICED_S, False
    for path in map(_path, journals):
        while path.exists() and not _free(path):
            if path.read_bytes() == FINISHING:
                if not told:
                    typer.echo("waiting for the last answers of a run that was stopped", err=True)
                told = True
            elif loop.time() >= noticed:
                break
            await asyncio.sleep(_POLL_S)


@asynccontextmanager
async def held(
    journal: MigrationState, finish: Callable[[], Awaitable[None]] = _nothing
) -> AsyncIterator[None]:
    """Hold a migration, and `finish` before it is let go. Raises MigrationRefused, JournalError."""
    path = _path(journal)
    lock = _open(path)
    try:
        lock.__enter__()
    except TimeoutError as error:
        lock.close()
        raise MigrationRefused(f"another process works on this migration ({path})") from error
    try:
        _say(path, b"")
        yield
    finally:
        _say(path, FINISHING)
        try:
            await finish()
        finally:
            lock.__exit__(None, None, None)
            lock.close()


def _path(journal: MigrationState) -> Path:
    return journal.path.with_suffix(".lock")


def _free(path: Path) -> bool:
    lock = _open(path)
    try:
        with lock:
            return True
    except TimeoutError:
        return False
    finally:
        lock.close()


def _open(path: Path) -> WriterLock:
    try:
        private_files.make_folder(path.parent)
        return WriterLock(path, 0)
    except OSError as error:
        raise JournalError(f"{path}: {error.strerror or error}") from error


def _say(path: Path, what: bytes) -> None:
    # On a disk that is full, others are refused instead of let wait.
    with contextlib.suppress(OSError), open(path, "wb", opener=private_files.opener) as file:
        file.write(what)
