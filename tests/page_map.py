"""Which page of a store's file holds what, told without the code under trial; and its damage.

The rules are those of https://www.sqlite.org/fileformat2.html, cited below by section.
"""

import contextlib
import fcntl
import os
import random
import sqlite3
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from embedding_proxy.cache.key import FORMAT

INDEX_INTERIOR, TABLE_INTERIOR, INDEX_LEAF, TABLE_LEAF = 2, 5, 10, 13  # 1.6
_ADDRESS = 12 + 2 * 16  # 2.1: the type of a blob of 16 bytes.
_CACHE_COLUMNS, _INDEX_COLUMNS = 12, 3  # Of table `Cache`; of its index: key, raw, rowid.
FREE, POINTERS = "free", "pointer map"
HOW = ("zeroed", "noise", "64 bytes")
"""What is done to a page."""


@dataclass
class PageMap:
    """The pages of one file."""

    page_bytes: int
    kinds: dict[int, str] = field(default_factory=dict)
    """By page number (from 1): the table or index and the level, such as `Cache leaf`."""
    owners: dict[int, bytes] = field(default_factory=dict)
    """By overflow page: the address of the record that goes on there."""

    def numbers(self, kind: str) -> list[int]:
        """Return the pages of a kind, in order."""
        return sorted(number for number, one in self.kinds.items() if one == kind)


class _Cell(NamedTuple):
    """One cell (1.6)."""

    child: int
    """The page below; 0 on a leaf."""
    address: bytes | None
    """The 16 bytes by which the cell is found, if it is of `Cache` or of its index by key."""
    overflow: int
    """The first page on which its payload goes on; 0 if it lies here as a whole."""


def read_map(path: Path) -> PageMap:
    """Return the map of a file that nobody has open and that has no write-ahead log.

    Raises sqlite3.Error, or ValueError for a page that two trees claim.
    """
    data = path.read_bytes()
    size = struct.unpack_from(">H", data, 16)[0]  # 1.3.2
    size = 65_536 if size == 1 else size
    with contextlib.closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as connection:
        roots = connection.execute("SELECT rootpage, name FROM sqlite_master WHERE rootpage > 0")
        trees = {1: "sqlite_master", **dict(roots.fetchall())}
    found = PageMap(size)
    for root, name in trees.items():
        _walk(found, data, root, name)
    # 1.8: with auto_vacuum there is a pointer map before every so many pages, from page 2 on.
    pages, step = len(data) // size, size // 5 + 1
    for number in range(1, pages + 1):
        is_pointers = number >= 2 and (number - 2) % step == 0
        found.kinds.setdefault(number, POINTERS if is_pointers else FREE)
    return found


def _walk(found: PageMap, data: bytes, root: int, name: str) -> None:
    waiting = [root]
    while waiting:
        number = waiting.pop()
        page = _page(data, number, found.page_bytes)
        start = 100 if number == 1 else 0
        is_leaf = page[start] in (TABLE_LEAF, INDEX_LEAF)
        _enter(found, number, f"{name} {'leaf' if is_leaf else 'interior'}")
        if not is_leaf:
            waiting.append(struct.unpack_from(">I", page, start + 8)[0])
        for cell in _cells(page, start):
            if cell.child:
                waiting.append(cell.child)
            link = cell.overflow
            while link:
                _enter(found, link, f"{name} overflow")
                if cell.address is not None:
                    found.owners[link] = cell.address
                link = struct.unpack_from(">I", _page(data, link, found.page_bytes))[0]


def _enter(found: PageMap, number: int, kind: str) -> None:
    if number in found.kinds:
        raise ValueError(f"page {number} is both {found.kinds[number]} and {kind}")
    found.kinds[number] = kind


def _page(data: bytes, number: int, size: int) -> bytes:
    return data[(number - 1) * size : number * size]


def addresses_on(page: bytes, number: int) -> set[bytes]:
    """Return the addresses of all records and of all index cells on a page that is whole."""
    cells = _cells(page, 100 if number == 1 else 0)
    return {cell.address for cell in cells if cell.address is not None}


