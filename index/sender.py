"""Sends points from the outbox to Qdrant, in one process at a time, until Qdrant has them.

Each batch is written with `wait=True` and leaves the outbox only when Qdrant has confirmed it, so a
kill at any moment costs at most a repeated write of the same points. The collection is checked
before each batch: it may be gone, or an alias may point to another one.

The sender waits for the end of passing failures (an outage, a limit), however long they last. A
collection that refuses points delays no other. The sender finds a rejected point by bisection of
the batch and moves it to the dead letters, with the reason; it tries dead letters again after
growing pauses. Qdrant may have written a part of a batch that it rejects; both halves are sent, so
all of them arrive. A point that makes the server fail (HTTP 500) goes to the end of the queue,
alone.

The sender also checks the collections regularly. If another program created a collection again,
restored it or deleted points, the missing points are forgotten, and the next answers write them
again.
"""

import asyncio
import contextlib
import logging
import random
import time
from collections import defaultdict
from collections.abc import Awaitable, Callable, Iterable, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import orjson
from embedding_proxy.cache.disk.lock import WriterLock
from embedding_proxy.providers import vector
from embedding_proxy.providers.failure_backoff import Backoff

from .client import BatchSize, Connection
from .collection import (
    CollectionNames,
    CollectionOptions,
    Provenance,
    ensure,
    present_ids,
    state_of,
)
from .errors import (
    Denied,
    Disconnected,
    LimitReached,
    Missing,
    OtherSpace,
    Overloaded,
    QdrantFailure,
    Rejected,
    ServerFault,
    TooLarge,
    Unavailable,
    UntrustedCertificate,
)
from .outbox import FAILURES, OnDisk, Outbox
from .point import CollectionState, QueuedPoint, Target, id_of
from .resync import missing_points

if TYPE_CHECKING:
    from qdrant_client import models

log = logging.getLogger("embedding_proxy.index")

TICK_SECONDS = 1.0
"""Interval of checks for points of other processes, and for a sender that has ended."""
LOOK_SECONDS = 30.0
"""Interval of the checks of collections and dead letters."""
MAX_LOOKS = 50
"""Collections that one interval checks; the next interval checks the following ones."""
MIN_PAUSE_S = 0.5
MAX_PAUSE_S = 30.0
MAX_WAIT_S = 300.0
"""The longest wait, whatever Qdrant requests."""
MAX_POINTS = 1000


@dataclass(slots=True)
class Counters:
    """The counters of this process."""

    sent: int = 0
    refused: int = 0
    failed: int = 0
    """Failed attempts to send."""
    last_failure: str | None = None
    """The last failure of Qdrant or the outbox; None after a success."""


@dataclass(slots=True)
class _Queue:
    """The state of the sending to one target."""

    backoff: Backoff = field(default_factory=lambda: Backoff(MIN_PAUSE_S, MAX_PAUSE_S))
    size: BatchSize = field(default_factory=lambda: BatchSize(MAX_POINTS))
    paused_until: float = 0.0
    """In the time of the event loop."""
    failure: str | None = None


