"""Deleting on purpose: what is chosen goes, what is not stays, and the proxies hear of it."""

import contextlib
from types import SimpleNamespace

import pytest
from embedding_proxy.cache.disk import eviction, purge
from embedding_proxy.cache.disk import write_batch as write_batch_module
from embedding_proxy.cache.disk.connection import folder_of, lock_of
from embedding_proxy.cache.disk.database import Database
from embedding_proxy.cache.disk.eviction import TOUCH_MS
from embedding_proxy.cache.disk.purge import PurgeFilter
from embedding_proxy.cache.disk.store import Store
from embedding_proxy.cache.disk.write_batch import PendingRecord, Use, WriteBatch
from embedding_proxy.cache.key import Partition
from embedding_proxy.cache.memory import Memory
from embedding_proxy.cache.record import encode
from embedding_proxy.cache.tiers import Tiers
from embedding_proxy.providers.base import Space
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.cache.fakes import entries_in, entry_of, key_of

GIB = 1 << 30
NAMESPACES = ["", "a", "a%", "A", "a_", "ab", "a'b"]
LABELS = [
    "m",
    "m2",
    "m?task=~12549ea7d2d841ef",
    "m?task=~3972a881b65d9e6a",
    "M",
    "_",
    "%",
    "m%",
    "m_?x=1",
    "m\\",
]
PARTITIONS = [Partition(n, label, 4) for n in NAMESPACES for label in LABELS]
NOW = 1_800_000_000


@contextlib.contextmanager
def _opened(directory):
    """Give the file of a store for this thread."""
    with contextlib.closing(lock_of(directory)) as lock:
        database = Database(folder_of(directory), GIB, lock)
        try:
            yield database
        finally:
            database.close()


def _address(number):
    return number.to_bytes(16)


@pytest.fixture(scope="module")
def full(tmp_path_factory):
    """Give a file of one entry in each partition and one of unknown partition, and what is in it.

    Entry i was stored at NOW + i, and used 10,000 seconds later, later ones first.
    """
    with _opened(tmp_path_factory.mktemp("full")) as full:
        rows = {
            i: (partition, NOW + i, NOW + 10_000 - i)
            for i, partition in enumerate([*PARTITIONS, None])
        }
        records = {
            _address(i): PendingRecord(bytes(56), p, stored) for i, (p, stored, _) in rows.items()
        }
        used = {_address(i): Use(1000 * used, p) for i, (p, _, used) in rows.items()}
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(write_batch_module, "time", SimpleNamespace(time=lambda: 0.0))
            full.write(WriteBatch(records=records, used=used))
        yield full, rows


def _delete_and_undo(database, choice):
    """Return the numbers that a purge of the choice deletes, and undo it."""
    database.sql("SAVEPOINT before")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(purge, "_shrink", lambda _: iter(()))
        # No transactions of its own: all is in one that is undone.
        patch.setattr(
            Database, "transaction", lambda db, _pages: contextlib.nullcontext(db.cache._con)
        )
        before = {key for (key,) in database.sql("SELECT key FROM Cache")}
        deleted = sum(purge.delete(database, choice))
        after = {key for (key,) in database.sql("SELECT key FROM Cache")}
        entries = database.sql("SELECT count(*) FROM Entries").fetchall()
    database.sql("ROLLBACK TO before")
    database.sql("RELEASE before")
    assert entries == [(len(after),)]
    assert len(before - after) == deleted
    return {int.from_bytes(key) for key in before - after}


CHOICES = st.builds(
    PurgeFilter,
    st.none() | st.sampled_from([*NAMESPACES, "%", "b"]),
    st.none() | st.sampled_from([*LABELS, "m?", "m?task", "", "m%?x=1", "m_"]),
    st.none() | st.floats(-5, len(PARTITIONS) + 5).map(lambda after: NOW + after),
    st.none() | st.floats(-100, len(PARTITIONS) + 5).map(lambda after: NOW + 10_000 - after),
    st.none() | st.integers(0, len(PARTITIONS) + 3).map(_address),
)


def _is_chosen(choice, number, partition, stored, used):
    """Tell whether an entry is chosen; written without regard to SQL."""
    namespace, label = ("nothing", "nothing") if partition is None else partition[:2]
    return (
        choice.namespace in (None, namespace)
        and (choice.space is None or label == choice.space or label.startswith(f"{choice.space}?"))
        and (choice.stored_before is None or 1000 * stored < int(1000 * choice.stored_before))
        and (choice.used_before is None or 1000 * used < int(1000 * choice.used_before))
        and choice.address in (None, _address(number))
    )


