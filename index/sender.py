"""Takes points from the outbox to Qdrant: one process at a time, for as long as it takes.

Each batch is written with `wait=True` and let go of only when Qdrant has confirmed it, so a kill at
any moment costs a repeated write of the same points at most. Before each batch the collection is
looked at: it may be gone, or an alias may lead to another one since.

What passes by itself (an outage, a limit) is waited out, however long it takes. What is wrong with
a single point is found by halving the batch, and that point put aside with the reason. A point that
makes the server fail (HTTP 500) goes to the end of the line, alone.
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
from .collection import CollectionOptions, Provenance, ensure
from .errors import Denied, Missing, OtherSpace, QdrantFailure, Rejected, ServerFault, Unavailable
from .outbox import FAILURES, OnDisk, Outbox
from .point import Target, Waiting, id_of

if TYPE_CHECKING:
    from qdrant_client import models

log = logging.getLogger("embedding_proxy.index")

TICK_SECONDS = 1.0
"""How often is looked for what other processes have added, and whether the sender has died."""
SHORTEST_PAUSE = 0.5
LONGEST_PAUSE = 30.0
LONGEST_WAIT = 300.0
"""Whatever Qdrant asks for."""
MOST_POINTS = 1000


@dataclass(slots=True)
class Counters:
    """What this process has done."""

    sent: int = 0
    refused: int = 0
    failed: int = 0
    """How often sending failed, whatever became of it."""
    last_failure: str | None = None
    """What Qdrant, or the outbox, failed with last, unless it succeeded since."""


class Sender:
    """Sends while it holds the lock in `folder`. `connect` makes a connection, not yet opened."""

    def __init__(  # noqa: PLR0913 - what it is made of
        self,
        folder: Path,
        on_disk: OnDisk,
        connect: Callable[[], Connection],
        making: CollectionOptions,
        *,
        most_bytes: float,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self._lock = WriterLock(folder / "index-sender.lock", 0)
        self._on_disk = on_disk
        self._connect = connect
        self._making = making
        self._most_bytes = most_bytes
        self._most_points = MOST_POINTS
        self._backoff = Backoff(SHORTEST_PAUSE, LONGEST_PAUSE)
        self._sleep = sleep
        self._held = AsyncExitStack()
        self._qdrant: Connection | None = None
        self._holds_lock = False
        self.counters = Counters()
        self.wake = asyncio.Event()
        """Set by whoever has added something."""

    @property
    def sending(self) -> bool:
        """Whether this is the process that sends."""
        return self._holds_lock

    @property
    def connection(self) -> Connection | None:
        """The connection, as long as this is the process that sends."""
        return self._qdrant

    async def take(self) -> Connection | None:
        """Become the one that sends, and return the connection; None if another process is.

        Raises QdrantFailure; this process is the one that sends all the same.
        """
        if not self._holds_lock:
            try:
                self._lock.__enter__()
            except TimeoutError:
                return None
            self._held.callback(self._lock.__exit__, None, None, None)
            self._holds_lock = True
            await self._on_disk(Outbox.revive)
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
                # A batch that is halved need not wait long.
                halving = isinstance(error, ServerFault) and self._most_points > 1
                asked = SHORTEST_PAUSE if halving else error.retry_after_s or None
                pause = self._failed(error, asked)
            except Denied as error:
                pause = self._failed(error, LONGEST_PAUSE)
            except (QdrantFailure, *FAILURES) as error:
                pause = self._failed(error)
            except Exception:
                # Nobody awaits this task: were it to end, nothing would be sent any more.
                log.exception("sending to Qdrant failed")
                pause = LONGEST_PAUSE
            await self._sleep(pause)

    def _failed(self, error: BaseException, pause: float | None = None) -> float:
        """Note a failure; return the seconds to the next try.

        Unless `pause` says how long, they are more each time, and never quite the same.
        """
        own = self._backoff.fail() * random.uniform(0.5, 1)  # noqa: S311 - spreads calls, hides nothing
        pause = own if pause is None else min(pause, LONGEST_WAIT)
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
        most = (self._most_bytes, self._most_points)
        batch = await self._on_disk(lambda outbox: outbox.batch(target, *most))
        if batch:
            await self._send(qdrant, target, batch)
        if self.counters.last_failure is not None:
            log.info("Qdrant takes points again")
        self._backoff.succeed()
        self.counters.last_failure = None
        return 0

    async def _send(self, qdrant: Connection, target: Target, batch: Sequence[Waiting]) -> None:
        """Write points, and let go of them. Raises QdrantFailure for what passes by itself."""
        wanted = Provenance(target.space, target.dimensions)
        try:
            if await ensure(qdrant, target.collection, wanted, self._making):
                await self._on_disk(lambda outbox: outbox.forget(target.collection))
        except Missing as error:
            raise Unavailable(str(error)) from error
        except (OtherSpace, Rejected) as error:
            await self._put_aside(batch, str(error))
            return
        await self._write(qdrant, target.collection, batch)

    async def _write(self, qdrant: Connection, name: str, batch: Sequence[Waiting]) -> None:
        try:
            await upsert(qdrant, name, batch)
        except Missing as error:
            # It was deleted since it was looked at; it is made anew for the next try.
            raise Unavailable(str(error)) from error
        except Rejected as error:
            if len(batch) == 1:
                await self._put_aside(batch, str(error))
                return
            half = len(batch) // 2
            await self._write(qdrant, name, batch[:half])
            await self._write(qdrant, name, batch[half:])
            return
        except ServerFault:
            # It may be one of these that it cannot digest: the next batch is half as long.
            if len(batch) == 1:
                await self._on_disk(lambda outbox: outbox.later(batch))
            self._most_points = max(1, len(batch) // 2)
            raise
        await self._on_disk(lambda outbox: outbox.sent(batch))
        self._most_points = min(MOST_POINTS, 2 * self._most_points)
        self.counters.sent += len(batch)

    async def _put_aside(self, batch: Sequence[Waiting], reason: str) -> None:
        log.error("Qdrant refuses %d points, put aside: %s", len(batch), reason)
        await self._on_disk(lambda outbox: outbox.died(batch, reason))
        self.counters.refused += len(batch)


async def upsert(qdrant: Connection, collection: str, batch: Sequence[Waiting]) -> None:
    """Write points, and return once they can be found. Raises QdrantFailure."""
    points = await asyncio.to_thread(_structs, batch)
    payloads = [one.payload for one in points]
    await qdrant.ask(lambda client: client.upsert(collection, points, wait=True), payloads)


def _structs(batch: Sequence[Waiting]) -> "list[models.PointStruct]":
    """Return points as the client takes them; every number is the float32 that it was."""
    from qdrant_client import models  # noqa: PLC0415 - an extra, and slow to import

    numbers = vector.stack([one.vector for one in batch]).tolist()
    return [
        models.PointStruct(id=id_of(one.id), vector=row, payload=orjson.loads(one.payload))
        for one, row in zip(batch, numbers, strict=True)
    ]
