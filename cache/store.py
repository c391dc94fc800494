"""The disk tier: addresses <-> records, off the event loop, whatever happens to the file.

One thread reads, one writes; all that waits for the writer goes into one transaction.

Failure licence: a read that fails is a miss, a write that fails is a line in the log; neither
raises. What `put_many` has returned True for is on disk: after a kill −9 it is there. A power cut
may take the last transactions (SQLite's WAL with synchronous=NORMAL), never the file's consistency.
A damaged file is moved aside and a fresh one opened; one that was deleted or replaced is let go.
A tier that keeps failing is left alone for a while, so that nobody waits for it again and again.
"""

import asyncio
import contextlib
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Self, TypeVar

from . import database
from .database import FAILURES, Changes, Database, FileReplaced, is_damage
from .key import FORMAT
from .lock import WriterLock
from .rest import Rest

log = logging.getLogger("embedding_proxy.store")

T = TypeVar("T")

READ_SECONDS = 5.0
"""The longest wait for a read. Generous: what is taken for a miss is paid for again."""
MOST_USED = 100_000
"""The most uses remembered between two writes; further ones are forgotten."""


class StoreError(Exception):
    """The directory cannot be used as a store; the message says why."""


class Store:
    """Records on disk, of at most about `size_limit` bytes. Open it with `async with`.

    `directory` gets a folder for this format version; another version's files are left alone.
    """

    def __init__(self, directory: Path, size_limit: int) -> None:
        self.folder = directory / f"v{FORMAT}"
        self._size_limit = size_limit
        self._database: Database | None = None
        self._closing = False
        self._lock: WriterLock | None = None
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="store-reader")
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="store-writer")
        self._reading, self._writing = Rest(), Rest()
        self._replacing = asyncio.Lock()
        self._changes = Changes()
        # What those will be told whose changes wait for the writer, and the task that writes.
        self._landing: asyncio.Future[bool] | None = None
        self._drain: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Self:
        """Open the file. Raises StoreError if the directory cannot be used."""
        try:
            self._database = await _in(self._writer, self._open)
        except FAILURES as error:
            self._shut_down()
            raise StoreError(f"{self.folder}: {error}") from error
        return self

    async def __aexit__(self, *_: object) -> None:
        self._closing = True
        if self._drain is not None:
            await self._drain
        if self._database is not None:
            await self._close(self._database)
            self._database = None
        self._shut_down()

    async def get_many(self, addresses: Sequence[bytes]) -> dict[bytes, bytes]:
        """Return the records that are there, by address. Never raises."""
        source = self._database
        if source is None or self._closing or not addresses or self._reading.resting:
            return {}
        try:
            async with asyncio.timeout(READ_SECONDS):
                found, used = await _in(self._reader, partial(source.read_many, addresses))
        except FAILURES as error:
            self._reading.failed()
            log.warning("reading from the disk tier failed, taken as a miss: %s", error)
            if is_damage(error):
                await self._replace(source)
            return {}
        self._reading.succeeded()
        self.touch(used)
        return found

    async def put_many(self, records: Mapping[bytes, bytes]) -> bool:
        """Write records, all or none; return whether they are on disk. Never raises."""
        if self._database is None or self._closing or self._writing.resting:
            return False
        self._changes.records.update(records)
        return await self._written()

    async def delete_many(self, dead: Mapping[bytes, bytes]) -> bool:
        """Delete records that were found to be bad, unless they were replaced since."""
        if self._database is None or self._closing or self._writing.resting:
            return False
        self._changes.dead.extend(dead.items())
        return await self._written()

    def touch(self, addresses: Iterable[bytes]) -> None:
        """Note that entries were used; it is written with the next change, not for its own sake."""
        if len(self._changes.used) < MOST_USED:
            self._changes.used.update(addresses)

    async def _written(self) -> bool:
        """Wait until all changes so far are on disk, or have failed to get there."""
        if self._landing is None:
            self._landing = asyncio.get_running_loop().create_future()
        landing = self._landing
        if self._drain is None:
            self._drain = asyncio.create_task(self._write_out())
        return await asyncio.shield(landing)

    async def _write_out(self) -> None:
        while self._landing is not None:
            changes, self._changes = self._changes, Changes()
            landing, self._landing = self._landing, None
            landed = False
            try:
                landed = await self._write(changes)
            finally:
                landing.set_result(landed)
        self._drain = None

    async def _write(self, changes: Changes) -> bool:
        for last_try in (False, True):
            target = self._database
            if target is None:
                return False
            try:
                await _in(self._writer, partial(target.write, changes))
            except FAILURES as error:
                if not last_try and (is_damage(error) or isinstance(error, FileReplaced)):
                    await self._replace(target)
                    continue
                self._writing.failed()
                count = len(changes.records)
                log.warning("writing to the disk tier failed, %d not kept: %s", count, error)
                return False
            else:
                break
        self._writing.succeeded()
        return True

    async def _replace(self, old: Database) -> None:
        """Let go of a file that cannot be used any more, and open a fresh one."""
        async with self._replacing:
            if self._database is not old or self._closing:
                return
            await self._close(old)
            try:
                aside = await _in(self._writer, old.set_aside)
                if aside is not None:
                    log.error("%s is damaged: moved to %s, a new one is begun", old.path, aside)
                else:
                    log.warning("%s was taken away or replaced: opened anew", old.path)
                self._database = await _in(self._writer, self._open)
            except FAILURES as error:
                self._writing.failed()
                log.error("the disk tier cannot be opened anew: %s", error)  # noqa: TRY400 - a line

    def _open(self) -> Database:
        self.folder.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        if self._lock is None:
            self._lock = WriterLock(self.folder.parent / "writer.lock", database.BUSY_SECONDS)
        try:
            return Database(self.folder, self._size_limit, self._lock)
        except FAILURES as error:
            if not is_damage(error):
                raise
        with self._lock:
            aside = database.set_aside(self.folder)
        log.error("%s is damaged: moved to %s, a new one is begun", self.folder, aside)
        return Database(self.folder, self._size_limit, self._lock)

    async def _close(self, old: Database) -> None:
        # Each thread has a connection of its own; the writer's goes last and checkpoints.
        for thread in (self._reader, self._writer):
            with contextlib.suppress(*FAILURES):
                await _in(thread, old.close)

    def _shut_down(self) -> None:
        self._reader.shutdown()
        self._writer.shutdown()
        if self._lock is not None:
            self._lock.close()


async def _in(threads: ThreadPoolExecutor, work: Callable[[], T]) -> T:
    return await asyncio.get_running_loop().run_in_executor(threads, work)
