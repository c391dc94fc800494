"""Single flight: which keys are being bought in this process, and the one task that buys each.

A fetch runs as a task of its own, and everyone, its leader too, only waits for it: a cancelled
leader harms no waiter. When nobody waits any more it is cancelled, unless a call was begun for it:
that is paid for, so it is finished and kept. What has come before the rest is given to waiters at
once, and stays given when the rest fails. What comes after the end of a fetch, of a call that
nobody waits for any more, is kept and billed like anything else. For one thread: the event loop's.

Between processes, `leases` say who buys. A fetch buys what it gets leases for, and waits until the
rest is in a tier, or its lease can be had. `ledger` counts what was bought.
"""

import asyncio
from collections import deque
from collections.abc import Collection, Coroutine, Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from types import MappingProxyType
from typing import Any, TypeVar

from embedding_proxy.providers.base import Context, Embedded, Embedder, Input, slices
from embedding_proxy.providers.charge import Bill
from embedding_proxy.providers.errors import DeadlineExceeded, EmbeddingError, ProviderError

from .key import Key, Keyring, Keys
from .leases import FRESH_S, Leases, pauses
from .ledger import PurchaseLedger
from .record import Entry
from .shared_task import SharedTask
from .tiers import LOT, Tiers

T = TypeVar("T")

MAX_RECENT = 16_384
"""Keys bought last that are remembered for requests that have looked before."""


