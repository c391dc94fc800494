"""The bytes of a record in the shared tier: read back as they were, and no other way."""

import numpy as np
import pytest
from embedding_proxy.cache import record
from embedding_proxy.cache.key import Partition
from embedding_proxy.cache.record import Entry
from embedding_proxy.cache.shared.value import SharedRecord, pack, unpack
from hypothesis import given
from hypothesis import strategies as st

DIGEST = bytes(range(16))
ENTRY = Entry(np.array([0.25, -1.5, 3.0], "<f4").tobytes(), 7, counted=True, digest=DIGEST)
PARTITION = Partition("tëam", "openai/m", 3)
VALUE = pack(record.encode(ENTRY), 1_700_000_000.125, PARTITION)


def served(value, dimensions=3):
    """Return what would be served of a value."""
    found = unpack(value)
    return found and record.decode(found.record, DIGEST, dimensions)


@given(
    stored=st.floats(0, 1e10),
    namespace=st.text(st.characters(exclude_categories=["Cs"]), max_size=30),
    space=st.text(st.characters(exclude_categories=["Cs"]), max_size=30),
)
def test_what_was_packed_is_read_back(stored, namespace, space):
    """Record, time and partition, whatever the names are."""
    partition = Partition(namespace, space, 3)
    found = unpack(pack(record.encode(ENTRY), stored, partition))
    assert found == SharedRecord(record.encode(ENTRY), round(stored * 1000) / 1000, partition)


def test_names_that_are_too_long_are_not_kept():
    """They would have no room for their length."""
    assert pack(b"", 1.0, Partition("n" * 65_536, "s", 3)) is None


@given(place=st.integers(0, len(VALUE) - 1), flip=st.integers(1, 255))
def test_no_changed_byte_is_served(place, flip):
    """Of the time and the names neither: they decide whether, and to whom, a record is served."""
    assert served(VALUE) == ENTRY
    spoilt = bytearray(VALUE)
    spoilt[place] ^= flip
    assert served(bytes(spoilt)) is None


@given(st.binary(max_size=200) | st.integers(0, len(VALUE) - 1).map(lambda end: VALUE[:end]))
def test_nothing_else_is_served(value):
    """Bytes of any length, and a value that was cut, are none."""
    assert served(value) is None


@pytest.mark.parametrize(
    ("numbers", "is_rounded"),
    [
        ([0.1, -0.2, 0.97], True),
        ([1.0, 0.0, 0.0], True),
        ([1e-30, 0.0, 1e-20], False),
        ([1e6, 1.0, 1.0], False),
    ],
)
def test_half_precision_is_left_out_where_it_leaves_no_vector(numbers, is_rounded):
    """16 bits hold no number beyond 65,504, and round tiny ones to zero: then 32 bits are kept."""
    vector = np.array(numbers, "<f4")
    entry = ENTRY._replace(vector=vector.tobytes())
    half = record.encode(entry, is_float16=True)
    assert len(half) == len(record.encode(entry)) - (6 if is_rounded else 0)
    found = record.decode(half, DIGEST, 3)
    assert np.array_equal(
        np.frombuffer(found.vector, "<f4"),
        vector.astype("<f2").astype("<f4") if is_rounded else vector,
    )
    assert (found.tokens, found.counted) == (7, True)
    assert not record.is_damaged(half, DIGEST)
    assert record.width(half) == 3
    assert record.decode(half, DIGEST, 2) is None
    assert record.decode(half[:-1], DIGEST, 3) is None
