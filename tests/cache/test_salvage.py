"""Salvage into a store's file: whole, once, and beside others."""

import asyncio
import contextlib
import gzip
import logging
import shutil
import sqlite3
import threading
from pathlib import Path

import pytest
from embedding_proxy.cache.disk import quarantine, read_only, salvage
from embedding_proxy.cache.disk import reader as reader_module
from embedding_proxy.cache.disk.connection import opened
from embedding_proxy.cache.disk.database import Database
from embedding_proxy.cache.disk.quarantine import QuarantinedFile
from embedding_proxy.cache.disk.read_only import DamagedFile
from embedding_proxy.cache.disk.salvage import salvage_file, salvage_pending
from embedding_proxy.cache.disk.store import Store
from embedding_proxy.cache.key import FORMAT, Partition, keyring
from embedding_proxy.cache.ledger import By, LedgerKey, Usage
from embedding_proxy.cache.memory import Memory
from embedding_proxy.cache.record import Entry, encode
from embedding_proxy.cache.tiers import Tiers
from embedding_proxy.providers.base import Space

from tests.cache.fakes import entries_in

GIB = 1 << 30
P = Partition("", "m", 4)
HEADING, PAID = LedgerKey(P, "m", "seller", "client"), Usage(misses=3, tokens_billed=7)
RECORDS = {
    i.to_bytes(16): encode(Entry(i.to_bytes(16), 1, True, i.to_bytes(16)))  # noqa: FBT003
    for i in range(300)
}
DATA = Path(__file__).parent / "data"


def _path(directory):
    return directory / f"v{FORMAT}" / "cache.db"


async def _fill(directory):
    async with Store(directory, GIB) as store:
        assert await store.put_many(RECORDS, P)
        store.count(HEADING, PAID)


def _set_aside(directory):
    path = _path(directory)
    return quarantine.move(path, path.stat().st_ino)


async def _total(directory):
    async with Store(directory, GIB) as store:
        return await store.ledger([By.MODEL])


def _no_page_1(path):
    with path.open("r+b") as file:
        file.write(bytes(32_768))


@pytest.mark.parametrize("layout", [0, 1, 2])
async def test_a_file_of_an_older_layout_is_salvaged(layout, tmp_path):
    """Its records and its sums, as an upgrade would have carried them over."""
    whole, damaged = tmp_path / "whole", tmp_path / "damaged"
    for directory in (whole, damaged):
        _path(directory).parent.mkdir(parents=True)
        _path(directory).write_bytes(
            gzip.decompress((DATA / f"layout-{layout}.db.gz").read_bytes())
        )
    _no_page_1(_path(damaged))
    ring = keyring(Space("openai/text-embedding-3-small", 8))
    keys = [ring.key(f"old {i}") for i in range(20)]
    found, sums = [], []
    by = [By.DAY, By.NAMESPACE, By.SPACE, By.MODEL, By.PROVIDER, By.CLIENT]
    for directory in (whole, damaged):
        async with Store(directory, GIB) as store:
            await store.salvaged()
            found.append(await entries_in(Tiers(Memory(0), store), keys, ring.partition))
            sums.append(await store.ledger(by))
    assert len(found[0]) >= 1
    assert (found[1], sums[1]) == (found[0], sums[0])


async def test_sums_are_added_once_wherever_the_file_lies(tmp_path):
    """Salvaged again, from its folder or a file elsewhere, they are not added again.

    Of a file elsewhere they are only added if that is asked for: they may be in the ledger.
    """
    await _fill(tmp_path)
    quarantined = _set_aside(tmp_path)
    salvage_pending(tmp_path, GIB)
    assert await _total(tmp_path) == [(("m",), PAID)]
    with opened(tmp_path, GIB) as file:
        assert salvage_file(quarantined.path, file)[0].sums == 0
    elsewhere = tmp_path / "elsewhere.db"
    other = tmp_path / "other"
    await _fill(other)
    shutil.copy(_path(other), elsewhere)
    with opened(tmp_path, GIB) as file:
        assert salvage_file(elsewhere, file)[0].sums == 0
        twice = [salvage_file(elsewhere, file, add_sums=True)[0].sums for _ in range(2)]
        assert twice == [1, 0]
    assert await _total(tmp_path) == [(("m",), PAID.plus(PAID))]


