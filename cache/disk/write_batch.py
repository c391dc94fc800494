"""The changes of one transaction on the disk tier, and the SQL statements that make them."""

import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from embedding_proxy.cache.key import Partition
from embedding_proxy.cache.ledger import HOURS_KEPT, LedgerKey, Usage
from embedding_proxy.providers.base import current_label

from . import bounds

# Writes a record whether or not there is one; a row that was anything else becomes raw bytes.
_PUT = """
    INSERT INTO Cache (key, raw, store_time, access_time, mode, value) VALUES (?, 1, ?, ?, 1, ?)
    ON CONFLICT (key, raw) DO UPDATE SET
        store_time = excluded.store_time, access_time = excluded.access_time,
        expire_time = NULL, size = 0, mode = 1, filename = NULL, value = excluded.value
"""
# The same, but for those where there is a record that was stored at that time or later.
_PUT_NEWER = f"""{_PUT}
    WHERE excluded.store_time > coalesce(CAST(Cache.store_time AS REAL), 0)
    OR Cache.mode != 1 OR typeof(Cache.value) != 'blob'
"""
# The time is that of the record that is there: the one that was given may have been left out.
_ENTER = """
    INSERT INTO Entries (id, partition, stored, used)
    SELECT rowid, ?, coalesce(CAST(1000 * CAST(store_time AS REAL) AS INTEGER), ?), ? FROM Cache
    WHERE key = ? AND raw = 1
    ON CONFLICT (id) DO UPDATE SET
        partition = coalesce(excluded.partition, partition),
        stored = excluded.stored, used = excluded.used
"""
_ENTER_CHANGED = f"{_ENTER} WHERE excluded.stored != Entries.stored"
_DELETE = "DELETE FROM Cache WHERE key = ? AND raw = 1 AND value = ?"
# An entry of an early version learns here which partition it belongs to.
_TOUCH = """
    UPDATE Entries SET used = max(used, ?), partition = coalesce(partition, ?)
    WHERE id = (SELECT rowid FROM Cache WHERE key = ? AND raw = 1)
    AND (used < ? OR partition IS NULL)
"""
_COUNT = """
    INSERT INTO Usage VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)
    ON CONFLICT (day, partition, model, provider, client) DO UPDATE SET
        hits = hits + excluded.hits, joins = joins + excluded.joins,
        misses = misses + excluded.misses, duplicates = duplicates + excluded.duplicates,
        tokens_saved = tokens_saved + excluded.tokens_saved,
        tokens_billed = tokens_billed + excluded.tokens_billed,
        nanodollars_saved = nanodollars_saved + excluded.nanodollars_saved,
        nanodollars_billed = nanodollars_billed + excluded.nanodollars_billed
"""
_COUNT_HOUR = f"""
    INSERT INTO Hours VALUES (?, ?, ?, {", ".join("?" * len(Usage._fields))})
    ON CONFLICT (hour, model, client) DO UPDATE SET
        {", ".join(f"{name} = {name} + excluded.{name}" for name in Usage._fields)}
"""
# A day's worth at a time: after a long rest the first write has much to delete.
_FORGET_HOURS = """
    DELETE FROM Hours WHERE hour <= ? AND hour < (SELECT min(hour) FROM Hours) + 24
"""


class StoredRecord(NamedTuple):
    """A record that was read."""

    record: bytes
    stored: float
    """When it was bought, in seconds since 1970."""


class PendingRecord(NamedTuple):
    """A record to be written."""

    record: bytes
    partition: Partition | None
    stored: float | None = None
    """When it was bought, in seconds since 1970; None = now."""


class Use(NamedTuple):
    """A read of an entry."""

    at: int
    """Milliseconds since 1970."""
    partition: Partition | None


