"""One damaged page, whatever it held: all else is found, the sums stay, and nothing moves but it."""

import asyncio
import hashlib
import shutil
import time

import pytest

from cache.disk.changes import Changes, Kept
from cache.disk.connection import opened
from cache.disk.purge import Choice, announce, delete
from cache.disk.store import Store
from cache.key import FORMAT
from cache.ledger import By, Heading
from cache.record import Entry, encode
from cache.row import Partition
from cache.usage import Usage
from tests.cache.page_kinds import addresses_on, damaged, overwrite, page_kinds, page_of

GIB = 1 << 30
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
    return Heading(PARTITIONS[number % 2], f"model {number % 5}", "seller", f"client {number}")


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
        kept = {address: Kept(record, PARTITIONS[0]) for address, record in extra.items()}
        file.write(Changes(records=kept))
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
    found = await store.get_many(list(addresses))
    for address, one in found.items():
        assert one.record == (RECORDS | NEW)[address]
    return set(found)


async def _sums(store):
    """Return the sums on disk by what they are about."""
    lines = await store.ledger([By.NAMESPACE, By.SPACE, By.MODEL, By.PROVIDER, By.CLIENT])
    return {
        Heading(Partition(name, space, 96), *rest): usage for (name, space, *rest), usage in lines
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
    """Under an open store: all other records are found at once, no sum is lower or counted twice."""
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
