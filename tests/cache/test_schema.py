"""A store's tables: laid out once, and brought up from an older layout wholly or not at all."""

import contextlib
import gzip
import hashlib
import os
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest
from embedding_proxy.cache.disk import schema
from embedding_proxy.cache.disk.database import is_damage
from embedding_proxy.cache.disk.store import Store, StoreError
from embedding_proxy.cache.key import FORMAT, keyring
from embedding_proxy.cache.ledger import LedgerFilter, LedgerKey, Usage
from embedding_proxy.cache.memory import Memory
from embedding_proxy.cache.tiers import Tiers
from embedding_proxy.providers.base import Space

from tests.cache.fakes import entries_in

GIB = 1 << 30
ROOT = Path(schema.__file__).parents[1]
FIXTURES = {n: Path(__file__).parent / "data" / f"layout-{n}.db.gz" for n in range(schema.LAYOUT)}
RING = keyring(Space("openai/text-embedding-3-small", 8))
KEYS = [RING.key(f"old {i}") for i in range(20)]
TABLES = {"Settings", "Cache", "Partitions", "Entries", "Usage", "Hours", "Purges", "Salvaged"}
INDEXES = {"Entries_used", "Entries_stored", "Usage_copy", "Cache_expire_time", "Cache_key_raw"}


@pytest.fixture
def path(tmp_path):
    """Give the place of a store's file, in a folder that is there."""
    path = tmp_path / f"v{FORMAT}" / "cache.db"
    path.parent.mkdir()
    return path


def _written(layout_number, path):
    """Put a file there that an earlier version wrote."""
    path.write_bytes(gzip.decompress(FIXTURES[layout_number].read_bytes()))
    return path


@pytest.fixture
def old(path):
    """Give a file that the first version wrote."""
    return _written(0, path)


@pytest.fixture
def old_2(path):
    """Give a file of layout 2, with a bill of two clients."""
    return _written(2, path)


@pytest.fixture
def old_1(path):
    """Give a file of layout 1, with counts of two days and two namespaces."""
    return _written(1, path)


def _ask(path, sql):
    """Return the rows of a question to a file."""
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as connection:
        return connection.execute(sql).fetchall()


def _names(path, kind):
    return {name for (name,) in _ask(path, f"SELECT name FROM sqlite_master WHERE type = '{kind}'")}


def _is_layout_0(path):
    """Tell whether a file is of the old layout, nothing more and nothing less."""
    tables, indexes = _names(path, "table"), _names(path, "index")
    old = (tables, "Cache_access_time" in indexes) == ({"Settings", "Cache"}, True)
    triggers = all(name.startswith("Settings_") for name in _names(path, "trigger"))
    return old and triggers and _ask(path, "PRAGMA user_version") == [(0,)]


def _is_laid_out(path):
    """Tell whether a file is of this layout."""
    return (
        _ask(path, "PRAGMA user_version") == [(schema.LAYOUT,)]
        and _names(path, "table") == TABLES
        and "Entries_delete" in _names(path, "trigger")
        and {name for name in _names(path, "index") if "autoindex" not in name} == INDEXES
    )


async def _all_are_served(store):
    """Check the twenty old entries, each by its vector and its tokens."""
    found = await entries_in(Tiers(Memory(0), store), KEYS, RING.partition)
    for i, key in enumerate(KEYS):
        assert found[key].vector == hashlib.shake_128(b"%d" % i).digest(32)
        assert (found[key].tokens, found[key].counted) == (i + 1, True)


def test_a_fresh_file_has_all_tables_and_gives_pages_back(path):
    """A new store has the narrow tables beside diskcache's, and can be made shorter."""
    schema.prepare(path)
    assert _ask(path, "PRAGMA page_size") == [(schema.PAGE_BYTES,)]
    assert _ask(path, "PRAGMA auto_vacuum") == [(schema.INCREMENTAL,)]
    assert schema.INCREMENTAL == 2


