"""The file of the disk tier and the two threads that work on it: opened, let go of, opened anew."""

import asyncio
import contextlib
import errno
import logging
import os
import sqlite3
import stat
from collections.abc import Callable, Collection, Iterator
from functools import partial
from pathlib import Path
from typing import TypeVar

from embedding_proxy.cache import private_files
from embedding_proxy.cache.key import FORMAT

from . import database, disk_full, ledger_reader, quarantine, schema
from .database import FAILURES, Database, is_damage
from .lock import WriterLock
from .purge import PurgeSignal
from .read_only import (
    LEDGER_DAMAGED,
    DamagedFile,
    InlineReader,
    ReadableFile,
    ReadOnlyFile,
    primary_code,
)
from .schema import NewerLayout
from .worker_thread import WorkerThread
from .write_ahead_log import LOG, damage_of, is_open_without_log, sibling_path

log = logging.getLogger("embedding_proxy.store")

T = TypeVar("T")

LOCKED = "another process keeps it locked"

_NO_ACCESS = (errno.EROFS, errno.EACCES, errno.EPERM)
_SQL_NO_ACCESS = (sqlite3.SQLITE_READONLY, sqlite3.SQLITE_PERM, sqlite3.SQLITE_CANTOPEN)
_SQL_LOCKED = (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED)


class NotAFile(OSError):
    """Something that is no file is at the path of one of the store's files."""


# Mistakes of the configuration, not of the moment.
_NEVER = (NotADirectoryError, FileExistsError, IsADirectoryError, NewerLayout, NotAFile)


_LOCK_NAME = "writer.lock"
_OTHER_PLACE = "name another cache.directory"


class StoreError(Exception):
    """The directory cannot be used as a store; the message says why."""


class DiskFull(StoreError):
    """The disk has no room for a write."""


def lock_of(directory: Path) -> WriterLock:
    """Return the lock of all writers of the store in `directory`.

    Raises OSError, also if something that is no file is at the path of one of the store's files.
    """
    if (obstacle := _obstacle(directory)) is not None:
        kind = "a directory" if obstacle.is_dir() else "no regular file"
        raise NotAFile(f"{obstacle} is {kind}, and the store needs a file there: move it away")
    private_files.make_folder(directory)
    private_files.secure(directory)
    return WriterLock(directory / _LOCK_NAME, database.BUSY_SECONDS)


def _obstacle(directory: Path) -> Path | None:
    """Return the path of a store's file that is something else; None if there is none.

    Raises OSError.
    """
    folder = folder_of(directory)
    names = [f"{database.FILE_NAME}{end}" for end in ("", "-wal", "-shm")]
    for path in (directory / _LOCK_NAME, *(folder / name for name in names)):
        # Asked once: another process that ends may delete the log and its index at any moment.
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            if not stat.S_ISREG(path.stat().st_mode):
                return path
    return None


def folder_of(directory: Path) -> Path:
    """Return the folder of this format version. Files of other versions are not touched."""
    return directory / f"v{FORMAT}"


def exists(directory: Path) -> bool:
    """Tell whether `directory` holds a store, or something at the path of its files."""
    path = folder_of(directory) / database.FILE_NAME
    try:
        obstacle = _obstacle(directory)
    except NotADirectoryError:
        return False
    except OSError:
        # A process without the right to look cannot say that there is none.
        return True
    is_there = _is_there(path) or _has_log_only(path) or obstacle is not None
    return is_there or bool(quarantine.pending(path))


@contextlib.contextmanager
def opened(
    directory: Path, size_limit: int, pinned: Collection[str] = (), *, create: bool = False
) -> Iterator[Database]:
    """Give the file of a store to one thread, beside proxies that may be running.

    Raises StoreError if there is none and none is to be made, and for every later failure.
    """
    folder = folder_of(directory)
    if not create and not exists(directory):
        raise StoreError(f"{folder}: there is no store yet; the proxy makes it at its first start")
    with contextlib.ExitStack() as stack:
        try:
            lock = stack.enter_context(contextlib.closing(lock_of(directory)))
            file = Database(folder, size_limit, lock, pinned)
        except FAILURES as error:
            raise _explain(folder, error) from error
        stack.callback(file.close)
        try:
            yield file
        except (*database.STORE_FAILURES, TimeoutError) as error:
            raise _explain(folder, error) from error


