"""One SQLite file of records: opened, read and written. The only importer of diskcache.

Synchronous, and it raises: `store` decides on threads and on what a failure means. It knows neither
keys nor what is in a record: bytes in, bytes out.
"""

import contextlib
import math
import shutil
import sqlite3
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

import diskcache

from .lock import WriterLock

PAGE_BYTES = 32_768
"""Five records of 1,536 dimensions a page: 1.07 bytes on disk a byte kept, 1.34 with 4 KiB."""
MMAP_BYTES = 1 << 36
"""Reads go through the page cache without copies, up to 64 GiB of file."""
BUSY_SECONDS = 5.0
"""The longest wait for another process's write; then the write is given up."""
TOUCH_SECONDS = 3600.0
"""A use is noted only if the last one noted is older: moving a row costs a page."""
FREE_BYTES = 64 << 20
"""Nothing is written when less than this would be left on the file system."""

FAILURES = (sqlite3.Error, OSError, diskcache.Timeout)
"""What any call here may raise."""

_ADDRESSES_A_SELECT = 512
_RAW: int = diskcache.core.MODE_RAW

# Writes a record whether or not there is one; a row that was anything else becomes raw bytes.
_PUT = """
    INSERT INTO Cache (key, raw, store_time, access_time, mode, value) VALUES (?, 1, ?, ?, 1, ?)
    ON CONFLICT (key, raw) DO UPDATE SET
        store_time = excluded.store_time, access_time = excluded.access_time,
        expire_time = NULL, size = 0, mode = 1, filename = NULL, value = excluded.value
"""
_DELETE = "DELETE FROM Cache WHERE key = ? AND raw = 1 AND value = ?"
_TOUCH = "UPDATE Cache SET access_time = ? WHERE key = ? AND raw = 1 AND access_time < ?"


class RawDisk(diskcache.Disk):  # type: ignore[misc]
    """Keeps `bytes` and nothing else, inside the database.

    diskcache pickles what is neither bytes nor a plain scalar, and reading a pickle runs code
    (CVE-2025-69872). Here nothing is pickled, and a row that says it is one is never loaded.
    """

    def put(self, key: object) -> tuple[memoryview, bool]:
        """Return the database form of a key; only bytes are keys."""
        return sqlite3.Binary(_only_bytes(key)), True

    def get(self, key: object, raw: object) -> bytes:
        """Return the key in a row; raises ValueError for anything but raw bytes."""
        if not raw:
            raise ValueError("the row holds a pickled key; it is not read")
        return _only_bytes(key)

    def store(
        self,
        value: object,
        read: object,  # noqa: ARG002 - diskcache's signature
        key: object = None,  # noqa: ARG002
    ) -> tuple[int, int, None, memoryview]:
        """Return the columns (size, mode, filename, value) of a value; only bytes are values."""
        return 0, _RAW, None, sqlite3.Binary(_only_bytes(value))

    def fetch(self, mode: object, filename: object, value: object, read: object) -> bytes:  # noqa: ARG002
        """Return the value in a row; raises ValueError for anything but raw bytes."""
        if mode != _RAW:
            raise ValueError("the row holds no raw bytes; it is not read")
        return _only_bytes(value)


def _only_bytes(value: object) -> bytes:
    if type(value) is not bytes:
        raise ValueError(f"only bytes are kept here, not {type(value).__name__}")
    return value


class FileReplaced(OSError):
    """The file that is open is no longer the one at its path: what is written would be lost."""


@dataclass(slots=True)
class Changes:
    """What one transaction does."""

    records: dict[bytes, bytes] = field(default_factory=dict)
    """Written, by address."""
    dead: list[tuple[bytes, bytes]] = field(default_factory=list)
    """Deleted: address and record, so that a newer record under the address stays."""
    used: set[bytes] = field(default_factory=set)
    """Addresses that were read since."""