async def test_opening_again_changes_no_table(path):
    """The first opening lays the file out, the second finds everything as it is."""
    schemas = []
    for _ in range(2):
        async with Store(path.parents[1], GIB):
            pass
        assert _is_laid_out(path)
        schemas.append(_ask(path, "SELECT * FROM sqlite_master"))
    assert schemas[0] == schemas[1]


async def test_an_old_file_is_brought_up_where_it_lies(old):
    """Every old entry is served, none of its bytes changed, and each is counted."""
    before = _ask(old, "SELECT * FROM Cache ORDER BY rowid")
    times = [(row[0], int(1000 * row[5]), int(1000 * row[5])) for row in before]
    assert len(before) == 20
    async with Store(old.parents[1], GIB) as store:
        await _all_are_served(store)
    assert _is_laid_out(old)
    assert _ask(old, "SELECT * FROM Cache ORDER BY rowid") == before
    entries = _ask(old, "SELECT id, stored, used FROM Entries ORDER BY id")
    assert [row[:2] for row in entries] == [row[:2] for row in times]
    assert all(is_now >= was for (*_, is_now), (*_, was) in zip(entries, times, strict=True))
    assert _ask(old, "PRAGMA integrity_check") == [("ok",)]
    assert [file.name for file in old.parents[1].iterdir()].count(f"v{FORMAT}") == 1
    assert not list(old.parents[1].glob("*damaged*"))


async def test_an_old_entry_learns_its_partition_when_it_is_used(old):
    """Where an old entry belongs is unknown until it is used, and known after a flush."""
    async with Store(old.parents[1], GIB) as store:
        await entries_in(Tiers(Memory(0), store), KEYS[:7], RING.partition)
        assert _ask(old, "SELECT count(*), count(partition) FROM Entries") == [(20, 0)]
        await store._writer.flush()
        known = _ask(
            old,
            "SELECT key, namespace, space, dimensions FROM Entries"
            " JOIN Cache ON Cache.rowid = Entries.id JOIN Partitions ON Partitions.id = partition",
        )
    assert {row[0] for row in known} == {key.address for key in KEYS[:7]}
    assert {row[1:] for row in known} == {tuple(RING.partition)}


async def test_an_old_entry_can_be_replaced_deleted_and_evicted(old):
    """What the old version wrote is an entry like any other."""
    async with Store(old.parents[1], GIB) as store:
        found = await store.lookup([KEYS[0].address])
        assert await store.put_many({KEYS[1].address: b"new"}, RING.partition)
        assert await store.delete_many({a: one.record for a, one in found.items()})
    assert _ask(old, "SELECT count(*), count(partition) FROM Entries") == [(19, 1)]
    assert _ask(old, "SELECT count(*) FROM Cache") == [(19,)]
    async with Store(old.parents[1], 32 * schema.PAGE_BYTES) as store:
        records = {i.to_bytes(16): bytes(30_000) for i in range(30)}
        for address, record in records.items():
            assert await store.put_many({address: record}, RING.partition)
        assert await store.lookup([key.address for key in KEYS]) == {}
    rows = _ask(old, "SELECT count(*), sum(Entries.id = rowid) FROM Cache LEFT JOIN Entries"
                     " ON Entries.id = rowid")  # fmt: skip
    assert rows[0][0] == rows[0][1] > 0


async def test_the_sums_of_layout_1_are_carried_over(old_1):
    """What was counted stays counted, under the space it was about; nobody knows who was paid."""
    before = _ask(old_1, "SELECT * FROM Usage ORDER BY day, partition")
    assert len(before) == 3
    async with Store(old_1.parents[1], GIB) as store:
        await _all_are_served(store)
        store.count(LedgerKey(RING.partition, "m", "p", "c"), Usage(misses=1))
    assert _is_laid_out(old_1)
    carried = _ask(old_1, "SELECT * FROM Usage WHERE model != 'm' ORDER BY day, partition")
    names = ("openai/text-embedding-3-small", "", "")
    assert carried == [(*row[:2], *names, *row[2:], 0, 0) for row in before]
    assert _ask(old_1, "SELECT count(*) FROM Usage") == [(4,)]
    assert _ask(old_1, "PRAGMA integrity_check") == [("ok",)]


