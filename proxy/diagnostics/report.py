"""Compares the routes of a benchmark: how fast, how dear, how alike, and which to choose. Pure.

Only routes that answered for every input are compared with others, so that all figures are about
the same inputs. `svg` draws numbered points as SVG, without a library, a script or a font.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import NamedTuple
from xml.sax.saxutils import escape

from embedding_proxy.providers.route_check import SAME
from embedding_proxy.providers.similarity import cosines, nearest, overlap, percentile, recall

from .benchmark import RouteBenchmark
from .sample_texts import Samples

WIDTH, HEIGHT = 720, 400
_LEFT, _RIGHT, _TOP, _BOTTOM = 80, 24, 40, 56
_LINE = 20
_TICKS = 5


@dataclass(frozen=True, slots=True, eq=False)
class ComparisonRow:
    """One route."""

    trial: RouteBenchmark
    name: str
    complete: bool
    """Whether every input was answered."""
    p50_ms: float | None
    """Of calls with a single input, as the next one; None if none was answered."""
    p95_ms: float | None
    overhead_ms: float | None
    """The difference of its median single call to that of the fastest route."""
    batch_p50_ms: float | None
    batch_p95_ms: float | None
    usd_per_million_tokens: float | None
    """None if neither the upstream nor the configuration gives it."""
    usd_per_million_inputs: float | None
    """Per million such inputs. Models count tokens differently, so only this can be compared."""
    recall: float | None
    """The recall of the labelled pairs; None without any, or if the route is not complete."""

    @property
    def bytes_per_vector(self) -> int:
        """The bytes of a vector, 4 for each number; 0 if the route has returned none."""
        return 4 * self.trial.width


@dataclass(frozen=True, slots=True)
class Likeness:
    """The agreement of two routes that answered everything."""

    first: ComparisonRow
    second: ComparisonRow
    cosine: tuple[float, float] | None
    """The least and the mean cosine, if spaces and widths match."""
    overlap: float | None
    """The share of common nearest texts, if the spaces do not match."""

    @property
    def same_space(self) -> bool:
        """Whether both have the same space."""
        return self.first.trial.space.name == self.second.trial.space.name

    @property
    def agree(self) -> bool | None:
        """Whether two routes of one space return the same vectors; None for two spaces."""
        if not self.same_space:
            return None
        return self.cosine is not None and self.cosine[0] >= SAME


@dataclass(frozen=True, slots=True)
class ComparisonReport:
    """The comparison of all routes."""

    rows: Sequence[ComparisonRow]
    pairs: Sequence[Likeness]
    k: int
    """The number of neighbours; less than requested if there are few texts."""
    chance: float | None
    """The overlap of random neighbours."""

    @property
    def choices(self) -> Sequence[ComparisonRow]:
        """The routes that can be recommended."""
        return [row for row in self.rows if row.complete]

    @property
    def cheapest(self) -> ComparisonRow | None:
        """The route with the cheapest inputs, then the faster one; None if no cost is known."""
        priced = [row for row in self.choices if row.usd_per_million_inputs is not None]
        return min(priced, key=lambda row: (_usd(row), _ms(row)), default=None)

    @property
    def fastest(self) -> ComparisonRow | None:
        """The route with the shortest median of single calls."""
        timed = [row for row in self.choices if row.p50_ms is not None]
        return min(timed, key=_ms, default=None)

    @property
    def best_recall(self) -> ComparisonRow | None:
        """The route with the best recall, then the cheaper one; None without labelled pairs."""
        judged = [row for row in self.choices if row.recall is not None]
        return max(judged, key=lambda row: (row.recall or 0.0, -_usd(row)), default=None)

    def beaten_by(self, row: ComparisonRow) -> ComparisonRow | None:
        """Return a route that is as good, no dearer, no slower, and better in one figure.

        A route is as good if it returns the same vectors or, with labelled pairs, finds as much. A
        cheap model is no bargain if nothing is known about its quality.
        """
        same = {
            pair.second if pair.first is row else pair.first
            for pair in self.pairs
            if pair.agree and row in (pair.first, pair.second)
        }
        others = [other for other in self.choices if other is not row]
        return next((rival for rival in others if _beats(rival, row, same=rival in same)), None)


def make_report(trials: Sequence[RouteBenchmark], samples: Samples, k: int) -> ComparisonReport:
    """Compute the report of some trials, with the `k` nearest texts."""
    count = len(samples.inputs)
    # If nearly all texts are among the nearest, everything agrees.
    k = min(k, max(1, (samples.texts - 1) // 2))
    whole = [trial for trial in trials if len(trial.vectors) == count]
    neighbours: dict[int, list[list[int]]] = {}
    for trial in whole if samples.texts > 2 else ():
        vectors = [trial.vectors[index] for index in range(count)]
        neighbours[id(trial)] = nearest(vectors, range(count), samples.texts, k)
    medians = [percentile(trial.singles_s, 50) for trial in whole if trial.singles_s]
    min_median = min(medians, default=None)
    rows = [_row(trial, samples, neighbours.get(id(trial)), min_median) for trial in trials]
    pairs = list(_pairs(rows, samples, neighbours))
    chance = k / (samples.texts - 1) if samples.texts > 2 else None
    return ComparisonReport(rows, pairs, k, chance)


def _row(
    trial: RouteBenchmark,
    samples: Samples,
    neighbours: Sequence[Sequence[int]] | None,
    least_s: float | None,
) -> ComparisonRow:
    p50 = _percentile_ms(trial.singles_s, 50)
    usd = trial.usd
    recalled = None
    if neighbours is not None and samples.wanted:
        recalled = recall([neighbours[i] for i in samples.wanted], list(samples.wanted.values()))
    return ComparisonRow(
        trial,
        name_of(trial),
        complete=len(trial.vectors) == len(samples.inputs),
        p50_ms=p50,
        p95_ms=_percentile_ms(trial.singles_s, 95),
        overhead_ms=None if p50 is None or least_s is None else max(p50 - 1000 * least_s, 0.0),
        batch_p50_ms=_percentile_ms(trial.batches_s, 50),
        batch_p95_ms=_percentile_ms(trial.batches_s, 95),
        # A route that reported no charge has its price nevertheless.
        usd_per_million_tokens=(
            trial.price if usd is None or not trial.tokens else usd / trial.tokens * 1e6
        ),
        usd_per_million_inputs=None if trial.usd_an_input is None else 1e6 * trial.usd_an_input,
        recall=recalled,
    )


def _pairs(
    rows: Sequence[ComparisonRow],
    samples: Samples,
    neighbours: Mapping[int, Sequence[Sequence[int]]],
) -> Iterator[Likeness]:
    texts = range(samples.texts)
    indices = range(len(samples.inputs))
    for row_a, other in combinations([row for row in rows if row.complete], 2):
        first, second = row_a.trial, other.trial
        cosine = neighbour_overlap = None
        if first.space.name == second.space.name:
            if first.width == second.width:
                cosine = cosines(
                    [first.vectors[index] for index in indices],
                    [second.vectors[index] for index in indices],
                )
        elif neighbours:
            first_neighbours, second_neighbours = neighbours[id(first)], neighbours[id(second)]
            neighbour_overlap = overlap(
                [first_neighbours[i] for i in texts], [second_neighbours[i] for i in texts]
            )
        yield Likeness(row_a, other, cosine, neighbour_overlap)


def name_of(trial: RouteBenchmark) -> str:
    """Return the name of a route: model, provider, and the upstream's name of the model."""
    model, route = trial.result.models[0], trial.route
    plain = f"{model} at {route.name}"
    same = model.rpartition("/")[2] == route.model.rpartition("/")[2]
    return plain if same else f"{plain} ({route.model})"


