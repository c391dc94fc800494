"""What was paid, to whom and by whom, and what was not: the sums of requests, and those on disk.

Counting adds to numbers in memory, and they are written with the next change or in a while. A
charge is counted as soon as it is known, so before what was bought with it is written.
"""

import enum
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, NamedTuple, Protocol, TypeAlias

import orjson

from cache.disk.schema import Sql
from providers.base import Account, Bill, Embedded, Outcome, Vector, nanodollars

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


class Headings:
    """The headings that came first: each has a line of its own, further ones are summed."""

    def __init__(self) -> None:
        self._known: set[Heading] = set()

    def line_of(self, heading: Heading) -> Heading:
        """Return the heading to count under: the same one, or `rest` of it."""
        if heading in self._known:
            return heading
        if len(self._known) >= MAX_HEADINGS:
            return heading.rest
        self._known.add(heading)
        return heading


Count: TypeAlias = Callable[[Heading, Usage], None]
"""Adds to the ledger."""


class Again(Protocol):
    """The same request once more; see `cached_hit`."""

    async def vectors(self) -> Sequence[Vector] | None:
        """Return what it is answered with now, and count it; None if it has to be asked anew.

        Where there are many, others get their turn.
        """

    def count(self) -> None:
        """Count an answer that is given."""

    def reuse_of(self, vectors: Sequence[Vector]) -> Callable[[], bool] | None:
        """Return what tells whether these vectors are still the answer, and if so, counts it.

        None if they are not the answer any more.
        """


@dataclass(frozen=True, slots=True, kw_only=True)
class Answered(Embedded):
    """An answer, and its sums."""

    usage: Usage
    keys: Sequence[Key] = ()
    """Where each vector is kept; empty where more than one look-up was needed."""
    again: Again | None = None
    """For the same request once more; None where that has to be asked anew."""


def answered(embedded: Embedded, usage: Usage) -> Answered:
    """Return an answer with its sums."""
    return Answered(
        vectors=embedded.vectors,
        tokens=embedded.tokens,
        counted=embedded.counted,
        providers=embedded.providers,
        outcomes=embedded.outcomes,
        usage=usage,
    )


class Purchase:
    """What one fill buys; charges and inputs are counted as they come."""

    def __init__(self, count: Count, partition: Partition, account: Account) -> None:
        self._count = count
        self._partition = partition
        self._account = account
        self._sellers: dict[int, str] = {}
        self._unplaced: list[tuple[str, Usage]] = []
        """What was charged while the width of the space was not known."""
        self.charged = Usage()
        """The sums of all charges so far; inputs are not in it."""
        self.is_written = True
        """Whether nothing was counted since the caller last began to write; it sets this then."""
        self._is_over = False

    def charge(self, bill: Bill) -> None:
        """Count what a call was charged, whether or not anything is kept of its answer."""
        self._sellers.update(dict.fromkeys(bill.places, bill.provider))
        usage = Usage(tokens_billed=sum(bill.tokens), nanodollars_billed=sum(bill.nanodollars))
        self.charged = self.charged.plus(usage)
        self.is_written = False
        if self._partition.dimensions or self._is_over:
            self._count(self._heading(bill.provider), usage)
        else:
            self._unplaced.append((bill.provider, usage))

    def bought(self, places: Sequence[int], dimensions: int) -> None:
        """Count inputs whose vectors, of that width, are about to be kept."""
        if not self._partition.dimensions:
            self._partition = self._partition._replace(dimensions=dimensions)
            self._place()
        self.is_written = False
        sellers = Counter(self._sellers.get(place, "") for place in places)
        for seller, inputs in sellers.items():
            self._count(self._heading(seller), Usage(misses=inputs))

    def close(self) -> None:
        """Count what is left: charges for which nothing came that tells the width.

        What is charged later is counted at once.
        """
        self._is_over = True
        self._place()

    def _place(self) -> None:
        for provider, usage in self._unplaced:
            self._count(self._heading(provider), usage)
        self._unplaced.clear()

    def _heading(self, provider: str) -> Heading:
        return Heading(self._partition, self._account.model, provider, self._account.client)


def usage_of(
    tokens: Sequence[int], outcomes: Sequence[Outcome], charged: Usage, account: Account
) -> Usage:
    """Return the sums of a request: what it was charged, and what its other inputs are worth."""
    counts = Counter(outcomes)
    saved = sum(tokens)
    if counts[Outcome.MISS]:
        rows = zip(tokens, outcomes, strict=True)
        saved -= sum(n for n, how in rows if how is Outcome.MISS)
    return Usage(
        hits=counts[Outcome.HIT],
        joins=counts[Outcome.JOIN],
        misses=counts[Outcome.MISS],
        duplicates=counts[Outcome.DUPLICATE],
        tokens_saved=saved,
        tokens_billed=charged.tokens_billed,
        nanodollars_saved=nanodollars(saved, account.price),
        nanodollars_billed=charged.nanodollars_billed,
    )


def usage_of_hits(tokens: Sequence[int], account: Account) -> Usage:
    """Return the sums of a request of which every input is a hit."""
    saved = sum(tokens)
    worth = nanodollars(saved, account.price)
    return Usage(hits=len(tokens), tokens_saved=saved, nanodollars_saved=worth)


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
