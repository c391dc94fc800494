"""Which uses are remembered, and which are still to be written."""

from embedding_proxy.cache.disk import writer
from embedding_proxy.cache.disk.write_batch import Use
from embedding_proxy.cache.disk.writer import AccessLog
from hypothesis import given, settings
from hypothesis import strategies as st

ADDRESSES = [bytes([i]) for i in range(8)]


def test_those_noted_longest_ago_are_forgotten(monkeypatch):
    """Half of the most are always there, never more than all; what is forgotten is not written."""
    monkeypatch.setattr(writer, "MAX_USES", 4)
    uses = AccessLog()
    for at, address in enumerate(ADDRESSES):
        uses.note([address], Use(at, None))
        assert set(uses) >= set(ADDRESSES[max(0, at - 1) : at + 1])
        assert len(uses) <= 5
    written = uses.take(99)
    assert set(written) <= set(uses)
    assert ADDRESSES[-1] in written


def test_noted_again_is_to_be_written_again():
    """Once given out a use is not given out again, unless there is a later one."""
    uses = AccessLog()
    uses.note(ADDRESSES[:2], Use(1, None))
    assert uses.take(9) == dict.fromkeys(ADDRESSES[:2], Use(1, None))
    assert uses.take(9) == {}
    uses.note(ADDRESSES[:1], Use(2, None))
    assert uses.take(9) == {ADDRESSES[0]: Use(2, None)}
    assert dict(uses) == {ADDRESSES[0]: Use(2, None), ADDRESSES[1]: Use(1, None)}


STEPS = st.lists(st.lists(st.sampled_from(ADDRESSES), max_size=3) | st.integers(0, 3), max_size=40)


@settings(deadline=None)
@given(STEPS)
def test_in_any_order_the_last_use_counts(steps):
    """What is remembered is the last use; what is given out was noted since it last was."""
    uses, last, due = AccessLog(), {}, {}
    for at, step in enumerate(steps):
        if isinstance(step, list):
            uses.note(step, Use(at, None))
            last.update(dict.fromkeys(step, Use(at, None)))
            due.update(dict.fromkeys(step))
        else:
            taken = uses.take(step)
            assert list(taken) == list(due)[:step]
            assert taken == {address: last[address] for address in taken}
            for address in taken:
                del due[address]
        assert dict(uses) == last
