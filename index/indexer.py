"""How a point is indexed: from an answer to Qdrant, in the background.

1. `proxy.service.index_writes` makes points of an answer: id, payload, collection. It leaves out
   those that this process remembers as indexed.
2. `Indexer.add`, here, puts the others into the outbox.
3. `outbox` keeps them on disk until Qdrant has them, and leaves out those that it knows. Then the
   reply leaves.
4. `sender`, in one process, writes them to Qdrant in batches (`upsert`) and takes them out of the
   outbox. What Qdrant rejects becomes a dead letter there.

`add` never raises, and waits only for the local outbox. A point with an id or a payload from the
request is always written: only Qdrant knows what it has under that id. A point that cannot be put
into the outbox is not indexed now; its id stays unknown, so the next answer with it tries again.
"""

import asyncio
import logging
import time
from collections import defaultdict
from collections.abc import Awaitable, Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack, suppress
from functools import partial
from pathlib import Path
from typing import Any, Self, TypeVar

from embedding_proxy.providers.failure_backoff import THRESHOLD, Backoff

from .client import Connection
from .collection import CollectionNames, CollectionOptions
from .errors import InUse, Unusable
from .outbox import FAILURES, Outbox, OutboxFull
from .point import Point, Target
from .sender import TICK_SECONDS, Sender

log = logging.getLogger("embedding_proxy.index")

T = TypeVar("T")

MAX_REMEMBERED = 1 << 18
"""Ids that a process remembers, about 100 bytes each. Beyond that it forgets all of them."""
MEMORY_SECONDS = 3600.0
"""How long a process remembers ids without reading the outbox."""
_TARGET = 16
"""The ids that one target counts for: requests name collections, which may have few points each."""


