"""Warm-up: copies records of the shared tier to the disk of a node, so that it need not ask later.

It scans all keys, asks for the records that the disk lacks, and writes those that are whole, not
purged, and not too old, with the time when they were bought. Where it has got to is in a file
beside the store: after an interruption it goes on from there. It ends before the store would have
to evict what it holds.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import orjson
from embedding_proxy.cache import atomic_file
from embedding_proxy.cache import record as records
from embedding_proxy.cache.disk.database import Database
from embedding_proxy.cache.disk.write_batch import PendingRecord, WriteBatch

from .client import RedisClient
from .purge_exchange import PurgeExchange
from .purge_log import PurgeLog, PurgeRules
from .sweep import LIMIT_S, Interrupted, scan
from .value import KIND, unpack

FILE_NAME = "warm-up.json"
LOT = 128
"""Records that are asked for at a time."""
ROOM_BYTES = 64 << 20
"""What is left free in the store."""
_ADDRESS_BYTES = 16


@dataclass
class WarmUp:
    """How far a warm-up is."""

    cursors: dict[str, int | None] = field(default_factory=dict)
    """Where to go on, by server; None for one that is copied."""
    copied: int = 0
    """Records."""
    copied_bytes: int = 0
    present: int = 0
    """Those that the disk had."""
    left_out: int = 0
    """Those that are damaged, purged, or too old."""
    is_full: bool = False
    """Whether it ended for want of room in the store."""
    is_done: bool = False
    """Whether all was copied."""


def read_state(folder: Path) -> WarmUp:
    """Return how far a warm-up came that was interrupted; a new one if there is none."""
    try:
        fields = orjson.loads((folder / FILE_NAME).read_bytes())
        state = WarmUp(**fields)
        if all(isinstance(one, int | None) for one in state.cursors.values()):
            return WarmUp() if state.is_done else state
    except (OSError, TypeError, ValueError, AttributeError):
        pass
    return WarmUp()


def write_state(folder: Path, state: WarmUp) -> None:
    """Note how far it is. Raises OSError."""
    atomic_file.write(folder / FILE_NAME, orjson.dumps(asdict(state)))


class Copier:
    """Copies to one file. For one thread, in whose event loop the client is.

    `ttl_s` is the age beyond which nothing is copied; `max_bytes_a_s` bounds what is copied in a
    second. `clock` gives seconds, and `sleep` waits for some.
    """

    def __init__(  # noqa: PLR0913 - by name
        self,
        client: RedisClient,
        file: Database,
        *,
        max_bytes_a_s: float,
        ttl_s: float | None = None,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self._client = client
        self._file = file
        self._max_bytes_a_s = max_bytes_a_s
        self._ttl_s = ttl_s
        self._clock = clock
        self._sleep = sleep
        self._exchange = PurgeExchange(client)
        self._log = PurgeLog(file.folder)
        self._purges: object = None
        self._rules = PurgeRules()

    async def run(self, state: WarmUp) -> AsyncIterator[WarmUp]:
        """Copy what is left, yielding how far it is after each step, and noting it in the file.

        Raises Interrupted if a server does not answer, FAILURES, OSError.
        """
        state.is_full = False
        async for step in scan(self._client, state.cursors):
            await self._learn_purges()
            for start in range(0, len(step.keys), LOT):
                if not await self._copy(step.keys[start : start + LOT], state):
                    state.is_full = True
                    write_state(self._file.folder, state)
                    yield state
                    return
            state.cursors[step.server] = step.cursor or None
            write_state(self._file.folder, state)
            yield state
        state.is_done = True
        write_state(self._file.folder, state)
        yield state

    async def _learn_purges(self) -> None:
        """Learn what must not be copied."""
        purges = await self._exchange.poll()
        if purges is None:
            raise Interrupted(self._client.name)
        if purges == self._purges:
            return
        shared = await self._exchange.read()
        if shared is None:
            raise Interrupted(self._client.name)
        self._rules = PurgeRules([*shared.purges, *self._log.read().purges.values()])
        self._purges = purges

    async def _copy(self, keys: Sequence[bytes], state: WarmUp) -> bool:
        """Copy some records; False if the store has no room for more."""
        prefix = len(self._client.key(KIND))
        addresses = [key[prefix:] for key in keys if len(key) == prefix + _ADDRESS_BYTES]
        known = self._present(addresses)
        state.present += len(known)
        wanted = [address for address in addresses if address not in known]
        if not wanted:
            return True
        if self._file.room < ROOM_BYTES:
            return False
        began = self._clock()
        values = await self._client.get_many(
            [self._client.key(KIND, address) for address in wanted], LIMIT_S
        )
        batch: dict[bytes, PendingRecord] = {}
        size = 0
        for address, value in zip(wanted, values, strict=True):
            if value is None:
                continue  # Deleted or expired meanwhile.
            if not isinstance(value, bytes):
                raise Interrupted(self._client.name)
            size += len(value)
            pending = self._pending(address, value)
            if pending is None:
                state.left_out += 1
            else:
                batch[address] = pending
        if batch:
            self._file.write(WriteBatch(records=batch, keep_newer=True))
        state.copied += len(batch)
        state.copied_bytes += sum(len(one.record) for one in batch.values())
        spent_s = self._clock() - began
        await self._sleep(max(0.0, size / self._max_bytes_a_s - spent_s))
        return True

    def _pending(self, address: bytes, value: bytes) -> PendingRecord | None:
        """Return what is to be written of a value; None if nothing is."""
        shared = unpack(value)
        entry = shared and records.read_entry(shared.record)
        if shared is None or entry is None:
            return None
        is_old = self._ttl_s is not None and shared.stored < time.time() - self._ttl_s
        if is_old or self._rules.is_purged(shared.partition, address, shared.stored):
            return None
        return PendingRecord(records.encode(entry), shared.partition, shared.stored)

    def _present(self, addresses: Sequence[bytes]) -> set[bytes]:
        marks = ",".join("?" * len(addresses))
        rows = self._file.sql(
            f"SELECT key FROM Cache WHERE raw = 1 AND key IN ({marks})", list(addresses)
        )
        return {bytes(key) for (key,) in rows}
