"""Deleting entries on purpose: chosen by partition, age or address, a little at a time."""

import re
import time
from collections.abc import Iterator
from dataclasses import dataclass

from .database import Database

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
    condition, values = where(choice)
    ((entries, size),) = database.sql(
        "SELECT count(*), coalesce(sum(40 + 4 * dimensions), 0) FROM Entries"
        f" LEFT JOIN Partitions ON Partitions.id = partition WHERE {condition}",
        values,
    )
    return int(entries), int(size)


def delete(database: Database, choice: Choice) -> Iterator[int]:
    """Delete the chosen entries, yielding after each transaction how many it deleted.

    Those that are stored meanwhile may be left. In the end the pages that are free are given back.
    Raises FAILURES.
    """
    condition, values = where(choice)
    rows = [
        row
        for (row,) in database.sql(
            "SELECT Entries.id FROM Entries"
            f" LEFT JOIN Partitions ON Partitions.id = partition WHERE {condition}",
            values,
        )
    ]
    for start in range(0, len(rows), ROWS_A_TRANSACTION):
        some = rows[start : start + ROWS_A_TRANSACTION]
        with database.transaction() as connection:
            connection.execute("PRAGMA secure_delete = 1")
            connection.executemany("DELETE FROM Cache WHERE rowid = ?", ((row,) for row in some))
            connection.executemany("DELETE FROM Entries WHERE id = ?", ((row,) for row in some))
        yield len(some)
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
    free = True
    while free:
        with database.transaction() as connection:
            ((before,),) = connection.execute("PRAGMA freelist_count")
            connection.execute(f"PRAGMA incremental_vacuum({PAGES_A_STEP})").fetchall()
            ((left,),) = connection.execute("PRAGMA freelist_count")
        # Files of an early layout cannot give pages back; they use them again.
        free = 0 < left < before
        yield 0


def where(choice: Choice) -> tuple[str, dict[str, object]]:
    """Return a condition on Entries and Partitions, and its values."""
    terms = {
        "namespace = :namespace": choice.namespace,
        "(space = :space OR substr(space, 1, length(:space) + 1) = :space || '?')": choice.space,
        "stored < :stored": _ms(choice.stored_before),
        "used < :used": _ms(choice.used_before),
        "Entries.id = (SELECT rowid FROM Cache WHERE key = :address AND raw = 1)": choice.address,
    }
    given = {term: value for term, value in terms.items() if value is not None}
    values: dict[str, object] = {
        re.findall(":([a-z]+)", term)[0]: value for term, value in given.items()
    }
    return " AND ".join(given) or "1", values


def _ms(seconds: float | None) -> int | None:
    return None if seconds is None else int(1000 * seconds)
