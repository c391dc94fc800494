"""docs/storage.md promises that nothing is lost: each promise is on the page, and a test shows it.

Those that no other file shows are shown here, with a proxy or a store as people run it.
"""

import ast
import asyncio
import fcntl
import random
import shutil
import sqlite3
from contextlib import closing
from functools import cache
from pathlib import Path

import pytest
from embedding_proxy.cache.disk import connection, disk_full, ledger_reader, purge
from embedding_proxy.cache.disk.store import Store
from embedding_proxy.cache.key import Partition
from embedding_proxy.cache.ledger import LedgerKey, Usage
from embedding_proxy.proxy.service import drift_check
from page_map import addresses_on, read_map
from pages import ROOT

PAGE = " ".join((ROOT / "docs" / "storage.md").read_text(encoding="utf-8").split())
HERE = Path(__file__).relative_to(ROOT).as_posix()
PROMISES = {
    "A vector is on disk before the reply that holds it leaves.": (
        "tests/test_crash.py::test_killed_right_after_a_reply",
        f"{HERE}::test_what_is_answered_at_the_limit_is_on_disk",
    ),
    "After `kill -9` every vector that was sent is on disk": (
        "tests/test_crash.py::test_killed_amid_purchases",
        "tests/test_crash.py::test_killed_amid_writes_of_two_processes",
    ),
    "After a power cut the last transactions may be missing": (
        f"{HERE}::test_after_a_power_cut_the_last_transactions_are_missing_as_a_whole",
    ),
    "the file stays consistent": (
        f"{HERE}::test_after_a_power_cut_the_last_transactions_are_missing_as_a_whole",
    ),
    "A file of an older layout is upgraded in one transaction": (
        "tests/cache/test_schema.py::test_an_old_file_is_brought_up_where_it_lies",
        "tests/cache/test_schema.py::test_an_upgrade_that_is_killed_leaves_the_old_file_whole",
    ),
    "A file of a newer layout is refused and left unchanged": (
        "tests/cache/test_schema.py::test_a_newer_layout_is_refused_and_left_alone",
    ),
    # The ledger.
    "A charge is counted when the reply of an upstream is read": (
        "tests/providers/test_bill.py::test_an_answer_that_is_no_good_is_billed_if_it_was_charged",
        "tests/cache/test_ledger.py::test_the_charges_of_a_request_that_fails_are_billed",
        "tests/cache/test_embedder.py::test_a_purchase_is_summed_though_its_buyer_is_gone",
    ),
    "no vector is stored without its charge": (
        "tests/cache/test_ledger.py::test_a_charge_is_written_with_what_was_bought_or_before",
        f"{HERE}::test_after_a_power_cut_the_last_transactions_are_missing_as_a_whole",
    ),
    "written with the next record, at least every ten seconds, and at the end": (
        "tests/cache/test_usage.py::test_sums_are_written_with_the_next_change",
        "tests/test_full_store.py::test_a_store_of_pins_answers_and_counts",
    ),
    "After `kill -9` at most the hits and joins of": (
        f"{HERE}::test_after_a_kill_the_charges_are_there",
        f"{HERE}::test_charges_are_written_where_records_cannot_be",
    ),
    "**Several processes** add to the same rows": (
        "tests/test_shared_store.py::test_two_workers_count_exactly",
    ),
    "`cache purge` deletes entries, never sums": (f"{HERE}::test_a_purge_leaves_the_sums",),
    "Sums of layout 1 are kept": (
        "tests/cache/test_schema.py::test_the_sums_of_layout_1_are_carried_over",
    ),
    # When something is wrong: one for each row of the table.
    "belongs to another key": (
        "tests/cache/test_tiers.py::test_a_record_that_does_not_verify_is_a_miss",
        "tests/cache/test_tiers.py::test_a_collision_on_disk_is_a_miss_and_counted",
    ),
    "a record has other dimensions than the model's": (
        f"{HERE}::test_a_wrong_width_in_the_configuration_costs_nothing",
    ),
    "the file does not open, or is found damaged": (
        f"{HERE}::test_a_damaged_page_costs_what_lay_on_it",
        "tests/test_page_damage.py::test_a_damaged_page_costs_what_lay_on_it",
        "tests/cache/test_disk.py::test_a_damaged_file_is_moved_aside_and_kept",
    ),
    "the write-ahead log is damaged, or `cache.db` is empty beside it": (
        "tests/cache/test_write_ahead_log.py::test_one_bit_of_the_log_costs_a_record_at_most",
        "tests/cache/test_write_ahead_log.py::test_an_empty_database_beside_its_log",
        "tests/cache/test_write_ahead_log.py::test_a_torn_last_transaction_is_no_damage",
    ),
    "the file is deleted or replaced under the running proxy": (
        "tests/test_disk_faults.py::test_a_file_deleted_under_load_fails_no_request",
        f"{HERE}::test_a_write_that_waited_goes_into_the_file_at_the_path",
    ),
    "`cache.db-wal` or `cache.db-shm` is deleted under the running proxy": (
        "tests/cache/test_lost_log.py::test_all_is_there_after_a_kill",
        "tests/cache/test_lost_log.py::test_all_of_two_processes_is_there_after_a_kill",
        "tests/cache/test_lost_log.py::test_a_store_notices_it_by_itself",
    ),
    "less than 64 MiB are free on the file system": (
        "tests/cache/test_store.py::test_a_disk_that_is_nearly_full_is_spared",
    ),
    "another process writes for longer than 2 s": (
        "tests/test_disk_faults.py::test_nothing_is_bought_twice_for_a_fault_of_the_disk",
    ),
    "a reader that does not end": (f"{HERE}::test_the_limit_holds_beside_a_reader_that_stays",),
    "a record cannot be written": (f"{HERE}::test_charges_are_written_where_records_cannot_be",),
    "three failures in a row": (
        "tests/test_disk_faults.py::test_a_kept_lock_is_waited_for_three_times",
    ),
    "the directory accepts no writes at the start": (
        "tests/test_disk_faults.py::test_a_start_on_a_store_that_cannot_be_opened",
    ),
    "and it holds no store": (
        "tests/proxy/test_config_paths.py::test_a_folder_that_cannot_be_made_is_said_in_words",
    ),
    "a directory is in the place of": (
        "tests/proxy/test_reading_commands.py::test_a_directory_in_the_place_of_a_file_is_named",
    ),
    "other users can read what the proxy has put into the directory": (
        "tests/security/test_private_files.py::test_what_was_there_before_is_mended",
        "tests/security/test_private_files.py::test_what_cannot_be_mended_is_a_warning",
        "tests/security/test_private_files.py::test_a_folder_of_the_user_keeps_its_mode",
    ),
    "`widths.json` is damaged": ("tests/test_learned.py::test_a_spoilt_file_is_learned_anew",),
    "also work where the store cannot be written": (
        (
            "tests/proxy/test_reading_commands.py"
            "::test_what_only_reads_works_where_nothing_can_be_written"
        ),
    ),
    "also in such a folder that was renamed": (
        (
            "tests/proxy/test_cache_commands.py"
            "::test_sums_that_are_in_the_ledger_already_are_not_added"
        ),
    ),
    "None of these fails a request": (
        "tests/test_disk_faults.py::test_nothing_is_bought_twice_for_a_fault_of_the_disk",
        "tests/test_disk_faults.py::test_a_process_recovers_by_itself",
    ),
    # When it is full.
    "holds for the real files, the write-ahead log among them": (
        "tests/test_eviction_load.py::test_a_proxy_at_its_limit",
        f"{HERE}::test_the_limit_holds_beside_a_reader_that_stays",
    ),
    "is not deleted for want of a note": (
        "tests/cache/test_store.py::test_what_is_used_often_is_not_driven_out",
    ),
    "`cache.pinned_namespaces` names namespaces that never make room for others": (
        "tests/test_eviction_load.py::test_what_is_pinned_stays",
        "tests/test_full_store.py::test_two_processes_at_the_limit",
        "tests/test_full_store.py::test_the_last_use_of_what_is_pinned_is_the_last_use",
    ),
    "is how long after its purchase a vector is served": (
        "tests/test_eviction_load.py::test_an_old_vector_is_bought_anew",
    ),
}
"""What the page says, and the tests that show it."""