@pytest.fixture
def _alone(monkeypatch):
    """Leave no gaps for other writers: there are none."""
    monkeypatch.setattr(purge, "_let_others", lambda _: None)


@pytest.mark.usefixtures("_alone")
@settings(
    deadline=None,
    max_examples=200,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(CHOICES)
def test_any_choice_deletes_what_it_counts_and_nothing_else(full, choice):
    """All that is given must hold; names are compared as they are, no character is a pattern."""
    database, rows = full
    chosen = {i for i, row in rows.items() if _is_chosen(choice, i, *row)}
    known = sum(rows[i][0] is not None for i in chosen)
    assert purge.count_entries(database, choice) == (len(chosen), 56 * known)
    assert _delete_and_undo(database, choice) == chosen


@pytest.mark.parametrize(
    ("choice", "gone"),
    [
        (PurgeFilter(), len(PARTITIONS) + 1),
        (PurgeFilter(namespace=""), len(LABELS)),
        (PurgeFilter(namespace="a%"), len(LABELS)),
        (PurgeFilter(space="m"), 3 * len(NAMESPACES)),
        (PurgeFilter(space="m?task=~12549ea7d2d841ef"), len(NAMESPACES)),
        (PurgeFilter(space="_"), len(NAMESPACES)),
        (PurgeFilter(space="m_"), len(NAMESPACES)),
        (PurgeFilter(namespace="a", space="m"), 3),
        (PurgeFilter(stored_before=NOW + 3), 3),
        (PurgeFilter(used_before=NOW + 10_000), len(PARTITIONS)),
        (PurgeFilter(address=_address(5)), 1),
        (PurgeFilter(namespace="a", address=_address(5)), 0),
        (PurgeFilter(address=b"no address at all"), 0),
    ],
    ids=str,
)
def test_a_choice_is_counted_as_it_is_meant(full, choice, gone):
    """A space without parameters stands for those with parameters, too; nothing else widens."""
    database, _ = full
    assert purge.count_entries(database, choice)[0] == gone
    assert len(_delete_and_undo(database, choice)) == gone


def test_a_later_use_saves_an_entry_from_a_purge_by_use(tmp_path):
    """Age is the time of purchase and last use that of the last one written."""
    with _opened(tmp_path) as database:
        database.write(
            WriteBatch(records={_address(i): PendingRecord(b"x", None, 1.0) for i in range(2)})
        )
        ((used,),) = database.sql("SELECT DISTINCT used FROM Entries")
        later = used + 2 * TOUCH_MS
        database.write(WriteBatch(used={_address(0): Use(later, None)}))
        assert sum(purge.delete(database, PurgeFilter(used_before=later / 1000))) == 1
        assert list(database.read_many([_address(i) for i in range(2)])) == [_address(0)]
        assert sum(purge.delete(database, PurgeFilter(stored_before=1.0))) == 0
        assert sum(purge.delete(database, PurgeFilter(stored_before=1.5))) == 1


def test_a_large_purge_goes_a_little_at_a_time(tmp_path, monkeypatch):
    """Each step deletes some and ends its transaction: others can write, and read what is left."""
    monkeypatch.setattr(purge, "ROWS_A_TRANSACTION", 100)
    with _opened(tmp_path) as database, _opened(tmp_path) as other:
        for part in (PARTITIONS[0], PARTITIONS[1]):
            start = PARTITIONS.index(part) * 1000
            records = {_address(start + i): PendingRecord(bytes(100), part) for i in range(450)}
            database.write(WriteBatch(records=records))
        steps, left = purge.delete(database, PurgeFilter(space="m")), 900
        for deleted in (100, 100, 100, 100, 50):
            assert next(steps) == deleted
            left -= deleted
            other.write(WriteBatch(records={_address(5000): PendingRecord(b"x", None)}))
            assert other.sql("SELECT count(*) FROM Entries").fetchall() == [(left + 1,)]
        assert set(steps) <= {0}
        assert purge.count_entries(other, PurgeFilter()) == (451, 450 * 56)


@pytest.mark.parametrize(
    "choice", [PurgeFilter(), PurgeFilter(namespace="")], ids=["all", "namespace"]
)
def test_a_purge_ends_while_others_store_more_than_it_deletes(choice, tmp_path):
    """It deletes what was there when it began, moved or not, and nothing that came later."""
    lot = 2 * purge.ROWS_A_TRANSACTION
    with _opened(tmp_path) as database, _opened(tmp_path) as other:

        def store(number):
            records = {
                _address(number * lot + i): PendingRecord(b"x", PARTITIONS[0]) for i in range(lot)
            }
            other.write(WriteBatch(records=records))

        for number in range(3):
            store(number)
        deleted = 0
        for step, count in enumerate(purge.delete(database, choice)):
            assert step < 20
            deleted += count
            eviction._move_first(other.sql, 1)
            store(3 + step)
        assert deleted == 3 * lot
        ((left,),) = other.sql("SELECT count(*) FROM Entries")
        assert left == (step + 1) * lot


@pytest.mark.usefixtures("_alone")
@pytest.mark.parametrize("moved", [1, 200])
def test_freed_pages_are_given_back(tmp_path, moved, monkeypatch):
    """After a purge the file on the file system is as short as what is left in it."""
    monkeypatch.setattr(purge, "PAGES_A_STEP", moved)
    with _opened(tmp_path) as database:
        for start in range(0, 1000, 100):
            part = PARTITIONS[start // 100 % 2]
            records = {_address(start + i): PendingRecord(bytes(20_000), part) for i in range(100)}
            database.write(WriteBatch(records=records))
        before = database.read_many([_address(i) for i in range(100, 200)])
        ((pages,),) = database.sql("PRAGMA page_count")
        assert sum(purge.delete(database, PurgeFilter(space="m"))) == 500
        assert database.sql("PRAGMA freelist_count").fetchall() == [(0,)]
        ((left,),) = database.sql("PRAGMA page_count")
        assert left < 0.6 * pages
        assert database.read_many(list(before)) == before
        assert database.sql("PRAGMA integrity_check").fetchall() == [("ok",)]
        database.sql("PRAGMA wal_checkpoint(TRUNCATE)")
        assert database.path.stat().st_size == left * 32_768


def test_a_file_that_gives_nothing_back_is_no_endless_work(tmp_path):
    """An early file cannot be made shorter; a purge of it ends all the same."""
    with _opened(tmp_path) as database:
        database.write(
            WriteBatch(records={_address(i): PendingRecord(bytes(20_000), None) for i in range(50)})
        )
        # VACUUM makes a file of another kind only where there is no write-ahead log.
        for pragma in ("journal_mode = delete", "auto_vacuum = 0"):
            database.sql(f"PRAGMA {pragma}").fetchall()
        database.sql("VACUUM")
    with _opened(tmp_path) as database:
        assert database.sql("PRAGMA auto_vacuum").fetchall() == [(0,)]
        assert sum(purge.delete(database, PurgeFilter())) == 50
        ((free,),) = database.sql("PRAGMA freelist_count")
        assert free > 0


def test_a_row_without_its_record_is_deleted_too(tmp_path):
    """What is counted as an entry goes with a purge, also where someone took the record away."""
    with _opened(tmp_path) as database:
        database.write(WriteBatch(records={_address(1): PendingRecord(b"x", None)}))
        database.sql("INSERT INTO Entries VALUES (1000000, NULL, 0, 0)")
        assert sum(purge.delete(database, PurgeFilter(stored_before=1.0))) == 1
        assert database.sql("SELECT count(*) FROM Entries").fetchall() == [(1,)]
        assert database.read_many([_address(1)]).keys() == {_address(1)}


def test_a_purge_of_nothing_deletes_nothing(tmp_path):
    """On an empty store every choice is none."""
    with _opened(tmp_path) as database:
        assert purge.count_entries(database, PurgeFilter()) == (0, 0)
        assert sum(purge.delete(database, PurgeFilter())) == 0


def test_purges_are_numbered(tmp_path):
    """Each announcement is one more, and whoever looks sees the last."""
    with _opened(tmp_path) as database, _opened(tmp_path) as other:
        assert purge.count_purges(other) == 0
        for number in (1, 2, 3):
            assert purge.announce(database, 10 * number)
            assert purge.count_purges(other) == number
        rows = database.sql("SELECT entries FROM Purges ORDER BY id").fetchall()
        assert rows == [(10,), (20,), (30,)]


# What running proxies notice.


@pytest.mark.parametrize("is_signalled", [True, False])
async def test_another_proxy_hears_of_a_purge_at_its_next_tick(is_signalled, tmp_path):
    """The announcement is heard once, by each proxy, and not by one that came later.

    Also where there is no signal: something is in the way of its file.
    """
    heard = []
    if not is_signalled:
        (tmp_path / "v1" / purge.SIGNAL_NAME).mkdir(parents=True)
    async with (
        Store(tmp_path, GIB, on_purge=lambda: heard.append("one")) as one,
        Store(tmp_path, GIB, on_purge=lambda: heard.append("two")) as two,
    ):
        await one._tick(1)
        assert heard == []
        with _opened(tmp_path) as database:
            assert purge.announce(database, 1) is is_signalled
        for store in (one, two, one, two):
            await store._tick(1)
        assert heard == ["one", "two"]
        async with Store(tmp_path, GIB, on_purge=lambda: heard.append("late")) as late:
            await late._tick(1)
        with _opened(tmp_path) as database:
            purge.announce(database, 1)
            purge.announce(database, 1)
        await one._tick(2)
        assert heard == ["one", "two", "one"]


async def test_after_a_purge_memory_serves_nothing_of_it(tmp_path):
    """What was deleted on disk is not served from memory once the purge was announced."""
    space = Space("m", 3)
    key, entry = key_of("x", space), entry_of("x", space)
    partition = Partition("", "m", 3)
    async with Store(tmp_path, GIB) as store:
        tiers = Tiers(Memory(1 << 20), store)
        await tiers.put_many({key: entry}, partition)
        with _opened(tmp_path) as database:
            assert sum(purge.delete(database, PurgeFilter(space="m"))) == 1
            assert await entries_in(tiers, [key], partition) == {key: entry}
            purge.announce(database, 1)
        assert await entries_in(tiers, [key], partition) == {}
        assert await store.lookup([key.address]) == {}
        await tiers.put_many({key: entry}, partition)
        assert await entries_in(tiers, [key], partition) == {key: entry}
        found = await store.lookup([key.address])
        assert found[key.address].record == encode(entry)


async def test_what_is_read_or_written_amid_a_purge_is_not_kept_in_memory(tmp_path, monkeypatch):
    """A look-up, or a write, that began before a purge and ends after it, leaves no entry."""
    space = Space("m", 3)
    key, entry = key_of("x", space), entry_of("x", space)
    partition = Partition("", "m", 3)

    def purge_all():
        with _opened(tmp_path) as database:
            assert sum(purge.delete(database, PurgeFilter())) == 1
            purge.announce(database, 1)

    async with Store(tmp_path, GIB) as store:
        tiers = Tiers(Memory(1 << 20), store)
        lookup, put_many = store.lookup, store.put_many

        async def amid_lookup(addresses):
            found = await lookup(addresses)
            purge_all()
            assert store.heed_purges()  # Somebody else's look-up.
            return found

        async def amid_write(records, partition):
            kept = await put_many(records, partition)
            purge_all()
            assert store.heed_purges()
            return kept

        await store.put_many({key.address: encode(entry)}, partition)
        monkeypatch.setattr(store, "lookup_nowait", lambda addresses: None)
        monkeypatch.setattr(store, "lookup", amid_lookup)
        assert await entries_in(tiers, [key], partition) == {key: entry}
        monkeypatch.setattr(store, "lookup", lookup)
        assert await entries_in(tiers, [key], partition) == {}
        monkeypatch.setattr(store, "put_many", amid_write)
        await tiers.put_many({key: entry}, partition)
        assert await entries_in(tiers, [key], partition) == {}


async def test_a_file_that_is_begun_anew_signals_its_first_purge(tmp_path):
    """The number of a purge may be that of one of an earlier file: it counts as another one."""
    heard = []
    async with Store(tmp_path, GIB, on_purge=lambda: heard.append(1)) as store:
        for _ in range(2):
            with _opened(tmp_path) as database:
                purge.announce(database, 1)
                database.sql("DELETE FROM Purges")
            assert store.heed_purges()
        assert heard == [1, 1]


async def test_a_listener_that_fails_is_told_again_of_the_next(tmp_path):
    """A tick that fails in the listener ends no later one."""
    heard = []

    def failing():
        heard.append(1)
        raise ValueError("a defect")

    async with Store(tmp_path, GIB, on_purge=failing) as store:
        for _ in range(2):
            with _opened(tmp_path) as database:
                purge.announce(database, 1)
            with pytest.raises(ValueError, match="a defect"):
                await store._tick(1)
        assert heard == [1, 1]
