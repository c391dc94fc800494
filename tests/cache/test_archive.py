"""Archives: only what was put in comes out, however the file was treated; what is lost is told."""

import io
import os
import re
import struct
import tracemalloc

import pytest
from embedding_proxy.cache.key import Partition, Row, checksum
from embedding_proxy.cache.maintenance.archive import (
    FORMAT,
    MAX_PAYLOAD_BYTES,
    ArchiveError,
    ArchiveReport,
    read,
    write,
)
from embedding_proxy.cache.record import Entry, encode
from hypothesis import given, settings
from hypothesis import strategies as st

HERE = Partition("", "openai/text-embedding-3-small", 2)
THERE = Partition("tenant ü", "m?task=%22a%22", 3)


def _row(number, partition=HERE, dimensions=2):
    vector = struct.pack("<I", number) * dimensions
    entry = Entry(vector, number % 7, counted=True, digest=number.to_bytes(16, "big"))
    return Row(number.to_bytes(16, "little"), encode(entry), 1.7e9 + number / 8, partition)


def _archive(*rows):
    file = io.BytesIO()
    assert write(file, iter(rows)) == len(rows)
    return file.getvalue()


def _read(data):
    report = ArchiveReport()
    return list(read(io.BytesIO(data), report)), report


def _frame(kind, payload):
    body = b"EMBA" + bytes([kind]) + struct.pack("<I", len(payload)) + payload
    return body + checksum(body)


def _split(data):
    """Return the frames of an undamaged archive."""
    frames = []
    while data:
        size = 9 + int.from_bytes(data[5:9], "little") + 8
        frames.append(data[:size])
        data = data[size:]
    return frames


ROWS = [_row(1), _row(2, THERE, 3), _row(3), _row(4, None, 1), _row(5, THERE, 3)]
SMALL = _archive(*ROWS)
FRAMES = _split(SMALL)
KINDS = [frame[4] for frame in FRAMES]
START, PARTITION, ENTRY, END = 1, 2, 3, 4
ROW_OF = dict(zip([f for f in FRAMES if f[4] == ENTRY], ROWS, strict=True))
ANY_FRAME = re.compile(b"|".join(re.escape(frame) for frame in FRAMES))


def _expected(data):
    """Return what must come of any bytes: rows, damaged bytes, damaged places; None if nothing.

    It knows the frames by heart, and looks for them everywhere.
    """
    rows, seen, end, gaps = [], set(), 0, []
    for match in ANY_FRAME.finditer(data):
        frame = match.group()
        gaps.append(match.start() - end)
        end = match.end()
        if frame[4] == PARTITION:
            seen.add(checksum(frame[9:-8]))
        elif frame[4] == ENTRY:
            row = ROW_OF[frame]
            rows.append(row if frame[33:41] in seen else row._replace(partition=None))
    gaps.append(len(data) - end)
    return (rows, sum(gaps), sum(gap > 0 for gap in gaps)) if end else None


def _check(data):
    """Read any bytes, compare with what is expected of them, and return the report."""
    expected = _expected(data)
    if expected is None:
        with pytest.raises(ArchiveError):
            _read(data)
        return ArchiveReport()
    rows, report = _read(data)
    assert (rows, report.damaged_bytes, report.damaged_places) == expected
    assert report.entries == len(rows)
    return report


