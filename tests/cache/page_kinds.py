"""Which page of a store's file holds what, and ways to damage a page."""

import contextlib
import random
import sqlite3
import subprocess
import sys
from pathlib import Path

from embedding_proxy.cache.disk.pages import TABLE_LEAF, cells
from embedding_proxy.cache.disk.schema import PAGE_BYTES

INTERIOR = (0x02, 0x05)
_WRITE = """
import sys
with open(sys.argv[1], "r+b") as file:
    file.seek(int(sys.argv[2]))
    file.write(sys.stdin.buffer.read())
"""


def page_of(data: bytes, number: int) -> bytes:
    """Return a page by its number, from 1."""
    return data[(number - 1) * PAGE_BYTES : number * PAGE_BYTES]


def tree(data: bytes, root: int) -> list[int]:
    """Return the pages of a b-tree, its root first."""
    page, start = page_of(data, root), 100 * (root == 1)
    if page[start] not in INTERIOR:
        return [root]
    count = int.from_bytes(page[start + 3 : start + 5])
    places = [start + 12 + 2 * i for i in range(count)]
    children = [int.from_bytes(page[at : at + 2]) for at in places]
    numbers = [int.from_bytes(page[at : at + 4]) for at in children]
    numbers.append(int.from_bytes(page[start + 8 : start + 12]))
    return [root, *(number for child in numbers for number in tree(data, child))]


def page_kinds(path: Path) -> dict[str, list[int]]:
    """Return the pages of a checkpointed store by kind: "NAME root" for an interior root, NAME."""
    data = path.read_bytes()
    with contextlib.closing(sqlite3.connect(path)) as connection:
        roots = connection.execute(
            "SELECT name, rootpage FROM sqlite_master WHERE rootpage > 0"
        ).fetchall()
    kinds = {"page 1": [1], "pointer map": [2]}
    for name, root in roots:
        for number in tree(data, root):
            interior = page_of(data, number)[0] in INTERIOR
            kinds.setdefault(f"{name} root" if interior else name, []).append(number)
    known = {number for numbers in kinds.values() for number in numbers}
    kinds["free"] = [n for n in range(1, len(data) // PAGE_BYTES + 1) if n not in known]
    return kinds


def addresses_on(path: Path, number: int) -> set[bytes]:
    """Return the addresses of the records on a page, and of the index's cells on it."""
    page = page_of(path.read_bytes(), number)
    found = set()
    for cell in cells(page, PAGE_BYTES, 100 * (number == 1), TABLE_LEAF, 0x0A, 0x02):
        if cell is not None and cell.layout.shape == "bii":
            found.add(cell.value(page, 0))
        elif cell is not None and len(cell.layout.types) == 12:
            found.add(cell.value(page, 1))
    return found


def damaged(page: bytes, how: str, seed: int) -> bytes:
    """Return a page that is all zeros, all noise, or has 64 bytes of noise somewhere in use."""
    chance = random.Random(seed)
    if how == "zeros":
        return bytes(len(page))
    if how == "noise":
        return chance.randbytes(len(page))
    at = chance.choice([i for i in range(0, len(page) - 64, 64) if any(page[i : i + 64])])
    return page[:at] + chance.randbytes(64) + page[at + 64 :]


def overwrite(path: Path, number: int, page: bytes) -> None:
    """Write a page, by another process: to close a file here would take SQLite's locks from it."""
    offset = str((number - 1) * PAGE_BYTES)
    command = [sys.executable, "-c", _WRITE, str(path), offset]
    subprocess.run(command, input=page, check=True)
