"""What the bench makes of what it measured: ratios, tables, pages, the chart. Nothing is timed."""

import xml.etree.ElementTree as ET
from dataclasses import replace

import pytest
from embedding_proxy.cache.disk import connection
from embedding_proxy.cache.key import Namespace, keyring
from embedding_proxy.cache.maintenance import stats, verify
from embedding_proxy.cache.maintenance.verify import Findings
from embedding_proxy.cache.record import decode

from bench import pages, record, ten_million, upstream
from bench.chart import Bar, Panel, svg
from bench.client import Load
from bench.profile import shares
from bench.table import Row, compare, markdown, percentile, plain

BARE = [Load(2.0, 1.0, 0.5), Load(4.0, 1.0, 0.5), Load(2.0, 2.0, 0.5)]
OURS = [Load(3.0, 2.0, 0.7), Load(4.0, 4.0, 0.5), Load(8.0, 6.0, 0.1)]
MACHINE = {
    "date": "2026-11-22T12:00:00+00:00",
    "cpu": "Intel(R) Xeon(R) Processor",
    "cores": 2,
    "python": "3.11.7",
    "commit": "abc",
    "cores_used_by_others": 0.5,
}


def row(**changes):
    return replace(Row(target="T1", what="one <input>", value=0.5, unit="×", least=1.0), **changes)


@pytest.mark.parametrize(
    ("least", "most", "value", "verdict"),
    [
        (1.0, None, 1.0, "met"),
        (1.0, None, 0.99, "not met"),
        (None, 1.8, 1.8, "met"),
        (None, 1.8, 1.81, "not met"),
        (1.0, 1.0, 1.0, "met"),
        (1.0, 1.0, 1.01, "not met"),
        (None, None, 7.0, ""),
    ],
)
def test_a_bound_is_kept_or_missed(least, most, value, verdict):
    """A figure at its bound keeps it, one beyond it does not; without a bound none is judged."""
    assert row(least=least, most=most, value=value).verdict == verdict


def test_ratios_are_of_neighbours():
    """Each round of ours is divided by the other's of the same turn; the median is what is said."""
    compared = compare(OURS, BARE, unit="s")
    assert (compared.wall, compared.cpu, compared.low, compared.high) == (1.5, 3.0, 2.0, 4.0)
    assert compared.figures == {
        "proxy_s": 4.0,
        "proxy_cpu_s": 4.0,
        "bare_s": 2.0,
        "bare_cpu_s": 1.0,
        "client_cpu_s": 0.5,
    }


def test_p99_is_among_the_slowest():
    """The 99th percentile of a hundred is the slowest, whatever the order."""
    assert percentile([*range(99, -1, -1)], 0.99) == 99


def test_both_tables_say_the_same():
    """Terminal and page show figure, bound and verdict of each row."""
    rows = [row(figures={"bare_µs": 12.34}), row(what="fits", least=None, most=3.0)]
    for shown in (plain(rows), markdown(rows)):
        first, second = shown.splitlines()[-2:]
        assert all(word in first for word in ("T1", "0.5 ×", "≥ 1", "not met", "bare_µs 12.3"))
        assert all(word in second for word in ("fits", "≤ 3", "met"))


def test_a_run_is_kept_whole():
    """What is read from a kept run is what was measured."""
    rows = [row(figures={"a": 1.0}), row(least=None)]
    assert record.read(record.as_json(MACHINE, rows)) == (MACHINE, rows)


def test_a_run_is_kept_by_day_and_machine():
    """The file is named for what tells two runs apart, in letters that every system takes."""
    assert record.file_of(MACHINE).name == "2026-11-22-intel-xeon-processor-2-cores.json"


def test_the_readme_tells_the_worst_of_each_target():
    """Of several rows the one nearest to its bound, or furthest beyond, is shown; and each peer."""
    rows = [
        row(what="far", target="T10", value=50.0, least=None, most=100.0),
        row(what="near", target="T10", value=90.0, least=None, most=100.0),
        row(what="slow", value=0.5, least=1.0),
        row(what="slower", value=0.4, least=1.0),
        row(what="unjudged", least=None),
        row(what="against", value=0.1, least=250.0, figures={"litellm_cpu_ms": 1.0}),
    ]
    shown = [line.split(" | ")[0].strip("| ") for line in record.headline(rows).splitlines()[2:]]
    assert shown == ["near", "slower", "against"]


def test_words_around_stay():
    """Only what stands between the marks of a name is replaced, and a page without them is told."""
    page = "a\n<!-- bench: x -->\nold\n<!-- end -->\nb\n<!-- bench: y -->\nkept\n<!-- end -->\n"
    assert pages.between(page, "x", r"new \1") == page.replace("old", r"new \1")
    with pytest.raises(ValueError, match="no place for 'z'"):
        pages.between(page, "z", "new")


