"""The demo, whole with a small corpus, and what it says when something is amiss."""

import numpy as np
import pytest
from embedding_proxy.proxy.cli import demo
from embedding_proxy.proxy.cli.demo import (
    DemoFailed,
    Pass,
    _excerpt,
    _judge,
    _nearest,
    _proxy,
    _summary,
    _table,
)
from embedding_proxy.proxy.diagnostics.sample_texts import Docstring
from rich.console import Console

DOCS = [
    Docstring("webbrowser.open", "Display a page in a browser."),
    Docstring("again", "Display a page in a browser."),
    Docstring("shlex.split", "Take a command line apart into its words."),
    *(Docstring(f"filler.f{i}", f"Cook dish number {i} with salt.") for i in range(30)),
]
INPUTS = len(DOCS) - 1


def _pass(computed: int = 0, hits: int = 0, vectors: object = ((1, 0), (0, 1)), **other) -> Pass:
    values = {"title": "t", "seconds": 1.0, "vectors": np.array(vectors, np.float32)}
    return Pass(**values | other, computed=computed, hits=hits)


def test_the_demo_computes_once_and_then_serves_from_disk(monkeypatch, capsys):
    """The whole demo, with real processes and the real model: one pass computed, two from disk."""
    monkeypatch.setattr(demo, "standard_library", lambda: DOCS)
    monkeypatch.setattr(demo, "INPUTS_A_REQUEST", 20)
    demo.run()
    out = capsys.readouterr().out
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in out.splitlines()]
    counts = {row[0]: row[1:4] for row in rows if len(row) > 4}
    assert counts == {
        "first pass": [str(INPUTS), str(INPUTS), "0"],
        "after a restart": [str(INPUTS), "0", str(INPUTS)],
        "cut to 128 wide": [str(INPUTS), "0", str(INPUTS)],
    }
    near = [out.split(f"Nearest to {query}\n")[1].split("\n")[0] for query in demo.QUERIES]
    assert ["webbrowser.open: Display" in near[0], "shlex.split: Take" in near[1]] == [True, True]


def test_a_proxy_that_does_not_start_fails_the_demo_with_its_words(tmp_path):
    """When the server ends instead of starting, the demo shows what it said."""
    config = tmp_path / "config.yaml"
    config.write_text("sevrer: {}")
    with (
        pytest.raises(DemoFailed, match=r"did not start: .*sevrer: unknown key; did you mean"),
        _proxy(config),
    ):
        pytest.fail("there is no proxy to use")


GOOD = (_pass(computed=2), _pass(hits=2), _pass(hits=2))


def test_what_the_demo_promises_passes():
    """Everything computed once, served twice, with equal vectors: nothing to complain about."""
    _judge(list(GOOD), 2)


@pytest.mark.parametrize(
    ("place", "spoilt", "message"),
    [
        (0, _pass(computed=1, hits=1), "the first pass computed 1 of 2 inputs"),
        (1, _pass(hits=1), "t: 1 hits of 2 inputs"),
        (2, _pass(hits=2, computed=1), "t: 2 hits of 2 inputs"),
        (1, _pass(hits=2, vectors=((1, 0), (0, 2))), "gave other vectors than the first"),
    ],
)
def test_what_breaks_the_promise_fails(place, spoilt, message):
    """Each way in which a pass falls short of the promise fails the demo, and says how."""
    passes = list(GOOD)
    passes[place] = spoilt
    with pytest.raises(DemoFailed, match=message):
        _judge(passes, 2)


def test_the_nearest_inputs_come_first():
    """For each query the indices and cosines of the nearest inputs, best first."""
    vectors = np.array([[1, 0], [0, 1], [0.6, 0.8]], np.float32)
    queries = np.array([[0, 1], [1, 0]], np.float32)
    found = list(_nearest(queries, vectors, 2))
    assert [[i for i, _ in near] for near in found] == [[1, 2], [0, 2]]
    assert np.allclose([[cosine for _, cosine in near] for near in found], [[1, 0.8], [1, 0.6]])


def test_the_table_has_a_row_a_pass_with_its_share_of_the_price():
    """A pass costs what it computed; numbers are readable."""
    passes = [
        _pass(computed=2000, vectors=[[1]] * 2000, title="a"),
        _pass(hits=2000, vectors=[[1]] * 2000, title="b", seconds=0.125),
    ]
    console = Console(width=100)
    with console.capture() as capture:
        console.print(_table(passes, 2000, 0.5))
    rows = [[c.strip() for c in line.split("│")[1:-1]] for line in capture.get().splitlines()]
    assert [row for row in rows if row] == [
        ["a", "2,000", "2,000", "0", "1.00", "$0.50"],
        ["b", "2,000", "0", "2,000", "0.12", "$0.00"],
    ]


def test_the_summary_tells_rate_speed_and_price():
    """The summary's numbers follow from the passes and the price."""
    first = _pass(computed=2, seconds=4.0)
    text = _summary(first, _pass(hits=2, seconds=0.5), 0.25)
    assert "at 4 inputs/s" in text
    assert "8.0 × as fast" in text
    assert "$0.75 without the cache, $0.25 with it: $0.50 saved (66.7%)" in text


def test_an_input_is_shown_by_its_first_name_and_words():
    """An input is shown in one line, under the name that comes first."""
    docs = [Docstring("a", "x"), Docstring("b", "long\n  text " * 20), Docstring("c", "x")]
    assert _excerpt(docs, "x") == "a: x"
    assert _excerpt(docs, docs[1].text) == f"b: {'long text ' * 7}"


def test_the_demo_runs_its_own_proxy(tmp_path, monkeypatch):
    """A proxy.py that lies in the current folder is not run instead."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "proxy.py").write_text("print('export OPENAI_BASE_URL=http://elsewhere')")
    (tmp_path / "c.yaml").write_text(f"cache: {{directory: {tmp_path}}}")
    with demo._proxy(tmp_path / "c.yaml") as client:
        assert "elsewhere" not in str(client.base_url)
