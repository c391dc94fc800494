"""The disk fills up, is locked, read-only, or loses its file: no request hears of it.

Every fault here is a real one, made under the proxy while it serves. Nothing is kept in memory, so
that each hit comes from the disk, or from what waits to be written. `disk_faults.py` beside this
file does it to processes of their own, under load; at length, if asked to.
"""

import asyncio
import contextlib
import os
from collections import Counter
from functools import partial

import disk_faults
import pytest
from disk_faults import CannotMount, count_right, file_system, full, locked, read_only, refusing
from embedding_proxy.cache.disk import database, disk_full
from embedding_proxy.cache.disk.connection import opened
from embedding_proxy.cache.disk.schema import PAGE_BYTES
from embedding_proxy.providers import failure_backoff

from tests.cache.page_kinds import overwrite, page_kinds

MODEL = disk_faults.MODEL


@pytest.fixture
def directory(tmp_path):
    """Give the directory in which `start_proxy` keeps its store."""
    return tmp_path / "cache"


@pytest.fixture(autouse=True)
def _in_short(monkeypatch):
    """Wait for no lock for long, and use a small file system to its end."""
    monkeypatch.setattr(database, "BUSY_SECONDS", 0.01)
    monkeypatch.setattr(disk_full, "FREE_BYTES", 0)


@contextlib.contextmanager
def _mounted(mount):
    """Enter what mounts a file system, or skip the test."""
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(mount)
        except CannotMount as error:
            pytest.skip(f"no file system can be mounted here: {error}")
        yield


def _cache(directory, memory_mib=0):
    return {"directory": str(directory), "memory_mib": memory_mib}


def _texts(word, count=50):
    return [f"{word} {i}" for i in range(count)]


async def _ask(proxy, texts):
    """Ask for texts, see that every vector is right, and return how many were hits and misses."""
    reply = await proxy.post({"model": MODEL, "input": texts, "encoding_format": "base64"})
    assert reply.status == 200
    assert count_right(texts, await reply.json()) == len(texts)
    return int(reply.headers["x-cache-hits"]), int(reply.headers["x-cache-misses"])


def _store(proxy):
    return proxy.service._storage.tiers._store


async def _in_a_while(proxy):
    """Do what the proxy does by itself in a while: end its rest, and tick."""
    store = _store(proxy)
    for _ in range(2):
        store._writer.backoff._until = 0.0
        await store._tick(10)


# The disk takes nothing for a while.