def _percentile_ms(seconds: Sequence[float], percent: float) -> float | None:
    return 1000 * percentile(seconds, percent) if seconds else None


def _beats(first: ComparisonRow, second: ComparisonRow, *, same: bool) -> bool:
    """Tell whether one route is no worse than another in all figures, and better in one."""
    figures = [
        (first.usd_per_million_inputs, second.usd_per_million_inputs),
        (first.p50_ms, second.p50_ms),
    ]
    if not same:
        mine, theirs = (None if row.recall is None else 1 - row.recall for row in (first, second))
        figures.append((mine, theirs))
    gains = [
        _round_figure(b) - _round_figure(a) for a, b in figures if a is not None and b is not None
    ]
    return len(gains) == len(figures) and min(gains) >= 0 and max(gains) > 0


def _round_figure(figure: float) -> float:
    """Return a figure without the digits that differ from one measurement to the next."""
    return float(f"{figure:.2g}")


def _usd(row: ComparisonRow) -> float:
    return _round_figure(row.usd_per_million_inputs or 0.0)


def _ms(row: ComparisonRow) -> float:
    return float("inf") if row.p50_ms is None else row.p50_ms


class PlotPoint(NamedTuple):
    """A point of a plot. A point with an unknown coordinate is left out."""

    name: str
    x: float | None
    y: float | None
    note: str
    """Its text in the list below the plot."""


