"""Records: what comes out is what went in, or nothing."""

import struct

import pytest
from embedding_proxy.cache.key import FORMAT, checksum
from embedding_proxy.cache.record import Entry, decode, encode
from hypothesis import given, settings
from hypothesis import strategies as st

DIGEST = bytes(range(16))
ENTRY = Entry(struct.pack("<3f", 1.0, -0.5, 0.25), 7, counted=True, digest=DIGEST)
RECORD = encode(ENTRY)


def _sealed(body):
    return body + checksum(body)


def _patched(offset, data):
    """Return the record with some bytes replaced and the checksum made anew."""
    body = RECORD[:-8]
    return _sealed(body[:offset] + data + body[offset + len(data) :])


@settings(deadline=None)
@given(
    st.integers(0, 40).flatmap(lambda d: st.binary(min_size=4 * d, max_size=4 * d)),
    st.integers(0, (1 << 32) - 1),
    st.booleans(),
    st.binary(min_size=16, max_size=16),
)
def test_a_record_gives_its_entry_back(vector, tokens, counted, digest):
    """Any vector, NaN and all, any count and any digest come back bit for bit."""
    entry = Entry(vector, tokens, counted, digest)
    found = decode(encode(entry), digest, len(vector) // 4)
    assert found == entry
    assert type(found.counted) is bool


def test_every_flipped_bit_is_seen():
    """No record with one bit flipped, in any of its bytes, gives an entry."""
    number = int.from_bytes(RECORD, "little")
    flipped = [(number ^ 1 << i).to_bytes(len(RECORD), "little") for i in range(8 * len(RECORD))]
    assert decode(RECORD, DIGEST, 3) == ENTRY
    assert [i for i, record in enumerate(flipped) if decode(record, DIGEST, 3)] == []


@pytest.mark.parametrize("dimensions", [0, 2, 3, 4])
def test_every_cut_record_is_refused(dimensions):
    """However much is missing at either end, and whatever width is asked for, nothing comes out."""
    for end in range(len(RECORD)):
        assert decode(RECORD[:end], DIGEST, dimensions) is None
        assert decode(RECORD[end + 1 :], DIGEST, dimensions) is None


@settings(deadline=None)
@given(st.binary(min_size=1, max_size=20), st.integers(0, 8))
def test_every_extended_record_is_refused(more, dimensions):
    """Bytes before or after a record are not overlooked."""
    assert decode(RECORD + more, DIGEST, dimensions) is None
    assert decode(more + RECORD, DIGEST, dimensions) is None


@settings(deadline=None)
@given(st.binary(max_size=100), st.integers(0, 8))
def test_noise_is_refused(noise, dimensions):
    """Bytes that never were a record are a miss and no error, also with a right checksum."""
    assert decode(noise, DIGEST, dimensions) is None
    assert decode(_sealed(noise), DIGEST, dimensions) is None


@settings(deadline=None)
@given(st.binary(min_size=16, max_size=16).filter(lambda digest: digest != DIGEST))
def test_a_record_about_something_else_is_refused(digest):
    """An undamaged record gives nothing to one who asks with another digest."""
    assert decode(RECORD, digest, 3) is None


@pytest.mark.parametrize("dimensions", [0, 1, 2, 4, 6, 1536])
def test_a_record_of_another_width_is_refused(dimensions):
    """A vector never comes out in another width than was asked for."""
    assert decode(RECORD, DIGEST, dimensions) is None


@pytest.mark.parametrize(
    ("offset", "data"),
    [
        pytest.param(0, b"EMBW", id="magic"),
        pytest.param(4, bytes([FORMAT + 1]), id="later version"),
        pytest.param(4, bytes([FORMAT - 1]), id="earlier version"),
        pytest.param(5, b"\x00", id="no dtype"),
        pytest.param(5, b"\x02", id="other dtype"),
        pytest.param(8, struct.pack("<I", 4), id="width in the header"),
        pytest.param(8, struct.pack(">I", 3), id="width in the wrong byte order"),
        pytest.param(16, DIGEST[::-1], id="digest"),
    ],
)
def test_a_header_that_says_something_else_is_refused(offset, data):
    """Another format is not read as this one, even when its checksum is right."""
    assert decode(_patched(offset, data), DIGEST, 3) is None


@pytest.mark.parametrize("size", [0, 1, 8, 11, 13, 16, 24])
def test_a_vector_of_another_length_than_the_header_says_is_refused(size):
    """A record must be as long as its width makes it, even when its checksum is right."""
    forged = _sealed(RECORD[:32] + bytes(size))
    assert decode(forged, DIGEST, 3) is None
    assert decode(forged, DIGEST, size // 4) is None


def test_a_patched_record_with_nothing_changed_is_read():
    """The refusals above come from what was changed, not from the new checksum."""
    assert decode(_patched(0, b"EMBV"), DIGEST, 3) == ENTRY


def test_tokens_and_their_kind_do_not_run_together():
    """Counted and apportioned tokens, and each number of them, make records of their own."""
    entries = [ENTRY._replace(tokens=t, counted=c) for t in (0, 1, 256) for c in (False, True)]
    assert len({encode(entry) for entry in entries}) == len(entries)
    assert [decode(encode(entry), DIGEST, 3) for entry in entries] == entries


def test_a_record_is_40_bytes_more_than_its_vector():
    """The store's arithmetic of records a page rests on this size."""
    assert len(encode(ENTRY._replace(vector=bytes(4 * 1536)))) == 4 * 1536 + 40