async def test_a_file_of_layout_2_keeps_its_bill_and_gets_a_second_copy_of_it(old_2):
    """Entries and sums stay as they are; each sum stands in an index too, and no expiry does."""
    before = _ask(old_2, "SELECT * FROM Usage ORDER BY day, partition")
    assert len(before) == 2
    async with Store(old_2.parents[1], GIB) as store:
        await _all_are_served(store)
    assert _is_laid_out(old_2)
    assert _ask(old_2, "SELECT * FROM Usage ORDER BY day, partition") == before
    copy = "SELECT * FROM Usage INDEXED BY Usage_copy WHERE hits >= 0 ORDER BY day, partition"
    ((_, _, _, how),) = _ask(old_2, f"EXPLAIN QUERY PLAN {copy}")[:1]
    assert "COVERING INDEX Usage_copy" in how
    assert _ask(old_2, copy) == before
    ((expiry,),) = _ask(old_2, "SELECT sql FROM sqlite_master WHERE name = 'Cache_expire_time'")
    assert "WHERE expire_time IS NOT NULL" in expiry
    assert _ask(old_2, "PRAGMA integrity_check") == [("ok",)]


async def test_a_file_of_layout_3_keeps_its_ledger_and_gets_hours_from_now_on(path):
    """No sum changes; the hours of the past are not known, and those of today add up to the day."""
    _written(3, path)
    before = _ask(path, "SELECT * FROM Usage ORDER BY day, partition")
    assert len(before) == 3
    async with Store(path.parents[1], GIB) as store:
        await _all_are_served(store)
        assert await store.ledger_hours(LedgerFilter()) == {}
        store.count(LedgerKey(RING.partition, "m", "p", "c"), Usage(misses=2))
        store.count(LedgerKey(RING.partition, "m", "q", "c"), Usage(misses=1))
        assert await store.flush_counts()
        ((_, used),) = (await store.ledger_hours(LedgerFilter())).items()
        assert used == Usage(misses=3)
    assert _is_laid_out(path)
    assert (
        _ask(path, "SELECT * FROM Usage WHERE provider != 'q' ORDER BY day, partition")[:2]
        == (before[:2])
    )
    assert _ask(path, "SELECT model, client, misses FROM Hours") == [("m", "c", 3)]
    assert _ask(path, "PRAGMA integrity_check") == [("ok",)]


OLD_LABEL = "m?task=%22private%22"


