"""The tiers together: memory before disk, and nothing that was not verified."""

import contextlib
import sqlite3
from dataclasses import replace

import pytest
from embedding_proxy.cache import record
from embedding_proxy.cache.disk.store import Store
from embedding_proxy.cache.disk.write_batch import PendingRecord
from embedding_proxy.cache.key import Key, Keys, checksum, keyring
from embedding_proxy.cache.ledger import LedgerKey, Usage
from embedding_proxy.cache.memory import Memory
from embedding_proxy.cache.tiers import TierCounters, Tiers
from embedding_proxy.providers.base import NORMAL, CachePolicy, Space
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.cache.fakes import FakeStore, entries_in, entry_of, key_of

SPACE = Space("m", 3)
MIB = 1 << 20
PARTITION = keyring(SPACE).partition
ITEMS = [f"input {i}" for i in range(6)]
KEYS = {item: key_of(item, SPACE) for item in ITEMS}
ENTRIES = {key: entry_of(item, SPACE) for item, key in KEYS.items()}
KEY, OTHER = list(KEYS.values())[:2]
ENTRY = ENTRIES[KEY]


@pytest.fixture
def store():
    """Give a store in memory that notes what it is asked."""
    return FakeStore()


@pytest.fixture
def tiers(store):
    """Give tiers over that store with room enough in memory."""
    return Tiers(Memory(MIB), store)


def _collider(key):
    """Return a key at the same address that is about something else."""
    return Key(key.address, bytes(byte ^ 1 for byte in key.digest))


async def test_memory_is_asked_before_disk(tiers, store):
    """What was just kept is found without any read from disk."""
    await tiers.put_many({KEY: ENTRY}, PARTITION)
    assert await entries_in(tiers, [KEY], PARTITION) == {KEY: ENTRY}
    assert store.reads == []
    assert tiers.counters == TierCounters(memory_hits=1)


async def test_disk_is_asked_once_for_all_that_memory_lacks(tiers, store):
    """Many keys make one read, of exactly those that are not in memory."""
    here, there = list(ENTRIES)[:2], list(ENTRIES)[2:]
    store.records = {key.address: record.encode(ENTRIES[key]) for key in there[1:]}
    await tiers.put_many({key: ENTRIES[key] for key in here}, PARTITION)
    found = await entries_in(tiers, [*there, *here], PARTITION)
    assert found == {key: ENTRIES[key] for key in [*here, *there[1:]]}
    assert store.reads == [[key.address for key in there]]
    assert tiers.counters == TierCounters(memory_hits=2, disk_hits=3, misses=1)


async def test_a_hit_on_disk_is_kept_in_memory(tiers, store):
    """The second look-up of what only the disk had does not go to disk."""
    store.records = {KEY.address: record.encode(ENTRY)}
    for _ in range(2):
        assert await entries_in(tiers, [KEY], PARTITION) == {KEY: ENTRY}
    assert len(store.reads) == 1
    assert tiers.counters == TierCounters(memory_hits=1, disk_hits=1)


@pytest.fixture
def quick(store):
    """Give the keys of three entries of a store that can be read at once."""
    keys = list(ENTRIES)[:3]
    store.is_quick = True
    store.records = {key.address: record.encode(ENTRIES[key]) for key in keys}
    return Keys([key.address for key in keys], [key.digest for key in keys])


async def test_what_is_read_at_once_is_as_if_waited_for(tiers, store, quick):
    """The entries come in order, are counted, noted as used, and in memory from then on."""
    for hits in (TierCounters(disk_hits=3), TierCounters(disk_hits=3, memory_hits=3)):
        lookup = tiers.lookup_nowait(quick, PARTITION, NORMAL)
        assert (lookup.entries, lookup.missing) == ([ENTRIES[key] for key in quick], [])
        tiers.count_lookup(lookup, PARTITION)
        assert tiers.counters == hits
    assert store.touched == set(quick.addresses)
    assert (store.reads, store.glances) == ([], [quick.addresses])


async def test_nothing_is_awaited_that_need_not_be(tiers, quick):
    """The same look-up is a whole one without a turn of the loop, and one that is missing, too."""
    keys = Keys.from_keys([*quick, key_of("unknown", SPACE)])
    asking = tiers.lookup(keys, PARTITION)
    with pytest.raises(StopIteration) as caught:
        asking.send(None)
    assert caught.value.value.entries == [*(ENTRIES[key] for key in quick), None]
    assert caught.value.value.missing == [3]
    assert tiers.counters == TierCounters(disk_hits=3, misses=1)