@contextlib.contextmanager
def _nearly_full():
    """Leave less room than is left to others."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(disk_full, "FREE_BYTES", 1 << 62)
        yield


FAULTS = {
    "nearly full": lambda _: _nearly_full(),
    "full": full,
    "refused": lambda _: refusing(os.getpid()),
    **{how: partial(locked, how) for how in disk_faults.LOCKS},
}


@pytest.mark.parametrize("fault", FAULTS)
async def test_nothing_is_bought_twice_for_a_fault_of_the_disk(
    fault, directory, upstream, start_proxy, caplog
):
    """Hits go on, what is bought is served and kept, and reaches the disk when it can."""
    before, during, after = _texts("before"), _texts("during", 200), _texts("after")
    with contextlib.ExitStack() as stack:
        if fault == "full":
            stack.enter_context(_mounted(file_system(directory, 8 << 20)))
        proxy = await start_proxy(openai=upstream, cache=_cache(directory))
        assert await _ask(proxy, before) == (0, 50)
        with FAULTS[fault](directory):
            for start in range(0, 200, 20):
                assert await _ask(proxy, during[start : start + 20]) == (0, 20)
                assert await _ask(proxy, before) == (50, 0)
            assert _store(proxy)._pending.backlog, "the disk took everything: there was no fault"
            assert await _ask(proxy, during + before) == (250, 0)
            await _in_a_while(proxy)
            assert await _ask(proxy, during + before) == (250, 0)
        assert "writing to the disk tier failed" in caplog.text
        await _in_a_while(proxy)
        assert disk_faults.entries(directory) == 250
        assert await _ask(proxy, after) == (0, 50)
        await start_proxy.stop()
        proxy = await start_proxy(openai=upstream, cache=_cache(directory))
        assert await _ask(proxy, before + during + after) == (300, 0)
        assert set(Counter(upstream.inputs).values()) == {1}
        await start_proxy.stop()


@pytest.mark.parametrize("how", disk_faults.LOCKS)
async def test_a_kept_lock_is_waited_for_three_times(
    how, directory, upstream, start_proxy, monkeypatch
):
    """After three failures nobody waits for the lock any more, until the wait is over."""
    monkeypatch.setattr(failure_backoff, "MIN_SECONDS", failure_backoff.MAX_SECONDS)
    tries = []
    write = database.Database.write

    def counting(self, *arguments):
        tries.append(1)
        write(self, *arguments)

    monkeypatch.setattr(database.Database, "write", counting)
    proxy = await start_proxy(openai=upstream, cache=_cache(directory))
    with locked(how, directory):
        for i in range(30):
            assert await _ask(proxy, [f"text {i}"]) == (0, 1)
        assert len(tries) == 3
    await _in_a_while(proxy)
    assert disk_faults.entries(directory) == 30


# The file is gone.


@pytest.mark.parametrize("gone", ["cache.db*", "cache.db", "cache.db-*"])
async def test_a_file_deleted_under_load_fails_no_request(gone, directory, upstream, start_proxy):
    """Clients hear nothing of it, and what is bought afterwards is kept."""
    proxy = await start_proxy(openai=upstream, cache=_cache(directory, memory_mib=64))
    asked = 0

    async def client(mine):
        nonlocal asked
        for start in range(0, 40, 2):
            assert await _ask(proxy, mine[start : start + 2]) == (0, 2)
            # All that was bought is in memory.
            assert await _ask(proxy, mine[: start + 2]) == (start + 2, 0)
            asked += 1
            if asked % 20 == 0:
                for path in _store(proxy).folder.glob(gone):
                    path.unlink()

    await asyncio.gather(*(client(_texts(f"client {i}", 40)) for i in range(4)))
    assert asked == 80
    assert await _ask(proxy, _texts("after")) == (0, 50)
    await start_proxy.stop()
    proxy = await start_proxy(openai=upstream, cache=_cache(directory))
    assert await _ask(proxy, _texts("after")) == (50, 0)
    assert set(Counter(upstream.inputs).values()) == {1}


# A page of the file is damaged.


@pytest.mark.parametrize("kind", ["page 1", "Cache_key_raw", "Entries", "Usage", "Partitions"])
async def test_a_damaged_page_buys_nothing_again(kind, directory, upstream, start_proxy):
    """What the page held stands elsewhere, too: all is a hit, and no sum and no file is lost."""
    proxy = await start_proxy(openai=upstream, cache=_cache(directory))
    texts = _texts("before", 300)
    assert await _ask(proxy, texts) == (0, 300)
    await start_proxy.stop()
    path = directory / "v1" / "cache.db"
    number = page_kinds(path)[kind][0]
    secret = path.with_name("client-keys.secret")
    secret.write_bytes(b"s" * 32)
    proxy = await start_proxy(openai=upstream, cache=_cache(directory))
    assert await _ask(proxy, texts) == (300, 0)
    overwrite(path, number, bytes(PAGE_BYTES))
    for start in range(0, 300, 50):
        assert await _ask(proxy, texts[start : start + 50]) == (50, 0)
    assert await _ask(proxy, _texts("during")) == (0, 50)
    await _store(proxy).salvaged()
    assert await _ask(proxy, texts + _texts("during")) == (350, 0)
    await start_proxy.stop()
    # Damage that nobody came upon is found at the start.
    proxy = await start_proxy(openai=upstream, cache=_cache(directory))
    await _store(proxy).salvaged()
    assert await _ask(proxy, texts + _texts("during")) == (350, 0)
    await start_proxy.stop()
    assert secret.read_bytes() == b"s" * 32
    with opened(directory, 1 << 30) as file:
        ((misses,),) = file.sql("SELECT sum(misses) FROM Usage")
    assert misses == len(upstream.inputs) == 350


# No file can be made, or opened for writing.


async def test_a_file_deleted_where_none_can_be_made(directory, upstream, start_proxy, caplog):
    """Without any file texts are bought, served and kept, and there is one as soon as can be."""
    proxy = await start_proxy(openai=upstream, cache=_cache(directory))
    assert await _ask(proxy, _texts("before")) == (0, 50)
    for path in _store(proxy).folder.glob("cache.db*"):
        path.unlink()
    during = [_texts(f"during {i}") for i in range(10)]
    with _mounted(read_only(directory)):
        for texts in during:
            assert await _ask(proxy, texts) == (0, 50)
            await _in_a_while(proxy)
        assert "cannot be opened anew" in caplog.text
        for texts in during:
            assert await _ask(proxy, texts) == (50, 0)
    await _in_a_while(proxy)
    assert disk_faults.entries(directory) == 500
    await start_proxy.stop()
    proxy = await start_proxy(openai=upstream, cache=_cache(directory))
    for texts in during:
        assert await _ask(proxy, texts) == (50, 0)
    assert set(Counter(upstream.inputs).values()) == {1}


STARTS = {
    "read-only": lambda directory: _mounted(read_only(directory)),
    "locked": partial(locked, "writer.lock"),
    "refused": lambda _: refusing(os.getpid()),
}


@pytest.mark.parametrize("fault", STARTS)
async def test_a_start_on_a_store_that_cannot_be_opened(fault, directory, upstream, start_proxy):
    """It serves what is there, keeps what it buys, and writes it once it can."""
    proxy = await start_proxy(openai=upstream, cache=_cache(directory))
    assert await _ask(proxy, _texts("before")) == (0, 50)
    await start_proxy.stop()
    with STARTS[fault](directory):
        proxy = await start_proxy(openai=upstream, cache=_cache(directory))
        assert await _ask(proxy, _texts("before")) == (50, 0)
        assert await _ask(proxy, _texts("during")) == (0, 50)
        await _in_a_while(proxy)
        assert await _ask(proxy, _texts("during")) == (50, 0)
    await _in_a_while(proxy)
    assert await _ask(proxy, _texts("before") + _texts("during")) == (100, 0)
    assert disk_faults.entries(directory) == 100
    assert len(upstream.inputs) == 100


# A process of its own, under load, with nobody to help it.


@pytest.mark.parametrize("fault", ["refused", "writer.lock", "deleted"])
async def test_a_process_recovers_by_itself(fault, tmp_path):
    """No request fails, a silent proxy rests, and what was bought gets to the disk unasked."""
    seen = await disk_faults.suffer(fault, 2.0, tmp_path, in_short=True)
    assert not disk_faults.verdict(seen), (tmp_path / "log").read_text()
    # A request takes no more of the processor than before; it is counted in steps of 10 ms.
    assert seen.fault_cpu_ms < 3 * max(seen.calm_cpu_ms, 2.0)
