"""A full disk: how much is left free, how it is found out, and what to do.

While less than FREE_BYTES is free, records are not written: clients get their vectors, the records
wait in memory (`writer`) and are tried again. Sums of the ledger are still written. At the end of
the process the last room is used, too. A purge needs no room: see `exclusive_file`.
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
"""Less than that is no room for what SQLite makes beside a file when it is opened."""
_NO_SPACE = (errno.ENOSPC, errno.EDQUOT)


def check_room(folder: Path) -> None:
    """Raise OSError if less than FREE_BYTES is free where a folder is."""
    if shutil.disk_usage(folder).free < FREE_BYTES:
        raise OSError("the file system is nearly full; nothing is written")


def temp_store() -> int:
    """Return where SQLite is to make its temporary files: 2 = in memory, if there is no folder.

    Else it could not even make a new store, as in a container whose only writable folder is that of
    the cache. https://www.sqlite.org/pragma.html#pragma_temp_store
    """
    try:
        tempfile.gettempdir()
    except FileNotFoundError:
        return 2
    return 0


def has_no_room(folder: Path) -> bool:
    """Tell whether not even a store that is there can be opened."""
    try:
        return shutil.disk_usage(folder).free < _MIN_BYTES
    except OSError:
        return False


def is_cause(error: BaseException) -> bool:
    """Tell whether an error of the system or of SQLite says that there is no space."""
    number = getattr(error, "errno", None)
    return number in _NO_SPACE or primary_code(error) == sqlite3.SQLITE_FULL
