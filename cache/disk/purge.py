"""Deleting entries on purpose: chosen by partition, age or address, a little at a time."""

import re
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace

from providers.base import current_label

from .database import Database
from .schema import give_back

ROWS_A_TRANSACTION = 1000
PAGES_A_STEP = 512
"""16 MiB: given back in one transaction."""


@dataclass(frozen=True, slots=True)
class Choice:
    """Entries for which all that is given holds; with nothing given, all entries."""

    namespace: str | None = None
    space: str | None = None
    """A space's label; without parameters it stands for the spaces with parameters, too."""
    stored_before: float | None = None
    """Seconds since 1970."""
    used_before: float | None = None
    address: bytes | None = None


def count(database: Database, choice: Choice) -> tuple[int, int]:
    """Return how many entries are chosen, and the bytes of their records. Raises FAILURES."""
    row, tables = _tables(choice)
    condition, values = where(choice)
    ((entries, size),) = database.sql(
        f"SELECT count({row}), coalesce(sum(40 + 4 * dimensions), 0) FROM {tables}"
        f" WHERE {condition}",
        values,
    )
    return int(entries), int(size)


def is_chosen(database: Database, choice: Choice, address: bytes) -> bool:
    """Tell whether the entry at an address is there, and among those chosen. Raises FAILURES."""
    one = replace(choice, address=address)
    row, tables = _tables(one)
    condition, values = where(one)
    return bool(
        database.sql(f"SELECT {row} FROM {tables} WHERE {condition} LIMIT 1", values).fetchone()
    )


def delete(database: Database, choice: Choice) -> Iterator[int]:
    """Delete the chosen entries, yielding after each transaction how many it deleted.

    Those that are stored meanwhile may be left. In the end the pages that are free are given back.
    Raises FAILURES.
    """
    row, tables = _tables(choice)
    condition, values = where(choice)
    last, deleted = 0, ROWS_A_TRANSACTION
    while deleted == ROWS_A_TRANSACTION:
        began = time.monotonic()
        # Looked for anew each time: others move rows to the end of the file meanwhile.
        with database.transaction() as connection:
            connection.execute("PRAGMA secure_delete = 1")
            some = connection.execute(
                f"SELECT {row} FROM {tables} WHERE {row} > :last AND {condition}"
                f" ORDER BY {row} LIMIT {ROWS_A_TRANSACTION}",
                {**values, "last": last},
            ).fetchall()
            connection.executemany("DELETE FROM Cache WHERE rowid = ?", some)
            connection.executemany("DELETE FROM Entries WHERE id = ?", some)
        deleted = len(some)
        last = some[-1][0] if some else last
        _let_others(began)
        yield deleted
    yield from _give_back(database)


def announce(database: Database, entries: int) -> None:
    """Tell running proxies that entries were deleted: they empty their memory. Raises FAILURES."""
    with database.transaction() as connection:
        connection.execute(
            "INSERT INTO Purges (at, entries) VALUES (?, ?)", (int(1000 * time.time()), entries)
        )


def so_far(database: Database) -> int:
    """Return the number of the last purge that was announced. Raises FAILURES."""
    ((number,),) = database.sql("SELECT coalesce(max(id), 0) FROM Purges")
    return int(number)


def _give_back(database: Database) -> Iterator[int]:
    given = PAGES_A_STEP
    while given == PAGES_A_STEP:
        began = time.monotonic()
        with database.transaction():
            given = give_back(database.sql, PAGES_A_STEP)
        _let_others(began)
        yield 0


def _let_others(began: float) -> None:
    """Leave as much time to other writers as was taken: the lock goes to whoever asks first."""
    time.sleep(max(0.002, time.monotonic() - began))


def _tables(choice: Choice) -> tuple[str, str]:
    """Return which row numbers to choose, and from what: a scan of `Cache` only where it must be.

    An address, or everything, also means rows of which nothing else is known.
    """
    partitions = "LEFT JOIN Partitions ON Partitions.id = partition"
    if choice == Choice(address=choice.address) or choice.address is not None:
        entries = "Cache LEFT JOIN Entries ON Entries.id = Cache.rowid"
        return "Cache.rowid", f"{entries} {partitions}"
    return "Entries.id", f"Entries {partitions}"


def where(choice: Choice) -> tuple[str, dict[str, object]]:
    """Return a condition on Entries and Partitions, for an address on Cache, and its values."""
    terms = {
        "namespace = :namespace": choice.namespace,
        "(space = :space OR substr(space, 1, length(:space) + 1) = :space || '?')": (
            None if choice.space is None else current_label(choice.space)
        ),
        "stored < :stored": _ms(choice.stored_before),
        "used < :used": _ms(choice.used_before),
        "Cache.key = :address AND Cache.raw = 1": choice.address,
    }
    given = {term: value for term, value in terms.items() if value is not None}
    values: dict[str, object] = {
        re.findall(":([a-z]+)", term)[0]: value for term, value in given.items()
    }
    return " AND ".join(given) or "1", values


def _ms(seconds: float | None) -> int | None:
    return None if seconds is None else int(1000 * seconds)
