"""What a store holds and what it has saved, summed by partition."""

from dataclasses import dataclass

from cache.disk.database import Database
from cache.row import UNKNOWN, Partition
from cache.usage import Usage


@dataclass(frozen=True, slots=True)
class Held:
    """The sums of one partition; times are seconds since 1970, None without entries."""

    partition: Partition
    entries: int
    bytes: int
    """Of the records; their pages take about 7 % more."""
    oldest: float | None
    newest: float | None
    last_used: float | None
    usage: Usage


@dataclass(frozen=True, slots=True)
class Stats:
    """The sums of a store."""

    file_bytes: int
    """What the database and its write-ahead log take on disk."""
    since_day: int | None
    """The first day that was counted, in days since 1970; None if nothing was."""
    held: tuple[Held, ...]

    @property
    def entries(self) -> int:
        """All entries."""
        return sum(one.entries for one in self.held)

    @property
    def usage(self) -> Usage:
        """The sums of all partitions."""
        total = Usage()
        for one in self.held:
            total = total.plus(one.usage)
        return total


def gather(database: Database) -> Stats:
    """Return the sums of a store. Raises FAILURES."""
    sql = database.sql
    partitions = {
        number: Partition(*columns)
        for number, *columns in sql("SELECT id, namespace, space, dimensions FROM Partitions")
    }
    usage = {
        number: Usage(*sums)
        for number, *sums in sql(
            f"SELECT partition, {', '.join(f'sum({name})' for name in Usage._fields)}"
            " FROM Usage GROUP BY partition"
        )
    }
    held = []
    entered = {
        number: columns
        for number, *columns in sql(
            "SELECT partition, count(*), min(stored), max(stored), max(used)"
            " FROM Entries GROUP BY partition"
        )
    }
    for number in sorted(entered.keys() | usage.keys(), key=lambda n: n or 0):
        partition = partitions.get(number, UNKNOWN)
        count, *times = entered.get(number, (0, None, None, None))
        oldest, newest, last_used = (None if ms is None else ms / 1000 for ms in times)
        size = count * (40 + 4 * partition.dimensions)
        sums = usage.get(number, Usage())
        held.append(Held(partition, count, size, oldest, newest, last_used, sums))
    ((since,),) = sql("SELECT min(day) FROM Usage")
    files = database.folder.glob(f"{database.path.name}*")
    on_disk = sum(file.stat().st_size for file in files if not file.name.endswith("-shm"))
    return Stats(on_disk, since, tuple(held))
