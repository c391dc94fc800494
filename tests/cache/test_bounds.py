"""The bounds of the tables that grow with what clients and upstreams name; sums stay exact."""

import pytest
from embedding_proxy.cache.disk import bounds, ledger_reader
from embedding_proxy.cache.disk.connection import opened
from embedding_proxy.cache.disk.store import Store
from embedding_proxy.cache.disk.write_batch import PendingRecord, WriteBatch
from embedding_proxy.cache.key import OTHER_NAMESPACE, Partition
from embedding_proxy.cache.ledger import By, LedgerKey, Usage
from embedding_proxy.providers.base import Space, current_label
from hypothesis import given
from hypothesis import strategies as st

GIB = 1 << 30
PARTITION = Partition("", "m", 8)


def _total(lines):
    total = Usage()
    for usage in lines:
        total = total.plus(usage)
    return total


def _partitions(file):
    return [
        Partition(*row) for row in file.sql("SELECT namespace, space, dimensions FROM Partitions")
    ]


def _record(number, partition):
    return {number.to_bytes(16, "big"): PendingRecord(b"record", partition)}


def _label(number):
    return Space("m", 8).with_parameters({"task": number}).label


@given(st.dictionaries(st.text(min_size=1), st.booleans(), min_size=1), st.text(min_size=1))
def test_no_space_has_the_shared_label(parameters, name):
    """Whatever clients name, a label of their own is never the one that is shared."""
    label = Space(name, 8).with_parameters(parameters).label
    rest = bounds.rest_of(label)
    assert rest == f"{label.partition('?')[0]}?other"
    assert label != rest == current_label(rest)
    assert bounds.rest_of(Space(name, 8).label) is None


def test_parameter_sets_of_a_model_are_bounded(tmp_path, monkeypatch):
    """The first sets have a partition each, further ones share one, in each namespace and model."""
    monkeypatch.setattr(bounds, "MAX_PARAMETER_SETS", 3)
    labels = [_label(i) for i in range(6)]
    for half in (labels[:4], labels[2:]):
        # A second opening is another process, or one after a restart.
        with opened(tmp_path, GIB, create=True) as file:
            for number, label in enumerate(half):
                file.write(WriteBatch(records=_record(number, Partition("", label, 8))))
            file.write(WriteBatch(records=_record(9, Partition("", "m", 8))))
            file.write(WriteBatch(records=_record(10, Partition("team", labels[5], 8))))
            file.write(
                WriteBatch(records=_record(11, Partition("", "m2?task=~0123456789abcdef", 8)))
            )
    with opened(tmp_path, GIB) as file:
        assert set(_partitions(file)) == {
            *(Partition("", label, 8) for label in (*labels[:3], "m?other", "m")),
            Partition("team", labels[5], 8),
            Partition("", "m2?task=~0123456789abcdef", 8),
        }


def test_partitions_are_bounded_in_all(tmp_path, monkeypatch):
    """Beyond the bound a partition of each width holds all; what is known keeps its own."""
    monkeypatch.setattr(bounds, "MAX_PARTITIONS", 3)
    for _ in range(2):
        with opened(tmp_path, GIB, create=True) as file:
            for i in range(8):
                partition = Partition(f"team {i}", "m", 8 + i % 2)
                file.write(WriteBatch(records=_record(i, partition)))
            assert len(file.read_many([i.to_bytes(16, "big") for i in range(8)])) == 8
            assert _partitions(file) == [
                *(Partition(f"team {i}", "m", 8 + i % 2) for i in range(3)),
                Partition(OTHER_NAMESPACE, "other", 9),
                Partition(OTHER_NAMESPACE, "other", 8),
            ]
            entries = file.sql("SELECT namespace, count(*) FROM Entries JOIN Partitions"
                               " ON Partitions.id = partition GROUP BY namespace")  # fmt: skip
            assert dict(entries)[OTHER_NAMESPACE] == 5


def test_rows_of_a_day_are_bounded_over_processes(tmp_path, monkeypatch):
    """The first headings of a day have a row each, whoever writes; each next day begins anew."""
    monkeypatch.setattr(bounds, "MAX_LEDGER_KEYS", 3)
    headings = [LedgerKey(PARTITION, f"m{i}", ("p", "")[i % 2], f"c{i}") for i in range(8)]
    one = Usage(hits=1, tokens_billed=5, nanodollars_billed=7)
    for chosen in (headings[:5], headings[::-1], headings):
        with opened(tmp_path, GIB, create=True) as file:
            file.write(WriteBatch(usage={(day, one_): one for one_ in chosen for day in (1, 2)}))
    with opened(tmp_path, GIB) as file:
        lines = dict(
            ledger_reader.read(file.sql, [By.DAY, By.MODEL, By.PROVIDER, By.CLIENT, By.NAMESPACE])
        )
        assert lines.keys() == {
            *((day, f"m{i}", ("p", "")[i % 2], f"c{i}", "") for day in (1, 2) for i in range(3)),
            *((day, "other", p, "other", OTHER_NAMESPACE) for day in (1, 2) for p in ("p", "")),
        }
        assert _total(lines.values()) == _total([one] * 2 * (5 + 8 + 8))
        file.write(WriteBatch(usage={(3, headings[7]): one}))
        assert ((3, "m7", "", "c7", ""), one) in ledger_reader.read(
            file.sql, [By.DAY, By.MODEL, By.PROVIDER, By.CLIENT, By.NAMESPACE]
        )