@contextlib.contextmanager
def opened_for_reading(
    directory: Path, size_limit: int, pinned: Collection[str] = ()
) -> Iterator[ReadableFile]:
    """Give the file of a store to one thread that only reads, beside proxies that may be running.

    Neither the file nor its write-ahead log is written. A file that is not of the present form (of
    an older layout, empty, damaged) is opened as `opened` does it; where such a one cannot be
    written (no access, no space, locked by another process), it is a ReadOnlyFile that says why.
    Raises StoreError as `opened` does, and for an older layout that cannot be brought up to date.
    """
    with contextlib.ExitStack() as stack:
        file: ReadableFile | None = stack.enter_context(_open_read_only(directory, size_limit))
        if file is not None:
            try:
                yield file
            except database.STORE_FAILURES as error:
                raise _explain(folder_of(directory), error) from error
            return
        try:
            file = stack.enter_context(opened(directory, size_limit, pinned))
        except StoreError as error:
            if not _is_only_unwritable(error.__cause__):
                raise
            file = stack.enter_context(_open_unwritable(folder_of(directory), error))
        yield file


@contextlib.contextmanager
def _open_read_only(directory: Path, size_limit: int) -> Iterator[ReadOnlyFile | None]:
    """Give a store's file for reading only; None if it has to be opened for writing first."""
    path = folder_of(directory) / database.FILE_NAME
    with contextlib.ExitStack() as stack:
        file = None
        # The process that opens it for writing finds and reports every fault.
        with contextlib.suppress(Exception):
            file = _open_for_reading(directory, path, size_limit, stack)
        if file is None:
            stack.close()
        yield file


def _open_for_reading(
    directory: Path, path: Path, size_limit: int, stack: contextlib.ExitStack
) -> ReadOnlyFile | None:
    is_idle = not sibling_path(path, LOG).exists()
    if not _is_there(path) or _obstacle(directory) is not None or not _is_sound(directory, path):
        return None
    file = ReadOnlyFile(path, log_bytes=database.log_bytes(size_limit))
    if is_idle:
        # A connection that only reads leaves an empty log behind it.
        stack.callback(_tidy, directory, path)
    stack.callback(file.close)
    is_usable = schema.is_current(file.sql) and ledger_reader.copies_agree(file.sql)
    return file if is_usable else None


def _is_sound(directory: Path, path: Path) -> bool:
    """Tell whether a store's log is whole, and no process still has it open after a deletion."""
    is_idle = not sibling_path(path, LOG).exists()
    if not is_idle and not damage_of(path):
        return True
    # A log that is written meanwhile may look damaged, and a proxy may be about to begin one.
    with _hold_lock(directory):
        return not (damage_of(path) or (is_idle and is_open_without_log(path)))


def _tidy(directory: Path, path: Path) -> None:
    """Let SQLite delete an empty log and its index, unless another process uses them now."""
    with contextlib.suppress(*FAILURES), _hold_lock(directory):
        if sibling_path(path, LOG).stat().st_size == 0:
            with contextlib.closing(sqlite3.connect(path, timeout=0.0)) as last:
                last.execute("PRAGMA user_version").fetchall()


@contextlib.contextmanager
def _hold_lock(directory: Path) -> Iterator[None]:
    """Hold the writer's lock if it exists and is free. It is not created. Raises OSError."""
    path = directory / _LOCK_NAME
    if not path.exists() or not os.access(path, os.W_OK):
        yield
        return
    with contextlib.closing(WriterLock(path, database.BUSY_SECONDS)) as lock, lock:
        yield


def write_obstacle(directory: Path) -> str:
    """Return why the store in `directory` cannot be written now; "" if it can.

    To find out, its lock is taken and a transaction is begun; nothing is written.
    """
    try:
        with contextlib.closing(lock_of(directory)) as lock, lock:
            schema.check(folder_of(directory) / database.FILE_NAME, database.BUSY_SECONDS)
    except FAILURES as error:
        return str(error) or LOCKED
    return ""