async def test_what_memory_has_is_not_read_at_once(tiers, store, quick):
    """Of entries in memory and on disk each is taken from where it is, in the order asked for."""
    key = quick[1]
    await tiers.put_many({key: ENTRIES[key]}, PARTITION)
    assert await entries_in(tiers, quick, PARTITION) == {key: ENTRIES[key] for key in quick}
    assert store.glances == [[quick.addresses[0], quick.addresses[2]]]
    assert tiers.counters == TierCounters(memory_hits=1, disk_hits=2)


@pytest.mark.parametrize("fault", ["not quick", "missing", "cut", "flipped", "collided"])
async def test_what_is_not_all_sound_is_told_and_not_touched(tiers, store, quick, fault):
    """Whoever may wait counts it, and deletes what is bad; a look in passing does neither."""
    address = quick.addresses[1]
    raw = store.records[address]
    match fault:
        case "not quick":
            store.is_quick = False
        case "missing":
            del store.records[address]
        case "cut":
            store.records[address] = raw[:-1]
        case "flipped":
            store.records[address] = raw[:40] + bytes([raw[40] ^ 1]) + raw[41:]
        case "collided":
            quick.digests[1] = _collider(quick[1]).digest
    before = dict(store.records)
    lookup = tiers.lookup_nowait(quick, PARTITION, NORMAL)
    assert 1 in lookup.missing
    assert lookup.entries[1] is None
    assert lookup.is_complete == (fault != "not quick")
    assert tiers.counters == TierCounters()
    assert (store.records, store.touched) == (before, set())


@pytest.mark.parametrize("terms", [replace(NORMAL, max_age=60.0), replace(NORMAL, write=False)])
async def test_own_terms_hold_for_what_is_read_at_once(tiers, store, quick, terms):
    """Who asks for something fresh gets nothing old; who wants no trace leaves none."""
    found = await entries_in(tiers, quick, PARTITION, terms)
    assert len(found) == (3 if terms.max_age > 60 else 0)
    assert (store.touched, len(tiers.memory)) == (set(), 0)


async def test_another_width_is_not_given_at_once(tiers, quick):
    """A record of another width than the partition's is none of it."""
    other = PARTITION._replace(dimensions=4)
    assert tiers.lookup_nowait(quick, other, NORMAL).missing == [0, 1, 2]


async def test_without_memory_the_disk_serves(store):
    """With no memory at all every look-up is a hit on disk."""
    tiers = Tiers(Memory(0), store)
    await tiers.put_many({KEY: ENTRY}, PARTITION)
    for _ in range(2):
        assert await entries_in(tiers, [KEY], PARTITION) == {KEY: ENTRY}
    assert tiers.counters == TierCounters(disk_hits=2)


@pytest.mark.parametrize(
    "spoil",
    [
        pytest.param(lambda raw: raw[:-1], id="cut"),
        pytest.param(lambda raw: raw[:40] + bytes([raw[40] ^ 1]) + raw[41:], id="flipped bit"),
        pytest.param(lambda _: b"", id="empty"),
        pytest.param(lambda _: record.encode(ENTRIES[OTHER]), id="another's record"),
    ],
)
async def test_a_record_that_does_not_verify_is_a_miss(tiers, store, spoil):
    """Damage and strangers are counted, not served, not kept in memory, and deleted."""
    store.records = {KEY.address: spoil(record.encode(ENTRY))}
    for _ in range(2):
        assert await entries_in(tiers, [KEY], PARTITION) == {}
    assert tiers.counters == TierCounters(misses=2, mismatches=1)
    assert store.records == {}
    await tiers.put_many({KEY: ENTRY}, PARTITION)
    assert store.records == {KEY.address: record.encode(ENTRY)}
    assert await entries_in(tiers, [KEY], PARTITION) == {KEY: ENTRY}


@pytest.mark.parametrize(
    "record_of",
    [
        pytest.param(lambda: record.encode(ENTRY._replace(vector=bytes(16))), id="other width"),
        pytest.param(lambda: _later_version(record.encode(ENTRY)), id="later version"),
    ],
)
async def test_a_record_that_verifies_is_never_deleted(tiers, store, record_of, caplog):
    """A configuration with another width, or an earlier program, misses it and leaves it there."""
    store.records = {KEY.address: record_of()}
    for _ in range(2):
        assert await entries_in(tiers, [KEY], PARTITION) == {}
    assert store.records == {KEY.address: record_of()}
    assert tiers.counters == TierCounters(misses=2)
    if len(record_of()) > len(record.encode(ENTRY)):
        told = "the cache holds vectors of 4 dimensions for a model that is configured with"
        assert caplog.text.count(told) == 1


