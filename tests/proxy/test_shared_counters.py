"""Counters that processes share: slots, restarts, damage, and folders that cannot be written."""

import os

import pytest
from embedding_proxy.proxy.http.shared_counters import MAX_SERIES, Series, SharedCounters

ONE, OTHER = Series("x_total", (("a", "b"),)), Series("y_total")
GAUGE = Series("level")


@pytest.fixture
def opened(tmp_path):
    """Give a function that takes another slot of the same folder."""
    taken = []

    def take():
        counters = SharedCounters(tmp_path / "metrics")
        counters.open()
        taken.append(counters)
        return counters

    yield take
    for counters in taken:
        counters.close()


def test_every_slot_reads_the_same_sums(opened):
    """Counters are summed; gauges are told one by one."""
    first, second = opened(), opened()
    first.publish({ONE: 2, OTHER: 1}, {GAUGE: 5})
    second.publish({ONE: 3}, {GAUGE: 7})
    for reader in (first, second):
        totals = reader.read()
        assert totals.counters == {ONE: 5, OTHER: 1}
        assert sorted(totals.gauges[GAUGE]) == [5, 7]
        assert reader.has_live_others()


def test_counters_continue_after_a_restart_and_gauges_do_not(opened):
    """Whoever takes a free slot goes on from what it holds."""
    first = opened()
    first.publish({ONE: 2}, {GAUGE: 5})
    first.close()
    second = opened()
    assert second.read().counters == {ONE: 2}
    second.publish({ONE: 1, OTHER: 4}, {})
    totals = second.read()
    assert totals.counters == {ONE: 3, OTHER: 4}
    assert GAUGE not in totals.gauges
    assert not second.has_live_others()


def test_a_slot_of_a_process_that_is_gone_counts_and_has_no_gauges(opened):
    """Fewer workers than before: what they counted stays."""
    first, second = opened(), opened()
    second.publish({ONE: 3}, {GAUGE: 7})
    second.close()
    totals = first.read()
    assert totals.counters == {ONE: 3}
    assert GAUGE not in totals.gauges


@pytest.mark.parametrize("damage", [b"", b"\xff\xfe no JSON\n", b'["counter","x_tot', b"[1]\n[]\n"])
def test_damaged_names_are_passed_over(opened, tmp_path, damage):
    """What cannot be read counts as nothing, and the slot is of use again."""
    first = opened()
    first.publish({ONE: 2}, {})
    first.close()
    (tmp_path / "metrics" / "0.series").write_bytes(damage)
    second = opened()
    second.publish({OTHER: 1}, {})
    assert second.read().counters == {OTHER: 1}
    second.close()
    assert opened().read().counters == {OTHER: 1}


def test_values_that_are_cut_off_are_zero(opened, tmp_path):
    """A file of numbers that is too short loses those at its end."""
    first = opened()
    first.publish({ONE: 2, OTHER: 3}, {})
    first.close()
    os.truncate(tmp_path / "metrics" / "0.values", 9)
    second = opened()
    assert second.read().counters == {ONE: 2, OTHER: 0}


def test_without_a_folder_a_process_counts_for_itself(tmp_path, caplog):
    """A file in the place of the folder, or one that may not be written: said once."""
    (tmp_path / "metrics").write_text("")
    counters = SharedCounters(tmp_path / "metrics")
    counters.open()
    counters.publish({ONE: 2}, {GAUGE: 1})
    counters.publish({ONE: 3}, {GAUGE: 2})
    assert counters.read() == ({ONE: 3}, {GAUGE: [2]})
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    counters.close()


def test_series_are_bounded(opened):
    """Beyond the bound new series are left out; the others go on."""
    counters = opened()
    counters.publish({Series("x", (("n", str(n)),)): n for n in range(MAX_SERIES + 10)}, {})
    counters.publish({Series("x", (("n", "1"),)): 7}, {})
    told = counters.read().counters
    assert len(told) == MAX_SERIES
    assert told[Series("x", (("n", "1"),))] == 7


def test_a_counter_that_begins_anew_does_not_fall(opened):
    """What a model counted is forgotten with it; its metric goes on."""
    counters = opened()
    for value in (5, 2, 3):
        counters.publish({ONE: value}, {})
    assert counters.read().counters == {ONE: 8}
