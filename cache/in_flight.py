"""Single flight: which keys are being bought in this process, and the one task that buys each.

A fetch runs as a task of its own, and everyone, its leader too, only waits for it: a cancelled
leader harms no waiter. When nobody waits any more it is cancelled, unless a call was begun for it:
that is paid for, so it is finished and kept. What has come before the rest is given to waiters at
once, and stays given when the rest fails. What comes after the end of a fetch, of a call that
nobody waits for any more, is kept and billed like anything else. For one thread: the event loop's.
"""

import asyncio
from collections import Counter, deque
from collections.abc import Callable, Collection, Coroutine, Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from types import MappingProxyType
from typing import Any, Generic, TypeVar

from embedding_proxy.providers.base import Context, Embedded, Embedder, Input
from embedding_proxy.providers.charge import Bill
from embedding_proxy.providers.errors import (
    ClientKeyRefused,
    DeadlineExceeded,
    EmbeddingError,
    InvalidRequest,
    NoProviderAvailable,
    PermissionDenied,
    ProviderError,
    ScopedQuotaExceeded,
    UpstreamTimeout,
)

from .errors import BudgetExceeded
from .key import Key, Keyring
from .ledger import NOTHING, Usage, charge_usage, ledger_key
from .record import Entry
from .tiers import Tiers

K = TypeVar("K")
T = TypeVar("T")

MAX_RECENT = 16_384
"""Keys bought last that are remembered for requests that have looked before."""
# Timers may go off early by as much, in seconds: uvloop's count whole milliseconds.
_TICK = 0.01


class SharedTask(Generic[K, T]):
    """A task that buys some keys, and that several requests wait for.

    The last to leave cancels it, unless a call was begun. `context` is the leader's: by its
    deadline, or its client's key, the task may fail for the leader alone.
    """

    def __init__(
        self,
        keys: Sequence[K],
        work: Callable[["SharedTask[K, T]"], Coroutine[Any, Any, T]],
        context: Context,
    ) -> None:
        self.keys = keys
        self.context = context
        self.failed_key: K | None = None
        """Of the one input that its failure is about."""
        self.begun: set[K] = set()
        """Those for which a call was begun: these are finished, though nobody may wait any more."""
        self.waiters = 0
        self.abandonment: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        """Done once nobody waits any more: only what was begun may still be waited for."""
        self.task = asyncio.create_task(work(self))

    def begin(self, indices: Sequence[int]) -> None:
        """Note that a call for the keys at these indices is about to be sent."""
        self.begun.update(self.keys[index] for index in indices)

    def leave(self) -> None:
        """Note that one who waited no longer does; the last one out ends what was not begun."""
        self.waiters -= 1
        if not self.waiters and not self.task.done():
            if not self.abandonment.done():
                self.abandonment.set_result(None)
            if not self.begun:
                self.task.cancel()

    def is_leader_specific(
        self, error: EmbeddingError, wanted: Collection[K], context: Context
    ) -> bool:
        """Tell whether it failed for a reason that need not hold for one who waited for it.

        What was refused may be another's input that was bought along; or the leader's time was up;
        or its own key is refused, or has used up its limits. `context` is that of who waited.
        """
        if self._is_of_client(error, context):
            return True
        if self.failed_key is not None:
            return self.failed_key not in wanted
        if isinstance(error, InvalidRequest | PermissionDenied | ScopedQuotaExceeded):
            # A budget is about no input.
            return not (isinstance(error, BudgetExceeded) or set(self.keys) <= set(wanted))
        if self.abandonment.done():
            # It was joined after everybody had gone, and was not asked for again when it failed.
            return True
        if isinstance(error, DeadlineExceeded | UpstreamTimeout):
            now, deadline = asyncio.get_running_loop().time(), self.context.deadline
            return deadline is not None and deadline <= now + _TICK
        return False

    def _is_of_client(self, error: EmbeddingError, context: Context) -> bool:
        """Tell whether it failed for what is the leader's client's own: its budget, or its key."""
        if isinstance(error, BudgetExceeded):
            return self.context.account.client != context.account.client
        is_other_key = self.context.credential != context.credential
        failures = NoProviderAvailable | ClientKeyRefused | ProviderError
        return is_other_key and isinstance(error, failures)


