"""The file of the disk tier and the two threads that work on it: opened, let go of, opened anew."""

import asyncio
import contextlib
import logging
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import TypeVar

from cache import private_files
from cache.key import FORMAT

from . import database, set_aside
from .database import FAILURES, Database, is_damage
from .lock import WriterLock
from .read_only import DamagedFile, Glance, ReadOnlyFile
from .schema import NewerLayout

log = logging.getLogger("embedding_proxy.store")

T = TypeVar("T")

# Mistakes of the configuration, not of the moment.
_NEVER = (NotADirectoryError, FileExistsError, IsADirectoryError, NewerLayout)


class StoreError(Exception):
    """The directory cannot be used as a store; the message says why."""


def lock_of(directory: Path) -> WriterLock:
    """Return the lock that all who write to the store in `directory` take. Raises OSError."""
    private_files.make_folder(directory)
    private_files.secure(directory)
    return WriterLock(directory / "writer.lock", database.BUSY_SECONDS)


def folder_of(directory: Path) -> Path:
    """Return the folder of this format version; another version's files are left alone."""
    return directory / f"v{FORMAT}"


def exists(directory: Path) -> bool:
    """Tell whether there is a store in `directory`."""
    path = folder_of(directory) / database.FILE_NAME
    return _is_there(path) or bool(set_aside.pending(path))


@contextlib.contextmanager
def opened(
    directory: Path, size_limit: int, pinned: Collection[str] = (), *, create: bool = False
) -> Iterator[Database]:
    """Give the file of a store for one thread's use, beside proxies that may be running.

    Raises StoreError if there is none and it is not to be made, or for what fails in it later.
    """
    folder = folder_of(directory)
    if not create and not exists(directory):
        raise StoreError(f"{folder}: there is no store yet; the proxy makes it at its first start")
    with contextlib.ExitStack() as stack:
        try:
            lock = stack.enter_context(contextlib.closing(lock_of(directory)))
            file = Database(folder, size_limit, lock, pinned)
        except FAILURES as error:
            raise _explained(folder, error) from error
        stack.callback(file.close)
        try:
            yield file
        except (*database.STORE_FAILURES, TimeoutError) as error:
            raise _explained(folder, error) from error


def _explained(folder: Path, error: BaseException) -> StoreError:
    return StoreError(f"{folder}: {str(error) or 'another process keeps it locked'}")


def is_damaged(error: StoreError) -> bool:
    """Tell whether the store cannot be used because its file is damaged."""
    return error.__cause__ is not None and is_damage(error.__cause__)


