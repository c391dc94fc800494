"""What figures say of routes: percentiles, cost, likeness, and which of them is to be chosen."""

from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
from embedding_proxy.providers.base import Space
from embedding_proxy.providers.routing.route import Route
from embedding_proxy.proxy.diagnostics.benchmark import Plan, RouteBenchmark
from embedding_proxy.proxy.diagnostics.report import make_report
from embedding_proxy.proxy.diagnostics.routes import RouteResult
from embedding_proxy.proxy.diagnostics.sample_texts import Samples

TEXTS = Samples(["a", "b", "c", "d", "e"], 5, {})
PAIRS = Samples(["a", "b", "c", "d", "q"], 4, {4: frozenset({0, 1})})
NEAR_A = [(1, 0), (0.9, 0.1), (0, 1), (0, -1), (1, 0.01)]
NEAR_C = [(1, 0), (0.9, 0.1), (0, 1), (-1, 0), (0.1, 1)]


def _trial(provider="p", space="s", rows=NEAR_A, *, ms=(10,), usd=0.02, **more):
    """Return a finished trial; `usd` are USD per million tokens, and each input has ten."""
    route = Route(SimpleNamespace(name=provider), more.pop("upstream", "m"))
    vectors = {i: np.array(row, dtype="<f4").tobytes() for i, row in enumerate(rows)}
    price = 0.0 if usd is None else usd
    return RouteBenchmark(
        RouteResult(["m"], Space(space, 2), provider, route.model, route),
        route,
        Space(space, len(rows[0]) if rows else 2),
        usd,
        calls=len(ms),
        singles_s=[one / 1000 for one in ms],
        vectors=vectors,
        answers=Counter(vectors.keys()),
        spent=Counter(dict.fromkeys(vectors, round(10_000 * price))),
        tokens=10 * len(rows),
        is_cost_reported=more.pop("told", False),
        **more,
    )


def test_the_figures_of_a_route():
    """Milliseconds by nearest rank, money by token and by input, bytes by width."""
    slow = _trial("slow", ms=range(20, 0, -1), batches_s=[0.3, 0.1, 0.2])
    fast = _trial("fast", ms=[4])
    row, other = make_report([slow, fast], TEXTS, 5).rows
    assert (row.p50_ms, row.p95_ms) == pytest.approx((10, 19))
    assert (row.batch_p50_ms, row.batch_p95_ms) == pytest.approx((200, 300))
    assert (row.overhead_ms, other.overhead_ms) == pytest.approx((6, 0))
    assert row.usd_per_million_tokens == pytest.approx(0.02)
    assert row.usd_per_million_inputs == pytest.approx(0.2)
    assert row.bytes_per_vector == 8
    assert (row.complete, row.recall) == (True, None)


def test_an_input_costs_the_same_however_often_it_was_asked_for():
    """What was asked for more often does not weigh more, so that routes compare."""
    trial = _trial()
    trial.answers[0] = 9
    trial.spent[0] *= 9
    assert make_report([trial], TEXTS, 2).rows[0].usd_per_million_inputs == pytest.approx(0.2)


@pytest.mark.parametrize(
    ("price", "told", "usd"), [(None, False, None), (None, True, 0.0), (0.0, False, 0.0)]
)
def test_a_cost_is_only_told_where_it_is_known(price, told, usd):
    """By the upstream or the configuration; what nobody says is not nothing."""
    row = make_report([_trial(usd=price, told=told)], TEXTS, 2).rows[0]
    assert row.usd_per_million_tokens == usd
    assert row.usd_per_million_inputs == usd


def test_a_route_without_an_answer_has_no_figures():
    """It is in the table, compared with none, and never recommended."""
    dead = _trial("dead", rows=[], ms=(), usd=0.0)
    whole = _trial("whole")
    found = make_report([dead, whole], TEXTS, 2)
    row = found.rows[0]
    assert (row.complete, row.p50_ms, row.p95_ms, row.overhead_ms) == (False, None, None, None)
    assert (row.usd_per_million_tokens, row.usd_per_million_inputs) == (0.0, None)
    assert found.pairs == []
    assert found.cheapest is found.fastest is found.rows[1]


def test_what_answered_in_part_is_not_compared():
    """All figures are about the same inputs, so who lacks one is left out of choices."""
    part = _trial("part", rows=NEAR_A[:4], ms=[1])
    found = make_report([part, _trial("whole"), _trial("other")], TEXTS, 2)
    assert [
        (pair.first.trial.route.name, pair.second.trial.route.name) for pair in found.pairs
    ] == [("whole", "other")]
    assert found.fastest is not found.rows[0]
    assert found.beaten_by(found.rows[0]) is None


def test_routes_of_one_space_agree_or_do_not():
    """The least cosine decides; another width is another model."""
    turned = [*NEAR_A[:4], (1, 0.2)]
    wide = [(*row, 0) for row in NEAR_A]
    trials = [_trial(), _trial("q"), _trial("r", rows=turned), _trial("w", rows=wide)]
    found = make_report(trials, TEXTS, 2)
    verdicts = {
        (pair.first.trial.route.name, pair.second.trial.route.name): (pair.agree, pair.cosine)
        for pair in found.pairs
    }
    assert verdicts["p", "q"] == (True, pytest.approx((1, 1)))
    agree, (least, mean) = verdicts["p", "r"]
    assert agree is False
    assert least == pytest.approx(0.9825, abs=1e-3)
    assert mean == pytest.approx((4 + least) / 5)
    assert verdicts["p", "w"] == (False, None)
    assert all(pair.overlap is None for pair in found.pairs)