@pytest.mark.parametrize("both", [False, True], ids=["alone", "beside the present form"])
async def test_labels_with_values_become_labels_with_digests(both, path):
    """Entries and sums of an earlier version stay, under one partition, and no value is left."""
    label = Space("m", 8).with_parameters({"task": "private"}).label
    ring = keyring(Space("m", 8).with_parameters({"task": "private"}))
    keys = [ring.key(f"text {i}") for i in range(4)]
    async with Store(path.parents[1], GIB) as store:
        for key in keys[:2]:
            assert await store.put_many({key.address: b"r"}, ring.partition)
        store.count(LedgerKey(ring.partition, "m", "p", "c"), Usage(misses=2, tokens_billed=7))
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as connection:
        connection.execute("UPDATE Partitions SET space = ?", (OLD_LABEL,))
    if both:
        # What the store would do without the step at its opening: a second partition.
        async with Store(path.parents[1], GIB) as store:
            for key in keys[2:]:
                assert await store.put_many({key.address: b"r"}, ring.partition)
            store.count(LedgerKey(ring.partition, "m", "p", "c"), Usage(misses=2, tokens_billed=7))
        with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as connection:
            connection.execute(
                "INSERT INTO Partitions (namespace, space, dimensions) VALUES ('', ?, 8)",
                (OLD_LABEL,),
            )
            ((old,),) = connection.execute("SELECT max(id) FROM Partitions")
            connection.execute("UPDATE Entries SET partition = ? WHERE id > 2", (old,))
            connection.execute(
                "INSERT INTO Usage SELECT day, ?, model, provider, client, hits, joins, misses,"
                " duplicates, tokens_saved, tokens_billed, nanodollars_saved, nanodollars_billed"
                " FROM Usage",
                (old,),
            )
    async with Store(path.parents[1], GIB):
        pass
    assert _is_laid_out(path)
    assert _ask(path, "SELECT namespace, space, dimensions FROM Partitions") == [("", label, 8)]
    entries = 4 if both else 2
    assert _ask(path, "SELECT count(DISTINCT partition), count(*) FROM Entries") == [(1, entries)]
    sums = (8, 28) if both else (2, 7)
    assert _ask(path, "SELECT sum(misses), sum(tokens_billed) FROM Usage") == [sums]
    assert _ask(path, "SELECT count(*) FROM Usage") == [(1,)]
    assert _ask(path, "PRAGMA integrity_check") == [("ok",)]
    assert b"private" not in path.read_bytes()


# How the version before, which may still run, adds to the sums.
COUNT_1 = """
    INSERT INTO Usage VALUES (?, ?, ?, ?, ?, ?, ?, ?) ON CONFLICT (day, partition) DO UPDATE SET
        hits = hits + excluded.hits"""


async def test_a_process_of_the_version_before_does_not_take_the_file_for_damaged(old_1):
    """It fails to write, as on a full disk; were it to find damage, it would move the file away."""
    async with Store(old_1.parents[1], GIB):
        pass
    with (
        contextlib.closing(sqlite3.connect(old_1)) as connection,
        pytest.raises(sqlite3.OperationalError) as caught,
    ):
        connection.execute(COUNT_1, range(8))
    assert not is_damage(caught.value)


STATEMENTS = sum(map(len, schema._STEPS.values()))


@pytest.mark.parametrize("place", range(STATEMENTS + 1))
async def test_an_upgrade_that_fails_leaves_the_old_file_whole(old, monkeypatch, place):
    """Whichever statement fails, the file is as it was, stays there, and the next try succeeds."""
    version, within = 0, place
    while within > len(schema._STEPS[version]):
        within -= len(schema._STEPS[version])
        version += 1
    steps = list(schema._STEPS[version])
    steps.insert(within, "SELECT no_such_function()")
    before = _ask(old, "SELECT * FROM Cache ORDER BY rowid")
    with monkeypatch.context() as patch:
        patch.setitem(schema._STEPS, version, tuple(steps))
        async with Store(old.parents[1], GIB) as store:
            assert await store.put_many({KEYS[0].address: b"not yet"}) is False
            store._pending.backlog.clear()
            assert _is_layout_0(old)
            assert _ask(old, "SELECT * FROM Cache ORDER BY rowid") == before
            patch.undo()
            await store._tick(1)
            await _all_are_served(store)
    assert _is_laid_out(old)
    assert not list(old.parents[1].glob("*damaged*"))


# Opens the store's file; says when it runs the steps, and ends by SIGKILL before one of them.
OPENER = """
import os, signal, sys
from pathlib import Path
from embedding_proxy.cache.disk import schema
from embedding_proxy.cache.disk.database import Database
from embedding_proxy.cache.disk.connection import folder_of, lock_of
from tests.cache.fakes import entries_in

directory, place, steps, ran = Path(sys.argv[1]), int(sys.argv[2]), schema.missing_steps, []

def counting(sql):
    for number, statement in enumerate(steps(sql)):
        if number == place:
            os.kill(os.getpid(), signal.SIGKILL)
        ran.append(statement)
        yield statement

schema.missing_steps = counting
lock = lock_of(directory)
print("ready", flush=True)
input()
Database(folder_of(directory), 1 << 30, lock).close()
print(len(ran))
"""


