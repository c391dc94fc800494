"""The rows of the results, and how they are shown. Pure."""

import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from typing import Protocol


class Verdict(StrEnum):
    """Whether a figure is what it should be."""

    MET = "met"
    NOT_MET = "not met"
    NONE = ""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One figure, what it was made from, and the bound it should keep."""

    target: str
    """T1 and so on. Rows of one target without a bound stand beside the one that decides."""
    what: str
    value: float
    unit: str
    least: float | None = None
    most: float | None = None
    figures: dict[str, float] = field(default_factory=dict)

    @property
    def verdict(self) -> Verdict:
        """Whether the bound is kept; NONE if there is none."""
        if self.least is None and self.most is None:
            return Verdict.NONE
        kept = (self.least is None or self.value >= self.least) and (
            self.most is None or self.value <= self.most
        )
        return Verdict.MET if kept else Verdict.NOT_MET

    @property
    def strain(self) -> float:
        """The figure as a part of its bound: past 1 it is not met."""
        parts = [self.value / self.most] if self.most else []
        return max([*parts, *([self.least / self.value] if self.least else [])], default=0.0)

    @property
    def bound(self) -> str:
        """What it should be, in the row's unit."""
        if self.least is not None and self.least == self.most:
            return f"= {number(self.least)}"
        bounds = (("≥", self.least), ("≤", self.most))
        return " ".join(f"{sign} {number(bound)}" for sign, bound in bounds if bound is not None)

    def as_json(self) -> dict[str, object]:
        """Return everything there is to say."""
        return {**asdict(self), "verdict": self.verdict}


class Taken(Protocol):
    """What a request took in one round: see `client.Load`."""

    @property
    def seconds(self) -> float:
        """On the clock."""

    @property
    def cpu_seconds(self) -> float:
        """Of the server's processors."""

    @property
    def client_seconds(self) -> float:
        """Of the load's processor."""


@dataclass(frozen=True)
class Compared:
    """Two servers that had the same rounds in turns: ours, and what it is measured against.

    Ratios are those of each round's two neighbours, of which the medians are taken: whoever else
    uses the machine takes from both. Processor time is the steadier of the two, and does not see
    what is waited for.
    """

    wall: float
    """Our time by the other's."""
    cpu: float
    """Our processor time by the other's."""
    low: float
    """The least of the rounds' ratios of processor time."""
    high: float
    figures: dict[str, float]


def compare(
    ours: Sequence[Taken], other: Sequence[Taken], unit: str = "µs", name: str = "bare"
) -> Compared:
    """Compare what rounds took; `unit` is that of the figures."""
    scale = {"s": 1, "ms": 1e3, "µs": 1e6}[unit]
    figures = {}
    for who, rounds in (("proxy", ours), (name, other)):
        figures[f"{who}_{unit}"] = statistics.median(t.seconds for t in rounds) * scale
        figures[f"{who}_cpu_{unit}"] = statistics.median(t.cpu_seconds for t in rounds) * scale
    figures[f"client_cpu_{unit}"] = statistics.median(t.client_seconds for t in ours) * scale
    walls = [a.seconds / b.seconds for a, b in zip(ours, other, strict=True)]
    cpus = [a.cpu_seconds / b.cpu_seconds for a, b in zip(ours, other, strict=True)]
    median = statistics.median
    return Compared(median(walls), median(cpus), min(cpus), max(cpus), figures)


def number(value: float) -> str:
    """Return a figure as short as it is telling.

    >>> [number(n) for n in (0.98765, 12.345, 1234.5, 1000000, 0, 0.00071)]
    ['0.988', '12.3', '1,234', '1,000,000', '0', '0.00071']
    """
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def percentile(values: Sequence[float], share: float) -> float:
    """Return the value that so large a share of all lies below.

    >>> percentile([3, 1, 2, 4], 0.5)
    3
    """
    return sorted(values)[min(int(share * len(values)), len(values) - 1)]


HEADINGS = ("", "what", "measured", "target", "", "from")


def cells(row: Row) -> tuple[str, ...]:
    """Return what a row shows, under HEADINGS."""
    figures = ", ".join(f"{name} {number(figure)}" for name, figure in row.figures.items())
    unit = f" {row.unit}" if row.unit else ""
    return row.target, row.what, number(row.value) + unit, row.bound, row.verdict, figures


def plain(rows: Sequence[Row]) -> str:
    """Return the table for a terminal."""
    lines = [HEADINGS, *map(cells, rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    right = {2}
    return "\n".join(
        "  ".join(
            cell.rjust(width) if place in right else cell.ljust(width)
            for place, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


def markdown(rows: Sequence[Row]) -> str:
    """Return the table for a page."""
    lines = [HEADINGS, ("---",) * len(HEADINGS), *map(cells, rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
