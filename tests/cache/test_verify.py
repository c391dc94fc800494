"""Verification: each damaged record is found, none that is whole, and mending touches no other."""

import hashlib
import sqlite3
import struct
from contextlib import closing

import pytest
from embedding_proxy.cache.disk import connection
from embedding_proxy.cache.disk.connection import StoreError
from embedding_proxy.cache.disk.database import FILE_NAME
from embedding_proxy.cache.disk.purge import PurgeFilter
from embedding_proxy.cache.disk.schema import PAGE_BYTES
from embedding_proxy.cache.key import Partition, Row, checksum
from embedding_proxy.cache.maintenance import archive, verify
from embedding_proxy.cache.maintenance.verify import Findings
from embedding_proxy.cache.record import Entry, encode

GIB = 1 << 30
HERE = Partition("", "a/space", 64)


def _row(number):
    digest = hashlib.blake2b(number.to_bytes(8, "big"), digest_size=16).digest()
    vector = struct.pack("<I", number) * 64
    return Row(digest, encode(Entry(vector, 7, True, digest)), 1_000.5 + number, HERE)  # noqa: FBT003


ROWS = [_row(i) for i in range(20)]
VICTIM = ROWS[7]
OTHERS = [row for row in ROWS if row != VICTIM]


@pytest.fixture
def store(tmp_path):
    """Give a function that opens a store; it holds the rows."""

    def opened():
        return connection.opened(tmp_path, GIB, create=True)

    with opened() as database:
        list(archive.import_rows(database, ROWS))
    return opened


def _scan(database):
    findings = Findings()
    seen = list(verify.scan(database, findings))
    return findings, seen


def _rows(database):
    return list(archive.export_rows(database, PurgeFilter(), archive.ExportReport()))


def test_a_sound_store_is_sound(store):
    """Every record is looked at and found whole, and nothing is to be mended."""
    with store() as database:
        findings, seen = _scan(database)
        assert (findings, findings.sound) == (Findings(records=20), True)
        assert seen[-1] == 20
        verify.repair(database, findings)
        assert _rows(database) == ROWS


def test_an_empty_store_is_sound(tmp_path):
    """Where nothing is, nothing is damaged."""
    with connection.opened(tmp_path, GIB, create=True) as database:
        assert _scan(database)[0] == Findings()


@pytest.mark.parametrize("size", [1, 7, 19, 20, 21])
def test_all_batches_are_looked_at(size, store, monkeypatch):
    """However many rows are read at a time, each is seen once; progress only grows."""
    monkeypatch.setattr(verify, "ROWS_A_BATCH", size)
    with store() as database:
        findings, seen = _scan(database)
    assert findings == Findings(records=20)
    assert seen == sorted(seen)
    assert seen[-1] == 20


@pytest.mark.parametrize(
    "damage",
    [
        "value = zeroblob(length(value))",
        "value = substr(value, 1, length(value) - 1)",
        "value = x''",
        "value = NULL",
        "value = 'text'",
        "value = x'80054e2e', mode = 4",
        "mode = 4",
        "mode = 2, filename = 'elsewhere'",
        "raw = 0",
        "key = x'00'",
        "key = 'sixteen letters!'",
    ],
)
def test_a_damaged_record_is_found_and_mending_deletes_it(damage, store):
    """Whatever it is that cannot be served is named, deleted on demand, and nothing else is."""
    with store() as database:
        database.sql(f"UPDATE Cache SET {damage} WHERE key = ?", (VICTIM.address,))
        findings, _ = _scan(database)
        assert (findings.records, findings.damaged, findings.sound) == (19, 1, False)
        assert not findings.lost_sight_of
        verify.repair(database, findings)
        assert _scan(database)[0] == Findings(records=19)
        assert _rows(database) == OTHERS
        assert database.sql("SELECT count(*) FROM Entries").fetchone() == (19,)


