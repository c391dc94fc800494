"""The memory tier against a model of it: bounded in bytes, least recently used out first."""

import gc
import math
import tracemalloc

import pytest
from embedding_proxy.cache import memory as module
from embedding_proxy.cache.key import Keys
from embedding_proxy.cache.memory import _OVERHEAD, Memory
from embedding_proxy.cache.record import Entry
from hypothesis import given, settings
from hypothesis import strategies as st

ADDRESSES = [bytes([i]) * 16 for i in range(6)]
ONE = 8 + _OVERHEAD
"""What an entry of two numbers takes."""


def _entry(size=8, tokens=1):
    return Entry(bytes(size), tokens, counted=True, digest=bytes(16))


def _get(memory, address, not_before=-math.inf, *, is_noted=True):
    """Look one address up, whatever digest and width is kept there."""
    kept = memory._entries.peek(address)
    digest, size = (kept.entry.digest, len(kept.entry.vector)) if kept else (bytes(16), 8)
    keys = Keys([address], [digest])
    ((entry,), missing) = memory.lookup(keys, size, not_before, is_noted=is_noted)
    assert missing == ([] if entry else [0])
    return entry


class Model:
    """What the tier should do, written without regard to speed: a list, the newest use last."""

    def __init__(self, limit):
        self.limit = limit
        self.entries = []

    def size(self):
        return sum(len(entry.vector) + _OVERHEAD for _, entry in self.entries)

    def get(self, address):
        for place, (known, entry) in enumerate(self.entries):
            if known == address:
                self.entries.append(self.entries.pop(place))
                return entry
        return None

    def put(self, address, entry):
        if len(entry.vector) + _OVERHEAD > self.limit:
            return
        self.entries = [(a, e) for a, e in self.entries if a != address] + [(address, entry)]
        while self.size() > self.limit:
            self.entries.pop(0)


STEPS = st.lists(
    st.tuples(
        st.sampled_from(ADDRESSES),
        st.none() | st.builds(_entry, st.sampled_from([0, 4, 8, 400, 1200]), st.integers(0, 9)),
    ),
    max_size=40,
)


@settings(deadline=None)
@given(st.integers(0, 5 * ONE), STEPS)
def test_any_sequence_agrees_with_the_model(limit, steps):
    """After every get and put, size, number and content are the model's, and within the limit."""
    memory, model = Memory(limit), Model(limit)
    for address, entry in steps:
        if entry is None:
            assert _get(memory, address) is model.get(address)
        else:
            memory.put(address, entry)
            model.put(address, entry)
        assert memory.size == model.size() <= limit
        assert len(memory) == len(model.entries)
    # Every get that hits counts as a use, so ask for each in the model's own order.
    for address, entry in list(model.entries):
        assert _get(memory, address) is entry
    assert sum(_get(memory, address) is not None for address in ADDRESSES) == len(model.entries)


def test_the_least_recently_used_goes_first():
    """Neither the oldest nor the least often used entry goes, but the one not used the longest."""
    memory = Memory(3 * ONE)
    for address in ADDRESSES[:3]:
        memory.put(address, _entry())
    for address in (ADDRESSES[1], ADDRESSES[1], ADDRESSES[0], ADDRESSES[2], ADDRESSES[0]):
        _get(memory, address)
    memory.put(ADDRESSES[3], _entry())
    assert [address for address in ADDRESSES if _get(memory, address)] == [
        ADDRESSES[0],
        ADDRESSES[2],
        ADDRESSES[3],
    ]


def test_replacing_counts_as_use():
    """An entry that was just written anew is not the next to go."""
    memory = Memory(2 * ONE)
    for address in (ADDRESSES[0], ADDRESSES[1], ADDRESSES[0], ADDRESSES[2]):
        memory.put(address, _entry())
    assert _get(memory, ADDRESSES[0]) is not None
    assert _get(memory, ADDRESSES[1]) is None


@pytest.mark.parametrize("size", [0, 4, 8, 12, 8 + ONE])
def test_replacing_keeps_the_size_right(size):
    """The size is that of what is there, whether the new entry is smaller, equal or larger."""
    memory = Memory(3 * ONE)
    memory.put(ADDRESSES[0], _entry())
    memory.put(ADDRESSES[0], _entry(size, tokens=2))
    assert _get(memory, ADDRESSES[0]) == _entry(size, tokens=2)
    assert memory.size == size + _OVERHEAD
    assert len(memory) == 1


