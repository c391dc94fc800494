"""Carves whole rows and ledger sums out of a damaged SQLite file, without opening it in SQLite.

Nothing but the pages themselves is believed (see `pages`): neither the schema nor any tree above
them. Numbers in brackets are sections of https://www.sqlite.org/fileformat2.html.

A record proves itself with its checksum. An address has a second copy in the index of `Cache`, and
a partition in the index of `Partitions`; where the copies disagree neither is believed. A time, and
the number that says to which partition an entry belongs, stand in one place only, without proof.

Rows that nothing else names come last (`late_rows`): SQLite may have given them up. Old versions of
pages are among them, unless something was ever purged: what was deleted on purpose stays deleted.

The sums of the ledger come from the pages of both of its copies: table `Usage` and its index
`Usage_copy` hold the same lines. Of each sum the higher one counts, as sums only grow. A line that
stands twice on a page is two lines: the row in the table was damaged, and counted from zero again.
A page whose lines are out of order counts only where no other page has them.
"""

import contextlib
import os
import time
from array import array
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import compress
from pathlib import Path
from typing import Any, Self, TypeAlias

from embedding_proxy.cache.key import UNKNOWN, Partition, Row
from embedding_proxy.cache.ledger import LedgerKey, Usage
from embedding_proxy.cache.record import width
from embedding_proxy.providers.base import current_label

from .pages import ADDRESS, INDEX_INTERIOR, INDEX_LEAF, ONE, TABLE_LEAF, Cell, cells, shapes
from .quarantine import is_name
from .write_ahead_log import SIZES, Log

PAGE_BYTES = 32_768  # Where the file does not tell.
MAX_RECORD_BYTES = 4 << 20  # Of a row that are looked for outside its page: a million dimensions.
_int = int.from_bytes  # All numbers are big-endian.
# The facts about each row, 64 rows a block; 0 if not known, -1 (which is no hash) if copies
# disagree.
_WITNESS, _PARTITION, _STORED, _YIELDED = range(4)
_MIN_MS = 1 << 32  # A time in milliseconds is higher, the number of a partition is lower.

USAGE, USAGE_COPY, LAYOUT_1 = "iisssiiiiiiii", "iiiiiiiiiisss", "iiiiiiii"
HOURS = "issiiiiiiii"
LEDGER_SHAPES = USAGE, USAGE_COPY, LAYOUT_1, HOURS
"""The shapes of rows (see `pages`): of the table, of its index, of the table of layout 1, and of
table `Hours`."""

LedgerLine: TypeAlias = tuple[int, int, str, str, str]
"""Day (since 1970, UTC), number of the partition, model, provider and client; of table `Hours` the
hour, 0, model, "" and client."""
_LineSums: TypeAlias = dict[LedgerLine, tuple[bool, Usage]]
"""For each line: whether its page is sound, and its sums."""

_SUMS = len(Usage._fields)
_MAX_SUM = 1 << 53  # Nine million dollars, in nanodollars: more is noise.
_MAX_DAYS = 1 << 17
_MAX_PARTITIONS = 1 << 32

# The shapes of other rows. Those of tables begin with the row's number, which is NULL there.
_PARTITIONS, _INDEX_OF_PARTITIONS = "nssi", "ssii"
_ENTRIES, _INDEX_OF_ENTRIES = ("niii", "nnii"), "iii"
_RECORD_COLUMNS, _INDEX_OF_CACHE = 12, "bii"
_PURGES, _SALVAGED = "nii", "s"
_LEARNED = {*LEDGER_SHAPES, *_ENTRIES, _PARTITIONS, _PURGES, _SALVAGED}
_LEARNED |= {_INDEX_OF_PARTITIONS, _INDEX_OF_ENTRIES, _INDEX_OF_CACHE}

# A version of a page: file, offset, where its own header begins (1.3), whether it is the last one.
_PageVersion = tuple[int, int, int, bool]


@dataclass
class CarveReport:
    """The result of carving a file."""

    records: int = 0  # Whole, and handed out; old versions count as well.
    damaged: int = 0  # Rows of table `Cache` that do not verify, and cells that cannot be read.
    pages: int = 0


def rows(
    database: Path, report: CarveReport, progress: Callable[[int], None] = lambda _: None
) -> Iterator[Row]:
    """Yield every whole row of a database file (see `RecordCarver`)."""
    with RecordCarver(database, report, progress) as carver:
        yield from carver.rows()
        yield from carver.late_rows()


