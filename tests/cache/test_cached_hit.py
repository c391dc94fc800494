"""The same answer once more: as long as memory holds the very vectors it was made of."""

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import replace

import pytest
from clock import Clock
from embedding_proxy.cache.embedder import CachingEmbedder
from embedding_proxy.cache.in_flight import InFlight
from embedding_proxy.cache.key import keyring
from embedding_proxy.cache.memory import Memory
from embedding_proxy.cache.tiers import LOT, Tiers
from embedding_proxy.providers.base import NORMAL, CachePolicy, Context, Space
from embedding_proxy.providers.charge import Account

from tests.cache.fakes import FakeEmbedder, FakeStore, entry_of, key_of

SPACE = Space("m", 3)
PARTITION = keyring(SPACE).partition
FAR = 1e12
ROOM = 12 + 480
"""What one entry takes in memory."""


class Bench:
    """A cache with so much room in memory, whose clock stands."""

    def __init__(self, room: int = 100, ttl_s: float | None = None) -> None:
        self.clock = Clock()
        self.store = FakeStore()
        self.memory = Memory(room * ROOM, ttl_s, self.clock)
        self.tiers = Tiers(self.memory, self.store)
        self.embedder = CachingEmbedder(FakeEmbedder(), self.tiers, InFlight())

    async def ask(self, *inputs: str, terms: CachePolicy = NORMAL, client: str = "ci"):
        account = Account("model", client, 1.0)
        context = Context(FAR, terms=terms, account=account)
        return await self.embedder.embed(SPACE, list(inputs), context)

    async def known(self, *inputs: str) -> Callable[[], Awaitable[object]]:
        """Return what tells whether the answer to these holds, once all are known."""
        await self.ask(*inputs)
        answer = await self.ask(*inputs)
        reuse = answer.cached_hit.reuse_of(answer.vectors)

        async def still() -> bool:
            return reuse()

        return still

    async def looked_up(self, *inputs: str) -> Callable[[], Awaitable[object]]:
        """Return what gives the vectors of these, once all are known."""
        await self.ask(*inputs)
        return (await self.ask(*inputs)).cached_hit.vectors


WAYS = pytest.mark.parametrize("way", [Bench.known, Bench.looked_up], ids=["still", "vectors"])


@WAYS
async def test_it_counts_as_another_request_and_notes_the_use(way):
    """Sums, look-ups and uses grow as if the request had been answered anew."""
    bench = Bench()
    again = await way(bench, "a", "b")
    bench.store.touched.clear()
    sums, hits = dict(bench.store.sums), bench.tiers.counters.memory_hits
    assert await again()
    assert bench.store.touched == {key_of(item, SPACE).address for item in ("a", "b")}
    ((heading, usage),) = [(h, u) for h, u in bench.store.sums.items() if u != sums.get(h)]
    assert (heading.client, heading.model, heading.partition) == ("ci", "model", PARTITION)
    assert usage.hits - sums[heading].hits == 2
    anew = (await bench.ask("a", "b")).usage
    assert usage == sums[heading].plus(anew)
    assert anew.tokens_saved > 0
    assert bench.tiers.counters.memory_hits == hits + 4


@WAYS
async def test_it_asks_no_disk(way):
    """Nothing is read, and nothing is awaited."""
    bench = Bench()
    again = await way(bench, "a")
    bench.store.reads.clear()
    for _ in range(3):
        assert await again()
    assert bench.store.reads == []


async def _purged(bench: Bench) -> None:
    bench.store.on_purge()


async def _replaced(bench: Bench) -> None:
    await bench.ask("b", terms=CachePolicy(max_age=0))


async def _put_anew(bench: Bench) -> None:
    key = key_of("b", SPACE)
    await bench.tiers.put_many({key: entry_of("b", SPACE, tokens=9)}, PARTITION)


async def _read_again(bench: Bench) -> None:
    bench.memory.clear()
    await bench.ask("a", "b")


async def _displaced(bench: Bench) -> None:
    await bench.ask(*(f"other {number}" for number in range(3)))


async def _displaced_and_put(bench: Bench) -> None:
    await _displaced(bench)
    await _put_anew(bench)


async def _aged(bench: Bench) -> None:
    bench.clock.now += 10


@pytest.mark.parametrize(
    "end", [_purged, _put_anew, _read_again, _aged, _displaced_and_put], ids=lambda f: f.__name__
)
async def test_what_puts_an_end_to_an_entry_puts_one_to_it(end):
    """It says no from then on, and counts nothing."""
    bench = Bench(room=4, ttl_s=10)
    bench.store.stored = bench.clock.now
    again = await bench.known("a", "b")
    assert await again()
    await end(bench)
    before = bench.store.usage, bench.tiers.counters.memory_hits
    assert not await again()
    assert not await again()
    assert (bench.store.usage, bench.tiers.counters.memory_hits) == before


