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
"""Network file systems: SQLite's locks and shared memory do not work on them."""

_MOUNTS = Path("/proc/self/mounts")


@dataclass(frozen=True, slots=True)
class Location:
    """The facts about the folder of a store, or about the nearest existing folder above it."""

    nearest: Path
    is_folder: bool
    writable: bool
    """Whether this process may write there, and the medium accepts writes."""
    free_bytes: int
    file_system: str | None
    """The kernel's name of the type; None if it gives none."""

    @property
    def is_remote(self) -> bool:
        """Whether it is on a network file system."""
        return self.file_system in NETWORK


@dataclass(frozen=True, slots=True)
class Inspection:
    """The result of an inspection of a store."""

    location: Location
    exists: bool
    held: Stats | None
    """The sums of the store; None if there is none, or none that can be opened."""
    lacking_bytes: int
    """The bytes that the disk lacks for the growth of the store up to its limit."""
    problem: str
    """Why it cannot be used, in one line; empty if it can."""


def inspect(directory: Path, size_limit: int, pinned: Collection[str] = ()) -> Inspection:
    """Inspect the store in `directory`, beside its proxies, without a write. Raises OSError."""
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
    """Return the location of the store in `directory`. Raises OSError."""
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