def test_an_archive_has_these_bytes():
    """Version 1 is written as these bytes, and these bytes are read; CI jobs carry them."""
    address = "000102030405060708090a0b0c0d0e0f"
    record = (
        "454d4256 01 01 01 00 04000000 03000000 721cd1e4c4be572ab3424c96464a1f10"
        " 0000803f 000000bf 0000803e cdcccc3d 5927df334241b465"
    )
    archive = (
        "454d4241 01 04000000  01000000  50185071003dd925"
        "454d4241 02 2c000000"
        "  7b226e616d657370616365223a2261222c227370616365223a226d222c2264696d656e73696f6e73223a347d"
        "  03c2a60808a6bad1"
        f"454d4241 03 58000000  000000000000f83f {address} 2145905503f15380 {record}"
        "  1e2ceeb1705f1775"
        "454d4241 02 04000000  6e756c6c  7f1627956aaf5677"
        f"454d4241 03 58000000  000000000000f83f {address} b785b6ec423c44e1 {record}"
        "  f5959b260ae15f68"
        "454d4241 04 08000000  0200000000000000  f2933d35ef297019"
    )
    partition = Partition("a", "m", 4)
    rows = [
        Row(bytes.fromhex(address), bytes.fromhex(record), 1.5, known)
        for known in (partition, None)
    ]
    assert _archive(*rows).hex() == archive.replace(" ", "")
    assert _read(bytes.fromhex(archive)) == (rows, ArchiveReport(entries=2, complete=True))


partitions = st.none() | st.builds(
    Partition, st.text(max_size=5), st.text(max_size=5), st.integers(1, 65536)
)
rows_of_any_sort = st.lists(
    st.builds(
        Row,
        st.binary(min_size=16, max_size=16),
        st.integers(1, 9).map(lambda number: _row(number, dimensions=number).record),
        st.floats(allow_nan=False, allow_infinity=False),
        partitions,
    ),
    max_size=8,
)


@pytest.mark.untraced
@settings(deadline=None)
@given(st.lists(rows_of_any_sort, min_size=1, max_size=3))
def test_rows_come_back(lists):
    """Any rows come back as they were and in their order, from one archive or several in a row."""
    rows, report = _read(b"".join(_archive(*rows) for rows in lists))
    assert rows == [row for rows in lists for row in rows]
    assert report == ArchiveReport(entries=len(rows), complete=True)


def test_all_the_small_archive_has():
    """The archive of the tests below holds each kind of frame, and each partition once."""
    assert KINDS == [START, PARTITION, ENTRY, PARTITION, ENTRY, ENTRY, PARTITION, ENTRY, ENTRY, END]
    assert _read(SMALL) == (ROWS, ArchiveReport(entries=5, complete=True))
    assert _expected(SMALL) == (ROWS, 0, 0)


def test_a_cut_file_gives_its_whole_entries():
    """Cut anywhere, at either end, the rest gives what is whole in it, and is called incomplete."""
    for at in range(1, len(SMALL)):
        assert not _check(SMALL[:at]).complete
        assert not _check(SMALL[at:]).complete


@pytest.mark.untraced
def test_a_flipped_bit_costs_one_frame():
    """One bit flipped, any of them: all other frames are read, and the damage is noted."""
    for at in range(len(SMALL)):
        for bit in range(8):
            data = bytearray(SMALL)
            data[at] ^= 1 << bit
            report = _check(bytes(data))
            assert report.damaged_places == 1
            assert not report.complete


def test_a_byte_too_many_or_too_few_costs_one_frame():
    """One byte removed, doubled or put in, anywhere: all other frames are read."""
    for at in range(len(SMALL)):
        for between in (b"", SMALL[at : at + 1] * 2, b"E" + SMALL[at : at + 1]):
            report = _check(SMALL[:at] + between + SMALL[at + 1 :])
            assert report.damaged_places == 1
            assert not report.complete


pieces = st.binary(max_size=20) | st.builds(
    lambda start, size: SMALL[start : start + size],
    st.integers(0, len(SMALL) - 1) | st.sampled_from([0, *(SMALL.index(f) for f in FRAMES)]),
    st.integers(0, 300) | st.just(len(SMALL)),
)
edits = st.lists(st.tuples(st.integers(0, len(SMALL)), st.integers(0, 200), pieces), max_size=6)