MODEL = "text-embedding-3-small"
MIB = 1 << 20
PARTITION = Partition("", "m", 1536)
RECORD = bytes(6184)


@cache
def _tests(path: str) -> set[str]:
    """Return the names of the tests in a file."""
    tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef)
    return {node.name for node in tree.body if isinstance(node, kinds)}


@pytest.mark.parametrize("promise", PROMISES)
def test_a_promise_is_on_the_page_and_a_test_shows_it(promise):
    """The words are still on the page, and the tests still exist."""
    assert promise in PAGE
    for proof in PROMISES[promise]:
        path, _, name = proof.partition("::")
        assert name in _tests(path), proof


def test_every_row_of_what_may_go_wrong_has_a_test():
    """A row that is added to the table needs a promise above."""
    text = (ROOT / "docs" / "storage.md").read_text(encoding="utf-8")
    part = text.partition("\n## When something is wrong\n")[2].partition("\n## ")[0]
    rows = [line.strip("| ") for line in part.splitlines() if line.startswith("| ")][1:]
    assert len(rows) > 5
    assert [row for row in rows if not any(promise in row for promise in PROMISES)] == []


# Helpers.


def _texts(word, count=50):
    return [f"{word} {number}" for number in range(count)]


async def _ask(proxy, texts):
    """Ask for texts; return how many were hits and misses."""
    reply = await proxy.post({"model": MODEL, "input": texts, "encoding_format": "base64"})
    assert reply.status == 200
    return int(reply.headers["x-cache-hits"]), int(reply.headers["x-cache-misses"])


