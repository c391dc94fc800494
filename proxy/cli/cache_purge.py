"""`embedding-proxy cache purge`: entries are deleted, and what waits for Qdrant of them."""

import gc
import sqlite3
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer
from embedding_proxy.cache.disk import purge, salvage
from embedding_proxy.cache.disk.connection import DiskFull
from embedding_proxy.cache.disk.database import is_damage
from embedding_proxy.cache.disk.exclusive_file import open_alone
from embedding_proxy.cache.disk.read_only import ReadableFile
from embedding_proxy.cache.disk.store import TICK_SECONDS
from embedding_proxy.cache.key import Namespace, keyring
from embedding_proxy.cache.maintenance import stats
from embedding_proxy.index.outbox import (
    JOURNAL,
    PENDING,
    OutboxEntry,
    remove_entries,
    select_entries,
)
from embedding_proxy.index.outbox_db import FILE_NAME, OutboxFile, ReadOnlyOutbox
from embedding_proxy.providers.charge import NANO
from embedding_proxy.proxy.config import loader
from embedding_proxy.proxy.config.schema import Settings
from embedding_proxy.proxy.service.storage import GIB

from . import output
from .cache import (
    NamespaceOption,
    SpaceOption,
    check_known,
    open_store,
    open_store_for_reading,
)
from .formatting import count, money, size
from .groups import cache_app
from .output import (
    ConfigOption,
    JsonOption,
    WorkFailed,
    confirm,
    need_terminal,
    print_json,
    progress,
    tell_store,
)

if TYPE_CHECKING:
    from .node_purge import NodePurge

wait = time.sleep


