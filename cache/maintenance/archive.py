"""Archives: the rows of a store in one file, and their way out of a store and into another.

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

After damage the reader looks for the next whole frame, so damage costs no frame but those it hit. A
checksum finds damage, not malice.

`write` and `read` are pure. `export_rows` and `import_rows` work on a store in batches, each a read
or a transaction of its own, so a running proxy goes on meanwhile. Only whole rows are copied, and
no row of a store is replaced, except a damaged one.
"""

import math
import struct
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import BinaryIO

import orjson
from embedding_proxy.cache import record
from embedding_proxy.cache.disk.database import Database
from embedding_proxy.cache.disk.purge import PurgeFilter, where
from embedding_proxy.cache.disk.read_only import ReadableFile
from embedding_proxy.cache.disk.write_batch import PendingRecord, WriteBatch
from embedding_proxy.cache.key import Partition, Row, checksum
from embedding_proxy.providers.lru_cache import LRUCache
from embedding_proxy.providers.vector import is_finite

from .short_reads import MAX_ID, id_ranges

FORMAT = 1
"""Version of the format described above."""
MAX_PAYLOAD_BYTES = 1 << 20
"""Bound of a payload, and so of the read-ahead; a record of 65,536 dimensions takes a quarter."""
_RENEWED_ENTRIES = 256
_CHUNK = 1 << 18

_MAGIC = b"EMBA"
_HEADER = struct.Struct("<4sBI")
_CHECKSUM = 8
_OVERHEAD = _HEADER.size + _CHECKSUM
_ENTRY_HEADER = struct.Struct("<d16s8s")
_START, _PARTITION, _ENTRY, _END = 1, 2, 3, 4

ROWS_A_BATCH = 500
ENTRIES_A_RANGE = 20_000
RECORD_COLUMNS = (
    "CASE typeof(key) WHEN 'blob' THEN key END, raw, mode,"
    " CASE typeof(value) WHEN 'blob' THEN value END"
)
"""A text that is not valid UTF-8 would end the query, so only blobs are read."""


class ArchiveError(Exception):
    """The file is no archive, or one of a later format; the message is for the user."""


@dataclass
class ArchiveReport:
    """The result of reading an archive."""

    entries: int = 0
    """Whole entries; all were yielded."""
    damaged_bytes: int = 0
    damaged_places: int = 0
    """Runs of damaged bytes, and whole frames with a damaged record or of an unknown type."""
    missing: int = 0
    """Entries that end frames count and that were not found, at least: end frames may be lost."""
    complete: bool = False
    """Whether every written entry was found; False until the archive is read to its end."""

    def damage(self, size: int) -> None:
        """Count one more damaged place."""
        self.damaged_places += 1
        self.damaged_bytes += size


def write(file: BinaryIO, rows: Iterable[Row]) -> int:
    """Write an archive and return the number of its entries. Flushes and closes nothing.

    Raises ValueError for a row that `read` would not return unchanged. If `rows` raises, the end is
    not written, and `read` reports the archive as incomplete.
    """
    count = 0
    references: dict[Partition | None, bytes] = {}
    file.write(_frame_of(_START, struct.pack("<I", FORMAT)))
    for address, raw, stored, partition in rows:
        if len(address) != 16:
            raise ValueError(f"An address has 16 bytes, not {len(address)}.")
        if count % _RENEWED_ENTRIES == 0:
            references.clear()
        if partition not in references:
            text = orjson.dumps(partition and partition._asdict())
            file.write(_frame_of(_PARTITION, text))
            references[partition] = checksum(text)
        head = _ENTRY_HEADER.pack(stored, address, references[partition])
        file.write(_frame_of(_ENTRY, head + raw))
        count += 1
    file.write(_frame_of(_END, struct.pack("<Q", count)))
    return count


