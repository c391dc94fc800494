"""The write-ahead log of an SQLite file, read without SQLite, to see whether it is whole.

SQLite ends the log at the first frame that does not verify, says nothing, and overwrites the rest.
That is right for a transaction that a kill has cut off, and wrong for a damaged frame that others
follow. Numbers in brackets are sections of https://www.sqlite.org/fileformat2.html; what is said of
the log's index is in https://www.sqlite.org/walformat.html.
"""

import contextlib
import os
import sqlite3
import sys
from functools import lru_cache
from pathlib import Path

import numpy as np
import numpy.typing as npt

LOG, SHARED_MEMORY = "-wal", "-shm"
"""The suffixes that SQLite adds to the name of a database."""
HEADER_BYTES, FRAME_HEADER_BYTES = 32, 24
SIZES = {1: 65_536} | {512 << i: 512 << i for i in range(8)}
"""The page size by its code in a database header (1.3.2)."""
_PAGE_BYTES = 32_768  # Where neither file tells.
_MAGIC = 0x377F0682  # The last bit says that the words of checksums are big-endian (4.1).
_BYTES_A_READ = 4 << 20
_SALTS, _CHECKSUMS = slice(2, 4), slice(4, 6)
_INDEX_HEADER_BYTES = 48  # The index begins with two copies of its header.
_never_closed: list[int] = []

_Words = npt.NDArray[np.uint32]
_Flags = npt.NDArray[np.bool_]