def _as_after_a_kill(directory, copy):
    """Copy a store as it lies on disk now: all that a process killed at this moment leaves."""
    shutil.copytree(directory, copy)
    for shared in copy.rglob("*-shm"):
        shared.unlink()
    return copy


def _sums(directory):
    """Return all sums of a store that nobody has open."""
    with connection.opened(directory, 1 << 30) as file:
        lines = ledger_reader.read(file.sql, ())
    return lines[0][1] if lines else Usage()


async def _write_what_can_wait(proxy):
    """Do what the proxy does by itself every ten seconds."""
    await proxy.service._storage.tiers._store._tick(10)


def _addresses(numbers):
    return [f"address {number:08}".encode() for number in numbers]


# What was answered is there.


async def test_what_is_answered_at_the_limit_is_on_disk(tmp_path, upstream, start_proxy):
    """It is so where the store is full and all that is in it was used a moment ago."""
    limits = {"size_limit_gib": 4 / 1024, "memory_mib": 64}
    async with Store(tmp_path / "cache", 4 * MIB) as store:
        # As after some minutes: there are entries that are always pinned.
        records = dict.fromkeys(_addresses(range(4)), RECORD)
        assert await store.put_many(records, Partition(drift_check.NAMESPACE, "s", 1536))
    proxy = await start_proxy(openai=upstream, cache=limits)
    batches = [_texts(f"batch {number}") for number in range(20)]
    for number, batch in enumerate(batches):
        assert await _ask(proxy, batch) == (0, 50)
        known = [text for one in batches[: number + 1] for text in one]
        assert await _ask(proxy, known) == (len(known), 0)
    assert len(upstream.inputs) * len(RECORD) > 1.4 * 4 * MIB
    assert await _ask(proxy, _texts("last")) == (0, 50)
    copy = _as_after_a_kill(tmp_path / "cache", tmp_path / "copy")
    again = await start_proxy(openai=upstream, cache={**limits, "directory": str(copy)})
    assert await _ask(again, _texts("last")) == (50, 0)


