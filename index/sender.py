"""Sends points from the outbox to Qdrant, in one process at a time, until Qdrant has them.

Each batch is written with `wait=True` and leaves the outbox only when Qdrant has confirmed it, so a
kill at any moment costs at most a repeated write of the same points. The collection is checked
before each batch: it may be gone, or an alias may point to another one.

The sender waits out what passes by itself (an outage, a limit), however long it takes. It finds a
rejected point by bisection of the batch and moves it to the dead letters, with the reason. A point
that makes the server fail (HTTP 500) goes to the end of the queue, alone.
"""

import asyncio
import contextlib
import logging
import random
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import orjson
from embedding_proxy.cache.disk.lock import WriterLock
from embedding_proxy.providers import vector
from embedding_proxy.providers.backoff import Backoff

from .client import Connection
from .collection import CollectionNames, CollectionOptions, Provenance, ensure
from .errors import Denied, Missing, OtherSpace, QdrantFailure, Rejected, ServerFault, Unavailable
from .outbox import FAILURES, OnDisk, Outbox
from .point import QueuedPoint, Target, id_of

if TYPE_CHECKING:
    from qdrant_client import models

log = logging.getLogger("embedding_proxy.index")

TICK_SECONDS = 1.0
"""Interval of checks for points of other processes, and for a sender that has ended."""
MIN_PAUSE_S = 0.5
MAX_PAUSE_S = 30.0
MAX_WAIT_S = 300.0
"""The longest wait, whatever Qdrant asks for."""
MAX_POINTS = 1000


@dataclass(slots=True)
class Counters:
    """What this process has done."""

    sent: int = 0
    refused: int = 0
    failed: int = 0
    """Failed attempts to send."""
    last_failure: str | None = None
    """The last failure of Qdrant or the outbox; None after a success."""