def test_an_entry_larger_than_the_limit_drives_nobody_out():
    """What can never fit is not kept, and what is there stays."""
    memory = Memory(2 * ONE)
    memory.put(ADDRESSES[0], _entry())
    memory.put(ADDRESSES[1], _entry(8 + ONE + 1))
    assert _get(memory, ADDRESSES[1]) is None
    assert _get(memory, ADDRESSES[0]) == _entry()
    assert memory.size == ONE


def test_an_entry_of_exactly_the_limit_fits():
    """The limit itself may be used, by one entry or by several."""
    for count in (1, 2, 3):
        memory = Memory(count * ONE)
        for address in ADDRESSES[:count]:
            memory.put(address, _entry())
        assert (memory.size, len(memory)) == (count * ONE, count)


def test_a_limit_of_zero_keeps_nothing():
    """A memory of no bytes is no error; it always misses."""
    memory = Memory(0)
    memory.put(ADDRESSES[0], _entry(0))
    assert _get(memory, ADDRESSES[0]) is None
    assert (memory.size, len(memory)) == (0, 0)


@pytest.mark.parametrize("dimensions", [8, 256])
def test_the_bytes_it_counts_are_the_bytes_it_takes(dimensions):
    """What the interpreter allocates for the entries is never more than `size`, nor far below."""
    count = 3000
    tracemalloc.start()
    try:
        memory = Memory(1 << 40)
        gc.collect()
        before, _ = tracemalloc.get_traced_memory()
        for i in range(count):
            entry = Entry(bytes(4 * dimensions), 1000 + i, counted=True, digest=i.to_bytes(16))
            memory.put(i.to_bytes(16), entry)
        gc.collect()
        after, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert 0.8 * memory.size < after - before <= memory.size


class Clock:
    """Seconds that pass only when told."""

    def __init__(self):
        self.now = 1000.0

    def __call__(self):
        return self.now


@pytest.mark.parametrize("stored", [None, 1000.0, 997.0, 1005.0])
def test_an_entry_is_served_until_it_is_too_old_and_not_after(stored):
    """Age counts from when it was bought, to the tick of the clock, and a use adds nothing."""
    clock = Clock()
    memory = Memory(ONE, ttl_s=10, clock=clock)
    memory.put(ADDRESSES[0], _entry(), stored)
    end = (1000.0 if stored is None else stored) + 10
    for clock.now in (1000.0, end - 1, end - 1e-6):
        assert _get(memory, ADDRESSES[0]) == _entry()
    for clock.now in (end, end - 1):
        assert _get(memory, ADDRESSES[0]) is None
        assert (memory.size, len(memory)) == (0, 0)


def test_an_entry_that_is_bought_again_is_young_again():
    """Writing an entry anew begins its time anew."""
    clock = Clock()
    memory = Memory(ONE, ttl_s=10, clock=clock)
    for clock.now in (1000.0, 1009.0, 1018.0):
        assert (_get(memory, ADDRESSES[0]) is None) == (clock.now == 1000.0)
        memory.put(ADDRESSES[0], _entry())


def test_what_was_bought_too_early_is_passed_over_and_stays():
    """One who takes only newer entries gets none; others get it as before."""
    memory = Memory(ONE, clock=Clock())
    memory.put(ADDRESSES[0], _entry())
    assert _get(memory, ADDRESSES[0], not_before=1000.5) is None
    assert _get(memory, ADDRESSES[0], not_before=1000.0) == _entry()
    assert _get(memory, ADDRESSES[0]) == _entry()


def test_a_use_that_is_not_noted_does_not_keep_an_entry():
    """What was read without a trace is still the first to go."""
    memory = Memory(2 * ONE)
    for address in ADDRESSES[:2]:
        memory.put(address, _entry())
    assert _get(memory, ADDRESSES[0], is_noted=False) == _entry()
    memory.put(ADDRESSES[2], _entry())
    assert _get(memory, ADDRESSES[0]) is None
    assert _get(memory, ADDRESSES[1]) == _entry()


def test_what_was_bought_later_stays():
    """An older entry, read meanwhile, replaces no newer one; what is bought now replaces all."""
    memory = Memory(ONE, clock=Clock())
    steps = [(500.0, 1), (400.0, 1), (500.0, 3), (2000.0, 4), (1999.0, 4), (None, 6)]
    for tokens, (stored, kept) in enumerate(steps, 1):
        memory.put(ADDRESSES[0], _entry(tokens=tokens), stored)
        assert _get(memory, ADDRESSES[0]).tokens == kept


