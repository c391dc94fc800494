"""`embedding-proxy migrate plan | run`: what a migration would cost, and the work itself.

Also prints plans, states and verdicts for all `migrate` commands, for people and as JSON.
"""

import asyncio
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import asdict
from typing import Annotated, Any, NamedTuple

import typer
from embedding_proxy.index.errors import QdrantFailure, Rejected
from embedding_proxy.index.migration import runner
from embedding_proxy.index.migration.copy import copy, follow, verify_sample
from embedding_proxy.index.migration.plan import Plan, Survey
from embedding_proxy.index.migration.points import Points
from embedding_proxy.index.migration.qdrant import look
from embedding_proxy.index.migration.runner import (
    DEFAULT,
    Migration,
    MigrationRefused,
    MigrationRequest,
    Pace,
    Regime,
    begin,
)
from embedding_proxy.index.migration.state import MigrationState, Phase, State
from embedding_proxy.index.migration.verify import Verdict
from embedding_proxy.providers.errors import EmbeddingError
from embedding_proxy.providers.route_check import SAME
from embedding_proxy.proxy.service.embedding_service import EmbeddingService

from . import migrate_options
from .formatting import age, count, money
from .groups import migrate_app
from .migrate_options import Steps, Target, settings_for
from .migrate_process import cancel_when_left, hold_lock, run_detached, wait_for_others
from .output import (
    ConfigOption,
    JsonOption,
    WorkFailed,
    path_text,
    print_json,
    tell_store,
)

NEXT = {
    Phase.COPYING: "run it again to go on",
    Phase.COPIED: "next: cutover",
    Phase.SWITCHING: "interrupted: cutover goes on, rollback goes back",
    Phase.SWITCHED: "next: finalize deletes the old collection, rollback goes back",
    Phase.ROLLED_BACK: "run goes on, run --restart begins anew",
    Phase.FINALIZED: "done",
}


