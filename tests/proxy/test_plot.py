"""The plot: well-formed, to scale, and safe whatever the names are."""

import re
from xml.etree import ElementTree as ET

import pytest
from embedding_proxy.proxy.diagnostics.report import HEIGHT, WIDTH, PlotPoint, _axis, svg

SVG = "{http://www.w3.org/2000/svg}"


def test_points_are_where_their_figures_are():
    """Twice the figure is twice as far from the axis; names and notes are told below, too."""
    points = [
        PlotPoint("a", 50, 0.1, "x"),
        PlotPoint("b <&>", 100, 0.2, "y"),
        PlotPoint("c", None, 1, "z"),
    ]
    root = ET.fromstring(svg("T & t", "x < 1", "y", points))
    circles = [(float(c.get("cx")), float(c.get("cy"))) for c in root.iter(f"{SVG}circle")]
    (x1, y1), (x2, y2) = circles
    zero_x, zero_y = 80, HEIGHT - 56
    assert (x2 - zero_x) == pytest.approx(2 * (x1 - zero_x), abs=0.2)
    assert (zero_y - y2) == pytest.approx(2 * (zero_y - y1), abs=0.2)
    assert (x2, y2) == (WIDTH - 24, pytest.approx(zero_y - 0.8 * (zero_y - 40)))
    texts = [element.text for element in root.iter(f"{SVG}text")]
    assert {"T & t", "x < 1", "y", "1  a: x", "2  b <&>: y", "3  c: z"} <= {*texts}
    assert [title.text for title in root.iter(f"{SVG}title")] == ["a: x", "b <&>: y"]
    assert not re.search(r"script|href|font-face", svg("T", "x", "y", points))


@pytest.mark.parametrize("values", [[0.0003], [7, 3], [99.9], [100], [0], [], [1234.5]])
def test_axes_end_at_round_numbers_past_the_largest(values):
    """Every point is inside, and no axis is empty or has no length."""
    end, ticks = _axis(values)
    most = max(values, default=0)
    assert ticks[0] == 0
    assert ticks[-1] == end
    assert most <= end * (1 + 1e-9)
    assert end <= 2.5 * most or most == 0
    assert f"{ticks[1]:g}".strip("0.").rstrip("0") in {"1", "2", "5"} or most == 0


def test_a_plot_of_nothing_is_a_plot():
    """Where no figure is known the axes remain."""
    root = ET.fromstring(svg("T", "x", "y", [PlotPoint("a", None, None, "no answer")]))
    assert root.get("width") == str(WIDTH)
    assert not list(root.iter(f"{SVG}circle"))