def read(file: BinaryIO, report: ArchiveReport) -> Iterator[Row]:
    """Yield the row of every whole entry, and fill the report meanwhile.

    A row is yielded as it was written, or not at all; only its partition may be None instead. The
    file is read forward, to its end. Raises ArchiveError if no frame is whole, as soon as a later
    format begins, and at a whole frame that no release can have written: a vector without numbers
    or with one that is not finite, a width below 1, a time that is not finite.
    """
    partitions = LRUCache[bytes, tuple[Partition | None]](_RENEWED_ENTRIES)
    kind, has_header, whole, count = None, False, True, 0
    for kind, payload in _frames(file, report):
        # A loss of whole frames leaves no damaged bytes.
        whole &= has_header == (kind != _START)
        if kind == _START:
            _check_version(payload)
            has_header, count = True, 0
        elif kind == _END:
            promised = int.from_bytes(payload, "little")
            whole &= count == promised
            report.missing += max(0, promised - count)
            has_header, count = False, 0
        elif kind == _ENTRY:
            count += 1
            entry = payload[_ENTRY_HEADER.size :]
            if record.width(entry) is None:
                report.damage(_OVERHEAD + len(payload))
                continue
            stored, address, reference = _ENTRY_HEADER.unpack_from(payload)
            _check_entry(report.entries + 1, entry, stored)
            partition = partitions.get(reference)
            whole &= partition is not None
            report.entries += 1
            yield Row(address, entry, stored, partition and partition[0])
        elif kind != _PARTITION or not _note_partition(payload, partitions):
            report.damage(_OVERHEAD + len(payload))
    if kind is None:
        raise ArchiveError("This is no archive of embeddings, or nothing of it is left.")
    report.complete = whole and not has_header and not report.damaged_places


def _frame_of(kind: int, payload: bytes) -> bytes:
    if len(payload) > MAX_PAYLOAD_BYTES:
        raise ValueError(f"A frame holds no {len(payload)} bytes.")
    body = _HEADER.pack(_MAGIC, kind, len(payload)) + payload
    return body + checksum(body)


def _check_version(payload: bytes) -> None:
    version = int.from_bytes(payload[:4], "little")
    if version > FORMAT:
        raise ArchiveError(f"The archive has format {version}; this release reads {FORMAT} only.")


def _check_entry(number: int, entry: bytes, stored: float) -> None:
    """Raise ArchiveError for an undamaged entry that no release writes."""
    problem = None
    if record.width(entry) == 0:
        problem = "its vector holds no number"
    elif not is_finite(record.vector_of(entry)):
        problem = "its vector holds a number that is not finite"
    elif not math.isfinite(stored):
        problem = "the time when it was stored is not finite"
    if problem is not None:
        raise ArchiveError(f"Entry {number:,} of the archive cannot be used: {problem}.")


def _note_partition(text: bytes, partitions: LRUCache[bytes, tuple[Partition | None]]) -> bool:
    """Store a partition under its reference, in a tuple; return whether the text is one."""
    partition = None
    try:
        match orjson.loads(text):
            case {"namespace": str(namespace), "space": str(space), "dimensions": int(dimensions)}:
                if dimensions < 1:
                    raise ArchiveError(
                        f"The archive cannot be used: it names vectors of {dimensions} dimensions."
                    )
                partition = Partition(namespace, space, dimensions)
            case said if said is not None:
                return False
    except orjson.JSONDecodeError:
        return False
    partitions[checksum(text)] = (partition,)
    return True


def _frames(file: BinaryIO, report: ArchiveReport) -> Iterator[tuple[int, bytes]]:
    """Yield type and payload of every whole frame; count the bytes between them as damage."""
    frames = _FrameReader(file)
    skipped = 0
    while frames.has(1):
        frame = frames.frame()
        if frame is None:
            skipped += frames.skip()
            continue
        if skipped:
            report.damage(skipped)
            skipped = 0
        yield frame
    if skipped:
        report.damage(skipped)