class RecordCarver:
    """Carves a database file and the write-ahead log beside it. A context manager, for one thread.

    `progress` gets the number of bytes read, of both files. Raises OSError if a file cannot be
    opened, and nothing for its content. The first pass (`_learn`) comes before everything else.
    """

    def __init__(
        self, database: Path, report: CarveReport, progress: Callable[[int], None] = lambda _: None
    ) -> None:
        self._report, self._tell = report, progress
        self._stack = contextlib.ExitStack()
        self._file = self._stack.enter_context(database.open("rb", buffering=0)).fileno()
        self._log = -1
        with contextlib.suppress(FileNotFoundError):
            log = Path(f"{database}-wal").open("rb", buffering=0)  # noqa: SIM115 - closed by the stack
            self._log = self._stack.enter_context(log).fileno()
        head, log_head = _read(self._file, 18, 0), _read(self._log, 32, 0)
        self._size = SIZES.get(_int(head[16:18])) or SIZES.get(_int(log_head[8:12]), PAGE_BYTES)
        log_bytes = os.fstat(self._log).st_size if self._log >= 0 else 0
        self._ends = os.fstat(self._file).st_size, log_bytes
        self._unsound: set[int] = set()  # Offsets of pages that their frame's checksum denies.
        self._frames = self._last_frames()
        self._facts: defaultdict[int, array[int]] = defaultdict(lambda: array("q", bytes(2048)))
        # By id, what the table of partitions and its index hold.
        self._partitions_by_number: defaultdict[int, set[Partition]] = defaultdict(set)
        self._ledger = CarvedLedger()
        self._is_purged = False
        self._late = bytearray()
        self._bytes_read, self._future_ms = 0, int(1000 * (time.time() + 86_400))
        self.salvaged: set[str] = set()
        """The names of files whose sums are included here."""

    def __enter__(self) -> Self:
        """Read everything once, and learn what is stored beside the records."""
        try:
            for version in self._page_versions():
                self._learn(version)
        except BaseException:
            self._stack.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    @property
    def usage(self) -> dict[tuple[int, LedgerKey], Usage]:
        """The sums of the ledger, by day (since 1970, UTC) and heading."""
        sums: dict[tuple[int, LedgerKey], Usage] = {}
        for (day, number, *names), usage in self._ledger.lines():
            partition = self._partition(number)
            if self._ledger.is_of_layout_1:
                names[0] = partition.space if partition else ""
            key = day, LedgerKey(partition or UNKNOWN, *names)
            sums[key] = sums[key].plus(usage) if key in sums else usage
        return sums

    @property
    def hours(self) -> dict[tuple[int, str, str], Usage]:
        """The sums of the ledger's last weeks, by hour (since 1970, UTC), model and client."""
        return self._ledger.hours

    def rows(self) -> Iterator[Row]:
        """Yield the rows that have no later version and are named by something else."""
        self._late.clear()
        for version in self._page_versions():
            self._report.pages += 1
            page = self._page(*version[:2])
            has_others = False
            for cell in self._record_cells(page, version):
                if self._is_certain(cell, version):
                    yield from self._carve(page, cell, version)
                else:
                    has_others = True
            self._late.append(has_others)

    def late_rows(self) -> Iterator[Row]:
        """Yield the other rows, after `rows`: they may be older and have fewer facts."""
        for version in compress(self._page_versions(), self._late):
            if self._is_purged and not version[3]:
                continue
            page = self._page(*version[:2])
            for cell in self._record_cells(page, version, is_first=False):
                if not self._is_certain(cell, version):
                    yield from self._carve(page, cell, version)
        self._tell(sum(self._ends))

    def _last_frames(self) -> dict[int, tuple[int, int]]:
        """Return where in the log the last version of each page is, by the page's number (4.1).

        Frames of other salts are from an earlier run of the log. Frames after the last commit were
        never valid. The content of a damaged frame may be right, except for sums.
        """
        frames: dict[int, tuple[int, int]] = {}
        pending: dict[int, tuple[int, int]] = {}
        with contextlib.suppress(OSError):
            log = Log(self._log, self._size)
            self._size = log.page_bytes  # A checksum proves it.
            rows = zip(log.belongs, log.continues, log.pages, log.commits, strict=True)
            for row, (belongs, is_sound, page, is_commit) in enumerate(rows):
                if not belongs:
                    continue
                offset = 32 + 24 + row * (24 + self._size)
                pending[int(page)] = self._log, offset
                if not is_sound:
                    self._unsound.add(offset)
                if is_commit:
                    frames |= pending
                    pending = {}
        return frames

    def _page_versions(self) -> Iterator[_PageVersion]:
        for number, offset in enumerate(range(0, self._ends[0], self._size), 1):
            yield self._file, offset, 100 * (number == 1), number not in self._frames
        for offset in range(32 + 24, self._ends[1], 24 + self._size):
            number, version = _int(_read(self._log, 4, offset - 24)), (self._log, offset)
            yield *version, 100 * (number == 1), self._frames.get(number) == version

    def _page(self, file: int, offset: int) -> bytes:
        self._bytes_read += self._size
        self._tell(min(self._bytes_read // 2, sum(self._ends)))  # All is read twice.
        return _read(file, self._size, offset)

    def _of(self, rowid: int) -> tuple["array[int]", int]:
        return self._facts[rowid >> 6], (rowid & 63) * 4

    def _note(self, rowid: int, what: int, number: int) -> None:
        noted, at = self._of(rowid)
        noted[at + what] = number if noted[at + what] in (0, number) else -1

    def _learn(self, version: _PageVersion) -> None:
        page = self._page(*version[:2])
        kinds = TABLE_LEAF, INDEX_LEAF, INDEX_INTERIOR
        if shapes(page, self._size, version[2], *kinds).isdisjoint(_LEARNED | {""}):
            return
        ledger = LedgerPage()
        ledger.is_sound = version[0] != self._log or version[1] not in self._unsound
        for cell in cells(page, self._size, version[2], *kinds):
            if cell is None or cell.missing or (shape := cell.layout.shape) not in _LEARNED:
                ledger.is_sound &= cell is not None
                continue
            try:
                values = cell.values(page)
            except UnicodeDecodeError:
                ledger.is_sound = False
                continue
            if shape not in LEDGER_SHAPES:
                self._note_values(shape, cell.rowid, values)
            elif version[3]:
                ledger.add(shape, values)
        self._ledger.add(ledger)

    def _note_values(self, shape: str, rowid: int, values: tuple[Any, ...]) -> None:
        if shape == _INDEX_OF_CACHE:
            address, raw, owner = values
            if raw == 1 and len(address) == 16:
                self._note(owner, _WITNESS, hash(address))
        elif shape == _INDEX_OF_ENTRIES:
            number, stored, owner = values
            if number < _MIN_MS < stored:
                self._note_entry(owner, number, stored)
        elif shape in _ENTRIES:
            self._note_entry(rowid, *values[1:3])
        elif shape == _SALVAGED:
            self.salvaged |= {name for name in values if is_name(name)}
        elif shape == _PURGES:
            self._is_purged |= bool(rowid) and _MIN_MS < values[1] < self._future_ms
        else:
            # Of partitions: the index ends with the row's number.
            number = rowid if shape == _PARTITIONS else values[-1]
            namespace, space, dimensions = values[1:] if shape == _PARTITIONS else values[:-1]
            self._partitions_by_number[number].add(
                Partition(namespace, current_label(space), dimensions)
            )

    def _note_entry(self, rowid: int, number: int | None, stored: int) -> None:
        noted, at = self._of(rowid)
        self._note(rowid, _PARTITION, number or noted[at + _PARTITION])
        if noted[at + _STORED] < stored < self._future_ms:
            noted[at + _STORED] = stored

    def _record_cells(
        self, page: bytes, version: _PageVersion, *, is_first: bool = True
    ) -> Iterator[Cell]:
        for cell in cells(page, self._size, version[2], TABLE_LEAF):
            if cell is not None and len(cell.layout.types) == _RECORD_COLUMNS:
                yield cell
            else:
                self._report.damaged += cell is None and version[3] and is_first

    def _is_certain(self, cell: Cell, version: _PageVersion) -> bool:
        noted, at = self._of(cell.rowid)
        return version[3] and bool(noted[at + _STORED] or noted[at + _WITNESS])

    def _carve(self, page: bytes, cell: Cell, version: _PageVersion) -> Iterator[Row]:
        """Yield the row of a cell if it is whole and was not yielded before."""
        noted, at = self._of(cell.rowid)
        witness, number, stored, yielded = noted[at : at + 4]
        address, record, own = self._content(page, cell)
        dimensions, trace = width(record), hash(address + record[-8:])
        if dimensions is None or witness not in (0, -1, hash(address)):
            self._report.damaged += version[3]
        elif yielded != trace:
            noted[at + _YIELDED] = trace
            self._report.records += 1
            partition = self._partition(number)
            is_known = partition is not None and partition.dimensions == dimensions
            when = stored / 1000 if stored and version[3] else own
            yield Row(address, record, when, partition if is_known else None)

    def _content(self, page: bytes, cell: Cell) -> tuple[bytes, bytes, float]:
        """Return a row's address, record and time; all empty if it holds no raw bytes."""
        types, starts, _ = cell.layout
        start = cell.begin + starts[11]
        sound = types[:3] == [0, ADDRESS, ONE] and types[9] == ONE and types[11] % 2 == 0
        if not sound or types[3] >= 12 or start > cell.end or cell.missing > MAX_RECORD_BYTES:
            return b"", b"", 0
        # 1.6: each overflow page begins with the number of the next one.
        record, missing, own = page[start : cell.end], cell.missing, cell.value(page, 3) or 0
        part = link = page[cell.end : cell.end + 4]
        while missing and part:
            file, at = self._frames.get(_int(link), (self._file, (_int(link) - 1) * self._size))
            overflow = _read(file, self._size, at)
            link, part = overflow[:4], overflow[4 : 4 + missing]
            record, missing = record + part, missing - len(part)
        return cell.value(page, 1), record, float(own) if 0 < 1000 * own < self._future_ms else 0.0

    def _partition(self, number: int) -> Partition | None:
        partitions = self._partitions_by_number.get(number, ())
        return next(iter(partitions)) if len(partitions) == 1 else None


def _read(file: int, size: int, offset: int) -> bytes:
    """Return up to `size` bytes; none if the disk cannot read them."""
    with contextlib.suppress(OSError):
        return os.pread(file, size, offset)
    return b""


class LedgerPage:
    """The ledger lines of one page, in their order on it."""

    def __init__(self) -> None:
        self.is_sound = True
        self.lines: dict[str, dict[LedgerLine, Usage]] = {}
        self._before: tuple[str, tuple[Any, ...]] | None = None

    def add(self, shape: str, values: tuple[Any, ...]) -> None:
        """Add a row of one of the shapes."""
        # Both the table and the index are sorted by their content.
        if self._before is not None:
            self.is_sound &= self._before[0] == shape and self._before[1] < values
        self._before = shape, values
        line, sums = _split(shape, values)
        if not (
            0 <= line[0] < _MAX_DAYS * (24 if shape == HOURS else 1)
            and 0 <= line[1] < _MAX_PARTITIONS
            and all(0 <= number < _MAX_SUM for number in sums)
        ):
            self.is_sound = False
            return
        lines, usage = self.lines.setdefault(shape, {}), Usage(*sums)
        lines[line] = lines[line].plus(usage) if line in lines else usage


class CarvedLedger:
    """The lines of all pages."""

    def __init__(self) -> None:
        self._lines_by_shape: dict[str, _LineSums] = {shape: {} for shape in LEDGER_SHAPES}

    def add(self, page: LedgerPage) -> None:
        """Add the lines of a page."""
        for shape, lines in page.lines.items():
            for line, usage in lines.items():
                _keep(self._lines_by_shape[shape], line, usage, is_sound=page.is_sound)

    @property
    def is_of_layout_1(self) -> bool:
        """Whether there are only lines of layout 1, which name no model."""
        return not (self._lines_by_shape[USAGE] or self._lines_by_shape[USAGE_COPY])

    @property
    def hours(self) -> dict[tuple[int, str, str], Usage]:
        """The sums of table `Hours`, by hour (since 1970, UTC), model and client.

        The table has no second copy: what stood on a damaged page of it is known by day alone.
        """
        return {
            (hour, model, client): usage
            for (hour, _, model, _, client), (is_sound, usage) in self._lines_by_shape[
                HOURS
            ].items()
            if is_sound
        }

    def lines(self) -> Iterator[tuple[LedgerLine, Usage]]:
        """Yield each line of the days once."""
        if self.is_of_layout_1:
            # In a file of a later layout these lines are counted there too.
            merged = self._lines_by_shape[LAYOUT_1]
        else:
            merged = _merge(self._lines_by_shape[USAGE], self._lines_by_shape[USAGE_COPY])
        for line, (_, usage) in merged.items():
            yield line, usage


def _merge(table: _LineSums, index: _LineSums) -> _LineSums:
    sums: _LineSums = {}
    for own, other in ((table, index), (index, table)):
        for line, (is_sound, usage) in own.items():
            # A line that only a damaged page has may be another line, changed.
            if is_sound or line in other or len(other) < len(own):
                _keep(sums, line, usage, is_sound=is_sound)
    return sums


def _keep(lines: _LineSums, line: LedgerLine, usage: Usage, *, is_sound: bool) -> None:
    before = lines.get(line)
    if before is None or before[0] < is_sound:
        lines[line] = is_sound, usage
    elif before[0] == is_sound:
        lines[line] = is_sound, Usage(*map(max, before[1], usage))


def _split(shape: str, values: tuple[Any, ...]) -> tuple[LedgerLine, tuple[int, ...]]:
    if shape == LAYOUT_1:
        return (values[0], values[1], "", "", ""), values[2:]
    if shape == USAGE:
        return values[:-_SUMS], values[-_SUMS:]
    if shape == HOURS:
        hour, model, client = values[:-_SUMS]
        return (hour, 0, model, "", client), values[-_SUMS:]
    return values[_SUMS:], values[:_SUMS]