def test_two_spaces_are_compared_by_neighbours():
    """Cosines across spaces say nothing, so there are none; chance is told beside the overlap."""
    found = make_report([_trial(), _trial("q", "t", NEAR_C), _trial("r", "u", NEAR_A)], TEXTS, 2)
    overlaps = [pair.overlap for pair in found.pairs]
    assert [pair.agree for pair in found.pairs] == [None] * 3
    assert [pair.cosine for pair in found.pairs] == [None] * 3
    assert overlaps[1] == 1
    assert overlaps[0] == overlaps[2] < 1
    assert found.chance == 0.5


def test_with_few_texts_fewer_neighbours_count():
    """With nearly all texts among the nearest, everything would agree with everything."""
    assert [make_report([_trial()], TEXTS, k).k for k in (1, 2, 5)] == [1, 2, 2]
    two = Samples(["a", "b"], 2, {})
    found = make_report([_trial(rows=NEAR_A[:2]), _trial("q", "t", NEAR_A[:2])], two, 5)
    assert (found.k, found.chance, found.pairs[0].overlap) == (1, None, None)


def test_recall_is_of_the_labelled_texts_among_the_nearest():
    """Queries are searched among the texts, never among queries."""
    found = make_report([_trial(), _trial("q", "t", NEAR_C)], PAIRS, 2)
    assert [row.recall for row in found.rows] == [0.5, 0.0]
    assert found.k == 1
    assert found.best_recall is found.rows[0]
    assert make_report([_trial()], TEXTS, 2).best_recall is None


def test_the_cheapest_and_the_fastest_are_named():
    """Of routes that cost as much the faster one is the cheapest; an unknown cost is not cheap."""
    trials = [
        _trial("a", ms=[9]),
        _trial("b", ms=[7], usd=0.0201),
        _trial("c", ms=[8], usd=0.13),
        _trial("d", ms=[1], usd=None),
    ]
    found = make_report(trials, TEXTS, 2)
    assert found.cheapest is found.rows[1]
    assert found.fastest is found.rows[3]
    assert make_report([trials[3]], TEXTS, 2).cheapest is None


@pytest.mark.parametrize(
    ("one", "other", "beaten"),
    [
        ({"ms": [9]}, {"ms": [7]}, True),
        ({"ms": [9]}, {"ms": [9], "usd": 0.01}, True),
        ({"ms": [9]}, {"ms": [7], "usd": 0.03}, False),
        ({"ms": [9]}, {"ms": [9]}, False),
        ({"ms": [9]}, {"ms": [8.99]}, False),
        ({"ms": [9], "usd": None}, {"ms": [7]}, False),
        ({"ms": [9]}, {"ms": [7], "space": "t"}, False),
        ({"ms": [9]}, {"ms": [7], "rows": NEAR_C}, False),
    ],
)
def test_a_route_is_beaten_only_by_one_that_is_as_good(one, other, beaten):
    """The same vectors for less, or sooner; other models are not judged without labelled pairs."""
    found = make_report([_trial("a", **one), _trial("b", **other)], TEXTS, 2)
    assert (found.beaten_by(found.rows[0]) is found.rows[1]) is beaten
    assert not beaten or found.beaten_by(found.rows[1]) is None


def test_with_labelled_pairs_models_are_judged_too():
    """A model that finds as much, and costs and takes no more, beats one of another space."""
    good, poor = {"rows": NEAR_A, "space": "t"}, {"rows": NEAR_C, "space": "t"}
    for other, beaten in ((good, True), (poor, False)):
        found = make_report([_trial(ms=[9]), _trial("b", ms=[7], **other)], PAIRS, 2)
        assert (found.beaten_by(found.rows[0]) is found.rows[1]) is beaten


def test_routes_are_called_by_what_tells_them_apart():
    """The upstream's name is told where it is another."""
    names = [_trial(), _trial("q", upstream="vendor/m"), _trial("r", upstream="x")]
    assert [row.name for row in make_report(names, TEXTS, 2).rows] == [
        "m at p",
        "m at q",
        "m at r (x)",
    ]


def test_a_plan_divides_evenly_and_counts_all_calls():
    """Batches differ by one input at most, cover everything once, and what is planned is told."""
    plan = Plan([f"text {i}" for i in range(130)], 3)
    batches = plan.batches
    assert [len(batch) for batch in batches] == [43, 43, 44]
    assert [place for batch in batches for place in batch] == [*range(130)]
    assert plan.calls == 1 + 3 + 2 + 3 * 10
    assert plan.tokens(None) == plan.tokens("cl100k_base") == 3 * (1 + 130 + 2 * 43 + 3 * 10)
    assert Plan(["a"], 1).calls == 3