class Sender:
    """Sends while it holds the lock in `folder`. `connect` makes a connection that is not open."""

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
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._lock = WriterLock(folder / "index-sender.lock", 0)
        self._on_disk = on_disk
        self._connect = connect
        self._collection_options = collection_options
        self._names = names
        self._max_bytes = max_bytes
        self._backoff = Backoff(MIN_PAUSE_S, MAX_PAUSE_S)
        self._sleep = sleep
        self._clock = clock
        self._held = AsyncExitStack()
        self._qdrant: Connection | None = None
        self._holds_lock = False
        self._queues: defaultdict[Target, _Queue] = defaultdict(_Queue)
        self._written: set[Target] = set()
        self._next_look = 0.0
        self._looked = 0
        """The number of targets that the present round has checked."""
        self._failure: str | None = None
        """The present failure that concerns all queues."""
        self._is_halved = False
        """Whether the last batch failed, and the next one is smaller."""
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

        Raises QdrantFailure; this process sends nevertheless.
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
        """Return the connection at the start; None if Qdrant is away or another process sends.

        Raises QdrantFailure for a lasting failure.
        """
        try:
            return await self.take()
        except Unavailable as error:
            self._record_failure(error, None, 0)
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
                # A halved batch need not wait long.
                retry_s = MIN_PAUSE_S if self._is_halved else error.retry_after_s or None
                pause = self._record_failure(error, None, retry_s)
            except (Denied, UntrustedCertificate) as error:
                pause = self._record_failure(error, None, MAX_PAUSE_S)
            except (QdrantFailure, *FAILURES) as error:
                pause = self._record_failure(error, None)
            except Exception:
                # Nobody awaits this task. If it ended, no point would be sent any more.
                log.exception("sending to Qdrant failed")
                pause = MAX_PAUSE_S
            await self._sleep(pause)

    def _record_failure(
        self, error: BaseException, queue: _Queue | None, pause: float | None = None
    ) -> float:
        """Record a failure of one target's queue or of all; return the seconds to the next attempt.

        Without `pause` they grow with each failure, with a random part.
        """
        backoff = self._backoff if queue is None else queue.backoff
        own = backoff.fail() * random.uniform(0.5, 1)  # noqa: S311 - spreads calls, hides nothing
        pause = own if pause is None else min(pause, MAX_WAIT_S)
        words = str(error) or type(error).__name__
        if words not in (self._failure, None if queue is None else queue.failure):
            log.warning("Qdrant: %s; points wait on disk, tried again in %.1f s", words, pause)
        if queue is None:
            self._failure = words
        else:
            queue.failure = words
        self.counters.failed += 1
        self.counters.last_failure = words
        return pause

    def _record_success(self, queue: _Queue) -> None:
        """Record that points of a target were sent."""
        queue.backoff.succeed()
        self._record_recovery(queue.failure)
        queue.failure = None
        self._tell_failure()

    def _record_recovery(self, failure: str | None = None) -> None:
        """Record that Qdrant answers. `failure` is the former one of the queue that was sent."""
        if self._failure is not None or failure is not None:
            log.info("Qdrant answers again")
        self._backoff.succeed()
        self._failure = None
        self._tell_failure()

    def _tell_failure(self) -> None:
        failures = (queue.failure for queue in self._queues.values() if queue.failure is not None)
        self.counters.last_failure = next(failures, None)

    async def _idle(self, seconds: float) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self.wake.wait()

    async def _step(self) -> float:
        """Send a batch. Return the seconds to wait before the next one."""
        self.wake.clear()
        self._is_halved = False
        qdrant = await self.take()
        if qdrant is None:
            return TICK_SECONDS
        now = asyncio.get_running_loop().time()
        if now >= self._next_look:
            self._next_look = now + LOOK_SECONDS
            await self._on_disk(lambda outbox: outbox.requeue_dead_letters(self._clock()))
            pending = set(await self._on_disk(Outbox.targets))
            journaled = await self._on_disk(Outbox.journal_targets)
            # The others are looked at when they are sent.
            await self._look(
                qdrant, self._next_looked([target for target in journaled if target not in pending])
            )
        targets = await self._on_disk(Outbox.targets)
        if not targets:
            await self._look(qdrant, self._written)
            self._written.clear()
            await self._on_disk(Outbox.tidy)
            return TICK_SECONDS
        ready = [target for target in targets if self._queues[target].paused_until <= now]
        if ready:
            await self._send_from(qdrant, ready[0])
        else:
            await self._wait_for(min((self._queues[target] for target in targets), key=_due))
        return 0

    async def _send_from(self, qdrant: Connection, target: Target) -> None:
        """Send a batch of a target. A refusal of its collection pauses this target only."""
        queue = self._queues[target]
        limits = (self._max_bytes, queue.size.max_items)
        batch = await self._on_disk(lambda outbox: outbox.batch(target, *limits))
        try:
            if batch:
                await self._send(qdrant, target, batch)
        except (Denied, LimitReached, Overloaded) as error:
            retry_s = MAX_PAUSE_S if isinstance(error, Denied) else error.retry_after_s or None
            pause = self._record_failure(error, queue, retry_s)
            queue.paused_until = asyncio.get_running_loop().time() + pause
            return
        self._written.add(target)
        self._record_success(queue)

    async def _wait_for(self, queue: _Queue) -> None:
        """Wait until a queue is due, or until points are added."""
        seconds = max(0.0, queue.paused_until - asyncio.get_running_loop().time())
        pause = asyncio.ensure_future(self._sleep(seconds))
        wake = asyncio.ensure_future(self.wake.wait())
        try:
            await asyncio.wait({pause, wake}, return_when=asyncio.FIRST_COMPLETED)
            if pause.done():
                queue.paused_until = 0.0
        finally:
            pause.cancel()
            wake.cancel()

    async def _send(self, qdrant: Connection, target: Target, batch: Sequence[QueuedPoint]) -> None:
        """Write points and acknowledge them. Raises QdrantFailure for a passing failure."""
        provenance = Provenance(target.space, target.dimensions)
        try:
            name = await self._names.locate(qdrant, target.collection, provenance)
            state = await ensure(qdrant, name, provenance, self._collection_options)
        except Missing as error:
            raise Unavailable(str(error)) from error
        except (OtherSpace, Rejected) as error:
            await self._move_to_dead_letters(batch, str(error))
            return
        await self._notice_losses(qdrant, target, name, state)
        await self._write(qdrant, target, name, batch)

    async def _write(
        self, qdrant: Connection, target: Target, name: str, batch: Sequence[QueuedPoint]
    ) -> None:
        size = self._queues[target].size
        try:
            await upsert(qdrant, name, batch, self._collection_options.vector_name)
        except Missing as error:
            # It was deleted since the check; the next attempt makes it again.
            raise Unavailable(str(error)) from error
        except Rejected as error:
            if len(batch) == 1:
                await self._move_to_dead_letters(batch, str(error))
                return
            if isinstance(error, TooLarge):
                size.shrink(len(batch), error)
                log.warning("Qdrant: %s; the next batches have %d points", error, size.max_items)
                return
            half = len(batch) // 2
            await self._write(qdrant, target, name, batch[:half])
            await self._write(qdrant, target, name, batch[half:])
            return
        except (ServerFault, Disconnected) as error:
            # One of these points, or their size, may be the cause: the next batch is half as long.
            if len(batch) == 1:
                await self._on_disk(lambda outbox: outbox.defer(batch))
            self._is_halved = len(batch) > 1
            size.shrink(len(batch), error)
            raise
        await self._on_disk(lambda outbox: outbox.ack(batch))
        size.grow()
        self.counters.sent += len(batch)

    async def _move_to_dead_letters(self, batch: Sequence[QueuedPoint], reason: str) -> None:
        log.error("Qdrant refuses %d points, put aside: %s", len(batch), reason)
        now = self._clock()
        await self._on_disk(lambda outbox: outbox.move_to_dead_letters(batch, reason, now))
        self.counters.refused += len(batch)

    def _next_looked(self, targets: Sequence[Target]) -> Sequence[Target]:
        """Return the next targets to check: there may be a collection for each tenant."""
        start = self._looked if self._looked < len(targets) else 0
        self._looked = start + MAX_LOOKS
        return targets[start : self._looked]

    async def _look(self, qdrant: Connection, targets: Iterable[Target]) -> None:
        """Detect changes of collections by other programs. Raises QdrantFailure for an outage."""
        is_asked = False
        for target in targets:
            provenance = Provenance(target.space, target.dimensions)
            with contextlib.suppress(Denied, Rejected, Overloaded, LimitReached):
                name = await self._names.locate(qdrant, target.collection, provenance)
                state = await state_of(qdrant, name)
                await self._notice_losses(qdrant, target, name, state)
                is_asked = True
        if is_asked:
            self._record_recovery()

    async def _notice_losses(
        self, qdrant: Connection, target: Target, name: str, state: CollectionState | None
    ) -> None:
        """Forget the points that a collection has lost since the last check."""
        before = await self._on_disk(lambda outbox: outbox.state(target))
        lost = 0
        if state is None or state.is_new or (before and before.identity != state.identity):
            lost = await self._on_disk(lambda outbox: outbox.forget(target))
        elif before and state.points < before.points:
            async for missing in missing_points(qdrant, self._on_disk, target, name):
                points = [entry.point for entry in missing]
                lost += await self._on_disk(
                    lambda outbox, points=points: outbox.forget(target, points)  # type: ignore[misc]
                )
        if lost:
            log.warning(
                "%d points are no longer in %s: the next answers write them again", lost, name
            )
        if state is not None and (before is None or before[:2] != state[:2]):
            await self._on_disk(lambda outbox: outbox.note_state(target, state))


