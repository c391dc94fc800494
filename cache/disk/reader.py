"""The reading half of the disk tier: few records at once, the others by a thread.

Failure licence: a read that fails is a miss.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from functools import partial

from .backoff import Rest
from .changes import Found
from .connection import Disk
from .database import FAILURES, Database, is_damage

log = logging.getLogger("embedding_proxy.store")

SECONDS = 5.0
"""The longest wait for a read. Generous: what is taken for a miss is paid for again."""
FEW = 16
"""Records that are read without a turn for others, in some tenths of a millisecond."""


class Reader:
    """Reads records. For one thread: the event loop's. Never raises."""

    def __init__(self, disk: Disk, replace: Callable[[Database], Awaitable[None]]) -> None:
        """`replace` is told of a file that turns out to be damaged."""
        self._disk = disk
        self._replace = replace
        self.rest = Rest()

    def at_once(self, addresses: Sequence[bytes], not_before: float) -> dict[bytes, Found] | None:
        """Return the records of a few addresses that are there; None if they are to be awaited."""
        glance = self._disk.glance
        if glance is None or len(addresses) > FEW or self.rest.resting:
            return None
        return glance.read_few(addresses, not_before=not_before)

    async def many(self, addresses: Sequence[bytes], not_before: float) -> dict[bytes, Found]:
        """Return the records that are there, by address, but for those stored before a time."""
        found: dict[bytes, Found] = {}
        for start in range(0, len(addresses), FEW):
            if start:
                await asyncio.sleep(0)
            some = self.at_once(addresses[start : start + FEW], not_before)
            if some is None:
                return found | await self._by_thread(addresses[start:], not_before)
            found |= some
        return found

    async def _by_thread(self, addresses: Sequence[bytes], not_before: float) -> dict[bytes, Found]:
        source = self._disk.file or self._disk.read_only
        if source is None or self.rest.resting:
            return {}
        try:
            async with asyncio.timeout(SECONDS):
                work = partial(source.read_many, addresses, not_before=not_before)
                found = await self._disk.read(work)
        except FAILURES as error:
            self.rest.failed()
            log.warning("reading from the disk tier failed, taken as a miss: %s", error)
            if is_damage(error) and isinstance(source, Database):
                await self._replace(source)
            return {}
        except Exception:
            self.rest.failed()
            log.exception("reading from the disk tier failed, taken as a miss")
            return {}
        self.rest.succeeded()
        return found