@pytest.mark.parametrize("act", [_replaced, _displaced], ids=lambda f: f.__name__)
async def test_an_entry_that_has_not_changed_is_still_the_answer(act):
    """Bought anew with the same numbers, or dropped from memory for room, it is not wrong."""
    bench = Bench(room=4, ttl_s=10)
    bench.store.stored = bench.clock.now
    again = await bench.known("a", "b")
    await act(bench)
    assert await again()
    await bench.ask("a", "b")
    assert await again()


@pytest.mark.parametrize("end", [_purged, _displaced, _aged], ids=lambda f: f.__name__)
async def test_what_is_no_longer_in_memory_gives_no_vectors(end):
    """Then it is to be asked anew, and nothing is counted."""
    bench = Bench(room=4, ttl_s=10)
    again = await bench.looked_up("a", "b")
    await end(bench)
    before = bench.store.usage, bench.tiers.counters.memory_hits
    assert await again() is None
    assert (bench.store.usage, bench.tiers.counters.memory_hits) == before


@pytest.mark.parametrize("end", [_replaced, _put_anew, _read_again], ids=lambda f: f.__name__)
async def test_the_vectors_are_those_of_now(end):
    """What was bought or read since is what is given, in the order of the inputs."""
    bench = Bench()
    again = await bench.looked_up("b", "a")
    await end(bench)
    now = (await bench.ask("b", "a")).vectors
    assert all(one is other for one, other in zip(await again(), now, strict=True))


async def _turns(work: Awaitable[object]) -> tuple[int, object]:
    """Return how often others got their turn until something was done, and what it gave."""
    task, turns = asyncio.ensure_future(work), 0
    while not task.done():
        await asyncio.sleep(0)
        turns += 1
    return turns, task.result()


async def test_while_many_are_looked_up_others_get_their_turn():
    """They come in lots, in their order, and are counted once."""
    bench = Bench(room=5 * LOT)
    inputs = [f"text {number}" for number in range(4 * LOT + 1)]
    again = await bench.looked_up(*inputs)
    before = bench.store.usage.hits
    turns, vectors = await _turns(again())
    assert turns > 4
    assert vectors == (await bench.ask(*inputs)).vectors
    assert bench.store.usage.hits == before + 2 * len(inputs)


async def test_what_is_displaced_while_it_is_looked_up_is_asked_anew():
    """Nothing is counted in the sums of an answer that is not given."""
    bench = Bench(room=5 * LOT)
    again = await bench.looked_up(*(f"text {number}" for number in range(2 * LOT)))
    before = bench.store.usage
    task = asyncio.ensure_future(again())
    await asyncio.sleep(0)
    bench.memory.clear()
    assert await task is None
    assert bench.store.usage == before


@WAYS
async def test_it_is_a_use_in_memory_too(way):
    """An answer that is only given so is the last to be displaced."""
    bench = Bench(room=3)
    again = await way(bench, "a")
    for number in range(6):
        await bench.ask(f"other {number}")
        assert await again()


ANEW = {
    "bought": (["a", "new"], NORMAL),
    "nothing known": (["new"], NORMAL),
    "twice the same": (["a", "a"], NORMAL),
    "no older than": (["a"], CachePolicy(max_age=60)),
    "no trace": (["a"], CachePolicy(write=False)),
    "anew": (["a"], CachePolicy(max_age=0)),
}


@pytest.mark.parametrize(("inputs", "terms"), ANEW.values(), ids=ANEW)
async def test_only_a_plain_whole_hit_can_be_given_again(inputs, terms):
    """What was bought for, holds an input twice, or was not to be any entry, is asked anew."""
    bench = Bench()
    assert await bench.known("a")
    assert (await bench.ask(*inputs, terms=terms)).cached_hit is None


async def test_what_does_not_fit_into_memory_is_asked_anew():
    """Without room for its entries an answer is looked up each time."""
    bench = Bench(room=0)
    bench.store.stored = bench.clock.now
    await bench.ask("a")
    answer = await bench.ask("a")
    assert answer.cached_hit.reuse_of(answer.vectors) is None
    assert await answer.cached_hit.vectors() is None
    assert bench.store.usage.hits == 1


async def test_an_answer_without_waiting_is_counted_when_it_is_given():
    """Where it is not given after all, the look-up that follows is the only one that counts."""
    bench = Bench()
    await bench.ask("a")
    before = replace(bench.tiers.counters), bench.store.usage
    ring, account = keyring(SPACE), Account("model", "ci", 1.0)
    given = [
        bench.embedder.answer_hits(ring, bench.embedder.lookup_nowait(ring, ["a"]), account)
        for _ in range(2)
    ]
    assert (bench.tiers.counters, bench.store.usage) == before
    given[1].cached_hit.count()
    assert bench.tiers.counters == replace(before[0], memory_hits=before[0].memory_hits + 1)
    assert bench.store.usage.hits == before[1].hits + 1
    await given[1].cached_hit.vectors()
    assert bench.tiers.counters.memory_hits == before[0].memory_hits + 2