def _later_version(raw):
    body = raw[:4] + bytes([raw[4] + 1]) + raw[5:-8]
    return body + checksum(body)


@pytest.mark.parametrize(
    "terms",
    [CachePolicy(frozen=True), CachePolicy(only_if_cached=True), CachePolicy(write=False)],
    ids=["frozen", "only-if-cached", "no-store"],
)
async def test_a_request_that_may_not_buy_or_keep_deletes_nothing(tiers, store, terms):
    """What such a request takes for damage is a miss, and stays for those who may replace it."""
    store.records = {KEY.address: b"damaged"}
    assert await entries_in(tiers, [KEY], PARTITION, terms) == {}
    assert store.records == {KEY.address: b"damaged"}
    assert tiers.counters == TierCounters(misses=1, mismatches=1)
    assert await entries_in(tiers, [KEY], PARTITION) == {}
    assert store.records == {}


async def test_a_collision_in_memory_is_a_miss(tiers, store):
    """One who has the address but another digest gets nothing, and harms the rightful entry not."""
    await tiers.put_many({KEY: ENTRY}, PARTITION)
    store.records.clear()
    assert await entries_in(tiers, [_collider(KEY)], PARTITION) == {}
    assert tiers.counters == TierCounters(misses=1)
    assert await entries_in(tiers, [KEY], PARTITION) == {KEY: ENTRY}


async def test_a_collision_on_disk_is_a_miss_and_counted(store):
    """On disk too the digest decides, and a record about something else is a mismatch."""
    store.records = {KEY.address: record.encode(ENTRY)}
    tiers = Tiers(Memory(MIB), store)
    assert await entries_in(tiers, [_collider(KEY)], PARTITION) == {}
    assert tiers.counters == TierCounters(misses=1, mismatches=1)
    assert store.records == {}


async def test_colliding_keys_in_one_look_up_are_kept_apart(tiers, store):
    """Two keys of one address in the same call: only the one the record is about gets it."""
    store.records = {KEY.address: record.encode(ENTRY)}
    for _ in range(2):
        assert await entries_in(tiers, [_collider(KEY), KEY], PARTITION) == {KEY: ENTRY}


async def test_what_the_disk_does_not_take_is_kept_in_memory(tiers, store):
    """A write that fails is no error, and the entry is at hand until memory is full."""
    store.broken = True
    await tiers.put_many({KEY: ENTRY}, PARTITION)
    assert await entries_in(tiers, [KEY, OTHER], PARTITION) == {KEY: ENTRY}
    assert store.records == {}


async def test_what_is_bought_too_late_while_the_disk_rests_waits_for_it(tmp_path):
    """It is at hand in memory, and on disk once that takes it again; a copy only where it lasts."""
    async with Store(tmp_path, 1 << 30) as disk:
        tiers, backoff = Tiers(Memory(MIB), disk), disk._writer.backoff
        for _ in range(3):
            backoff.fail()
        await tiers.put_late({KEY: ENTRY}, PARTITION, 5.0)
        copy = PendingRecord(record.encode(ENTRIES[OTHER]), PARTITION, 1.0)
        await disk.put_older({OTHER.address: copy}, is_copied=True)
        assert await entries_in(tiers, [KEY], PARTITION) == {KEY: ENTRY}
        assert tiers.counters == TierCounters(memory_hits=1)
    async with Store(tmp_path, 1 << 30) as disk:
        assert await entries_in(Tiers(Memory(0), disk), [KEY, OTHER], PARTITION) == {KEY: ENTRY}


async def test_no_keys_ask_nobody(tiers, store):
    """The empty look-up finds nothing and reads nothing."""
    assert await entries_in(tiers, [], PARTITION) == {}
    assert store.reads == []
    assert tiers.counters == TierCounters()


async def test_entries_come_back_from_a_real_store(tmp_path):
    """Through the real disk tier, reopened with an empty memory, entries are what they were."""
    async with Store(tmp_path, 1 << 30) as disk:
        tiers = Tiers(Memory(0), disk)
        tiers.count(LedgerKey(PARTITION), Usage(misses=len(ENTRIES), tokens_billed=len(ENTRIES)))
        await tiers.put_many(ENTRIES, PARTITION)
    async with Store(tmp_path, 1 << 30) as disk:
        assert await entries_in(Tiers(Memory(0), disk), list(ENTRIES), PARTITION) == ENTRIES


