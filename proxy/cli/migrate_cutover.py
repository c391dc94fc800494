"""`embedding-proxy migrate status | cutover | rollback | finalize`: from the old to the new.

What is migrated, and how, is in the journal that `run` has written.
"""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import asdict
from typing import Annotated, Any

import typer
from embedding_proxy.index.errors import QdrantFailure, Rejected
from embedding_proxy.index.migration import cutover
from embedding_proxy.index.migration.points import Points
from embedding_proxy.index.migration.qdrant import exists, look
from embedding_proxy.index.migration.runner import DEFAULT, Migration, MigrationRefused, Pace
from embedding_proxy.index.migration.state import (
    MigrationState,
    MigrationStateError,
    State,
    states_in,
)
from embedding_proxy.index.migration.text_template import Rule
from embedding_proxy.index.migration.verify import Verdict
from embedding_proxy.providers.errors import EmbeddingError
from embedding_proxy.providers.route_check import SAME
from embedding_proxy.proxy.config import loader
from embedding_proxy.proxy.config.loader import ConfigError
from embedding_proxy.proxy.config.schema import Settings
from embedding_proxy.proxy.service.embedding_service import EmbeddingService

from . import formatting, migrate, migrate_options
from .groups import migrate_app
from .migrate_options import Steps, Target, find_model, settings_for
from .migrate_process import hold_lock, wait_for_others
from .output import (
    ConfigOption,
    JsonOption,
    WorkFailed,
    confirm,
    need_terminal,
    print_json,
    printable,
    tell_store,
)

Names = Annotated[
    list[str] | None,
    typer.Argument(metavar="COLLECTION...", help="The names that were given to `run`."),
]


