"""What was paid, to whom and by whom, and what was not: the sums of requests, and those on disk.

Counting adds to numbers in memory, and they are written with the next change or in a while. A
charge is counted as soon as it is known, so before what was bought with it is written.
"""

import enum
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, NamedTuple, Protocol, TypeAlias

import orjson

from cache.disk.schema import Sql
from providers.base import Account, Bill, Embedded, Vector

from .key import Key
from .row import OTHER, OTHER_NAMESPACE, Partition
from .usage import Usage

MAX_HEADINGS = 1000
"""Headings that have a line of their own: of a process since its start, and of a day on disk."""


class Heading(NamedTuple):
    """What one line of the ledger is about, beside the day."""

    partition: Partition
    model: str = ""
    """The name that clients asked for."""
    provider: str = ""
    """Who was paid; empty where nobody was."""
    client: str = ""
    """The name of a client's key; empty where none is asked for."""

    @property
    def rest(self) -> "Heading":
        """The heading under which this one is summed where there are too many others.

        The provider stays: providers come from the configuration, all else may be a client's word.
        """
        return Heading(Partition(OTHER_NAMESPACE, OTHER, 0), OTHER, self.provider, OTHER)


class Again(Protocol):
    """The same request once more; see `repeat`."""

    async def vectors(self) -> Sequence[Vector] | None:
        """Return what it is answered with now, and count it; None if it has to be asked anew.

        Where there are many, others get their turn.
        """

    def count(self) -> None:
        """Count an answer that is given."""

    def serials_of(self, vectors: Sequence[Vector]) -> Sequence[int] | None:
        """Return by which numbers `still` knows an answer again; None if it is another already."""

    def still(self, serials: Sequence[int]) -> bool:
        """Tell whether the answer is the same as ever; if so, count it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Answered(Embedded):
    """An answer, and its sums."""

    usage: Usage
    keys: Sequence[Key] = ()
    """Where each vector is kept; empty where more than one look-up was needed."""
    again: Again | None = None
    """For the same request once more; None where that has to be asked anew."""


def ledger_key(partition: Partition, account: Account, provider: str = "") -> Heading:
    """Return where a request's inputs, or what a provider charged for them, are counted."""
    return Heading(partition, account.model, provider, account.client)


def charge_usage(bill: Bill) -> Usage:
    """Return the sums of one charge."""
    return Usage(tokens_billed=sum(bill.tokens), nanodollars_billed=sum(bill.nanodollars))


class By(enum.StrEnum):
    """What the ledger can be summed by: columns of its table, and of that of the partitions."""

    DAY = "day"
    MODEL = "model"
    PROVIDER = "provider"
    CLIENT = "client"
    NAMESPACE = "namespace"
    SPACE = "space"


Line: TypeAlias = tuple[tuple[Any, ...], Usage]
"""What some sums are about, and the sums."""


_IN_REST = {
    By.MODEL: f"'{OTHER}'",
    By.CLIENT: f"'{OTHER}'",
    By.SPACE: f"'{OTHER}'",
    By.NAMESPACE: f"'{OTHER_NAMESPACE}'",
}
"""What lines beyond a limit are called; the other columns keep what they have."""


def read(
    sql: Sql,
    by: Sequence[By],
    max_lines: int | None = None,
    preferred: Mapping[By, Collection[str]] = MappingProxyType({}),
) -> list[Line]:
    """Return the sums on disk by what is named in `by`, in that order; days count from 1970, UTC.

    With `max_lines`, the lines beyond so many are summed under OTHER, one for each provider and
    day. First come those whose names are all among the `preferred` ones, then those that were
    counted on the earliest day. A line that is beyond the limit stays there, so no sum shrinks.

    What running proxies have not written yet, ten seconds' worth at most, is not in it. Raises
    FAILURES.
    """
    names = ", ".join(by)
    sums = ", ".join(f"sum({name}) AS {name}" for name in Usage._fields)
    groups = f" GROUP BY {names}" if by else ""
    table = f"FROM Usage LEFT JOIN Partitions ON id = partition{groups}"
    order = f" ORDER BY {names}" if by else ""
    statement = f"SELECT {', '.join((*by, sums))} {table}{order}"
    values: dict[str, Any] = {}
    if by and max_lines is not None:
        terms = [f"{column} IN (SELECT value FROM json_each(:{column}))" for column in preferred]
        values = {
            column.value: orjson.dumps(list(preferred[column])).decode() for column in preferred
        }
        rank = f"({' AND '.join(terms) or '1'}) DESC, first_day, {names}"
        values["max_lines"] = max_lines
        shown = ", ".join(
            f"CASE WHEN place <= :max_lines THEN {column} ELSE {_IN_REST.get(column, column)} END"
            f" AS {column}_shown"
            for column in by
        )
        shown_names = ", ".join(f"{column}_shown" for column in by)
        statement = (
            f"WITH line AS (SELECT {names}, {sums}, min(day) AS first_day {table}),"
            f" ranked AS (SELECT *, row_number() OVER (ORDER BY {rank}) AS place FROM line)"
            f" SELECT {shown}, {sums} FROM ranked GROUP BY {shown_names} ORDER BY {shown_names}"
        )
    rows = sql(statement, values)
    # Without groups, the sums of nothing are one row of NULLs.
    return [(tuple(row[: len(by)]), Usage(*row[len(by) :])) for row in rows if row[-1] is not None]


def copies_agree(sql: Sql) -> bool:
    """Tell whether both copies of the sums on disk say the same (see `disk.schema`).

    SQLite notices a page that is no page, but not a number that has changed. A file of an earlier
    layout has one copy. Raises FAILURES.
    """
    if not sql("SELECT 1 FROM sqlite_master WHERE name = 'Usage_copy'").fetchall():
        return True
    sums = ", ".join(f"total({name})" for name in Usage._fields)
    # SQLite prefers the index, but for a condition that the table alone can answer.
    first, second = (
        sql(f"SELECT count(*), {sums} FROM Usage {which}").fetchall()
        for which in ("WHERE day >= 0", "INDEXED BY Usage_copy")
    )
    return bool(first == second)