class Fetch(SharedTask[Key, None]):
    """The purchase of keys of one space, in the order of the call, for one leader.

    Charges and inputs are counted as they come, before what was bought is written.
    """

    def __init__(  # noqa: PLR0913, PLR0917 - what is bought, where, and where all of it goes
        self,
        in_flight: "InFlight",
        tiers: Tiers,
        inner: Embedder,
        ring: Keyring,
        inputs: Mapping[Key, Input],
        context: Context,
    ) -> None:
        self._in_flight = in_flight
        self._tiers = tiers
        self._ring = ring
        self.entries: dict[Key, Entry] = {}
        """What has been bought so far, and is kept."""
        self.news: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        """Done when there are more entries; then there is another."""
        self.providers: tuple[str, ...] = ()
        self.charged = NOTHING
        """The sums of all charges so far; inputs are not in it."""
        self._received: set[Key] = set()
        self._sellers: dict[int, str] = {}
        """Who was paid last for the key at an index."""
        self._writes: list[asyncio.Task[None]] = []
        self._is_written = True
        """Whether all that was counted so far goes with a write that has begun."""
        self._is_over = False
        super().__init__(list(inputs), lambda _: self._run(inner, list(inputs.values())), context)

    def serves(self, key: Key, context: Context) -> bool:
        """Tell whether a request may wait for a key of the fetch.

        One that leaves no trace shows nobody that it waits. One that takes no entry, however new,
        takes no purchase that was begun before it came, unless its terms name one of the same key
        and of a leader like it.
        """
        terms = context.terms
        if (self.abandonment.done() and key not in self.begun) or not terms.write:
            return False
        if terms.max_age > 0:
            return True
        is_same_key = terms.joins_same_key and self.context.credential == context.credential
        return is_same_key and self.context.terms.max_age <= 0

    async def _run(self, inner: Embedder, inputs: Sequence[Input]) -> None:
        """Buy, store, hand out, each part as it comes. A failure keeps the parts before it.

        When it ends, all that was charged is on disk, also where nothing is to be kept.
        """
        try:
            context = replace(
                self.context,
                on_part=self._keep,
                on_charge=self._charge,
                on_begin=self.begin,
                abandoned=self.abandonment,
            )
            embedded = await inner.embed(self._ring.space, inputs, context)
            self.providers = embedded.providers
            if len(self._received) < len(inputs):
                await self._keep(range(len(inputs)), embedded)
        except EmbeddingError as error:
            if error.index is None:
                raise
            if isinstance(error, ProviderError) and len(self.keys) > 1 and not self._received:
                # A provider that is down fails with every input, with each in a call of its own if
                # need be: none of them is to blame.
                raise error.with_index(None) from error
            self.failed_key = self.keys[error.index]
            raise
        finally:
            self._is_over = True
            for write in self._writes:
                await asyncio.shield(write)
            if not self._is_written:
                await asyncio.shield(self._in_flight.write(self._tiers.flush_counts()))

    def _charge(self, bill: Bill) -> None:
        """Count a charge, and tell the leader's `on_charge`."""
        self._sellers.update(dict.fromkeys(bill.places, bill.provider))
        usage = charge_usage(bill)
        self.charged = self.charged.plus(usage)
        self._count(bill.provider, usage)
        if self.context.on_charge is not None:
            self.context.on_charge(bill)
        if self._is_over:
            self._in_flight.write(self._tiers.flush_counts())

    def _count(self, provider: str, usage: Usage) -> None:
        self._is_written = False
        key = ledger_key(self._ring.partition, self.context.account, provider)
        self._tiers.count(key, usage)

    async def _keep(self, places: Sequence[int], part: Embedded) -> None:
        """Keep the answer to the inputs at these places, and hand it out; once for each input."""
        rows = zip(places, part.vectors, part.tokens, strict=True)
        new = [row for row in rows if self.keys[row[0]] not in self._received]
        if not new:
            return
        entries = {
            (key := self.keys[index]): Entry(vector, tokens, part.counted, key.digest)
            for index, vector, tokens in new
        }
        self._received.update(entries)
        sellers = Counter(self._sellers.get(index, "") for index, *_ in new)
        for seller, inputs in sellers.items():
            self._count(seller, Usage(misses=inputs))
        # Who brings it may be called off while it is written; it is bought all the same.
        write = self._in_flight.write(self._put(entries))
        self._writes.append(write)
        await asyncio.shield(write)

    async def _put(self, entries: Mapping[Key, Entry]) -> None:
        if self.context.terms.write:
            # What was counted so far goes into the same transaction.
            self._is_written = True
        await self._tiers.put_many(entries, self._ring.partition, self.context.terms)
        self._in_flight.note_landed(self, entries)
        self.entries.update(entries)
        self.news.set_result(None)
        self.news = asyncio.get_running_loop().create_future()