class Fetch(SharedTask[Key, None]):
    """The purchase of keys of one space, in the order of the call, for one leader.

    Charges and inputs are counted as they come, before what was bought is written. What another
    process has bought is an entry like any other, and is not counted here.
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
        self._inner = inner
        self._ring = ring
        self._inputs = list(inputs.values())
        self.entries: dict[Key, Entry] = {}
        """What there is so far, and is kept."""
        self.coalesced: set[Key] = set()
        """Those of the entries that another process has bought."""
        self.news: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        """Done when there are more entries; then there is another."""
        self.providers: tuple[str, ...] = ()
        self.ledger = PurchaseLedger(tiers.count, ring.partition, context.account)
        self._received: set[Key] = set()
        """Those that were bought."""
        self._leased: set[bytes] = set()
        """Addresses of which it holds the lease."""
        self._writes: list[asyncio.Task[None]] = []
        self._is_over = False
        super().__init__(list(inputs), lambda _: self._run(), context)

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

    async def _run(self) -> None:
        """Buy, store, hand out, each part as it comes. A failure keeps the parts before it.

        When it ends, all that was charged is on disk, also where nothing is to be kept.
        """
        leases, terms = self._in_flight.leases, self.context.terms
        try:
            if leases is None or not terms.write or terms.max_age <= 0:
                # It leaves no trace, or takes nothing that another buys.
                await self._buy(range(len(self.keys)))
            else:
                await self._obtain(leases)
        except EmbeddingError as error:
            if error.index is not None:
                self.failed_key = self.keys[error.index]
            raise
        finally:
            self._is_over = True
            try:
                for write in self._writes:
                    await asyncio.shield(write)
                if not self.ledger.is_written:
                    await asyncio.shield(self._in_flight.write(self._tiers.flush_counts()))
            finally:
                if self._leased:
                    self._release(self._leased)

    async def _obtain(self, leases: Leases) -> None:
        """Buy what no other process buys; wait for the rest until it is there, or may be bought."""
        missing: Sequence[int] = range(len(self.keys))
        self._leased.update(await leases.acquire([key.address for key in self.keys]))
        if self._leased and not self._has_fresh_lookup:
            missing = await self._take_stored(missing)
        if len(self._leased) < len(missing):
            await self._buy_some(leases, missing)
        elif missing:
            await self._buy(missing)

    async def _buy_some(self, leases: Leases, missing: Sequence[int]) -> None:
        """Buy what it holds leases for; look for the rest, and try again to get these.

        After a failure nothing further is begun. It is raised when the calls under way have ended.
        """
        purchases: list[asyncio.Task[None]] = []
        try:
            for pause in pauses():
                mine = {place for place in missing if self.keys[place].address in self._leased}
                if mine:
                    purchases.append(asyncio.create_task(self._buy(sorted(mine))))
                    self._in_flight.add_task(purchases[-1])
                    missing = [place for place in missing if place not in mine]
                if not missing or not await self._pause(pause, purchases):
                    break
                addresses = [self.keys[place].address for place in missing]
                self._leased.update(await leases.acquire(addresses))
                # Whoever had a lease has written before it was given back.
                missing = await self._take_stored(missing)
            await _end_of(purchases)
        except asyncio.CancelledError:
            for purchase in purchases:
                purchase.cancel()
            await _end_of(purchases)
            raise
        for purchase in purchases:
            purchase.result()
        if missing:
            is_left = self.abandonment.done()
            raise DeadlineExceeded(
                "nobody waits for the answer any more"
                if is_left
                else "the time of the request was up"
            )

    @property
    def _has_fresh_lookup(self) -> bool:
        """Whether the leader looked for its keys so lately that nobody can have bought one since.

        Nobody whose lease was given back by now, that is: see `leases`.
        """
        begun = self.context.begun
        return begun is not None and asyncio.get_running_loop().time() - begun < FRESH_S

    def _release(self, addresses: Collection[bytes], *, is_written: bool = False) -> None:
        """Give back those leases that it holds."""
        mine = self._leased.intersection(addresses)
        if mine and self._in_flight.leases is not None:
            self._leased -= mine
            self._in_flight.leases.release(mine, is_written=is_written)

    async def _take_stored(self, places: Sequence[int]) -> list[int]:
        """Hand out what a tier has by now, bought by another process; return the other places."""
        missing: list[int] = []
        async for some in slices(places, LOT):
            keys = [self.keys[place] for place in some]
            lookup = await self._tiers.poll(
                Keys.from_keys(keys), self._ring.partition, self.context.terms
            )
            missing += [some[index] for index in lookup.missing]
            found = {key: entry for key, entry in zip(keys, lookup.entries, strict=True) if entry}
            if found:
                self.coalesced.update(found)
                self._release([key.address for key in found])
                self._hand_out(found)
        return missing

    async def _pause(self, seconds: float, purchases: Sequence[asyncio.Task[None]]) -> bool:
        """Wait for that long, or for a purchase to end; return whether to try again."""
        deadline, loop = self.context.deadline, asyncio.get_running_loop()
        if deadline is not None:
            seconds = min(seconds, deadline - loop.time())
        under_way = [purchase for purchase in purchases if not purchase.done()]
        await asyncio.wait(
            (self.abandonment, *under_way), timeout=seconds, return_when=asyncio.FIRST_COMPLETED
        )
        has_failed = any(one.done() and one.exception() is not None for one in purchases)
        is_late = deadline is not None and deadline <= loop.time()
        return not (self.abandonment.done() or has_failed or is_late)

    async def _buy(self, places: Sequence[int]) -> None:
        """Buy the inputs at these places; keep each part as it comes."""

        def begin(indices: Sequence[int]) -> None:
            self.begin([places[index] for index in indices])

        def charge(bill: Bill) -> None:
            self._charge(bill.at(places))

        async def keep(indices: Sequence[int], part: Embedded) -> None:
            await self._keep([places[index] for index in indices], part)

        context = replace(
            self.context, on_part=keep, on_charge=charge, on_begin=begin, abandoned=self.abandonment
        )
        inputs = [self._inputs[place] for place in places]
        try:
            embedded = await self._inner.embed(self._ring.space, inputs, context)
            self.providers += embedded.providers
            await self._keep(places, embedded)
        except EmbeddingError as error:
            if error.index is None:
                raise
            is_down = isinstance(error, ProviderError) and len(places) > 1
            if is_down and self._received.isdisjoint(self.keys[place] for place in places):
                # A provider that is down fails with every input, with each in a call of its own if
                # need be: none of them is to blame.
                raise error.with_index(None) from error
            if places[error.index] == error.index:
                raise
            raise error.with_index(places[error.index]) from error
        finally:
            if self._leased:
                keys = [self.keys[place] for place in places]
                self._release([key.address for key in keys if key not in self._received])

    def _charge(self, bill: Bill) -> None:
        """Count a charge, and tell the leader's `on_charge`."""
        self.ledger.count_charge(bill)
        if self.context.on_charge is not None:
            self.context.on_charge(bill)
        if self._is_over:
            self._in_flight.write(self._tiers.flush_counts())

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
        self.ledger.count_inputs([index for index, *_ in new])
        # Who brings it may be called off while it is written; it is bought all the same.
        write = self._in_flight.write(self._put(entries))
        self._writes.append(write)
        await asyncio.shield(write)

    async def _put(self, entries: Mapping[Key, Entry]) -> None:
        leases, partition, terms = self._in_flight.leases, self._ring.partition, self.context.terms
        addresses = [key.address for key in entries]
        late_s = leases.lapsed_s(addresses) if leases is not None and self._leased else 0.0
        if late_s:
            # Another node may have bought them meanwhile.
            await self._tiers.put_late(entries, partition, late_s)
        else:
            if terms.write:
                # What was counted so far goes into the same transaction.
                self.ledger.is_written = True
            await self._tiers.put_many(entries, partition, terms)
        if self._leased:
            self._release(addresses, is_written=True)
        self._hand_out(entries)

    def _hand_out(self, entries: Mapping[Key, Entry]) -> None:
        self._in_flight.note_landed(self, entries)
        self.entries.update(entries)
        self.news.set_result(None)
        self.news = asyncio.get_running_loop().create_future()


async def _end_of(tasks: Iterable[asyncio.Task[None]]) -> None:
    for task in tasks:
        await asyncio.wait((task,))


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

    def __init__(self, leases: Leases | None = None, max_recent: int = MAX_RECENT) -> None:
        """`leases` are held against other processes; None = no other one shares the cache."""
        self.leases = leases
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
        successor = InFlight(self.leases)
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
