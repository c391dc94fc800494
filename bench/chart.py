"""Bars as SVG, written by hand: no library, no script, no font of its own, no background.

Its colours can be read on white and on black, for whoever looks may have either.
"""

from collections.abc import Sequence
from typing import NamedTuple
from xml.sax.saxutils import escape

WIDTH = 720
_LEFT, _RIGHT, _BAR, _STEP, _HEAD = 230, 110, 16, 24, 34
_GREY = "#6e7681"
COLOURS = {"ours": "#2f81f7", "limit": "#8b949e", "peer": "#d0662b"}


class Bar(NamedTuple):
    """One figure; shorter is better."""

    name: str
    value: float
    label: str
    """The figure as it is told."""
    kind: str
    """One of COLOURS."""


class Panel(NamedTuple):
    """Bars that are compared with one another; the longest has the full width."""

    title: str
    bars: Sequence[Bar]


def svg(title: str, panels: Sequence[Panel]) -> str:
    """Return the chart. Values are not negative."""
    y, lines = 34, []
    for panel in panels:
        lines.append(_text(0, y + 14, panel.title, "start", "bold"))
        y += _HEAD - 10
        most = max((bar.value for bar in panel.bars), default=0.0) or 1.0
        for bar in panel.bars:
            # Even the least is seen.
            width = max(1.5, round((WIDTH - _LEFT - _RIGHT) * bar.value / most, 1))
            middle = y + _BAR / 2 + 4
            lines.append(_text(_LEFT - 10, middle, bar.name, "end"))
            lines.append(
                f'<rect x="{_LEFT}" y="{y}" width="{width}" height="{_BAR}" rx="2"'
                f' fill="{COLOURS[bar.kind]}"/>'
            )
            lines.append(_text(_LEFT + width + 8, middle, bar.label, "start"))
            y += _STEP
        y += 14
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{y}" role="img">',
            f"<title>{escape(title)}</title>",
            f"<style>text {{font: 13px sans-serif; fill: {_GREY}}}</style>",
            _text(0, 14, title, "start"),
            *lines,
            "</svg>",
            "",
        ]
    )


def _text(x: float, y: float, said: str, anchor: str, weight: str = "normal") -> str:
    return (
        f'<text x="{x:g}" y="{y:g}" text-anchor="{anchor}" font-weight="{weight}">'
        f"{escape(said)}</text>"
    )
