"""One damaged page, whatever it held: all else is found, the sums stay, and only the file moves."""

import asyncio
import hashlib
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from embedding_proxy.cache.disk.carver import CarveReport, rows
from embedding_proxy.cache.disk.connection import opened
from embedding_proxy.cache.disk.pages import INDEX_LEAF, cells
from embedding_proxy.cache.disk.purge import PurgeFilter, announce, delete
from embedding_proxy.cache.disk.quarantine import QuarantinedFile
from embedding_proxy.cache.disk.salvage import salvage_pending
from embedding_proxy.cache.disk.schema import PAGE_BYTES
from embedding_proxy.cache.disk.store import Store
from embedding_proxy.cache.disk.write_batch import PendingRecord, WriteBatch
from embedding_proxy.cache.key import FORMAT, Partition
from embedding_proxy.cache.ledger import By, LedgerKey, Usage
from embedding_proxy.cache.record import Entry, encode

from embedding_proxy import cache
from tests.cache.page_kinds import addresses_on, damaged, overwrite, page_kinds, page_of

GIB = 1 << 30
ROOT = Path(cache.__file__).parents[1]
PARTITIONS = [Partition("", "a/space", 96), Partition("tenant", "a/space", 96)]
SIDE_FILES = {"client-keys.secret": b"s" * 32, "widths.json": b"{}", "canaries.json": b"{}"}
PAID = Usage(misses=3, tokens_billed=7, nanodollars_billed=11)


def _record(number):
    digest = hashlib.blake2b(number.to_bytes(8, "big"), digest_size=16).digest()
    vector = hashlib.shake_128(digest).digest(4 * 96)
    return digest[::-1], encode(Entry(vector, 7, True, digest))  # noqa: FBT003


RECORDS = dict(map(_record, range(1600)))
NEW = dict(map(_record, range(2000, 2010)))


def _path(directory):
    return directory / f"v{FORMAT}" / "cache.db"


def _heading(number):
    return LedgerKey(PARTITIONS[number % 2], f"model {number % 5}", "seller", f"client {number}")


SUMS = {_heading(number): PAID for number in range(20)}


