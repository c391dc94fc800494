"""`embedding-proxy compare`: providers and models on given texts, before one switches.

It prints its report for people or as JSON, and draws it as a plot.
"""

import asyncio
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from embedding_proxy.providers import tokens
from embedding_proxy.proxy.config import loader
from embedding_proxy.proxy.config.loader import ConfigError
from embedding_proxy.proxy.config.schema import Settings
from embedding_proxy.proxy.diagnostics import sample_texts
from embedding_proxy.proxy.diagnostics.benchmark import Plan, RouteBenchmark, cost, run
from embedding_proxy.proxy.diagnostics.report import (
    ComparisonReport,
    ComparisonRow,
    Likeness,
    PlotPoint,
    make_report,
    name_of,
    svg,
)
from embedding_proxy.proxy.diagnostics.routes import (
    Candidates,
    ModelSelection,
    RouteResult,
    find_routes,
)
from embedding_proxy.proxy.diagnostics.sample_texts import Samples

from .formatting import money, price, size
from .output import (
    MAX_TABLE_WIDTH,
    ConfigOption,
    JsonOption,
    WorkFailed,
    console,
    path_text,
    print_json,
    printable,
    progress,
)

ASK_ABOVE_USD = 0.10
"""The most that is spent without `--yes`, as far as it is known before."""
UNKNOWN_USD = 1.0
"""The assumed USD per million tokens of an unknown price; few models cost more."""
MILLION = 1_000_000


