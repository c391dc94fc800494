"""Files that are written as a whole: a reader finds the old content or the new one, never a part.

The content goes to a temporary file of a unique name in the same folder, is flushed to disk, and
only then gets its name. So any number of processes may write one file at the same time, and a full
disk costs nothing of what was there. What a function has returned from outlives a power cut, where
the file system can flush a folder. Everything raises OSError.
"""

import contextlib
import os
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from . import private_files

SUFFIX = ".part"
"""The suffix of temporary files."""


@contextlib.contextmanager
def opened(path: Path, *, mode: int = 0o600, exclusive: bool = False) -> Iterator[BinaryIO]:
    """Give a binary file that gets the name `path` when the block ends without an error.

    `mode` is the permissions of the file, less the process's umask. `exclusive`: see `publish`. An
    error leaves no temporary file behind.
    """
    part = path.with_name(f"{path.name}.{secrets.token_hex(8)}{SUFFIX}")
    handle = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), mode)
    try:
        with open(handle, "wb") as file:  # noqa: PTH123 - it is open already
            yield file
        publish(part, path, exclusive=exclusive)
    finally:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)


def write(path: Path, content: bytes, *, mode: int = 0o600, exclusive: bool = False) -> None:
    """Write a file as a whole; see `opened`."""
    with opened(path, mode=mode, exclusive=exclusive) as file:
        file.write(content)


def append(path: Path, content: bytes) -> None:
    """Append to a file, which is created with mode 0600. A kill may leave a part of the data."""
    is_new = not path.exists()
    with open(path, "ab", opener=private_files.opener) as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    if is_new:
        _sync(path.parent)


def publish(part: Path, path: Path, *, exclusive: bool = False) -> None:
    """Give a complete file its name, in the same file system. Its content is on disk by then.

    With `exclusive` an existing file at `path` stays, and FileExistsError is raised; otherwise it
    is replaced.
    """
    with part.open("rb+") as file:
        os.fsync(file.fileno())
    if exclusive:
        _link(part, path)
    else:
        part.replace(path)
    _sync(path.parent)


def move(path: Path, target: Path) -> None:
    """Rename a file, also into another folder of the same file system."""
    path.rename(target)
    for folder in {target.parent, path.parent}:
        _sync(folder)


def _link(part: Path, path: Path) -> None:
    """Give a file a name that no other file has. Raises FileExistsError."""
    try:
        # Unlike a rename, a link never replaces another file.
        os.link(part, path)
    except FileExistsError:
        raise
    except OSError:
        # The file system has no links. Two processes at the same moment may both get here.
        if path.exists():
            raise FileExistsError(f"{path} exists") from None
        part.replace(path)


def _sync(folder: Path) -> None:
    """Flush the entries of a folder, if the system can, so that a power cut loses no name."""
    if os.name != "posix":
        return
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