@migrate_app.command()
def plan(  # noqa: PLR0913 - one parameter an option
    names: migrate_options.CollectionsArgument = None,
    *,
    to: migrate_options.ToOption = None,
    old: migrate_options.FromOption = None,
    dimensions: migrate_options.DimensionsOption = None,
    text_field: migrate_options.FieldOption = None,
    template: migrate_options.TemplateOption = None,
    text_by: migrate_options.ByOption = None,
    file: migrate_options.FileOption = None,
    regime: migrate_options.RegimeOption = Regime.AUTO,
    vector: migrate_options.VectorOption = None,
    into: migrate_options.IntoOption = None,
    qdrant: migrate_options.QdrantOption = None,
    namespace: migrate_options.NamespaceOption = "",
    sample: migrate_options.SampleOption = DEFAULT.sample,
    config_file: ConfigOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show what a migration does, costs and needs; nothing is bought or changed."""
    options = migrate_options.parse_options(
        config_file=config_file,
        names=names,
        to=to,
        old=old,
        dimensions=dimensions,
        texts=migrate_options.TextOptions(text_field, template, text_by, file, vector, into),
        regime=regime,
    )
    tell_store(options.settings)
    pace = Pace(sample=sample)
    plans = asyncio.run(_plan(options, qdrant, namespace, pace))
    if as_json:
        print_json([plan_dict(item) for item in plans])
    else:
        print_plans(plans, exact=options.model.space.tokenizer is not None)


async def _plan(
    options: migrate_options.MigrationOptions, place: str | None, namespace: str, pace: Pace
) -> list[Plan]:
    async with open_target(options, place, namespace) as (points, target):
        survey = Survey(points, target, options.model.entry.price, pace, target.limits)
        plans = []
        for request in options.requests:
            steps = Steps()
            try:
                old = await look(points, request.collection, request.vector)
                points.vector_name = old.vector
                plans.append(await survey.plan(request, old, steps))
            except QdrantFailure as error:
                hint = migrate_options.key_hint(options.settings, place, error)
                raise WorkFailed(f"{request.collection}: {error}{hint}{steps}") from error
        return plans


@migrate_app.command()
def run(  # noqa: PLR0913 - one parameter an option
    names: migrate_options.CollectionsArgument = None,
    *,
    to: migrate_options.ToOption = None,
    old: migrate_options.FromOption = None,
    dimensions: migrate_options.DimensionsOption = None,
    text_field: migrate_options.FieldOption = None,
    template: migrate_options.TemplateOption = None,
    text_by: migrate_options.ByOption = None,
    file: migrate_options.FileOption = None,
    regime: migrate_options.RegimeOption = Regime.AUTO,
    vector: migrate_options.VectorOption = None,
    into: migrate_options.IntoOption = None,
    qdrant: migrate_options.QdrantOption = None,
    namespace: migrate_options.NamespaceOption = "",
    sample: migrate_options.SampleOption = DEFAULT.sample,
    passes: migrate_options.PassesOption = DEFAULT.passes,
    page: Annotated[
        int, typer.Option(min=1, max=2048, help="Points read and embedded at a time.")
    ] = DEFAULT.page,
    ahead: Annotated[
        int, typer.Option(min=1, max=64, help="Pages in progress at a time.")
    ] = DEFAULT.ahead,
    points_per_second: Annotated[
        float | None, typer.Option(min=0.001, help="Maximum speed.")
    ] = None,
    dual_write: migrate_options.DualOption = None,
    restart: Annotated[
        bool, typer.Option(help="Delete the results of an unfinished migration and begin again.")
    ] = False,
    config_file: ConfigOption = None,
    as_json: JsonOption = False,
) -> None:
    """Fill new collections beside the old ones, or continue after an interruption.

    If it is stopped, even by kill -9, the next run uses the replies that were in progress. Exit
    code 1 if a point or a collection could not be migrated.
    """
    options = migrate_options.parse_options(
        config_file=config_file,
        names=names,
        to=to,
        old=old,
        dimensions=dimensions,
        texts=migrate_options.TextOptions(text_field, template, text_by, file, vector, into),
        regime=regime,
    )
    tell_store(options.settings)
    pace = Pace(page, ahead, points_per_second, sample, passes)
    life = run_detached()
    try:
        begin = Beginning(restart, dual_write)
        results = asyncio.run(_run(options, qdrant, namespace, pace, begin, life))
    except asyncio.CancelledError:
        raise typer.Exit(130) from None
    failed = [why for _, _, why in results if why is not None]
    states = [(state, journal) for state, journal, _ in results if state is not None]
    if as_json:
        print_json([state_dict(state, journal) for state, journal in states])
    else:
        for state, journal in states:
            print_state(state, journal)
    if failed:
        raise WorkFailed("; ".join(failed))
    if any(state.counts.dead for state, _ in states):
        raise typer.Exit(1)


Ended = tuple[State | None, MigrationState, str | None]
"""The result of a collection: its state, and why it stopped."""


class Beginning(NamedTuple):
    """How a run begins."""

    restart: bool
    """Whether the results of an unfinished migration are deleted."""
    dual_write: bool | None
    """Whether the proxy writes to both collections; None = as before."""


async def _run(  # noqa: PLR0913, PLR0917 - in the order of their making
    options: migrate_options.MigrationOptions,
    place: str | None,
    namespace: str,
    pace: Pace,
    beginning: Beginning,
    life: int | None,
) -> list[Ended]:
    results: list[Ended] = []
    async with cancel_when_left(life):
        connection = migrate_options.connection(options.settings, place)
        journals = [
            migrate_options.journal_of(options.settings, connection, request.collection)
            for request in options.requests
        ]
        # Before Qdrant is opened: a folder is open in one process only.
        await wait_for_others(*journals)
        async with open_target(options, place, namespace) as (points, target):
            if target.unusable_reason:
                raise WorkFailed(target.unusable_reason)
            for request, journal in zip(options.requests, journals, strict=True):
                steps = Steps()
                why = None
                try:
                    async with hold_lock(journal, target.finish):
                        await _migrate(points, target, journal, request, pace, steps, beginning)
                except MigrationRefused as error:
                    why = str(error)
                except (EmbeddingError, QdrantFailure) as error:
                    hint = migrate_options.key_hint(options.settings, place, error)
                    remedy = "; what was written and bought stays (run it again to go on)"
                    why = f"{request.collection}: {error}{hint}{steps}{remedy}"
                    if not isinstance(error, Rejected):
                        # No provider answers, so the next collection would fail too.
                        results.append((journal.load(), journal, why))
                        break
                # A failure of one collection says nothing about the next.
                results.append((journal.load(), journal, why))
    return results


async def _migrate(  # noqa: PLR0913, PLR0917 - in the order of their making
    points: Points,
    target: Target,
    journal: MigrationState,
    request: MigrationRequest,
    pace: Pace,
    steps: Steps,
    beginning: Beginning,
) -> None:
    if beginning.restart:
        await runner.restart(points, journal)
    old = await look(points, request.collection, request.vector)
    points.vector_name = old.vector
    rule = await runner.resolve_rule(points, old, request, journal.load())
    state = runner.state_for(points, old, request, rule, target)
    migration = Migration(points, target, journal, rule, old, state, pace=pace, progress=steps)
    await begin(migration, dual_write=beginning.dual_write)
    # Purchases are useful only together with the results.
    await target.shield(verify_sample(migration, SAME))
    await copy(migration)
    await follow(migration)


@asynccontextmanager
async def open_target(
    options: migrate_options.MigrationOptions, place: str | None, namespace: str
) -> AsyncIterator[tuple[Points, Target]]:
    """Open Qdrant, and the service that buys the vectors."""
    connection = migrate_options.connection(options.settings, place)
    settings = settings_for(options.settings, options.model)
    async with connection, EmbeddingService(settings) as service:
        target = Target(service, options.model, options.dimensions, namespace)
        yield Points(connection), target


def plan_dict(plan: Plan) -> dict[str, Any]:
    """Return a plan as JSON."""
    values = asdict(plan)
    values["regime"], values["why"] = plan.decision.regime, plan.decision.why
    values["fields"] = sorted(plan.fields)
    del values["decision"]
    return values


def print_plans(plans: Sequence[Plan], *, exact: bool) -> None:
    """Print the plans; `exact` says whether tokens are counted exactly."""
    for plan in plans:
        typer.echo(f"{plan.collection}: {plan.decision.regime} ({plan.decision.why})")
        if plan.source != plan.collection:
            typer.echo(f"  {plan.collection} is an alias of {plan.source}")
        typer.echo(f"  {plan.source} ({plan.width}) -> {plan.target} ({plan.dimensions})")
        ids = f"{count(plan.numeric_ids, 'number')}, {count(plan.uuid_ids, 'UUID')}"
        typer.echo(
            f"  {count(plan.points, 'point')} (ids: {ids}), {plan.without_text:,} without text"
        )
        for why, number in sorted(plan.odd_vectors.items()):
            typer.echo(f"  {count(number, 'odd vector')}: {why}")
        typer.echo(f"  text from {plan.rule}; fields: {runner.join_names(plan.fields)}")
        if plan.without_vector:
            typer.echo(
                f"  {plan.without_vector:,} without an old vector:"
                f" {plan.without_vector - plan.others_only:,} get one from their text,"
                f" {plan.others_only:,} have no text and stay without"
            )
        if plan.dead:
            first = ", ".join(map(str, plan.first_dead))
            typer.echo(f"  {count(plan.dead, 'point')} cannot be carried: {first}")
        about = "" if exact else "about "
        typer.echo(
            f"  {plan.to_embed:,} to embed: {count(plan.distinct, 'distinct text')},"
            f" {about}{count(plan.tokens, 'token')};"
            f" {count(plan.cached, 'is', 'are')} in the cache"
        )
        typer.echo(
            f"  to buy: {count(plan.to_buy, 'text')}, {about}{count(plan.tokens_to_buy, 'token')},"
            f" {money(plan.dollars)}"
        )
        typer.echo(
            f"  about {age(plan.seconds)}, an estimate: {age(plan.seconds_buying)} to buy (calls:"
            f" {plan.calls:,}), {age(plan.seconds_moving)} for Qdrant by what reading took now"
        )
    if len(plans) > 1:
        typer.echo(
            f"in all: {count(sum(plan.points for plan in plans), 'point')},"
            f" {count(sum(plan.to_buy for plan in plans), 'text')} to buy,"
            f" {money(sum(plan.dollars for plan in plans))},"
            f" about {age(sum(plan.seconds for plan in plans))}"
        )


def state_dict(state: State, journal: MigrationState) -> dict[str, Any]:
    """Return the state of a migration as JSON."""
    values = asdict(state)
    values["phase"] = str(state.phase)
    values["dead_letters"] = path_text(journal.dead_letters) if state.counts.dead else None
    return values


def print_state(
    state: State, journal: MigrationState, sizes: Mapping[str, int] | None = None
) -> None:
    """Print the progress of a migration; `sizes` are the present numbers of points."""
    counts = state.counts
    typer.echo(f"{state.collection}: {state.phase}; {NEXT[state.phase]}")
    typer.echo(f"  {state.source} -> {state.target}: {state.model}, {state.dimensions} numbers")
    typer.echo(f"  {state.regime}: {state.why}")
    if state.proof is not None:
        typer.echo(f"  proved on {len(state.proved)} texts: cosine {state.proof:.5f} at least")
    typer.echo(
        f"  {count(counts.points, 'point')} seen: {counts.copied:,} copied,"
        f" {counts.embedded:,} embedded, {counts.bought:,} bought;"
        f" {counts.updated:,} updated and {counts.deleted:,} deleted since"
    )
    if counts.without_vector:
        typer.echo(f"  {counts.without_vector:,} have neither text nor old vector: carried without")
    for name, number in (sizes or {}).items():
        typer.echo(f"  {count(number, 'point')} in {name}")
    if state.dual_write and state.phase is not Phase.FINALIZED:
        typer.echo("  the proxy writes what it indexes to both")
    if state.aliases:
        typer.echo(f"  aliases: {', '.join(state.aliases)}")
    if state.snapshot:
        typer.echo(f"  the server keeps {state.source} as the snapshot {state.snapshot}")
    if counts.dead:
        letters = path_text(journal.dead_letters)
        typer.echo(f"  {counts.dead:,} could not be carried: {letters}")


def print_verdict(verdict: Verdict) -> None:
    """Print the result of a verification."""
    late = verdict.late
    if late is not None and (late.written or late.deleted or late.left or late.dead):
        typer.echo(
            f"  written to the old collection during the switch: {late.written:,} carried,"
            f" {late.deleted:,} deleted, {late.left:,} newer in the new one, {late.dead:,} could"
            " not be carried"
        )
    if late is not None and not late.quiet:
        typer.echo(
            "  the old collection is still written to, by its own name: let those clients use the"
            " alias; what they write from now on is not in the new one"
        )
    if not verdict.verified:
        return
    cosine = "" if verdict.cosine is None else f", cosine {verdict.cosine:.5f} at least"
    typer.echo(
        f"  verified: {verdict.new_points:,} of {count(verdict.old_points, 'point')},"
        f" ids, payloads and carried vectors equal; {verdict.sampled} sampled{cosine};"
        f" {verdict.recalled} found by their own vectors"
    )
