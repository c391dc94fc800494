"""What the disk tier has still to write: changes that someone waits for, and others that can wait.

The last uses of entries are among the others; they protect from eviction before they are written.
Pure bookkeeping, for one thread: the event loop's.
"""

from collections.abc import Iterable, Iterator, Mapping
from itertools import islice

from .changes import Changes, Kept, Use

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
