"""`embedding-proxy cache …`: look at the store, delete from it, copy it. Beside a running proxy."""

import sqlite3
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import typer

from cache.disk import bounds, connection, purge, salvage
from cache.disk.database import Database
from cache.disk.read_only import ReadableFile, ReadOnlyFile
from cache.key import Namespace, keyring
from cache.maintenance import backup
from cache.row import OTHER_NAMESPACE
from index import outbox_purge
from index.outbox_file import FILE_NAME, OutboxFile, ReadOnlyOutbox
from providers.base import current_label
from proxy import config
from proxy.service import GIB
from proxy.settings.schema import Settings

from . import spans
from .common import (
    ConfigOption,
    JsonOption,
    WorkFailed,
    path_text,
    plain,
    print_json,
    printable,
    progress,
    size,
    tell_store,
)

app = typer.Typer(no_args_is_help=True, help="Look at the cache, mend it, copy it, delete from it.")

NamespaceOption = Annotated[
    str | None,
    typer.Option(help='Only this namespace; "" is that of clients without one.', callback=plain),
]
SpaceOption = Annotated[
    str | None,
    typer.Option(help="Only this space, as `cache stats` shows it.", callback=plain),
]


@contextmanager
def opened(settings: Settings, *, create: bool = False) -> Iterator[Database]:
    """Give the store that a configuration names, and say on stderr which it is. Raises StoreError.

    See `tell_store`.
    """
    cache = settings.cache
    limit = int(cache.size_limit_gib * GIB)
    with connection.opened(cache.directory, limit, cache.pinned, create=create) as file:
        tell_store(settings)
        yield file


@contextmanager
def opened_for_reading(settings: Settings) -> Iterator[ReadableFile]:
    """Give the store that a configuration names to a command that only reads, and say which it is.

    Says on stderr, too, when what its write-ahead log holds is left out. Raises StoreError.
    """
    cache = settings.cache
    limit = int(cache.size_limit_gib * GIB)
    with connection.opened_for_reading(cache.directory, limit, cache.pinned) as file:
        tell_store(settings)
        if isinstance(file, ReadOnlyFile) and file.lacks_log:
            why = file.reason or "the folder takes no writes"
            line = f"what the log {file.path.name}-wal holds cannot be read, and is left out: {why}"
            typer.echo(printable(path_text(line)), err=True)
        yield file