def test_any_flipped_bit_of_a_record_is_found(store):
    """No bit of a record can turn without notice: each of the header's, and some of all others."""
    bits = 8 * len(VICTIM.record)
    with store() as database:
        for bit in {*range(8 * 32), *range(0, bits, 13), *range(bits - 64, bits)}:
            record = bytearray(VICTIM.record)
            record[bit // 8] ^= 1 << bit % 8
            sql = "UPDATE Cache SET value = ? WHERE key = ?"
            database.sql(sql, (bytes(record), VICTIM.address))
            assert _scan(database)[0] == Findings(records=19, damaged=1), bit


def test_a_record_of_another_width_than_its_partition_is_kept(store):
    """A whole record was paid for: mending forgets where it belongs, and it is found as before."""
    wide = encode(Entry(bytes(4 * 65), 7, True, VICTIM.address))  # noqa: FBT003
    with store() as database:
        database.sql("UPDATE Cache SET value = ? WHERE key = ?", (wide, VICTIM.address))
        findings, _ = _scan(database)
        assert findings == Findings(records=20, wrong_partition=1)
        assert not findings.sound
        verify.repair(database, findings)
        assert _scan(database)[0] == Findings(records=20)
        found = {row.address: row for row in _rows(database)}
        assert found.pop(VICTIM.address) == VICTIM._replace(record=wide, partition=None)
        assert found == {row.address: row for row in OTHERS}


def test_a_record_of_a_later_version_is_kept(store):
    """What a later version wrote verifies, and was paid for, though this one cannot serve it."""
    later = bytearray(VICTIM.record)
    later[4] += 1
    body = bytes(later[:-8])
    with store() as database:
        sql = "UPDATE Cache SET value = ? WHERE key = ?"
        database.sql(sql, (body + checksum(body), VICTIM.address))
        findings, _ = _scan(database)
        assert findings == Findings(records=20)


def test_records_that_nobody_entered_are_entered_again(store):
    """What no row of `Entries` knows is found, and after mending it is counted and sound."""
    lost = [row.address for row in ROWS[3:6]]
    with store() as database:
        database.sql("DELETE FROM Entries WHERE id BETWEEN 4 AND 6")
        findings, _ = _scan(database)
        assert (findings.records, findings.lost_sight_of) == (20, 3)
        assert not findings.sound
        verify.repair(database, findings)
        assert _scan(database)[0] == Findings(records=20)
        found = {row.address: row for row in _rows(database)}
        assert [found[a] for a in lost] == [row._replace(partition=None) for row in ROWS[3:6]]
        assert [found[row.address] for row in ROWS[6:]] == ROWS[6:]


def test_a_lost_record_that_is_damaged_is_only_deleted(store):
    """What is neither whole nor entered is deleted, and leaves nothing behind."""
    with store() as database:
        database.sql("DELETE FROM Entries WHERE id = 8")
        database.sql("UPDATE Cache SET value = x'00' WHERE rowid = 8")
        findings, _ = _scan(database)
        assert (findings.damaged, findings.lost_sight_of) == (1, 0)
        verify.repair(database, findings)
        assert _rows(database) == OTHERS
        assert database.sql("SELECT count(*) FROM Entries").fetchone() == (19,)


def test_orphans_are_found_wherever_they_are(store, monkeypatch):
    """Rows of `Entries` without a record are counted and deleted: before, amid, behind all."""
    monkeypatch.setattr(verify, "ROWS_A_BATCH", 3)
    with store() as database:
        database.sql("UPDATE Cache SET rowid = rowid + 1000")
        database.sql("UPDATE Entries SET id = id + 1000")
        database.sql("UPDATE Cache SET rowid = rowid + 100 WHERE rowid > 1010")
        database.sql("UPDATE Entries SET id = id + 100 WHERE id > 1010")
        for number in (1, 1015, 9999):
            database.sql("INSERT INTO Entries VALUES (?, NULL, 0, 0)", (number,))
        findings, _ = _scan(database)
        assert findings == Findings(records=20, orphans=3)
        verify.repair(database, findings)
        assert _scan(database)[0] == Findings(records=20)
        assert _rows(database) == ROWS


def test_mending_remembers_places_and_no_rows(store, monkeypatch):
    """However many records are damaged, what is remembered of them is bounded; all are deleted."""
    monkeypatch.setattr(verify, "ROWS_A_BATCH", 1)
    monkeypatch.setattr(verify, "MAX_PLACES", 3)
    with store() as database:
        database.sql("UPDATE Cache SET value = x'00' WHERE rowid % 2 = 0")
        findings, _ = _scan(database)
        assert (findings.records, findings.damaged) == (10, 10)
        assert len(findings.places) == 3
        verify.repair(database, findings)
        assert _scan(database)[0] == Findings(records=10)
        assert _rows(database) == ROWS[::2]


def test_what_became_whole_meanwhile_is_not_deleted(store):
    """Between looking and mending a proxy may have put a good record in the place of a bad one."""
    with store() as database:
        database.sql("UPDATE Cache SET value = x'00' WHERE key = ?", (VICTIM.address,))
        findings, _ = _scan(database)
        database.sql("UPDATE Cache SET value = ? WHERE key = ?", (VICTIM.record, VICTIM.address))
        verify.repair(database, findings)
        assert _rows(database) == ROWS


@pytest.mark.parametrize("index", ["Cache_key_raw", "Entries_used", "Entries_stored"])
@pytest.mark.parametrize("kind", ["lacks", "has more"])
def test_an_index_that_does_not_agree_is_found(index, kind, store, tmp_path):
    """A row that an index does not know, or one that it knows too well: SQLite trusts it."""
    with store() as database:
        path = database.path
    with closing(sqlite3.connect(path, isolation_level=None)) as other:
        other.execute("PRAGMA writable_schema = ON")
        # The index is taken away for a moment in which the table is changed.
        sql = "SELECT sql FROM sqlite_master WHERE name = ?"
        ((statement,),) = other.execute(sql, (index,)).fetchall()
        other.execute(
            "UPDATE sqlite_master SET sql = ? WHERE name = ?", (f"{statement} WHERE 0", index)
        )
    with closing(sqlite3.connect(path, isolation_level=None)) as other:
        other.execute("DROP TRIGGER Entries_delete")
        table = index.partition("_")[0]
        if kind == "has more":
            other.execute(f"DELETE FROM {table} WHERE rowid = 8")
            other.execute(
                f"DELETE FROM {'Entries' if table == 'Cache' else 'Cache'} WHERE rowid = 8"
            )
        elif table == "Cache":
            other.execute(
                "INSERT INTO Cache SELECT 99, x'0011', raw, 0, NULL, 0, 0, NULL, 0, mode,"
                " NULL, value FROM Cache WHERE rowid = 8"
            )
            other.execute("UPDATE Cache SET key = zeroblob(16) WHERE rowid = 99")
            other.execute("INSERT INTO Entries VALUES (99, 1, 0, 0)")
        else:
            other.execute("UPDATE Entries SET used = 5, stored = 5 WHERE id = 8")
        other.execute("PRAGMA writable_schema = ON")
        other.execute("UPDATE sqlite_master SET sql = ? WHERE name = ?", (statement, index))
    with store() as database:
        findings, _ = _scan(database)
    assert findings.broken
    assert "index" in findings.broken
    assert not findings.sound


def _overwrite(path, page, data):
    with path.open("r+b") as file:
        file.seek(page * PAGE_BYTES)
        file.write(data)


def _pages(path, kind):
    data = path.read_bytes()
    return [i for i in range(1, len(data) // PAGE_BYTES) if data[i * PAGE_BYTES] == kind]


def test_pages_that_cannot_be_read_are_noted_not_raised(tmp_path):
    """Damage below the rows ends the scan, with what SQLite says of it."""
    rows = [_row(i) for i in range(400)]
    with connection.opened(tmp_path, GIB, create=True) as database:
        list(archive.import_rows(database, rows))
        path = database.path
    leaf = _pages(path, 0x0D)[-1]
    _overwrite(path, leaf, bytes(PAGE_BYTES))
    with connection.opened(tmp_path, GIB) as database:
        findings, _ = _scan(database)
    assert "malformed" in findings.broken
    assert not findings.sound


def test_a_broken_structure_is_found_though_all_records_are_whole(store):
    """The records are not all there is: the file's own check is asked as well."""
    with store() as database:
        path = database.path
    # An index of the narrow rows, which no reading of records ever walks.
    with sqlite3.connect(path) as connection:
        sql = "SELECT rootpage FROM sqlite_schema WHERE name = 'Entries_used'"
        ((root,),) = connection.execute(sql)
    connection.close()
    _overwrite(path, root - 1, b"\x0a\xff\xff\xff\xff")
    with store() as database:
        findings, _ = _scan(database)
    assert findings.records == 20
    assert findings.broken
    assert not findings.sound


def test_a_header_that_is_gone_is_damage(store, tmp_path):
    """A file that does not open at all is told from a store that cannot be had for now."""
    _overwrite(tmp_path / "v1" / FILE_NAME, 0, bytes(100))
    with pytest.raises(StoreError) as caught, store():
        pass
    assert connection.is_damaged(caught.value)


def test_a_failure_of_the_moment_is_raised(store, monkeypatch):
    """A store that is locked is not reported as damaged."""

    def locked(*_):
        raise sqlite3.OperationalError("database is locked")

    with store() as database:
        monkeypatch.setattr(type(database), "sql", property(lambda _: locked))
        findings = Findings()
        with pytest.raises(sqlite3.OperationalError, match="locked"):
            list(verify.scan(database, findings))
    assert findings.sound
