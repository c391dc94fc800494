"""`embedding-proxy compare`: providers and models on given texts, before one switches."""

import asyncio
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer
from embedding_proxy.providers import tokens
from embedding_proxy.proxy import config
from embedding_proxy.proxy.config import ConfigError
from embedding_proxy.proxy.formatting import money
from embedding_proxy.proxy.settings.schema import Settings
from embedding_proxy.proxy.trials import comparison, samples
from embedding_proxy.proxy.trials.candidates import Candidates, find
from embedding_proxy.proxy.trials.choice import ModelSelection
from embedding_proxy.proxy.trials.finding import RouteResult
from embedding_proxy.proxy.trials.trial import Plan, RouteBenchmark, cost, run

from .common import (
    ConfigOption,
    JsonOption,
    WorkFailed,
    path_text,
    print_json,
    printable,
    progress,
)
from .compared import as_dict, drawn, planned, print_report

ASK_ABOVE_USD = 0.10
"""What is spent without `--yes`, at most, as far as it can be told before."""
UNKNOWN_USD = 1.0
"""USD per million tokens that are reckoned with where a price is not known; few cost more."""


def compare(  # noqa: PLR0913 - one parameter an option
    *,
    config_file: ConfigOption = None,
    model: Annotated[
        list[str] | None,
        typer.Option(help="A model; several times. Else those that the configuration names."),
    ] = None,
    provider: Annotated[
        list[str] | None,
        typer.Option(help="Only routes of this provider; may be given several times."),
    ] = None,
    texts: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Texts, one a line; or JSONL with a `text`."),
    ] = None,
    pairs: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="JSONL of a `query` and the `text` it should find."),
    ] = None,
    rounds: Annotated[int, typer.Option(min=1, max=1000, help="How often all is measured.")] = 3,
    k: Annotated[int, typer.Option("--k", min=1, help="How many of the nearest count.")] = 5,
    plot_file: Annotated[
        Path | None,
        typer.Option("--plot", metavar="FILE", help="Write the figures as a plot, an SVG."),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option(help="Only say what would be asked, and what it costs.")
    ] = False,
    yes: Annotated[
        bool, typer.Option("--yes", help=f"Spend more than {money(ASK_ABOVE_USD)}, too.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Compare models and providers: latency, errors, cost, storage, and whether they agree.

    Every route of the models is asked for the same texts, past the cache. Exit code 1 if a model
    has no route that answered for all of them.
    """
    if plot_file is not None and (plot_file.is_dir() or not plot_file.parent.is_dir()):
        raise ConfigError(f"--plot: {path_text(plot_file)} cannot be written there")
    settings, named = config.load_named(config_file)
    names = tuple(dict.fromkeys(model or named))
    if not names:
        raise ConfigError("--model: say which; the configuration names none")
    found = samples.read(texts, pairs)
    plan = Plan(found.inputs, rounds)
    budget = None if yes else ASK_ABOVE_USD
    work = _Work(settings, names, tuple(provider or ()), plan, dry_run=dry_run, budget=budget)
    trials, left_out = asyncio.run(work.do())
    if dry_run:
        if as_json:
            print_json(planned(trials, plan))
        return
    report = comparison.report(trials, found, k)
    problems = [
        f"{name}: no route answered for all inputs"
        for name in names
        if not any(name in row.trial.finding.models for row in report.choices)
    ]
    if plot_file is not None:
        plot_file.write_text(drawn(report), encoding="utf-8")
    if as_json:
        print_json(as_dict(report, found, plan, left_out, problems))
    else:
        print_report(report, found, plan, left_out, problems)
    if problems:
        raise typer.Exit(1)


@dataclass(frozen=True, slots=True)
class _Work:
    """What is to be tried, and for how much."""

    settings: Settings
    names: Sequence[str]
    providers: Sequence[str]
    plan: Plan
    dry_run: bool
    budget: float | None
    """USD; None = whatever it costs."""

    async def do(self) -> tuple[list[RouteBenchmark], list[str]]:
        """Try the routes; return them, and why others were left out.

        Raises ConfigError before a cent is spent; WorkFailed if there is no route.
        """
        async with AsyncExitStack() as stack:
            choice = ModelSelection(self.names, also="nothing")
            candidates = await find(self.settings, choice, stack)
            findings = list(self._chosen(candidates.findings))
            trials = [
                RouteBenchmark(one, one.route, one.space, self._price(candidates, one))
                for one in findings
                if one.route is not None
            ]
            if not trials:
                raise WorkFailed(candidates.routers[self.names[0]].unavailable)
            self._refuse_too_long(candidates, trials)
            self._tell_cost(trials)
            if not self.dry_run:
                with progress("asking", len(trials) * self.plan.calls) as tell:
                    await run(trials, self.plan, self.settings.server.request_timeout_s, tell)
        left_out = [
            f"{one.models[0]} at {one.provider}: {one.why}" for one in findings if not one.route
        ]
        return trials, left_out

    def _chosen(self, findings: Iterable[RouteResult]) -> Iterator[RouteResult]:
        """Yield the routes of the named models at the named providers. Raises ConfigError."""
        known = self.settings.providers
        for name in self.providers:
            if name not in known:
                raise ConfigError(
                    f"--provider: there is no provider {name!r}; known: {', '.join(sorted(known))}"
                )
        missing = {*self.providers}
        for one in findings:
            if not {*self.names}.isdisjoint(one.models):
                missing.discard(one.provider)
                if not self.providers or one.provider in self.providers:
                    yield one
        if missing:
            raise ConfigError(
                f"--provider: no route of {', '.join(self.names)} leads to"
                f" {', '.join(sorted(missing))}; add one to its `routes`"
            )

    def _price(self, candidates: Candidates, one: RouteResult) -> float | None:
        """Return USD per million tokens; None if it is not known: 0 is, on one's own machine."""
        entry = self.settings.providers[one.provider]
        price = candidates.models[one.models[0]].price
        if one.route is not None and one.route.price is not None:
            return one.route.price
        return price if price or (entry and entry.key_variable is None) else None

    def _refuse_too_long(self, candidates: Candidates, trials: Iterable[RouteBenchmark]) -> None:
        for trial in trials:
            name = trial.finding.models[0]
            most = candidates.models[name].context
            if most is None or trial.space.tokenizer is None:
                continue
            sizes = tokens.count(self.plan.inputs, trial.space.tokenizer)
            for text, count in zip(self.plan.inputs, sizes, strict=True):
                if count > most:
                    raise ConfigError(
                        f"an input has {count:,} tokens, of which {name} takes {most:,}; shorten or"
                        f" leave out the one that begins with {text[:40]!r}"
                    )

    def _tell_cost(self, trials: Sequence[RouteBenchmark]) -> None:
        """Say on stderr what will be asked and what it costs. Raises ConfigError if it is much."""
        costs = [cost(trial, self.plan, UNKNOWN_USD) for trial in trials]
        count, total = (sum(each) for each in zip(*costs, strict=True))
        told = (
            f"inputs: {len(self.plan.inputs):,}, routes: {len(trials)}, calls of each:"
            f" {self.plan.calls:,}; about {count:,} tokens for {money(total)}"
        )
        unknown = [comparison.name_of(trial) for trial in trials if trial.price is None]
        if unknown:
            told += f" ({money(UNKNOWN_USD)} a million for {', '.join(unknown)}, price not known)"
        typer.echo(printable(told), err=True)
        if self.budget is not None and total > self.budget and not self.dry_run:
            raise ConfigError(
                f"that is more than {money(self.budget)}: say --yes if you want it, or take fewer"
                " texts or --rounds; nobody was asked"
            )