async def test_the_marks_of_a_file_go_with_its_sums(tmp_path):
    """A file holds the sums of one before it: of that one, only records are left to be saved."""
    await _fill(tmp_path)
    first = _set_aside(tmp_path)
    salvage_pending(tmp_path, GIB)
    second = _set_aside(tmp_path)
    # As if the first had not been finished when the second was damaged.
    first.note(done=False, sums=False)
    assert [quarantined.folder for quarantined in quarantine.pending(_path(tmp_path))] == [
        second.folder,
        first.folder,
    ]
    assert [outcome.sums for outcome in salvage_pending(tmp_path, GIB)] == [1, 0]
    assert await _total(tmp_path) == [(("m",), PAID)]


async def test_another_process_that_salvages_is_waited_for(tmp_path, monkeypatch):
    """One works at a time; the other finds that all is done, and returns the same outcome."""
    await _fill(tmp_path)
    quarantined = _set_aside(tmp_path)
    waited, may_go_on = threading.Event(), threading.Event()

    def sleep(_):
        waited.set()
        may_go_on.wait()

    with salvage.hold_alone(tmp_path) as is_alone:
        assert is_alone
        with salvage.hold_alone(tmp_path) as is_other_alone:
            assert not is_other_alone
        with monkeypatch.context() as patch:
            patch.setattr("embedding_proxy.cache.disk.salvage.time.sleep", sleep)
            waiting = asyncio.create_task(asyncio.to_thread(salvage_pending, tmp_path, GIB))
            await asyncio.to_thread(waited.wait)
            salvage.finish(quarantined, salvage.Outcome(records=5, sums=2))
            may_go_on.set()
            (outcome,) = await waiting
    assert (outcome.records, outcome.sums) == (5, 2)


async def test_a_store_waits_for_the_salvage_of_another_process(tmp_path):
    """What cannot be looked up is found as soon as the other is done."""
    await _fill(tmp_path)
    _no_page_1(_path(tmp_path))
    with salvage.hold_alone(tmp_path):
        async with Store(tmp_path, GIB) as store:
            reading = asyncio.create_task(store.lookup(list(RECORDS)))
            with opened(tmp_path, GIB) as file:
                (quarantined,) = quarantine.pending(_path(tmp_path))
                outcome, _ = await asyncio.to_thread(salvage_file, quarantined.path, file)
                salvage.finish(quarantined, outcome)
            assert (await reading).keys() == RECORDS.keys()
            await store.salvaged()
            assert store._disk.damaged == ()


async def test_nobody_waits_for_long_for_what_takes_long(tmp_path, monkeypatch):
    """After one wait in vain nobody waits for a while; all of it is served in the end."""
    monkeypatch.setattr(reader_module, "SECONDS", 0.05)
    await _fill(tmp_path)
    _no_page_1(_path(tmp_path))
    waits = []
    async with Store(tmp_path, GIB) as store:
        finished = store._salvager.finished

        async def counted():
            waits.append(1)
            await finished()

        with salvage.hold_alone(tmp_path) as is_alone:
            # The store may have been quicker.
            if is_alone:
                monkeypatch.setattr(store._reader, "_salvaged", counted)
                for _ in range(5):
                    assert await store.lookup(list(RECORDS)) == {}
                assert len(waits) == 1
        await store.salvaged()
        assert (await store.lookup(list(RECORDS))).keys() == RECORDS.keys()


async def test_a_disk_that_takes_nothing_is_asked_again(tmp_path, monkeypatch, caplog):
    """The salvage waits, one line in the log says why, and it goes on once the disk takes it."""
    await _fill(tmp_path)
    _set_aside(tmp_path)
    write, refusals = Database.write, iter(range(2))

    def refusing(self, *arguments, **options):
        if next(refusals, None) is not None:
            raise OSError("the file system is nearly full; nothing is written")
        return write(self, *arguments, **options)

    monkeypatch.setattr(Database, "write", refusing)
    monkeypatch.setattr("embedding_proxy.providers.failure_backoff.MIN_SECONDS", 0.01)
    with caplog.at_level(logging.WARNING):
        async with Store(tmp_path, GIB) as store:
            await store.salvaged()
            assert (await store.lookup(list(RECORDS))).keys() == RECORDS.keys()
    assert caplog.text.count("saving what is whole in a damaged file waits") == 1