class Disk:
    """One thread reads, one writes. `file` is None while no file can be opened for writing.

    Then `read_only` may hold one that can be read. `glance` is at the same file as `file`, for the
    event loop's thread. `damaged` are files that were set aside, by whatever process, and are not
    salvaged yet: the latest first, for the reading thread.
    """

    def __init__(self, directory: Path, size_limit: int, pinned: Collection[str]) -> None:
        self.folder = folder_of(directory)
        self._size_limit = size_limit
        self._pinned = pinned
        self.file: Database | None = None
        self.glance: Glance | None = None
        self.read_only: ReadOnlyFile | None = None
        self.damaged: tuple[DamagedFile, ...] = ()
        self._lock: WriterLock | None = None
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="store-reader")
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="store-writer")
        self._opening = asyncio.Lock()

    async def open(self) -> None:
        """Open the file.

        Where a store was before, a failure leaves `file` at None: the moment may be bad, and the
        service goes on without. Raises StoreError where none can be made.
        """
        try:
            await self._open_file()
        except FAILURES as error:
            if isinstance(error, _NEVER) or not _is_there(self.folder / database.FILE_NAME):
                self.shut_down()
                raise StoreError(f"{self.folder}: {error}") from error
            log.error("the disk tier cannot be opened, nothing is kept: %s", error)  # noqa: TRY400 - a line
            with contextlib.suppress(*FAILURES):
                work = partial(ReadOnlyFile, self.folder / database.FILE_NAME)
                self.read_only = await self.read(work)
                await self._open_damaged()
                log.warning("the disk tier is read and not written")

    async def try_again(self) -> None:
        """Open the file if none is open. Raises FAILURES."""
        async with self._opening:
            if self.file is None:
                await self._open_file()
                await self._close_read_only()
                log.warning("the disk tier is open again")

    async def read(self, work: Callable[[], T]) -> T:
        """Return what `work` on the file returns, in the reading thread."""
        return await self._in(self._reader, work)

    async def write(self, work: Callable[[], T]) -> T:
        """Return what `work` on the file returns, in the writing thread."""
        return await self._in(self._writer, work)

    async def replace(self, old: Database) -> None:
        """Let go of a file that cannot be used any more, and open a fresh one. Raises FAILURES."""
        async with self._opening:
            if self.file is not old:
                return
            self.file = None
            old.let_go()
            await self._close(old)
            aside = await self._in(self._writer, old.set_aside)
            if aside is not None:
                log.error("%s is damaged: moved to %s, a new one is begun", old.path, aside)
            else:
                log.warning("%s was taken away or replaced: opened anew", old.path)
            await self._open_file()

    async def opened(self) -> None:
        """Wait while the file is being opened, or replaced."""
        async with self._opening:
            pass

    async def close_saved(self) -> None:
        """Close the damaged files of which all is saved."""
        async with self._opening:
            damaged = await self.read(self._still_damaged)
            closed, self.damaged = set(self.damaged) - set(damaged), damaged
            for one in closed:
                await self.read(one.close)

    async def close(self) -> None:
        """Close the file and end the threads."""
        async with self._opening:
            if self.file is not None:
                await self._close(self.file)
                self.file = None
            await self._close_read_only()
            for one in self.damaged:
                await self.read(one.close)
            self.damaged = ()
        self.shut_down()

    async def _open_file(self) -> None:
        self.file = file = await self._in(self._writer, self._open)
        # Without one, everything is read by the thread, whatever it was that failed.
        with contextlib.suppress(Exception):
            self.glance = await self.read(partial(Glance, file.path))
        await self._open_damaged()

    async def _open_damaged(self) -> None:
        path = self.folder / database.FILE_NAME
        known = {one.aside: one for one in self.damaged}
        for aside in await self.read(partial(set_aside.pending, path)):
            if aside not in known:
                known[aside] = await self.read(partial(DamagedFile, aside))
        self.damaged = tuple(sorted(known.values(), key=_number, reverse=True))

    def _still_damaged(self) -> tuple[DamagedFile, ...]:
        return tuple(one for one in self.damaged if one.aside.is_pending)

    def _open(self) -> Database:
        if self._lock is not None and self._lock.stale:
            self._lock.close()
            self._lock = None
        if self._lock is None:
            self._lock = lock_of(self.folder.parent)
        path = self.folder / database.FILE_NAME
        inode = set_aside.inode_of(path)
        try:
            return Database(self.folder, self._size_limit, self._lock, self._pinned)
        except FAILURES as error:
            if not is_damage(error):
                raise
        with self._lock:
            # Another process that found the same may have moved it already.
            aside = set_aside.move(path, inode)
        if aside is not None:
            log.error("%s is damaged: moved to %s, a new one is begun", path, aside.folder)
        return Database(self.folder, self._size_limit, self._lock, self._pinned)

    async def _close(self, old: Database) -> None:
        # Each thread has a connection of its own; the writer's goes last and checkpoints.
        if self.glance is not None:
            glance, self.glance = self.glance, None
            with contextlib.suppress(*FAILURES):
                glance.close()
        for thread in (self._reader, self._writer):
            with contextlib.suppress(*FAILURES):
                await self._in(thread, old.close)

    async def _close_read_only(self) -> None:
        if self.read_only is not None:
            await self.read(self.read_only.close)
            self.read_only = None

    def shut_down(self) -> None:
        """End the threads."""
        self._reader.shutdown()
        self._writer.shutdown()
        if self._lock is not None:
            self._lock.close()

    @staticmethod
    async def _in(threads: ThreadPoolExecutor, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(threads, work)


def _number(file: DamagedFile) -> int:
    return file.aside.number


def _is_there(path: Path) -> bool:
    try:
        return path.is_file() and path.stat().st_size > 0
    except OSError:
        return False
