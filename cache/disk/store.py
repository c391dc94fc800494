"""The disk tier: addresses <-> records, whatever happens to the file.

Records that the page cache holds are read at once, few at a time; one thread reads the others, one
writes, and all that waits for the writer goes into one transaction.

Failure licence: a read that fails is a miss, a write that fails is a line in the log; neither
raises. What `put_many` has returned True for is on disk: after a kill −9 it is there. A power cut
may take the last transactions (SQLite's WAL with synchronous=NORMAL), never the file's consistency.
What could not be written is kept in memory and tried again. A damaged file is moved aside and a
fresh one opened; one that was deleted or replaced is let go. A tier that keeps failing is left
alone for a while, so that nobody waits for it again and again.
"""

import asyncio
import contextlib
import itertools
import logging
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Self, TypeVar

from embedding_proxy.cache.disk.connection import Disk, StoreError
from embedding_proxy.cache.disk.database import FAILURES, FILE_NAME, is_damage
from embedding_proxy.cache.disk.lock import WriterLock
from embedding_proxy.cache.disk.read_only import (
    read_ledger,
    read_ledger_hours,
    read_ledger_sums,
)
from embedding_proxy.cache.disk.reader import Reader
from embedding_proxy.cache.disk.salvage import Salvager
from embedding_proxy.cache.disk.write_batch import PendingRecord, StoredRecord, Use, WriteBatch
from embedding_proxy.cache.disk.writer import Writer
from embedding_proxy.cache.key import Partition
from embedding_proxy.cache.ledger import (
    ALL_LINES,
    MAX_LEDGER_KEYS,
    By,
    LedgerFilter,
    LedgerKey,
    LedgerSums,
    Line,
    Usage,
)

from . import purge

log = logging.getLogger("embedding_proxy.store")

__all__ = ["Store", "StoreError"]

_Read = TypeVar("_Read")

TICK_SECONDS = 1.0
FLUSH_TICKS = 10
"""Deferred changes are written every so many ticks."""
EXPIRY_TICKS = 600
EXPIRY_LOCK = "expiry.lock"
"""Beside the folder: its holder deletes expired records, for all processes."""


