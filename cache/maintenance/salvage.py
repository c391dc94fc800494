"""A damaged SQLite file -> the rows that are still whole in it. It is carved, not opened.

Nothing but the pages themselves is believed (see `pages`): neither the schema nor any tree above
them. Pages that SQLite has given up are carved too: old versions of entries come out, and deleted
ones. Numbers in brackets are sections of https://www.sqlite.org/fileformat2.html.

A record proves itself with its checksum. An address has a second copy in the index of `Cache`, and
a partition in the index of `Partitions`; where the copies disagree neither is believed. A time, and
the number that says to which partition an entry belongs, stand in one place only, without proof.
"""

import contextlib
import os
import time
from array import array
from collections import defaultdict
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from itertools import compress
from pathlib import Path

from cache.record import width
from cache.row import Partition, Row

from .pages import ADDRESS, INDEX_INTERIOR, INDEX_LEAF, ONE, TABLE_LEAF, Cell, cells

PAGE_BYTES = 32_768  # Where the file does not tell.
MOST_BYTES = 4 << 20  # Of a row that are looked for outside its page: a million dimensions.
_SIZES = {1: 65_536} | {512 << i: 512 << i for i in range(8)}  # 1.3.2
_int = int.from_bytes  # All numbers are big-endian.
# Noted of each row, 64 rows a block; 0 if nothing is known, -1 (no hash is) if copies disagree.
_WITNESS, _PARTITION, _STORED, _YIELDED = range(4)

# A version of a page: file, offset, where its own header begins (1.3), whether it is the last one.
_Place = tuple[int, int, int, bool]
_Tell = Callable[[int], None]


@dataclass
class Report:
    """What came of a file."""

    records: int = 0  # Whole, and handed out; old versions count as well.
    damaged: int = 0  # Rows of table `Cache` that do not verify, and cells that cannot be read.
    pages: int = 0
    unreadable_pages: int = 0  # Those that the disk did not give.


def rows(database: Path, report: Report, progress: _Tell = lambda _: None) -> Iterator[Row]:
    """Yield every whole row of a database file and of the write-ahead log beside it.

    First come those of which no later version is seen and that something else names; those behind
    them may be older, and know less. `progress` is told the bytes read, of those of both files.
    Raises OSError if one cannot be opened, and nothing for what is in it.
    """
    with contextlib.ExitStack() as stack:
        file, log = stack.enter_context(database.open("rb", buffering=0)).fileno(), -1
        with contextlib.suppress(FileNotFoundError):
            log = stack.enter_context(Path(f"{database}-wal").open("rb", buffering=0)).fileno()
        yield from _Carver(file, log, report, progress).rows()


