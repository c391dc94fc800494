"""The disk tier: addresses <-> records in one SQLite file. The only importer of diskcache.

It knows neither keys nor what is in a record: bytes in, bytes out. Reads and writes run in threads
of the store, never on the event loop.

Failure licence: a read that fails is a miss, a write that fails is a line in the log; neither
raises. What `put_many` has returned for is on disk: after a kill −9 it is there. A power cut may
take the last transactions (SQLite's WAL with synchronous=NORMAL), never the file's consistency.
"""

import asyncio
import contextlib
import logging
import math
import sqlite3
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Self

import diskcache

from .key import FORMAT

log = logging.getLogger("embedding_proxy.store")

PAGE_BYTES = 32_768
"""Five records of 1,536 dimensions a page: 1.07 bytes on disk a byte kept, 1.34 with 4 KiB."""
MMAP_BYTES = 1 << 36
"""Reads go through the page cache without copies, up to 64 GiB of file."""
BUSY_SECONDS = 5.0
"""The longest wait for another process's write; then the write is given up."""

_ADDRESSES_A_SELECT = 512
# Writes a record whether or not there is one; a row that was anything else becomes raw bytes.
_PUT = """
    INSERT INTO Cache (key, raw, store_time, access_time, mode, value) VALUES (?, 1, ?, ?, 1, ?)
    ON CONFLICT (key, raw) DO UPDATE SET
        store_time = excluded.store_time, access_time = excluded.access_time,
        expire_time = NULL, size = 0, mode = 1, filename = NULL, value = excluded.value
"""
_FAILURES = (sqlite3.Error, OSError, diskcache.Timeout)


class StoreError(Exception):
    """The directory cannot be used as a store; the message says why."""


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
        return 0, diskcache.core.MODE_RAW, None, sqlite3.Binary(_only_bytes(value))

    def fetch(self, mode: object, filename: object, value: object, read: object) -> bytes:  # noqa: ARG002
        """Return the value in a row; raises ValueError for anything but raw bytes."""
        if mode != diskcache.core.MODE_RAW:
            raise ValueError("the row holds no raw bytes; it is not read")
        return _only_bytes(value)


def _only_bytes(value: object) -> bytes:
    if type(value) is not bytes:
        raise ValueError(f"only bytes are kept here, not {type(value).__name__}")
    return value


class Store:
    """Records on disk, of at most about `size_limit` bytes. Open it with `async with`.

    `directory` gets a folder for this format version; another version's files are left alone.
    """

    def __init__(self, directory: Path, size_limit: int) -> None:
        self.folder = directory / f"v{FORMAT}"
        self._size_limit = size_limit
        self._cache: diskcache.Cache | None = None
        # SQLite lets one writer in at a time; so does this, without anyone waiting on a lock.
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="store-reader")
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="store-writer")

    async def __aenter__(self) -> Self:
        """Open the file. Raises StoreError if the directory cannot be used."""
        loop = asyncio.get_running_loop()
        try:
            self._cache = await loop.run_in_executor(self._writer, self._open)
        except _FAILURES as error:
            self._shut_down()
            raise StoreError(f"{self.folder}: {error}") from error
        return self

    async def __aexit__(self, *_: object) -> None:
        loop = asyncio.get_running_loop()
        cache, self._cache = self._cache, None
        if cache is not None:
            # Each thread has a connection of its own; the writer's goes last and checkpoints.
            await loop.run_in_executor(self._reader, cache.close)
            await loop.run_in_executor(self._writer, cache.close)
        self._shut_down()

    def _shut_down(self) -> None:
        self._reader.shutdown()
        self._writer.shutdown()

    async def get_many(self, addresses: Sequence[bytes]) -> dict[bytes, bytes]:
        """Return the records that are there, by address. Never raises."""
        if self._cache is None:
            return {}
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._reader, self._get_many, self._cache, addresses)

    async def put_many(self, records: Mapping[bytes, bytes]) -> bool:
        """Write all records in one transaction; return whether they are on disk. Never raises."""
        if self._cache is None:
            return False
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._writer, self._put_many, self._cache, records)

    def _open(self) -> diskcache.Cache:
        self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        path = self.folder / diskcache.core.DBNAME
        # A kill can leave an empty file, which has no page size yet.
        if not path.exists() or not path.stat().st_size:
            # The page size holds only if it is set before diskcache sets the journal mode.
            with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as connection:
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

    def _get_many(self, cache: diskcache.Cache, addresses: Sequence[bytes]) -> dict[bytes, bytes]:
        found: dict[bytes, bytes] = {}
        try:
            for some in _chunks(addresses, _ADDRESSES_A_SELECT):
                marks = ",".join("?" * len(some))
                rows = cache._sql(  # noqa: SLF001 - diskcache has no get of many
                    "SELECT key, value FROM Cache WHERE raw = 1 AND mode = ?"  # noqa: S608
                    f" AND key IN ({marks})",
                    (diskcache.core.MODE_RAW, *some),
                )
                found.update((k, v) for k, v in rows if type(k) is bytes and type(v) is bytes)
        except _FAILURES as error:
            log.warning("reading from the disk tier failed, taken as a miss: %s", error)
        return found

    def _put_many(self, cache: diskcache.Cache, records: Mapping[bytes, bytes]) -> bool:
        now = time.time()
        try:
            with cache.transact():
                # diskcache sets one by one, at ten times the cost.
                cache._con.executemany(  # noqa: SLF001
                    _PUT, ((address, now, now, record) for address, record in records.items())
                )
                self._evict(cache)
        except _FAILURES as error:
            log.warning("writing to the disk tier failed, %d not kept: %s", len(records), error)
            return False
        return True

    def _evict(self, cache: diskcache.Cache) -> None:
        """Delete the entries written longest ago, as many as bring the file back under its limit.

        Freed pages are used again by later writes, so the file stays at its limit and its size is
        pages in use, not pages in the file.
        """
        sql = cache._sql  # noqa: SLF001
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


def _chunks(items: Iterable[bytes], size: int) -> Iterator[list[bytes]]:
    iterator = iter(items)
    while chunk := list(islice(iterator, size)):
        yield chunk
