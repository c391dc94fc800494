"""What one request adds to the ledger, under which heading, and how it is read again."""

import asyncio
import sqlite3

import pytest
from embedding_proxy.cache.disk import ledger_reader
from embedding_proxy.cache.disk.connection import opened
from embedding_proxy.cache.disk.store import Store
from embedding_proxy.cache.disk.write_batch import WriteBatch
from embedding_proxy.cache.embedder import CachingEmbedder
from embedding_proxy.cache.in_flight import InFlight
from embedding_proxy.cache.key import Namespace, Partition, keyring
from embedding_proxy.cache.ledger import By, LedgerKey, Usage
from embedding_proxy.cache.memory import Memory
from embedding_proxy.cache.tiers import Tiers
from embedding_proxy.providers.base import Context, Outcome, Space
from embedding_proxy.providers.charge import Account, Bill
from embedding_proxy.providers.errors import RateLimited

from tests.cache.fakes import FakeEmbedder, FakeStore, settle, tokens_of

GIB = 1 << 30
SPACE = Space("m", 3)
PARTITION = keyring(SPACE, Namespace("team")).partition
OURS = Context(namespace="team", account=Account("model", "us", price=0.5))
THEIRS = Context(namespace="team", account=Account("alias", "them", price=2.0))


class Charging(FakeEmbedder):
    """Bills what it is told to before it answers, and tells nothing by itself."""

    def __init__(self, *bills):
        super().__init__()
        self.bills = bills

    async def embed(self, space, inputs, context):
        for bill in self.bills:
            context.on_charge(bill)
        return await super().embed(space, inputs, Context(namespace=context.namespace))


def _rig(inner=None):
    store = FakeStore()
    tiers = Tiers(Memory(1 << 20), store)
    return CachingEmbedder(inner or FakeEmbedder(), tiers, InFlight()), store


def _heading(provider="", context=OURS):
    return LedgerKey(PARTITION, context.account.model, provider, context.account.client)


async def test_each_has_bought_or_saved_on_its_own_account():
    """Who asks first is billed by the provider's name, and whoever comes later has saved."""
    embedder, store = _rig()
    await embedder.embed(SPACE, ["a", "b", "a"], OURS)
    answer = await embedder.embed(SPACE, ["b"], THEIRS)
    a, b = tokens_of("a"), tokens_of("b")
    billed = {"tokens_billed": a + b, "nanodollars_billed": 20 * (a + b)}
    assert store.sums == {
        _heading("fake"): Usage(misses=2, **billed),
        _heading(): Usage(duplicates=1, tokens_saved=a, nanodollars_saved=500 * a),
        _heading(context=THEIRS): Usage(hits=1, tokens_saved=b, nanodollars_saved=2000 * b),
    }
    assert answer.usage == store.sums[_heading(context=THEIRS)]


async def test_one_who_joins_has_saved_and_the_first_is_charged():
    """A join is at the joiner's own list price, under the joiner's own name."""
    embedder, store = _rig()
    embedder._inner.gate.shut()
    first = asyncio.create_task(embedder.embed(SPACE, ["a"], OURS))
    await settle()
    second = asyncio.create_task(embedder.embed(SPACE, ["a"], THEIRS))
    await settle()
    embedder._inner.gate.open()
    usages = [(await task).usage for task in (first, second)]
    a = tokens_of("a")
    assert usages[0] == Usage(misses=1, tokens_billed=a, nanodollars_billed=20 * a)
    assert usages[1] == Usage(joins=1, tokens_saved=a, nanodollars_saved=2000 * a)
    assert store.sums[_heading(context=THEIRS)] == usages[1]


async def test_what_was_charged_for_nothing_is_billed():
    """Every bill of a request counts, whoever sent it; its inputs are the last seller's."""
    bad, good = Bill("first", [0, 1], [5, 5], [1, 1]), Bill("second", [0, 1], [7, 8], [0, 3])
    embedder, store = _rig(Charging(bad, good))
    answer = await embedder.embed(SPACE, ["a", "b"], OURS)
    assert answer.usage == Usage(misses=2, tokens_billed=25, nanodollars_billed=5)
    assert store.sums == {
        _heading("first"): Usage(tokens_billed=10, nanodollars_billed=2),
        _heading("second"): Usage(misses=2, tokens_billed=15, nanodollars_billed=3),
        _heading(): Usage(),
    }


async def test_the_charges_of_a_request_that_fails_are_billed():
    """What was paid before the failure was paid."""
    embedder, store = _rig(Charging(Bill("first", [0], [5], [9])))
    embedder._inner.failure = lambda _: RateLimited("first", "later")
    with pytest.raises(RateLimited):
        await embedder.embed(SPACE, ["a"], OURS)
    assert store.sums == {_heading("first"): Usage(tokens_billed=5, nanodollars_billed=9)}


