"""Salvage: whatever became of the file, each row that is whole comes out, and no other does."""

import contextlib
import hashlib
import os
import pickle
import random
import shutil
import sqlite3
import struct
import time
from pathlib import Path

import pytest
from embedding_proxy.cache.disk.carver import CarveReport, rows
from embedding_proxy.cache.disk.pages import MAX_UNREADABLE
from embedding_proxy.cache.key import Partition, Row
from embedding_proxy.cache.record import Entry, encode
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

PAGE = 32_768
BEGAN = 1_700_000_000
PARTITIONS = [Partition("", "a/space", 96), Partition("tenant", "a/space", 96)]

SCHEMA = """
    CREATE TABLE Settings (key TEXT NOT NULL UNIQUE, value);
    INSERT INTO Settings VALUES ('count', 1), ('size_limit', 'much');
    CREATE TABLE Cache (rowid INTEGER PRIMARY KEY, key BLOB, raw INTEGER, store_time REAL,
        expire_time REAL, access_time REAL, access_count INTEGER DEFAULT 0, tag BLOB,
        size INTEGER DEFAULT 0, mode INTEGER DEFAULT 0, filename TEXT, value BLOB);
    CREATE UNIQUE INDEX Cache_key_raw ON Cache (key, raw);
    CREATE INDEX Cache_expire_time ON Cache (expire_time);
    CREATE TABLE Partitions (id INTEGER PRIMARY KEY, namespace TEXT NOT NULL, space TEXT NOT NULL,
        dimensions INTEGER NOT NULL, UNIQUE (namespace, space, dimensions));
    CREATE TABLE Entries (id INTEGER PRIMARY KEY, partition INTEGER, stored INTEGER NOT NULL,
        used INTEGER NOT NULL);
    CREATE INDEX Entries_used ON Entries (used);
"""


def row_of(number, partitions=PARTITIONS):
    """Return the row that is kept under a number; which partition and when goes by the number."""
    partition = partitions[number % len(partitions)]
    digest = hashlib.blake2b(number.to_bytes(8, "big"), digest_size=16).digest()
    vector = hashlib.shake_128(digest).digest(4 * partition.dimensions)
    return Row(digest[::-1], encode(Entry(vector, 7, True, digest)), BEGAN + number, partition)  # noqa: FBT003


@contextlib.contextmanager
def opened(path, page=PAGE):
    """Give a connection to a database of the store's schema, new if need be."""
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as connection:
        connection.execute("PRAGMA synchronous = OFF")
        if not path.exists() or not path.stat().st_size:
            connection.execute(f"PRAGMA page_size = {page}")
            connection.execute("PRAGMA auto_vacuum = 2")
            connection.execute("VACUUM")
            connection.executescript(SCHEMA)
        yield connection


def put(connection, some, *, entries=True, raw=1, mode=1, own=None):
    """Write rows in one transaction; `own` is the time in table `Cache`, else it is the row's."""
    connection.execute("BEGIN")
    for row in some:
        partition = None
        if row.partition is not None:
            connection.execute(
                "INSERT OR IGNORE INTO Partitions (namespace, space, dimensions) VALUES (?, ?, ?)",
                row.partition,
            )
            ((partition,),) = connection.execute(
                "SELECT id FROM Partitions WHERE (namespace, space, dimensions) = (?, ?, ?)",
                row.partition,
            )
        ((rowid,),) = connection.execute(
            "INSERT INTO Cache (key, raw, store_time, access_time, mode, value)"
            " VALUES (?, ?, ?, 0, ?, ?) ON CONFLICT (key, raw) DO UPDATE SET"
            " store_time = excluded.store_time, value = excluded.value RETURNING rowid",
            (row.address, raw, row.stored if own is None else own, mode, row.record),
        ).fetchall()
        if entries:
            connection.execute(
                "INSERT OR REPLACE INTO Entries VALUES (?, ?, ?, ?)",
                (rowid, partition, int(1000 * row.stored), 0),
            )
    connection.execute("COMMIT")


def make(path, some, page=PAGE, **options):
    """Write a database of these rows; return its path."""
    with opened(path, page) as connection:
        put(connection, some, **options)
    return path


def salvaged(path):
    """Return what comes out of a file, and the report."""
    report = CarveReport()
    found = list(rows(path, report))
    assert report.records == len(found)
    return found, report


