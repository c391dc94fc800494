"""A plot of numbered points as SVG, written by hand: no library, no script, no font of its own."""

import math
from collections.abc import Sequence
from typing import NamedTuple
from xml.sax.saxutils import escape

WIDTH, HEIGHT = 720, 400
_LEFT, _RIGHT, _TOP, _BOTTOM = 80, 24, 40, 56
_LINE = 20
_TICKS = 5


class Point(NamedTuple):
    """One thing, and where it is; a coordinate that is not known leaves it out of the plot."""

    name: str
    x: float | None
    y: float | None
    note: str
    """What is said of it below."""


def svg(title: str, x_label: str, y_label: str, points: Sequence[Point]) -> str:
    """Return a plot from zero on, linear in both directions; a list below names the points.

    Points are numbered as they come. Coordinates are not negative.
    """
    known = [(point.x, point.y) for point in points if point.x is not None and point.y is not None]
    x_end, x_ticks = _axis([x for x, _ in known])
    y_end, y_ticks = _axis([y for _, y in known])

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
        told = escape(f"{point.name}: {point.note}")
        y = HEIGHT + _LINE * number - 6
        lines.append(f'<text x="{_LEFT}" y="{y}">{number}  {told}</text>')
        if point.x is not None and point.y is not None:
            x, y = at(point.x, point.y)
            lines.append(
                f'<g><title>{told}</title><circle cx="{x}" cy="{y}" r="9" fill="#246"/>'
                f'<text x="{x}" y="{y + 4}" fill="white" text-anchor="middle">{number}</text></g>'
            )
    return "\n".join([*lines, "</svg>", ""])


def _axis(values: Sequence[float]) -> tuple[float, list[float]]:
    """Return where an axis ends, and its ticks: round numbers, the last at or past the largest."""
    most = max(values, default=0.0) or 1.0
    power = 10.0 ** math.floor(math.log10(most / _TICKS))
    step = next(power * n for n in (1, 2, 5, 10) if power * n * _TICKS >= most)
    ticks = [step * i for i in range(_TICKS + 1)]
    return ticks[-1], ticks
