"""Stand-ins for what the cache wraps, and the means to hold them at any point."""

import asyncio
import hashlib
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence

from embedding_proxy.cache.disk.write_batch import PendingRecord, StoredRecord
from embedding_proxy.cache.key import DEFAULT_NAMESPACE, Key, Keys, Namespace, Partition, keyring
from embedding_proxy.cache.ledger import LedgerKey, Usage
from embedding_proxy.cache.record import Entry
from embedding_proxy.cache.tiers import Tiers
from embedding_proxy.providers.base import (
    NORMAL,
    CachePolicy,
    Context,
    Embedded,
    Input,
    Outcome,
    Space,
)
from embedding_proxy.providers.charge import Bill


def key_of(item: Input, space: Space, namespace: Namespace = DEFAULT_NAMESPACE) -> Key:
    """Return the key of an input."""
    return keyring(space, namespace).key(item)


def vector_of(item: Input, space: Space) -> bytes:
    """Return the one right vector of an input in a space."""
    seed = repr((space.name, space.parameters, item)).encode()
    return hashlib.shake_256(seed).digest(4 * space.dimensions)


def tokens_of(item: Input) -> int:
    """Return what an input costs; seldom the same for two inputs."""
    return 1 + hashlib.sha256(repr(item).encode()).digest()[0]


def entry_of(item: Input, space: Space, *, tokens: int = 1) -> Entry:
    """Return the entry that belongs under an input's key."""
    return Entry(vector_of(item, space), tokens, counted=True, digest=key_of(item, space).digest)


async def entries_in(
    tiers: Tiers, keys: Collection[Key], partition: Partition, terms: CachePolicy = NORMAL
) -> dict[Key, Entry]:
    """Return what tiers have of some keys."""
    lookup = await tiers.lookup(Keys.from_keys(keys), partition, terms)
    found = {key: entry for key, entry in zip(keys, lookup.entries, strict=True) if entry}
    assert [key not in found for key in keys] == [i in lookup.missing for i in range(len(keys))]
    return found


class Turnstile:
    """Lets everyone through while open; holds who comes while shut, to be let go one by one."""

    def __init__(self) -> None:
        self.is_open = True
        self.held: list[asyncio.Future[None]] = []

    async def through(self) -> None:
        """Pass, now or when let."""
        if self.is_open:
            return
        turn = asyncio.get_running_loop().create_future()
        self.held.append(turn)
        try:
            await turn
        finally:
            if turn in self.held:
                self.held.remove(turn)

    def shut(self) -> None:
        """Hold everyone who comes from now on."""
        self.is_open = False

    def let(self, which: int = 0) -> None:
        """Let one of those held go on."""
        turn = self.held.pop(which)
        if not turn.done():
            turn.set_result(None)

    def open(self) -> None:
        """Let everyone go on, and hold nobody any more."""
        self.is_open = True
        while self.held:
            self.let()


class FakeEmbedder:
    """An Embedder that keeps what it was asked, and answers with `vector_of` and `tokens_of`."""

    def __init__(self, gate: Turnstile | None = None) -> None:
        self.gate = gate or Turnstile()
        self.calls: list[tuple[Space, list[Input], Context]] = []
        self.counted = True
        self.failure: Callable[[Sequence[Input]], Exception | None] = lambda _: None
        """Gives the error with which to answer a call for these inputs, if any."""

    @property
    def asked(self) -> list[Input]:
        """All inputs that were asked for, in the order of the calls."""
        return [item for _, inputs, _ in self.calls for item in inputs]

    async def embed(self, space: Space, inputs: Sequence[Input], context: Context) -> Embedded:
        self.calls.append((space, list(inputs), context))
        await self.gate.through()
        failure = self.failure(inputs)
        if failure is not None:
            raise failure
        tokens = [tokens_of(item) for item in inputs]
        if context.on_charge is not None:
            context.on_charge(Bill("fake", range(len(inputs)), tokens, [20 * n for n in tokens]))
        return Embedded(
            vectors=[vector_of(item, space) for item in inputs],
            tokens=tokens,
            counted=self.counted,
            providers=("fake",),
            outcomes=[Outcome.MISS] * len(inputs),
        )


class FakeStore:
    """A Store in a dict: what it read may be old, and what it writes late, as with a real one."""

    def __init__(self, gate: Turnstile | None = None) -> None:
        self.reading = gate or Turnstile()
        self.writing = gate or Turnstile()
        self.records: dict[bytes, bytes] = {}
        self.reads: list[list[bytes]] = []
        self.glances: list[list[bytes]] = []
        """The reads that were answered at once."""
        self.touched: set[bytes] = set()
        self.stored = 0.0
        """When all that it holds was bought, in seconds since 1970."""
        self.usage = Usage()
        self.sums: dict[LedgerKey, Usage] = {}
        self.flushed = Usage()
        """What was counted when that was last written by itself."""
        self.on_purge = lambda: None
        self.purge_epoch = 0
        self.is_quick = False
        """Whether what it holds can be read at once."""
        self.broken = False
        """Whether every read finds nothing and every write comes to nothing."""

    def heed_purges(self) -> bool:
        return False

    async def lookup(self, addresses: Sequence[bytes]) -> dict[bytes, StoredRecord]:
        self.reads.append(list(addresses))
        await self.reading.through()
        here = [a for a in addresses if a in self.records and not self.broken]
        found = {a: StoredRecord(self.records[a], self.stored) for a in here}
        await self.reading.through()
        return found

    def lookup_nowait(self, addresses: Sequence[bytes]) -> dict[bytes, StoredRecord] | None:
        if not self.is_quick:
            return None
        self.glances.append(list(addresses))
        here = [a for a in addresses if a in self.records and not self.broken]
        return {a: StoredRecord(self.records[a], self.stored) for a in here}

    async def put_many(
        self, records: Mapping[bytes, bytes], partition: Partition | None = None
    ) -> bool:
        await self.writing.through()
        if not self.broken:
            self.records.update(records)
        await self.writing.through()
        return not self.broken

    async def put_older(
        self, records: Mapping[bytes, PendingRecord], *, is_copied: bool = False
    ) -> bool:
        for address, record in records.items():
            if address not in self.records or (record.stored or 0.0) > self.stored:
                self.records[address] = record.record
        return not self.broken

    async def delete_many(self, dead: Mapping[bytes, bytes]) -> bool:
        for address, record in dead.items():
            if self.records.get(address) == record and not self.broken:
                del self.records[address]
        return not self.broken

    def touch(self, addresses: Iterable[bytes], partition: Partition | None = None) -> None:
        self.touched.update(addresses)

    def count(self, heading: LedgerKey, usage: Usage) -> None:
        self.usage = self.usage.plus(usage)
        self.sums[heading] = self.sums.get(heading, Usage()).plus(usage)

    async def flush_counts(self) -> bool:
        self.flushed = self.usage
        return not self.broken


async def settle() -> None:
    """Give the loop as many turns as it takes until everyone waits for something held."""
    for _ in range(20):
        await asyncio.sleep(0)