class _FrameReader:
    """Finds frames in a file; holds at most one frame and one chunk of it."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._data = b""
        self._at = 0

    def has(self, size: int) -> bool:
        """Read until `size` bytes are in the buffer; return whether the file has them."""
        while len(self._data) - self._at < size:
            data = self._file.read(_CHUNK)
            if not data:
                return False
            self._data, self._at = self._data[self._at :] + data, 0
        return True

    def frame(self) -> tuple[int, bytes] | None:
        """Take the frame that begins here; None if there is none, or if it is not whole."""
        if not self.has(_HEADER.size):
            return None
        magic, kind, length = _HEADER.unpack_from(self._data, self._at)
        if magic != _MAGIC or length > MAX_PAYLOAD_BYTES or not self.has(_OVERHEAD + length):
            return None
        start = self._at + _HEADER.size
        end = start + length
        if checksum(memoryview(self._data)[self._at : end]) != self._data[end : end + _CHECKSUM]:
            return None
        self._at = end + _CHECKSUM
        return kind, self._data[start:end]

    def skip(self) -> int:
        """Skip to where a frame may begin; return the number of bytes skipped."""
        start = self._at
        offset = self._data.find(_MAGIC, start + 1)
        # The last three bytes may be the beginning of a magic that is not yet read whole.
        self._at = offset if offset >= 0 else max(start + 1, len(self._data) - len(_MAGIC) + 1)
        return self._at - start


@dataclass
class ExportReport:
    """The result of reading rows of a store."""

    damaged: int = 0
    """Rows whose record is damaged; they are left out."""


@dataclass
class ImportReport:
    """The result of writing rows into a store."""

    stored: int = 0
    present: int = 0
    """Rows that the store has already, or that came twice."""
    refused: int = 0
    """Rows whose record is damaged."""


def export_rows(database: ReadableFile, choice: PurgeFilter, report: ExportReport) -> Iterator[Row]:
    """Yield the chosen rows that are whole, in the order of the file. Raises FAILURES."""
    condition, values = where(choice)
    if choice == PurgeFilter():
        # Also records without a row of `Entries`.
        tables = "Cache LEFT JOIN Entries ON Entries.id = Cache.rowid"
        ranges = iter([(0, MAX_ID)])
    else:
        # The narrow table is read in ranges: few of its rows may be chosen, and far apart.
        tables = "Entries CROSS JOIN Cache ON Cache.rowid = Entries.id"
        ranges = id_ranges(database, ENTRIES_A_RANGE)
    number = "Cache.rowid" if choice == PurgeFilter() else "Entries.id"
    statement = (
        f"SELECT {number}, {RECORD_COLUMNS},"
        " coalesce(stored / 1000.0, CAST(store_time AS REAL), 0), namespace, space, dimensions"
        f" FROM {tables} LEFT JOIN Partitions ON Partitions.id = partition"
        f" WHERE {number} > :after AND {number} <= :last AND {condition}"
        f" ORDER BY {number} LIMIT {ROWS_A_BATCH}"
    )
    for start, last in ranges:
        after, count = start, ROWS_A_BATCH
        while count == ROWS_A_BATCH:
            rows = database.sql(statement, {**values, "after": after, "last": last}).fetchall()
            count = len(rows)
            for after, key, raw, mode, value, stored, *names in rows:  # noqa: B007 - the last one counts
                width = record.width(value) if is_record(key, raw, mode, value) else None
                if width is None:
                    report.damaged += 1
                    continue
                partition = None if names[1] is None or names[2] != width else Partition(*names)
                yield Row(key, value, stored, partition)


def is_record(key: object, raw: object, mode: object, value: object) -> bool:
    """Tell whether the columns of a row of table `Cache` are those of a record, not a pickle's."""
    return raw == 1 and mode == 1 and type(value) is bytes and type(key) is bytes and len(key) == 16


def import_rows(
    database: ReadableFile, new: Iterable[Row], *, dry_run: bool = False
) -> Iterator[ImportReport]:
    """Write the rows that the store lacks; yield the sums so far after each batch.

    For `dry_run` any readable file will do; else it is a Database. Raises FAILURES, and what `new`
    raises.
    """
    sums = ImportReport()
    for batch in _batches(new):
        now = time.time()
        whole = 0
        by_address: dict[bytes, PendingRecord] = {}
        for row in batch:
            width = record.width(row.record)
            if width is None:
                sums.refused += 1
                continue
            whole += 1
            is_known = row.partition is not None and row.partition.dimensions == width
            stored = row.stored if math.isfinite(row.stored) and 0 <= row.stored <= now else now
            # Of two rows of one address the first is the more certain (see `disk.salvage`).
            by_address.setdefault(
                row.address, PendingRecord(row.record, row.partition if is_known else None, stored)
            )
        stored_records = database.read_many(list(by_address))
        bad = [
            (a, stored_record.record)
            for a, stored_record in stored_records.items()
            if record.width(stored_record.record) is None
        ]
        missing = {a: pending for a, pending in by_address.items() if a not in stored_records} | {
            address: by_address[address] for address, _ in bad
        }
        if missing and not dry_run:
            if not isinstance(database, Database):
                raise TypeError("the file is open for reading only")
            database.write(WriteBatch(records=missing, deletions=bad, keep_newer=True))
        sums.stored += len(missing)
        sums.present += whole - len(missing)
        yield sums


def _batches(rows: Iterable[Row]) -> Iterator[list[Row]]:
    """Yield all rows in batches; the rows before a failure are yielded before it is raised."""
    batch: list[Row] = []
    try:
        for row in rows:
            batch.append(row)
            if len(batch) == ROWS_A_BATCH:
                yield batch
                batch = []
    except Exception:
        if batch:
            yield batch
        raise
    if batch:
        yield batch