@settings(deadline=None)
@given(
    st.lists(
        st.tuples(st.booleans(), st.sets(st.sampled_from(list(ENTRIES)), min_size=1)), max_size=12
    ),
    st.sampled_from([0, 800, MIB]),
    st.sets(st.sampled_from(list(ENTRIES))),
)
async def test_the_counters_add_up(steps, limit, damaged):
    """Over any sequence, look-ups = memory hits + disk hits + misses, and hits are what was got."""
    store = FakeStore()
    store.records = {key.address: b"damage" for key in damaged}
    tiers = Tiers(Memory(limit), store)
    kept, asked, got = set(), 0, 0
    for is_put, keys in steps:
        if is_put:
            await tiers.put_many({key: ENTRIES[key] for key in keys}, PARTITION)
            kept |= keys
        else:
            found = await entries_in(tiers, list(keys), PARTITION)
            assert found == {key: ENTRIES[key] for key in keys & kept}
            asked += len(keys)
            got += len(found)
    counters = tiers.counters
    assert counters.memory_hits + counters.disk_hits + counters.misses == asked
    assert counters.memory_hits + counters.disk_hits == got
    assert counters.mismatches <= counters.misses


async def test_a_use_is_told_to_the_disk(tiers, store):
    """What memory serves counts as use on disk too, or it would be driven out there."""
    await tiers.put_many({KEY: ENTRY}, PARTITION)
    await entries_in(tiers, [KEY], PARTITION)
    assert store.touched == {KEY.address}


async def test_sums_go_to_the_disk_as_they_are(tiers, store):
    """What was answered is added as it is told."""
    tiers.count(LedgerKey(PARTITION), Usage(hits=1, joins=2))
    tiers.count(LedgerKey(PARTITION), Usage(duplicates=3, tokens_saved=4))
    assert store.usage == Usage(hits=1, joins=2, duplicates=3, tokens_saved=4)


async def test_a_purge_empties_memory(tiers, store):
    """When the store hears of a purge, nothing is served from memory any more."""
    await tiers.put_many(ENTRIES, PARTITION)
    store.records.clear()
    store.on_purge()
    assert await entries_in(tiers, list(ENTRIES), PARTITION) == {}


async def test_an_entry_from_disk_is_as_old_in_memory_as_it_is(store):
    """Memory counts an entry's age from when it was bought, not from when it was read."""
    now = 100.0
    tiers = Tiers(Memory(MIB, ttl_s=150, clock=lambda: now), store)
    store.records = {KEY.address: record.encode(ENTRY)}  # bought at 0
    assert await entries_in(tiers, [KEY], PARTITION) == {KEY: ENTRY}
    now = 149.0
    assert await entries_in(tiers, [KEY], PARTITION) == {KEY: ENTRY}
    assert len(store.reads) == 1
    now = 150.0
    store.records.clear()
    assert await entries_in(tiers, [KEY], PARTITION) == {}


async def test_sums_and_partition_are_in_a_real_store(tmp_path):
    """Each entry is of the partition it was kept for, and so are its sums."""
    async with Store(tmp_path, 1 << 30) as disk:
        tiers = Tiers(Memory(0), disk)
        tiers.count(LedgerKey(PARTITION), Usage(misses=len(ENTRIES), tokens_billed=len(ENTRIES)))
        await tiers.put_many(ENTRIES, PARTITION)
        connection = sqlite3.connect(disk.folder / "cache.db")
        with contextlib.closing(connection):
            rows = connection.execute(
                "SELECT namespace, space, dimensions, count(*), misses, tokens_billed"
                " FROM Entries JOIN Partitions ON Partitions.id = Entries.partition"
                " JOIN Usage ON Usage.partition = Partitions.id GROUP BY Partitions.id"
            ).fetchall()
    assert rows == [(*PARTITION, len(ENTRIES), len(ENTRIES), len(ENTRIES))]


async def test_many_entries_are_kept_and_found_in_goes(tmp_path):
    """More entries than go at once are all kept, summed once each, and all found again."""
    keys = {key_of(f"input {i}", SPACE): f"input {i}" for i in range(1200)}
    entries = {key: entry_of(item, SPACE) for key, item in keys.items()}
    async with Store(tmp_path, MIB * 64) as store:
        await Tiers(Memory(0), store).put_many(entries, PARTITION)
        tiers = Tiers(Memory(0), store)
        assert await entries_in(tiers, list(entries), PARTITION) == entries
        assert tiers.counters == TierCounters(disk_hits=1200)
