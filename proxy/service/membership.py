"""This node among those that share a Redis: it says that it is alive, and learns what others did.

Every process of a node is a member; one of them, the keeper, beats for all. The keeper holds a lock
in the cache folder; when it ends, another process takes over. It tells the sums of the ledger and
what clients were billed, learns of purges, and makes them. The others notice these by the signal
of the store (`cache.disk.purge`), and read the rules that hold from then on in the purge log.

Nothing here fails a request, and no request waits for it. What cannot be told is told later.
"""

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from importlib.metadata import version
from types import TracebackType
from typing import Self

from embedding_proxy.cache.disk.lock import WriterLock
from embedding_proxy.cache.disk.store import Store
from embedding_proxy.cache.key import Partition
from embedding_proxy.cache.ledger import COLUMNS, MAX_LEDGER_KEYS, By, Line
from embedding_proxy.cache.shared import sweep
from embedding_proxy.cache.shared.allowance import Allowance
from embedding_proxy.cache.shared.client import RedisClient
from embedding_proxy.cache.shared.node_registry import (
    BEAT_S,
    NodeName,
    NodeState,
    Registry,
)
from embedding_proxy.cache.shared.purge_exchange import (
    NodeReceipt,
    PurgeExchange,
    PurgeState,
    SharedPurges,
)
from embedding_proxy.cache.shared.purge_log import (
    LoggedPurge,
    PurgeLog,
    PurgeRecord,
    floor_purge,
)
from embedding_proxy.index.outbox import FAILURES, purge_points

from .budgets import Budgets

log = logging.getLogger("embedding_proxy.shared")

KEEPER_LOCK = "node.lock"
APPLY_LOCK = "purge.lock"
"""In the cache folder: whoever holds it deletes what was purged."""
SUMS_S = 15.0
"""Seconds between two times that the sums of the ledger are told; more where they take long."""
_SUMS_SHARE = 20
COMPLETE_S = 600.0
"""Seconds between two times that all that clients were billed is told: Redis may evict it."""
KNOWN_S = 600.0
"""How often the purge log notes that this node knows all purges."""
SWEEP_S = 60.0
"""After how long a deletion in the shared tier that was interrupted is tried again."""
_SWEPT_TOGETHER = 500
START_S = 1.5
"""How long a start waits for the server, to learn what was purged."""
MAX_AHEAD_S = 1.0
"""A clock that differs by more is worth a warning."""


