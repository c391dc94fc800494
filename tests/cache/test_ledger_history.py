"""The ledger's history: hours that come to their days, and sums that are read in parts."""

import contextlib
import sqlite3

import pytest
from embedding_proxy.cache.disk import bounds, ledger_reader
from embedding_proxy.cache.disk.connection import opened
from embedding_proxy.cache.disk.salvage import salvage_file
from embedding_proxy.cache.disk.write_batch import WriteBatch
from embedding_proxy.cache.key import OTHER, Partition
from embedding_proxy.cache.ledger import (
    HOURS_KEPT,
    MAX_LEDGER_KEYS,
    NOTHING,
    By,
    LedgerFilter,
    LedgerKey,
    LedgerSums,
    Usage,
)

GIB = 1 << 30
PARTITION = Partition("", "m", 8)
DAY = 20_000
NOON = 24 * DAY + 12


def _key(model="m", client="c"):
    return LedgerKey(PARTITION, model, "p", client)


def _put(file, usage, hour):
    with file.transaction(len(usage)) as connection:
        WriteBatch(usage=usage).put_sums(connection, hour)


def _hours(file, **lines):
    return ledger_reader.read_hours(file.sql, LedgerFilter(**lines))


@pytest.fixture
def file(tmp_path):
    """Give a store's file."""
    with opened(tmp_path, GIB, create=True) as file:
        yield file


def test_the_hours_of_a_day_come_to_its_sums(file):
    """What is written within a day has the hour of its writing; what is late, the day's last."""
    one = Usage(hits=1, tokens_saved=5)
    _put(file, {(DAY, _key()): one}, NOON)
    _put(file, {(DAY, _key()): one, (DAY, _key("n", "d")): one}, NOON + 1)
    _put(file, {(DAY, _key()): one, (DAY + 1, _key()): one}, 24 * DAY + 25)
    two = one.plus(one)
    assert _hours(file) == {NOON: one, NOON + 1: two, 24 * DAY + 23: one, 24 * DAY + 25: one}
    assert dict(ledger_reader.read(file.sql, [By.DAY])) == {(DAY,): two.plus(two), (DAY + 1,): one}
    assert _hours(file, client="d") == _hours(file, model="n") == {NOON + 1: one}
    assert _hours(file, first_day=DAY + 1) == {24 * DAY + 25: one}
    assert _hours(file, end_day=DAY) == {}


def test_hours_are_kept_for_some_weeks(file):
    """An hour that is too old is deleted by the next write, and never comes back."""
    one = Usage(hits=1)
    _put(file, {(DAY, _key()): one}, NOON)
    _put(file, {(DAY + 1, _key()): one}, NOON + HOURS_KEPT - 1)
    assert _hours(file) == {NOON: one, 24 * DAY + 47: one}
    _put(file, {(DAY, _key()): one}, NOON + 24 + HOURS_KEPT)
    assert _hours(file) == {24 * DAY + 47: one}
    assert dict(ledger_reader.read(file.sql, [By.DAY]))[DAY,] == one.plus(one)


def test_the_lines_of_an_hour_are_bounded(file, monkeypatch):
    """The first ones have a line each; the rest is one, and no sum is lost."""
    monkeypatch.setattr(bounds, "MAX_HOUR_LINES", 3)
    one = Usage(hits=1)
    for _ in range(2):
        _put(file, {(DAY, _key(f"m{i}", f"c{i}")): one for i in range(8)}, NOON)
    rows = file.sql("SELECT model, client, hits FROM Hours ORDER BY model").fetchall()
    assert rows == [*((f"m{i}", f"c{i}", 2) for i in range(3)), (OTHER, OTHER, 10)]


def test_sums_of_a_long_time_are_read_in_parts(file):
    """However the days lie, the parts come to what one reading gives, of any days and names."""
    days = [3, 4, 40, 70, 71, 72, 500]
    for number, day in enumerate(days):
        _put(file, {(day, _key(f"m{number % 2}", f"c{number % 3}")): Usage(hits=1 + number)}, None)
    for lines in (
        LedgerFilter(),
        LedgerFilter(first_day=4, end_day=72),
        LedgerFilter(model="m1", first_day=40),
        LedgerFilter("c0"),
        LedgerFilter(first_day=501),
    ):
        parts = [*ledger_reader.read_sums(file.sql, lines)]
        sums = LedgerSums.empty()
        for part in parts:
            assert not part.days or max(part.days) - min(part.days) < ledger_reader.DAYS_A_STEP
            sums.add(part)
        for found, by in zip(sums, (By.DAY, By.MODEL, By.CLIENT), strict=True):
            whole = ledger_reader.read(file.sql, [by], lines=lines)
            assert found == {name: usage for (name,), usage in whole}
        whole = [usage for _, usage in ledger_reader.read(file.sql, [], lines=lines)]
        assert sums.total == (whole or [NOTHING])[0]


def test_names_of_sums_are_bounded():
    """Names beyond so many are summed as one; days never are."""
    one = Usage(hits=1)
    many = range(MAX_LEDGER_KEYS + 5)
    names = {f"m{i}": one for i in many}
    sums = LedgerSums.empty()
    for _ in range(2):
        sums.add(LedgerSums(dict.fromkeys(many, one), names, names))
    assert len(sums.days) == MAX_LEDGER_KEYS + 5
    for found in (sums.models, sums.clients):
        assert len(found) == MAX_LEDGER_KEYS + 1
        assert found[OTHER] == Usage(hits=10)


def test_hours_of_a_damaged_file_are_saved(tmp_path):
    """Where the index of the file is gone, the hours that are whole come into the new one, once."""
    one = Usage(hits=1, nanodollars_saved=7)
    with opened(tmp_path / "a", GIB, create=True) as file:
        _put(file, {(DAY, _key()): one, (DAY, _key("n", "d")): one}, NOON)
        _put(file, {(DAY, _key()): one}, NOON + 1)
        path = file.path
    with contextlib.closing(sqlite3.connect(path)) as connection:
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
    with path.open("r+b") as raw:
        raw.write(bytes(100))
    with opened(tmp_path / "b", GIB, create=True) as file:
        for _ in range(2):
            salvage_file(path, file, add_sums=True)
        assert _hours(file) == {NOON: one.plus(one), NOON + 1: one}
        assert _hours(file, client="d") == {NOON: one}


def test_a_write_amid_the_comparison_of_both_copies_is_no_damage(file):
    """Both are read in one state of the file: a transaction between two reads changes both."""
    _put(file, {(DAY, _key()): Usage(hits=1)}, NOON)
    with contextlib.closing(sqlite3.connect(file.path)) as reader:

        def read_then_write(statement, *arguments):
            rows = reader.execute(statement, *arguments).fetchall()
            _put(file, {(DAY, _key()): Usage(hits=1)}, NOON)

            class Rows:
                fetchall = staticmethod(lambda: rows)

            return Rows

        assert ledger_reader.copies_agree(read_then_write)
