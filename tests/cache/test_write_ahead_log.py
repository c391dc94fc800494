"""A damaged write-ahead log is noticed before SQLite cuts off what follows; nothing is lost."""

import asyncio
import hashlib
import os
import random
import shutil
import sqlite3
import subprocess
from contextlib import closing

import pytest
from embedding_proxy.cache.disk.connection import opened
from embedding_proxy.cache.disk.store import Store
from embedding_proxy.cache.disk.write_ahead_log import Log, check, damage_of
from embedding_proxy.cache.key import Partition
from embedding_proxy.cache.ledger import By, LedgerKey, Usage
from embedding_proxy.cache.record import Entry, encode

GIB = 1 << 30
PARTITION = Partition("", "a/space", 96)
HEADING = LedgerKey(PARTITION, "model", "seller", "client")
PAID = Usage(misses=40, tokens_billed=280, nanodollars_billed=11)
FRAME = 24 + 32_768


def _record(number):
    digest = hashlib.blake2b(number.to_bytes(8, "big"), digest_size=16).digest()
    vector = hashlib.shake_128(digest).digest(4 * 96)
    return digest[::-1], encode(Entry(vector, 7, True, digest))  # noqa: FBT003


GROUPS = [dict(map(_record, range(start, start + 40))) for start in range(0, 800, 40)]
RECORDS = {address: record for group in GROUPS for address, record in group.items()}
COUNT = len(RECORDS)
SUMS = Usage(misses=800, tokens_billed=5_600, nanodollars_billed=220)


async def _fill(directory, copy):
    async with Store(directory, GIB) as store:
        for group in GROUPS:
            store.count(HEADING, PAID)
            assert await store.put_many(group, PARTITION)
        shutil.copytree(directory, copy, ignore=shutil.ignore_patterns("*-shm"))


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    """Give a directory as a kill leaves it: all records are in the log. Not to be changed."""
    folder = tmp_path_factory.mktemp("killed")
    asyncio.run(_fill(folder / "run", folder / "copy"))
    return folder / "copy"


@pytest.fixture
def directory(killed, tmp_path):
    """Give a copy of it."""
    return shutil.copytree(killed, tmp_path / "store")


def _database(directory):
    return directory / "v1" / "cache.db"


def _log(directory):
    return directory / "v1" / "cache.db-wal"


def _flip(path, at, bit=1):
    data = bytearray(path.read_bytes())
    data[at] ^= bit
    path.write_bytes(data)


def _asides(directory):
    return list(directory.glob("v1.damaged-*"))


async def _assert_all_there(directory, at_least=COUNT):
    """At once, while it is salvaged, and with the next opening: each record and each sum."""
    for is_first in (True, False):
        async with Store(directory, GIB) as store:
            found = await store.lookup(list(RECORDS))
            assert len(found) >= at_least
            assert all(RECORDS[address] == one.record for address, one in found.items())
            if is_first:
                await store.salvaged()
                assert len(await store.lookup(list(RECORDS))) >= at_least
            assert await store.ledger([By.MODEL]) == [(("model",), SUMS)]


def _frames(directory):
    return (_log(directory).stat().st_size - 32) // FRAME


PLACES = {
    "magic": lambda _: 1,
    "page size": lambda _: 10,
    "salt": lambda _: 17,
    "header's checksum": lambda _: 30,
    "first frame's page number": lambda _: 32 + 3,
    "first frame's page": lambda _: 32 + 24 + 30_000,
    "a middle frame's size": lambda count: 32 + count // 2 * FRAME + 5,
    "a middle frame's salts": lambda count: 32 + count // 2 * FRAME + 9,
    "a middle frame's checksum": lambda count: 32 + count // 2 * FRAME + 17,
    "a middle frame's page": lambda count: 32 + count // 2 * FRAME + 25_000,
    "last frame's salts": lambda count: 32 + (count - 1) * FRAME + 12,
    "last frame's checksum": lambda count: 32 + (count - 1) * FRAME + 20,
    "last frame's page": lambda count: 32 + (count - 1) * FRAME + 16_000,
}


@pytest.mark.parametrize("place", PLACES)
async def test_one_bit_of_the_log_costs_a_record_at_most(directory, place):
    """It is set aside, what follows is served at once and saved, and no sum is lower or higher."""
    _flip(_log(directory), PLACES[place](_frames(directory)))
    await _assert_all_there(directory, len(RECORDS) - 1)
    assert len(_asides(directory)) == 1


