"""What `compare` found, for people, for scripts, and as a plot."""

from collections.abc import Iterator, Sequence
from typing import Any

import typer
from embedding_proxy.proxy.formatting import price, size
from embedding_proxy.proxy.trials import plot
from embedding_proxy.proxy.trials.comparison import Likeness, Report, Row, name_of
from embedding_proxy.proxy.trials.plot import Point
from embedding_proxy.proxy.trials.samples import Samples
from embedding_proxy.proxy.trials.trial import Plan, RouteBenchmark, cost

from .common import console, printable

WIDEST = 120
"""Characters of the table's line, beside the names."""
MILLION = 1_000_000


def planned(trials: Sequence[RouteBenchmark], plan: Plan) -> dict[str, Any]:
    """Return what would be asked; a cost that cannot be told is None."""
    routes = []
    for trial in trials:
        count, usd = cost(trial, plan, 0.0)
        known = trial.price is not None
        routes.append({"route": name_of(trial), "tokens": count, "usd": usd if known else None})
    return {"inputs": len(plan.inputs), "calls_each": plan.calls, "routes": routes}


def as_dict(
    report: Report,
    samples: Samples,
    plan: Plan,
    left_out: Sequence[str],
    problems: Sequence[str],
) -> dict[str, Any]:
    """Return all that was found, as scripts get it."""
    return {
        "texts": samples.texts,
        "labelled_queries": len(samples.wanted),
        "rounds": plan.rounds,
        "batch": len(plan.batches[0]),
        "k": report.k,
        "chance": report.chance,
        "routes": [_route(report, row) for row in report.rows],
        "pairs": [_pair(pair) for pair in report.pairs],
        "left_out": list(left_out),
        "cheapest": report.cheapest and report.cheapest.name,
        "fastest": report.fastest and report.fastest.name,
        "best_recall": report.best_recall and report.best_recall.name,
        "problems": list(problems),
        "ok": not problems,
    }


def _route(report: Report, row: Row) -> dict[str, Any]:
    trial = row.trial
    beaten = report.beaten_by(row)
    return {
        "route": row.name,
        "model": trial.finding.models[0],
        "provider": trial.route.name,
        "upstream_model": trial.route.model,
        "space": trial.space.name,
        "complete": row.complete,
        "calls": trial.calls,
        "failures": dict(trial.failures),
        "error": trial.why or None,
        "first_ms": None if trial.first_s is None else _rounded(1000 * trial.first_s),
        "p50_ms": _rounded(row.p50_ms),
        "p95_ms": _rounded(row.p95_ms),
        "overhead_ms": _rounded(row.overhead_ms),
        "batch_p50_ms": _rounded(row.batch_p50_ms),
        "batch_p95_ms": _rounded(row.batch_p95_ms),
        "tokens": trial.tokens,
        "usd": trial.usd,
        "charged": trial.told and trial.tokens > 0,
        "usd_per_million_tokens": row.usd_per_million_tokens,
        "usd_per_million_inputs": row.usd_per_million_inputs,
        "dimensions": trial.width or None,
        "bytes_per_vector": row.bytes_per_vector or None,
        "bytes_per_million": row.bytes_per_vector * MILLION or None,
        "recall": row.recall,
        "beaten_by": beaten and beaten.name,
    }


def _pair(pair: Likeness) -> dict[str, Any]:
    least, mean = pair.cosine or (None, None)
    return {
        "one": pair.one.name,
        "other": pair.other.name,
        "same_space": pair.same_space,
        "least_cosine": least,
        "mean_cosine": mean,
        "agree": pair.agree,
        "overlap": pair.overlap,
    }


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 2)