def _opener(directory, place=-1):
    return subprocess.Popen(
        [sys.executable, "-c", OPENER, str(directory), str(place)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.mark.parametrize("place", [0, 1, STATEMENTS - 1, STATEMENTS])
async def test_an_upgrade_that_is_killed_leaves_the_old_file_whole(old, place):
    """A process is killed within the upgrade: the file is of the old layout, and comes up later."""
    opener = _opener(old.parents[1], place)
    assert opener.communicate("\n")[0] == "ready\n"
    assert opener.returncode == -9
    assert _is_layout_0(old)
    async with Store(old.parents[1], GIB) as store:
        await _all_are_served(store)
    assert _is_laid_out(old)


@pytest.mark.parametrize("place", [0, 4, STATEMENTS])
async def test_a_new_file_that_is_killed_on_the_way_is_laid_out_later(path, place):
    """A process is killed while it makes the file: the next one finishes it."""
    opener = _opener(path.parents[1], place)
    opener.communicate("\n")
    assert opener.returncode == -9
    async with Store(path.parents[1], GIB) as store:
        assert await store.put_many({KEYS[0].address: b"record"}, RING.partition)
    assert _is_laid_out(path)
    assert not list(path.parents[1].glob("*damaged*"))


@pytest.mark.parametrize("is_old", [True, False], ids=["old", "fresh"])
async def test_several_processes_at_once_lay_out_once(path, is_old):
    """Of processes that open a file at the same moment one does the work, and all can use it."""
    if is_old:
        _written(0, path)
    openers = [_opener(path.parents[1]) for _ in range(3)]
    for opener in openers:
        assert opener.stdout.readline() == "ready\n"
    for opener in openers:
        opener.stdin.write("\n")
        opener.stdin.flush()
    said = [opener.communicate()[0] for opener in openers]
    assert sorted(said) == ["0\n", "0\n", f"{STATEMENTS + 1}\n"]
    assert _is_laid_out(path)
    async with Store(path.parents[1], GIB) as store:
        if is_old:
            await _all_are_served(store)
    assert _ask(path, "SELECT count(*) FROM Entries") == [(20 * is_old,)]


async def test_a_newer_layout_is_refused_and_left_alone(path):
    """A file of a later version is neither opened, nor changed, nor moved; the message says so."""
    async with Store(path.parents[1], GIB) as store:
        await store.put_many({KEYS[0].address: b"record"}, RING.partition)
    _ask(path, f"PRAGMA user_version = {schema.LAYOUT + 1}")
    before = path.read_bytes()
    with pytest.raises(StoreError, match=r"has layout 5, this version knows 4: use a newer"):
        async with Store(path.parents[1], GIB):
            pytest.fail("the store opened")
    assert path.read_bytes() == before
    assert {file.name for file in path.parent.iterdir()} == {"cache.db", "purges"}
    assert not list(path.parents[1].glob("*damaged*"))


async def test_a_newer_layout_put_in_place_is_left_alone(path, caplog):
    """Another version's file that takes the place of the open one is not written, nor moved."""
    async with Store(path.parents[1], GIB) as store:
        newer = path.with_name("newer.db")
        with contextlib.closing(sqlite3.connect(newer, isolation_level=None)) as connection:
            connection.execute("CREATE TABLE Theirs (x)")
            connection.execute("PRAGMA user_version = 7")
        for file in path.parent.glob("cache.db*"):
            file.unlink()
        before = newer.read_bytes()
        newer.rename(path)
        assert await store.put_many({KEYS[0].address: b"record"}, RING.partition) is False
        await store._tick(1)
        found = await store.lookup([KEYS[0].address])
        assert [one.record for one in found.values()] == [b"record"]
    assert path.read_bytes() == before
    assert not list(path.parents[1].glob("*damaged*"))
    assert "has layout 7" in caplog.text