@pytest.mark.parametrize("seed", range(8))
async def test_any_bit_of_the_log_costs_a_record_at_most(directory, seed):
    """Wherever it is but in the last transaction, as above."""
    chance = random.Random(seed)
    _flip(_log(directory), chance.randrange(32 + 8 * FRAME), 1 << chance.randrange(8))
    await _assert_all_there(directory, len(RECORDS) - 1)
    assert len(_asides(directory)) == 1


@pytest.mark.parametrize("place", ["beginning", "middle"])
async def test_noise_in_the_log_costs_what_lay_there(directory, place):
    """64 KiB cover three frames at most; what is in the others stays, with the sums."""
    data = bytearray(_log(directory).read_bytes())
    at = 0 if place == "beginning" else len(data) // 2
    data[at : at + (1 << 16)] = random.Random(1).randbytes(1 << 16)
    _log(directory).write_bytes(data)
    await _assert_all_there(directory, len(RECORDS) - 3 * 70)
    assert len(_asides(directory)) == 1


async def test_an_empty_database_beside_its_log(directory):
    """SQLite would delete the log; it is read instead."""
    os.truncate(_database(directory), 0)
    await _assert_all_there(directory)
    assert len(_asides(directory)) == 1


async def test_an_empty_database_beside_its_log_is_a_store_for_the_commands(directory):
    """They say that it is damaged, not that there is none."""
    os.truncate(_database(directory), 0)
    with pytest.raises(Exception, match="damaged") as error, opened(directory, GIB):
        pass
    assert isinstance(error.value.__cause__, sqlite3.DatabaseError)
    assert _log(directory).stat().st_size > 32


@pytest.mark.parametrize("how", ["in a frame", "between frames", "commit is missing"])
async def test_a_torn_last_transaction_is_no_damage(directory, how):
    """A kill leaves such a log: what was committed before is there, and nothing is set aside."""
    file = os.open(_log(directory), os.O_RDONLY)
    log = Log(file, 32_768)
    os.close(file)
    *_, before, last = [int(row) for row in log.commits.nonzero()[0]]
    assert last - before > 1
    end = 32 + last * FRAME
    if how == "commit is missing":
        # Over what was in the log before: frames of other salts.
        data = bytearray(_log(directory).read_bytes())
        data[end:] = bytes(8) + bytes(range(16)) + data[end + 24 :]
        _log(directory).write_bytes(data)
    else:
        os.truncate(_log(directory), end + (5_000 if how == "in a frame" else 0))
    assert damage_of(_database(directory)) == ""
    async with Store(directory, GIB) as store:
        assert len(await store.lookup(list(RECORDS))) == len(RECORDS) - 40
    assert _asides(directory) == []


async def _fill_but_for_the_last_index(directory, copy):
    """Copy a store whose last transaction is in the log, and not in the log's index."""
    index = directory / "v1" / "cache.db-shm"
    async with Store(directory, GIB) as store:
        for group in GROUPS:
            if group is GROUPS[-1]:
                # By another process: to close it here would take the locks of the store.
                copying = ["cp", index, f"{copy}-shm"]
                await asyncio.to_thread(subprocess.run, copying, check=True)
            store.count(HEADING, PAID)
            assert await store.put_many(group, PARTITION)
        shutil.copytree(directory, copy, ignore=shutil.ignore_patterns("*-shm"))
    shutil.move(f"{copy}-shm", copy / "v1" / "cache.db-shm")


@pytest.mark.parametrize("has_index", [True, False])
async def test_what_nobody_was_told_of_is_no_damage(tmp_path, has_index):
    """A writer is killed before it tells of its commit, and another one amid its first frame.

    The index of the log tells that from damage. Without it nothing is lost either: what is behind
    the frame is saved as if it had been told.
    """
    directory = tmp_path / "copy"
    await _fill_but_for_the_last_index(tmp_path / "run", directory)
    file = os.open(_log(directory), os.O_RDONLY)
    *_, before, last = [int(row) for row in Log(file, 32_768).commits.nonzero()[0]]
    os.close(file)
    assert last - before > 1
    _flip(_log(directory), 32 + (before + 1) * FRAME + 20_000)
    if not has_index:
        (directory / "v1" / "cache.db-shm").unlink()
    assert bool(damage_of(_database(directory))) == (not has_index)
    async with Store(directory, GIB) as store:
        assert len(await store.lookup(list(RECORDS))) >= len(RECORDS) - 40
    assert len(_asides(directory)) == (not has_index)


