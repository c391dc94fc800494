"""Writes the changes of the disk tier, many in one transaction, one transaction at a time.

`Pending` collects the changes: those that somebody waits for, and those that can be deferred (uses
of entries, ledger sums, records of failed writes). `Writer` writes them. A record that cannot be
written stays in memory within a bound and is tried again. The last uses of entries protect from
eviction before they are written, too.

For one thread: the event loop's.
"""

import asyncio
import logging
import time
from collections.abc import Collection, Iterator, Mapping
from functools import partial
from itertools import islice

from embedding_proxy.providers.failure_backoff import THRESHOLD, Backoff

from .connection import Disk
from .database import FAILURES, Database, FileReplaced, Timeout, is_damage
from .eviction import StoreFull
from .write_batch import PendingRecord, Use, WriteBatch

log = logging.getLogger("embedding_proxy.store")

MAX_USES = 50_000
"""About how many uses are kept at most. Of the latest ones, at least half as many are."""
MAX_BACKLOG_BYTES = 64 << 20
"""Bytes of records of failed writes that are kept for another attempt."""
USES_A_WRITE = 5_000
RECORDS_A_WRITE = 2_000
LAST_TRIES = 3
WARNING_SECONDS = 10.0
"""The same failure is logged once in so many seconds."""


class AccessLog(Mapping[bytes, Use]):
    """The latest uses by address, in two generations: noting thousands takes two calls.

    `take` returns each use once, to be written; the mapping keeps it.
    """

    def __init__(self) -> None:
        self._young: dict[bytes, Use] = {}
        self._old: dict[bytes, Use] = {}
        self._unwritten: dict[bytes, object] = {}

    def note(self, addresses: Collection[bytes], use: Use) -> None:
        """Note that entries were used."""
        if len(addresses) == 1:
            (address,) = addresses
            self._young[address] = self._unwritten[address] = use
        else:
            new = dict.fromkeys(addresses, use)
            self._young.update(new)
            self._unwritten.update(new)
        if 2 * len(self._young) > MAX_USES:
            self._old, self._young = self._young, {}
            self._unwritten = {a: None for a in self._unwritten if a in self._old}

    def take(self, max_uses: int) -> dict[bytes, Use]:
        """Return at most `max_uses` uses that were not taken before, oldest first."""
        uses = {address: self[address] for address in islice(self._unwritten, max_uses)}
        for address in uses:
            del self._unwritten[address]
        return uses

    def __getitem__(self, address: bytes) -> Use:
        use = self._young.get(address)
        return self._old[address] if use is None else use

    def __iter__(self) -> Iterator[bytes]:
        return iter(self._old | self._young)

    def __len__(self) -> int:
        return len(self._old.keys() | self._young.keys())


