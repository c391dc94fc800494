"""Leases between the processes of one machine: locks of byte ranges, on files beside the store.

A lease is one byte of a file, locked (F_OFD_SETLK): at an offset made of 62 bits of the address, in
one of FILES files by six bits more. It takes a system call, and the kernel frees it when the
process dies, however it dies. The kernel searches the locks of a file one by one, and lets one
process at a time do it. So they are spread: with one file, the 2,048 leases of a large request cost
7 µs each, and with those of seven other processes 180 µs; with 64 files 1 µs and 6 µs.

Where locks cannot be had (another system, a file system without them, a folder that cannot be
written), all leases are granted, and the log says so once.
"""

import asyncio
import contextlib
import errno
import logging
import os
import struct
import sys
from collections import deque
from collections.abc import Collection, Sequence
from pathlib import Path

from embedding_proxy.cache import private_files
from embedding_proxy.cache.leases import GRACE_S
from embedding_proxy.providers.base import slices

if sys.platform != "win32":
    import fcntl

log = logging.getLogger("embedding_proxy.store")

FOLDER_NAME = "leases"
FILES = 64
LOT = 256
"""Leases that are taken, or given back, without a turn for others, in some tenths of a
millisecond."""
CHECK_S = 1.0
"""How often it is looked whether the folder was deleted or replaced, in seconds."""
_TICK_S = 0.01
# Of Linux, as in fcntl(2): l_type, l_whence, l_start, l_len, l_pid.
_FLOCK = struct.Struct("hhqqi4x")
_HELD = (errno.EAGAIN, errno.EACCES)


class FileLeases:
    """Leases as `leases.Leases`. Open it in the event loop's thread; it needs no opening."""

    def __init__(self, folder: Path) -> None:
        """`folder` is the store's; its files are made when they are needed."""
        self._folder = folder / FOLDER_NAME
        self._files: dict[int, int] = {}
        """Descriptors of the files that are open, by number."""
        self._inode: tuple[int, int] | None = None
        """Of the folder that they lie in."""
        self._next_check = 0.0
        self._grants: dict[bytes, int] = {}
        """How often each lease that is held was granted."""
        self._kept: deque[tuple[float, Collection[bytes]]] = deque()
        """Leases to be given back at a time of the clock, in that order."""
        self._timer: asyncio.TimerHandle | None = None
        self._is_usable = sys.platform == "linux" and hasattr(fcntl, "F_OFD_SETLK")
        self._has_warned = False

    async def acquire(self, addresses: Sequence[bytes]) -> Collection[bytes]:
        """Take the leases that no other process holds; return their addresses."""
        if not self._is_usable:
            return addresses
        now = asyncio.get_running_loop().time()
        if now >= self._next_check:
            self._next_check = now + CHECK_S
            self._close_replaced()
        if len(addresses) <= LOT:
            return self._acquire_lot(addresses)
        granted: list[bytes] = []
        try:
            async for some in slices(addresses, LOT):
                granted += self._acquire_lot(some)
        except asyncio.CancelledError:
            self._release(granted)
            raise
        return granted

    def _acquire_lot(self, addresses: Sequence[bytes]) -> list[bytes]:
        grants, granted = self._grants, []
        for address in addresses:
            count = grants.get(address, 0)
            if count or self._lock(address):
                grants[address] = count + 1
                granted.append(address)
        return granted

    def lapsed_s(self, addresses: Collection[bytes]) -> float:  # noqa: ARG002 - as in `Leases`
        """Return 0: no lease is another process's while this one holds it."""
        return 0.0

    def release(self, addresses: Collection[bytes], *, is_written: bool) -> None:
        """Give leases back: at once, or after GRACE_S if their records were written."""
        if not self._is_usable:
            return
        if not is_written:
            self._release(addresses)
            return
        loop = asyncio.get_running_loop()
        end, leases = loop.time() + GRACE_S, list(addresses)
        for start in range(0, len(leases), LOT):
            self._kept.append((end, leases[start : start + LOT]))
        if self._timer is None:
            self._timer = loop.call_later(GRACE_S, self._release_kept)

    def _release_kept(self) -> None:
        """Give back the lot whose time is over; the next one in a turn of its own."""
        self._timer, kept, loop = None, self._kept, asyncio.get_running_loop()
        # Timers may go off early by as much: uvloop's count whole milliseconds.
        if kept and kept[0][0] <= loop.time() + _TICK_S:
            self._release(kept.popleft()[1])
        if kept:
            self._timer = loop.call_at(kept[0][0], self._release_kept)

    def _release(self, addresses: Collection[bytes]) -> None:
        for address in addresses:
            count = self._grants.get(address, 0)
            if count > 1:
                self._grants[address] = count - 1
            elif count:
                del self._grants[address]
                self._unlock(address)

    def close(self) -> None:
        """Give everything back."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._kept.clear()
        self._grants.clear()
        self._close_files()

    def _lock(self, address: bytes) -> bool:
        """Lock the byte of an address; return False if another process has."""
        try:
            self._set(address, fcntl.F_WRLCK)
        except OSError as error:
            # With a name it is not the lock that was refused, but the file.
            if error.errno in _HELD and error.filename is None:
                return False
            self._warn(error)
        return True

    def _unlock(self, address: bytes) -> None:
        # Where the file is gone, so is its lock.
        if address[8] % FILES in self._files:
            try:
                self._set(address, fcntl.F_UNLCK)
            except OSError as error:
                self._warn(error)

    def _set(self, address: bytes, kind: int) -> None:
        number = address[8] % FILES
        file = self._files.get(number)
        if file is None:
            file = self._open(number)
        offset = int.from_bytes(address[:8]) >> 2
        fcntl.fcntl(file, fcntl.F_OFD_SETLK, _FLOCK.pack(kind, os.SEEK_SET, offset, 1, 0))

    def _open(self, number: int) -> int:
        if self._inode is None:
            private_files.make_folder(self._folder)
            self._inode = _inode_of(self._folder)
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC
        file = os.open(self._folder / f"{number:02}", flags, private_files.FILE_MODE)
        self._files[number] = file
        return file

    def _close_replaced(self) -> None:
        """Let go of the files if others lock other ones by now: of a new folder at this path."""
        if self._inode is None:
            return
        with contextlib.suppress(OSError):
            if _inode_of(self._folder) == self._inode:
                return
        self._close_files()

    def _close_files(self) -> None:
        self._inode = None
        while self._files:
            os.close(self._files.popitem()[1])

    def _warn(self, error: OSError) -> None:
        if not self._has_warned:
            self._has_warned = True
            log.warning(
                "%s: no leases can be had (%s): processes that share the cache may buy the same"
                " text at the same time",
                *(self._folder, error.strerror or error),
            )


def _inode_of(folder: Path) -> tuple[int, int]:
    status = folder.stat()
    return status.st_dev, status.st_ino