class Indexer:
    """An outbox in `folder` and its sender. Open it with `async with`.

    Several indexers, in one process or several, can share a folder; one of them sends. In the
    process that sends, `on_open` gets the connection before the first point is sent; it can raise
    to refuse the start.
    """

    def __init__(  # noqa: PLR0913 - what it is made of
        self,
        folder: Path,
        connect: Callable[[], Connection],
        collection_options: CollectionOptions,
        *,
        on_open: Callable[[Connection], Awaitable[None]],
        size_limit: int,
        max_bytes: float,
        names: CollectionNames | None = None,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self._folder = folder
        self._connect = connect
        self._collection_options = collection_options
        self._on_open = on_open
        self._size_limit = size_limit
        self._max_bytes = max_bytes
        self._names = names or CollectionNames()
        self._sleep = sleep
        self._thread = ThreadPoolExecutor(1, "outbox")
        self._outbox: Outbox | None = None
        self._sender: Sender | None = None
        self._stack = AsyncExitStack()
        self._own: Connection | None = None
        self._opening = asyncio.Lock()
        self._remembered: defaultdict[Target, set[bytes]] = defaultdict(set)
        self._forgotten = self._renewed = 0
        self._backoff = Backoff(threshold=THRESHOLD)
        self.epoch = 0
        """Changes whenever ids are forgotten. A stored answer of an older epoch is not valid."""
        self.added = 0
        """Points that this process has put into the outbox."""
        self.dropped = 0
        """Points that could not be put into the outbox."""

    async def __aenter__(self) -> Self:
        """Open the outbox and begin to send. Raises Unusable, and what `on_open` raises."""
        async with AsyncExitStack() as stack:
            stack.callback(self._thread.shutdown, wait=False)
            try:
                await self._open(stack)
            except FAILURES as error:
                words = str(error) or "another process keeps it locked"
                raise Unusable(f"{self._folder}: the outbox cannot be used: {words}") from error
            self._stack = stack.pop_all()
        return self

    async def _open(self, stack: AsyncExitStack) -> None:
        self._outbox = await self._call(partial(Outbox, self._folder, self._size_limit))
        stack.push_async_callback(self._close_outbox)
        self._forgotten = await self._on_disk(lambda outbox: outbox.forgotten)
        self._sender = Sender(
            self._folder,
            self._on_disk,
            self._connect,
            self._collection_options,
            names=self._names,
            max_bytes=self._max_bytes,
            sleep=self._sleep,
        )
        stack.push_async_callback(self._sender.close)
        qdrant = await self._sender.take_first()
        if qdrant is not None:
            await self._on_open(qdrant)
        for work in (self._sender.run(), self._check_forgotten_forever()):
            stack.push_async_callback(_end, asyncio.create_task(work))

    async def __aexit__(self, *_: object) -> None:
        """Stop sending. Pending points are sent after the next start."""
        await self._stack.aclose()

    @property
    def sending(self) -> bool:
        """Whether this process sends."""
        return self._sender is not None and self._sender.sending

    def knows(self, target: Target, point: bytes) -> bool:
        """Tell whether a plain point is remembered as added."""
        ids = self._remembered.get(target)
        return ids is not None and point in ids

    def knows_all(self, target: Target, points: Iterable[bytes]) -> bool:
        """Tell whether all of several plain points are remembered as added."""
        ids = self._remembered.get(target)
        return ids is not None and ids.issuperset(points)

    def _forget(self) -> None:
        self._remembered.clear()
        self.epoch += 1

    async def add(self, target: Target, points: Sequence[Point]) -> None:
        """Put points into the outbox unless they are known to be indexed. Never raises.

        When it returns they are on disk. Plain points are remembered by their ids.
        """
        # Of equal ids in one request the last counts.
        points_by_id = {point.id: point for point in points}
        if not points_by_id or self._sender is None:
            return
        if self._backoff.is_waiting:
            self.dropped += len(points_by_id)
            return
        try:
            added = await self._on_disk(
                lambda outbox: outbox.add(target, list(points_by_id.values()))
            )
        except OutboxFull as error:
            self.dropped += len(points_by_id)
            self._backoff.fail()
            log.error("not indexed, %d points: the outbox is full: %s", len(points_by_id), error)  # noqa: TRY400
            return
        except FAILURES as error:
            self.dropped += len(points_by_id)
            self._backoff.fail()
            log.warning("not indexed, %d points: the outbox fails: %s", len(points_by_id), error)
            return
        except Exception:
            self.dropped += len(points_by_id)
            log.exception("not indexed, %d points", len(points_by_id))
            return
        self._backoff.succeed()
        ids = [point.id for point in points_by_id.values() if point.plain]
        if ids:
            if (
                sum(_TARGET + len(remembered) for remembered in self._remembered.values())
                > MAX_REMEMBERED
            ):
                self._forget()
            self._remembered[target].update(ids)
        if added:
            self.added += added
            self._sender.wake.set()

    async def connection(self) -> Connection:
        """Return an open connection for reading: the sender's, or this process's own.

        Raises QdrantFailure; InUse for a folder that another process has open.
        """
        if self._sender is not None and self._sender.connection is not None:
            return self._sender.connection
        async with self._opening:
            if self._own is None:
                own = self._connect()
                if own.embedded:
                    raise InUse("the folder is the sending process's; it is not open in this one")
                self._own = await self._stack.enter_async_context(own)
            return self._own

    async def snapshot(self) -> dict[str, Any] | None:
        """Return backlog and counters of this process; None if the outbox cannot be read."""
        sender = self._sender
        if sender is None:
            return None
        try:
            backlog = await self._on_disk(Outbox.backlog)
        except FAILURES as error:
            log.warning("the outbox cannot be read: %s", error)
            return None
        age = 0.0 if backlog.oldest is None else max(0.0, time.time() - backlog.oldest)
        return {
            "backlog_points": backlog.points,
            "backlog_bytes": backlog.bytes,
            "backlog_age_s": round(age, 3),
            "refused_points": backlog.dead,
            "refused": backlog.refusals(),
            "sending": self.sending,
            "last_failure": sender.counters.last_failure,
            "since_start": self.since_start(),
        }

    def since_start(self) -> dict[str, int]:
        """Return the counters of this process by name; empty before it is open."""
        sender = self._sender
        if sender is None:
            return {}
        return {
            "added": self.added,
            "sent": sender.counters.sent,
            "refused": sender.counters.refused,
            "dropped": self.dropped,
            "failures": sender.counters.failed,
            "damaged": 0 if self._outbox is None else self._outbox.damaged,
        }

    async def _on_disk(self, work: Callable[[Outbox], T]) -> T:
        outbox = self._outbox
        if outbox is None:
            raise OSError("the outbox is closed")
        try:
            return await self._call(lambda: outbox.guarded(work))
        finally:
            if outbox.renewed != self._renewed:
                # Pending points of the former file may not have arrived.
                self._renewed = outbox.renewed
                self._forget()

    async def _call(self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._thread, work)

    async def _close_outbox(self) -> None:
        outbox, self._outbox = self._outbox, None
        if outbox is not None:
            with suppress(*FAILURES):
                await self._call(outbox.close)

    async def _check_forgotten_forever(self) -> None:
        """Forget all ids when another process has found points missing in Qdrant, and once an hour.

        The outbox knows the age of each id, and decides when a point is written again.
        """
        clock = asyncio.get_running_loop().time
        since = clock()
        while True:
            await asyncio.sleep(TICK_SECONDS)
            with suppress(*FAILURES):
                forgotten = await self._on_disk(lambda outbox: outbox.forgotten)
                if forgotten != self._forgotten or clock() > since + MEMORY_SECONDS:
                    self._forgotten, since = forgotten, clock()
                    self._forget()


async def _end(task: asyncio.Task[None]) -> None:
    task.cancel()
    with suppress(asyncio.CancelledError):
        await task