@contextlib.contextmanager
def _open_unwritable(folder: Path, failure: StoreError) -> Iterator[ReadOnlyFile]:
    """Give a store's file for reading only, after a `failure` to open it for writing."""
    path = folder / database.FILE_NAME
    reason = str(failure.__cause__) or LOCKED
    try:
        file = ReadOnlyFile(path, reason)
    except FAILURES as error:
        # The first failure has the remedy, but damage is found by whoever can read.
        raise _explain(folder, error) if is_damage(error) else failure from error
    with contextlib.closing(file):
        try:
            ((layout,),) = file.sql("PRAGMA user_version").fetchall()
            schema.refuse_newer(path, layout)
            if layout < schema.LAYOUT:
                raise StoreError(
                    f"{path} has layout {layout}, and can only be read ({reason}); this version"
                    f" reads layout {schema.LAYOUT}: to bring it up to that, open it once where it"
                    " can be written, or copy its folder to such a place"
                )
            if not ledger_reader.copies_agree(file.sql):
                raise sqlite3.DatabaseError(LEDGER_DAMAGED)
            yield file
        except (*database.STORE_FAILURES, NewerLayout) as error:
            raise _explain(folder, error) from error


def _is_only_unwritable(error: BaseException | None) -> bool:
    """Tell whether a file that could not be opened for writing may still be readable."""
    if error is None or is_damage(error) or isinstance(error, NewerLayout | NotAFile):
        return False
    is_io = primary_code(error) == sqlite3.SQLITE_IOERR  # Also of shared memory on a full disk.
    return is_io or _remedy(error) != ""


def _remedy(error: BaseException) -> str:
    """Return the remedy for a passing error; empty if none is known."""
    number, code = getattr(error, "errno", None), primary_code(error)
    if number in _NO_ACCESS or code in _SQL_NO_ACCESS:
        return "give this user write access to the folder and all files in it"
    if disk_full.is_cause(error):
        return disk_full.REMEDY
    if type(error) in (TimeoutError, database.Timeout) or code in _SQL_LOCKED:
        return "end or continue the process that keeps the lock, and try again"
    return ""


def _explain(folder: Path, error: BaseException, otherwise: str = "") -> StoreError:
    """Return the message of a failure with its remedy; `otherwise` is used if none is known."""
    remedy = _remedy(error) or otherwise
    if primary_code(error) == sqlite3.SQLITE_IOERR and disk_full.has_no_room(folder):
        # This is all that SQLite reports if there is no room for the index of its log.
        remedy = disk_full.REMEDY
    kind = DiskFull if remedy == disk_full.REMEDY else StoreError
    return kind(f"{folder}: {_cause(error)}{remedy and '; '}{remedy}")


def _cause(error: BaseException) -> str:
    """Return the cause of an error in words."""
    if isinstance(error, OSError) and error.strerror:
        place = f"{error.filename}: " if error.filename else ""
        return f"{place}{error.strerror}"
    return str(error) or LOCKED


def is_damaged(error: StoreError) -> bool:
    """Tell whether the file of a store is damaged."""
    return error.__cause__ is not None and is_damage(error.__cause__)