def svg(title: str, x_label: str, y_label: str, points: Sequence[PlotPoint]) -> str:
    """Return a plot from zero on, linear in both directions, with a list of the points below.

    Points are numbered in their order. Coordinates are not negative.
    """
    placed = [(point.x, point.y) for point in points if point.x is not None and point.y is not None]
    x_end, x_ticks = _axis([x for x, _ in placed])
    y_end, y_ticks = _axis([y for _, y in placed])

    def at(x: float, y: float) -> tuple[float, float]:
        across, up = WIDTH - _LEFT - _RIGHT, HEIGHT - _TOP - _BOTTOM
        return round(_LEFT + across * x / x_end, 1), round(HEIGHT - _BOTTOM - up * y / y_end, 1)

    height = HEIGHT + _LINE * (len(points) + 1)
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{height}">',
        "<style>text {font: 12px sans-serif}</style>",
        f'<rect width="{WIDTH}" height="{height}" fill="white"/>',
        f'<text x="{_LEFT}" y="24">{escape(title)}</text>',
    ]
    for tick in x_ticks:
        x, y = at(tick, 0)
        lines.append(f'<path d="M{x} {_TOP}V{y}" stroke="#ddd"/>')
        lines.append(f'<text x="{x}" y="{y + 18}" text-anchor="middle">{tick:g}</text>')
    for tick in y_ticks:
        x, y = at(0, tick)
        lines.append(f'<path d="M{x} {y}H{WIDTH - _RIGHT}" stroke="#ddd"/>')
        lines.append(f'<text x="{x - 8}" y="{y + 4}" text-anchor="end">{tick:g}</text>')
    middle = (_LEFT + WIDTH - _RIGHT) / 2, (_TOP + HEIGHT - _BOTTOM) / 2
    lines.append(
        f'<text x="{middle[0]}" y="{HEIGHT - 14}" text-anchor="middle">{escape(x_label)}</text>'
    )
    lines.append(
        f'<text transform="translate(20 {middle[1]}) rotate(-90)" text-anchor="middle">'
        f"{escape(y_label)}</text>"
    )
    for number, point in enumerate(points, 1):
        label = escape(f"{point.name}: {point.note}")
        y = HEIGHT + _LINE * number - 6
        lines.append(f'<text x="{_LEFT}" y="{y}">{number}  {label}</text>')
        if point.x is not None and point.y is not None:
            x, y = at(point.x, point.y)
            lines.append(
                f'<g><title>{label}</title><circle cx="{x}" cy="{y}" r="9" fill="#246"/>'
                f'<text x="{x}" y="{y + 4}" fill="white" text-anchor="middle">{number}</text></g>'
            )
    return "\n".join([*lines, "</svg>", ""])


def _axis(values: Sequence[float]) -> tuple[float, list[float]]:
    """Return the end of an axis and its ticks: round numbers, the last at or past the largest."""
    maximum = max(values, default=0.0) or 1.0
    power = 10.0 ** math.floor(math.log10(maximum / _TICKS))
    step = next(power * n for n in (1, 2, 5, 10) if power * n * _TICKS >= maximum)
    ticks = [step * i for i in range(_TICKS + 1)]
    return ticks[-1], ticks
