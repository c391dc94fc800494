"""The sums of the ledger as they are on disk (see `cache.ledger`)."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import orjson
from embedding_proxy.cache.key import OTHER, OTHER_NAMESPACE
from embedding_proxy.cache.ledger import ALL_LINES, By, LedgerFilter, LedgerSums, Line, Usage

from .schema import Sql

DAYS_A_STEP = 31
"""Days that are read at a time."""
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
    lines: LedgerFilter = ALL_LINES,
) -> list[Line]:
    """Return the sums on disk by what is named in `by`, in that order; days count from 1970, UTC.

    Of the lines that `lines` names, which are all by default.

    With `max_lines`, the lines beyond so many are summed under OTHER, one for each provider and
    day. First come those whose names are all among the `preferred` ones, then those that were
    counted on the earliest day. A line that is beyond the limit stays there, so no sum shrinks.

    What running proxies have not written yet, ten seconds' worth at most, is not in it. Raises
    FAILURES.
    """
    names = ", ".join(by)
    sums = ", ".join(f"sum({name}) AS {name}" for name in Usage._fields)
    groups = f" GROUP BY {names}" if by else ""
    condition, values = _condition(lines)
    table = f"FROM Usage LEFT JOIN Partitions ON id = partition WHERE {condition}{groups}"
    order = f" ORDER BY {names}" if by else ""
    statement = f"SELECT {', '.join((*by, sums))} {table}{order}"
    if by and max_lines is not None:
        terms = [
            f"{column} IN (SELECT value FROM json_each(:{column}_names))" for column in preferred
        ]
        values |= {
            f"{column}_names": orjson.dumps(list(preferred[column])).decode()
            for column in preferred
        }
        rank = f"({' AND '.join(terms) or '1'}) DESC, first_day, {names}"
        values["max_lines"] = max_lines
        columns = ", ".join(
            f"CASE WHEN place <= :max_lines THEN {column} ELSE {_IN_REST.get(column, column)} END"
            f" AS {column}_shown"
            for column in by
        )
        shown_names = ", ".join(f"{column}_shown" for column in by)
        statement = (
            f"WITH line AS (SELECT {names}, {sums}, min(day) AS first_day {table}),"
            f" ranked AS (SELECT *, row_number() OVER (ORDER BY {rank}) AS place FROM line)"
            f" SELECT {columns}, {sums} FROM ranked GROUP BY {shown_names} ORDER BY {shown_names}"
        )
    rows = sql(statement, values)
    # Without groups, the sums of nothing are one row of NULLs.
    return [(tuple(row[: len(by)]), Usage(*row[len(by) :])) for row in rows if row[-1] is not None]


def _condition(lines: LedgerFilter, day: str = "day") -> tuple[str, dict[str, Any]]:
    """Return the condition on rows, and its values; `day` is what the columns call a day."""
    terms, values = [f"{day} >= :first_day"], lines._asdict()
    if lines.end_day is not None:
        terms.append(f"{day} < :end_day")
    terms += [f"{name} = :{name}" for name in ("client", "model") if values[name] is not None]
    return " AND ".join(terms), values


def read_sums(sql: Sql, lines: LedgerFilter = ALL_LINES) -> Iterator[LedgerSums]:
    """Yield the sums of the days that have any, in parts of DAYS_A_STEP days. Raises FAILURES.

    Each part is short reads of its own, so the write-ahead log does not grow meanwhile.
    """
    day = lines.first_day
    while True:
        ((day,),) = sql("SELECT min(day) FROM Usage WHERE day >= ?", (day,)).fetchall()
        if day is None or (lines.end_day is not None and day >= lines.end_day):
            return
        end = day + DAYS_A_STEP if lines.end_day is None else min(day + DAYS_A_STEP, lines.end_day)
        part = lines._replace(first_day=day, end_day=end)
        yield LedgerSums(
            *(
                {name: usage for (name,), usage in read(sql, [by], lines=part)}
                for by in (By.DAY, By.MODEL, By.CLIENT)
            )
        )
        day = end


def read_hours(sql: Sql, lines: LedgerFilter) -> dict[int, Usage]:
    """Return the sums by hour (since 1970, UTC), as far as they are kept. Raises FAILURES."""
    condition, values = _condition(lines, "hour / 24")
    sums = ", ".join(f"sum({name})" for name in Usage._fields)
    rows = sql(
        f"SELECT hour, {sums} FROM Hours WHERE hour >= 24 * :first_day AND {condition}"
        " GROUP BY hour",
        values,
    )
    return {hour: Usage(*numbers) for hour, *numbers in rows}


def copies_agree(sql: Sql) -> bool:
    """Tell whether both copies of the sums on disk say the same (see `disk.schema`).

    SQLite notices a page that is no page, but not a number that has changed. A file of an earlier
    layout has one copy. Raises FAILURES.
    """
    if not sql("SELECT 1 FROM sqlite_master WHERE name = 'Usage_copy'").fetchall():
        return True
    sums = ", ".join(f"total({name})" for name in Usage._fields)
    # One statement reads one state of the file: a writer may come between two. SQLite prefers the
    # index, but for a condition that the table alone can answer.
    first, second = sql(
        f"SELECT count(*), {sums} FROM Usage WHERE day >= 0"
        f" UNION ALL SELECT count(*), {sums} FROM Usage INDEXED BY Usage_copy"
    ).fetchall()
    return bool(first == second)