@pytest.mark.untraced
@settings(deadline=None, max_examples=400)
@given(edits)
def test_whatever_is_whole_is_read(changes):
    """However bytes are removed, put in and doubled, all whole frames are read, and no others."""
    data = SMALL
    for at, removed, added in changes:
        data = data[:at] + added + data[at + removed :]
    report = _check(data)
    if data == SMALL:
        assert report.complete
    assert not (report.complete and report.damaged_places)


@pytest.mark.parametrize("lost", range(len(FRAMES)))
def test_a_frame_lost_without_a_trace_is_noticed(lost):
    """A frame that is gone to its last byte leaves an archive that is incomplete."""
    report = _check(b"".join(FRAMES[:lost] + FRAMES[lost + 1 :]))
    assert not report.complete
    assert report.damaged_places == 0
    assert report.missing == (KINDS[lost] == ENTRY)


def test_what_is_missing_is_counted_over_all_archives():
    """Every end says how many entries it promised; those not seen add up."""
    entries = [i for i, kind in enumerate(KINDS) if kind == ENTRY]
    less_one = b"".join(f for i, f in enumerate(FRAMES) if i not in entries[:1])
    less_two = b"".join(f for i, f in enumerate(FRAMES) if i not in entries[:2])
    assert _check(less_one + SMALL + less_two).missing == 3
    # Also when the archive before lacks its end, or this one its start; and never less than none.
    assert _check(b"".join(FRAMES[:-1]) + less_one).missing == 1
    assert _check(SMALL + less_one[len(FRAMES[0]) :]).missing == 1
    assert _check(b"".join(FRAMES[:-1] + FRAMES[1:])).missing == 0


@pytest.mark.parametrize("cut", [1, len(FRAMES[-1]), len(SMALL) - 60])
def test_a_cut_archive_before_a_whole_one_is_noticed(cut):
    """An archive that lacks its end is incomplete, also when a whole one follows."""
    report = _check(SMALL[:-cut] + SMALL)
    assert not report.complete
    assert report.entries >= 5


def test_an_archive_without_entries_is_one():
    """A cache that holds nothing makes an archive that holds nothing, and is complete."""
    assert _read(_archive()) == ([], ArchiveReport(complete=True))


def test_rows_that_fail_leave_an_incomplete_archive():
    """When the store fails halfway, no end is written that would call the half a whole."""

    def rows():
        yield ROWS[0]
        raise OSError

    file = io.BytesIO()
    with pytest.raises(OSError, match=r"^$"):
        write(file, rows())
    assert _read(file.getvalue()) == (ROWS[:1], ArchiveReport(entries=1))


def test_a_report_is_incomplete_until_the_end_is_read():
    """Who stops reading early has not seen that all is well."""
    report = ArchiveReport()
    assert next(read(io.BytesIO(SMALL), report)) == ROWS[0]
    assert report == ArchiveReport(entries=1)


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(b"", id="empty"),
        pytest.param(b"E", id="one byte"),
        pytest.param(b"SQLite format 3\0" * 100, id="another file"),
        pytest.param(SMALL[: len(FRAMES[0]) - 1], id="beginning of a frame"),
        pytest.param(SMALL[1 : len(FRAMES[0])], id="end of a frame"),
        pytest.param(b"EMBX" + FRAMES[0][4:-8] + checksum(b"EMBX" + FRAMES[0][4:-8]), id="magic"),
    ],
)
def test_what_is_no_archive_is_refused(data):
    """A file that holds no whole frame is refused with a line for the user."""
    with pytest.raises(ArchiveError, match=r"^This is no archive of embeddings[^\n]*\.$"):
        _read(data)


@pytest.mark.parametrize("more", [b"", b"what version 2 adds"])
def test_a_newer_archive_is_refused(more):
    """An archive of a later format is refused by its number, also after one that is read."""
    newer = _frame(START, struct.pack("<I", FORMAT + 1) + more) + b"".join(FRAMES[1:])
    with pytest.raises(ArchiveError, match=r"^The archive has format 2; this release reads 1 only"):
        _read(newer)
    report = ArchiveReport()
    rows = read(io.BytesIO(SMALL + newer), report)
    assert [next(rows) for _ in ROWS] == ROWS
    with pytest.raises(ArchiveError, match="format 2"):
        next(rows)
    assert not report.complete


