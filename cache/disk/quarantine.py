"""A damaged store file that was moved out of the way: where it lies, and how far its salvage is.

`v1/cache.db` goes to `v1.damaged-STAMP-N/cache.db`, its write-ahead log with it. Nothing else in
`v1/` moves, and nothing is deleted. `salvage.json` in the new folder says what is still to be done;
a folder without one was set aside by an earlier version, and is left alone.

The order of events makes a kill at any point harmless: the folder is made, `salvage.json` says that
the file is to be moved, the database is moved, then the log. Whoever opens the store next finishes
what was begun (`complete`), before SQLite sees the folder.
"""

import contextlib
import json
import re
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from embedding_proxy.cache import atomic_file

from .write_ahead_log import LOG, SHARED_MEMORY, has_content

STATE_FILE = "salvage.json"
MAX_FOLDERS = 1000
"""Of one second."""
_NAME = re.compile(r"v\d+\.damaged-\d{8}T\d{6}-\d+")


@dataclass(frozen=True, slots=True)
class QuarantinedFile:
    """A folder with one damaged database, named `name`, and its write-ahead log."""

    folder: Path
    name: str

    @property
    def path(self) -> Path:
        """The database."""
        return self.folder / self.name

    @property
    def log(self) -> Path:
        """The write-ahead log; it may be missing."""
        return self.folder / f"{self.name}{LOG}"

    @property
    def number(self) -> int:
        """The order of the files that were set aside: a later one has a higher number."""
        number = self.state.get("number")
        return number if type(number) is int else 0

    @property
    def is_pending(self) -> bool:
        """Whether it may hold something that is not in the store's file yet."""
        return not self.state.get("done", True)

    @property
    def is_moved(self) -> bool:
        """Whether the file is in this folder. Otherwise it is still to be moved (`complete`)."""
        return bool(self.state.get("moved"))

    @property
    def has_given_sums(self) -> bool:
        """Whether the sums of its ledger are in the store's file."""
        return bool(self.state.get("sums"))

    @property
    def state(self) -> dict[str, Any]:
        """The content of `salvage.json`; empty without one; all undone if it is damaged."""
        try:
            state = json.loads((self.folder / STATE_FILE).read_bytes())
        except FileNotFoundError:
            return {}
        except (OSError, ValueError):
            state = None
        return state if isinstance(state, dict) else {"done": False, "moved": self.path.exists()}

    def note(self, **changed: object) -> None:
        """Write to `salvage.json` as a whole. Raises OSError."""
        atomic_file.write(self.folder / STATE_FILE, json.dumps(self.state | changed).encode())


def is_name(name: str) -> bool:
    """Tell whether a folder has the name of a quarantine."""
    return _NAME.fullmatch(name) is not None


def is_in_folder(path: Path) -> bool:
    """Tell whether a file is in a folder with the name of a quarantine."""
    return is_name(path.absolute().parent.name)


def move(path: Path, inode: int | None) -> QuarantinedFile | None:
    """Move the database at `path` aside, if it is still the one with that inode.

    The caller holds the writer's lock. Raises OSError; `complete` then does the rest.
    """
    if inode is None or inode_of(path) != inode:
        return None
    quarantined = QuarantinedFile(_made_folder(path.parent), path.name)
    number = 1 + max((other.number for other in _all(path)), default=0)
    quarantined.note(done=False, moved=False, number=number, inode=inode)
    _finish_move(quarantined, path)
    return quarantined


def complete(path: Path) -> None:
    """Finish a `move` whose process was killed. The caller holds the writer's lock.

    Raises OSError.
    """
    for quarantined in _all(path):
        if quarantined.is_pending and not quarantined.is_moved:
            _finish_move(quarantined, path)


def pending(path: Path) -> list[QuarantinedFile]:
    """Return the quarantined files of a store that are not salvaged, the latest first."""
    folders = [
        quarantined for quarantined in _all(path) if quarantined.is_pending and quarantined.is_moved
    ]
    return sorted(folders, key=lambda quarantined: quarantined.number, reverse=True)


def inode_of(path: Path) -> int | None:
    """Return the inode of a file; None if there is none. Raises OSError."""
    try:
        return path.stat().st_ino
    except FileNotFoundError:
        return None


def _finish_move(quarantined: QuarantinedFile, path: Path) -> None:
    if not quarantined.path.exists():
        if inode_of(path) != quarantined.state.get("inode"):
            # Another file has been put there since.
            quarantined.note(done=True, moved=True)
            return
        atomic_file.move(path, quarantined.path)
    # The log belongs to the moved file as long as no other file is at its path.
    if not has_content(path):
        with contextlib.suppress(FileNotFoundError):
            atomic_file.move(path.with_name(f"{path.name}{LOG}"), quarantined.log)
        path.with_name(f"{path.name}{SHARED_MEMORY}").unlink(missing_ok=True)
    quarantined.note(moved=True)


def _made_folder(folder: Path) -> Path:
    stamp = time.strftime("%Y%m%dT%H%M%S")
    for attempt in range(MAX_FOLDERS):
        quarantined = folder.with_name(f"{folder.name}.damaged-{stamp}-{attempt}")
        with contextlib.suppress(FileExistsError):
            quarantined.mkdir(mode=0o700)
            return quarantined
    raise FileExistsError(f"{folder}: there are too many damaged stores beside it")


def _all(path: Path) -> list[QuarantinedFile]:
    """Return all quarantined files of the store at `path`."""
    try:
        names = [folder.name for folder in path.parent.parent.iterdir()]
    except OSError:
        return []
    prefix = f"{path.parent.name}.damaged-"
    return [
        QuarantinedFile(path.parent.with_name(name), path.name)
        for name in sorted(names)
        if name.startswith(prefix) and is_name(name)
    ]