@dataclass(slots=True, kw_only=True)
class WriteBatch:
    """The changes of one transaction."""

    records: dict[bytes, PendingRecord] = field(default_factory=dict)
    """Records to write, by address."""
    deletions: list[tuple[bytes, bytes]] = field(default_factory=list)
    """Records to delete: address and record, so that a newer record at the address stays."""
    keep_newer: bool = False
    """Whether existing records stay unless they are older; otherwise all are replaced."""
    used: dict[bytes, Use] = field(default_factory=dict)
    """Uses to note, by address."""
    usage: dict[tuple[int, LedgerKey], Usage] = field(default_factory=dict)
    """Usage to add to the sums, by day (since 1970, UTC) and heading."""

    def parts(self, max_bytes: int) -> "Iterator[WriteBatch]":
        """Yield batches that together make the same changes, each of about so many bytes."""
        part, size = replace(self, records={}), 0
        for address, pending in self.records.items():
            if size and size + len(pending.record) > max_bytes:
                yield part
                part, size = WriteBatch(keep_newer=self.keep_newer), 0
            part.records[address] = pending
            size += len(pending.record)
        yield part

    def count(self, day: int, heading: LedgerKey, usage: Usage) -> None:
        """Add to the sums of a day."""
        sums = self.usage.get((day, heading))
        self.usage[day, heading] = usage if sums is None else sums.plus(usage)

    def delete_records(self, connection: Any) -> None:  # noqa: ANN401 - an SQLite connection
        """Delete the records of `deletions`."""
        if self.deletions:
            connection.executemany(_DELETE, self.deletions)

    def put_sums(self, connection: Any, now_hour: int | None = None) -> None:  # noqa: ANN401
        """Add to the sums; to those of hours (since 1970, UTC) only where the present one is given.

        Sums that are known by day alone, as those of another file, have no hour.
        """
        ids = _partition_ids(connection, {heading.partition for _, heading in self.usage})
        sql = connection.execute
        connection.executemany(_COUNT, list(bounds.usage_rows(sql, self.usage, ids)))
        if self.usage and now_hour is not None:
            put_hours(connection, bounds.hour_rows(sql, self.usage, now_hour))
            sql(_FORGET_HOURS, (now_hour - HOURS_KEPT,))

    def put_uses(self, connection: Any, interval_ms: int) -> None:  # noqa: ANN401
        """Note the times of uses, if the last noted use is older."""
        ids = _partition_ids(connection, {use.partition for use in self.used.values()})
        connection.executemany(
            _TOUCH,
            ((use.at, ids[use.partition], a, use.at - interval_ms) for a, use in self.used.items()),
        )

    def put_records(self, connection: Any) -> None:  # noqa: ANN401
        """Write the records and their rows of `Entries`."""
        ids = _partition_ids(connection, {pending.partition for pending in self.records.values()})
        now = time.time()
        times = {
            a: now if pending.stored is None else pending.stored
            for a, pending in self.records.items()
        }
        connection.executemany(
            _PUT_NEWER if self.keep_newer else _PUT,
            ((a, times[a], now, pending.record) for a, pending in self.records.items()),
        )
        connection.executemany(
            _ENTER_CHANGED if self.keep_newer else _ENTER,
            (
                (ids[pending.partition], int(1000 * times[a]), int(1000 * now), a)
                for a, pending in self.records.items()
            ),
        )


def put_hours(connection: Any, rows: Iterable[tuple[Any, ...]]) -> None:  # noqa: ANN401
    """Add rows to table `Hours`: hour, model, client, sums. They are read to the end first."""
    connection.executemany(_COUNT_HOUR, list(rows))


def _partition_ids(
    connection: Any,  # noqa: ANN401
    partitions: Iterable[Partition | None],
) -> dict[Partition | None, int | None]:
    """Return the numbers of partitions. New ones get a number, see `bounds`."""
    ids: dict[Partition | None, int | None] = {None: None}
    for partition in partitions:
        if partition is None:
            continue
        # An archive of an earlier version names spaces with the values of their parameters.
        current = partition._replace(space=current_label(partition.space))
        ids[partition] = bounds.partition_id(connection.execute, current)
    return ids