def _cells(page: bytes, start: int) -> Iterator[_Cell]:
    kind = page[start]
    if kind not in (INDEX_INTERIOR, TABLE_INTERIOR, INDEX_LEAF, TABLE_LEAF):
        return
    is_leaf, is_table = kind in (TABLE_LEAF, INDEX_LEAF), kind in (TABLE_LEAF, TABLE_INTERIOR)
    (count,) = struct.unpack_from(">H", page, start + 3)
    for at in struct.unpack_from(f">{count}H", page, start + (8 if is_leaf else 12)):
        child = 0 if is_leaf else struct.unpack_from(">I", page, at)[0]
        if kind == TABLE_INTERIOR:
            yield _Cell(child, None, 0)
            continue
        payload, place = _varint(page, at if is_leaf else at + 4)
        if is_table:
            _, place = _varint(page, place)  # The rowid.
        local = _local(payload, len(page), is_table=is_table)
        more = struct.unpack_from(">I", page, place + local)[0] if local < payload else 0
        yield _Cell(child, _address(page, place, is_table=is_table), more)


def _local(payload: int, size: int, *, is_table: bool) -> int:
    """Return how much of a payload lies in its cell (1.6: P, U, X, M and K)."""
    most = size - 35 if is_table else (size - 12) * 64 // 255 - 23
    least = (size - 12) * 32 // 255 - 23
    if payload <= most:
        return payload
    wanted = least + (payload - least) % (size - 4)
    return wanted if wanted <= most else least


def _address(page: bytes, at: int, *, is_table: bool) -> bytes | None:
    """Return the address in a record of `Cache` or of its index by key, None for any other."""
    end, place = _varint(page, at)
    types, end = [], at + end
    while place < end:
        kind, place = _varint(page, place)
        types.append(kind)
    # The rowid of a table stands in its cell, and is NULL in the record: of no length.
    column, columns = (1, _CACHE_COLUMNS) if is_table else (0, _INDEX_COLUMNS)
    if len(types) != columns or types[column] != _ADDRESS:
        return None
    return page[end : end + 16]


def _varint(data: bytes, at: int) -> tuple[int, int]:
    """Return a number (1.6) and where it ends."""
    number = 0
    for place in range(at, at + 8):
        number = number << 7 | data[place] & 0x7F
        if data[place] < 0x80:
            return number, place + 1
    return number << 8 | data[at + 8], at + 9


@dataclass
class Damage:
    """What was done to one page, and what may be lost by it."""

    number: int
    kind: str
    how: str
    addresses: set[bytes]
    """Of the records that lay on the page, and of those whose index cell did."""


@contextlib.contextmanager
def _nobody_writes(directory: Path) -> Iterator[None]:
    """Keep the processes from merging the log into the file between two calls."""
    with (directory / "writer.lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def damage(
    directory: Path, origin: Path, pages: PageMap, kind: str | None, chance: random.Random
) -> Damage:
    """Damage one page of the store in `directory`, of some kind or of any.

    `origin` is the store of which it is a copy, `pages` is the map of that one. Processes may have
    the copy open.
    """
    path, size = _database(directory), pages.page_bytes
    with _nobody_writes(directory), path.open("r+b", buffering=0) as file:
        count = path.stat().st_size // size
        numbers = [n for n in pages.numbers(kind) if n <= count] if kind else []
        number = chance.choice(numbers or range(1, count + 1))
        before = os.pread(file.fileno(), size, (number - 1) * size)
        how = chance.choice(HOW)
        if how == "64 bytes":
            at = chance.randrange(size - 64)
            after = before[:at] + chance.randbytes(64) + before[at + 64 :]
        else:
            after = bytes(size) if how == "zeroed" else chance.randbytes(size)
        os.pwrite(file.fileno(), after, (number - 1) * size)
    kind = pages.kinds.get(number, "new")
    # The old content of a free page is nobody's, unless the page was taken into use since.
    is_unused = kind in (FREE, POINTERS) and before == _page(
        _database(origin).read_bytes(), number, size
    )
    addresses = set() if is_unused else addresses_on(before, number)
    if number in pages.owners:
        addresses = {pages.owners[number]}
    return Damage(number, kind, how, addresses)


def _database(directory: Path) -> Path:
    return directory / f"v{FORMAT}" / "cache.db"
