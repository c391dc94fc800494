"""The reading half of the disk tier: few records inline, more in a thread.

Failure licence: a read that fails is a miss.
"""

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable, Sequence
from functools import partial

from embedding_proxy.providers.failure_backoff import THRESHOLD, Backoff

from .connection import Disk
from .database import FAILURES, Database, FileReplaced, is_damage
from .read_only import DamagedFile, ReadOnlyFile
from .write_batch import StoredRecord

log = logging.getLogger("embedding_proxy.store")

SECONDS = 5.0
"""The longest wait for a read. It is generous, because a missed record is bought again."""
TRIES = 3
"""Attempts of a read whose file was damaged or replaced."""
MAX_INLINE_RECORDS = 32
"""Records that the event loop reads itself, in some tenths of a millisecond."""


class Reader:
    """Reads records. For one thread: the event loop's. Never raises."""

    def __init__(
        self,
        disk: Disk,
        replace: Callable[[Database], Awaitable[None]],
        salvaged: Callable[[], Awaitable[None]],
    ) -> None:
        """`replace` gets a file that turns out to be damaged.

        `salvaged` waits until everything that is whole in damaged files is in the present one.
        """
        self._disk = disk
        self._replace = replace
        self._salvaged = salvaged
        self.backoff = Backoff(threshold=THRESHOLD)
        self._lock_backoff = Backoff()

    def lookup_nowait(
        self, addresses: Sequence[bytes], not_before: float
    ) -> dict[bytes, StoredRecord] | None:
        """Return the result of `lookup`; None if it has to be awaited."""
        records = self._read_inline(addresses, not_before)
        if records is None or len(records) == len(addresses):
            return records
        return None if self._disk.damaged or self._replaced_file() is not None else records

    async def lookup(
        self, addresses: Sequence[bytes], not_before: float
    ) -> dict[bytes, StoredRecord]:
        """Return the existing records by address, except those stored before a time.

        Records that the file does not have are read from quarantined files that are not salvaged
        yet.
        """
        damaged = self._disk.damaged
        records = await self._from_file(addresses, not_before)
        if len(records) < len(addresses) and await self._is_replaced():
            records |= await self._from_file([a for a in addresses if a not in records], not_before)
        # Also files that were quarantined or salvaged meanwhile.
        damaged = tuple(dict.fromkeys((*damaged, *self._disk.damaged)))
        if damaged and len(records) < len(addresses):
            missing = [address for address in addresses if address not in records]
            records |= await self._from_damaged(damaged, missing, not_before)
        return records

    async def _is_replaced(self) -> bool:
        """Tell whether another process has made a new file; open that one."""
        file = self._replaced_file()
        if file is not None:
            await self._replace(file)
        return file is not None

    def _replaced_file(self) -> Database | None:
        """Return the open file if another process has put a new one at its path."""
        file = self._disk.file
        with contextlib.suppress(OSError):
            if file is not None and file.replaced:
                return file
        return None

    def _read_inline(
        self, addresses: Sequence[bytes], not_before: float
    ) -> dict[bytes, StoredRecord] | None:
        """Return the records of a few addresses; None if a thread has to read them."""
        inline = self._disk.inline_reader
        if inline is None or len(addresses) > MAX_INLINE_RECORDS or self.backoff.is_waiting:
            return None
        return inline.get_many(addresses, not_before=not_before)

    async def _from_file(
        self, addresses: Sequence[bytes], not_before: float
    ) -> dict[bytes, StoredRecord]:
        records: dict[bytes, StoredRecord] = {}
        for start in range(0, len(addresses), MAX_INLINE_RECORDS):
            if start:
                await asyncio.sleep(0)
            part = self._read_inline(addresses[start : start + MAX_INLINE_RECORDS], not_before)
            if part is None:
                return records | await self._read_in_thread(addresses[start:], not_before)
            records |= part
        return records

    async def _read_in_thread(
        self, addresses: Sequence[bytes], not_before: float
    ) -> dict[bytes, StoredRecord]:
        for _ in range(TRIES):
            if self.backoff.is_waiting:
                return {}
            records = await self._try_in_thread(addresses, not_before)
            if records is not None:
                return records
        return {}

    async def _try_in_thread(
        self, addresses: Sequence[bytes], not_before: float
    ) -> dict[bytes, StoredRecord] | None:
        """Return the existing records; None if the file was exchanged."""
        source: Database | ReadOnlyFile | None = None
        try:
            async with asyncio.timeout(SECONDS):
                source = await self._source()
                if source is None:
                    return {}
                work = partial(source.read_many, addresses, not_before=not_before)
                records = await self._disk.read(work)
        except FileReplaced:
            return None
        except FAILURES as error:
            if is_damage(error) and isinstance(source, Database):
                log.warning("reading from the disk tier failed: %s", error)
                await self._replace(source)
                return None
            self.backoff.fail()
            log.warning("reading from the disk tier failed, taken as a miss: %s", error)
            return {}
        except Exception:
            self.backoff.fail()
            log.exception("reading from the disk tier failed, taken as a miss")
            return {}
        self.backoff.succeed()
        return records

    async def _source(self) -> Database | ReadOnlyFile | None:
        """Return the file to read from, after a replacement in progress."""
        if self._disk.file is None:
            await self._disk.opened()
        return self._disk.file or self._disk.read_only

    async def _from_damaged(
        self, files: Sequence[DamagedFile], addresses: Sequence[bytes], not_before: float
    ) -> dict[bytes, StoredRecord]:
        """Return records from the damaged files, or from the file once all is saved."""
        if self.backoff.is_waiting:
            return {}
        records: dict[bytes, StoredRecord] = {}
        unreadable: set[bytes] = set()
        try:
            async with asyncio.timeout(SECONDS):
                for file in files:
                    missing = [address for address in addresses if address not in records]
                    work = partial(file.read_many, missing, not_before=not_before)
                    part, others = await self._disk.read(work)
                    records |= part
                    unreadable |= others
        except TimeoutError as error:
            self.backoff.fail()
            log.warning("reading from a damaged file failed, taken as a miss: %s", error)
        unreadable -= records.keys()
        if unreadable and await self.is_salvaged():
            records |= await self._from_file(list(unreadable), not_before)
        return records

    async def is_salvaged(self) -> bool:
        """Wait for the end of the salvage, within a limit."""
        if self._lock_backoff.is_waiting:
            return False
        try:
            async with asyncio.timeout(SECONDS):
                await self._salvaged()
        except TimeoutError:
            # A large file takes longer than a request can wait.
            self._lock_backoff.fail()
            return False
        self._lock_backoff.succeed()
        return True