class Database:
    """The file in `folder`, of at most about `size_limit` bytes. Raises FAILURES.

    `read_many` is for a reading thread, `write` for a writing one; each closes its own connection
    in the end. Many processes may have the file open; `lock` is theirs in common.
    """

    def __init__(self, folder: Path, size_limit: int, lock: WriterLock) -> None:
        self.folder = folder
        self.path = folder / diskcache.core.DBNAME
        self._size_limit = size_limit
        self._lock = lock
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        with lock:
            self.cache = self._open()
        self._inode: int = self.path.stat().st_ino

    def _open(self) -> diskcache.Cache:
        # A kill can leave an empty file, which has no page size yet.
        if not self.path.exists() or not self.path.stat().st_size:
            # The page size holds only if it is set before diskcache sets the journal mode.
            with contextlib.closing(sqlite3.connect(self.path, isolation_level=None)) as connection:
                connection.execute(f"PRAGMA page_size = {PAGE_BYTES}")
                connection.execute("VACUUM")
        return diskcache.Cache(
            str(self.folder),
            timeout=BUSY_SECONDS,
            disk=RawDisk,
            # Eviction is ours (`_evict`): diskcache's counts pages that are already free.
            cull_limit=0,
            eviction_policy="least-recently-used",
            size_limit=self._size_limit,
            sqlite_auto_vacuum=0,
            sqlite_cache_size=512,
            sqlite_mmap_size=MMAP_BYTES,
        )

    @property
    def replaced(self) -> bool:
        """Whether the file that is open is no longer the one at its path."""
        try:
            return bool(self.path.stat().st_ino != self._inode)
        except FileNotFoundError:
            return True

    def close(self) -> None:
        """Close the calling thread's connection; the last one of all does a checkpoint."""
        with contextlib.suppress(TimeoutError), self._lock:
            self.cache.close()

    def set_aside(self) -> Path | None:
        """Move the damaged store out of the way; return where it lies now. Nothing is deleted.

        Returns None if it was already replaced, by another process that found the same damage.
        """
        with self._lock:
            return None if self.replaced else set_aside(self.folder)

    def read_many(self, addresses: Sequence[bytes]) -> tuple[dict[bytes, bytes], list[bytes]]:
        """Return the records that are there, by address, and the addresses to be noted as used."""
        found: dict[bytes, bytes] = {}
        used: list[bytes] = []
        stale = time.time() - TOUCH_SECONDS
        for some in _chunks(addresses, _ADDRESSES_A_SELECT):
            marks = ",".join("?" * len(some))
            rows = self.cache._sql(  # noqa: SLF001 - diskcache has no get of many
                "SELECT key, value, access_time FROM Cache"  # noqa: S608
                f" WHERE raw = 1 AND mode = ? AND key IN ({marks})",
                (_RAW, *some),
            )
            for key, value, access_time in rows:
                if type(key) is bytes and type(value) is bytes:
                    found[key] = value
                    if access_time < stale:
                        used.append(key)
        return found, used

    def write(self, changes: Changes) -> None:
        """Make all changes in one transaction, and evict what is then too much."""
        if self.replaced:
            raise FileReplaced("the file was taken away")
        if changes.records and shutil.disk_usage(self.folder).free < FREE_BYTES:
            raise OSError("the file system is nearly full; nothing is written")
        now = time.time()
        with self._lock, self.cache.transact():
            many = self.cache._con.executemany  # noqa: SLF001 - ten times quicker than one by one
            many(_DELETE, changes.dead)
            many(_TOUCH, ((now, address, now - TOUCH_SECONDS) for address in changes.used))
            many(_PUT, ((address, now, now, record) for address, record in changes.records.items()))
            self._evict()

    def _evict(self) -> None:
        """Delete the entries used longest ago, as many as bring the file back under its limit.

        Freed pages are used again by later writes, so the file stays at its limit and its size is
        pages in use, not pages in the file.
        """
        sql = self.cache._sql  # noqa: SLF001
        ((pages,),) = sql("PRAGMA page_count")
        ((free,),) = sql("PRAGMA freelist_count")
        used = (pages - free) * PAGE_BYTES
        if used <= self._size_limit:
            return
        ((entries,),) = sql("SELECT value FROM Settings WHERE key = 'count'")
        share = (used - self._size_limit) / used
        sql(
            "DELETE FROM Cache WHERE rowid IN"
            " (SELECT rowid FROM Cache ORDER BY access_time LIMIT ?)",
            (math.ceil(entries * share),),
        )


def set_aside(folder: Path) -> Path:
    """Move a damaged store out of the way and return where it lies now; nothing is deleted."""
    stamp = time.strftime("%Y%m%dT%H%M%S")
    for attempt in range(1000):
        aside = folder.with_name(f"{folder.name}.damaged-{stamp}-{attempt}")
        if not aside.exists():
            return folder.rename(aside)
    raise FileExistsError(f"{folder}: there are too many damaged stores beside it")


def is_damage(error: BaseException) -> bool:
    """Tell whether an error means that the file itself is unusable, now and later."""
    # OperationalError is about the moment: locked, full, no such file.
    return isinstance(error, sqlite3.DatabaseError) and not isinstance(
        error, sqlite3.OperationalError | sqlite3.IntegrityError | sqlite3.ProgrammingError
    )


def _chunks(items: Iterable[bytes], size: int) -> Iterator[list[bytes]]:
    iterator = iter(items)
    while chunk := list(islice(iterator, size)):
        yield chunk