async def test_damage_before_what_the_index_tells_of_is_damage(tmp_path):
    """A frame of a transaction that was told of does not verify: the log is set aside."""
    directory = tmp_path / "copy"
    await _fill_but_for_the_last_index(tmp_path / "run", directory)
    _flip(_log(directory), 32 + _frames(directory) // 2 * FRAME + 20_000)
    assert damage_of(_database(directory))
    await _assert_all_there(directory, len(RECORDS) - 1)
    assert len(_asides(directory)) == 1


@pytest.mark.parametrize("where", [17, 41, 48 + 17, 33])
async def test_an_index_that_does_not_verify_tells_nothing(tmp_path, where):
    """One of its copies, its checksum or its salts are other than they should be."""
    directory = tmp_path / "copy"
    await _fill_but_for_the_last_index(tmp_path / "run", directory)
    file = os.open(_log(directory), os.O_RDONLY)
    *_, before, _ = [int(row) for row in Log(file, 32_768).commits.nonzero()[0]]
    os.close(file)
    _flip(_log(directory), 32 + (before + 1) * FRAME + 20_000)
    assert not damage_of(_database(directory))
    _flip(directory / "v1" / "cache.db-shm", where)
    assert damage_of(_database(directory))


def test_a_log_that_was_begun_anew_is_no_damage(tmp_path):
    """Behind its frames there are those of the run before."""
    path = tmp_path / "cache.db"
    with closing(sqlite3.connect(path, isolation_level=None)) as sql:
        sql.execute("PRAGMA journal_mode = wal")
        sql.execute("CREATE TABLE t (x)")
        for _ in range(50):
            sql.execute("INSERT INTO t VALUES (randomblob(3000))")
        sql.execute("PRAGMA wal_checkpoint(RESTART)")
        for rows in range(1, 20):
            sql.execute("INSERT INTO t VALUES (randomblob(3000))")
            file = os.open(tmp_path / "cache.db-wal", os.O_RDONLY)
            log = Log(file, 4096)
            os.close(file)
            assert rows <= log.sound.sum() < len(log.pages)
            assert log.damage() == ""
        check(path)


@pytest.mark.parametrize("kind", [0, 1])
def test_checksums_of_either_byte_order(tmp_path, kind):
    """The header says which words the checksums add (4.2), computed here word by word."""
    order, chance = ("little", "big")[kind], random.Random(kind)

    def summed(data, sums):
        one, two = sums
        for at in range(0, len(data), 8):
            one = (one + int.from_bytes(data[at : at + 4], order) + two) % 2**32
            two = (two + int.from_bytes(data[at + 4 : at + 8], order) + one) % 2**32
        return one, two

    def as_bytes(*numbers):
        return b"".join(number.to_bytes(4) for number in numbers)

    data = as_bytes(0x377F0682 + kind, 3_007_000, 512, 0) + b"saltsalt"
    data += as_bytes(*(sums := summed(data, (0, 0))))
    for number in range(1, 6):
        head, page = as_bytes(number, number), chance.randbytes(512)
        sums = summed(head + page, sums)
        data += head + b"saltsalt" + as_bytes(*sums) + page
    (tmp_path / "log").write_bytes(data)
    with (tmp_path / "log").open("rb") as file:
        log = Log(file.fileno(), 512)
    assert log.has_sound_header
    assert log.sound.tolist() == [True] * 5


async def test_two_stores_open_a_damaged_log(directory):
    """It is set aside once, and both find everything."""
    _flip(_log(directory), 32 + 2 * FRAME + 9_000)
    async with Store(directory, GIB) as one, Store(directory, GIB) as other:
        for store in (one, other):
            assert len(await store.lookup(list(RECORDS))) >= len(RECORDS) - 1
            await store.salvaged()
            assert await store.ledger([By.MODEL]) == [(("model",), SUMS)]
    assert len(_asides(directory)) == 1


async def test_a_log_that_is_open_is_no_damage(tmp_path):
    """Stores that open while others write and begin the log anew set nothing aside."""
    async with Store(tmp_path, 8 << 20) as store:
        for start, group in enumerate(GROUPS * 5):
            store.count(HEADING, PAID)
            assert await store.put_many(
                {address[:15] + bytes([start]): record for address, record in group.items()}
            )
            async with Store(tmp_path, 8 << 20):
                pass
    assert _asides(tmp_path) == []
