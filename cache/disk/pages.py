"""The pages of an SQLite file, read without SQLite, one by one, believing nothing but themselves.

The rules are those of https://www.sqlite.org/fileformat2.html, cited below by section. Pure.
"""

import struct
from collections.abc import Iterator
from functools import lru_cache
from itertools import accumulate
from typing import Any, NamedTuple

MAX_UNREADABLE = 256  # Cells; a page with more is noise, and is left.
INDEX_INTERIOR, INDEX_LEAF, TABLE_LEAF = 0x02, 0x0A, 0x0D  # 1.6
ONE, ADDRESS = 9, 12 + 2 * 16  # 2.1: the types of the number 1 and of a blob of 16 bytes
_SHAPES = "niiiiiifiinn"
_LENGTHS = (0, 1, 2, 3, 4, 6, 8, 8, 0, 0)  # 2.1: of the serial types 0…9
_int = int.from_bytes  # All numbers are big-endian.


MAX_LAYOUT = 1_000
"""No layout of the store has a higher version. A higher number is noise."""


def is_header_damaged(head: bytes) -> bool:
    """Tell whether the first 100 bytes of a file are not those of a database (1.3).

    SQLite takes some damaged headers for read-only files or for a later format.
    """
    size = _int(head[16:18])
    layout = _int(head[60:64], signed=True)
    return (
        head[:16] != b"SQLite format 3\0"
        or not (size == 1 or (512 <= size <= 32_768 and size & (size - 1) == 0))
        or not {head[18], head[19]} <= {1, 2}
        or head[20:24] != bytes([0, 64, 32, 32])
        or not 0 <= _int(head[44:48]) <= 4
        or not 0 <= layout <= MAX_LAYOUT
    )


class Layout(NamedTuple):
    """The columns of a payload, from its header (2.1)."""

    types: list[int]
    starts: list[int]  # Of the columns in the payload; and where the last one ends.
    shape: str  # A letter a column: n(ull), i(nteger), f(loat), b(lob), s(tring).


class Cell(NamedTuple):
    """One cell (1.6): where its payload begins and ends in the page, and how much is elsewhere."""

    rowid: int
    begin: int
    end: int
    missing: int
    layout: Layout

    def value(self, page: bytes, column: int) -> Any:  # noqa: ANN401 - of any type there is (2.1)
        """Return the value of a column that lies in the page."""
        types, starts, _ = self.layout
        kind = types[column]
        data = page[self.begin + starts[column] : self.begin + starts[column + 1]]
        if kind >= 12:
            return data.decode() if kind % 2 else data
        if kind in (7, 8, 9):
            return struct.unpack(">d", data)[0] if kind == 7 else kind - 8
        return _int(data, signed=True) if kind else None

    def values(self, page: bytes) -> tuple[Any, ...]:
        """Return the values of all columns. Raises UnicodeDecodeError."""
        return tuple([self.value(page, column) for column in range(len(self.layout.types))])


def cells(page: bytes, size: int, start: int, *kinds: int) -> Iterator[Cell | None]:
    """Yield the cells of a page of one of these kinds (1.6), and None for an unreadable one.

    `size` is the page size, `start` the offset of this page's own header.
    """
    unreadable, pointers = 0, _pointers(page, start, kinds)
    is_table = bool(pointers) and page[start] == TABLE_LEAF
    for at in pointers:
        try:
            yield _cell(page, size, at, is_table=is_table)
        except (IndexError, ValueError):
            yield None
            if (unreadable := unreadable + 1) > MAX_UNREADABLE:
                return


def shapes(page: bytes, size: int, start: int, *kinds: int) -> set[str]:
    """Return the shapes of a few cells of a page; "" for an unreadable one.

    All cells of a sound page belong to one table or index (1.6).
    """
    pointers, is_table = (
        _pointers(page, start, kinds),
        len(page) > start and page[start] == TABLE_LEAF,
    )
    names: set[str] = set()
    for at in pointers[:: max(1, len(pointers) // 4)]:
        try:
            names.add(_cell(page, size, at, is_table=is_table).layout.shape)
        except (IndexError, ValueError):
            names.add("")
    return names


def _pointers(page: bytes, start: int, kinds: tuple[int, ...]) -> list[int]:
    """Return the offsets of a page's cells, each once; none for a page of another kind."""
    if len(page) < start + 12 or page[start] not in kinds:
        return []
    down = 4 if page[start] == INDEX_INTERIOR else 0  # A pointer's length.
    count = min(_int(page[start + 3 : start + 5]), (len(page) - start - 8 - down) // 2)
    pointers = dict.fromkeys(struct.unpack_from(f">{count}H", page, start + 8 + down))
    return [at + down for at in pointers]


def _cell(page: bytes, page_size: int, at: int, *, is_table: bool) -> Cell:
    size, at = (page[at], at + 1) if page[at] < 0x80 else _varint(page, at)
    rowid, at = _varint(page, at) if is_table else (0, at)
    layout = _layout(page[at : at + page[at]])
    local = size
    if size > page_size - 35:
        # 1.6, "cell payload overflow": X, M and K. An index cell that is long enough is of no use.
        min_local = (page_size - 12) * 32 // 255 - 23
        local = min_local + (size - min_local) % (page_size - 4)
        local = local if local <= page_size - 35 else min_local
    starts = layout.starts
    if at + local + 4 * (local < size) > len(page) or starts[0] > local or starts[-1] != size:
        raise ValueError("the lengths disagree")
    return Cell(rowid, at, at + local, size - local, layout)


@lru_cache(maxsize=4096)
def _layout(header: bytes) -> Layout:
    at, types = 1, []  # Behind the header's length: one byte in any table that is looked for.
    while at < len(header):
        kind, at = _varint(header, at)
        types.append(kind)
    lengths = ((kind - 12) // 2 if kind >= 12 else _LENGTHS[kind] for kind in types)
    shape = "".join("bs"[kind % 2] if kind >= 12 else _SHAPES[kind] for kind in types)
    return Layout(types, list(accumulate(lengths, initial=at)), shape)


def _varint(data: bytes, at: int) -> tuple[int, int]:
    """Return a number (1.6) and where it ends; raises IndexError at the end of the data."""
    number = 0
    for offset in range(at, at + 8):
        byte = data[offset]
        number = number << 7 | byte & 0x7F
        if byte < 0x80:
            return number, offset + 1
    return number << 8 | data[at + 8], at + 9
