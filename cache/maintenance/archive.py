"""Rows <-> one file that is carried from store to store. Pure.

An archive is a sequence of frames, written and read as a stream; `cat a b > c` makes one of two.

    offset  size  field of a frame
         0     4  magic "EMBA"
         4     1  type
         5     4  length of the payload, at most 1 MiB
         9     n  payload
       9+n     8  XXH3-64 of all the above

    type  payload
       1  start: format version (4)
       2  partition: JSON, {"namespace": …, "space": …, "dimensions": …}, or null: not known
       3  entry: seconds since 1970 (8, float64), address (16), XXH3-64 of its partition's JSON (8),
          record (see `record`)
       4  end: number of entries since the start (8)

All numbers are little-endian, all integers unsigned. A partition stands before the first entry that
names it, and again before the first that does so in each further 256 entries; one that was lost is
never mistaken for another. A later version gives a frame that means something else a new type: its
frames are understood, or not, whether or not its start was lost.

Where no whole frame is, the reader looks for the next one, so damage costs the frames it hit and no
other. A checksum finds damage, not malice.
"""

import math
import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import BinaryIO

import orjson
from embedding_proxy.cache.key import checksum
from embedding_proxy.cache.record import vector_of, width
from embedding_proxy.cache.row import Partition, Row
from embedding_proxy.providers.lru_cache import LRUCache
from embedding_proxy.providers.vector import is_finite

FORMAT = 1
"""Version of the bytes described above."""
MOST_BYTES = 1 << 20
"""Longest payload; a record of 65,536 dimensions takes a quarter. Bounds what is read ahead."""
_RENEWED_ENTRIES = 256
_CHUNK = 1 << 18

_MAGIC = b"EMBA"
_HEADER = struct.Struct("<4sBI")
_CHECKSUM = 8
_AROUND = _HEADER.size + _CHECKSUM
_ENTRY_HEADER = struct.Struct("<d16s8s")
_START, _PARTITION, _ENTRY, _ARCHIVE_END = 1, 2, 3, 4


class ArchiveError(Exception):
    """What was given is no archive, or one of a later format; the message is for the user."""


@dataclass
class Report:
    """What reading an archive came to."""

    entries: int = 0
    """Whole entries, all of them handed out."""
    damaged_bytes: int = 0
    damaged_places: int = 0
    """Stretches of damage, and whole frames that hold a damaged record or nothing known."""
    missing: int = 0
    """Entries that were promised and not seen, at least: who lost the end lost its promise."""
    complete: bool = False
    """Whether all that was written is here; False until the archive has been read to its end."""

    def damage(self, size: int) -> None:
        """Count one more damaged place."""
        self.damaged_places += 1
        self.damaged_bytes += size


def write(file: BinaryIO, rows: Iterable[Row]) -> int:
    """Write an archive and return the number of its entries. Flushes and closes nothing.

    Raises ValueError for a row that would not come back as it is. If `rows` raises, the end is not
    written, and what is there will be read as incomplete.
    """
    count = 0
    references: dict[Partition | None, bytes] = {}
    file.write(_framed(_START, struct.pack("<I", FORMAT)))
    for address, record, stored, partition in rows:
        if len(address) != 16:
            raise ValueError(f"An address has 16 bytes, not {len(address)}.")
        if count % _RENEWED_ENTRIES == 0:
            references.clear()
        if partition not in references:
            text = orjson.dumps(partition and partition._asdict())
            file.write(_framed(_PARTITION, text))
            references[partition] = checksum(text)
        head = _ENTRY_HEADER.pack(stored, address, references[partition])
        file.write(_framed(_ENTRY, head + record))
        count += 1
    file.write(_framed(_ARCHIVE_END, struct.pack("<Q", count)))
    return count


