"""`embedding-proxy migrate status | cutover | rollback | finalize`: from the old to the new.

What is migrated, and how, is in the journal that `run` has written.
"""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import asdict
from typing import Annotated, Any

import typer
from embedding_proxy.index.migration import cutover
from embedding_proxy.index.migration.qdrant import Points, exists, look
from embedding_proxy.index.migration.runner import DEFAULT, Migration, MigrationRefused, Pace
from embedding_proxy.index.migration.state import (
    MigrationState,
    MigrationStateError,
    State,
    states_in,
)
from embedding_proxy.index.migration.text_template import Rule
from embedding_proxy.index.migration.verify import Verdict
from embedding_proxy.providers.route_check import SAME
from embedding_proxy.proxy.config import loader
from embedding_proxy.proxy.config.loader import ConfigError
from embedding_proxy.proxy.config.schema import Settings
from embedding_proxy.proxy.service.embedding_service import EmbeddingService

from . import formatting, migrate, migrate_options
from .groups import migrate_app
from .migrate_options import Target, find_model, settings_for
from .migrate_process import hold_lock, wait_for_others
from .output import (
    ConfigOption,
    JsonOption,
    WorkFailed,
    confirm,
    need_terminal,
    print_json,
    printable,
    progress,
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

    async def count_points(points: Points, journal: MigrationState) -> dict[str, int]:
        state = cutover.load_state(journal)
        return {
            name: await points.count(name)
            for name in (state.source, state.target)
            if await exists(points, name)
        }

    found = _each(
        settings, qdrant, migrate_options.names_of(names, file), to, count_points, lock=False
    )
    if as_json:
        print_json([{**migrate.state_dict(s, j), "points_now": sizes} for s, j, sizes in found])
    else:
        for state, journal, sizes in found:
            migrate.print_state(state, journal, sizes)


def _show_all(settings: Settings, place: str | None, to: str | None, *, as_json: bool) -> None:
    """Show the journals there are, of one Qdrant and one model if these are named.

    Raises WorkFailed in the end for those that cannot be read.
    """
    wanted = None if place is None else str(migrate_options.connection(settings, place)).rstrip("/")
    found, failed = [], []
    for journal in states_in(migrate_options.journal_folder(settings)):
        try:
            state = journal.load()
        except MigrationStateError as error:
            failed.append(str(error))
            continue
        if state and wanted in (None, state.place) and to in (None, state.model):
            found.append((state, journal))
    found.sort(key=lambda one: (one[0].place, one[0].collection))
    if as_json:
        print_json([migrate.state_dict(state, journal) for state, journal in found])
    else:
        for state, journal in found:
            migrate.print_state(state, journal)
            typer.echo(printable(f"  in {state.place}"))
        if not found and not failed:
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
    allow_missing: Annotated[
        bool, typer.Option(help="Continue although some points could not be migrated.")
    ] = False,
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

    async def switch(points: Points, journal: MigrationState) -> Verdict:
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
                progress=progress,
            )
            return await cutover.cutover(migration, SAME, own, allow_missing=allow_missing)

    found = _each(settings, qdrant, chosen, to, switch)
    if as_json:
        print_json([{**migrate.state_dict(s, j), "verified": asdict(v)} for s, j, v in found])
        return
    for state, journal, verdict in found:
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

    async def roll_back(points: Points, journal: MigrationState) -> int:
        return (await cutover.rollback(points, journal))[1]

    settings = loader.load(config_file)
    tell_store(settings)
    found = _each(settings, qdrant, migrate_options.names_of(names, file), to, roll_back)
    if as_json:
        print_json([{**migrate.state_dict(s, j), "only_in_new": count} for s, j, count in found])
        return
    for state, journal, count in found:
        migrate.print_state(state, journal)
        if count:
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

    async def count_points(points: Points, journal: MigrationState) -> int:
        state = cutover.load_state(journal)
        there = await exists(points, state.source)
        return await points.count(state.source) if there else 0

    before = _each(settings, qdrant, chosen, to, count_points, lock=False)
    doomed = [f"{s.source} ({formatting.count(points, 'point')})" for s, _, points in before]
    if yes < 1:
        confirm(f"Delete {', '.join(doomed)} for good?")
    if yes < 2:
        confirm("There is no way back afterwards. Sure?")

    async def finish(points: Points, journal: MigrationState) -> None:
        await cutover.finalize(points, journal, take_name=take_name)

    found = _each(settings, qdrant, chosen, to, finish)
    if as_json:
        print_json([migrate.state_dict(state, journal) for state, journal, _ in found])
    else:
        for state, journal, _ in found:
            migrate.print_state(state, journal)


def _each(  # noqa: PLR0913 - what all four commands share
    settings: Settings,
    place: str | None,
    names: Sequence[str],
    to: str | None,
    work: Callable[[Points, MigrationState], Awaitable[Any]],
    *,
    lock: bool = True,
) -> list[tuple[State, MigrationState, Any]]:
    """Do something for each migration; return its state afterwards, and what was found.

    What is wrong with one does not keep the others back. Raises WorkFailed at the end.
    """

    async def run_work(points: Points, journal: MigrationState) -> Any:  # noqa: ANN401 - what `work` gives
        state = cutover.load_state(journal)
        if to is not None and to != state.model:
            raise MigrationRefused(f"{state.collection} is migrated to {state.model}, not {to}")
        if not lock:
            return await work(points, journal)
        async with hold_lock(journal):
            return await work(points, journal)

    async def run_all() -> tuple[list[tuple[State, MigrationState, Any]], list[str]]:
        found, failed = [], []
        connection = migrate_options.connection(settings, place)
        journals = [migrate_options.journal_of(settings, connection, name) for name in names]
        await wait_for_others(*(journals if lock else ()))
        async with connection:
            points = Points(connection)
            for name, journal in zip(names, journals, strict=True):
                try:
                    result = await run_work(points, journal)
                except MigrationRefused as error:
                    failed.append(f"{name}: {error}")
                else:
                    found.append((cutover.load_state(journal), journal, result))
        return found, failed

    found, failed = asyncio.run(run_all())
    if failed:
        for state, _, _ in found:
            typer.echo(f"{state.collection}: {state.phase}", err=True)
        raise WorkFailed("; ".join(failed))
    return found
