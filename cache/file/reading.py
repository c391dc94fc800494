"""Reading records from a store's file, one that can be written or one that cannot."""

import contextlib
import sqlite3
from collections.abc import Sequence
from pathlib import Path

from cache import ledger

from .changes import Found
from .layout import Sql

ADDRESSES_A_SELECT = 512
_RAW = 1  # diskcache's mode of a value that is bytes and nothing else


def read_many(sql: Sql, addresses: Sequence[bytes], not_before: float) -> dict[bytes, Found]:
    """Return the records that are there, by address, but for those stored before a time."""
    found: dict[bytes, Found] = {}
    for start in range(0, len(addresses), ADDRESSES_A_SELECT):
        some = addresses[start : start + ADDRESSES_A_SELECT]
        marks = ",".join("?" * len(some))
        rows = sql(
            "SELECT key, value, coalesce(CAST(store_time AS REAL), 0) FROM Cache"
            f" WHERE raw = 1 AND mode = ? AND typeof(value) = 'blob' AND key IN ({marks})",
            (_RAW, *some),
        )
        for key, value, stored in rows:
            if type(key) is bytes and type(value) is bytes and stored >= not_before:
                found[key] = Found(value, stored)
    return found


def read_ledger(path: Path, by: Sequence[ledger.By]) -> list[ledger.Line]:
    """Return the sums of a store's file (see `ledger.read`), by a connection of its own."""
    with contextlib.closing(_connect(path, "mode=ro")) as connection:
        return ledger.read(connection.execute, by)


class ReadOnlyFile:
    """A store's file on a medium that takes no writes. For one thread. Raises sqlite3.Error.

    Where SQLite can make no lock beside it, the file is taken for one that nobody changes.
    """

    def __init__(self, path: Path) -> None:
        try:
            self._connection = _connect(path, "mode=ro")
        except sqlite3.OperationalError:
            self._connection = _connect(path, "mode=ro&immutable=1")

    def read_many(
        self, addresses: Sequence[bytes], *, not_before: float = 0.0
    ) -> dict[bytes, Found]:
        """Return the records that are there, by address, but for those stored before a time."""
        return read_many(self._connection.execute, addresses, not_before)

    def close(self) -> None:
        """Close the file."""
        self._connection.close()


def _connect(path: Path, query: str) -> sqlite3.Connection:
    connection = sqlite3.connect(f"{path.absolute().as_uri()}?{query}", uri=True)
    connection.execute("SELECT 1 FROM Cache LIMIT 1").fetchall()
    return connection
