"""A full disk: how much is left free, how it is found out, and what to do.

While less than FREE_BYTES is free, records are not written: `check_room` says so before each
transaction (`database`). Clients get their vectors. The records wait in memory, up to 64 MiB of
them, and are tried again; those beyond are lost (`writer`). Sums of the ledger are still written.
At the end of the process the last room is used, too.

A proxy that starts on a full disk reads its store and writes nothing (`connection`: `Disk.open`);
without a store it does not start. A purge needs no room: see `exclusive_file`. What waits for
Qdrant has a bound of its own (`index.outbox`).
"""

import errno
import shutil
import sqlite3
import tempfile
from pathlib import Path

from .read_only import primary_code

FREE_BYTES = 64 << 20
"""No record is written when less than this is free on the file system."""
REMEDY = "free some space on the disk"
_MIN_BYTES = 1 << 16
"""With less free, SQLite cannot make the files that it needs beside an open database."""
_NO_SPACE = (errno.ENOSPC, errno.EDQUOT)


def check_room(folder: Path) -> None:
    """Raise OSError if less than FREE_BYTES is free where a folder is."""
    if shutil.disk_usage(folder).free < FREE_BYTES:
        raise OSError("the file system is nearly full; nothing is written")


def temp_store() -> int:
    """Return SQLite's `temp_store`: 2 (memory) if there is no folder for temporary files, else 0.

    Without such a folder, as in a container whose only writable folder is the cache, SQLite could
    not even make a new store. https://www.sqlite.org/pragma.html#pragma_temp_store
    """
    try:
        tempfile.gettempdir()
    except FileNotFoundError:
        return 2
    return 0


def has_no_room(folder: Path) -> bool:
    """Tell whether there is too little room even to open an existing store."""
    try:
        return shutil.disk_usage(folder).free < _MIN_BYTES
    except OSError:
        return False


def is_cause(error: BaseException) -> bool:
    """Tell whether an error of the system or of SQLite means that the disk is full."""
    number = getattr(error, "errno", None)
    return number in _NO_SPACE or primary_code(error) == sqlite3.SQLITE_FULL
