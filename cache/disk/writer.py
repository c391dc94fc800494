"""What the disk tier has still to write: changes that someone waits for, and others that can wait.

The last uses of entries are among the others; they protect from eviction before they are written.
Pure bookkeeping, for one thread: the event loop's.

The writing half of the disk tier: all that waits goes into one transaction, one at a time.

What could not be written is kept in memory, as far as there is room, and tried again.
"""

import asyncio
import logging
import time
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from itertools import islice

from embedding_proxy.providers.backoff import THRESHOLD, Backoff

from .changes import Changes, Kept, Use
from .connection import Disk
from .database import FAILURES, Database, FileReplaced, Timeout, is_damage
from .eviction import StoreFull

MAX_USES = 50_000
"""About how many uses are remembered at most. Of those noted last, at least half as many are."""
MOST_BACKLOG_BYTES = 64 << 20
"""The most of what could not be written that is kept for another try."""
USES_A_WRITE = 5_000
RECORDS_A_WRITE = 2_000


class Uses(Mapping[bytes, Use]):
    """Uses by address, in two generations: to note thousands costs no more than two calls.

    Each is given out once to be written, and remembered still.
    """

    def __init__(self) -> None:
        self._young: dict[bytes, Use] = {}
        self._old: dict[bytes, Use] = {}
        self._unwritten: dict[bytes, object] = {}

    def note(self, addresses: Iterable[bytes], use: Use) -> None:
        """Note that entries were used."""
        new = dict.fromkeys(addresses, use)
        self._young.update(new)
        self._unwritten.update(new)
        if 2 * len(self._young) > MAX_USES:
            self._old, self._young = self._young, {}
            self._unwritten = {a: None for a in self._unwritten if a in self._old}

    def take(self, most: int) -> dict[bytes, Use]:
        """Return uses that were not given out before, oldest first, at most so many."""
        taken = {address: self[address] for address in islice(self._unwritten, most)}
        for address in taken:
            del self._unwritten[address]
        return taken

    def __getitem__(self, address: bytes) -> Use:
        use = self._young.get(address)
        return self._old[address] if use is None else use

    def __iter__(self) -> Iterator[bytes]:
        return iter(self._old | self._young)

    def __len__(self) -> int:
        return len(self._old.keys() | self._young.keys())


class Pending:
    """Changes on their way to the disk."""

    def __init__(self) -> None:
        self._changes = Changes()
        self.uses = Uses()
        self._most_records = RECORDS_A_WRITE
        self.backlog: dict[bytes, Kept] = {}
        """Records that were bought and answered with, and that the disk would not take."""
        self._backlog_bytes = 0

    @property
    def changes(self) -> Changes:
        """What goes into the next transaction; add to it."""
        return self._changes

    @property
    def is_empty(self) -> bool:
        """Whether nothing waits that would be lost: neither records nor sums."""
        return not (self.backlog or self._changes.usage or self._changes.records)

    def take(self) -> Changes:
        """Return what is to be written now; what comes later is another transaction's."""
        taken, self._changes = self._changes, Changes()
        return taken

    def failed(self, changes: Changes) -> None:
        """Keep what could not be written, as far as there is room."""
        for (day, heading), usage in changes.usage.items():
            self._changes.count(day, heading, usage)
        if changes.records and changes.records.keys() <= self.backlog.keys():
            # What was tried again and failed again goes behind the rest, and in smaller lots: one
            # record that can never be written must not keep all others out.
            self._most_records = max(1, self._most_records // 2)
        for address, kept in changes.records.items():
            known = [self.backlog.pop(address)] if address in self.backlog else []
            self._backlog_bytes -= sum(len(old.record) for old in known)
            newer = max(*known, kept, key=lambda one: one.stored or 0.0) if known else kept
            if self._backlog_bytes + len(newer.record) <= MOST_BACKLOG_BYTES:
                self.backlog[address] = newer
                self._backlog_bytes += len(newer.record)

    def forget_backlog(self) -> None:
        """Drop what could not be written: what was purged must not come back with it."""
        self.backlog.clear()
        self._backlog_bytes = 0

    def written(self, records: Mapping[bytes, Kept]) -> None:
        """Note that records are on disk: older ones of their addresses need no other try."""
        if records:
            self._most_records = RECORDS_A_WRITE
        for address in self.backlog.keys() & records.keys():
            self._backlog_bytes -= len(self.backlog.pop(address).record)

    def take_what_can_wait(self) -> Changes | None:
        """Return a transaction's worth of uses, sums and backlog; None if there is nothing."""
        uses = self.uses.take(USES_A_WRITE)
        if not (uses or self.backlog or self._changes.usage):
            return None
        usage, self._changes.usage = self._changes.usage, {}
        records = dict(islice(self.backlog.items(), self._most_records))
        return Changes(records=records, keep_newer=True, used=uses, usage=usage)


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