async def test_a_part_whose_keeping_is_cut_off_is_there_all_the_same():
    """A slower route may be called off while a part of its answer is being written."""

    class Raced(FakeEmbedder):
        async def embed(self, space, inputs, context):
            answer = await super().embed(space, inputs, context)
            slower = asyncio.create_task(context.on_part([0, 1], answer))
            await settle()
            slower.cancel()
            await asyncio.wait([slower])
            store.writing.open()
            return answer

    embedder, store = _rig(Raced())
    store.writing.shut()
    answer = await embedder.embed(SPACE, ["a", "b"], OURS)
    assert answer.outcomes == [Outcome.MISS] * 2
    assert store.usage.misses == 2


LINES = {
    (1, LedgerKey(PARTITION, "m", "p", "c")): Usage(misses=1, tokens_billed=10),
    (1, LedgerKey(PARTITION, "m", "", "c")): Usage(hits=2, nanodollars_saved=3),
    (2, LedgerKey(PARTITION, "n", "", "d")): Usage(hits=4),
    (2, LedgerKey(Partition("", "m", 3), "m")): Usage(joins=8),
}


@pytest.mark.parametrize(
    ("by", "lines"),
    [
        ([], {(): Usage(6, 8, 1, 0, 0, 10, 3)}),
        ([By.DAY], {(1,): Usage(2, 0, 1, 0, 0, 10, 3), (2,): Usage(4, 8)}),
        (
            [By.PROVIDER],
            {("",): Usage(6, 8, nanodollars_saved=3), ("p",): Usage(0, 0, 1, 0, 0, 10)},
        ),
        (
            [By.MODEL, By.NAMESPACE],
            {
                ("m", ""): Usage(joins=8),
                ("m", "team"): Usage(2, 0, 1, 0, 0, 10, 3),
                ("n", "team"): Usage(4),
            },
        ),
        ([By.CLIENT], {("",): Usage(0, 8), ("c",): Usage(2, 0, 1, 0, 0, 10, 3), ("d",): Usage(4)}),
        ([By.SPACE], {("m",): Usage(6, 8, 1, 0, 0, 10, 3)}),
    ],
)
def test_the_ledger_is_summed_by_what_is_asked_for(tmp_path, by, lines):
    """Whatever it is summed by, in order, nothing is left out and nothing counted twice."""
    with opened(tmp_path, GIB, create=True) as file:
        assert ledger_reader.read(file.sql, by) == []
        file.write(WriteBatch(usage=LINES))
        found = ledger_reader.read(file.sql, by)
    assert dict(found) == lines
    assert [names for names, _ in found] == sorted(lines)


def test_what_was_paid_is_told_though_nobody_knows_what_for(tmp_path):
    """A partition that damage has taken is no reason to leave its lines out."""
    with opened(tmp_path, GIB, create=True) as file:
        file.write(WriteBatch(usage=LINES))
        file.sql("DELETE FROM Partitions WHERE namespace = 'team'")
        assert ledger_reader.read(file.sql, []) == [((), Usage(6, 8, 1, 0, 0, 10, 3))]
        found = dict(ledger_reader.read(file.sql, [By.NAMESPACE]))
    assert found == {(None,): Usage(6, 0, 1, 0, 0, 10, 3), ("",): Usage(joins=8)}


async def test_a_store_tells_what_is_on_disk_and_what_it_has_counted_itself(tmp_path):
    """Since ever is everyone's and as old as the last write; since the start is one's own."""
    one, two = LedgerKey(PARTITION, "m", "p"), LedgerKey(PARTITION, "m")
    async with Store(tmp_path, GIB) as store:
        store.count(one, Usage(misses=1))
        store.count(one, Usage(misses=2))
        store.count(two, Usage(hits=1))
        assert await store.ledger([By.MODEL]) == []
        assert store.counted == {one: Usage(misses=3), two: Usage(hits=1)}
    async with Store(tmp_path, GIB) as store:
        assert await store.ledger([By.PROVIDER]) == [(("",), Usage(1)), (("p",), Usage(0, 0, 3))]
        assert store.counted == {}


async def test_a_ledger_that_cannot_be_read_is_none(tmp_path, caplog):
    """Nobody who asks for the state of things gets an error for the state of the disk."""
    async with Store(tmp_path, GIB) as store:
        for file in store.folder.glob("cache.db*"):
            file.unlink()
        assert await store.ledger([By.MODEL]) is None
    assert "the ledger cannot be read" in caplog.text


async def test_a_charge_is_written_with_what_was_bought_or_before(tmp_path):
    """Looked at from another connection, there is never a record whose charge is not there."""
    store = Store(tmp_path, GIB)
    async with store:
        embedder = CachingEmbedder(FakeEmbedder(), Tiers(Memory(0), store), InFlight())
        await embedder.embed(SPACE, ["a", "b"], OURS)
        with sqlite3.connect(store.folder / "cache.db") as other:
            rows = other.execute("SELECT provider, misses, tokens_billed FROM Usage").fetchall()
        other.close()
    assert rows == [("fake", 2, tokens_of("a") + tokens_of("b"))]