class Disk:
    """One thread reads, one writes. `file` is None while no file can be opened for writing.

    Then `read_only` may hold one that can be read. `inline_reader` reads the file `file`, for the
    event loop's thread, and `purge_signal` tells it of purges by other processes. `damaged` are
    files that are set aside and not salvaged yet: the latest first, for the reading thread.
    """

    def __init__(self, directory: Path, size_limit: int, pinned: Collection[str]) -> None:
        self.folder = folder_of(directory)
        self._size_limit = size_limit
        self._pinned = pinned
        self.file: Database | None = None
        self._evicted = 0
        """Entries that were evicted from files that are closed."""
        self.inline_reader: InlineReader | None = None
        self.purge_signal: PurgeSignal | None = None
        self.read_only: ReadOnlyFile | None = None
        self.damaged: tuple[DamagedFile, ...] = ()
        self._lock: WriterLock | None = None
        self._reader = WorkerThread("store-reader")
        self._writer = WorkerThread("store-writer")
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
                otherwise = _OTHER_PLACE if isinstance(error, OSError) else ""
                raise _explain(self.folder, error, otherwise) from error
            log.error("the disk tier cannot be opened, nothing new is kept: %s", error)  # noqa: TRY400 - said
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
        """Run `work` on the file in the reading thread, and return its result."""
        return await self._reader.run(work)

    async def write(self, work: Callable[[], T]) -> T:
        """Run `work` on the file in the writing thread, and return its result."""
        return await self._writer.run(work)

    @property
    def evicted(self) -> int:
        """The number of entries that this process has evicted."""
        return self._evicted + (0 if self.file is None else self.file.evicted)

    async def replace(self, old: Database) -> None:
        """Close a file that cannot be used any more, and open a new one. Raises FAILURES."""
        async with self._opening:
            if self.file is not old:
                return
            # While its connections are open. Writers that come meanwhile are refused.
            if await self._writer.run(old.save_log):
                log.error("%s: %s", old.path, database.LOG_DELETED)
            self.file = None
            self._evicted += old.evicted
            old.let_go()
            await self._close(old)
            quarantined = await self._writer.run(old.quarantine)
            if quarantined is not None:
                log.error("%s is damaged: moved to %s, a new one is begun", old.path, quarantined)
            else:
                log.warning("%s was taken away or replaced: opened anew", old.path)
            await self._open_file()

    async def opened(self) -> None:
        """Wait while the file is being opened or replaced."""
        async with self._opening:
            pass

    async def close_saved(self) -> None:
        """Close the damaged files whose content is saved."""
        async with self._opening:
            damaged = await self.read(self._still_damaged)
            closed, self.damaged = set(self.damaged) - set(damaged), damaged
            for file in closed:
                await self.read(file.close)

    async def close(self) -> None:
        """Close the file and end the threads."""
        async with self._opening:
            if self.file is not None:
                await self._close(self.file)
                self.file = None
            await self._close_read_only()
            for file in self.damaged:
                await self.read(file.close)
            self.damaged = ()
        self.shut_down()

    async def _open_file(self) -> None:
        self.file = file = await self._writer.run(self._open)
        # Without them, everything is read by the thread, and purges are noticed at the next tick.
        with contextlib.suppress(Exception):
            self.inline_reader = await self.read(partial(InlineReader, file.path))
            self.purge_signal = await self.read(partial(PurgeSignal, self.folder))
        await self._open_damaged()

    async def _open_damaged(self) -> None:
        path = self.folder / database.FILE_NAME
        open_files = {file.quarantined: file for file in self.damaged}
        for quarantined in await self.read(partial(quarantine.pending, path)):
            if quarantined not in open_files:
                open_files[quarantined] = await self.read(partial(DamagedFile, quarantined))
        self.damaged = tuple(sorted(open_files.values(), key=_number, reverse=True))

    def _still_damaged(self) -> tuple[DamagedFile, ...]:
        return tuple(file for file in self.damaged if file.quarantined.is_pending)

    def _open(self) -> Database:
        if self._lock is not None and self._lock.stale:
            self._lock.close()
            self._lock = None
        if self._lock is None:
            self._lock = lock_of(self.folder.parent)
        path = self.folder / database.FILE_NAME
        inode = quarantine.inode_of(path)
        try:
            return Database(self.folder, self._size_limit, self._lock, self._pinned)
        except (*FAILURES, UnicodeDecodeError) as error:
            if not is_damage(error):
                raise
        with self._lock:
            # Another process with the same error may have moved it already.
            quarantined = quarantine.move(path, inode)
        if quarantined is not None:
            log.error("%s is damaged: moved to %s, a new one is begun", path, quarantined.folder)
        return Database(self.folder, self._size_limit, self._lock, self._pinned)

    async def _close(self, old: Database) -> None:
        # Each thread has a connection of its own; the writer's goes last and checkpoints.
        if self.inline_reader is not None:
            reader, self.inline_reader = self.inline_reader, None
            with contextlib.suppress(*FAILURES):
                reader.close()
        if self.purge_signal is not None:
            self.purge_signal.close()
            self.purge_signal = None
        for thread in (self._reader, self._writer):
            with contextlib.suppress(*FAILURES):
                await thread.run(old.close)

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


def _number(file: DamagedFile) -> int:
    return file.quarantined.number


def _has_log_only(path: Path) -> bool:
    """Tell whether the file is empty, but its write-ahead log is not."""
    try:
        return path.is_file() and bool(damage_of(path))
    except OSError:
        return False


def _is_there(path: Path) -> bool:
    try:
        return path.is_file() and path.stat().st_size > 0
    except OSError:
        return False