@migrate_app.command(name="status")
def status_command(  # noqa: PLR0913 - one parameter an option
    names: Names = None,
    *,
    file: migrate_options.FileOption = None,
    to: migrate_options.ToOption = None,
    qdrant: migrate_options.QdrantOption = None,
    config_file: ConfigOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show the progress of migrations and the next step.

    Without COLLECTION it shows all that were begun here, without a call to Qdrant.
    """
    settings = loader.load(config_file)
    tell_store(settings)
    if not names and file is None:
        _show_all(settings, qdrant, to, as_json=as_json)
        return

    async def count_points(points: Points, journal: MigrationState, _: Steps) -> dict[str, int]:
        state = cutover.load_state(journal)
        return {
            name: await points.count(name)
            for name in (state.source, state.target)
            if await exists(points, name)
        }

    states = _each(
        settings, qdrant, migrate_options.names_of(names, file), to, count_points, lock=False
    )
    if as_json:
        print_json([{**migrate.state_dict(s, j), "points_now": sizes} for s, j, sizes in states])
    else:
        for state, journal, sizes in states:
            migrate.print_state(state, journal, sizes)


def _show_all(settings: Settings, place: str | None, to: str | None, *, as_json: bool) -> None:
    """Show all journals, or those of one Qdrant and one model.

    Raises WorkFailed at the end for journals that cannot be read.
    """
    address = (
        None if place is None else str(migrate_options.connection(settings, place)).rstrip("/")
    )
    states, failed = [], []
    for journal in states_in(migrate_options.journal_folder(settings)):
        try:
            state = journal.load()
        except MigrationStateError as error:
            failed.append(str(error))
            continue
        if state and address in (None, state.place) and to in (None, state.model):
            states.append((state, journal))
    states.sort(key=lambda entry: (entry[0].place, entry[0].collection))
    if as_json:
        print_json([migrate.state_dict(state, journal) for state, journal in states])
    else:
        for state, journal in states:
            migrate.print_state(state, journal)
            typer.echo(printable(f"  in {state.place}"))
        if not states and not failed:
            typer.echo("no migration was begun here")
    if failed:
        raise WorkFailed("; ".join(failed))


@migrate_app.command(name="cutover")
def cutover_command(  # noqa: PLR0913 - one parameter an option
    names: Names = None,
    *,
    file: migrate_options.FileOption = None,
    to: migrate_options.ToOption = None,
    alias: Annotated[
        str | None,
        typer.Option(help="Create this alias; {collection} is the name of the collection."),
    ] = None,
    allow_missing: migrate_options.MissingOption = "0",
    qdrant: migrate_options.QdrantOption = None,
    namespace: migrate_options.NamespaceOption = "",
    sample: migrate_options.SampleOption = DEFAULT.sample,
    passes: migrate_options.PassesOption = DEFAULT.passes,
    config_file: ConfigOption = None,
    as_json: JsonOption = False,
) -> None:
    """Verify the new collections and switch the aliases of the old ones to them."""
    settings = loader.load(config_file)
    tell_store(settings)
    chosen = migrate_options.names_of(names, file)
    if alias is not None and len(chosen) > 1 and "{collection}" not in alias:
        raise ConfigError("--alias: give each collection its own, such as '{collection}_live'")
    pace = Pace(sample=sample, passes=passes)
    limit = migrate_options.missing_limit(allow_missing)

    async def switch(points: Points, journal: MigrationState, steps: Steps) -> Verdict:
        state = cutover.load_state(journal)
        own = alias and alias.replace("{collection}", state.collection)
        model = find_model(settings, state.model, f"{journal.path}: model")
        async with EmbeddingService(settings_for(settings, model)) as service:
            target = Target(service, model, state.dimensions, namespace)
            old = await look(points, state.source, state.vector)
            points.vector_name = state.vector
            migration = Migration(
                points,
                target,
                journal,
                Rule.read(state.rule),
                old,
                state,
                pace=pace,
                progress=steps,
            )
            return await cutover.cutover(migration, SAME, own, missing=limit)

    results = _each(settings, qdrant, chosen, to, switch)
    if as_json:
        print_json([{**migrate.state_dict(s, j), "verified": asdict(v)} for s, j, v in results])
        return
    for state, journal, verdict in results:
        migrate.print_state(state, journal)
        migrate.print_verdict(verdict)


@migrate_app.command(name="rollback")
def rollback_command(  # noqa: PLR0913 - one parameter an option
    names: Names = None,
    *,
    file: migrate_options.FileOption = None,
    to: migrate_options.ToOption = None,
    qdrant: migrate_options.QdrantOption = None,
    config_file: ConfigOption = None,
    as_json: JsonOption = False,
) -> None:
    """Switch the aliases back to the old collections; the new ones stay."""

    async def roll_back(points: Points, journal: MigrationState, steps: Steps) -> int | None:
        state = await cutover.rollback(points, journal)
        try:
            with steps("counting what only the new one has", state.counts.points):
                return await cutover.count_missing(points, state.target, state.source)
        except QdrantFailure as error:
            # The rollback is done nevertheless.
            typer.echo(f"{state.collection}: {error}{steps}", err=True)
            return None

    settings = loader.load(config_file)
    tell_store(settings)
    results = _each(settings, qdrant, migrate_options.names_of(names, file), to, roll_back)
    if as_json:
        print_json([{**migrate.state_dict(s, j), "only_in_new": count} for s, j, count in results])
        return
    for state, journal, count in results:
        migrate.print_state(state, journal)
        if count is None:
            typer.echo(f"  how many points {state.target} has alone could not be counted")
        elif count:
            typer.echo(
                f"  {state.source} lacks {formatting.count(count, 'point')} of {state.target}"
            )


@migrate_app.command(name="finalize")
def finalize_command(  # noqa: PLR0913 - one parameter an option
    names: Names = None,
    *,
    file: migrate_options.FileOption = None,
    to: migrate_options.ToOption = None,
    take_name: Annotated[
        bool, typer.Option(help="Make the old name an alias of the new collection.")
    ] = False,
    allow_missing: migrate_options.MissingOption = "0",
    snapshot: Annotated[
        bool, typer.Option(help="Let the server make a snapshot of it before; that stays.")
    ] = False,
    yes: Annotated[
        int, typer.Option("--yes", count=True, help="Do not ask. Give it twice for both questions.")
    ] = 0,
    qdrant: migrate_options.QdrantOption = None,
    config_file: ConfigOption = None,
    as_json: JsonOption = False,
) -> None:
    """Delete the old collections; asks twice."""
    settings = loader.load(config_file)
    chosen = migrate_options.names_of(names, file)
    tell_store(settings)
    need_terminal("migrate finalize", "--yes --yes", is_sure=yes >= 2)

    limit = migrate_options.missing_limit(allow_missing)

    async def count_points(points: Points, journal: MigrationState, _: Steps) -> int:
        state = await cutover.check_finalize(points, journal, limit)
        is_present = await exists(points, state.source)
        return await points.count(state.source) if is_present else 0

    before = _each(settings, qdrant, chosen, to, count_points, lock=False)
    collections = [f"{s.source} ({formatting.count(points, 'point')})" for s, _, points in before]
    if yes < 1:
        confirm(f"Delete {', '.join(collections)} for good?")
    if yes < 2:
        confirm("There is no way back afterwards. Sure?")

    async def finish(points: Points, journal: MigrationState, _: Steps) -> None:
        await cutover.finalize(
            points, journal, take_name=take_name, missing=limit, snapshot=snapshot
        )

    results = _each(settings, qdrant, chosen, to, finish)
    if as_json:
        print_json([migrate.state_dict(state, journal) for state, journal, _ in results])
    else:
        for state, journal, _ in results:
            migrate.print_state(state, journal)


def _each(  # noqa: C901, PLR0913 - what all four commands share
    settings: Settings,
    place: str | None,
    names: Sequence[str],
    to: str | None,
    work: Callable[[Points, MigrationState, Steps], Awaitable[Any]],
    *,
    lock: bool = True,
) -> list[tuple[State, MigrationState, Any]]:
    """Run `work` for each migration; return its state afterwards, and the result.

    A failure of one does not stop the others. Raises WorkFailed at the end.
    """

    async def run_work(points: Points, journal: MigrationState, steps: Steps) -> Any:  # noqa: ANN401 - what `work` gives
        state = cutover.load_state(journal)
        if to is not None and to != state.model:
            raise MigrationRefused(f"{state.collection} is migrated to {state.model}, not {to}")
        if not lock:
            return await work(points, journal, steps)
        async with hold_lock(journal):
            return await work(points, journal, steps)

    async def run_all() -> tuple[list[tuple[State, MigrationState, Any]], list[str]]:
        results, failed = [], []
        connection = migrate_options.connection(settings, place)
        journals = [migrate_options.journal_of(settings, connection, name) for name in names]
        await wait_for_others(*(journals if lock else ()))
        async with connection:
            points = Points(connection)
            for name, journal in zip(names, journals, strict=True):
                steps = Steps()
                try:
                    result = await run_work(points, journal, steps)
                except MigrationRefused as error:
                    failed.append(f"{name}: {error}")
                except (EmbeddingError, QdrantFailure) as error:
                    state = cutover.load_state(journal)
                    now = f"now: {state.phase}; {migrate.NEXT[state.phase]}"
                    hint = migrate_options.key_hint(settings, place, error)
                    failed.append(f"{name}: {error}{hint}{steps} ({now})")
                    if not isinstance(error, Rejected):
                        break  # Nobody answers: so it would be with the next one.
                else:
                    results.append((cutover.load_state(journal), journal, result))
        return results, failed

    results, failed = asyncio.run(run_all())
    if failed:
        for state, _, _ in results:
            typer.echo(f"{state.collection}: {state.phase}", err=True)
        raise WorkFailed("; ".join(failed))
    return results
