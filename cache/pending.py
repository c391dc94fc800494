"""What the disk tier has still to write: changes that someone waits for, and others that can wait.

Pure bookkeeping, for one thread: the event loop's.
"""

from collections.abc import Iterable, Mapping
from itertools import islice

from .changes import Changes, Kept, Use

MOST_USES = 50_000
"""The most uses remembered; then those noted first are forgotten."""
MOST_BACKLOG_BYTES = 64 << 20
"""The most of what could not be written that is kept for another try."""
USES_A_WRITE = 5_000
RECORDS_A_WRITE = 2_000


class Pending:
    """Changes on their way to the disk."""

    def __init__(self) -> None:
        self._changes = Changes()
        self.uses: dict[bytes, Use] = {}
        """The last uses, by address: while they are remembered they prevent eviction."""
        self._unwritten: dict[bytes, Use] = {}
        self.backlog: dict[bytes, Kept] = {}
        """Records that were bought and answered with, and that the disk would not take."""
        self._backlog_bytes = 0

    @property
    def changes(self) -> Changes:
        """What goes into the next transaction; add to it."""
        return self._changes

    def take(self) -> Changes:
        """Return what is to be written now; what comes later is another transaction's."""
        taken, self._changes = self._changes, Changes()
        return taken

    def touch(self, addresses: Iterable[bytes], use: Use) -> None:
        """Note that entries were used."""
        new = dict.fromkeys(addresses, use)
        self.uses.update(new)
        self._unwritten.update(new)
        for noted in (self.uses, self._unwritten):
            for address in list(islice(noted, max(0, len(noted) - MOST_USES))):
                del noted[address]

    def failed(self, changes: Changes) -> None:
        """Keep what could not be written, as far as there is room."""
        for (day, partition), usage in changes.usage.items():
            self._changes.count(day, partition, usage)
        for address, kept in changes.records.items():
            size = len(kept.record)
            if address not in self.backlog and self._backlog_bytes + size <= MOST_BACKLOG_BYTES:
                self.backlog[address] = kept
                self._backlog_bytes += size

    def written(self, records: Mapping[bytes, Kept]) -> None:
        """Note that records are on disk: older ones of their addresses need no other try."""
        for address in self.backlog.keys() & records.keys():
            self._backlog_bytes -= len(self.backlog.pop(address).record)

    def take_what_can_wait(self) -> Changes | None:
        """Return a transaction's worth of uses, sums and backlog; None if there is nothing."""
        uses = dict(islice(self._unwritten.items(), USES_A_WRITE))
        if not (uses or self.backlog or self._changes.usage):
            return None
        for address in uses:
            del self._unwritten[address]
        usage, self._changes.usage = self._changes.usage, {}
        records = dict(islice(self.backlog.items(), RECORDS_A_WRITE))
        return Changes(records=records, used=uses, usage=usage)
