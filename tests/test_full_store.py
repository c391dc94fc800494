"""A store at its limit goes on taking what is bought, and what is pinned stays as it is.

`full_store.py` beside this file loads such a store at length, through two workers (`make full`).
"""

import time

import full_store
import pytest
from embedding_proxy.cache.disk import connection, ledger_reader
from embedding_proxy.cache.disk.purge import PurgeFilter, count_entries
from embedding_proxy.cache.disk.store import Store
from embedding_proxy.cache.key import Partition
from embedding_proxy.cache.ledger import By
from embedding_proxy.cache.maintenance import stats
from embedding_proxy.proxy.service import drift_check

MIB = 1 << 20
DAY = 86_400.0
MODEL = full_store.MODEL
RECORD = bytes(6184)
CANARIES = Partition(drift_check.NAMESPACE, "m", 1536)
TEAM = Partition("team", "m", 1536)
OTHERS = Partition("", "m", 1536)


def _addresses(word, numbers):
    return [f"{word} {number:07}".encode().ljust(16)[:16] for number in numbers]


async def _write(store, word, numbers, partition, batch=50):
    """Write records in groups; return how many groups were taken."""
    addresses = _addresses(word, numbers)
    return sum([
        await store.put_many(dict.fromkeys(addresses[start : start + batch], RECORD), partition)
        for start in range(0, len(addresses), batch)
    ])  # fmt: skip


async def test_two_processes_at_the_limit(tmp_path):
    """No write is refused, what is hot or pinned stays, and the ledger has every charge."""
    came = await full_store.through_stores(tmp_path, groups=700, size_mib=16)
    assert not came["wrong"]
    assert came["bought"] > 2 * 16 * MIB // full_store.ENTRY_BYTES


async def test_writes_go_on_where_everything_was_used_just_now(tmp_path, caplog):
    """The canaries' namespace is pinned in every store; that is no reason to refuse others."""
    limit = 8 * MIB
    async with Store(tmp_path, limit, pinned=(drift_check.NAMESPACE,)) as store:
        await _write(store, "canary", range(4), CANARIES)
        for start in range(0, 4000, 50):
            assert await _write(store, "text", range(start, start + 50), OTHERS)
            # All that may still be there is in use, and its use is not written yet.
            store.touch(_addresses("text", range(start + 50)), OTHERS)
        found = await store.lookup(_addresses("text", range(3950, 4000)))
        assert len(found) == 50
        assert len(await store.lookup(_addresses("canary", range(4)))) == 4
    assert not caplog.records


@pytest.fixture
def clock(monkeypatch):
    """Give a clock to put forward; [0] is by how many seconds."""
    ahead, real = [0.0], time.time
    monkeypatch.setattr(time, "time", lambda: real() + ahead[0])
    return ahead


async def test_the_last_use_of_what_is_pinned_is_the_last_use(tmp_path, clock):
    """However often eviction passes them over, `cache stats` and a purge go by their real uses."""
    limit, began = 8 * MIB, time.time()
    async with Store(tmp_path, limit, pinned=("team",)) as store:
        assert await _write(store, "pinned", range(300), TEAM) == 6
        clock[0] += 2 * DAY
        await _write(store, "text", range(3000), OTHERS)
        assert len(await store.lookup(_addresses("pinned", range(300)))) == 300
    with connection.opened(tmp_path, limit, ("team",)) as file:
        held = {one.partition.namespace: one for one in stats.gather(file).held}
        unused, _ = count_entries(file, PurgeFilter(namespace="team", used_before=began + DAY))
    assert held["team"].entries == 300
    assert held["team"].last_used < began + DAY
    assert unused == 300


async def test_a_store_of_pins_answers_and_counts(tmp_path, upstream, start_proxy, caplog):
    """Where only pinned entries are, one line says so; requests are answered, and sums are kept."""
    sections = {
        "cache": {"size_limit_gib": 8 / 1024, "memory_mib": 0, "pinned_namespaces": ["team"]},
        "server": {"keys": [{"key": "k", "namespace": "team"}, {"key": "o", "namespace": "other"}]},
    }
    proxy = await start_proxy(openai=upstream, **sections)

    async def ask(key, numbers):
        asked = [f"text {number} of {key}" for number in numbers]
        body = {"model": MODEL, "input": asked, "encoding_format": "base64"}
        reply = await proxy.post(body, Authorization=f"Bearer {key}")
        assert reply.status == 200
        return int(reply.headers["x-cache-misses"])

    first = 0
    while "full of what is pinned" not in caplog.text:
        assert await ask("k", range(first, first + 50)) == 50
        first += 50
        assert first * len(RECORD) < 10 * MIB, "nothing says that the store is full"
    for start in range(0, 500, 50):
        assert await ask("o", range(start, start + 50)) == 50
        assert await ask("k", range(first - 100)) == 0
    bought = len(upstream.inputs)
    assert bought == first + 500
    lines = [one for one in caplog.messages if "full of what is pinned" in one]
    await start_proxy.stop()
    with connection.opened(tmp_path / "cache", 8 * MIB, ("team",)) as file:
        ((_, sums),) = ledger_reader.read(file.sql, (By.MODEL,))
    assert (sums.misses, sums.hits) == (bought, 10 * (first - 100))
    assert sums.tokens_billed == 4 * bought
    assert len(lines) == 1, "\n".join(lines)
