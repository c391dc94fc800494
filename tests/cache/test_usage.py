"""The sums of what was answered: they add up, over failures, days, closings and processes."""

import contextlib
import sqlite3
from types import SimpleNamespace

import pytest
from embedding_proxy.cache.disk import database
from embedding_proxy.cache.disk import store as store_module
from embedding_proxy.cache.disk.store import Store
from embedding_proxy.cache.key import Partition
from embedding_proxy.cache.ledger import LedgerKey, Usage
from hypothesis import given, settings
from hypothesis import strategies as st

GIB = 1 << 30
P = LedgerKey(Partition("", "m", 4), "model", "", "a client")
Q = LedgerKey(Partition("tenant", "m", 4), "model", "provider")
COUNTS = st.integers(0, 1 << 40)
USAGES = st.builds(Usage, *[COUNTS] * len(Usage._fields))


def _sums(folder):
    """Return the sums in a store's file, by day and heading."""
    with contextlib.closing(sqlite3.connect(folder / "cache.db")) as connection:
        rows = connection.execute(
            "SELECT namespace, space, dimensions, Usage.* FROM Usage"
            " JOIN Partitions ON id = partition"
        ).fetchall()
    return {(row[3], LedgerKey(Partition(*row[:3]), *row[5:8])): Usage(*row[8:]) for row in rows}


@given(USAGES, USAGES, USAGES)
def test_sums_add_up_in_any_order(one, two, three):
    """Adding is the adding of each number, whatever comes first; nothing adds nothing."""
    assert one.plus(two).plus(three) == three.plus(one).plus(two)
    assert one.plus(Usage()) == one
    assert one.plus(two).inputs == one.inputs + two.inputs
    assert one.plus(two).tokens_billed == one.tokens_billed + two.tokens_billed


@pytest.mark.parametrize(
    ("usage", "inputs", "rate"),
    [
        (Usage(), 0, 0.0),
        (Usage(misses=4), 4, 0.0),
        (Usage(hits=1, joins=1, duplicates=1, misses=1), 4, 0.75),
        (Usage(hits=5, tokens_saved=100, tokens_billed=100), 5, 1.0),
    ],
)
def test_the_hit_rate_is_the_share_not_bought(usage, inputs, rate):
    """Whatever was not a miss was not bought; without inputs there is no rate but 0."""
    assert (usage.inputs, usage.hit_rate) == (inputs, rate)


async def test_sums_are_written_with_the_next_change(tmp_path):
    """A count makes no write of its own, and is in the transaction of the next record."""
    async with Store(tmp_path, GIB) as store:
        store.count(P, Usage(hits=1))
        store.count(P, Usage(hits=2))
        store.count(Q, Usage(joins=3))
        assert _sums(store.folder) == {}
        assert await store.put_many({bytes(16): b"record"}, P.partition)
        sums = _sums(store.folder)
        assert {p: usage for (_, p), usage in sums.items()} == {P: Usage(hits=3), Q: Usage(joins=3)}
        assert await store.put_many({bytes(16): b"record"}, P.partition)
        assert _sums(store.folder) == sums


async def test_each_day_has_its_own_sums(tmp_path, monkeypatch):
    """A day ends at midnight, UTC; what is counted before and after is kept apart."""
    async with Store(tmp_path, GIB) as store:
        for at in (86_400 * 5 - 0.001, 86_400 * 5, 86_400 * 6 - 1):
            clock = SimpleNamespace(time=lambda at=at: at)
            monkeypatch.setattr(store_module, "time", clock)
            store.count(P, Usage(hits=1))
    assert _sums(store.folder) == {(4, P): Usage(hits=1), (5, P): Usage(hits=2)}


async def test_sums_go_on_after_reopening_and_beside_another(tmp_path):
    """Several proxies and several lives of one add to the same sums."""
    for _ in range(2):
        async with Store(tmp_path, GIB) as one, Store(tmp_path, GIB) as two:
            one.count(P, Usage(1, 2, 3, 4, 5, 6, 7, 8))
            two.count(P, Usage(1, 2, 3, 4, 5, 6, 7, 8))
    assert list(_sums(one.folder).values()) == [Usage(4, 8, 12, 16, 20, 24, 28, 32)]


STEPS = st.lists(
    st.sampled_from(["count", "put", "put fails", "flush", "flush fails", "resting"])
    | st.sampled_from(["count", "reopen"]),
    max_size=15,
)


@settings(deadline=None, max_examples=20)
@given(steps=STEPS)
async def test_sums_are_kept_over_failures_exactly_once(tmp_path_factory, steps):
    """However writes fail and succeed: in the end what was counted is there, nothing twice."""
    directory, write, counted = tmp_path_factory.mktemp("store"), database.Database.write, 0

    def failing(*_):
        raise sqlite3.OperationalError("disk I/O error")

    with pytest.MonkeyPatch.context() as patch:
        async with contextlib.AsyncExitStack() as stack:
            store = await stack.enter_async_context(Store(directory, GIB))
            for step in [*steps, "flush"]:
                store._writer.backoff.succeed()
                patch.setattr(database.Database, "write", failing if "fails" in step else write)
                if step == "count":
                    counted += 1
                    store.count(P, Usage(hits=1, tokens_saved=1000))
                elif step == "reopen":
                    await stack.aclose()
                    store = await stack.enter_async_context(Store(directory, GIB))
                elif step == "resting":
                    for _ in range(3):
                        store._writer.backoff.fail()
                    assert await store.put_many({bytes(16): b"record"}, P.partition) is False
                elif step.startswith("put"):
                    assert await store.put_many({bytes(16): b"r"}, P.partition) is (step == "put")
                else:
                    await store._writer.flush()
            patch.undo()
    total = Usage()
    for usage in _sums(store.folder).values():
        total = total.plus(usage)
    assert total == Usage(hits=counted, tokens_saved=1000 * counted)
