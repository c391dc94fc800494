"""A copy of a store that is in use: whole, consistent, and itself a store's file."""

import contextlib
import os
import sqlite3
import tempfile
from collections.abc import Callable
from pathlib import Path

from cache.disk.database import Database

PAGES_A_STEP = 512


def copy(database: Database, target: Path, progress: Callable[[int, int], None]) -> None:
    """Write the state at this moment to `target`, which must not exist.

    `progress` is told the pages copied and all pages. Others read and write meanwhile. Raises
    FAILURES; then nothing is left at `target`.
    """
    if target.exists():
        raise FileExistsError(f"{target} exists; it is not overwritten")
    # A folder of its own, for SQLite makes files beside the one it writes.
    with tempfile.TemporaryDirectory(".part", f"{target.name}-", target.parent) as folder:
        part = Path(folder) / target.name
        _copy(database, part, progress)
        try:
            # Not a renaming: that would replace what has appeared there meanwhile.
            os.link(part, target)
        except FileExistsError:
            raise
        except OSError:
            # The file system knows no links.
            part.rename(target)


def _copy(database: Database, part: Path, progress: Callable[[int, int], None]) -> None:
    with (
        contextlib.closing(sqlite3.connect(database.path, isolation_level=None)) as source,
        contextlib.closing(sqlite3.connect(part, isolation_level=None)) as copied,
    ):
        # One transaction for all steps: what is written meanwhile does not begin it anew.
        source.execute("BEGIN")
        source.execute("SELECT 1 FROM Cache LIMIT 1").fetchall()
        source.backup(
            copied,
            pages=PAGES_A_STEP,
            progress=lambda _status, left, total: progress(total - left, total),
            sleep=0,
        )
        copied.execute("PRAGMA journal_mode = DELETE")