async def wait(
    tasks: Collection[SharedTask[Any, Any]], joins: Mapping[Key, Fetch] = MappingProxyType({})
) -> None:
    """Return when all `tasks` have ended, well or not, and each key of `joins` is there.

    A key that is not there then is one whose fetch has ended without: its task tells why.
    A caller that is cancelled here leaves the tasks to whoever else waits. It counts as waiting
    from the moment of the call, not from a later turn of the loop: a leader that is cancelled in
    between finds its waiters already there.
    """
    everyone = {*tasks, *joins.values()}
    for each in everyone:
        each.waiters += 1
    try:
        if tasks:
            await asyncio.wait([each.task for each in tasks])
        for key, fetch in joins.items():
            while key not in fetch.entries and not fetch.task.done():
                both = (fetch.task, fetch.news)
                await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for each in everyone:
            each.leave()


class _Joinable:
    """What every InFlight of one store knows of the others' fetches."""

    def __init__(self, max_recent: int) -> None:
        self.fetches: dict[Key, Fetch] = {}
        """Those that may be joined."""
        self.landed = 0
        self.recent: deque[Key] = deque(maxlen=max_recent)


class InFlight:
    """The fetches in progress, by key, and all tasks that must not be lost."""

    def __init__(self, max_recent: int = MAX_RECENT) -> None:
        self._joinable = _Joinable(max_recent)
        self._fetches = self._joinable.fetches
        self._tasks: set[asyncio.Task[Any]] = set()
        """Of all fetches: also of those that another has replaced, or that leave no trace."""
        self._writes: set[asyncio.Task[Any]] = set()
        """What is being kept of them; some is brought after the end of its fetch."""

    def __len__(self) -> int:
        return len(self._fetches)

    def successor(self) -> "InFlight":
        """Return another one that joins the same fetches, and owns only those that it adds."""
        successor = InFlight()
        successor._joinable = self._joinable
        successor._fetches = self._fetches
        return successor

    @property
    def landed(self) -> int:
        """How many keys have been bought and kept."""
        return self._joinable.landed

    def split(self, keys: Iterable[Key], context: Context) -> tuple[dict[Key, Fetch], list[Key]]:
        """Split keys into those to wait for, with their fetch, and those that nobody buys yet."""
        joins: dict[Key, Fetch] = {}
        leads: list[Key] = []
        for key in keys:
            fetch = self._fetches.get(key)
            if fetch is not None and fetch.serves(key, context):
                joins[key] = fetch
            else:
                leads.append(key)
        return joins, leads

    def add(self, fetch: Fetch) -> None:
        """Let a fetch be joined. Its keys are those that `split` has just given as nobody's.

        It takes the place of one that did not serve; that one goes on for those who wait for it.
        """
        if fetch.context.terms.write:
            self._fetches.update(dict.fromkeys(fetch.keys, fetch))
        self.add_task(fetch.task)
        fetch.task.add_done_callback(lambda _: self._remove(fetch))

    def add_task(self, task: asyncio.Task[Any]) -> None:
        """Let `close` end a task."""
        self._tasks.add(task)
        task.add_done_callback(self._end)

    def _end(self, task: asyncio.Task[Any]) -> None:
        # Read the failure: when nobody is left to hear of it, that is no news to report.
        _ = task.cancelled() or task.exception()
        self._tasks.discard(task)

    def _remove(self, fetch: Fetch) -> None:
        for key in fetch.keys:
            # It may have been replaced by a newer one of the same key.
            if self._fetches.get(key) is fetch:
                del self._fetches[key]

    def note_landed(self, fetch: Fetch, entries: Mapping[Key, Entry]) -> None:
        """Note what a fetch has bought and kept."""
        if fetch.context.terms.write:
            self._joinable.landed += len(entries)
            self._joinable.recent.extend(entries)

    def landed_since(self, mark: int, keys: Collection[Key]) -> set[Key]:
        """Return those of some keys that may have been kept since `landed` was `mark`."""
        count, recent = self.landed - mark, self._joinable.recent
        if count > len(recent):
            return set(keys)
        return {key for key in islice(reversed(recent), count) if key in keys}

    def write(self, work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        """Start to write what was bought, or what was charged: nothing ends that early."""
        task = asyncio.create_task(work)
        self._writes.add(task)
        task.add_done_callback(self._writes.discard)
        return task

    async def drain(self) -> None:
        """Wait until all fetches have ended by themselves, and what they have got is kept."""
        while tasks := self._tasks | self._writes:
            await asyncio.wait(tasks)
            await asyncio.sleep(0)

    async def close(self) -> None:
        """End all fetches, and wait until what they have got is kept."""
        while tasks := set(self._tasks):
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)
            # One that a write has started meanwhile hands over what was bought in its first step.
            await asyncio.sleep(0)
        while self._writes:
            await asyncio.wait(self._writes)
