"""The location of a store, and whether one can be used there. Checking makes no store."""

import contextlib
import os
import re
import shutil
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from embedding_proxy.cache.disk import connection
from embedding_proxy.cache.disk.disk_full import FREE_BYTES

from . import stats
from .stats import Stats

# fmt: off
NETWORK = frozenset({
    "9p", "afs", "beegfs", "ceph", "cifs", "davfs", "fuse.davfs2", "fuse.glusterfs", "fuse.rclone",
    "fuse.s3fs", "fuse.sshfs", "glusterfs", "gpfs", "lustre", "nfs", "nfs4", "smb3", "smbfs",
})
# fmt: on
"""File systems that are somewhere else: SQLite's locks and its shared memory do not hold there."""

_MOUNTS = Path("/proc/self/mounts")


@dataclass(frozen=True, slots=True)
class Location:
    """What is known of the folder of a store, or of the nearest one above it that there is."""

    nearest: Path
    is_folder: bool
    writable: bool
    """Whether this process may write there, and the medium takes writes at all."""
    free_bytes: int
    file_system: str | None
    """As the kernel names it; None where it tells nothing."""

    @property
    def is_remote(self) -> bool:
        """Whether it lies on a network file system."""
        return self.file_system in NETWORK


@dataclass(frozen=True, slots=True)
class Inspection:
    """What came of looking at a store."""

    location: Location
    exists: bool
    held: Stats | None
    """None where there is no store yet, or none that can be opened."""
    lacking_bytes: int
    """By how much the disk is smaller than what the store may still grow by."""
    problem: str
    """Why it cannot be used, in one line; empty if it can."""


def inspect(directory: Path, size_limit: int, pinned: Collection[str] = ()) -> Inspection:
    """Look at the store in `directory`, beside its proxies; nothing is written. Raises OSError."""
    location, exists, contents, problem = look(directory), connection.exists(directory), None, ""
    if exists:
        try:
            with connection.opened_for_reading(directory, size_limit, pinned) as file:
                contents = stats.gather(file)
            if reason := connection.write_obstacle(directory):
                problem = (
                    f"{connection.folder_of(directory)}: cannot be written: {reason};"
                    " what is in it is served, and nothing is kept"
                )
        except connection.StoreError as error:
            problem = str(error)
            if connection.is_damaged(error):
                problem += "; `embedding-proxy cache verify --mend` saves what is whole"
            elif not location.writable:
                problem += "; what is in it is served, and nothing is kept"
    elif not location.is_folder:
        problem = f"{location.nearest} is no folder; name another cache.directory"
    elif not location.writable:
        problem = f"{location.nearest} takes no writes, and the store would be made there"
    if not problem and location.free_bytes < FREE_BYTES:
        problem = (
            f"{location.free_bytes / 1e6:.0f} MB are free on the file system of {location.nearest};"
            f" below {FREE_BYTES / 1e6:.0f} MB nothing is written"
        )
    growth = size_limit - (contents.file_bytes if contents else 0)
    return Inspection(location, exists, contents, max(0, growth - location.free_bytes), problem)


def look(directory: Path) -> Location:
    """Look at the location of the store in `directory`. Raises OSError."""
    folder = connection.folder_of(directory).absolute()
    nearest = next(path for path in (folder, *folder.parents) if os.path.lexists(path))
    mounts = ""
    with contextlib.suppress(OSError):
        mounts = _MOUNTS.read_text(encoding="utf-8", errors="surrogateescape")
    return Location(
        nearest,
        nearest.is_dir(),
        os.access(nearest, os.W_OK | os.X_OK),
        shutil.disk_usage(nearest if nearest.exists() else nearest.parent).free,
        file_system_of(nearest.resolve(), mounts),
    )


def file_system_of(path: Path, mounts: str) -> str | None:
    r"""Return the type of the file system that a path is on, by the lines of /proc/self/mounts.

    >>> file_system_of(Path("/a b/c"), "x / ext4 rw 0 0\ny /a\\040b nfs4 rw 0 0\n")
    'nfs4'
    """
    file_system, longest = None, 0
    for line in mounts.splitlines():
        _, point, kind, *_ = line.split(" ")
        point = re.sub(r"\\(\d{3})", lambda code: chr(int(code[1], 8)), point)
        # Of two at one point the later one is on top.
        if len(point) >= longest and path.is_relative_to(point):
            file_system, longest = kind, len(point)
    return file_system