class Sender:
    """Sends while it holds the lock in `folder`. `connect` makes a connection, not yet opened."""

    def __init__(  # noqa: PLR0913 - what it is made of
        self,
        folder: Path,
        on_disk: OnDisk,
        connect: Callable[[], Connection],
        collection_options: CollectionOptions,
        *,
        names: CollectionNames,
        max_bytes: float,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self._lock = WriterLock(folder / "index-sender.lock", 0)
        self._on_disk = on_disk
        self._connect = connect
        self._collection_options = collection_options
        self._names = names
        self._max_bytes = max_bytes
        self._max_points = MAX_POINTS
        self._backoff = Backoff(MIN_PAUSE_S, MAX_PAUSE_S)
        self._sleep = sleep
        self._held = AsyncExitStack()
        self._qdrant: Connection | None = None
        self._holds_lock = False
        self.counters = Counters()
        self.wake = asyncio.Event()
        """Set when points were added."""

    @property
    def sending(self) -> bool:
        """Whether this is the process that sends."""
        return self._holds_lock

    @property
    def connection(self) -> Connection | None:
        """The connection, as long as this is the process that sends."""
        return self._qdrant

    async def take(self) -> Connection | None:
        """Become the sending process, and return the connection; None if another process is.

        Raises QdrantFailure; this process is the sending one all the same.
        """
        if not self._holds_lock:
            try:
                self._lock.__enter__()
            except TimeoutError:
                return None
            self._held.callback(self._lock.__exit__, None, None, None)
            self._holds_lock = True
            await self._on_disk(Outbox.requeue_dead_letters)
        if self._qdrant is None:
            self._qdrant = await self._held.enter_async_context(self._connect())
        return self._qdrant

    async def take_first(self) -> Connection | None:
        """Return the connection at the start; None if it cannot be made yet, or is another's.

        Raises QdrantFailure for what does not pass by itself.
        """
        try:
            return await self.take()
        except Unavailable as error:
            self._failed(error, 0)
            return None

    async def close(self) -> None:
        """Let another process send."""
        self._qdrant, self._holds_lock = None, False
        try:
            await self._held.aclose()
        finally:
            self._lock.close()

    async def run(self) -> None:
        """Send until it is cancelled. Never raises anything else."""
        while True:
            try:
                pause = await self._step()
                if pause:
                    await self._idle(pause)
                continue
            except Unavailable as error:
                # A bisected batch need not wait long.
                halving = isinstance(error, ServerFault) and self._max_points > 1
                asked = MIN_PAUSE_S if halving else error.retry_after_s or None
                pause = self._failed(error, asked)
            except Denied as error:
                pause = self._failed(error, MAX_PAUSE_S)
            except (QdrantFailure, *FAILURES) as error:
                pause = self._failed(error)
            except Exception:
                # Nobody awaits this task: if it ended, nothing would be sent any more.
                log.exception("sending to Qdrant failed")
                pause = MAX_PAUSE_S
            await self._sleep(pause)

    def _failed(self, error: BaseException, pause: float | None = None) -> float:
        """Note a failure; return the seconds to the next try.

        Unless `pause` says how long, they are more each time, and never quite the same.
        """
        own = self._backoff.fail() * random.uniform(0.5, 1)  # noqa: S311 - spreads calls, hides nothing
        pause = own if pause is None else min(pause, MAX_WAIT_S)
        words = str(error) or type(error).__name__
        if words != self.counters.last_failure:
            log.warning("Qdrant: %s; points wait on disk, tried again in %.1f s", words, pause)
        self.counters.failed += 1
        self.counters.last_failure = words
        return pause

    async def _idle(self, seconds: float) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self.wake.wait()
        self.wake.clear()

    async def _step(self) -> float:
        """Send a batch; return 0, or seconds after which there may be something to do."""
        qdrant = await self.take()
        if qdrant is None:
            return TICK_SECONDS
        targets = await self._on_disk(Outbox.targets)
        if not targets:
            await self._on_disk(Outbox.tidy)
            return TICK_SECONDS
        target = targets[0]
        limits = (self._max_bytes, self._max_points)
        batch = await self._on_disk(lambda outbox: outbox.batch(target, *limits))
        if batch:
            await self._send(qdrant, target, batch)
        if self.counters.last_failure is not None:
            log.info("Qdrant takes points again")
        self._backoff.succeed()
        self.counters.last_failure = None
        return 0

    async def _send(self, qdrant: Connection, target: Target, batch: Sequence[QueuedPoint]) -> None:
        """Write points and acknowledge them. Raises QdrantFailure for a passing failure."""
        wanted = Provenance(target.space, target.dimensions)
        try:
            name = await self._names.locate(qdrant, target.collection, wanted)
            if await ensure(qdrant, name, wanted, self._collection_options):
                await self._on_disk(lambda outbox: outbox.forget(target.collection))
        except Missing as error:
            raise Unavailable(str(error)) from error
        except (OtherSpace, Rejected) as error:
            await self._move_to_dead_letters(batch, str(error))
            return
        await self._write(qdrant, name, batch)

    async def _write(self, qdrant: Connection, name: str, batch: Sequence[QueuedPoint]) -> None:
        try:
            await upsert(qdrant, name, batch)
        except Missing as error:
            # It was deleted since the check; the next attempt makes it again.
            raise Unavailable(str(error)) from error
        except Rejected as error:
            if len(batch) == 1:
                await self._move_to_dead_letters(batch, str(error))
                return
            half = len(batch) // 2
            await self._write(qdrant, name, batch[:half])
            await self._write(qdrant, name, batch[half:])
            return
        except ServerFault:
            # One of these points may be the cause: the next batch is half as long.
            if len(batch) == 1:
                await self._on_disk(lambda outbox: outbox.defer(batch))
            self._max_points = max(1, len(batch) // 2)
            raise
        await self._on_disk(lambda outbox: outbox.ack(batch))
        self._max_points = min(MAX_POINTS, 2 * self._max_points)
        self.counters.sent += len(batch)

    async def _move_to_dead_letters(self, batch: Sequence[QueuedPoint], reason: str) -> None:
        log.error("Qdrant refuses %d points, put aside: %s", len(batch), reason)
        await self._on_disk(lambda outbox: outbox.move_to_dead_letters(batch, reason))
        self.counters.refused += len(batch)


async def upsert(qdrant: Connection, collection: str, batch: Sequence[QueuedPoint]) -> None:
    """Write points, and return once they can be found. Raises QdrantFailure."""
    points = await asyncio.to_thread(_structs, batch)
    payloads = [one.payload for one in points]
    await qdrant.ask(lambda client: client.upsert(collection, points, wait=True), payloads)


def _structs(batch: Sequence[QueuedPoint]) -> "list[models.PointStruct]":
    """Return points as the client takes them; every number is the float32 that it was."""
    from qdrant_client import models  # noqa: PLC0415 - an extra, and slow to import

    numbers = vector.stack([one.vector for one in batch]).tolist()
    return [
        models.PointStruct(id=id_of(one.id), vector=row, payload=orjson.loads(one.payload))
        for one, row in zip(batch, numbers, strict=True)
    ]