def compare(  # noqa: PLR0913 - one parameter an option
    *,
    config_file: ConfigOption = None,
    model: Annotated[
        list[str] | None,
        typer.Option(
            help="A model. Can be given several times. Default: those in the configuration."
        ),
    ] = None,
    provider: Annotated[
        list[str] | None,
        typer.Option(help="Only routes of this provider. Can be given several times."),
    ] = None,
    texts: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="One text a line, or JSONL with a `text`."),
    ] = None,
    pairs: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="JSONL with a `query` and the `text` that it should find."
        ),
    ] = None,
    rounds: Annotated[int, typer.Option(min=1, max=1000, help="Number of rounds.")] = 3,
    k: Annotated[int, typer.Option("--k", min=1, help="Number of nearest neighbours.")] = 5,
    plot_file: Annotated[
        Path | None,
        typer.Option("--plot", metavar="FILE", help="Write a plot of the figures as SVG."),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option(help="Show the texts and the cost; call no provider.")
    ] = False,
    yes: Annotated[
        bool, typer.Option("--yes", help=f"Allow a cost of more than {money(ASK_ABOVE_USD)}.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Compare models and providers: latency, errors, cost, storage and agreement.

    It sends the same texts to every route of the models, without the cache. Exit code 1 if a model
    has no route that answered for all texts.
    """
    if plot_file is not None and (plot_file.is_dir() or not plot_file.parent.is_dir()):
        raise ConfigError(f"--plot: {path_text(plot_file)} cannot be written there")
    settings, names = loader.load_named(config_file)
    names = tuple(dict.fromkeys(model or names))
    if not names:
        raise ConfigError("--model: say which; the configuration names none")
    samples = sample_texts.read(texts, pairs)
    plan = Plan(samples.inputs, rounds)
    budget = None if yes else ASK_ABOVE_USD
    work = _Work(settings, names, tuple(provider or ()), plan, dry_run=dry_run, budget=budget)
    trials, left_out = asyncio.run(work.do())
    if dry_run:
        if as_json:
            print_json(plan_as_dict(trials, plan))
        return
    report = make_report(trials, samples, k)
    problems = [
        f"{name}: no route answered for all inputs"
        for name in names
        if not any(name in row.trial.result.models for row in report.choices)
    ]
    if plot_file is not None:
        plot_file.write_text(draw_plot(report), encoding="utf-8")
    if as_json:
        print_json(as_dict(report, samples, plan, left_out, problems))
    else:
        print_report(report, samples, plan, left_out, problems)
    if problems:
        raise typer.Exit(1)


@dataclass(frozen=True, slots=True)
class _Work:
    """The routes to try, and the most that it may cost."""

    settings: Settings
    names: Sequence[str]
    providers: Sequence[str]
    plan: Plan
    dry_run: bool
    budget: float | None
    """USD; None = no limit."""

    async def do(self) -> tuple[list[RouteBenchmark], list[str]]:
        """Try the routes; return them, and why others were left out.

        Raises ConfigError before anything is spent; WorkFailed if there is no route.
        """
        async with AsyncExitStack() as stack:
            choice = ModelSelection(self.names, also="nothing")
            candidates = await find_routes(self.settings, choice, stack)
            results = list(self._chosen(candidates.results))
            trials = [
                RouteBenchmark(result, result.route, result.space, self._price(candidates, result))
                for result in results
                if result.route is not None
            ]
            if not trials:
                raise WorkFailed(candidates.routers[self.names[0]].unavailable)
            self._refuse_too_long(candidates, trials)
            self._tell_cost(trials)
            if not self.dry_run:
                with progress("asking", len(trials) * self.plan.calls) as tell:
                    await run(trials, self.plan, self.settings.server.request_timeout_s, tell)
        left_out = [
            f"{result.models[0]} at {result.provider}: {result.why}"
            for result in results
            if not result.route
        ]
        return trials, left_out

    def _chosen(self, results: Iterable[RouteResult]) -> Iterator[RouteResult]:
        """Yield the routes of the named models at the named providers. Raises ConfigError."""
        providers = self.settings.providers
        for name in self.providers:
            if name not in providers:
                raise ConfigError(
                    f"--provider: there is no provider {name!r};"
                    f" known: {', '.join(sorted(providers))}"
                )
        missing = {*self.providers}
        for result in results:
            if not {*self.names}.isdisjoint(result.models):
                missing.discard(result.provider)
                if not self.providers or result.provider in self.providers:
                    yield result
        if missing:
            raise ConfigError(
                f"--provider: no route of {', '.join(self.names)} leads to"
                f" {', '.join(sorted(missing))}; add one to its `routes`"
            )

    def _price(self, candidates: Candidates, result: RouteResult) -> float | None:
        """Return USD per million tokens; None if not known. A model on this machine costs 0."""
        entry = self.settings.providers[result.provider]
        price = candidates.models[result.models[0]].price
        if result.route is not None and result.route.price is not None:
            return result.route.price
        return price if price or (entry and entry.key_variable is None) else None

    def _refuse_too_long(self, candidates: Candidates, trials: Iterable[RouteBenchmark]) -> None:
        for trial in trials:
            name = trial.result.models[0]
            max_tokens = candidates.models[name].max_input_tokens
            if max_tokens is None or trial.space.tokenizer is None:
                continue
            sizes = tokens.count(self.plan.inputs, trial.space.tokenizer)
            for text, count in zip(self.plan.inputs, sizes, strict=True):
                if count > max_tokens:
                    raise ConfigError(
                        f"an input has {count:,} tokens, of which {name} takes {max_tokens:,};"
                        f" shorten or leave out the one that begins with {text[:40]!r}"
                    )

    def _tell_cost(self, trials: Sequence[RouteBenchmark]) -> None:
        """Print the planned calls and their cost on stderr. Raises ConfigError if it is high."""
        costs = [cost(trial, self.plan, UNKNOWN_USD) for trial in trials]
        count, total = (sum(each) for each in zip(*costs, strict=True))
        line = (
            f"inputs: {len(self.plan.inputs):,}, routes: {len(trials)}, calls of each:"
            f" {self.plan.calls:,}; about {count:,} tokens for {money(total)}"
        )
        unknown = [name_of(trial) for trial in trials if trial.price is None]
        if unknown:
            line += f" ({money(UNKNOWN_USD)} a million for {', '.join(unknown)}, price not known)"
        typer.echo(printable(line), err=True)
        if self.budget is not None and total > self.budget and not self.dry_run:
            raise ConfigError(
                f"that is more than {money(self.budget)}: say --yes if you want it, or take fewer"
                " texts or --rounds; nobody was asked"
            )


def plan_as_dict(trials: Sequence[RouteBenchmark], plan: Plan) -> dict[str, Any]:
    """Return the planned calls; an unknown cost is None."""
    routes = []
    for trial in trials:
        count, usd = cost(trial, plan, 0.0)
        is_price_known = trial.price is not None
        routes.append(
            {"route": name_of(trial), "tokens": count, "usd": usd if is_price_known else None}
        )
    return {"inputs": len(plan.inputs), "calls_each": plan.calls, "routes": routes}


def as_dict(
    report: ComparisonReport,
    samples: Samples,
    plan: Plan,
    left_out: Sequence[str],
    problems: Sequence[str],
) -> dict[str, Any]:
    """Return the whole result, for scripts."""
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


def _route(report: ComparisonReport, row: ComparisonRow) -> dict[str, Any]:
    trial = row.trial
    beaten = report.beaten_by(row)
    return {
        "route": row.name,
        "model": trial.result.models[0],
        "provider": trial.route.name,
        "upstream_model": trial.route.model,
        "space": trial.space.name,
        "complete": row.complete,
        "calls": trial.calls,
        "failures": dict(trial.failures),
        "error": trial.why or None,
        "first_ms": None if trial.first_s is None else _round(1000 * trial.first_s),
        "p50_ms": _round(row.p50_ms),
        "p95_ms": _round(row.p95_ms),
        "overhead_ms": _round(row.overhead_ms),
        "batch_p50_ms": _round(row.batch_p50_ms),
        "batch_p95_ms": _round(row.batch_p95_ms),
        "tokens": trial.tokens,
        "usd": trial.usd,
        "charged": trial.is_cost_reported and trial.tokens > 0,
        "usd_per_million_tokens": row.usd_per_million_tokens,
        "usd_per_million_inputs": row.usd_per_million_inputs,
        "dimensions": trial.width or None,
        "bytes_per_vector": row.bytes_per_vector or None,
        "bytes_per_million": row.bytes_per_vector * MILLION or None,
        "recall": row.recall,
        "beaten_by": beaten and beaten.name,
    }


def _pair(pair: Likeness) -> dict[str, Any]:
    min_cosine, mean = pair.cosine or (None, None)
    return {
        "one": pair.first.name,
        "other": pair.second.name,
        "same_space": pair.same_space,
        "least_cosine": min_cosine,
        "mean_cosine": mean,
        "agree": pair.agree,
        "overlap": pair.overlap,
    }


def _round(value: float | None) -> float | None:
    return None if value is None else round(value, 2)


def print_report(
    report: ComparisonReport,
    samples: Samples,
    plan: Plan,
    left_out: Sequence[str],
    problems: Sequence[str],
) -> None:
    """Print a table of the routes, then further results, one line each."""
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
    console(MAX_TABLE_WIDTH + longest).print(table)
    for heading, best in (
        ("failures", _failures(report)),
        ("not asked", left_out),
        ("agreement", _agreement(report)),
        ("to choose", _advice(report)),
        ("problems", problems),
    ):
        lines = list(best)
        if lines:
            typer.echo(f"\n{heading}:")
        for line in lines:
            typer.echo(printable(f"  {line}"))


def _cells(row: ComparisonRow, *, with_recall: bool) -> Iterator[str]:
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


def _failures(report: ComparisonReport) -> Iterator[str]:
    for row in report.rows:
        if row.trial.failures:
            kinds = ", ".join(f"{n} x {kind}" for kind, n in row.trial.failures.most_common())
            yield f"{row.name}: {kinds}; the last: {row.trial.why}"


def _agreement(report: ComparisonReport) -> Iterator[str]:
    for pair in report.pairs:
        names = f"{pair.first.name} and {pair.second.name}"
        if pair.cosine is not None:
            verdict = "agree" if pair.agree else "DISAGREE"
            min_cosine, mean = pair.cosine
            yield f"{names} {verdict}: cosine {min_cosine:.6f} at least, {mean:.6f} on average"
        elif pair.same_space:
            widths = f"{pair.first.trial.width} and {pair.second.trial.width}"
            yield f"{names} DISAGREE: widths {widths} in one space"
        elif pair.overlap is not None:
            yield (
                f"{names}: {pair.overlap:.0%} of the {report.k} nearest in common,"
                f" {report.chance or 0:.0%} by chance"
            )


def _advice(report: ComparisonReport) -> Iterator[str]:
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
            names = f"{pair.first.name} agrees with {pair.second.name}"
            yield f"{names}: either stands in for the other"
    for row in report.rows:
        beaten = report.beaten_by(row)
        if beaten:
            yield f"{row.name} is no better than {beaten.name} in anything that was measured"


def draw_plot(report: ComparisonReport) -> str:
    """Return a plot of the median latency against recall, or against cost without recall."""
    by_recall = report.best_recall is not None
    points = []
    for row in report.rows:
        y = row.recall if by_recall else row.usd_per_million_inputs
        notes = [
            "no answer" if row.p50_ms is None else f"{row.p50_ms:,.1f} ms",
            "cost not known"
            if row.usd_per_million_inputs is None
            else f"${price(row.usd_per_million_inputs)} per million inputs",
            *([f"recall {row.recall:.3f}"] if row.recall is not None else []),
        ]
        points.append(PlotPoint(printable(row.name), row.p50_ms, y, ", ".join(notes)))
    y_label = f"recall@{report.k}" if by_recall else "USD per million inputs"
    return svg("Embedding routes compared", "median of single calls, ms", y_label, points)