def print_report(
    report: Report,
    samples: Samples,
    plan: Plan,
    left_out: Sequence[str],
    problems: Sequence[str],
) -> None:
    """Print a table of the routes, then what else there is to say, one line each."""
    from rich.table import Table  # noqa: PLC0415 - takes 50 ms, which `serve` is spared

    table = Table(box=None, pad_edge=False)
    table.add_column("route", no_wrap=True)
    batch = f"x{len(plan.batches[0])}"
    titles = ["answered", "p50", "p95", f"{batch} p50", f"{batch} p95", "$/M tokens", "$/M inputs"]
    titles += ["width", "1M vectors", *([f"recall@{report.k}"] if samples.wanted else [])]
    for title in titles:
        table.add_column(title, justify="right", no_wrap=True)
    for row in report.rows:
        table.add_row(printable(row.name), *_cells(row, with_recall=bool(samples.wanted)))
    longest = max(len(row.name) for row in report.rows)
    console(WIDEST + longest).print(table)
    for heading, found in (
        ("failures", _failures(report)),
        ("not asked", left_out),
        ("agreement", _agreement(report)),
        ("to choose", _advice(report)),
        ("problems", problems),
    ):
        lines = list(found)
        if lines:
            typer.echo(f"\n{heading}:")
        for line in lines:
            typer.echo(printable(f"  {line}"))


def _cells(row: Row, *, with_recall: bool) -> Iterator[str]:
    trial = row.trial
    yield f"{trial.calls - trial.failures.total()}/{trial.calls}"
    for value in (row.p50_ms, row.p95_ms, row.batch_p50_ms, row.batch_p95_ms):
        yield "-" if value is None else f"{value:,.0f} ms" if value >= 10 else f"{value:.1f} ms"
    for usd in (row.usd_per_million_tokens, row.usd_per_million_inputs):
        yield "?" if usd is None else price(usd)
    yield str(trial.width or "-")
    yield size(MILLION * row.bytes_per_vector) if trial.width else "-"
    if with_recall:
        yield "-" if row.recall is None else f"{row.recall:.3f}"


def _failures(report: Report) -> Iterator[str]:
    for row in report.rows:
        if row.trial.failures:
            kinds = ", ".join(f"{n} x {kind}" for kind, n in row.trial.failures.most_common())
            yield f"{row.name}: {kinds}; the last: {row.trial.why}"


def _agreement(report: Report) -> Iterator[str]:
    for pair in report.pairs:
        names = f"{pair.one.name} and {pair.other.name}"
        if pair.cosine is not None:
            verdict = "agree" if pair.agree else "DISAGREE"
            least, mean = pair.cosine
            yield f"{names} {verdict}: cosine {least:.6f} at least, {mean:.6f} on average"
        elif pair.same_space:
            widths = f"{pair.one.trial.width} and {pair.other.trial.width}"
            yield f"{names} DISAGREE: widths {widths} in one space"
        elif pair.overlap is not None:
            yield (
                f"{names}: {pair.overlap:.0%} of the {report.k} nearest in common,"
                f" {report.chance or 0:.0%} by chance"
            )


def _advice(report: Report) -> Iterator[str]:
    if len(report.choices) < 2:
        return
    if report.cheapest:
        yield f"cheapest: {report.cheapest.name}"
    if report.fastest:
        yield f"fastest: {report.fastest.name}"
    if report.best_recall:
        yield f"finds most: {report.best_recall.name}"
    for pair in report.pairs:
        if pair.agree:
            yield f"{pair.one.name} agrees with {pair.other.name}: either stands in for the other"
    for row in report.rows:
        beaten = report.beaten_by(row)
        if beaten:
            yield f"{row.name} is no better than {beaten.name} in anything that was measured"


def drawn(report: Report) -> str:
    """Return a plot of the median latency against recall if that is known, else against cost."""
    by_recall = report.best_recall is not None
    points = []
    for row in report.rows:
        y = row.recall if by_recall else row.usd_per_million_inputs
        told = [
            "no answer" if row.p50_ms is None else f"{row.p50_ms:,.1f} ms",
            "cost not known"
            if row.usd_per_million_inputs is None
            else f"${price(row.usd_per_million_inputs)} per million inputs",
            *([f"recall {row.recall:.3f}"] if row.recall is not None else []),
        ]
        points.append(Point(printable(row.name), row.p50_ms, y, ", ".join(told)))
    y_label = f"recall@{report.k}" if by_recall else "USD per million inputs"
    return plot.svg("Embedding routes compared", "median of single calls, ms", y_label, points)
