"""`embedding-proxy migrate plan | run`: what it would cost, and the work itself."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Annotated

import typer
from embedding_proxy.index import migrate as begins
from embedding_proxy.index.migrate import DEFAULT, Migration, MigrationRefused, Pace, Wanted, begin
from embedding_proxy.index.migration import collections
from embedding_proxy.index.migration.copy import copy, follow, prove
from embedding_proxy.index.migration.journal import MigrationState, State
from embedding_proxy.index.migration.plan import Plan, Survey
from embedding_proxy.index.migration.points import Points
from embedding_proxy.index.migration.regime import Regime
from embedding_proxy.providers.base import EmbeddingError
from embedding_proxy.providers.probe import SAME
from embedding_proxy.proxy.service import EmbeddingService

from . import migrate_ask as ask
from . import migrate_show as show
from .common import ConfigOption, JsonOption, WorkFailed, print_json, progress, tell_store
from .groups import migrate_app as app
from .migrate_lock import held, wait_for_others
from .migrating import Target, settings_for
from .outliving import run_detached, until_left


@app.command()
def plan(  # noqa: PLR0913 - one parameter an option
    names: ask.CollectionsArgument = None,
    *,
    to: ask.ToOption = None,
    old: ask.FromOption = None,
    dimensions: ask.DimensionsOption = None,
    text_field: ask.FieldOption = None,
    template: ask.TemplateOption = None,
    text_by: ask.ByOption = None,
    file: ask.FileOption = None,
    regime: ask.RegimeOption = Regime.AUTO,
    vector: ask.VectorOption = None,
    into: ask.IntoOption = None,
    qdrant: ask.QdrantOption = None,
    namespace: ask.NamespaceOption = "",
    sample: ask.SampleOption = DEFAULT.sample,
    config_file: ConfigOption = None,
    as_json: JsonOption = False,
) -> None:
    """Say what a migration would do, cost and take; nothing is bought, and nothing changes."""
    what = ask.asked(
        config_file=config_file,
        names=names,
        to=to,
        old=old,
        dimensions=dimensions,
        texts=ask.Texts(text_field, template, text_by, file, vector, into),
        regime=regime,
    )
    tell_store(what.settings)
    pace = Pace(sample=sample)
    plans = asyncio.run(_plan(what, qdrant, namespace, pace))
    if as_json:
        print_json([show.plan_dict(one) for one in plans])
    else:
        show.print_plans(plans, exact=what.model.space.tokenizer is not None)


async def _plan(what: ask.Asked, place: str | None, namespace: str, pace: Pace) -> list[Plan]:
    async with opened(what, place, namespace) as (points, target):
        survey = Survey(points, target, what.model.entry.price, pace, target.limits)
        plans = []
        for wanted in what.wanted:
            old = await collections.look(points, wanted.collection, wanted.vector)
            points.vector_name = old.vector
            plans.append(await survey.plan(wanted, old, progress))
        return plans


@app.command()
def run(  # noqa: PLR0913 - one parameter an option
    names: ask.CollectionsArgument = None,
    *,
    to: ask.ToOption = None,
    old: ask.FromOption = None,
    dimensions: ask.DimensionsOption = None,
    text_field: ask.FieldOption = None,
    template: ask.TemplateOption = None,
    text_by: ask.ByOption = None,
    file: ask.FileOption = None,
    regime: ask.RegimeOption = Regime.AUTO,
    vector: ask.VectorOption = None,
    into: ask.IntoOption = None,
    qdrant: ask.QdrantOption = None,
    namespace: ask.NamespaceOption = "",
    sample: ask.SampleOption = DEFAULT.sample,
    passes: ask.PassesOption = DEFAULT.passes,
    page: Annotated[
        int, typer.Option(min=1, max=2048, help="Points read, and texts embedded, at a time.")
    ] = DEFAULT.page,
    ahead: Annotated[
        int, typer.Option(min=1, max=64, help="Pages that are asked for at a time.")
    ] = DEFAULT.ahead,
    points_per_second: Annotated[
        float | None, typer.Option(min=0.001, help="Go no faster than this.")
    ] = None,
    restart: Annotated[
        bool, typer.Option(help="Delete what an unfinished migration has made, and begin anew.")
    ] = False,
    config_file: ConfigOption = None,
    as_json: JsonOption = False,
) -> None:
    """Fill new collections beside the old ones; run it again to go on after an interruption.

    Answers that are on their way when it is stopped, even by kill -9, are kept for the next run.
    Exit code 1 if a point could not be carried, or a collection could not be migrated.
    """
    what = ask.asked(
        config_file=config_file,
        names=names,
        to=to,
        old=old,
        dimensions=dimensions,
        texts=ask.Texts(text_field, template, text_by, file, vector, into),
        regime=regime,
    )
    tell_store(what.settings)
    pace = Pace(page, ahead, points_per_second, sample, passes)
    life = run_detached()
    try:
        ended = asyncio.run(_run(what, qdrant, namespace, pace, restart=restart, life=life))
    except asyncio.CancelledError:
        raise typer.Exit(130) from None
    failed = [why for _, _, why in ended if why is not None]
    done = [(state, journal) for state, journal, _ in ended if state is not None]
    if as_json:
        print_json([show.state_dict(state, journal) for state, journal in done])
    else:
        for state, journal in done:
            show.print_state(state, journal)
    if failed:
        raise WorkFailed("; ".join(failed))
    if any(state.counts.dead for state, _ in done):
        raise typer.Exit(1)


Ended = tuple[State | None, MigrationState, str | None]
"""What came of a collection: how far it is, and why it went no further."""


async def _run(  # noqa: PLR0913 - in the order of their making
    what: ask.Asked,
    place: str | None,
    namespace: str,
    pace: Pace,
    *,
    restart: bool,
    life: int | None,
) -> list[Ended]:
    ended: list[Ended] = []
    async with until_left(life):
        connection = ask.connection(what.settings, place)
        journals = [
            ask.journal_of(what.settings, connection, wanted.collection) for wanted in what.wanted
        ]
        # Before Qdrant is opened: a folder is open in one process only.
        await wait_for_others(*journals)
        async with opened(what, place, namespace) as (points, target):
            if target.unusable:
                raise WorkFailed(target.unusable)
            for wanted, journal in zip(what.wanted, journals, strict=True):
                try:
                    async with held(journal, target.finish):
                        state = await _migrate(
                            points, target, journal, wanted, pace, restart=restart
                        )
                    ended.append((state, journal, None))
                except MigrationRefused as error:
                    # What is wrong with one collection says nothing of the next.
                    ended.append((journal.load(), journal, str(error)))
                except EmbeddingError as error:
                    again = "run it again to go on"
                    raise WorkFailed(f"{wanted.collection}: {error} ({again})") from error
    return ended


async def _migrate(  # noqa: PLR0913 - in the order of their making
    points: Points,
    target: Target,
    journal: MigrationState,
    wanted: Wanted,
    pace: Pace,
    *,
    restart: bool,
) -> State:
    if restart:
        await begins.restart(points, journal)
    old = await collections.look(points, wanted.collection, wanted.vector)
    points.vector_name = old.vector
    state = begins.state_for(points, old, wanted, target)
    migration = Migration(
        points, target, journal, wanted.rule, old, state, pace=pace, progress=progress
    )
    await begin(migration)
    # What it buys is of use only with what it finds.
    await target.seen_through(prove(migration, SAME))
    await copy(migration)
    await follow(migration)
    return migration.state


@asynccontextmanager
async def opened(
    what: ask.Asked, place: str | None, namespace: str
) -> AsyncIterator[tuple[Points, Target]]:
    """Open Qdrant, and the service that buys the vectors."""
    connection = ask.connection(what.settings, place)
    settings = settings_for(what.settings, what.model)
    async with connection, EmbeddingService(settings) as service:
        target = Target(service, what.model, what.dimensions, namespace)
        yield Points(connection), target