class Store:
    """Records on disk, of at most about `size_limit` bytes. Open it with `async with`.

    `directory` gets a folder for this format version; another version's files are left alone.
    Records older than `ttl_s` seconds are misses, and deleted in time, unless told not to. Those
    of namespaces in `pinned` are never evicted. `on_purge` is called when another process has
    deleted entries.
    """

    def __init__(  # noqa: PLR0913 - by name
        self,
        directory: Path,
        size_limit: int,
        *,
        ttl_s: float | None = None,
        deletes_expired: bool = True,
        pinned: Collection[str] = (),
        on_purge: Callable[[], None] = lambda: None,
    ) -> None:
        self._disk = Disk(directory, size_limit, pinned)
        self._ttl_s = ttl_s
        self._deletes_expired = deletes_expired
        self.on_purge = on_purge
        self._closing = False
        self._writer = Writer(self._disk)
        self._pending = self._writer.pending
        self._salvager = Salvager(self._disk, self._writer.replace)
        self._reader = Reader(self._disk, self._writer.replace, self._salvager.finished)
        self._stop = asyncio.Event()
        self._ticking: asyncio.Task[None] | None = None
        self._purges, self._purged_file = 0, self._disk.file
        self.purge_epoch = 0
        """Changes whenever a purge by another process is applied."""
        self.counted: dict[LedgerKey, Usage] = {}
        """The sums that this process has counted since it opened the store: the first
        MAX_LEDGER_KEYS headings, and one sum of all others."""
        self._day = 0
        self._keys_of_day: set[LedgerKey] = set()
        """The headings with their own line on disk: the first MAX_LEDGER_KEYS of the day."""

    @property
    def folder(self) -> Path:
        """The folder of the file."""
        return self._disk.folder

    @property
    def evicted(self) -> int:
        """The number of entries that this process has evicted since the store was opened."""
        return self._disk.evicted

    @property
    def unwritten(self) -> int:
        """The number of records that are not on disk yet."""
        return len(self._pending.changes.records) + len(self._pending.backlog)

    async def __aenter__(self) -> Self:
        """Open the file. Raises StoreError if the directory cannot be used."""
        await self._disk.open()
        self._salvager.start()
        await self._apply_purges()
        self._ticking = asyncio.create_task(self._tick_forever())
        return self

    async def __aexit__(self, *_: object) -> None:
        self._closing = True
        self._stop.set()
        try:
            if self._ticking is not None:
                await self._ticking
            await self._salvager.stop()
            await self._writer.finish()
        finally:
            await self._disk.close()

    async def lookup(self, addresses: Sequence[bytes]) -> dict[bytes, StoredRecord]:
        """Return the existing records by address. Never raises."""
        not_before = self._not_before
        records = {} if self._closing else await self._reader.lookup(addresses, not_before)
        return self._add_backlog(records, addresses, not_before)

    def lookup_nowait(self, addresses: Sequence[bytes]) -> dict[bytes, StoredRecord] | None:
        """Return the existing records of a few addresses; None if it has to be awaited.

        Never raises.
        """
        not_before = self._not_before
        records = None if self._closing else self._reader.lookup_nowait(addresses, not_before)
        return None if records is None else self._add_backlog(records, addresses, not_before)

    def _add_backlog(
        self, records: dict[bytes, StoredRecord], addresses: Sequence[bytes], not_before: float
    ) -> dict[bytes, StoredRecord]:
        """Add the records that could not be written yet and are kept in this process."""
        if self._pending.backlog and len(records) < len(addresses):
            for address in addresses:
                pending = self._pending.backlog.get(address)
                stored = pending and pending.stored
                if (
                    pending
                    and address not in records
                    and stored is not None
                    and stored >= not_before
                ):
                    records[address] = StoredRecord(pending.record, stored)
        return records

    @property
    def _not_before(self) -> float:
        """Records that were stored before this time, in seconds since 1970, are not read."""
        return time.time() - self._ttl_s if self._ttl_s else 0.0

    async def put_many(
        self, records: Mapping[bytes, bytes], partition: Partition | None = None
    ) -> bool:
        """Write records, all or none; return whether they are on disk. Never raises."""
        now = time.time()
        pending = {a: PendingRecord(record, partition, now) for a, record in records.items()}
        if self._cannot_write:
            self._keep_unwritten(pending)
            return False
        self._pending.changes.records.update(pending)
        return await self._writer.commit()

    async def put_older(
        self, records: Mapping[bytes, PendingRecord], *, is_copied: bool = False
    ) -> bool:
        """Write records that were bought a while ago, unless newer ones are there. Never raises.

        `is_copied`: whether there are others of them elsewhere, so that none has to be kept in
        memory while nothing can be written.
        """
        if self._cannot_write:
            if not is_copied:
                self._keep_unwritten(records)
            return False
        return await self._writer.write(WriteBatch(records=dict(records), keep_newer=True))

    def _keep_unwritten(self, records: Mapping[bytes, PendingRecord]) -> None:
        """Let records that were bought while nothing can be written wait for a later time."""
        if self._ticking is not None and not self._closing:
            self._pending.keep_failed(WriteBatch(records=dict(records)))

    async def delete_many(self, dead: Mapping[bytes, bytes]) -> bool:
        """Delete bad records, unless they were replaced since. Never raises."""
        if self._cannot_write:
            return False
        self._pending.changes.deletions.extend(dead.items())
        return await self._writer.commit()

    async def salvaged(self) -> None:
        """Wait until everything whole in damaged files is in the present one. Never raises."""
        await self._salvager.finished()

    def touch(self, addresses: Collection[bytes], partition: Partition | None = None) -> None:
        """Note the use of entries. It is written later, with other changes."""
        self._pending.uses.note(addresses, Use(int(1000 * time.time()), partition))

    def count(self, heading: LedgerKey, usage: Usage) -> None:
        """Add to the sums of answers. They are written with the next change, or a little later."""
        day = int(time.time() // 86_400)
        if day != self._day:
            self._day, self._keys_of_day = day, set()
        if heading in self._keys_of_day or len(self._keys_of_day) < MAX_LEDGER_KEYS:
            self._keys_of_day.add(heading)
            self._pending.changes.count(day, heading, usage)
        else:
            self._pending.changes.count(day, heading.rest, usage)
        sums = self.counted.get(heading)
        if sums is None and len(self.counted) >= MAX_LEDGER_KEYS:
            heading = heading.rest
            sums = self.counted.get(heading)
        self.counted[heading] = usage if sums is None else sums.plus(usage)

    async def flush_counts(self) -> bool:
        """Write the sums so far; return whether they are on disk. Never raises."""
        if self._cannot_write:
            return False
        return await self._writer.commit()

    async def ledger(
        self,
        by: Sequence[By],
        max_lines: int | None = None,
        preferred: Mapping[By, Collection[str]] = MappingProxyType({}),
        lines: LedgerFilter = ALL_LINES,
    ) -> list[Line] | None:
        """Return the sums on disk (see `ledger_reader`); None if they cannot be read.

        A separate thread reads them, so no lookup waits for it. Never raises.
        """
        return await self._read_ledger(
            partial(read_ledger, by=by, max_lines=max_lines, preferred=preferred, lines=lines)
        )

    async def ledger_sums(self, lines: LedgerFilter = ALL_LINES) -> LedgerSums | None:
        """Return the sums of some days by day, model and client; None if they cannot be read.

        They are read in short parts, however many lines there are. Never raises.
        """
        return await self._read_ledger(partial(read_ledger_sums, lines=lines))

    async def ledger_hours(self, lines: LedgerFilter) -> dict[int, Usage] | None:
        """Return the sums by hour (since 1970, UTC), as far as they are kept. Never raises."""
        return await self._read_ledger(partial(read_ledger_hours, lines=lines))

    async def _read_ledger(self, read: Callable[[Path], _Read]) -> _Read | None:
        path = self.folder / FILE_NAME
        for is_last_try in (False, True):
            file = self._disk.file
            try:
                return await asyncio.to_thread(read, path)
            except FAILURES as error:
                if is_last_try or file is None or not is_damage(error):
                    log.warning("the ledger cannot be read: %s", error)
                    return None
                await self._writer.replace(file)
                await self._reader.is_salvaged()
        return None

    @property
    def _cannot_write(self) -> bool:
        return self._closing or not self._writer.ready

    async def _tick_forever(self) -> None:
        for tick in itertools.count(1):
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(TICK_SECONDS):
                    await self._stop.wait()
            if self._stop.is_set():
                return
            try:
                await self._tick(tick)
            except Exception:
                # Nobody awaits this task. If it ended, nothing would be flushed any more.
                log.exception("the disk tier's upkeep failed")

    async def _tick(self, tick: int) -> None:
        """Do the regular work: open the file, detect purges, write deferred changes."""
        if self._disk.file is None and not self._writer.backoff.is_waiting:
            try:
                await self._disk.try_again()
            except FAILURES:
                self._writer.backoff.fail()
        await self._heed_damage()
        await self._apply_purges()
        if tick % FLUSH_TICKS == 0:
            await self._writer.flush()
        if self._ttl_s and self._deletes_expired and tick % EXPIRY_TICKS == 1:
            await self._expire(time.time() - self._ttl_s)

    async def _heed_damage(self) -> None:
        """Detect that the file was replaced, lost its log, or was saved by another process."""
        file = self._disk.file
        with contextlib.suppress(OSError):
            if file is not None and (file.replaced or file.has_lost_log):
                await self._writer.replace(file)
        if self._disk.damaged:
            await self._disk.close_saved()
            self._salvager.start()

    def heed_purges(self) -> bool:
        """Forget what another process has deleted since the last call; return whether it has.

        Call it before anything is served from memory. It costs a fraction of a microsecond.
        """
        signal = self._disk.purge_signal
        number = None if signal is None else signal.poll()
        if number is None:
            return False
        self._purges = number
        self._forget()
        return True

    def _forget(self) -> None:
        self.purge_epoch += 1
        self._pending.forget_backlog()
        self.on_purge()

    async def _apply_purges(self) -> None:
        """Do the same for a purge that was not signalled."""
        self.heed_purges()
        file, purges = self._disk.file, await self._purges_so_far()
        if purges is None:
            return
        if purges != self._purges and file is self._purged_file:
            self._forget()
        # A new file counts from the start.
        self._purges, self._purged_file = purges, file

    async def _purges_so_far(self) -> int | None:
        source = self._disk.file
        if source is None or self._reader.backoff.is_waiting:
            return None
        try:
            return await self._disk.read(partial(purge.count_purges, source))
        except FAILURES:
            # The next read of records finds and reports the failure.
            return None

    async def announce_purge(self) -> bool:
        """Let all processes of this folder forget what they hold in memory.

        Returns whether all could be told; else this one has forgotten it.
        """
        target = self._disk.file
        try:
            if target is not None:
                await self._disk.write(partial(purge.announce, target, 0))
        except FAILURES as error:
            log.warning("a purge cannot be announced: %s", error)
            target = None
        if not self.heed_purges():
            self._forget()
        return target is not None

    async def purge(
        self, choice: purge.PurgeFilter, before: float, is_stopped: Callable[[], bool]
    ) -> int | None:
        """Delete the chosen entries that were stored before a time; return how many.

        The time is in seconds since 1970. `is_stopped` is asked before each transaction. None = not
        all could be deleted now, also while a damaged file is salvaged. Never raises.
        """
        target = self._disk.file
        if target is None or not self._writer.ready:
            return None
        deleted = 0
        try:
            if self._disk.damaged:
                await self._disk.close_saved()
            if self._disk.damaged:
                return None
            for one in (choice, *purge.spillover(choice)):
                steps = purge.delete(target, one, before=before)
                while not is_stopped():
                    count = await self._disk.write(partial(next, steps, None))
                    if count is None:
                        break
                    deleted += count
            if deleted:
                await self._disk.write(partial(purge.announce, target, deleted))
        except FAILURES as error:
            log.warning("deleting what was purged on another node failed: %s", error)
            return None
        self.heed_purges()
        return None if is_stopped() else deleted

    async def _expire(self, before: float) -> None:
        """Delete expired records, unless another process does it now."""
        target = self._disk.file
        if target is None or not self._writer.ready:
            return
        try:
            with contextlib.closing(WriterLock(self.folder.parent / EXPIRY_LOCK, 0)) as lock, lock:
                # Expired records need not be unreadable; they are only too old to be served.
                steps = purge.delete(
                    target, purge.PurgeFilter(stored_before=before), overwrite=False
                )
                while await self._disk.write(partial(next, steps, None)) is not None:
                    pass
        except TimeoutError as error:
            log.debug("deleting expired entries waits: %s", error)
        except FAILURES as error:
            log.warning("deleting expired entries failed: %s", error)