class Log:
    """The frames of a log. Raises OSError if it cannot be read.

    `page_bytes` is the page size for a log whose header is damaged.
    """

    def __init__(self, file: int, page_bytes: int) -> None:
        head = os.pread(file, HEADER_BYTES, 0).ljust(HEADER_BYTES, b"\0")
        words = np.frombuffer(head, ">u4").astype(np.uint32)
        self.salt_bytes = head[16:24]
        order = ">u4" if words[0] & 1 else "<u4"
        own = _checksums(np.frombuffer(head[:24], order).reshape(1, -1), words[None, :2] * 0)
        page = int(words[2])
        self.has_sound_header = bool(
            int(words[0]) & ~1 == _MAGIC and page in SIZES.values() and (own[0] == words[6:]).all()
        )
        self.page_bytes = page if self.has_sound_header else page_bytes
        heads, self.continues = self._read(file, order, words[6:])
        self.pages, self.commits = heads[:, 0], heads[:, 1] != 0
        salts = heads[:, _SALTS]
        current = words[4:6] if self.has_sound_header else self._guess_salts(salts)
        self.has_salts: _Flags = (salts == current).all(axis=1)
        """Whether a frame is of the log's present run. Others are left from earlier runs (4.1)."""

    def _read(self, file: int, order: str, before: _Words) -> tuple[_Words, _Flags]:
        """Return the headers of all frames, and whether each continues the checksum before it."""
        size = FRAME_HEADER_BYTES + self.page_bytes
        at, step = HEADER_BYTES, max(1, _BYTES_A_READ // size) * size
        heads, continues = [np.empty((0, 6), np.uint32)], [np.empty(0, np.bool_)]
        end = os.fstat(file).st_size
        while data := _read_frames(file, min(step, end - at), at, size):
            at += len(data)
            frames = np.frombuffer(data, np.uint8).reshape(-1, size)
            head = np.ascontiguousarray(frames[:, :24]).view(">u4").astype(np.uint32)
            sums = np.concatenate([before[None], head[:-1, _CHECKSUMS]])
            sums = _checksums(np.ascontiguousarray(frames[:, :8]).view(order), sums)
            sums = _checksums(frames.view(order)[:, 6:], sums)
            heads.append(head)
            continues.append((sums == head[:, _CHECKSUMS]).all(axis=1))
            before = head[-1, _CHECKSUMS]
        return np.concatenate(heads), np.concatenate(continues)

    def _guess_salts(self, salts: _Words) -> _Words:
        """Return the salts of the first frame that follows one of the same salts."""
        follows = self.continues[1:] & (salts[1:] == salts[:-1]).all(axis=1)
        return salts[int(np.argmax(follows)) if follows.any() else 0 :][:1]

    @property
    def sound(self) -> _Flags:
        """Whether each frame is of the present run and unchanged."""
        return self.has_salts & self.continues

    @property
    def belongs(self) -> _Flags:
        """Whether each frame is of the present run, damaged or not.

        The checksum does not cover the salts: a frame that continues a frame of the run belongs to
        it.
        """
        belonging = self.has_salts.copy()
        for index in np.flatnonzero(self.continues & ~self.has_salts):
            belonging[index] = index == 0 or belonging[index - 1]
        return belonging

    def damage(self, committed: int | None = None) -> str:
        """Return how the log is damaged so that committed transactions would be lost; "" if not.

        `committed` is the number of frames up to the last commit, if it is known. Later commits may
        follow that nobody relies on: those of a process that was killed before it entered them in
        the index, so that another process has overwritten the beginning of its transaction.
        """
        if not len(self.pages):
            return ""
        if not self.has_sound_header:
            return "the header of the write-ahead log does not verify"
        bad = np.flatnonzero(~self.sound)
        if not len(bad) or not (self.commits & self.belongs)[bad[0] : committed].any():
            return ""
        return f"frame {bad[0] + 1} of the write-ahead log does not verify, and commits follow"


def sibling_path(path: Path, name: str) -> Path:
    """Return the path of SQLite's LOG or SHARED_MEMORY: beside the file that a link leads to."""
    real = path.resolve()
    return real.with_name(real.name + name)


def check(path: Path) -> None:
    """Raise sqlite3.DatabaseError if SQLite would not read all of the log of `path`.

    The caller holds the writer's lock, and SQLite has not opened the files. If the database does
    not exist, it was deleted, and its log belongs to no file. Raises OSError.
    """
    if (damage := damage_of(path)) and path.exists():
        raise sqlite3.DatabaseError(f"the file is damaged: {damage}")


def is_open_without_log(path: Path) -> bool:
    """Tell whether another connection has the database open while no log is at its path.

    Every connection that has read a database of this mode has its log open and holds a shared lock,
    so an exclusive lock is refused.
    """
    if sibling_path(path, LOG).exists() or not has_content(path):
        return False
    try:
        with contextlib.closing(
            sqlite3.connect(path, timeout=0.0, isolation_level=None)
        ) as connection:
            connection.execute("PRAGMA locking_mode = EXCLUSIVE").fetchall()
            connection.execute("PRAGMA user_version").fetchall()
    except sqlite3.OperationalError as error:
        return "locked" in str(error)
    except sqlite3.DatabaseError:
        return False  # Whoever opens it finds out.
    return False


def damage_of(path: Path) -> str:
    """Return how the log of the database at `path` is damaged; "" if it is not. Raises OSError."""
    try:
        if not (log_path := sibling_path(path, LOG)).is_file():
            return ""  # SQLite says what else it is.
        if log_path.stat().st_size <= HEADER_BYTES + FRAME_HEADER_BYTES:
            return ""
        file = os.open(log_path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return ""
    try:
        log = Log(file, _PAGE_BYTES)
        if not log.has_sound_header and (size := _page_bytes(path)) != _PAGE_BYTES:
            log = Log(file, size)
    finally:
        os.close(file)
    damage = log.damage()
    if damage and log.has_sound_header:
        damage = log.damage(_committed_frames(path, log.salt_bytes))
    if not damage and path.exists() and path.stat().st_size == 0 and len(log.pages):
        return "it is empty, but its write-ahead log is not"
    return damage


def _committed_frames(path: Path, salts: bytes) -> int | None:
    """Return the number of frames up to a log's last commit; None if its index does not tell.

    The index survives a kill: a transaction is entered there before anybody learns of it. It does
    not survive a power cut, and it may belong to another log; then the salts differ.
    """
    try:
        file = os.open(sibling_path(path, SHARED_MEMORY), os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None
    # To close it would take the locks of other connections of this process. It is opened only where
    # a log seems to be damaged.
    _never_closed.append(file)
    with contextlib.suppress(OSError):
        head = os.pread(file, 2 * _INDEX_HEADER_BYTES, 0)
        first, second = head[:_INDEX_HEADER_BYTES], head[_INDEX_HEADER_BYTES:]
        if first != second or len(second) < _INDEX_HEADER_BYTES:
            return None
        words = np.frombuffer(first, "<u4" if sys.byteorder == "little" else ">u4")
        own = _checksums(words[:10].reshape(1, -1), np.zeros((1, 2), np.uint32))
        if (own[0] == words[10:12]).all() and first[32:40] == salts:
            return int(words[4])
    return None


def _read_frames(file: int, length: int, at: int, size: int) -> bytes:
    """Return the whole frames; zeros for a frame that the disk cannot read."""
    length = max(0, length // size * size)
    try:
        data = os.pread(file, length, at)
    except OSError:
        if length == size:
            return bytes(size)
        return b"".join(_read_frames(file, size, at + i, size) for i in range(0, length, size))
    return data[: len(data) // size * size]


def has_content(path: Path) -> bool:
    """Tell whether a file exists and is not empty."""
    try:
        return path.stat().st_size > 0
    except FileNotFoundError:
        return False


def _page_bytes(path: Path) -> int:
    # To close it takes the locks of other connections of this process: they have to let go anyway.
    try:
        with path.open("rb") as file:
            return SIZES.get(int.from_bytes(file.read(18)[16:]), _PAGE_BYTES)
    except FileNotFoundError:
        return _PAGE_BYTES


def _checksums(words: npt.NDArray[np.unsignedinteger], before: _Words) -> _Words:
    """Return the checksums of rows of words (4.2), each continued from the one in `before`."""
    factors, power = _factors(words.shape[1] // 2)
    native = words.astype(np.uint32)
    own = np.stack([native @ factors[0], native @ factors[1]], axis=1)
    carried = [before[:, 0] * p + before[:, 1] * q for p, q in power]
    sums: _Words = own + np.stack(carried, axis=1)
    return sums


@lru_cache(maxsize=8)
def _factors(pairs: int) -> tuple[_Words, _Words]:
    """Return by what each word counts in either sum, and so does each sum before.

    A pair (x, y) makes s0 + s1 + x of the first sum, and s0 + 2 * s1 + x + y of the second.
    """
    factors = np.empty((2, 2 * pairs), np.uint32)
    a, b, c, d = 1, 0, 0, 1  # The matrix of that, to the power of the pairs that follow.
    for index in range(2 * pairs - 2, -2, -2):
        factors[:, index] = (a + b) & 0xFFFFFFFF, (c + d) & 0xFFFFFFFF
        factors[:, index + 1] = b, d
        a, b = (a + b) & 0xFFFFFFFF, (a + 2 * b) & 0xFFFFFFFF
        c, d = (c + d) & 0xFFFFFFFF, (c + 2 * d) & 0xFFFFFFFF
    return factors, np.array([[a, b], [c, d]], np.uint32)
