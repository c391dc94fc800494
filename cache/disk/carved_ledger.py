"""The sums of a damaged file's ledger, from the pages of both of its copies.

Table `Usage` and its index `Usage_copy` hold the same lines. Of each sum the higher one counts, as
sums only grow. A line that stands on a page twice is two: the row in the table was damaged, and
counted from zero again. A page whose lines are out of order counts only for want of another.

Table `Hours` has no second copy: what stood on a damaged page of it is known by day alone.
"""

from collections.abc import Iterator
from typing import Any, TypeAlias

from embedding_proxy.cache.ledger import Usage

USAGE, USAGE_COPY, LAYOUT_1 = "iisssiiiiiiii", "iiiiiiiiiisss", "iiiiiiii"
HOURS = "issiiiiiiii"
SHAPES = USAGE, USAGE_COPY, LAYOUT_1, HOURS
"""The shapes of rows (see `pages`): of the table, of its index, of the table of layout 1, and of
table `Hours`."""

Line: TypeAlias = tuple[int, int, str, str, str]
"""Day (since 1970, UTC), number of the partition, model, provider and client; of table `Hours` the
hour, 0, model, "" and client."""
_Known: TypeAlias = dict[Line, tuple[bool, Usage]]
"""Whether the page of a line is sound, and its sums."""

_SUMS = len(Usage._fields)
_MAX_SUM = 1 << 53  # Nine million dollars, in nanodollars: more is noise.
_MAX_DAYS = 1 << 17
_MAX_PARTITIONS = 1 << 32


class Page:
    """The lines of one page, in the order in which they stand there."""

    def __init__(self) -> None:
        self.is_sound = True
        self.lines: dict[str, dict[Line, Usage]] = {}
        self._before: tuple[str, tuple[Any, ...]] | None = None

    def add(self, shape: str, values: tuple[Any, ...]) -> None:
        """Add a row of one of the shapes."""
        # Sorted by what they hold, in the index as in the table.
        if self._before is not None:
            self.is_sound &= self._before[0] == shape and self._before[1] < values
        self._before = shape, values
        line, sums = _split(shape, values)
        if not (
            0 <= line[0] < _MAX_DAYS * (24 if shape == HOURS else 1)
            and 0 <= line[1] < _MAX_PARTITIONS
            and all(0 <= number < _MAX_SUM for number in sums)
        ):
            self.is_sound = False
            return
        lines, usage = self.lines.setdefault(shape, {}), Usage(*sums)
        lines[line] = lines[line].plus(usage) if line in lines else usage


class CarvedLedger:
    """The lines of all pages."""

    def __init__(self) -> None:
        self._known: dict[str, _Known] = {shape: {} for shape in SHAPES}

    def add(self, page: Page) -> None:
        """Add what stands on a page."""
        for shape, lines in page.lines.items():
            for line, usage in lines.items():
                _keep(self._known[shape], line, usage, is_sound=page.is_sound)

    @property
    def is_of_layout_1(self) -> bool:
        """Whether there is nothing but lines of layout 1: they name no model."""
        return not (self._known[USAGE] or self._known[USAGE_COPY])

    @property
    def hours(self) -> dict[tuple[int, str, str], Usage]:
        """The sums of table `Hours`, by hour (since 1970, UTC), model and client."""
        return {
            (hour, model, client): usage
            for (hour, _, model, _, client), (is_sound, usage) in self._known[HOURS].items()
            if is_sound
        }

    def lines(self) -> Iterator[tuple[Line, Usage]]:
        """Yield each line of the days once."""
        if self.is_of_layout_1:
            # What is left of it in a file of a later layout is counted there, too.
            merged = self._known[LAYOUT_1]
        else:
            merged = _merged(self._known[USAGE], self._known[USAGE_COPY])
        for line, (_, usage) in merged.items():
            yield line, usage


def _merged(table: _Known, index: _Known) -> _Known:
    sums: _Known = {}
    for own, other in ((table, index), (index, table)):
        for line, (is_sound, usage) in own.items():
            # A line that only a damaged page has may be another's, changed.
            if is_sound or line in other or len(other) < len(own):
                _keep(sums, line, usage, is_sound=is_sound)
    return sums


def _keep(known: _Known, line: Line, usage: Usage, *, is_sound: bool) -> None:
    before = known.get(line)
    if before is None or before[0] < is_sound:
        known[line] = is_sound, usage
    elif before[0] == is_sound:
        known[line] = is_sound, Usage(*map(max, before[1], usage))


def _split(shape: str, values: tuple[Any, ...]) -> tuple[Line, tuple[int, ...]]:
    if shape == LAYOUT_1:
        return (values[0], values[1], "", "", ""), values[2:]
    if shape == USAGE:
        return values[:-_SUMS], values[-_SUMS:]
    if shape == HOURS:
        hour, model, client = values[:-_SUMS]
        return (hour, 0, model, "", client), values[-_SUMS:]
    return values[_SUMS:], values[:_SUMS]
