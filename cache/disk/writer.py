"""The writing half of the disk tier: all that waits goes into one transaction, one at a time.

What could not be written is kept in memory, as far as there is room, and tried again.
"""

import asyncio
import logging
import time
from functools import partial

from embedding_proxy.providers.backoff import THRESHOLD, Backoff

from .changes import Changes
from .connection import Disk
from .database import FAILURES, Database, FileReplaced, Timeout, is_damage
from .eviction import StoreFull
from .pending import Pending

log = logging.getLogger("embedding_proxy.store")


LAST_TRIES = 3
WARNING_SECONDS = 10.0
"""How long the same failure is not said again."""


class Writer:
    """Writes what is pending. For one thread: the event loop's. Never raises."""

    def __init__(self, disk: Disk) -> None:
        self._disk = disk
        self.backoff = Backoff(threshold=THRESHOLD)
        self.pending = Pending()
        self._warned = "", 0.0
        # What those will be told whose changes wait, and the task that writes them.
        self._landing: asyncio.Future[bool] | None = None
        self._drain: asyncio.Task[None] | None = None

    @property
    def ready(self) -> bool:
        """Whether there is a file, and it is not left alone."""
        return self._disk.file is not None and not self.backoff.is_waiting

    async def written(self) -> bool:
        """Wait until all changes so far are on disk, or have failed to get there."""
        if self._landing is None:
            self._landing = asyncio.get_running_loop().create_future()
        landing = self._landing
        if self._drain is None:
            self._drain = asyncio.create_task(self._write_out())
        return await asyncio.shield(landing)

    async def _write_out(self) -> None:
        while self._landing is not None:
            changes = self.pending.take()
            landing, self._landing = self._landing, None
            landed = False
            try:
                landed = await self._write(changes)
            except Exception:
                # Those who wait must hear of it, and those who come later need a writer.
                log.exception("writing to the disk tier failed")
            finally:
                landing.set_result(landed)
        self._drain = None

    async def _write(self, changes: Changes) -> bool:
        """Write changes; return whether all of them are on disk. Those that are not are kept."""
        file = self._disk.file
        parts = [changes] if file is None else list(changes.parts(file.most_bytes))
        for place, part in enumerate(parts):
            if not await self._write_part(part):
                for left in parts[place:]:
                    self.pending.failed(left)
                return False
        return True

    async def _write_part(self, changes: Changes) -> bool:
        for last_try in (False, True):
            target = self._disk.file
            if target is None:
                return False
            try:
                await self._disk.write(partial(target.write, changes, self.pending.uses))
            except FAILURES as error:
                if not last_try and (is_damage(error) or isinstance(error, FileReplaced)):
                    await self.replace(target)
                    continue
                self._warn(error, len(changes.records))
                # Where the sums can be written, it is not the disk that fails.
                if not isinstance(error, StoreFull) and not await self._sums_written(
                    target, changes, error
                ):
                    self.backoff.fail()
                return False
            except Exception:
                self.backoff.fail()
                log.exception("writing to the disk tier failed")
                return False
            self.backoff.succeed()
            self.pending.written(changes.records)
            return True
        return False

    async def _sums_written(self, target: Database, changes: Changes, error: BaseException) -> bool:
        """Write the sums of changes that failed: a record that cannot be kept is paid for, too.

        Returns whether there were any, and they are on disk.
        """
        if not (changes.records and changes.usage) or isinstance(error, TimeoutError | Timeout):
            # A second wait for the same lock would come to nothing.
            return False
        try:
            await self._disk.write(partial(target.write, Changes(usage=changes.usage)))
        except FAILURES:
            return False
        changes.usage = {}
        return True

    def _warn(self, error: BaseException, count: int) -> None:
        """Say what failed; the same again only after a while."""
        why = str(error) or "it is locked"
        now = time.monotonic()
        if self._warned[0] != why or now >= self._warned[1]:
            self._warned = why, now + WARNING_SECONDS
            log.warning("writing to the disk tier failed, %d not kept: %s", count, why)

    async def finish(self) -> None:
        """Wait for what is being written, and write what could wait, whatever failed before.

        What is still refused is lost: so it is tried some times, and the room that is otherwise
        left free on the file system is used.
        """
        if self._drain is not None:
            await self._drain
        for _ in range(LAST_TRIES):
            if self._disk.file is not None:
                self._disk.file.uses_last_room = True
            self.backoff.succeed()
            await self.flush()
            if self.pending.is_empty:
                return
        sums = len(self.pending.changes.usage)
        log.error(
            "%d records could not be kept on disk, nor %d lines of the ledger: they are lost",
            *(len(self.pending.backlog), sums),
        )

    async def flush(self) -> None:
        """Write what could wait, some thousand rows a transaction."""
        while self.ready:
            changes = self.pending.take_what_can_wait()
            if changes is None or not await self._write(changes):
                return

    async def replace(self, old: Database) -> None:
        """Let go of a file that cannot be used any more, and open a fresh one."""
        try:
            await self._disk.replace(old)
        except FAILURES as error:
            self.backoff.fail()
            log.error("the disk tier cannot be opened anew: %s", error)  # noqa: TRY400 - a line
