"""Files that are written as a whole: a reader finds the old content or the new one, never a part.

The content goes to a temporary file of a unique name in the same folder, is flushed to disk, and
only then gets its name. So any number of processes may write one file at the same time.
"""

import contextlib
import os
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

SUFFIX = ".part"
"""How the names of temporary files end."""


@contextlib.contextmanager
def opened(path: Path, *, mode: int = 0o600, exclusive: bool = False) -> Iterator[BinaryIO]:
    """Give a binary file that is at `path` once the block has ended without an error.

    `mode` is the permissions of the file, less the process's umask. `exclusive`: a file that is at
    `path` by then stays, and FileExistsError is raised; otherwise it is replaced. Raises OSError.
    Whatever is raised, nothing is left of the temporary file.
    """
    part = path.with_name(f"{path.name}.{secrets.token_hex(8)}{SUFFIX}")
    handle = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), mode)
    try:
        with open(handle, "wb") as file:  # noqa: PTH123 - it is open already
            yield file
            file.flush()
            os.fsync(file.fileno())
        if exclusive:
            _link(part, path)
        else:
            part.replace(path)
        _sync_folder(path.parent)
    finally:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)


def write(path: Path, content: bytes, *, mode: int = 0o600, exclusive: bool = False) -> None:
    """Write a file as a whole; see `opened`. Raises OSError, and FileExistsError if `exclusive`."""
    with opened(path, mode=mode, exclusive=exclusive) as file:
        file.write(content)


def _link(part: Path, path: Path) -> None:
    """Give a file its name unless another one has it. Raises FileExistsError, OSError."""
    try:
        # Unlike a rename, a link never takes the place of another file.
        os.link(part, path)
    except FileExistsError:
        raise
    except OSError:
        # The file system has no links: two processes at the same moment may both get here.
        if path.exists():
            raise FileExistsError(f"{path} exists") from None
        part.replace(path)


def _sync_folder(folder: Path) -> None:
    """Flush the entries of a folder, where the system can: then a power cut takes no name."""
    if os.name != "posix":
        return
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