def _due(queue: _Queue) -> float:
    return queue.paused_until


async def upsert(
    qdrant: Connection, collection: str, batch: Sequence[QueuedPoint], vector_name: str = ""
) -> None:
    """Write points, and return when searches find them. Raises QdrantFailure.

    `vector_name` is the name of their vector. An update of an existing point keeps the vectors and
    payload fields that it does not name; all other points are written whole.
    """
    doing = f"writing points to {collection}"
    updates = [point for point in batch if point.is_update]
    existing = await present_ids(qdrant, collection, [id_of(point.id) for point in updates])
    whole = [point for point in batch if not (point.is_update and id_of(point.id) in existing)]
    updates = [point for point in updates if id_of(point.id) in existing]
    if whole:
        points = await asyncio.to_thread(_structs, whole, vector_name)
        payloads = [point.payload for point in points]
        await qdrant.ask(
            lambda client: client.upsert(collection, points, wait=True), payloads, doing=doing
        )
    if updates:
        points = await asyncio.to_thread(_structs, updates, vector_name)
        payloads = [point.payload for point in points]
        operations = _operations(points)
        await qdrant.ask(
            lambda client: client.batch_update_points(collection, operations, wait=True),
            payloads,
            doing=doing,
        )


def _structs(batch: Sequence[QueuedPoint], vector_name: str) -> "list[models.PointStruct]":
    """Return points in the form of the client; every number stays the same float32."""
    from qdrant_client import models  # noqa: PLC0415 - an extra, and slow to import

    numbers = vector.stack([point.vector for point in batch]).tolist()
    points = []
    for point, row in zip(batch, numbers, strict=True):
        vectors: Any = row
        if vector_name or point.vectors:
            others = orjson.loads(point.vectors) if point.vectors else {}
            vectors = {**others, vector_name: row}
        payload = orjson.loads(point.payload)
        points.append(models.PointStruct(id=id_of(point.id), vector=vectors, payload=payload))
    return points


def _operations(points: "Sequence[models.PointStruct]") -> "list[models.UpdateOperation]":
    """Return the operations that set the vectors and payload fields of existing points."""
    from qdrant_client import models  # noqa: PLC0415 - an extra, and slow to import

    vectors = [models.PointVectors(id=point.id, vector=point.vector) for point in points]
    operations: list[models.UpdateOperation] = [
        models.UpdateVectorsOperation(update_vectors=models.UpdateVectors(points=vectors))
    ]
    for point in points:
        change = models.SetPayload(payload=point.payload or {}, points=[point.id])
        operations.append(models.SetPayloadOperation(set_payload=change))
    return operations
