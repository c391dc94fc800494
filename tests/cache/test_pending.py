"""What waits for the disk: bounded, in order, and no sum is lost or counted twice."""

import pytest
from embedding_proxy.cache.disk import writer as pending_module
from embedding_proxy.cache.disk.write_batch import PendingRecord, Use, WriteBatch
from embedding_proxy.cache.disk.writer import Pending
from embedding_proxy.cache.key import Partition
from embedding_proxy.cache.ledger import Usage
from hypothesis import given, settings
from hypothesis import strategies as st

P = Partition("", "m", 4)
A, B, C = (bytes([i]) * 16 for i in (1, 2, 3))


def _size(pending):
    return sum(len(kept.record) for kept in pending.backlog.values())


def test_what_is_taken_is_taken_once():
    """What comes after a taking is another transaction's."""
    pending = Pending()
    pending.changes.records[A] = PendingRecord(b"a", P)
    first = pending.take()
    pending.changes.records[B] = PendingRecord(b"b", P)
    assert list(first.records) == [A]
    assert list(pending.take().records) == [B]
    assert pending.take() == WriteBatch()


def test_nothing_can_wait_where_nothing_is():
    """Without uses, sums and backlog there is no transaction to make, whatever else is pending."""
    pending = Pending()
    assert pending.take_deferred() is None
    pending.changes.records[A] = PendingRecord(b"a", P)
    assert pending.take_deferred() is None
    assert list(pending.take().records) == [A]


def test_uses_sums_and_backlog_go_together():
    """All that can wait goes into one transaction; only the backlog stays until it is written."""
    pending = Pending()
    pending.uses.note([A, B], Use(1, P))
    pending.changes.count(1, P, Usage(hits=1))
    pending.keep_failed(WriteBatch(records={C: PendingRecord(b"c", P)}))
    taken = pending.take_deferred()
    assert taken == WriteBatch(
        records={C: PendingRecord(b"c", P)},
        keep_newer=True,
        used=dict.fromkeys([A, B], Use(1, P)),
        usage={(1, P): Usage(hits=1)},
    )
    assert (pending.changes.usage, list(pending.backlog)) == ({}, [C])
    pending.note_written(taken.records)
    assert pending.take_deferred() is None


def test_a_transaction_of_what_can_wait_is_not_too_large(monkeypatch):
    """Uses and backlog go some at a time, oldest first, until all have gone."""
    monkeypatch.setattr(pending_module, "USES_A_WRITE", 2)
    monkeypatch.setattr(pending_module, "RECORDS_A_WRITE", 3)
    pending = Pending()
    addresses = [bytes([i]) for i in range(7)]
    pending.uses.note(addresses, Use(1, P))
    pending.keep_failed(WriteBatch(records={a: PendingRecord(a, P) for a in addresses}))
    uses, records = [], []
    while (taken := pending.take_deferred()) is not None:
        assert len(taken.used) <= 2
        assert len(taken.records) <= 3
        uses += taken.used
        records += taken.records
        pending.note_written(taken.records)
    assert (uses, records) == (addresses, addresses)


def test_a_later_use_replaces_an_earlier_one():
    """Of several uses of an entry the last is written."""
    pending = Pending()
    for at in (1, 2):
        pending.uses.note([A], Use(at, P))
    assert pending.take_deferred().used == {A: Use(2, P)}


def test_a_use_protects_after_it_was_taken_to_be_written():
    """What is on its way to the disk is remembered still, and is not taken again."""
    pending = Pending()
    pending.uses.note([A], Use(1, P))
    assert list(pending.take_deferred().used) == [A]
    assert dict(pending.uses) == {A: Use(1, P)}
    assert pending.take_deferred() is None


@pytest.mark.parametrize(("size", "fit"), [(1, 10), (3, 3), (5, 2), (10, 1), (11, 0)])
def test_the_backlog_is_bounded_in_bytes(monkeypatch, size, fit):
    """As many records are kept for another try as there is room for, and exactly as many."""
    monkeypatch.setattr(pending_module, "MAX_BACKLOG_BYTES", 10)
    pending = Pending()
    for i in range(12):
        pending.keep_failed(WriteBatch(records={bytes([i]): PendingRecord(bytes(size), P)}))
    assert list(pending.backlog) == [bytes([i]) for i in range(fit)]


def test_a_record_too_large_keeps_no_smaller_one_out(monkeypatch):
    """What does not fit is passed over, what comes with it and fits is kept."""
    monkeypatch.setattr(pending_module, "MAX_BACKLOG_BYTES", 10)
    pending = Pending()
    records = {
        A: PendingRecord(bytes(11), P),
        B: PendingRecord(bytes(4), P),
        C: PendingRecord(bytes(6), P),
    }
    pending.keep_failed(WriteBatch(records=records))
    assert list(pending.backlog) == [B, C]


def test_what_was_written_makes_room(monkeypatch):
    """Writing a record, or a newer one of its address, ends its waiting and frees its bytes."""
    monkeypatch.setattr(pending_module, "MAX_BACKLOG_BYTES", 10)
    pending = Pending()
    pending.keep_failed(WriteBatch(records={A: PendingRecord(bytes(10), P)}))
    pending.note_written({A: PendingRecord(b"newer and shorter", P), B: PendingRecord(b"", P)})
    assert pending.backlog == {}
    pending.keep_failed(WriteBatch(records={B: PendingRecord(bytes(10), P)}))
    assert list(pending.backlog) == [B]


USAGES = st.builds(Usage, st.integers(0, 9), st.integers(0, 9))
RECORDS = st.dictionaries(st.sampled_from([A, B, C]), st.binary(max_size=6), max_size=3)
STEPS = st.lists(
    st.tuples(st.just("put"), RECORDS)
    | st.tuples(st.just("count"), USAGES)
    | st.tuples(st.sampled_from(["write", "flush"]), st.booleans()),
    max_size=30,
)


@settings(deadline=None)
@given(STEPS)
def test_any_sequence_keeps_sums_and_bounds(steps):
    """Sums are written or wait, once each; the backlog's bytes are right, and within its limit."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pending_module, "MAX_BACKLOG_BYTES", 10)
        pending, counted, written, disk = Pending(), Usage(), Usage(), {}
        for what, with_what in steps:
            if what == "put":
                pending.changes.records.update(
                    {a: PendingRecord(r, P) for a, r in with_what.items()}
                )
            elif what == "count":
                pending.changes.count(1, P, with_what)
                counted = counted.plus(with_what)
            else:
                taken = pending.take() if what == "write" else pending.take_deferred()
                if taken is None:
                    continue
                if with_what:
                    disk.update(taken.records)
                    pending.note_written(taken.records)
                    for usage in taken.usage.values():
                        written = written.plus(usage)
                    assert not taken.records.keys() & pending.backlog.keys()
                else:
                    pending.keep_failed(taken)
            assert _size(pending) <= 10
            assert pending._backlog_bytes == _size(pending)
            waiting = pending.changes.usage.get((1, P), Usage())
            assert written.plus(waiting) == counted
