"""Keeps what the proxy stores from other users of the machine: files 0600, folders 0700.

A folder that the proxy did not make keeps its mode.

Vectors, texts that wait for Qdrant, dead letters and the ledger lie in the cache directory. SQLite
makes its files readable by everybody (0644 less the umask), and gives a log the mode of its
database. So databases are created here before SQLite opens them. A process's umask is not changed:
the library runs inside the programs of others.
"""

import contextlib
import logging
import os
import re
import stat
from collections.abc import Iterator
from pathlib import Path

log = logging.getLogger("embedding_proxy.store")

FILE_MODE = 0o600
FOLDER_MODE = 0o700
_OF_OTHERS = 0o077
"""The permission bits of the group and of all others."""

_WRITABLE_BY_OTHERS = 0o022

_OWN_NAMES = re.compile(
    r"v\d+$|v\d+\.|writer\.lock|index-outbox|index-sender|migrations$|metrics$|control-|keys\.yaml"
)
"""The beginnings of the names that the proxy uses in a cache directory. Other files are not
ours."""


def make_folder(folder: Path) -> None:
    """Make a folder that only its owner can enter, unless it exists. Raises OSError.

    Missing folders above it are made in the same way: a user who can change one of them could
    replace this one. (`parents` of Path.mkdir gives them the mode of the umask.)
    """
    folders = [folder]
    while not folders[-1].parent.exists():
        folders.append(folders[-1].parent)
    for path in reversed(folders):
        path.mkdir(exist_ok=True, mode=FOLDER_MODE)


def create(path: Path) -> None:
    """Create an empty file with mode 0600, unless there is one. Raises OSError."""
    os.close(os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_CLOEXEC", 0), FILE_MODE))


def opener(path: str, flags: int) -> int:
    """Open a file for `open(…, opener=opener)`. A new file has mode 0600."""
    return os.open(path, flags, FILE_MODE)


def secure(directory: Path) -> None:
    """Remove the permissions of others from the proxy's files in a cache directory.

    The directory itself keeps its mode: it may hold files of others, and `make_folder` has made it
    private if it was missing. A warning tells if others can change what is in it. The log names
    what was changed.
    """
    if os.name != "posix":
        return
    mended: list[Path] = []
    failed: list[tuple[Path, str]] = []
    for path in _own(directory):
        try:
            mode = stat.S_IMODE(path.lstat().st_mode)
            if mode & _OF_OTHERS:
                path.chmod(mode & ~_OF_OTHERS)
                mended.append(path)
        except FileNotFoundError:
            continue
        except OSError as error:
            failed.append((path, error.strerror or str(error)))
    if mended:
        log.info(
            "%s could be read by other users; it is now its owner's alone%s",
            mended[0],
            f", as are {len(mended) - 1} more files" if len(mended) > 1 else "",
        )
    if failed:
        path, why = failed[0]
        log.warning(
            "%s can be read by other users, and its permissions cannot be changed: %s; use a"
            " cache.directory that is its owner's alone (chmod 700)",
            *(path, why),
        )
    with contextlib.suppress(OSError):
        if directory.stat().st_mode & _WRITABLE_BY_OTHERS:
            log.warning(
                "other users can put files into %s, in the place of the cache's; use a"
                " cache.directory that is its owner's alone (chmod 700)",
                directory,
            )


def _own(directory: Path) -> Iterator[Path]:
    """Yield the files and folders of the proxy in a cache directory, folders first."""
    try:
        entries = [entry for entry in os.scandir(directory) if _OWN_NAMES.match(entry.name)]
    except OSError:
        return
    for entry in entries:
        if entry.is_symlink() or not (entry.is_dir() or entry.is_file()):
            continue
        yield Path(entry.path)
        if entry.is_dir():
            for folder, folders, files in os.walk(entry.path):
                inside = [Path(folder, name) for name in (*folders, *files)]
                yield from (path for path in inside if not path.is_symlink())