async def test_after_a_power_cut_the_last_transactions_are_missing_as_a_whole(tmp_path):
    """However much of the log is lost, each write is there as a whole with its charge, or not."""
    made, chance = tmp_path / "made", random.Random(1)
    groups = [_addresses(range(start, start + 10)) for start in range(0, 400, 10)]
    async with Store(made, 1 << 30) as store:
        for group in groups:
            store.count(LedgerKey(PARTITION, "m", "p"), Usage(misses=10, tokens_billed=70))
            assert await store.put_many(dict.fromkeys(group, RECORD), PARTITION)
        whole = _as_after_a_kill(made, tmp_path / "whole")
    seen = set()
    for number in range(25):
        cut = tmp_path / f"cut {number}"
        shutil.copytree(whole, cut)
        log = cut / "v1" / "cache.db-wal"
        with log.open("r+b") as file:
            file.truncate(chance.randrange(log.stat().st_size // 10, log.stat().st_size))
        with closing(sqlite3.connect(cut / "v1" / "cache.db")) as file:
            assert file.execute("PRAGMA quick_check").fetchall() == [("ok",)]
            ((records,),) = file.execute("SELECT count(*) FROM Cache")
            assert file.execute("SELECT count(*) FROM Entries").fetchall() == [(records,)]
        async with Store(cut, 1 << 30) as store:
            found = [len(await store.lookup(group)) for group in groups]
        there = found.count(10)
        assert found == [10] * there + [0] * (len(groups) - there)
        assert _sums(cut).misses == records == 10 * there
        assert list(cut.glob("*.damaged-*")) == []
        seen.add(there)
    assert len(seen) > 5


# The ledger.


async def test_after_a_kill_the_charges_are_there(tmp_path, upstream, start_proxy):
    """What was charged is in the file with the reply, and hits are after ten seconds."""
    proxy = await start_proxy(openai=upstream)
    assert await _ask(proxy, _texts("text")) == (0, 50)
    sums = _sums(_as_after_a_kill(tmp_path / "cache", tmp_path / "at once"))
    assert (sums.misses, sums.tokens_billed) == (50, 100)
    assert await _ask(proxy, _texts("text")) == (50, 0)
    await _write_what_can_wait(proxy)
    sums = _sums(_as_after_a_kill(tmp_path / "cache", tmp_path / "later"))
    assert (sums.misses, sums.tokens_billed, sums.hits) == (50, 100, 50)


async def test_charges_are_written_where_records_cannot_be(
    tmp_path, upstream, start_proxy, monkeypatch
):
    """On a file system that is nearly full records wait in memory, but what they cost does not."""
    proxy = await start_proxy(openai=upstream, cache={"memory_mib": 0})
    assert await _ask(proxy, _texts("before")) == (0, 50)
    monkeypatch.setattr(disk_full, "FREE_BYTES", 1 << 62)
    assert await _ask(proxy, _texts("during")) == (0, 50)
    await _write_what_can_wait(proxy)
    copy = _as_after_a_kill(tmp_path / "cache", tmp_path / "copy")
    sums = _sums(copy)
    assert (sums.misses, sums.tokens_billed) == (100, 200)
    assert await _ask(proxy, _texts("during") + _texts("before")) == (100, 0)


async def test_a_purge_leaves_the_sums(tmp_path):
    """Everything is deleted, and the ledger says what it said before."""
    async with Store(tmp_path, 1 << 30) as store:
        store.count(LedgerKey(PARTITION, "m", "p"), Usage(misses=50, tokens_billed=350))
        assert await store.put_many(dict.fromkeys(_addresses(range(50)), RECORD), PARTITION)
    before = _sums(tmp_path)
    with connection.opened(tmp_path, 1 << 30) as file:
        deleted = sum(purge.delete(file, purge.PurgeFilter()))
    assert deleted == 50
    assert _sums(tmp_path) == before == Usage(misses=50, tokens_billed=350)


# When something is wrong.


async def test_a_wrong_width_in_the_configuration_costs_nothing(upstream, start_proxy):
    """What was paid for stays until the configuration is right again."""
    upstream.widths["m"] = 8

    def models(dimensions):
        routes = [{"provider": "openai", "model": "m"}]
        return {MODEL: {"space": "s", "dimensions": dimensions, "routes": routes}}

    proxy = await start_proxy(openai=upstream, models=models(8))
    assert await _ask(proxy, _texts("text")) == (0, 50)
    await start_proxy.stop()
    proxy = await start_proxy(openai=upstream, models=models(16))
    reply = await proxy.post({"model": MODEL, "input": _texts("text")})
    assert reply.status >= 400
    await start_proxy.stop()
    proxy = await start_proxy(openai=upstream, models=models(8))
    assert await _ask(proxy, _texts("text")) == (50, 0)


async def test_a_damaged_page_costs_what_lay_on_it(tmp_path, upstream, start_proxy):
    """The rest is a hit at once and later, the sums stay, and so do the files beside it."""
    folder, texts = tmp_path / "cache" / "v1", _texts("text", 300)
    batches = [texts[start : start + 50] for start in range(0, 300, 50)]
    proxy = await start_proxy(openai=upstream)
    for batch in batches:
        assert await _ask(proxy, batch) == (0, 50)
    await start_proxy.stop()
    path, secret = folder / "cache.db", folder / "client-keys.secret"
    secret.write_bytes(bytes(range(32)))
    pages = read_map(path)
    number = pages.numbers("Cache leaf")[20]
    place = (number - 1) * pages.page_bytes
    lying_on_it = addresses_on(path.read_bytes()[place : place + pages.page_bytes], number)
    assert 1 <= len(lying_on_it) <= 5
    proxy = await start_proxy(openai=upstream, cache={"memory_mib": 0})
    with path.open("r+b") as file:
        file.seek(place)
        file.write(bytes(pages.page_bytes))
    misses = 0
    for batch in batches:
        misses += (await _ask(proxy, batch))[1]
    await start_proxy.stop()
    assert misses <= len(lying_on_it)
    assert _sums(tmp_path / "cache").misses == 300 + misses
    assert secret.read_bytes() == bytes(range(32))
    assert len(list(folder.parent.glob("v1.damaged-*/cache.db"))) == 1
    proxy = await start_proxy(openai=upstream, cache={"memory_mib": 0})
    for batch in batches:
        assert await _ask(proxy, batch) == (50, 0)


async def test_a_write_that_waited_goes_into_the_file_at_the_path(tmp_path, monkeypatch):
    """While a write waits for the lock the file may be deleted; it goes into the next one then."""
    take, waiting = fcntl.flock, []

    def flock(file, how):
        if how & fcntl.LOCK_EX and waiting:
            waiting.clear()
            for path in (tmp_path / "v1").glob("cache.db*"):
                path.unlink()
        return take(file, how)

    async with Store(tmp_path, 1 << 30) as store:
        assert await store.put_many(dict.fromkeys(_addresses(range(10)), RECORD), PARTITION)
        monkeypatch.setattr(fcntl, "flock", flock)
        waiting.append(True)
        assert await store.put_many(dict.fromkeys(_addresses(range(10, 20)), RECORD), PARTITION)
        assert not waiting
    async with Store(tmp_path, 1 << 30) as store:
        assert len(await store.lookup(_addresses(range(10, 20)))) == 10


# When it is full.


async def test_the_limit_holds_beside_a_reader_that_stays(tmp_path):
    """A reader of another process keeps the log from being emptied: then writes wait in memory."""
    limit, groups = 8 * MIB, [_addresses(range(start, start + 50)) for start in range(0, 4000, 50)]
    async with Store(tmp_path, limit) as store:
        assert await store.put_many(dict.fromkeys(_addresses(range(9000, 9001)), RECORD), PARTITION)
        files = [store.folder / name for name in ("cache.db", "cache.db-wal")]
        most = 0
        with closing(sqlite3.connect(files[0], isolation_level=None)) as reader:
            reader.execute("BEGIN")
            assert reader.execute("SELECT count(*) FROM Cache").fetchall() == [(1,)]
            for group in groups:
                await store.put_many(dict.fromkeys(group, RECORD), PARTITION)
                most = max(most, sum(file.stat().st_size for file in files))
                assert len(await store.lookup(group)) == 50
                await asyncio.sleep(0)
    assert most <= 1.05 * limit
    async with Store(tmp_path, limit) as store:
        assert len(await store.lookup(groups[-1])) == 50