def test_a_heading_of_shared_partitions_is_one_row(tmp_path, monkeypatch):
    """Spaces that share a partition share their row of the ledger, and it is counted once."""
    monkeypatch.setattr(bounds, "MAX_PARAMETER_SETS", 1)
    monkeypatch.setattr(bounds, "MAX_LEDGER_KEYS", 2)
    usage = {(1, LedgerKey(Partition("", _label(i), 8), "m")): Usage(hits=1) for i in range(5)}
    with opened(tmp_path, GIB, create=True) as file:
        file.write(WriteBatch(usage=usage))
        lines = dict(ledger_reader.read(file.sql, [By.SPACE]))
    assert lines.pop(("m?other",)) == Usage(hits=4)
    assert list(lines.values()) == [Usage(hits=1)]


async def test_what_a_process_counts_is_bounded(tmp_path, monkeypatch):
    """Sums in memory, and what waits to be written, have so many lines and one a provider."""
    monkeypatch.setattr("embedding_proxy.cache.disk.store.MAX_LEDGER_KEYS", 4)
    async with Store(tmp_path, GIB) as store:
        for i in range(20):
            store.count(
                LedgerKey(PARTITION, f"m{i}", "p", f"c{i}"), Usage(misses=1, tokens_billed=i)
            )
        store.count(LedgerKey(PARTITION, "m1", "p", "c1"), Usage(hits=1))
        rest = LedgerKey(PARTITION, "m9", "p", "c9").rest
        assert rest == LedgerKey(Partition(OTHER_NAMESPACE, "other", 0), "other", "p", "other")
        waiting = [heading for _, heading in store._pending.changes.usage]
        assert waiting == list(store.counted) == [
            *(LedgerKey(PARTITION, f"m{i}", "p", f"c{i}") for i in range(4)),
            rest,
        ]  # fmt: skip
        total = _total(store.counted.values())
        assert total == Usage(misses=20, hits=1, tokens_billed=sum(range(20)))
    async with Store(tmp_path, GIB) as store:
        assert await store.ledger([]) == [((), total)]


def test_lines_that_are_shown_are_bounded(tmp_path):
    """Preferred names first, then the earliest day; the rest is summed by provider, exactly."""
    headings = [LedgerKey(PARTITION, f"m{i}", ("p", "q")[i % 2]) for i in range(6)]
    usage = {(6 - i, heading): Usage(hits=1 << i) for i, heading in enumerate(headings)}
    with opened(tmp_path, GIB, create=True) as file:
        file.write(WriteBatch(usage=usage))
        read = ledger_reader.read(file.sql, [By.MODEL, By.PROVIDER], 2, {By.MODEL: ["m1", "none"]})
        assert ledger_reader.read(file.sql, [By.MODEL], 6) == ledger_reader.read(
            file.sql, [By.MODEL]
        )
        assert ledger_reader.read(file.sql, [], 1) == [((), Usage(hits=63))]
    assert read == [
        (("m1", "q"), Usage(hits=2)),
        (("m5", "q"), Usage(hits=32)),
        (("other", "p"), Usage(hits=1 + 4 + 16)),
        (("other", "q"), Usage(hits=8)),
    ]


@pytest.mark.parametrize("lines", [1, 3, 10])
@given(days=st.lists(st.tuples(st.integers(1, 9), st.sampled_from("abcdef")), max_size=20))
def test_no_line_that_is_shown_ever_shrinks(lines, days, tmp_path_factory):
    """Prometheus takes a counter that shrinks for one that began anew, and counts it twice."""
    before: dict = {}
    with opened(tmp_path_factory.mktemp("store"), GIB, create=True) as file:
        for day, name in sorted(days, key=lambda one: one[0]):
            file.write(WriteBatch(usage={(day, LedgerKey(PARTITION, name, "p")): Usage(hits=1)}))
            now = dict(ledger_reader.read(file.sql, [By.MODEL], lines))
            assert len(now) <= lines + 1
            for names, usage in now.items():
                assert usage.hits >= before.get(names, Usage()).hits
            before |= now
        assert _total(dict(ledger_reader.read(file.sql, [By.MODEL], lines)).values()).hits == len(
            days
        )