class _Carver:
    def __init__(self, file: int, log: int, report: Report, tell: _Tell) -> None:
        self._file, self._log, self._report, self._tell = file, log, report, tell
        head, log_head = _read(file, 18, 0), _read(log, 32, 0)
        self._size = _SIZES.get(_int(head[16:18])) or _SIZES.get(_int(log_head[8:12]), PAGE_BYTES)
        self._ends = os.fstat(file).st_size, os.fstat(log).st_size if log >= 0 else 0
        # 4.1: frames of other salts are older, left from before the log was begun anew.
        salts = log_head[16:24] if log_head[:3] == b"\x37\x7f\x06" else _read(log, 8, 32 + 8)
        heads = ((i, _read(log, 24, i - 24)) for i in range(56, self._ends[1], 24 + self._size))
        self._frames = {_int(h[:4]): (log, i) for i, h in heads if h[8:16] == salts}
        self._noted: defaultdict[int, array[int]] = defaultdict(lambda: array("q", bytes(2048)))
        # By id, what the table of partitions and its index say.
        self._said: defaultdict[int, set[Partition]] = defaultdict(set)
        self._bytes_read, self._future = 0, time.time() + 86_400

    def rows(self) -> Iterator[Row]:
        for place in self._places():
            self._learn(place)
        late = bytearray()
        for place in self._places():
            self._report.pages += 1
            late.append((yield from self._carve(place, late=False)))
        for place in compress(self._places(), late):
            yield from self._carve(place, late=True)
        self._tell(sum(self._ends))

    def _places(self) -> Iterator[_Place]:
        for number, offset in enumerate(range(0, self._ends[0], self._size), 1):
            yield self._file, offset, 100 * (number == 1), number not in self._frames
        for offset in range(32 + 24, self._ends[1], 24 + self._size):
            number, place = _int(_read(self._log, 4, offset - 24)), (self._log, offset)
            yield *place, 100 * (number == 1), self._frames.get(number) == place

    def _page(self, file: int, offset: int) -> bytes:
        self._bytes_read += self._size
        self._tell(min(self._bytes_read // 2, sum(self._ends)))  # All is read twice.
        return _read(file, self._size, offset)

    def _of(self, rowid: int) -> tuple["array[int]", int]:
        return self._noted[rowid >> 6], (rowid & 63) * 4

    def _note(self, rowid: int, what: int, number: int) -> None:
        noted, at = self._of(rowid)
        noted[at + what] = number if noted[at + what] in (0, number) else -1

    def _learn(self, place: _Place) -> None:
        page = self._page(*place[:2])
        for cell in cells(page, self._size, place[2], TABLE_LEAF, INDEX_LEAF, INDEX_INTERIOR):
            if cell is None or cell.missing or len(cell.types) not in (3, 4):
                continue
            with contextlib.suppress(UnicodeDecodeError):
                match [cell.value(page, i) for i in range(len(cell.types))]:
                    case [bytes() as address, 1, int() as owner] if len(address) == 16:
                        self._note(owner, _WITNESS, hash(address))
                    case [None, str() as name, str() as space, int() as dimensions]:
                        self._said[cell.rowid].add(Partition(name, space, dimensions))
                    case [str() as name, str() as space, int() as dimensions, int() as number]:
                        self._said[number].add(Partition(name, space, dimensions))
                    case [None, None | int() as number, int() as stored, int()]:
                        noted, at = self._of(cell.rowid)
                        self._note(cell.rowid, _PARTITION, number or noted[at + _PARTITION])
                        if noted[at + _STORED] < stored < 1000 * self._future:
                            noted[at + _STORED] = stored

    def _carve(self, place: _Place, *, late: bool) -> Generator[Row, None, bool]:
        """Yield a page's rows that are certain, or `late` the others; return if it has others."""
        page, current, others = self._page(*place[:2]), place[3], False
        self._report.unreadable_pages += not page and not late
        for cell in cells(page, self._size, place[2], TABLE_LEAF):
            if cell is None or len(cell.types) != 12:
                self._report.damaged += cell is None and current and not late
                continue
            noted, at = self._of(cell.rowid)
            witness, number, stored, yielded = noted[at : at + 4]
            certain = current and bool(stored or witness)
            others |= not certain
            if certain is late:
                continue
            address, record, own = self._content(page, cell)
            dimensions, trace = width(record), hash(address + record[-8:])
            if dimensions is None or witness not in (0, -1, hash(address)):
                self._report.damaged += current
            elif yielded != trace:
                noted[at + _YIELDED] = trace
                self._report.records += 1
                when = stored / 1000 if stored and current else own
                yield Row(address, record, when, self._partition(number, dimensions))
        return others

    def _content(self, page: bytes, cell: Cell) -> tuple[bytes, bytes, float]:
        """Return a row's address, record and time; all empty if it holds no raw bytes."""
        types, start = cell.types, cell.begin + cell.starts[11]
        sound = types[:3] == [0, ADDRESS, ONE] and types[9] == ONE and types[11] % 2 == 0
        if not sound or types[3] >= 12 or start > cell.end or cell.missing > MOST_BYTES:
            return b"", b"", 0
        # 1.6: each overflow page begins with the number of the next one.
        record, missing, own = page[start : cell.end], cell.missing, cell.value(page, 3) or 0
        part = link = page[cell.end : cell.end + 4]
        while missing and part:
            file, at = self._frames.get(_int(link), (self._file, (_int(link) - 1) * self._size))
            more = _read(file, self._size, at)
            link, part = more[:4], more[4 : 4 + missing]
            record, missing = record + part, missing - len(part)
        return cell.value(page, 1), record, float(own) if 0 < own < self._future else 0.0

    def _partition(self, number: int, dimensions: int) -> Partition | None:
        said = list(self._said[number] if number else ())
        return said[0] if len(said) == 1 and said[0].dimensions == dimensions else None


def _read(file: int, size: int, offset: int) -> bytes:
    """Return up to so many bytes, none if the disk does not give them."""
    with contextlib.suppress(OSError):
        return os.pread(file, size, offset)
    return b""