def test_what_is_about_something_else_is_replaced_however_new_it_is():
    """At one address the digest tells two entries apart: the one last asked for is kept."""
    memory = Memory(ONE)
    memory.put(ADDRESSES[0], _entry(), 500.0)
    other = _entry()._replace(digest=bytes([1]) * 16)
    memory.put(ADDRESSES[0], other, 400.0)
    assert _get(memory, ADDRESSES[0]) == other


def test_without_a_time_to_live_nothing_ages():
    """By default no clock is looked at, and an entry of whatever age is served."""
    memory = Memory(ONE, clock=lambda: pytest.fail("looked at the clock"))
    memory.put(ADDRESSES[0], _entry(), 0.0)
    assert _get(memory, ADDRESSES[0]) == _entry()


@pytest.mark.parametrize(("digest", "size"), [(b"e" * 16, 8), (bytes(16), 12), (bytes(16), 4)])
def test_another_digest_or_width_is_missing_and_stays(digest, size):
    """Only an entry that is of the input and has the width is found, in the order of the keys."""
    memory = Memory(3 * ONE)
    for address in ADDRESSES[:3]:
        memory.put(address, _entry())
    keys = Keys(ADDRESSES[:4], [bytes(16), digest, bytes(16), bytes(16)])
    if size == 8:
        assert memory.lookup(keys, size) == ([_entry(), None, _entry(), None], [1, 3])
    else:
        assert memory.lookup(keys, size) == ([None] * 4, [0, 1, 2, 3])
    assert len(memory) == 3


def test_clearing_leaves_nothing():
    """After clearing nothing is there, and there is room for all again."""
    memory = Memory(3 * ONE)
    for address in ADDRESSES:
        memory.put(address, _entry())
    memory.clear()
    assert (memory.size, len(memory)) == (0, 0)
    assert not any(_get(memory, address) for address in ADDRESSES)
    for address in ADDRESSES[:3]:
        memory.put(address, _entry())
    assert all(_get(memory, address) for address in ADDRESSES[:3])


# --- the epoch ------------------------------------------------------------------------------------


def _other(entry: Entry) -> Entry:
    return entry._replace(tokens=entry.tokens + 1)


@pytest.mark.parametrize("is_evicted", [False, True])
def test_the_epoch_changes_when_another_entry_takes_the_place(is_evicted):
    """Also where the first one was dropped for room; the same one once more changes nothing."""
    first = Entry(bytes(8), 1, counted=True, digest=b"d")
    memory = Memory(2 * (8 + _OVERHEAD))
    memory.put(b"a", first)
    before = memory.epoch
    if is_evicted:
        for name in (b"b", b"c"):
            memory.put(name, first)
        assert _get(memory, b"a") is None
    memory.put(b"a", first)
    assert memory.epoch == before
    if is_evicted:
        for name in (b"d", b"e"):
            memory.put(name, first)
    memory.put(b"a", _other(first))
    assert memory.epoch > before


def test_the_epoch_changes_when_everything_is_dropped():
    """What was made of the entries may be wrong from then on."""
    memory = Memory(1000)
    before = memory.epoch
    memory.clear()
    assert memory.epoch > before


def test_no_more_is_remembered_of_what_was_dropped_than_is_bounded(monkeypatch):
    """Then all that was made of entries is taken for wrong."""
    monkeypatch.setattr(module, "_MAX_EVICTED", 3)
    memory = Memory(8 + _OVERHEAD)
    entry = Entry(bytes(8), 1, counted=True, digest=b"d")
    epochs = []
    for number in range(9):
        memory.put(b"%d" % number, entry)
        epochs.append(memory.epoch)
        assert len(memory._evicted) <= 3
    assert len(set(epochs)) == 3


def test_an_expiry_is_that_of_the_first_to_expire():
    """Of entries that are all here with these very vectors."""
    memory = Memory(1 << 20, ttl_s=10)
    entries = [Entry(bytes(8), 1, counted=True, digest=b"d") for _ in range(2)]
    now = memory.clock()
    for name, entry, age in zip((b"a", b"b"), entries, (1, 2), strict=True):
        memory.put(name, entry, now - age)
    vectors = [entry.vector for entry in entries]
    assert memory.expiry_of([b"a", b"b"], vectors) == pytest.approx(now + 8)
    assert memory.expiry_of([b"a", b"c"], vectors) is None
    assert memory.expiry_of([b"a"], [bytearray(8)]) is None
