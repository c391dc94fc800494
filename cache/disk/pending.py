"""What the disk tier has still to write: changes that someone waits for, and others that can wait.

Pure bookkeeping, for one thread: the event loop's.
"""

from collections.abc import Mapping
from itertools import islice

from cache.disk.uses import Uses

from .changes import Changes, Kept

MOST_BACKLOG_BYTES = 64 << 20
"""The most of what could not be written that is kept for another try."""
USES_A_WRITE = 5_000
RECORDS_A_WRITE = 2_000


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
