"""Counters that processes share and that survive restarts: files in the cache folder.

Each process takes a slot, the first that no live process holds, and publishes its values there:
`N.series` names them, a JSON line each, and `N.values` holds the numbers, 8 bytes each, in the same
order. A process that takes a slot goes on from the counters that it finds. Reading is summing all
slots. So every process tells the same totals, and they never fall.

A kill loses what was not published yet, at most PUBLISH_S. A slot that cannot be read counts as
empty; where no slot can be written, the process counts for itself alone.
"""

import contextlib
import logging
import math
import os
import sys
from array import array
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple, TypeAlias

import orjson

if sys.platform != "win32":
    import fcntl

log = logging.getLogger("embedding_proxy.metrics")

FOLDER = "metrics"
PUBLISH_S = 0.05
"""Seconds after which a change is published at the latest."""
MAX_SLOTS = 1024
MAX_SERIES = 8192
"""Series of a slot; others are left out."""
_COUNTER, _GAUGE = "counter", "gauge"
_ABSENT = math.nan
"""The value of a gauge that a process does not have now."""

Labels: TypeAlias = tuple[tuple[str, str], ...]


class Series(NamedTuple):
    """What a number is about: the name of a metric, and its labels."""

    name: str
    labels: Labels = ()


class Totals(NamedTuple):
    """What all processes have published."""

    counters: dict[Series, float]
    """Sums over all slots."""
    gauges: dict[Series, list[float]]
    """The values of live processes, one for each that has it."""


class SharedCounters:
    """The slot of this process, and a reader of all. For one thread."""

    def __init__(self, folder: Path) -> None:
        """`folder` is made by `open`, unless that fails."""
        self._folder = folder
        self._series: dict[Series, int] = {}
        self._kinds: list[str] = []
        self._values = array("d")
        self._before: dict[Series, float] = {}
        """What is added to the counters of this process: what the slot held when it was taken, and
        what was counted before a counter began anew."""
        self._latest: dict[Series, float] = {}
        self._number: int | None = None
        self._names_file = self._values_file = -1
        self._has_warned = False

    def open(self) -> None:
        """Take a slot. Where that fails, this process counts for itself alone, and says so."""
        try:
            self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            for number in range(MAX_SLOTS):
                if self._take(number):
                    return
        except OSError as error:
            self._warn(f"metrics are not kept over restarts: {error.strerror}")
            self.close()

    def _take(self, number: int) -> bool:
        names = _open_locked(self._folder / f"{number}.series")
        if names is None:
            return False
        self._names_file = names
        self._values_file = os.open(
            self._folder / f"{number}.values", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600
        )
        self._number = number
        content, values = _read(names), _numbers(_read(self._values_file))
        lines = content.split(b"\n")
        # A line without its end is one that a kill has cut.
        os.ftruncate(names, len(content) - len(lines[-1]))
        for line in lines[:-1]:
            kind, series = _parse(line)
            value = values[len(self._kinds)] if len(values) > len(self._kinds) else 0.0
            self._append(kind, series, value if kind == _COUNTER else _ABSENT)
            if kind == _COUNTER:
                self._before[series] = value
        self._write_values()
        return True

    def _append(self, kind: str, series: Series, value: float) -> None:
        self._series[series] = len(self._kinds)
        self._kinds.append(kind)
        self._values.append(value)

    def publish(self, counters: Mapping[Series, float], gauges: Mapping[Series, float]) -> None:
        """Publish the values of this process: counters since its start, gauges as they are.

        A counter that is lower than before has begun anew. A gauge that is left out is not told
        until it is there again.
        """
        for series, value in counters.items():
            latest = self._latest.get(series, 0.0)
            if value < latest:
                self._before[series] = self._before.get(series, 0.0) + latest
        self._latest.update(counters)
        new: list[tuple[str, Series]] = []
        for kind, values in ((_COUNTER, counters), (_GAUGE, gauges)):
            new += [(kind, series) for series in values if series not in self._series]
        for kind, series in new[: MAX_SERIES - len(self._kinds)]:
            self._append(kind, series, 0.0)
        for series, index in self._series.items():
            if self._kinds[index] == _GAUGE:
                self._values[index] = gauges.get(series, _ABSENT)
            elif series in counters:
                self._values[index] = self._before.get(series, 0.0) + counters[series]
        try:
            if new and self._names_file >= 0:
                os.lseek(self._names_file, 0, os.SEEK_END)
                lines = (
                    orjson.dumps([self._kinds[self._series[series]], series.name, series.labels])
                    for _, series in new
                    if series in self._series
                )
                os.write(self._names_file, b"".join(line + b"\n" for line in lines))
            self._write_values()
        except OSError as error:
            self._warn(f"metrics cannot be written: {error.strerror}")

    def _write_values(self) -> None:
        if self._values_file >= 0:
            os.pwrite(self._values_file, self._values.tobytes(), 0)

    def read(self) -> Totals:
        """Return the sums of all slots; of this process what it has published last."""
        totals = Totals({}, {})
        own = [(self._kinds[index], series) for series, index in self._series.items()]
        _add(totals, own, self._values, is_live=True)
        for number in self._others():
            with contextlib.suppress(OSError):
                path = self._folder / f"{number}.series"
                lines = path.read_bytes().split(b"\n")[:-1]
                values = _numbers(path.with_suffix(".values").read_bytes())
                _add(totals, map(_parse, lines), values, is_live=_is_held(path))
        return totals

    def has_live_others(self) -> bool:
        """Tell whether another process publishes here at the moment."""
        return any(_is_held(self._folder / f"{number}.series") for number in self._others())

    def _others(self) -> Iterator[int]:
        with contextlib.suppress(OSError):
            for path in self._folder.glob("*.series"):
                if path.stem.isdecimal() and int(path.stem) != self._number:
                    yield int(path.stem)

    def close(self) -> None:
        """Let go of the slot; its counters stay, and its gauges count no more."""
        for file in (self._names_file, self._values_file):
            if file >= 0:
                os.close(file)
        self._names_file = self._values_file = -1

    def _warn(self, message: str) -> None:
        if not self._has_warned:
            log.warning(message)
        self._has_warned = True