@cache_app.command(name="purge")
def purge_entries(  # noqa: PLR0913 - one parameter an option
    *,
    config_file: ConfigOption = None,
    namespace: NamespaceOption = None,
    space: SpaceOption = None,
    older_than: Annotated[
        str | None, typer.Option(help="Only entries bought longer ago: 90d, 12h, 30min.")
    ] = None,
    unused_for: Annotated[
        str | None, typer.Option(help="Only entries last used longer ago: 90d, 12h, 30min.")
    ] = None,
    text: Annotated[
        str | None,
        typer.Option(
            "--input",
            help="Only this input, in --namespace or the default one; needs --model.",
        ),
    ] = None,
    model: Annotated[str | None, typer.Option(help="The model of --input.")] = None,
    everything: Annotated[bool, typer.Option("--all", help="All entries.")] = False,
    wait_s: Annotated[
        float,
        typer.Option("--wait", min=0, help="Seconds to wait for other nodes, with `cache.shared`."),
    ] = 10.0,
    dry_run: Annotated[bool, typer.Option(help="Count only; delete nothing.")] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Delete the entries that match all given options, also from running proxies.

    With `cache.shared` all nodes delete them, and the shared tier; a node that is down does so when
    it starts. It shows what the entries cost, and asks. Without a terminal, --yes is required.
    """
    settings = loader.load(config_file, purpose="inspect")
    now = time.time()
    choice = purge.PurgeFilter(
        namespace=namespace,
        space=space,
        stored_before=output.past_time(now, older_than, "--older-than"),
        used_before=output.past_time(now, unused_for, "--unused-for"),
        address=_address(settings, text, model, namespace),
    )
    if choice == purge.PurgeFilter() and not everything:
        raise loader.ConfigError("cache purge: say what to delete, or --all; see --help")
    if not dry_run:
        need_terminal("cache purge", "--yes", is_sure=yes)
        # A damaged file that is not salvaged yet must not restore deleted entries.
        limit = int(settings.cache.size_limit_gib * GIB)
        salvage.salvage_pending(settings.cache.directory, limit, settings.cache.pinned_namespaces)
    deleted = 0
    nodes = _nodes(settings, choice)
    if dry_run:
        with open_store_for_reading(settings) as file, _outbox_for_reading(settings) as outbox:
            chosen = _look_up(settings, file, outbox, choice)
    else:
        is_full = False
        try:
            chosen, deleted = _purge(settings, choice, nodes, is_sure=yes)
        except DiskFull:
            is_full = True
        if is_full:
            gc.collect()  # A file that could not be opened is open as long as the failure is kept.
            chosen, deleted = _purge_in_place(settings, choice, nodes, is_sure=yes)
    if nodes and not dry_run:
        nodes.end(deleted, wait_s)
    _tell(chosen, deleted, nodes, dry_run=dry_run, as_json=as_json)
    if nodes and not dry_run and not nodes.is_told:
        raise WorkFailed(
            "the shared Redis does not answer: deleted on this node alone; the others are told by"
            " the proxy of this node as soon as it answers"
        )


def _nodes(settings: Settings, choice: purge.PurgeFilter) -> "NodePurge | None":
    """Return the same purge on all nodes; None where there is but one."""
    if settings.cache.shared is None:
        return None
    from .node_purge import NodePurge  # noqa: PLC0415 - needs the extra `redis`

    return NodePurge(settings, choice)


def _purge(
    settings: Settings, choice: purge.PurgeFilter, nodes: "NodePurge | None", *, is_sure: bool
) -> tuple["_Chosen", int]:
    """Delete a choice beside running proxies; return it, and the number of deleted entries."""
    with open_store(settings) as store, _outbox(settings) as outbox:
        chosen = _look_up(settings, store, outbox, choice)
        _confirm(chosen, nodes, is_sure=is_sure)
        if nodes is not None:
            nodes.begin()
            # Nothing of it is served here from now on, nor copied from the shared tier.
            purge.announce(store, 0)
        if outbox is not None:
            remove_entries(outbox, [*chosen.points, *chosen.journaled])
        with nullcontext() if nodes is None else nodes.applying():
            return chosen, _delete(store, chosen.choices, chosen.entries)


def _purge_in_place(
    settings: Settings, choice: purge.PurgeFilter, nodes: "NodePurge | None", *, is_sure: bool
) -> tuple["_Chosen", int]:
    """Do the same without room on the disk, if no proxy runs. Raises StoreError."""
    with open_alone(settings.cache.directory) as file, _outbox_for_reading(settings) as pending:
        tell_store(settings)
        typer.echo(
            "the disk is full: the store is changed in place, alone; a kill may damage it", err=True
        )
        chosen = _look_up(settings, file, pending, choice)
        _confirm(chosen, nodes, is_sure=is_sure)
        deleted = _delete(file, chosen.choices, chosen.entries)
    # Now there is room for its log, and for what the other nodes are told.
    if nodes is not None:
        nodes.begin()
    with _outbox(settings) as outbox:
        if outbox is not None:
            remove_entries(outbox, [*chosen.points, *chosen.journaled])
    return chosen, deleted


def _confirm(chosen: "_Chosen", nodes: "NodePurge | None", *, is_sure: bool) -> None:
    if not is_sure and nodes is not None:
        confirm(f"Delete {chosen.summary} here, and what matches on all other nodes, for good?")
    elif not is_sure and (chosen.entries or chosen.points):
        confirm(f"Delete {chosen.summary} for good?")


def _tell(
    chosen: "_Chosen",
    deleted: int,
    nodes: "NodePurge | None",
    *,
    dry_run: bool,
    as_json: bool,
) -> None:
    if as_json:
        content: dict[str, Any] = {
            "chosen": chosen.entries,
            "bytes": chosen.bytes,
            "usd_value": None if chosen.nanodollars is None else chosen.nanodollars / NANO,
            "deleted": deleted,
            "waiting": len(chosen.points),
        }
        if chosen.of_others:
            content["of_shared_partitions"] = chosen.of_others
        if nodes is not None:
            content["nodes"] = [asdict(result) for result in nodes.results]
            content["deleted_shared"] = nodes.swept
        print_json({**content, "dry_run": dry_run})
        return
    verb = "would be deleted" if dry_run else "deleted"
    typer.echo(f"{chosen.summary}: {verb}")
    if not dry_run and deleted != chosen.entries:
        typer.echo(f"{count(deleted, 'entry was', 'entries were')} still there to be deleted")
    if chosen.of_others:
        typer.echo(
            f"{count(chosen.of_others, 'of them lies', 'of them lie')} in a partition that several"
            " namespaces or spaces share: they cannot be told apart, so all of them go"
        )
    if chosen.has_outbox:
        typer.echo(
            f"{count(len(chosen.points), 'point')} that"
            f" {'waits' if len(chosen.points) == 1 else 'wait'} for Qdrant {verb};"
            " those in Qdrant stay"
        )
    if nodes is not None and not dry_run:
        for line in nodes.describe():
            typer.echo(line)


@dataclass(frozen=True, slots=True)
class _Chosen:
    """The entries and points that a purge is about to delete."""

    choices: list[purge.PurgeFilter]
    entries: int
    bytes: int
    of_others: int
    """Entries in partitions that several namespaces or spaces share."""
    points: list[OutboxEntry]
    """Points that wait for Qdrant."""
    journaled: list[OutboxEntry]
    """Journal entries of sent points."""
    has_outbox: bool
    nanodollars: int | None
    """The approximate cost of the entries; None if it is known for none of them."""
    without_value: int
    """Entries of unknown cost, because nothing of their partition was bought here."""

    @property
    def summary(self) -> str:
        """The choice in words."""
        if self.nanodollars is None:
            worth = "of unknown value"
        else:
            worth = f"worth about {money(self.nanodollars / NANO)}"
            if self.without_value:
                worth += f" and {self.without_value:,} of unknown value"
        return f"{count(self.entries, 'entry', 'entries')}, {size(self.bytes)}, {worth}"


def _look_up(
    settings: Settings,
    file: ReadableFile,
    outbox: OutboxFile | ReadOnlyOutbox | None,
    choice: purge.PurgeFilter,
) -> _Chosen:
    """Return what a choice matches. Raises WrongUsage if it names something that does not exist."""
    namespace, space = choice.namespace, choice.space
    # What this node does not hold, another one may.
    is_checked = settings.cache.shared is None and (namespace is not None or space is not None)
    if is_checked and not (outbox and select_entries(outbox, namespace=namespace, space=space)):
        check_known(settings, file, namespace, space)
    choices = [
        choice,
        *(filter_ for filter_ in purge.spillover(choice) if purge.count_entries(file, filter_)[0]),
    ]
    counts = [purge.count_entries(file, filter_) for filter_ in choices]
    entries, entry_bytes = (sum(column) for column in zip(*counts, strict=True))
    points, journaled = (
        [] if outbox is None else _outbox_points(outbox, file, choices, tables)
        for tables in (PENDING, JOURNAL)
    )
    of_partitions: Counter[int | None] = Counter()
    for filter_ in choices:
        of_partitions.update(
            {name: number for name, (number, _) in purge.count_by_partition(file, filter_).items()}
        )
    nano, unknown = stats.value(file, of_partitions)
    unknown += entries - of_partitions.total()
    return _Chosen(
        choices,
        entries,
        entry_bytes,
        entries - counts[0][0],
        points,
        journaled,
        outbox is not None,
        None if entries and unknown >= entries else nano,
        unknown,
    )


def _delete(file: purge.WritableFile, choices: Sequence[purge.PurgeFilter], entries: int) -> int:
    """Delete the chosen entries, and return their number; `entries` are expected."""
    deleted = 0
    try:
        with progress("deleting", entries) as tell:
            for choice in choices:
                for count in purge.delete(file, choice):
                    deleted += count
                    tell(deleted)
    finally:
        # Also forget the points of an interrupted purge.
        if deleted and not purge.announce(file, deleted):
            wait(2 * TICK_SECONDS)  # By then, running proxies have noticed.
    return deleted


@contextmanager
def _outbox(settings: Settings) -> Iterator[OutboxFile | None]:
    """Give the outbox; None if there never was one. Raises WorkFailed."""
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
    """Give the outbox to a dry run, which changes nothing. Raises WorkFailed.

    Only a file of an older version is opened for writing, because it must be upgraded before it can
    be read. A damaged file is not changed.
    """
    path = settings.cache.directory / FILE_NAME
    if not path.exists():
        yield None
        return
    with ExitStack() as stack:
        outbox: OutboxFile | ReadOnlyOutbox | None
        try:
            outbox = stack.enter_context(closing(ReadOnlyOutbox(path.parent)))
        except sqlite3.Error as error:
            if is_damage(error):
                raise WorkFailed(f"{path}: {error}") from error
            outbox = stack.enter_context(_outbox(settings))
        yield outbox


def _outbox_points(
    outbox: OutboxFile | ReadOnlyOutbox,
    file: ReadableFile,
    choices: Sequence[purge.PurgeFilter],
    tables: Sequence[str],
) -> list[OutboxEntry]:
    """Return the points in `tables` that were made from chosen entries."""
    choice = choices[0]
    selected = select_entries(
        outbox,
        namespace=choice.namespace,
        space=choice.space,
        address=choice.address,
        tables=tables,
    )
    if choice.stored_before is None and choice.used_before is None:
        return selected
    return [
        point
        for point in selected
        if any(purge.is_chosen(file, chosen, point.address) for chosen in choices)
    ]


def _address(
    settings: Settings, text: str | None, model: str | None, namespace: str | None
) -> bytes | None:
    """Return the address of `--input`. Raises ConfigError, InputRefused."""
    if text is None and model is None:
        return None
    if text is None:
        raise loader.ConfigError("--model: is the model of --input; name a --space instead")
    entry = settings.models.get(model or "")
    if entry is None:
        names = ", ".join(sorted(settings.models))
        raise loader.ConfigError(f"--model: name the model of --input; known: {names}")
    ring = keyring(entry.as_space(), Namespace(namespace or ""))
    return ring.key(text).address