@pytest.mark.parametrize(
    ("kind", "payload"),
    [
        pytest.param(0, b"", id="type 0"),
        pytest.param(5, b"later", id="a later type"),
        pytest.param(5, b"null", id="a later type that reads like a partition"),
        pytest.param(PARTITION, b"", id="no JSON"),
        pytest.param(PARTITION, b'{"namespace": "\xff"}', id="no text"),
        pytest.param(PARTITION, b"[]", id="no object"),
        pytest.param(PARTITION, b"0", id="a number"),
        pytest.param(PARTITION, b'{"namespace":"","space":"m"}', id="no dimensions"),
        pytest.param(PARTITION, b'{"namespace":"","space":"m","dimensions":"1"}', id="no number"),
        pytest.param(PARTITION, b'{"namespace":1,"space":"m","dimensions":1}', id="no name"),
        pytest.param(ENTRY, b"", id="empty entry"),
        pytest.param(ENTRY, bytes(31), id="short entry"),
        pytest.param(ENTRY, bytes(32), id="entry without a record"),
        pytest.param(ENTRY, bytes(32) + ROWS[0].record[:-1], id="entry with half a record"),
    ],
)
def test_a_frame_that_says_nothing_known_is_passed_over(kind, payload):
    """A whole frame that this version cannot make sense of is one damaged place."""
    strange = _frame(kind, payload)
    rows, report = _read(strange + SMALL + strange)
    assert rows == ROWS
    assert (report.damaged_places, report.damaged_bytes) == (2, 2 * len(strange))
    assert not report.complete


def test_a_record_that_was_exported_damaged_is_passed_over():
    """A record whose own checksum is wrong is no row; it is damaged, and not missing."""
    bad = ROWS[1]._replace(record=ROWS[1].record[:-1] + b"\0")
    rows, report = _read(_archive(ROWS[0], bad, ROWS[2]))
    assert rows == [ROWS[0], ROWS[2]]
    assert (report.entries, report.damaged_places, report.missing) == (2, 1, 0)
    assert not report.complete


def test_an_entry_whose_partition_was_lost_belongs_to_none():
    """Without its partition's frame an entry comes out as not known to belong anywhere."""
    damaged = [f[:-1] if f[4] == PARTITION and b"tenant" in f else f for f in FRAMES]
    rows, report = _read(b"".join(damaged))
    lost = [row._replace(partition=None) if row.partition == THERE else row for row in ROWS]
    assert rows == lost
    assert report.damaged_places == 1


def test_a_lost_partition_costs_256_entries_at_most():
    """A partition is written anew, so that a damaged one does not cost all its entries theirs."""
    rows = [_row(number) for number in range(600)]
    frames = _split(_archive(*rows))
    assert [i for i, f in enumerate(frames) if f[4] == PARTITION] == [1, 258, 515]
    found, _ = _read(b"".join(frames[:1] + frames[2:]))
    assert found == [row._replace(partition=None) for row in rows[:256]] + rows[256:]


def test_any_number_of_partitions_may_take_turns():
    """Entries keep their partitions, however many those are and in whatever order they come."""
    turns = [*range(256), 0, 256, 0, *range(257, 500), 256, 0, 499, *range(300), 1, 0]
    rows = [_row(i, HERE._replace(dimensions=turn + 1)) for i, turn in enumerate(turns)]
    assert _read(_archive(*rows)) == (rows, ArchiveReport(entries=len(rows), complete=True))


