"""What leaves the store, and when: the coldest at the limit, the old after their time; no others.

The limit is on the file and its log together, as anybody sees them who looks in the directory.
"""

import hashlib
import time
from itertools import islice

import pytest
from embedding_proxy.cache.disk.store import Store
from embedding_proxy.cache.key import Partition

MIB = 1 << 20
DAY = 86_400
SIZE = 6184
"""Of the record of a vector of 1,536 dimensions."""
MODEL = "text-embedding-3-large"
PARTITION = Partition("", "m", 1536)
RECORD = bytes(range(256)) * (SIZE // 256) + bytes(SIZE % 256)


def _addresses(word, numbers):
    return [hashlib.blake2b(f"{word} {i}".encode(), digest_size=16).digest() for i in numbers]


def _records(word, numbers):
    return dict.fromkeys(_addresses(word, numbers), RECORD)


def _share_of_limit(store, limit):
    """Return how large the file and its log are, as a share of what they may be."""
    parts = (store.folder / "cache.db", store.folder / "cache.db-wal")
    return sum(part.stat().st_size for part in parts) / limit


async def _kept(store, word, count):
    """Return which of the records are there, and see that they are whole."""
    found = await store.lookup(_addresses(word, range(count)))
    assert all(kept.record == RECORD for kept in found.values())
    return [i for i, address in enumerate(_addresses(word, range(count))) if address in found]


async def _overfill(store, limit, batch, hot_share):
    """Write three times the limit, and check what is left; return the sizes after each write.

    Of what is written first, one in `hot_share` is read and used again and again.
    """
    hot, shares = {}, []
    total = 3 * limit // SIZE // batch * batch
    for start in range(0, total, batch):
        new = cold = _addresses("cold", range(start, start + batch))
        if start * SIZE < limit // 4:
            scattered = _addresses("hot", range(len(hot), len(hot) + batch // (hot_share - 1)))
            hot |= dict.fromkeys(scattered)
            rest = iter(cold)
            new = [a for one in scattered for a in (one, *islice(rest, hot_share - 1))] + [*rest]
        assert await store.put_many(dict.fromkeys(new, RECORD), PARTITION)
        shares.append(_share_of_limit(store, limit))
        if start // batch % 10 == 9:
            await store._tick(10)
        assert len(await store.lookup(list(hot))) == len(hot)
        store.touch(hot, PARTITION)
    assert await _kept(store, "hot", len(hot)) == list(range(len(hot)))
    cold = await _kept(store, "cold", total)
    assert cold == list(range(total - len(cold), total))
    assert (len(cold) + len(hot)) * SIZE > 0.75 * limit
    return shares


@pytest.mark.parametrize(("limit", "batch"), [(32 * MIB, 100), (64 * MIB, 400)])
async def test_the_file_keeps_to_its_limit_and_the_coldest_go(tmp_path, limit, batch):
    """Three times the limit is written: what is read meanwhile stays, of the rest the newest."""
    async with Store(tmp_path, limit) as store:
        shares = await _overfill(store, limit, batch, hot_share=5)
    assert max(shares) < 1.05
    assert min(shares[len(shares) // 2 :]) > 0.95


async def test_pages_left_half_empty_are_used_again(tmp_path):
    """Where every other record goes no page is left as a whole, and the file keeps to its limit."""
    limit = 32 * MIB
    async with Store(tmp_path, limit) as store:
        shares = await _overfill(store, limit, 100, hot_share=2)
    assert max(shares[len(shares) // 2 :]) < 1.05


async def test_a_proxy_at_its_limit(tmp_path, upstream, start_proxy):
    """Through the proxy as well: the file keeps to its limit, and what is asked for is a hit."""
    limit = 32 * MIB
    upstream.widths[MODEL] = 3072
    cache = {"directory": str(tmp_path / "cache"), "size_limit_gib": 1 / 32, "memory_mib": 0}
    proxy = await start_proxy(openai=upstream, cache=cache)

    async def ask(texts):
        body = {"model": MODEL, "input": texts, "encoding_format": "base64"}
        reply = await proxy.post(body)
        assert reply.status == 200
        return int(reply.headers["x-cache-hits"]), int(reply.headers["x-cache-misses"])

    hot = [f"hot {i}" for i in range(50)]
    batches = [[f"cold {i}.{n}" for n in range(50)] for i in range(2 * limit // 12_328 // 50)]
    assert await ask(hot) == (0, 50)
    store = proxy.service._storage.tiers._store
    shares = []
    for batch in batches:
        assert await ask(hot) == (50, 0)
        assert await ask(batch) == (0, 50)
        shares.append(_share_of_limit(store, limit))
    assert max(shares) < 1.05
    bought = len(upstream.inputs)
    for batch in batches[-len(batches) // 3 :]:
        assert await ask(batch) == (50, 0)
    assert len(upstream.inputs) == bought == 50 + 50 * len(batches)
    assert await ask(batches[0]) == (0, 50)


# Pins.


async def test_what_is_pinned_stays(tmp_path):
    """A pinned namespace outlives others that are used later, by whoever writes."""
    limit = 8 * MIB
    async with Store(tmp_path, limit, pinned=("a",)) as store:
        assert await store.put_many(_records("a", range(300)), Partition("a", "m", 1536))
        for start in range(0, 4000, 50):
            records = _records("b", range(start, start + 50))
            assert await store.put_many(records, Partition("b", "m", 1536))
        assert await _kept(store, "a", 300) == list(range(300))
        others = await _kept(store, "b", 4000)
        assert others == list(range(4000 - len(others), 4000))
        assert len(others) > 500
    async with Store(tmp_path, limit) as store:
        for start in range(4000, 8000, 50):
            records = _records("b", range(start, start + 50))
            assert await store.put_many(records, Partition("b", "m", 1536))
        assert await _kept(store, "a", 300) == []


async def test_a_store_full_of_pins_takes_no_more(tmp_path, caplog):
    """Where nothing may go nothing comes; the file keeps to its limit, and serves what it has."""
    limit = 8 * MIB
    taken = 0
    async with Store(tmp_path, limit, pinned=("a",)) as store:
        while await store.put_many(_records("a", range(taken, taken + 20)), Partition("a", "m", 8)):
            taken += 20
            assert taken * SIZE < limit
        assert "full of what is pinned" in caplog.text
        assert taken * SIZE > 0.8 * limit
        assert _share_of_limit(store, limit) < 1.05
        assert not await store.put_many(_records("b", range(20)), Partition("b", "m", 8))
        assert len(await _kept(store, "a", taken)) == taken
    async with Store(tmp_path, limit, pinned=("a",)) as store:
        assert len(await _kept(store, "a", taken + 20)) == taken


# Age.


@pytest.fixture
def clock(monkeypatch):
    """Give a clock to put forward; [0] is by how many seconds."""
    ahead, real = [0.0], time.time
    monkeypatch.setattr(time, "time", lambda: real() + ahead[0])
    return ahead


@pytest.mark.parametrize("memory_mib", [64, 0], ids=["from memory", "from disk"])
async def test_an_old_vector_is_bought_anew(tmp_path, upstream, start_proxy, clock, memory_mib):
    """Up to its time a vector is a hit, then it is bought again, and counts as new."""
    cache = {"directory": str(tmp_path / "cache"), "memory_mib": memory_mib, "ttl_days": 2}

    async def started():
        proxy = await start_proxy(openai=upstream, cache=cache)
        # It took the clock before there was this one.
        proxy.service._storage.tiers.memory.clock = time.time
        return proxy

    async def ask(proxy):
        reply = await proxy.post({"model": "text-embedding-3-small", "input": "a"})
        assert reply.status == 200
        return reply.headers["x-cache"]

    proxy = await started()
    assert [await ask(proxy), await ask(proxy)] == ["miss", "hit"]
    clock[0] += DAY
    # Neither a use nor a restart makes it younger.
    assert await ask(proxy) == "hit"
    await start_proxy.stop()
    proxy = await started()
    assert await ask(proxy) == "hit"
    clock[0] += DAY - 100
    assert await ask(proxy) == "hit"
    assert len(upstream.inputs) == 1
    clock[0] += 200
    assert [await ask(proxy), await ask(proxy)] == ["miss", "hit"]
    assert proxy.service.counters.memory_hits == (2 if memory_mib else 0)
    assert len(upstream.inputs) == 2


async def test_a_time_of_no_time_keeps_nothing(tmp_path, upstream, start_proxy):
    """With the least time there is, every request buys, and is answered."""
    cache = {"directory": str(tmp_path / "cache"), "ttl_days": 1e-12}
    proxy = await start_proxy(openai=upstream, cache=cache)
    for _ in range(3):
        reply = await proxy.post({"model": "text-embedding-3-small", "input": "a"})
        assert (reply.status, reply.headers["x-cache"]) == (200, "miss")
    assert len(upstream.inputs) == 3


async def test_what_is_too_old_leaves_the_file(tmp_path, clock):
    """Old records are deleted in a while, though nobody asks for them; young ones stay."""
    async with Store(tmp_path, 64 * MIB, ttl_s=DAY) as store:
        await store.put_many(_records("old", range(2000)))
        clock[0] += DAY / 2
        await store.put_many(_records("young", range(100)))
        before = store._disk.file.path.stat().st_size
        clock[0] += DAY / 2 + 1
        await store._tick(1)
        rows = await store._disk.read(
            lambda: store._disk.file.sql("SELECT key FROM Cache").fetchall()
        )
        assert {key for (key,) in rows} == set(_addresses("young", range(100)))
        assert await _kept(store, "young", 100) == list(range(100))
    assert store.folder.joinpath("cache.db").stat().st_size < before / 5