async def test_what_is_salvaged_is_told(tmp_path, caplog):
    """One line when it begins, one when it is done: how much, and what may become of the folder."""
    await _fill(tmp_path)
    quarantined = _set_aside(tmp_path)
    with caplog.at_level(logging.WARNING):
        async with Store(tmp_path, GIB) as store:
            await store.salvaged()
    assert f"{quarantined.folder}: saving what is whole in it" in caplog.text
    assert (
        f"{quarantined.folder}: 300 records and 1 sums were saved; the folder is not" in caplog.text
    )
    assert quarantined.path.stat().st_size > 0


async def test_a_folder_of_an_earlier_version_is_left_alone(tmp_path):
    """It has no salvage.json; nobody knows what was saved out of it by hand."""
    await _fill(tmp_path)
    old = tmp_path / f"v{FORMAT}.damaged-20250101T000000-0"
    _path(tmp_path).parent.rename(old)
    before = sorted(old.iterdir())
    async with Store(tmp_path, GIB) as store:
        await store.salvaged()
        assert await store.lookup(list(RECORDS)) == {}
    assert sorted(old.iterdir()) == before


@pytest.mark.parametrize("content", [b"", b"{", b"[]"], ids=repr)
async def test_a_state_that_cannot_be_read_means_that_all_is_to_be_done(tmp_path, content):
    """A power cut may leave it empty; what was added is not added again."""
    await _fill(tmp_path)
    quarantined = _set_aside(tmp_path)
    salvage_pending(tmp_path, GIB)
    state = quarantined.folder / quarantine.STATE_FILE
    state.write_bytes(content)
    assert salvage_pending(tmp_path, GIB) == [salvage.Outcome(0, 300)]
    assert await _total(tmp_path) == [(("m",), PAID)]


async def test_a_file_that_was_put_there_since_is_not_moved(tmp_path):
    """A process is killed before it moves anything, and an operator puts a copy in its place."""
    await _fill(tmp_path)
    path = _path(tmp_path)
    quarantined = QuarantinedFile(tmp_path / f"v{FORMAT}.damaged-20250101T000000-0", path.name)
    quarantined.folder.mkdir()
    quarantined.note(done=False, moved=False, number=1, inode=path.stat().st_ino)
    copy = tmp_path / "copy"
    shutil.copy(path, copy)
    copy.rename(path)
    async with Store(tmp_path, GIB) as store:
        assert (await store.lookup(list(RECORDS))).keys() == RECORDS.keys()
    assert not quarantined.is_pending
    assert not quarantined.path.exists()


async def test_closing_a_moved_file_leaves_the_log_of_the_new_one(tmp_path):
    """SQLite deletes a log by its name, unless the database of that name is another one."""
    await _fill(tmp_path)
    path = _path(tmp_path)
    with contextlib.closing(sqlite3.connect(path)) as old:
        old.execute("UPDATE Settings SET value = value")
        old.commit()
        old_log = path.with_name("cache.db-wal").read_bytes()
        quarantined = _set_aside(tmp_path)
        async with Store(tmp_path, GIB) as store:
            await store.salvaged()
            assert await store.put_many({b"n" * 16: b"new"}, P)
            old.close()
            assert path.with_name("cache.db-wal").stat().st_size > 0
            assert (await store.lookup([b"n" * 16])).keys() == {b"n" * 16}
    assert quarantined.log.read_bytes() == old_log


@pytest.mark.parametrize("has_log", [False, True])
async def test_without_its_log_a_damaged_file_tells_nothing_of_what_it_lacks(
    tmp_path, monkeypatch, has_log
):
    """Where SQLite can make no file beside it, what may be in the log cannot be looked up."""
    await _fill(tmp_path)
    quarantined = _set_aside(tmp_path)
    if has_log:
        quarantined.log.write_bytes(bytes(32))
    connected = read_only._connected

    def refusing(path, query, patience_s):
        if "immutable" not in query:
            raise sqlite3.OperationalError("unable to open database file")
        return connected(path, query, patience_s)

    monkeypatch.setattr(read_only, "_connected", refusing)
    file = DamagedFile(quarantined)
    addresses = [*RECORDS, b"n" * 16]
    found, unreadable = file.read_many(addresses)
    file.close()
    assert (found.keys(), unreadable) == (RECORDS.keys(), {b"n" * 16} if has_log else set())
    assert file.read_many(addresses) == ({}, set(addresses))