@app.command(name="purge")
def purge_entries(  # noqa: PLR0913 - one parameter an option
    *,
    config_file: ConfigOption = None,
    namespace: NamespaceOption = None,
    space: SpaceOption = None,
    older_than: Annotated[
        str | None, typer.Option(help="Only what was bought longer ago: 90d, 12h, 30min.")
    ] = None,
    unused_for: Annotated[
        str | None, typer.Option(help="Only what was used last longer ago: 90d, 12h, 30min.")
    ] = None,
    text: Annotated[
        str | None, typer.Option("--input", help="Only this input; needs --model.")
    ] = None,
    model: Annotated[str | None, typer.Option(help="The model of --input.")] = None,
    everything: Annotated[bool, typer.Option("--all", help="All entries.")] = False,
    dry_run: Annotated[bool, typer.Option(help="Only say what would be deleted.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Delete the entries for which all that is given holds; running proxies forget them soon."""
    settings = config.load(config_file)
    now = time.time()
    choice = purge.Choice(
        namespace=namespace,
        space=space,
        stored_before=spans.before(now, older_than, "--older-than"),
        used_before=spans.before(now, unused_for, "--unused-for"),
        address=_address(settings, text, model, namespace),
    )
    if choice == purge.Choice() and not everything:
        raise config.ConfigError("cache purge: say what to delete, or --all; see --help")
    if not dry_run:
        # What is deleted must not come back from a damaged file that is not salvaged yet.
        limit = int(settings.cache.size_limit_gib * GIB)
        salvage.salvage_pending(settings.cache.directory, limit, settings.cache.pinned)
    deleted = 0
    if dry_run:
        with opened_for_reading(settings) as file, _outbox_for_reading(settings) as waiting:
            chosen = _look_up(file, waiting, choice)
    else:
        with opened(settings) as store, _outbox(settings) as outbox:
            chosen = _look_up(store, outbox, choice)
            if outbox is not None:
                outbox_purge.remove(outbox, chosen.points)
            deleted = _delete(store, chosen.choices, chosen.entries)
    if as_json:
        told = {
            "chosen": chosen.entries,
            "bytes": chosen.bytes,
            "deleted": deleted,
            "waiting": len(chosen.points),
        }
        if chosen.of_others:
            told["of_shared_partitions"] = chosen.of_others
        print_json({**told, "dry_run": dry_run})
        return
    done = "would be deleted" if dry_run else "deleted"
    if dry_run:
        typer.echo(f"{chosen.entries:,} entries, {size(chosen.bytes)}, {done}")
    else:
        typer.echo(f"{deleted:,} entries {done}, {size(chosen.bytes)}")
    if chosen.of_others:
        typer.echo(
            f"{chosen.of_others:,} of them lie in a partition that several namespaces or spaces"
            " share: they cannot be told apart, so all of them go"
        )
    if chosen.has_outbox:
        typer.echo(
            f"{len(chosen.points):,} points that wait for Qdrant {done}; those in Qdrant stay"
        )


@dataclass(frozen=True, slots=True)
class _Chosen:
    """What a purge is about to delete."""

    choices: list[purge.Choice]
    entries: int
    bytes: int
    of_others: int
    """Those of the entries that lie in a partition that several namespaces or spaces share."""
    points: list[outbox_purge.Picked]
    """What waits for Qdrant."""
    has_outbox: bool


def _look_up(
    file: ReadableFile, outbox: OutboxFile | ReadOnlyOutbox | None, choice: purge.Choice
) -> _Chosen:
    choices = [choice, *(one for one in _shared(choice) if purge.count(file, one)[0])]
    counts = [purge.count(file, one) for one in choices]
    entries, held = (sum(column) for column in zip(*counts, strict=True))
    points = [] if outbox is None else _waiting(outbox, file, choices)
    return _Chosen(choices, entries, held, entries - counts[0][0], points, outbox is not None)


def _delete(file: Database, choices: Sequence[purge.Choice], entries: int) -> int:
    """Delete what is chosen, and return how many entries that were; `entries` are expected."""
    deleted = 0
    try:
        with progress("deleting", entries) as tell:
            for choice in choices:
                for count in purge.delete(file, choice):
                    deleted += count
                    tell(deleted)
    finally:
        # Also what an interruption cut short is to be forgotten.
        if deleted:
            purge.announce(file, deleted)
    return deleted


def _shared(choice: purge.Choice) -> list[purge.Choice]:
    """Return what may also hold chosen entries: the partitions of what came beyond the bounds.

    See `cache.disk.bounds`. An entry there does not say which namespace or space it is of.
    """
    found = []
    rest = None if choice.space is None else bounds.rest_of(current_label(choice.space))
    if rest is not None and rest != choice.space:
        found.append(replace(choice, space=rest))
    is_chosen_by_name = choice.namespace is not None or choice.space is not None
    if is_chosen_by_name and choice.namespace != OTHER_NAMESPACE:
        found.append(replace(choice, namespace=OTHER_NAMESPACE, space=None))
    return found


@contextmanager
def _outbox(settings: Settings) -> Iterator[OutboxFile | None]:
    """Give what waits for Qdrant; None where nothing ever did. Raises WorkFailed."""
    folder = settings.cache.directory
    if not (folder / FILE_NAME).exists():
        yield None
        return
    try:
        with closing(OutboxFile(folder)) as file:
            yield file
    except (sqlite3.Error, OSError) as error:
        raise WorkFailed(f"{folder / FILE_NAME}: {error}") from error


@contextmanager
def _outbox_for_reading(
    settings: Settings,
) -> Iterator[OutboxFile | ReadOnlyOutbox | None]:
    """Give what waits for Qdrant, though it cannot be written. Raises WorkFailed."""
    folder = settings.cache.directory
    with ExitStack() as stack:
        found: OutboxFile | ReadOnlyOutbox | None
        try:
            found = stack.enter_context(_outbox(settings))
        except WorkFailed as failure:
            try:
                found = stack.enter_context(closing(ReadOnlyOutbox(folder)))
            except sqlite3.Error as error:
                raise failure from error
        yield found


def _waiting(
    outbox: OutboxFile | ReadOnlyOutbox, file: ReadableFile, choices: Sequence[purge.Choice]
) -> list[outbox_purge.Picked]:
    """Return the points that wait of what is chosen first; by age the entry in the cache counts."""
    choice = choices[0]
    found = outbox_purge.pick(
        outbox, namespace=choice.namespace, space=choice.space, address=choice.address
    )
    if choice.stored_before is None and choice.used_before is None:
        return found
    return [
        one
        for one in found
        if any(purge.is_chosen(file, chosen, one.address) for chosen in choices)
    ]


def _address(
    settings: Settings, text: str | None, model: str | None, namespace: str | None
) -> bytes | None:
    """Return the address of `--input`. Raises ConfigError, InputRefused."""
    if text is None and model is None:
        return None
    if text is None:
        raise config.ConfigError("--model: is the model of --input; name a --space instead")
    entry = settings.models.get(model or "")
    if entry is None:
        names = ", ".join(sorted(settings.models))
        raise config.ConfigError(f"--model: name the model of --input; known: {names}")
    ring = keyring(entry.as_space(), Namespace(namespace or ""))
    return ring.key(text).address


@app.command(name="backup")
def back_up(
    target: Annotated[Path, typer.Argument(metavar="FILE")],
    *,
    config_file: ConfigOption = None,
    as_json: JsonOption = False,
) -> None:
    """Copy all entries and the ledger to FILE, itself a store's file, while proxies go on."""
    if target.exists():
        raise WorkFailed(f"{target} exists; it is not overwritten")
    if not target.parent.is_dir():
        raise WorkFailed(f"{target}: there is no such folder")
    settings = config.load(config_file)
    try:
        with opened_for_reading(settings) as file:
            ((total,),) = file.sql("SELECT value FROM Settings WHERE key = 'count'")
            with progress("copying", total) as tell:
                backup.copy(file, target, lambda done, _total: tell(done))
    except connection.StoreError as error:
        # SQLite does not say which of the two it means.
        raise WorkFailed(f"{target}: not written: {error}") from error
    written = target.stat().st_size
    if as_json:
        print_json({"file": path_text(target), "bytes": written})
    else:
        typer.echo(f"{target}: {size(written)}; to restore it, put it in the place of cache.db")