async def _fill(directory):
    async with Store(directory, GIB) as store:
        for start in range(0, len(RECORDS), 400):
            some = dict(list(RECORDS.items())[start : start + 400])
            assert await store.put_many(some, PARTITIONS[start // 400 % 2])
        for heading, usage in SUMS.items():
            store.count(heading, usage)
    # What is evicted leaves free pages.
    with opened(directory, GIB) as file:
        extra = dict(map(_record, range(5000, 5400)))
        kept = {address: PendingRecord(record, PARTITIONS[0]) for address, record in extra.items()}
        file.write(WriteBatch(records=kept))
        with file.transaction() as connection:
            connection.executemany("DELETE FROM Cache WHERE key = ?", [(a,) for a in extra])


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """Give a directory with a store of 1,600 records that is closed; not to be changed."""
    directory = tmp_path_factory.mktemp("good")
    asyncio.run(_fill(directory))
    for name, content in SIDE_FILES.items():
        (_path(directory).parent / name).write_bytes(content)
    assert not list(directory.glob("v1/*-wal"))
    return directory


@pytest.fixture
def directory(good, tmp_path):
    """Give a directory with a copy of that store."""
    return shutil.copytree(good, tmp_path / "store")


def _page(directory, kind):
    kinds = page_kinds(_path(directory))
    return kinds[kind][len(kinds[kind]) // 2]


def _damage(directory, kind, how="zeros", seed=1):
    """Damage one page of a kind; return the addresses that were on it."""
    path, number = _path(directory), _page(directory, kind)
    lost = addresses_on(path, number)
    overwrite(path, number, damaged(page_of(path.read_bytes(), number), how, seed))
    return lost


async def _found(store, addresses=RECORDS):
    found = await store.lookup(list(addresses))
    for address, one in found.items():
        assert one.record == (RECORDS | NEW)[address]
    return set(found)


async def _sums(store):
    """Return the sums on disk by what they are about."""
    lines = await store.ledger([By.NAMESPACE, By.SPACE, By.MODEL, By.PROVIDER, By.CLIENT])
    return {
        LedgerKey(Partition(name, space, 96), *rest): usage for (name, space, *rest), usage in lines
    }


def _asides(directory):
    return sorted(directory.glob(f"v{FORMAT}.damaged-*"))


KINDS = [
    *("page 1", "pointer map", "free", "Settings", "Cache", "Cache root", "Cache_key_raw"),
    *("Cache_key_raw root", "Entries", "Entries_used", "Entries_stored", "Usage", "Usage_copy"),
    *("Partitions", "sqlite_autoindex_Partitions_1", "Purges", "Salvaged"),
]


def test_each_kind_of_page_is_there(good):
    """The store that is damaged here has pages of every kind."""
    assert page_kinds(_path(good)).keys() >= set(KINDS)


@pytest.mark.parametrize("how", ["zeros", "noise"])
@pytest.mark.parametrize("kind", KINDS)
async def test_a_page_that_is_gone_costs_what_was_on_it_alone(directory, kind, how):
    """Under an open store: all other records are found, and no sum is lower or counted twice."""
    async with Store(directory, GIB) as store:
        assert await _found(store) == set(RECORDS)
        lost = _damage(directory, kind, how)
        is_record_page = kind == "Cache"
        for _ in range(2):
            assert await _found(store) >= set(RECORDS) - (lost if is_record_page else set())
        store.count(_heading(0), PAID)
        assert await store.put_many(NEW, PARTITIONS[0])
        assert await _found(store, NEW) == set(NEW)
        await store.salvaged()
        assert await _found(store) >= set(RECORDS) - (lost if is_record_page else set())
    async with Store(directory, GIB) as store:
        await store.salvaged()
        assert await _found(store) >= set(RECORDS) - (lost if is_record_page else set())
        assert await _found(store, NEW) == set(NEW)
        assert await _sums(store) == SUMS | {_heading(0): PAID.plus(PAID)}
    for name, content in SIDE_FILES.items():
        assert (_path(directory).parent / name).read_bytes() == content


@pytest.mark.parametrize("seed", range(12))
async def test_a_few_bytes_of_noise_cost_what_was_on_the_page_at_most(directory, seed):
    """Where SQLite sees nothing of it, the records on the page alone may be gone, no other."""
    kind = KINDS[seed % len(KINDS)]
    lost = _damage(directory, kind, "patch", seed)
    async with Store(directory, GIB) as store:
        found = await store.lookup(list(RECORDS))
        await store.salvaged()
        found |= await store.lookup(list(RECORDS))
    right = {address for address, one in found.items() if one.record == RECORDS[address]}
    assert right >= set(RECORDS) - lost


@pytest.mark.parametrize("kind", KINDS)
async def test_a_store_that_was_damaged_while_it_was_closed(directory, kind):
    """It opens at once, serves all but what was on the page, and keeps the sums."""
    lost = _damage(directory, kind) if kind == "Cache" else _damage(directory, kind) - set(RECORDS)
    async with Store(directory, GIB) as store:
        assert await _found(store) >= set(RECORDS) - lost
        store.count(_heading(0), PAID)
        assert await store.put_many(NEW, PARTITIONS[0])
        await store.salvaged()
        assert await _found(store) >= set(RECORDS) - lost
        assert await _sums(store) == SUMS | {_heading(0): PAID.plus(PAID)}


_COLUMNS = ("day", "partition", "model", "provider", "client", *Usage._fields)


async def test_the_numbers_of_a_ledger_that_changed_are_noticed(directory):
    """SQLite takes another number for as good as the one before; the second copy does not."""
    path = _path(directory)
    number = page_kinds(path)["Usage"][0]
    page = page_of(path.read_bytes(), number)
    cell = next(cells(page, PAGE_BYTES, 0, INDEX_LEAF))
    at = cell.begin + cell.layout.starts[list(_COLUMNS).index("misses")]
    assert page[at] == PAID.misses
    overwrite(path, number, page[:at] + bytes([1]) + page[at + 1 :])
    async with Store(directory, GIB) as store:
        await store.salvaged()
        assert await _sums(store) == SUMS
    assert len(_asides(directory)) == 1


async def test_a_second_store_goes_on_with_the_file_that_the_first_has_begun(directory):
    """Two stores find the same damage: it is set aside once, and both serve all that is whole."""
    async with Store(directory, GIB) as one, Store(directory, GIB) as other:
        stores = [one, other]
        for store in stores:
            assert await _found(store) == set(RECORDS)
        _damage(directory, "Cache_key_raw root")
        for found in await asyncio.gather(*map(_found, stores)):
            assert found == set(RECORDS)
        for number, store in enumerate(stores):
            store.count(_heading(number), PAID)
            assert await store.put_many({address: NEW[address] for address in list(NEW)[number::2]})
        for store in stores:
            await store._tick(10)
            await store.salvaged()
            assert await _found(store, RECORDS | NEW) == set(RECORDS | NEW)
    assert len(_asides(directory)) == 1
    async with Store(directory, GIB) as store:
        more = {_heading(number): PAID.plus(PAID) for number in range(2)}
        assert await _sums(store) == SUMS | more


@pytest.mark.parametrize("by", ["tick", "look-up"])
async def test_a_store_notices_that_another_has_set_its_file_aside(directory, by):
    """One that only reads finds what the other writes into the new file."""
    async with Store(directory, GIB) as reading, Store(directory, GIB) as writing:
        _damage(directory, "Entries")
        file = writing._disk.file
        await writing._writer.replace(file)
        assert await writing.put_many(NEW, PARTITIONS[0])
        if by == "tick":
            await reading._tick(1)
            assert not reading._disk.file.replaced
        assert await _found(reading, RECORDS | NEW) == set(RECORDS | NEW)


async def test_what_is_bought_anew_is_not_replaced_by_what_is_salvaged(directory):
    """A record that is in the new file stays; the age of those that are salvaged does, too."""
    ages = await _ages(directory)
    address = next(iter(RECORDS))
    _damage(directory, "page 1")
    async with Store(directory, GIB) as store:
        before = time.time()
        assert await store.put_many({address: RECORDS[address]}, PARTITIONS[0])
        await store.salvaged()
        assert (await store.lookup([address]))[address].stored >= before - 1
    after = await _ages(directory)
    assert {a: round(t, 3) for a, t in after.items() if a != address} == {
        a: round(t, 3) for a, t in ages.items() if a != address
    }


async def _ages(directory):
    async with Store(directory, GIB) as store:
        await store.salvaged()
        found = await store.lookup(list(RECORDS))
    return {address: int(one.stored * 1000) / 1000 for address, one in found.items()}


async def test_what_is_too_old_is_not_served_from_a_damaged_file(directory):
    """The time to live holds for what is read of a file that was set aside."""
    _damage(directory, "Entries")
    async with Store(directory, GIB, ttl_s=1000) as store:
        await store._writer.replace(store._disk.file)
        store._salvager._stop.set()
        address = next(iter(RECORDS))
        assert await _found(store, [address]) == {address}
        assert await store._reader.lookup([address], time.time() + 5) == {}


async def test_two_damages_count_no_sum_twice(directory, monkeypatch):
    """The second file holds the sums of the first, which is not salvaged wholly yet."""
    _damage(directory, "Entries")
    async with Store(directory, GIB) as store:
        await store._writer.replace(store._disk.file)
        store._salvager.start()
        given, note = asyncio.Event(), QuarantinedFile.note
        loop = asyncio.get_running_loop()

        def noted(quarantined, **changed):
            note(quarantined, **changed)
            loop.call_soon_threadsafe(given.set)

        monkeypatch.setattr(QuarantinedFile, "note", noted)
        await given.wait()
        await store._salvager.stop()
        await store._writer.replace(store._disk.file)
        assert len(store._disk.damaged) == 2
    async with Store(directory, GIB) as store:
        await store.salvaged()
        assert await _found(store) == set(RECORDS)
        assert await _sums(store) == SUMS


async def test_a_purge_first_saves_what_is_damaged(directory):
    """What is deleted on purpose does not come back from a file that was set aside."""
    _damage(directory, "Entries")
    async with Store(directory, GIB) as store:
        await store._writer.replace(store._disk.file)
        await store._salvager.stop()
        outcomes = await asyncio.to_thread(salvage_pending, directory, GIB)
        # What was deleted to make room may come back as long as there is room.
        assert [outcome.records >= len(RECORDS) for outcome in outcomes] == [True]
        with opened(directory, GIB) as file:
            assert sum(delete(file, PurgeFilter(namespace=""))) == len(RECORDS) / 2
            announce(file, 1)
        await store._tick(1)
        assert len(await _found(store)) == len(RECORDS) / 2
    async with Store(directory, GIB) as store:
        await store.salvaged()
        assert len(await _found(store)) == len(RECORDS) / 2


async def test_old_versions_of_pages_do_not_bring_back_what_was_purged(directory):
    """The write-ahead log still holds it; a file from which something was purged gives the rest."""
    kept = directory.with_name("copy")
    async with Store(directory, GIB) as store:
        assert await store.put_many(NEW, PARTITIONS[0])
        with opened(directory, GIB) as file:
            for address in NEW:
                assert sum(delete(file, PurgeFilter(address=address))) == 1
            announce(file, len(NEW))
        # As a kill leaves it: the log is not merged.
        shutil.copytree(directory, kept)
    log = _path(kept).with_name("cache.db-wal").read_bytes()
    assert all(record in log for record in NEW.values())
    report = CarveReport()
    found = {row.address for row in rows(_path(kept), report)}
    assert set(RECORDS) <= found
    assert not found & set(NEW)


# What must be at each point at which a process can be killed, from the finding of the damage on.
KILLED = """
import asyncio, os, signal, sys
from pathlib import Path
from embedding_proxy.cache.disk import quarantine, salvage
from embedding_proxy.cache.disk.carver import RecordCarver
from embedding_proxy.cache.disk.database import Database
from embedding_proxy.cache.disk.store import Store

directory, place, points = Path(), 0, []

def counted(owner, name, *, after):
    work = getattr(owner, name)
    def counting(*arguments, **options):
        if not after:
            point()
        try:
            return work(*arguments, **options)
        finally:
            if after:
                point()
    setattr(owner, name, counting)

def point():
    points.append(1)
    if len(points) == place:
        os.kill(os.getpid(), signal.SIGKILL)

async def main():
    async with Store(directory, 1 << 30) as store:
        old = store._disk.file
        for owner, name in [(quarantine.QuarantinedFile, "note"), (Path, "rename"),
                            (Path, "unlink"), (Path, "mkdir")]:
            counted(owner, name, after=False)
            counted(owner, name, after=True)
        counted(salvage, "_put_sums", after=True)
        counted(salvage, "_put_records", after=True)
        await store._writer.replace(old)
        await store.salvaged()
    print(len(points), flush=True)

# What is imported above is imported once.
for line in sys.stdin:
    path, _, number = line.strip().rpartition(" ")
    child = os.fork()
    if not child:
        directory, place = Path(path), int(number)
        asyncio.run(main())
        os._exit(0)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


@pytest.fixture
def run_killed():
    """Give a function that runs KILLED in a process of its own; it returns what that has printed.

    This is the number of points if it came to its end, and the status of the process.
    """
    with subprocess.Popen(
        [sys.executable, "-c", KILLED],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:

        def run(directory, place):
            process.stdin.write(f"{directory} {place}\n")
            process.stdin.flush()
            lines = [int(process.stdout.readline())]
            if not place:
                lines.append(int(process.stdout.readline()))
            return lines

        yield run
        process.stdin.close()


@pytest.mark.parametrize("how", ["checkpointed", "with a log"])
async def test_a_kill_at_any_point_loses_nothing_and_counts_nothing_twice(
    directory, tmp_path, how, run_killed
):
    """A process is killed while it sets a file aside or salvages it; the next one finishes."""
    if how == "with a log":
        async with Store(directory, GIB) as store:
            assert await store.put_many(NEW, PARTITIONS[0])
            shutil.copytree(directory, tmp_path / "unmerged")
        directory = tmp_path / "unmerged"
        for shared in directory.rglob("*-shm"):
            shared.unlink()
    expected = set(RECORDS) | (set(NEW) if how == "with a log" else set())
    points, status = run_killed(shutil.copytree(directory, tmp_path / "whole"), 0)
    assert status == 0
    assert points >= 15
    for place in range(1, points + 1):
        victim = shutil.copytree(directory, tmp_path / f"victim-{place}")
        assert run_killed(victim, place) == [-9]
        async with Store(victim, GIB) as store:
            assert await _found(store, RECORDS | NEW) == expected
            await store.salvaged()
            assert await _found(store, RECORDS | NEW) == expected
            assert await _sums(store) == SUMS
        shutil.rmtree(victim)