class Membership:
    """Open it with `async with`, after the store and the client. For one event loop."""

    def __init__(
        self,
        client: RedisClient,
        store: Store,
        budgets: Budgets,
        node: NodeName,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`clock` gives seconds: it is only for what is done now and then.

        A node without an id heeds the purges of others, and takes no other part.
        """
        self.node = node
        self._client = client
        self.registry = Registry(client, node, version("embedding-proxy"))
        self.exchange = PurgeExchange(client)
        self.log = PurgeLog(store.folder)
        self.alive = 1
        """Nodes that are alive, as far as is known; they share what is per node."""
        self.conflict = ""
        """"name" or "id" where another node has the same one."""
        self.ahead_s = 0.0
        """By how much the clock of this machine is ahead of the server's."""
        self._store = store
        self._budgets = budgets
        self._clock = clock
        self._directory = store.folder.parent
        self._lock: WriterLock | None = None
        self._is_locked_out = False
        """Whether no process of this node can be the keeper, as in a folder that is read-only."""
        self._state: PurgeState | None = None
        self._known_at = self._sums_at = self._complete_at = float("-inf")
        self._sums_wait_s = SUMS_S
        self._unwritten: set[str] = set()
        """Purges that hold in this process, and could not be written to the log."""
        self._receipts: list[tuple[str, NodeReceipt]] = []
        """Those that are not told yet."""
        self._pending: list[LoggedPurge] = []
        """Purges that this node has not made yet."""
        self._unswept: list[LoggedPurge] = []
        """Purges that the shared tier may still hold records of."""
        self._sweep_at = float("-inf")
        self._applying: asyncio.Task[None] | None = None
        self._stop = asyncio.Event()
        self._ticking: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Self:
        """Learn what was purged while this node was away, as far as the server answers."""
        forget = self._store.on_purge

        def heed() -> None:
            self.log.refresh()
            forget()

        self._store.on_purge = heed
        self.log.refresh()
        await self._tick_safely()
        with contextlib.suppress(TimeoutError):
            # A server that is slow for a moment must not hide what was purged.
            async with asyncio.timeout(START_S):
                while (self.is_keeper or self._is_locked_out) and self._state is None:
                    await asyncio.sleep(START_S / 15)
                    await self._tick_safely()
        self._ticking = asyncio.create_task(self._tick_forever())
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        self._stop.set()
        for task in (self._ticking, self._applying):
            if task is not None:
                await task
        if self.is_keeper:
            await self._budgets.publish()
            await self._tell_sums()
            await self.registry.leave()
        self._let_go()

    @property
    def pending_purges(self) -> int:
        """Purges whose entries this process is still to delete."""
        return len(self._pending)

    @property
    def is_keeper(self) -> bool:
        """Whether this process beats for the node."""
        return self._lock is not None

    def is_purged(self, partition: Partition, address: bytes, stored: float) -> bool:
        """Tell whether an entry on disk that was stored at a time is purged; see `PurgeLog`."""
        return self.log.is_purged(partition, address, stored)

    def is_purged_shared(self, partition: Partition, address: bytes, stored: float) -> bool:
        """Tell the same of an entry of the shared tier."""
        return self.log.rules.is_purged(partition, address, stored)

    def allowance(self, name: str, limits: Mapping[str, float]) -> Allowance:
        """Return what counts the limits a minute of a provider's account for all nodes."""
        return Allowance(self._client, name, limits, lambda: self.alive)

    async def nodes(self) -> Sequence[NodeState] | None:
        """Return all nodes, with the sums of their ledgers; None while the server is away.

        Those of this node are as its ledger has them now, those of others as they told them last.
        """
        nodes = await self.registry.read()
        if nodes is None:
            return None
        sums, days = await self._sums()
        if sums is None or days is None:
            return nodes.nodes
        return [
            replace(node, sums=tuple(sums), days=tuple(days)) if node.id == self.node.id else node
            for node in nodes.nodes
        ]

    async def _tick_forever(self) -> None:
        while not self._stop.is_set():
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(BEAT_S):
                    await self._stop.wait()
            if not self._stop.is_set():
                await self._tick_safely()

    async def _tick_safely(self) -> None:
        try:
            await self.tick()
        except Exception:
            # Nobody awaits the task: were it to end, nothing would be learned any more.
            log.exception("what nodes tell one another failed")

    async def tick(self) -> None:
        """Do once what is done every BEAT_S seconds."""
        if not (self.is_keeper or self._take_over()):
            nodes = await self.registry.read(has_sums=False)
            if nodes is not None:
                names = [node.name for node in nodes.nodes if node.is_alive]
                self.alive = max(1, len(names))
                # The keeper says so.
                self.conflict = "name" if names.count(self.node.name) > 1 else ""
                if self._is_locked_out:
                    await self._learn(nodes.now)
            return
        beat = await self.registry.beat()
        if beat is not None:
            self.alive = beat.alive
            self._note_conflict(beat.conflict)
            self._note_clock(beat.ahead_s)
            await self._learn(beat.now)
        await self._apply()
        if beat is not None and self._clock() >= self._sums_at + self._sums_wait_s:
            began = self._clock()
            is_due = began >= self._complete_at + COMPLETE_S
            if is_due:
                self._complete_at = began
            await self._budgets.publish(is_complete=is_due)
            await self._tell_sums()
            self._sums_at = self._clock()
            self._sums_wait_s = max(SUMS_S, _SUMS_SHARE * (self._sums_at - began))

    def _take_over(self) -> bool:
        """Become the keeper unless another process is; return whether this is it now."""
        if not self.node.id:
            self._is_locked_out = True
            return False
        try:
            lock = WriterLock(self._directory / KEEPER_LOCK, 0)
        except OSError as error:
            if not self._is_locked_out:
                log.warning(
                    "this node heeds the purges of others, and has no other part in what nodes"
                    " share: %s",
                    error,
                )
            self._is_locked_out = True
            return False
        self._is_locked_out = False
        try:
            lock.__enter__()
        except TimeoutError:
            lock.close()
            return False
        self._lock = lock
        return True

    def _let_go(self) -> None:
        if self._lock is not None:
            self._lock.__exit__(None, None, None)
            self._lock.close()
            self._lock = None

    def _note_conflict(self, conflict: str) -> None:
        if conflict == "name" != self.conflict:
            log.warning(
                "another node that is alive has the name %r: give each node its own, server.node",
                self.node.name,
            )
        elif conflict == "id" != self.conflict:
            log.warning(
                "another node that is alive has the same node-id, as in a copied folder: stop this"
                " one, and delete the file node-id in its cache folder"
            )
        self.conflict = conflict

    def _note_clock(self, ahead_s: float) -> None:
        if abs(ahead_s) > MAX_AHEAD_S >= abs(self.ahead_s):
            log.warning(
                "the clock of this machine is %.1f s %s that of the shared Redis: set it right,"
                " for purges and ages go by it",
                *(abs(ahead_s), "ahead of" if ahead_s > 0 else "behind"),
            )
        self.ahead_s = ahead_s

    async def _learn(self, now: float) -> None:
        """Tell the purges that others do not know, and learn theirs."""
        state = await self.exchange.poll()
        if state is None:
            return
        before = self._state or state
        # Emptied, or back with older data, from a snapshot or a replica.
        is_emptied = state.generation != before.generation or state.number < before.number
        if is_emptied and self.is_keeper:
            await self._budgets.publish(is_complete=True)
            self.registry.forget_told()
            self._sums_at = float("-inf")
        record = await asyncio.to_thread(self.log.peek)
        untold = is_emptied or not all(one.is_told for one in record.purges.values())
        is_known = state == self._state and not untold
        if is_known and self._clock() < self._known_at + KNOWN_S:
            self._pending = [one for one in record.purges.values() if not one.is_done]
            return
        shared = await self.exchange.read()
        if shared is None:
            return
        present = {one.id for one in shared.purges}
        missing = [
            replace(one, is_swept=False)
            for one in record.purges.values()
            # Of those that all knew, what everybody may forget is not brought back.
            if not (one.id in present or one.is_floor or (one.is_told and one.at <= shared.floor))
        ]
        if missing and not await self.exchange.add(missing):
            return
        is_written = await self._add(shared, missing, now)
        if is_written or self._is_locked_out:
            self._state, self._known_at = state, self._clock()
        if is_written:
            self._unswept = [one for one in (*shared.purges, *missing) if not one.is_swept]
            await self.exchange.compact(shared)

    async def _add(self, shared: SharedPurges, missing: Sequence[LoggedPurge], now: float) -> bool:
        """Write purges to the log and let them hold; return whether they could be written."""
        news = [replace(one, is_told=True) for one in (*shared.purges, *missing)]
        new: list[LoggedPurge] = []

        def change(record: PurgeRecord) -> None:
            if shared.floor > record.known_until:
                news.append(floor_purge(shared.floor))
            new.extend(record.add(news))
            record.mark_swept({one.id for one in news})
            record.known_until = max(record.known_until, now)

        try:
            record = await asyncio.to_thread(self.log.change, change)
        except (OSError, TimeoutError) as error:
            # They hold in this process, and are written when that is possible.
            if [one for one in news if one.id not in self._unwritten]:
                log.warning("the purge log cannot be written: %s", error)
                self._unwritten = {one.id for one in news}
                self.log.hold(news)
                await self._store.announce_purge()
            return False
        self._unwritten.clear()
        self.log.hold(())
        self._pending = [one for one in record.purges.values() if not one.is_done]
        if new:
            # From here on nothing of it is served; then it is deleted.
            self.log.refresh()
            await self._store.announce_purge()
            log.info("%d purges of other nodes are made here", len(new))
        return True

    async def _apply(self) -> None:
        """Delete what was purged, in a task of its own: that may take long."""
        if self._applying is None or self._applying.done():
            if self._pending or self._unswept:
                self._applying = asyncio.create_task(self._apply_all(self._pending))
            elif self._receipts:
                await self._tell_receipts()

    async def _apply_all(self, purges: Sequence[LoggedPurge]) -> None:
        try:
            lock = WriterLock(self._directory / APPLY_LOCK, 0)
        except OSError:
            return
        with contextlib.closing(lock), contextlib.suppress(TimeoutError), lock:
            for one in purges:
                if self._stop.is_set():
                    return
                if not await self._purge_outbox(one):
                    return
                deleted = await self._store.purge(one.choice, one.at, self._stop.is_set)
                if deleted is None:
                    return
                try:
                    await asyncio.to_thread(self.log.mark_done, one.id)
                except (OSError, TimeoutError) as error:
                    log.warning("the purge log cannot be written: %s", error)
                    return
                self._pending = [other for other in self._pending if other.id != one.id]
                if one.is_floor:
                    # From here on the disk may have older entries: those of the shared tier.
                    await self._store.announce_purge()
                    continue
                receipt = NodeReceipt(self.node.id, self.node.name, deleted)
                self._receipts.append((one.id, receipt))
        await self._tell_receipts()
        await self._sweep_all()

    async def _purge_outbox(self, purge: LoggedPurge) -> bool:
        """Delete points that wait for Qdrant; return whether that is done.

        A purge by age is about the ages of entries: their points are sent.
        """
        choice = purge.choice
        if choice.stored_before is not None or choice.used_before is not None:
            return True
        try:
            await asyncio.to_thread(
                purge_points,
                self._directory,
                namespace=choice.namespace,
                space=choice.space,
                address=choice.address,
                before=purge.at,
            )
        except FAILURES as error:
            log.warning("deleting purged points that wait for Qdrant failed: %s", error)
            return False
        return True

    async def _sweep_all(self) -> None:
        """Delete in the shared tier what was purged, unless another node does.

        A purge is left only when the server knows that it is done; until then its rule is kept.
        """
        while self._unswept and not self._stop.is_set() and self._clock() >= self._sweep_at:
            lot = self._unswept[:_SWEPT_TOGETHER]
            swept = await self.exchange.swept(lot)
            if swept is None:
                return
            self._unswept = [one for one in self._unswept if one.id not in swept]
            if swept:
                continue
            claimed = [one for one in lot if await sweep.claim(self._client, one, self.node.id)]
            if not claimed:
                return
            try:
                deleted = await sweep.delete(self._client, claimed, self._stop.is_set)
                await self.exchange.mark_swept(claimed)
            except sweep.Interrupted as error:
                self._sweep_at = self._clock() + SWEEP_S
                if not self._stop.is_set():
                    log.warning(
                        "deleting what was purged in the shared tier: no answer of %s", error
                    )
                return
            finally:
                await sweep.release(self._client, claimed)
            if deleted:
                log.info("%d purged records were deleted in the shared tier", deleted)

    async def _tell_receipts(self) -> None:
        while self._receipts:
            if not await self.exchange.acknowledge(*self._receipts[0]):
                return
            del self._receipts[0]

    async def _tell_sums(self) -> None:
        sums, days = await self._sums()
        if sums is not None and days is not None:
            await self.registry.tell_sums(sums, days)

    async def _sums(self) -> tuple[list[Line] | None, list[Line] | None]:
        """Return the sums of the ledger of this node, by COLUMNS and by day."""
        sums = await self._store.ledger(COLUMNS, MAX_LEDGER_KEYS)
        return sums, await self._store.ledger([By.DAY])