def _open_locked(path: Path) -> int | None:
    """Open a file that no other process holds; return None where one does. Raises OSError."""
    file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    if sys.platform != "win32":
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(file)
            return None
        except BaseException:
            os.close(file)
            raise
    return file


def _is_held(path: Path) -> bool:
    """Tell whether a live process holds a slot."""
    if sys.platform == "win32":
        return False
    with contextlib.suppress(OSError), path.open("rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def _read(file: int) -> bytes:
    return os.pread(file, os.fstat(file).st_size, 0)


def _numbers(content: bytes) -> "array[float]":
    return array("d", content[: len(content) // 8 * 8])


def _parse(line: bytes) -> tuple[str, Series]:
    """Return what a line names; something that is shown nowhere where the line is damaged."""
    try:
        kind, name, labels = orjson.loads(line)
        return str(kind), Series(str(name), tuple((str(k), str(v)) for k, v in labels))
    except (orjson.JSONDecodeError, TypeError, ValueError):
        return "", Series("", (("line", repr(line)),))


def _add(
    totals: Totals,
    named: Iterable[tuple[str, Series]],
    values: "array[float]",
    *,
    is_live: bool,
) -> None:
    """Add the values of a slot; those without a name, or names without a value, are passed over."""
    for (kind, series), value in zip(named, values, strict=False):
        if kind == _COUNTER:
            totals.counters[series] = totals.counters.get(series, 0.0) + value
        elif kind == _GAUGE and is_live and not math.isnan(value):
            totals.gauges.setdefault(series, []).append(value)
