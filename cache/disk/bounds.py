"""How many rows `Partitions`, `Usage` and `Hours` get, whatever clients and upstreams name.

Further fields of requests make spaces, clients' keys make namespaces, and open models make both. So
the first so many have a row of their own, and what comes later shares one. Nothing is lost by it:
records are found by their addresses, and the sums stay exact. The tables themselves are asked each
time, so the limits hold for all processes together, and over restarts.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from embedding_proxy.cache.key import OTHER, OTHER_NAMESPACE, Partition
from embedding_proxy.cache.ledger import (
    HOURS_KEPT,
    MAX_HOUR_LINES,
    MAX_LEDGER_KEYS,
    LedgerKey,
    Usage,
)

from .schema import Sql

MAX_PARTITIONS = 10_000
"""The most partitions. Further ones share one for each width, in OTHER_NAMESPACE."""
MAX_PARAMETER_SETS = 100
"""The most spaces of one model with parameters in a namespace. Further ones share one."""

_FIND = "SELECT id FROM Partitions WHERE (namespace, space, dimensions) = (?, ?, ?)"
_ADD = "INSERT INTO Partitions (namespace, space, dimensions) VALUES (?, ?, ?)"


def partition_id(sql: Sql, partition: Partition) -> int:
    """Return the number of a partition. A new one gets its own number, or shares one.

    `sql` runs statements in a transaction that may write. The space's label is in its present form.
    """
    row = sql(_FIND, partition).fetchone()
    if row is None:
        partition = _shared(sql, partition)
        row = sql(_FIND, partition).fetchone()
    if row is None:
        sql(_ADD, partition)
        row = sql(_FIND, partition).fetchone()
    return int(row[0])


def rest_of(space: str) -> str | None:
    """Return the label that further parameter sets of a model share; None without parameters.

    No space has it as its own: each parameter in a label has a value.

    >>> rest_of("m?task=~62b59ddfc5c4d697"), rest_of("m")
    ('m?other', None)
    """
    model, mark, _ = space.partition("?")
    return f"{model}?{OTHER}" if mark else None


def _shared(sql: Sql, partition: Partition) -> Partition:
    """Return the partition that stands for a new one: itself as long as there is room."""
    if partition.namespace == OTHER_NAMESPACE:
        return partition
    rest = rest_of(partition.space)
    if rest is not None and partition.space != rest:
        model = rest.partition("?")[0]
        # The labels with parameters: "@" comes next after "?".
        ((sets,),) = sql(
            "SELECT count(DISTINCT space) FROM Partitions"
            " WHERE namespace = ? AND space > ? AND space < ? AND space != ?",
            (partition.namespace, f"{model}?", f"{model}@", rest),
        )
        if sets >= MAX_PARAMETER_SETS:
            partition = partition._replace(space=rest)
            if sql(_FIND, partition).fetchone() is not None:
                return partition
    # The largest number is at least the count, and is read at once.
    ((largest,),) = sql("SELECT coalesce(max(id), 0) FROM Partitions")
    if largest < MAX_PARTITIONS:
        return partition
    ((count,),) = sql("SELECT count(*) FROM Partitions")
    if count < MAX_PARTITIONS:
        return partition
    return Partition(OTHER_NAMESPACE, OTHER, partition.dimensions)


def usage_rows(
    sql: Sql,
    usage: Mapping[tuple[int, LedgerKey], Usage],
    ids: Mapping[Partition | None, int | None],
) -> Iterator[tuple[Any, ...]]:
    """Yield the rows to add to table `Usage`: day, partition, model, provider, client, sums.

    A heading without a row on its day is summed under its `rest` once the day has MAX_LEDGER_KEYS
    rows. `ids` are the numbers of the partitions in `usage`.
    """
    rows: dict[int, int] = {}
    new: set[tuple[Any, ...]] = set()
    rest_id: int | None = None
    for (day, heading), sums in usage.items():
        key = (day, ids[heading.partition], *heading[1:])
        if heading != heading.rest and key not in new and not _is_there(sql, key):
            if day not in rows:
                ((rows[day],),) = sql("SELECT count(*) FROM Usage WHERE day = ?", (day,))
            if rows[day] >= MAX_LEDGER_KEYS:
                rest = heading.rest
                rest_id = rest_id or partition_id(sql, rest.partition)
                key = (day, rest_id, *rest[1:])
            else:
                rows[day] += 1
                new.add(key)
        yield (*key, *sums)


def hour_rows(
    sql: Sql, usage: Mapping[tuple[int, LedgerKey], Usage], now_hour: int
) -> Iterator[tuple[Any, ...]]:
    """Yield the rows of table `Hours` to be added: hour, model, client, sums.

    Sums of today belong to the present hour, and those of an earlier day, which are written late,
    to its last one; so the hours of a day come to the sums of the day. What is older than
    HOURS_KEPT has no hour. Beyond MAX_HOUR_LINES rows, what is new is summed in one.
    """
    sums: dict[tuple[int, str, str], Usage] = {}
    for (day, heading), added in usage.items():
        key = min(now_hour, 24 * day + 23), heading.model, heading.client
        if key[0] > now_hour - HOURS_KEPT:
            sums[key] = sums[key].plus(added) if key in sums else added
    rows: dict[int, int] = {}
    for key, added in sums.items():
        hour, *names = key
        if hour not in rows:
            ((rows[hour],),) = sql("SELECT count(*) FROM Hours WHERE hour = ?", (hour,))
        found = sql("SELECT 1 FROM Hours WHERE (hour, model, client) = (?, ?, ?)", key)
        if found.fetchone() is None:
            rows[hour] += 1
            if rows[hour] > MAX_HOUR_LINES:
                names = [OTHER, OTHER]
        yield (hour, *names, *added)


def _is_there(sql: Sql, key: tuple[Any, ...]) -> bool:
    row = sql(
        "SELECT 1 FROM Usage WHERE (day, partition, model, provider, client) = (?, ?, ?, ?, ?)", key
    )
    return row.fetchone() is not None