def overwrite(path, offset, data):
    """Write bytes over those of a file."""
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(data)


def pages_of(path, kinds, page=PAGE):
    """Return the numbers, from 0, of the pages after the first that have one of these types."""
    data = path.read_bytes()
    return [i for i in range(1, len(data) // page) if data[i * page] in kinds]


GOOD = [row_of(i) for i in range(1500)]


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """Give a whole file of 1,500 rows, whose trees have interior pages; not to be changed."""
    path = make(tmp_path_factory.mktemp("salvage") / "cache.db", GOOD, own=0)
    assert pages_of(path, {0x05})
    assert pages_of(path, {0x02})
    return path


@pytest.fixture(scope="module")
def ends(good):
    """Give where in that file the record of each row ends, by its address."""
    data = good.read_bytes()
    return {row.address: data.index(row.record) + len(row.record) for row in GOOD}


@pytest.fixture
def victim(good, tmp_path):
    """Give a copy of it, to be harmed."""
    return Path(shutil.copy(good, tmp_path / "victim.db"))


@pytest.mark.parametrize("page", [PAGE, 4096, 512, 65_536])
def test_a_good_file_gives_all_it_has(tmp_path, page):
    """Every row comes out once, with its partition and its time, whatever the page size."""
    path = make(tmp_path / "cache.db", GOOD[:300], page, own=0)
    found, report = salvaged(path)
    assert sorted(found) == sorted(GOOD[:300])
    assert report.damaged == 0
    assert report.pages == path.stat().st_size // page


def test_a_row_without_an_entry_has_its_own_time_and_no_partition(tmp_path):
    """A file of an early version, and one that lost its other tables, gives what `Cache` knows."""
    make(tmp_path / "cache.db", GOOD[:20], entries=False)
    found, report = salvaged(tmp_path / "cache.db")
    assert sorted(found) == sorted(row._replace(partition=None) for row in GOOD[:20])
    assert report == CarveReport(records=20, pages=report.pages)


@pytest.mark.parametrize("own", [0, -5, 1e300, "soon", None, float("inf")])
def test_a_time_that_cannot_be_is_no_time(tmp_path, own):
    """A row whose times make no sense comes out with time 0."""
    with opened(tmp_path / "cache.db") as connection:
        put(connection, GOOD[:1], own=1)
        connection.execute("UPDATE Cache SET store_time = ?", (own,))
        connection.execute("UPDATE Entries SET stored = ?", (int(1000 * (time.time() + 1e6)),))
    found, _ = salvaged(tmp_path / "cache.db")
    assert found == ([] if own == "soon" else [GOOD[0]._replace(stored=0.0)])


def test_a_partition_of_another_width_is_not_believed(tmp_path):
    """A row is given no partition of other dimensions than its record has."""
    wrong = GOOD[0]._replace(partition=Partition("", "a/space", 97))
    found, _ = salvaged(make(tmp_path / "cache.db", [wrong, GOOD[1]]))
    assert sorted(found) == sorted([wrong._replace(partition=None), GOOD[1]])


def test_a_partition_whose_copies_disagree_is_not_believed(tmp_path):
    """A name that is not the same in the table and in its index labels no row."""
    path = make(tmp_path / "cache.db", GOOD[:10])
    data = path.read_bytes()
    assert data.count(b"tenant") == 2
    for place in (data.index(b"tenant"), data.rindex(b"tenant")):
        path.write_bytes(data[:place] + b"zenant" + data[place + 6 :])
        found, _ = salvaged(path)
        assert {row.partition for row in found} == {PARTITIONS[0], None}
        assert len(found) == 10


def test_without_header_and_schema_all_the_others_come_out(victim):
    """A first page of zeros costs nothing, for no row lies there."""
    overwrite(victim, 0, bytes(PAGE))
    found, report = salvaged(victim)
    assert sorted(found) == sorted(GOOD)
    assert report.damaged == 0


def test_without_interior_and_index_pages_all_come_out(victim):
    """The trees are not needed: neither those of the tables nor the indexes."""
    for number in pages_of(victim, {0x02, 0x05, 0x0A}):
        overwrite(victim, number * PAGE, bytes(PAGE))
    found, _ = salvaged(victim)
    assert sorted(found) == sorted(GOOD)


def test_rows_that_nothing_else_names_come_last(tmp_path):
    """What may be an old version follows all that is certain, and is in the file before it."""
    with opened(tmp_path / "cache.db") as connection:
        put(connection, GOOD[:200], entries=False)
        put(connection, GOOD[200:400])
    for number in pages_of(tmp_path / "cache.db", {0x02, 0x0A}):
        overwrite(tmp_path / "cache.db", number * PAGE, bytes(PAGE))
    found, _ = salvaged(tmp_path / "cache.db")
    assert sorted(found[:200]) == sorted(GOOD[200:400])
    assert sorted(found[200:]) == sorted(row._replace(partition=None) for row in GOOD[:200])


@pytest.mark.parametrize("seed", range(20))
def test_a_cut_file_gives_what_is_left(victim, ends, seed):
    """Wherever the file ends, each record that lies before the end comes out, and nothing else."""
    end = random.Random(seed).randrange(victim.stat().st_size)
    os.truncate(victim, end)
    found, _ = salvaged(victim)
    on_whole_pages = {address for address, at in ends.items() if at <= end // PAGE * PAGE}
    assert on_whole_pages <= {row.address for row in found}
    assert {row.address for row in found} <= {address for address, at in ends.items() if at < end}
    assert {row[:2] for row in found} <= {row[:2] for row in GOOD}
    assert {row.partition for row in found} <= {*PARTITIONS, None}


@pytest.mark.untraced
def test_flipped_bits_cost_themselves(good, tmp_path):
    """Of files with bits flipped here and there no wrong record comes out, and most of the rest."""
    chance, data = random.Random(5), good.read_bytes()
    truth = {row.address: row for row in GOOD}
    lost = wrong_labels = 0
    for _ in range(60):
        harmed = bytearray(data)
        for _ in range(5):
            harmed[chance.randrange(len(harmed))] ^= 1 << chance.randrange(8)
        (tmp_path / "cache.db").write_bytes(harmed)
        found, _ = salvaged(tmp_path / "cache.db")
        assert all(row.record == truth[row.address].record for row in found)
        assert len({row.address for row in found}) == len(found)
        lost += len(GOOD) - len(found)
        # A time and the number of a partition have no copy; see the module.
        wrong_labels += sum(
            row != truth[row.address] and row.partition is not None for row in found
        )
    assert lost <= 60 * 5 * 3
    assert wrong_labels <= 60


def test_each_bit_of_an_address_is_proved_by_its_index(tmp_path):
    """A row whose address has one bit flipped does not come out, and is counted as damaged."""
    path = make(tmp_path / "cache.db", GOOD[:3], page=4096)
    data = path.read_bytes()
    address = GOOD[1].address
    places = [i for i in range(len(data)) if data.startswith(address, i)]
    assert len(places) == 2
    for place in places:
        for bit in range(128):
            harmed = bytearray(data)
            harmed[place + bit // 8] ^= 1 << bit % 8
            path.write_bytes(harmed)
            found, report = salvaged(path)
            assert sorted(found) == sorted([GOOD[0], GOOD[2]])
            assert report.damaged == 1


def test_addresses_in_interior_pages_of_the_index_prove_theirs_too(victim):
    """An entry of the index that stands above its leaves is a copy like any other."""
    data = victim.read_bytes()
    above = b"".join(data[i * PAGE :][:PAGE] for i in pages_of(victim, {0x02}))
    address = next(row.address for row in GOOD if row.address in above)
    for number in pages_of(victim, {0x0D}):
        page = data[number * PAGE :][:PAGE]
        if address in page:
            overwrite(victim, number * PAGE + page.index(address), bytes(1))
    found, report = salvaged(victim)
    assert sorted(found) == sorted(row for row in GOOD if row.address != address)
    assert report.damaged == 1


@pytest.mark.untraced
def test_each_bit_of_a_row_is_proved(tmp_path):
    """Whatever bit of a row's cell is flipped, its record and address come out right or not."""
    path = make(tmp_path / "cache.db", GOOD[:3], page=4096)
    data = path.read_bytes()
    begin = data.index(GOOD[1].address) - 20
    for bit in range(8 * (len(GOOD[1].record) + 80)):
        harmed = bytearray(data)
        harmed[begin + bit // 8] ^= 1 << bit % 8
        path.write_bytes(harmed)
        found, _ = salvaged(path)
        assert {row[:2] for row in found} <= {row[:2] for row in GOOD[:3]}
        assert len(found) >= 1


def _leave_log(source, target):
    """Copy a database and its log as a kill would leave them."""
    for end in ("", "-wal"):
        shutil.copy(f"{source}{end}", f"{target}{end}")
    return target


@pytest.mark.parametrize("page", [PAGE, 4096])
def test_what_is_only_in_the_log_comes_out(tmp_path, page):
    """Rows that no checkpoint has moved to the file yet are read from the log, once each."""
    with opened(tmp_path / "made.db", page) as connection:
        connection.execute("PRAGMA journal_mode = wal")
        connection.execute("PRAGMA wal_autocheckpoint = 0")
        for i in range(0, 300, 10):
            put(connection, GOOD[i : i + 10])
        path = _leave_log(tmp_path / "made.db", tmp_path / "cache.db")
    assert Path(f"{path}-wal").stat().st_size > path.stat().st_size
    found, _ = salvaged(path)
    assert sorted(found) == sorted(GOOD[:300])
    path.write_bytes(b"")
    assert salvaged(path)[0] == found
    # Without the salts in its header and in the first frame the frames all count as old ones.
    overwrite(Path(f"{path}-wal"), 0, bytes(8))
    overwrite(Path(f"{path}-wal"), 12, bytes(20 + 24))
    assert {row[:2] for row in salvaged(path)[0]} == {row[:2] for row in GOOD[:300]}


@pytest.mark.parametrize("in_log", [False, True])
def test_of_two_versions_the_later_comes_first_and_each_has_its_time(tmp_path, in_log):
    """A row that was written again comes out of the log, then as it was; the newer is the newer."""
    old = GOOD[:50]
    newer = [
        row._replace(record=encode(Entry(bytes(4 * 96), 1, counted=True, digest=row.address)))
        for row in old
    ]
    newer = [row._replace(stored=row.stored + 5000) for row in newer]
    with opened(tmp_path / "made.db") as connection:
        if not in_log:
            put(connection, old)
        connection.execute("PRAGMA journal_mode = wal")
        connection.execute("PRAGMA wal_autocheckpoint = 0")
        if in_log:
            put(connection, old)
        put(connection, newer)
        path = _leave_log(tmp_path / "made.db", tmp_path / "cache.db")
    found, _ = salvaged(path)
    assert sorted(found[:50]) == sorted(newer)
    assert sorted(found[50:]) == sorted(old)


def test_frames_left_from_an_earlier_log_are_older(tmp_path):
    """What stands in the log behind its present end does not pass for the newest."""
    versions = [[row._replace(stored=row.stored + i) for row in GOOD[:100]] for i in range(5)]
    with opened(tmp_path / "made.db") as connection:
        connection.execute("PRAGMA journal_mode = wal")
        connection.execute("PRAGMA wal_autocheckpoint = 0")
        for version in versions[:4]:
            put(connection, version)
        connection.execute("PRAGMA wal_checkpoint(RESTART)")
        put(connection, versions[4])
        path = _leave_log(tmp_path / "made.db", tmp_path / "cache.db")
    # Without table `Entries` each version has its own time.
    for file in (path, Path(f"{path}-wal")):
        data = file.read_bytes()
        step = PAGE if file == path else PAGE + 24
        for start in range(0 if file == path else 56, len(data), step):
            if data[start] == 0x0D and b"EMBV" not in data[start : start + PAGE]:
                overwrite(file, start, bytes(PAGE))
    found, _ = salvaged(path)
    assert sorted(row[:3] for row in found[:100]) == sorted(row[:3] for row in versions[4])


def test_what_two_copies_dispute_is_not_decided_by_one(tmp_path):
    """Where a page that was given up says otherwise, the row comes out, without its partition."""
    path = make(tmp_path / "cache.db", GOOD[:10])
    data = path.read_bytes()
    (index,) = [
        data[i * PAGE :][:PAGE]
        for i in pages_of(path, {0x0A})
        if GOOD[1].address in data[i * PAGE :][:PAGE]
    ]
    path.write_bytes(data + index.replace(GOOD[1].address, bytes(16)))
    assert sorted(salvaged(path)[0]) == sorted(GOOD[:10])
    with opened(tmp_path / "other.db") as connection:
        put(connection, GOOD[:10])
        connection.execute("UPDATE Entries SET partition = 3 - partition WHERE id = 2")
    other = (tmp_path / "other.db").read_bytes()
    different = [
        i for i in pages_of(path, {0x0D}) if other[i * PAGE :][:PAGE] != data[i * PAGE :][:PAGE]
    ]
    (entries,) = different
    path.write_bytes(data + other[entries * PAGE :][:PAGE])
    expected = [row if row != GOOD[1] else row._replace(partition=None) for row in GOOD[:10]]
    assert sorted(salvaged(path)[0]) == sorted(expected)


@pytest.mark.parametrize("page", [PAGE, 4096])
def test_records_longer_than_a_page_are_put_together(tmp_path, page):
    """Vectors of 10,000 dimensions come out whole, and a broken chain costs its own record only."""
    long = [row_of(i, [Partition("", "a/wide space", 10_000)]) for i in range(40)]
    path = make(tmp_path / "cache.db", long, page)
    assert sorted(salvaged(path)[0]) == sorted(long)
    data = path.read_bytes()
    tail = long[7].record[-2000:]
    harmed = data.index(tail) // page * page
    for pointer in (0, harmed // page + 1, 1, 2, (1 << 32) - 1):
        # The first of these makes no harm where the chain ends anyway.
        overwrite(path, harmed, pointer.to_bytes(4, "big"))
        overwrite(path, harmed + 4, data[harmed + 4 : harmed + page])
        assert sorted(salvaged(path)[0]) == sorted(long)
    overwrite(path, harmed, bytes(page))
    found, report = salvaged(path)
    assert sorted(found) == sorted(set(long) - {long[7]})
    assert report.damaged == 1


@pytest.mark.parametrize("own", [0, 2, 300, 70_000, 0.5])
def test_rows_of_every_length_are_put_together(tmp_path, own):
    """Whether a row just fits its page, or is too long by one byte or by many, it comes out."""
    some = [row_of(d, [Partition("", "a/space", d)]) for d in [*range(85, 400), 1000, 5000]]
    found, report = salvaged(make(tmp_path / "cache.db", some, 512, own=own))
    assert sorted(found) == sorted(some)
    assert report.damaged == 0


def test_long_records_come_out_of_the_log_too(tmp_path):
    """The pages on which a record goes on are found where their last version lies."""
    long = [row_of(i, [Partition("", "a/wide space", 10_000)]) for i in range(10)]
    with opened(tmp_path / "made.db") as connection:
        connection.execute("PRAGMA journal_mode = wal")
        put(connection, long)
        path = _leave_log(tmp_path / "made.db", tmp_path / "cache.db")
    assert sorted(salvaged(path)[0]) == sorted(long)


@pytest.mark.parametrize("target", ["itself", "nowhere", "zero"])
def test_a_chain_that_leads_astray_ends(tmp_path, target):
    """A chain of pages that goes round, out of the file or to no page at all gives nothing."""
    long = row_of(1, [Partition("", "a/wide space", 60_000)])
    path = make(tmp_path / "cache.db", [long, GOOD[0]])
    data = path.read_bytes()
    page = next(
        i
        for i in range(1, len(data) // PAGE)
        if data[i * PAGE + 4 : i * PAGE + 2000] in long.record and data[i * PAGE] == 0
    )
    number = {"itself": page + 1, "nowhere": 1 << 31, "zero": 0}[target]
    overwrite(path, page * PAGE, number.to_bytes(4, "big"))
    found, report = salvaged(path)
    assert found == [GOOD[0]]
    assert report.damaged == 1


class Trap:
    """Makes a directory when it is loaded from a pickle: loading runs code."""

    def __init__(self, directory):
        self.directory = directory

    def __reduce__(self):
        return os.mkdir, (str(self.directory),)


@pytest.mark.parametrize(("raw", "mode"), [(0, 1), (1, 4), (0, 4), (1, 2), (1, 3), (1, 0)])
def test_what_says_it_is_a_pickle_is_left(tmp_path, raw, mode):
    """A row that is not raw bytes is neither loaded nor handed out, even with a whole record."""
    trap = GOOD[1]._replace(record=pickle.dumps(Trap(tmp_path / "sprung")))
    with opened(tmp_path / "cache.db") as connection:
        put(connection, GOOD[:1])
        put(connection, [trap, GOOD[2]], raw=raw, mode=mode)
        put(connection, [GOOD[3]._replace(record=trap.record)])
    found, report = salvaged(tmp_path / "cache.db")
    assert found == GOOD[:1]
    assert report.damaged == 3
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize("size", [0, 1, 15, 17])
def test_an_address_of_another_length_is_none(tmp_path, size):
    """Only what has an address of 16 bytes is handed out."""
    bad = GOOD[1]._replace(address=bytes(size))
    found, report = salvaged(make(tmp_path / "cache.db", [GOOD[0], bad]))
    assert (found, report.damaged) == (GOOD[:1], 1)


any_page = st.builds(
    lambda kind, head, pointers, rest: (
        bytes([kind]) + head + struct.pack(f">{len(pointers)}H", *pointers) + rest
    ),
    st.sampled_from([0x0D, 0x0A, 0x02, 0x05, 0]),
    st.binary(min_size=7, max_size=7),
    st.lists(st.integers(0, 600), max_size=40),
    st.binary(max_size=500),
)


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.binary(max_size=100),
    st.lists(any_page | st.binary(max_size=512), max_size=6),
    st.binary(max_size=32),
    st.lists(any_page, max_size=3),
)
def test_garbage_gives_nothing_and_no_error(tmp_path, head, pages, log_head, frames):
    """Bytes that never were a database, in the file or in its log, raise nothing."""
    header = b"SQLite format 3\0\x02\0" + head[18:].ljust(82, b"\0")
    body = b"".join(page.ljust(512, b"\0")[:512] for page in pages)
    (tmp_path / "cache.db").write_bytes(header + body)
    log = b"".join(bytes(24) + page.ljust(512, b"\0")[:512] for page in frames)
    (tmp_path / "cache.db-wal").write_bytes(log_head.ljust(32, b"\0") + log)
    found, _ = salvaged(tmp_path / "cache.db")
    assert found == []


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_a_good_page_with_anything_written_over_it_gives_nothing_wrong(good, tmp_path, data):
    """Any bytes over any place of a page of rows raise nothing and make no new row."""
    number = data.draw(st.sampled_from(pages_of(good, {0x0D, 0x0A})))
    page = bytearray(good.read_bytes()[number * PAGE :][:PAGE])
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, 200) | st.integers(0, PAGE - 20))
        over = data.draw(st.binary(min_size=1, max_size=20))
        page[at : at + len(over)] = over
    (tmp_path / "cache.db").write_bytes(bytes(PAGE) + page)
    truth = {row.address: row.record for row in GOOD}
    found, _ = salvaged(tmp_path / "cache.db")
    # Without its index an address is what the row says.
    assert {row.record for row in found} <= set(truth.values())


@pytest.mark.parametrize("kind", [0x0D, 0x0A, 0x02])
def test_a_page_of_noise_is_given_up(tmp_path, kind):
    """Of a page of noise that says it is full of cells only some are tried."""
    noise = bytearray(random.Random(1).randbytes(4 * PAGE))
    for offset in range(0, len(noise), PAGE):
        noise[offset] = kind
        noise[offset + 3 : offset + 5] = b"\xff\xff"
    (tmp_path / "cache.db").write_bytes(bytes(PAGE) + noise)
    found, report = salvaged(tmp_path / "cache.db")
    assert found == []
    assert report.damaged <= 4 * (MAX_UNREADABLE + 1)


def test_an_empty_file_gives_nothing_and_a_missing_one_is_an_error(tmp_path):
    """No content is no error; no file is one, of the system's."""
    (tmp_path / "cache.db").touch()
    assert salvaged(tmp_path / "cache.db") == ([], CarveReport())
    with pytest.raises(FileNotFoundError):
        salvaged(tmp_path / "missing.db")


def test_progress_is_told_up_to_the_end(good):
    """What is told never falls, passes the half on the way, and ends at the size of the file."""
    told = []
    assert len(list(rows(good, CarveReport(), told.append))) == len(GOOD)
    assert told == sorted(told)
    assert told[-1] == good.stat().st_size
