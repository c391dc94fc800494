"""The sums of the ledger as they are on disk (see `cache.ledger`)."""

from collections.abc import Collection, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import orjson
from embedding_proxy.cache.key import OTHER, OTHER_NAMESPACE
from embedding_proxy.cache.ledger import ALL_LINES, By, LedgerFilter, Line, Usage

from .schema import Sql

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
    values: dict[str, Any] = {"first_day": lines.first_day}
    condition = "day >= :first_day"
    if lines.client is not None:
        values["client"] = lines.client
        condition += " AND client = :client"
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