def test_the_pages_have_places():
    """The pages of this checkout take what a recorded run writes."""
    for page, names in (
        (pages.PERFORMANCE, ("run", "ten-million", "profile")),
        (pages.README, ("figures",)),
    ):
        text = page.read_text(encoding="utf-8")
        for name in names:
            assert "MARK" in pages.between(text, name, "MARK")


def test_bars_are_as_long_as_their_figures():
    """The longest bar of a panel has the full width, the others their part of it."""
    bars = [Bar("limit", 1.0, "1 ms", "limit"), Bar('"us" & <them>', 4.0, "4 ms", "ours")]
    drawn = ET.fromstring(svg("a < b", [Panel("one", bars), Panel("two", bars[:1])]))
    widths = [float(rect.get("width")) for rect in drawn.iter("{http://www.w3.org/2000/svg}rect")]
    assert widths[1] == widths[2] == 4 * widths[0]
    texts = [text.text for text in drawn.iter("{http://www.w3.org/2000/svg}text")]
    assert {"a < b", '"us" & <them>', "4 ms", "two"} <= set(texts)


def test_the_chart_shows_limit_ours_and_peer():
    """Memory, disk and a peer stand below the limit of the same load, in milliseconds."""
    ours = {"proxy_cpu_µs": 100.0, "bare_cpu_µs": 50.0}
    rows = [
        row(figures=ours),
        row(what="again", figures={"proxy_cpu_µs": 1.0, "bare_cpu_µs": 1.0}),
        row(target="T2", figures={"proxy_cpu_µs": 200.0, "bare_cpu_µs": 50.0}),
        row(what="against", figures={"proxy_cpu_ms": 0.1, "litellm_cpu_ms": 12.0}),
        row(target="T3", what="bulk, memory", figures={"proxy_cpu_ms": 9.0, "bare_cpu_ms": 8.0}),
        row(target="T3", what="bulk, disk", figures={"proxy_cpu_ms": 16.0, "bare_cpu_ms": 8.0}),
    ]
    found = [[(bar.kind, bar.value) for bar in panel.bars] for panel in record.panels(rows)]
    assert found == [
        [("limit", 0.05), ("ours", 0.1), ("ours", 0.2), ("peer", 12.0)],
        [("limit", 8.0), ("ours", 9.0), ("ours", 16.0)],
    ]


def test_a_stack_belongs_to_the_innermost_that_is_known():
    """C code belongs to who called it, waiting to nobody, and what nobody knows is other."""
    hit = "uv__read (stream.c:1);post (proxy/http/embeddings.py:1)"
    stacks = [
        f"{hit};parse (proxy/http/openai_format.py:9);orjson_loads (orjson.so) 3",
        f"{hit};key (cache/key.py:9);blake2b (hashlib.so) 4",
        f"{hit};read_many (cache/disk/database.py:9) 2",
        "main (mystery.py:1);put (mystery.py:2) 1",
        "main (proxy/cli/main.py:1);epoll_wait (libc.so.6) 50",
        "run (threading.py:1);_worker (concurrent/futures/thread.py:81);_queue_SimpleQueue_get 9",
    ]
    parts, files, samples = shares(stacks)
    assert parts == {"key": 0.4, "parse": 0.3, "look-up": 0.2, "other": 0.1}
    assert files["cache/key.py"] == 0.4
    assert samples == 10


def test_the_store_of_many_small_vectors_is_a_real_one(tmp_path, monkeypatch):
    """What is written with SQL verifies as a store, and each input has its record in it."""
    monkeypatch.setattr(ten_million, "A_WRITE", 70)
    ten_million.make(tmp_path / "store", 200)
    findings = Findings()
    with connection.opened(tmp_path / "store", 1 << 30) as file:
        list(verify.scan(file, findings))
        held = stats.gather(file)
        for number in range(200):
            space = ten_million.space_of(number)
            ring = keyring(space, Namespace(ten_million.namespace_of(number)))
            key = ring.key(ten_million.text(number))
            found = file.read_many([key.address])[key.address]
            assert decode(found.record, key.digest, space.dimensions) is not None
    assert findings == Findings(records=200)
    assert findings.sound
    assert sorted(one.entries for one in held.held) == [10, 10, 90, 90]


def test_the_table_of_many_small_vectors():
    """A line for each figure, with what is not known left out."""
    lines = ten_million.markdown(
        [
            ten_million.Figure("start", 0.5),
            ten_million.Figure("`stats`", 12.34, 50, 1234, {"a": "b"}),
        ]
    ).splitlines()
    assert lines[2:] == ["| start | 0.5 |  |  |  |", "| `stats` | 12.3 | 50 | 1,234 | a b |"]


def test_the_upstream_has_a_vector_for_each_input():
    """The vectors of the bench's provider are told apart, as those of texts are."""
    given = ["a", "b", [1], [2], [1, 2]]
    assert len({upstream.encoded(one) for one in given}) == len(given)
    assert upstream.encoded("a") == upstream.encoded("a")