def read(file: BinaryIO, report: Report) -> Iterator[Row]:
    """Yield the row of every whole entry, and fill the report meanwhile.

    A row comes out as it was written, or not at all; only its partition may have become None. The
    file is read forward, to its end. Raises ArchiveError if not one frame is whole, as soon as a
    later format begins, and at a whole frame that no release can have written: a vector without
    numbers or with one that is not finite, a width below 1, a time that is not finite.
    """
    known = LRUCache[bytes, tuple[Partition | None]](_RENEWED_ENTRIES)
    kind, begun, whole, seen = None, False, True, 0
    for kind, payload in _frames(file, report):
        # A loss that ends where frames end leaves no damage behind.
        whole &= begun == (kind != _START)
        if kind == _START:
            _check_version(payload)
            begun, seen = True, 0
        elif kind == _ARCHIVE_END:
            promised = int.from_bytes(payload, "little")
            whole &= seen == promised
            report.missing += max(0, promised - seen)
            begun, seen = False, 0
        elif kind == _ENTRY:
            seen += 1
            record = payload[_ENTRY_HEADER.size :]
            if width(record) is None:
                report.damage(_AROUND + len(payload))
                continue
            stored, address, reference = _ENTRY_HEADER.unpack_from(payload)
            _check_entry(report.entries + 1, record, stored)
            partition = known.get(reference)
            whole &= partition is not None
            report.entries += 1
            yield Row(address, record, stored, partition and partition[0])
        elif kind != _PARTITION or not _learn(payload, known):
            report.damage(_AROUND + len(payload))
    if kind is None:
        raise ArchiveError("This is no archive of embeddings, or nothing of it is left.")
    report.complete = whole and not begun and not report.damaged_places


def _framed(kind: int, payload: bytes) -> bytes:
    if len(payload) > MOST_BYTES:
        raise ValueError(f"A frame holds no {len(payload)} bytes.")
    body = _HEADER.pack(_MAGIC, kind, len(payload)) + payload
    return body + checksum(body)


def _check_version(payload: bytes) -> None:
    version = int.from_bytes(payload[:4], "little")
    if version > FORMAT:
        raise ArchiveError(f"The archive has format {version}; this release reads {FORMAT} only.")


def _check_entry(number: int, record: bytes, stored: float) -> None:
    """Raise ArchiveError for an entry that no release writes, though it is not damaged."""
    problem = None
    if width(record) == 0:
        problem = "its vector holds no number"
    elif not is_finite(vector_of(record)):
        problem = "its vector holds a number that is not finite"
    elif not math.isfinite(stored):
        problem = "the time when it was stored is not finite"
    if problem is not None:
        raise ArchiveError(f"Entry {number:,} of the archive cannot be used: {problem}.")


def _learn(text: bytes, known: LRUCache[bytes, tuple[Partition | None]]) -> bool:
    """Remember a partition under its reference, in a tuple; return whether it was one."""
    found = None
    try:
        match orjson.loads(text):
            case {"namespace": str(namespace), "space": str(space), "dimensions": int(dimensions)}:
                if dimensions < 1:
                    raise ArchiveError(
                        f"The archive cannot be used: it names vectors of {dimensions} dimensions."
                    )
                found = Partition(namespace, space, dimensions)
            case said if said is not None:
                return False
    except orjson.JSONDecodeError:
        return False
    known[checksum(text)] = (found,)
    return True


def _frames(file: BinaryIO, report: Report) -> Iterator[tuple[int, bytes]]:
    """Yield type and payload of every whole frame; count what lies between them as damage."""
    ahead = _Ahead(file)
    skipped = 0
    while ahead.has(1):
        frame = ahead.frame()
        if frame is None:
            skipped += ahead.skip()
            continue
        if skipped:
            report.damage(skipped)
            skipped = 0
        yield frame
    if skipped:
        report.damage(skipped)


class _Ahead:
    """What was read of a file and not yet used: at most a frame and a chunk."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._data = b""
        self._at = 0

    def has(self, size: int) -> bool:
        """Read on until `size` bytes lie ahead; return whether the file has them."""
        while len(self._data) - self._at < size:
            more = self._file.read(_CHUNK)
            if not more:
                return False
            self._data, self._at = self._data[self._at :] + more, 0
        return True

    def frame(self) -> tuple[int, bytes] | None:
        """Take the frame that begins here; None if none does, or if it is not whole."""
        if not self.has(_HEADER.size):
            return None
        magic, kind, length = _HEADER.unpack_from(self._data, self._at)
        if magic != _MAGIC or length > MOST_BYTES or not self.has(_AROUND + length):
            return None
        start = self._at + _HEADER.size
        end = start + length
        if checksum(memoryview(self._data)[self._at : end]) != self._data[end : end + _CHECKSUM]:
            return None
        self._at = end + _CHECKSUM
        return kind, self._data[start:end]

    def skip(self) -> int:
        """Go on to where a frame may begin; return the number of bytes passed over."""
        start = self._at
        found = self._data.find(_MAGIC, start + 1)
        # The last three bytes may be the beginning of a magic that is not yet read whole.
        self._at = found if found >= 0 else max(start + 1, len(self._data) - len(_MAGIC) + 1)
        return self._at - start
