"""Widths that no configuration tells: learned from a model's first answer, and pinned in a file.

A model that changes its width afterwards is another model; its answers are refused like any others
of a wrong width.
"""

import asyncio
import logging
from contextlib import closing
from pathlib import Path

import orjson

from cache import atomic_file
from cache.disk.lock import WriterLock
from providers.base import InvalidAnswer

WIDTHS_FILE = "widths.json"
"""The name of the file, in the folder of the store."""
MAX_WIDTHS = 10_000
"""Spaces whose width is pinned. Clients name the models; of further ones each process learns the
width for itself, from an input that it buys."""
PATIENCE_S = 2.0
"""The longest wait for another worker that writes the file."""

log = logging.getLogger("embedding_proxy.learned")


class LearnedDimensions:
    """The widths that were learned, by the name of the space. All workers share the file.

    The file is read and written in threads.
    """

    def __init__(self, file: Path) -> None:
        self._file = file
        self._lock_file = file.with_suffix(".lock")
        self._known: dict[str, int] = {}
        self._version: tuple[int, ...] | None = None
        self._is_full = False

    def get(self, space: str) -> int:
        """Return the width of a space, 0 where it has not been learned so far."""
        return self._known.get(space, 0)

    async def refresh(self) -> None:
        """Take over what other workers have learned, if the file is another one by now."""
        self._known |= await asyncio.to_thread(self._read_changed)

    async def pin(self, space: str, width: int) -> None:
        """Keep a width that was learned. Raises InvalidAnswer when the space has another one."""
        known = self.get(space)
        if not known:
            known = await asyncio.to_thread(self._pin, space, width)
            if len(self._known) < MAX_WIDTHS:
                known = self._known.setdefault(space, known)
        if known != width:
            raise InvalidAnswer(space, f"{width} dimensions instead of {known}, as it had before")

    def _pin(self, space: str, width: int) -> int:
        """Add a width to the file; return the one of the file where another worker was first."""
        try:
            with closing(WriterLock(self._lock_file, PATIENCE_S)) as lock, lock:
                kept = self._read()
                if space in kept:
                    return kept[space]
                if len(kept) >= MAX_WIDTHS:
                    self._tell_full()
                    return width
                kept[space] = width
                atomic_file.write(self._file, orjson.dumps(kept, option=orjson.OPT_INDENT_2))
        except OSError as error:
            log.warning("%s: learned widths cannot be kept: %s", self._file, error)
        else:
            log.info("%s: its vectors have %d numbers; kept in %s", space, width, self._file)
        return width

    def _tell_full(self) -> None:
        """Say once that no further width is kept."""
        if not self._is_full:
            self._is_full = True
            log.warning(
                "%s: holds the widths of %d models that clients named; further ones are not kept:"
                " name the models in the configuration, or delete the file",
                *(self._file, MAX_WIDTHS),
            )

    def _read_changed(self) -> dict[str, int]:
        """Return what the file holds, if it is another one than at the last call."""
        try:
            found = self._file.stat()
        except OSError:
            return {}
        version = (found.st_ino, found.st_mtime_ns, found.st_size)
        if version == self._version:
            return {}
        self._version = version
        return self._read(is_told=True)

    def _read(self, *, is_told: bool = False) -> dict[str, int]:
        """Return what the file holds: nothing where it cannot be read, or is not one of ours."""
        try:
            found = orjson.loads(self._file.read_bytes())
            return {str(space): int(width) for space, width in found.items() if int(width) > 0}
        except (OSError, ValueError, TypeError, AttributeError) as error:
            if is_told:
                log.warning(
                    "%s: is damaged or cannot be read (%s): widths are learned anew from the"
                    " next answers; to declare them, set `dimensions` of the models",
                    *(self._file, type(error).__name__),
                )
            return {}
