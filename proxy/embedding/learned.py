"""Widths that no configuration tells: learned from a model's first answer, and pinned in a file.

A model that changes its width afterwards is another model; its answers are refused like any others
of a wrong width.
"""

import logging
from pathlib import Path

import orjson

from providers.base import InvalidAnswer

WIDTHS_FILE = "widths.json"
"""The name of the file, in the folder of the store."""

log = logging.getLogger("embedding_proxy.learned")


class Pins:
    """The widths that were learned, by the name of the space. All workers share the file."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self._known: dict[str, int] = {}

    def width(self, space: str) -> int:
        """Return the width of a space, 0 where it has not been learned by any worker."""
        if space not in self._known:
            self._known |= self._read()
        return self._known.get(space, 0)

    def pin(self, space: str, width: int) -> None:
        """Keep a width that was learned. Raises InvalidAnswer when the space has another one."""
        known = self.width(space)
        if known == width:
            return
        if known:
            raise InvalidAnswer(space, f"{width} dimensions instead of {known}, as it had before")
        self._known[space] = width
        log.info("%s: its vectors have %d numbers; kept in %s", space, width, self._file)
        part = self._file.with_suffix(".part")
        try:
            part.write_bytes(orjson.dumps(self._read() | self._known, option=orjson.OPT_INDENT_2))
            part.replace(self._file)
        except OSError as error:
            log.warning("%s: learned widths cannot be kept: %s", self._file, error)

    def _read(self) -> dict[str, int]:
        try:
            found = orjson.loads(self._file.read_bytes())
            return {str(space): int(width) for space, width in found.items() if int(width) > 0}
        except (OSError, ValueError, TypeError, AttributeError):
            return {}
