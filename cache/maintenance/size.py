"""The size of a store: entries and bytes, read without reading the entries."""

import contextlib
import sqlite3
from pathlib import Path
from typing import NamedTuple

from embedding_proxy.cache.disk import connection
from embedding_proxy.cache.disk.database import FILE_NAME
from embedding_proxy.cache.disk.read_only import ReadOnlyFile


class StoreSize(NamedTuple):
    """What a store holds."""

    entries: int
    file_bytes: int
    """On disk, with the write-ahead log."""


def read_size(directory: Path) -> StoreSize | None:
    """Return what the store in `directory` holds; None where there is none that can be read.

    The file is opened read-only, beside proxies that may be running.
    """
    path = connection.folder_of(directory) / FILE_NAME
    try:
        with contextlib.closing(ReadOnlyFile(path)) as file:
            ((entries,),) = file.sql("SELECT value FROM Settings WHERE key = 'count'").fetchall()
        files = (path, path.with_name(f"{FILE_NAME}-wal"))
        return StoreSize(int(entries), sum(one.stat().st_size for one in files if one.exists()))
    except (OSError, sqlite3.Error, ValueError):
        return None