@pytest.mark.parametrize(
    "row",
    [
        pytest.param(ROWS[0]._replace(address=bytes(15)), id="short address"),
        pytest.param(ROWS[0]._replace(address=bytes(17)), id="long address"),
        pytest.param(ROWS[0]._replace(record=bytes(MAX_PAYLOAD_BYTES - 31)), id="long record"),
        pytest.param(
            ROWS[0]._replace(partition=Partition("n" * MAX_PAYLOAD_BYTES, "", 1)), id="long name"
        ),
    ],
)
def test_a_row_that_would_not_come_back_is_not_written(row):
    """What has no place in the format is refused before it is written, not mended."""
    with pytest.raises(ValueError, match="bytes"):
        _archive(row)


def test_the_longest_payload_is_read():
    """What may be written is read, up to the last byte of the limit."""
    longest = ROWS[0]._replace(record=_row(1, dimensions=(MAX_PAYLOAD_BYTES - 32 - 40) // 4).record)
    rows = [ROWS[0], longest, ROWS[2]]
    assert len(longest.record) == MAX_PAYLOAD_BYTES - 32
    assert _read(_archive(*rows)) == (rows, ArchiveReport(entries=3, complete=True))


class Stream:
    """A stream that can only be read on, a few bytes at a time, and that counts them."""

    def __init__(self, data, most, zeros=0):
        self._file = io.BytesIO(data)
        self._most = most
        self._zeros = zeros
        self.given = 0

    def read(self, size):
        piece = self._file.read(min(size, self._most))
        if not piece and self._zeros:
            piece = bytes(min(size, self._zeros))
            self._zeros -= len(piece)
        self.given += len(piece)
        return piece


@pytest.mark.parametrize("most", [1, 2, 3, 5, 8, 64, 1000])
def test_a_stream_may_give_little_at_a_time(most):
    """Where the pieces of a stream end makes no difference, not even in what is damaged."""
    data = SMALL[40:] + b"EMB" + SMALL + b"EMB"
    expected = _read(data)
    report = ArchiveReport()
    assert (list(read(Stream(data, most), report)), report) == expected
    assert report.damaged_places == 3


def test_a_pipe_is_read_and_written():
    """An archive goes through a pipe, where nobody can seek."""
    source, sink = os.pipe()
    with open(source, "rb") as reader, open(sink, "wb") as writer:  # noqa: PTH123
        write(writer, ROWS)
        writer.close()
        assert list(read(reader, report := ArchiveReport())) == ROWS
    assert report.complete


@pytest.mark.parametrize("length", [MAX_PAYLOAD_BYTES, MAX_PAYLOAD_BYTES + 1, (1 << 32) - 1])
def test_a_damaged_length_does_not_read_far_ahead(length):
    """What follows a length that is wrong is found, before much more than a frame was read."""
    zeros = 16 * MAX_PAYLOAD_BYTES
    data = b"EMBA" + bytes([ENTRY]) + struct.pack("<I", length) + SMALL
    stream = Stream(data, 1 << 30, zeros)
    report = ArchiveReport()
    rows = read(stream, report)
    assert next(rows) == ROWS[0]
    assert stream.given < 2 * MAX_PAYLOAD_BYTES
    assert list(rows) == ROWS[1:]
    assert (report.damaged_bytes, report.damaged_places) == (9 + zeros, 2)


def test_memory_stays_bounded(tmp_path):
    """Neither many entries, nor many partitions, nor much damage pile up, written or read."""

    def rows():
        for i in range(2000):
            yield _row(i, HERE._replace(namespace=f"{i:5000}"), 1500)

    path = tmp_path / "archive"
    tracemalloc.start()
    try:
        with path.open("wb") as file:
            write(file, rows())
            for _ in range(20):
                file.write(bytes(MAX_PAYLOAD_BYTES))
        with path.open("rb") as file:
            assert sum(1 for _ in read(file, ArchiveReport())) == 2000
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert path.stat().st_size > 40 * MAX_PAYLOAD_BYTES
    assert peak < 8 * MAX_PAYLOAD_BYTES