class Pending:
    """Changes that are not on disk yet."""

    def __init__(self) -> None:
        self._changes = WriteBatch()
        self.uses = AccessLog()
        self._most_records = RECORDS_A_WRITE
        self.backlog: dict[bytes, PendingRecord] = {}
        """Records, by address, that clients were answered with and whose write failed."""
        self._backlog_bytes = 0

    @property
    def changes(self) -> WriteBatch:
        """The changes of the next transaction; callers add to them."""
        return self._changes

    @property
    def is_empty(self) -> bool:
        """Whether no record and no ledger sum is pending. Uses may be: they can be lost."""
        return not (self.backlog or self._changes.usage or self._changes.records)

    def take(self) -> WriteBatch:
        """Return the changes to write now; later ones go into the next transaction."""
        batch, self._changes = self._changes, WriteBatch()
        return batch

    def keep_failed(self, changes: WriteBatch) -> None:
        """Keep changes whose write failed: all sums, and records up to MAX_BACKLOG_BYTES."""
        for (day, heading), usage in changes.usage.items():
            self._changes.count(day, heading, usage)
        if changes.records and changes.records.keys() <= self.backlog.keys():
            # A record that failed again goes behind the others, in smaller transactions:
            # one record that can never be written must not block all others.
            self._most_records = max(1, self._most_records // 2)
        for address, record in changes.records.items():
            older = [self.backlog.pop(address)] if address in self.backlog else []
            self._backlog_bytes -= sum(len(old.record) for old in older)
            newer = (
                max(*older, record, key=lambda candidate: candidate.stored or 0.0)
                if older
                else record
            )
            if self._backlog_bytes + len(newer.record) <= MAX_BACKLOG_BYTES:
                self.backlog[address] = newer
                self._backlog_bytes += len(newer.record)

    def forget_backlog(self) -> None:
        """Drop the records of failed writes, so that they do not restore what was purged."""
        self.backlog.clear()
        self._backlog_bytes = 0

    def note_written(self, records: Mapping[bytes, PendingRecord]) -> None:
        """Remove records that are on disk now from the backlog."""
        if records:
            self._most_records = RECORDS_A_WRITE
        for address in self.backlog.keys() & records.keys():
            self._backlog_bytes -= len(self.backlog.pop(address).record)

    def take_deferred(self) -> WriteBatch | None:
        """Return one transaction of uses, sums and backlog; None if there is none."""
        uses = self.uses.take(USES_A_WRITE)
        if not (uses or self.backlog or self._changes.usage):
            return None
        usage, self._changes.usage = self._changes.usage, {}
        records = dict(islice(self.backlog.items(), self._most_records))
        return WriteBatch(records=records, keep_newer=True, used=uses, usage=usage)


class Writer:
    """Writes pending changes to the file. For one thread: the event loop's. Never raises."""

    def __init__(self, disk: Disk) -> None:
        self._disk = disk
        self.backoff = Backoff(threshold=THRESHOLD)
        self.pending = Pending()
        self._warned = "", 0.0
        # The result for the callers whose changes are pending, and the task that writes.
        self._commit: asyncio.Future[bool] | None = None
        self._drain: asyncio.Task[None] | None = None

    @property
    def ready(self) -> bool:
        """Whether there is a file, and no backoff from it."""
        return self._disk.file is not None and not self.backoff.is_waiting

    async def commit(self) -> bool:
        """Wait until all changes so far were written; return whether they are on disk."""
        if self._commit is None:
            self._commit = asyncio.get_running_loop().create_future()
        commit = self._commit
        if self._drain is None:
            self._drain = asyncio.create_task(self._write_out())
        return await asyncio.shield(commit)

    async def _write_out(self) -> None:
        while self._commit is not None:
            changes = self.pending.take()
            commit, self._commit = self._commit, None
            is_written = False
            try:
                is_written = await self.write(changes)
            except Exception:
                # Waiting callers need a result, and later ones a task that writes.
                log.exception("writing to the disk tier failed")
            finally:
                commit.set_result(is_written)
        self._drain = None

    async def write(self, changes: WriteBatch) -> bool:
        """Write changes and return whether all are on disk. Those that failed stay pending."""
        file = self._disk.file
        parts = [changes] if file is None else list(changes.parts(file.most_bytes))
        for index, part in enumerate(parts):
            if not await self._write_part(part):
                for remaining in parts[index:]:
                    self.pending.keep_failed(remaining)
                return False
        return True

    async def _write_part(self, changes: WriteBatch) -> bool:
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
                # If the sums can be written, the records fail and not the disk.
                if not isinstance(error, StoreFull) and not await self._write_sums(
                    target, changes, error
                ):
                    self.backoff.fail()
                return False
            except Exception:
                self.backoff.fail()
                log.exception("writing to the disk tier failed")
                return False
            self.backoff.succeed()
            self.pending.note_written(changes.records)
            return True
        return False

    async def _write_sums(
        self, target: Database, changes: WriteBatch, error: BaseException
    ) -> bool:
        """Write the sums of changes that failed: a record that cannot be stored was paid for, too.

        Returns whether there were sums and they are on disk.
        """
        if not (changes.records and changes.usage) or isinstance(error, TimeoutError | Timeout):
            # Waiting for the same lock a second time would fail, too.
            return False
        try:
            await self._disk.write(partial(target.write, WriteBatch(usage=changes.usage)))
        except FAILURES:
            return False
        changes.usage = {}
        return True

    def _warn(self, error: BaseException, count: int) -> None:
        """Log what failed; the same failure once in WARNING_SECONDS."""
        why = str(error) or "it is locked"
        now = time.monotonic()
        if self._warned[0] != why or now >= self._warned[1]:
            self._warned = why, now + WARNING_SECONDS
            log.warning(
                "writing to the disk tier failed, records that wait in memory: %d: %s", count, why
            )

    async def finish(self) -> None:
        """Wait for the current transaction, then write all that is deferred, despite any backoff.

        What fails now is lost. So there are LAST_TRIES attempts, and they may use the space that is
        otherwise left free on the file system.
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
            "%d records could not be kept on disk%s: they are lost",
            *(len(self.pending.backlog), f", nor {sums} lines of the ledger" if sums else ""),
        )

    async def flush(self) -> None:
        """Write deferred changes, some thousand rows in each transaction."""
        while self.ready:
            changes = self.pending.take_deferred()
            if changes is None or not await self.write(changes):
                return

    async def replace(self, old: Database) -> None:
        """Close a file that cannot be used any more, and open a new one."""
        try:
            await self._disk.replace(old)
        except FAILURES as error:
            self.backoff.fail()
            log.error("the disk tier cannot be opened anew: %s", error)  # noqa: TRY400 - a line
