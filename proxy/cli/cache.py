"""`embedding-proxy cache backup | export | stats`, and what all `cache` commands share.

The `cache` commands read the store, delete from it and copy it, also while proxies use it.
"""

import difflib
import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, BinaryIO

import typer
from embedding_proxy.cache import atomic_file, ledger
from embedding_proxy.cache.disk import bounds, connection, ledger_reader
from embedding_proxy.cache.disk.database import Database
from embedding_proxy.cache.disk.purge import PurgeFilter, count_entries
from embedding_proxy.cache.disk.read_only import ReadableFile, ReadOnlyFile
from embedding_proxy.cache.key import OTHER_NAMESPACE, Row
from embedding_proxy.cache.maintenance import archive, backup, stats
from embedding_proxy.providers.base import current_label
from embedding_proxy.proxy.config import loader
from embedding_proxy.proxy.config.schema import Settings
from embedding_proxy.proxy.http import status
from embedding_proxy.proxy.service.storage import GIB

from .formatting import age, count, join_names, money, savings, share, size
from .groups import cache_app
from .output import (
    MAX_TABLE_WIDTH,
    ConfigOption,
    JsonOption,
    WorkFailed,
    WrongUsage,
    check_utf8,
    console,
    path_text,
    print_json,
    printable,
    progress,
    tell_store,
)

if TYPE_CHECKING:
    from embedding_proxy.cache.shared.node_registry import NodeState

NamespaceOption = Annotated[
    str | None,
    typer.Option(help='Only this namespace; "" for clients without one.', callback=check_utf8),
]
SpaceOption = Annotated[
    str | None,
    typer.Option(help="Only this space, named as in `cache stats`.", callback=check_utf8),
]

STREAM = "-"


@contextmanager
def open_store(settings: Settings, *, create: bool = False) -> Iterator[Database]:
    """Give a configuration's store, and name it on stderr (`tell_store`). Raises StoreError."""
    cache = settings.cache
    limit = int(cache.size_limit_gib * GIB)
    with connection.opened(cache.directory, limit, cache.pinned_namespaces, create=create) as file:
        tell_store(settings)
        yield file


@contextmanager
def open_store_for_reading(settings: Settings) -> Iterator[ReadableFile]:
    """Give the store of a configuration to a command that only reads, and name it on stderr.

    Also says on stderr if the content of its write-ahead log is left out. Raises StoreError.
    """
    cache = settings.cache
    limit = int(cache.size_limit_gib * GIB)
    with connection.opened_for_reading(cache.directory, limit, cache.pinned_namespaces) as file:
        tell_store(settings)
        if isinstance(file, ReadOnlyFile) and file.lacks_log:
            why = file.reason or "the folder takes no writes"
            line = f"what the log {file.path.name}-wal holds cannot be read, and is left out: {why}"
            typer.echo(printable(path_text(line)), err=True)
        yield file


def check_known(
    settings: Settings, file: ReadableFile, namespace: str | None, space: str | None
) -> None:
    """Raise WrongUsage for a namespace or space without entries in the store.

    It is not known for entries in shared partitions, see `cache.disk.bounds`.
    """
    rows = file.sql("SELECT DISTINCT namespace, space FROM Partitions").fetchall()
    namespaces, spaces = sorted({row[0] for row in rows}), sorted({row[1] for row in rows})
    if OTHER_NAMESPACE in namespaces:
        return
    if namespace is not None and namespace not in ("", *namespaces):
        raise WrongUsage(_unknown_name_message("--namespace", "namespace", namespace, namespaces))
    if space is None:
        return
    label = current_label(space)
    rest = bounds.rest_of(label)
    if not any(
        label_of_store in (label, rest) or label_of_store.startswith(f"{label}?")
        for label_of_store in spaces
    ):
        entry = settings.models.get(space)
        near = [] if entry is None else [entry.as_space().label]
        raise WrongUsage(_unknown_name_message("--space", "space", space, spaces, near))


def _unknown_name_message(
    option: str, what: str, name: str, names: list[str], near: list[str] | None = None
) -> str:
    near = [
        candidate for candidate in near or () if candidate in names
    ] or difflib.get_close_matches(name, names, 1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    known_names = f"known: {join_names(map(repr, names))}" if names else "it holds nothing yet"
    return f"{option}: the store has no {what} {name!r}{hint}; {known_names}"


@cache_app.command(name="backup")
def backup_store(
    target: Annotated[Path, typer.Argument(metavar="FILE")],
    *,
    config_file: ConfigOption = None,
    as_json: JsonOption = False,
) -> None:
    """Copy all entries and the ledger to FILE, while proxies run."""
    if target.exists():
        raise WorkFailed(f"{target} exists; it is not overwritten")
    if not target.parent.is_dir():
        raise WorkFailed(f"{target}: there is no such folder")
    if not os.access(target.parent, os.W_OK):
        raise WorkFailed(f"{target}: its folder takes no files; name another one")
    settings = loader.load(config_file, purpose="inspect")
    try:
        with open_store_for_reading(settings) as file:
            ((total,),) = file.sql("SELECT value FROM Settings WHERE key = 'count'")
            with progress("copying", total) as tell:
                backup.copy(file, target, lambda done, _total: tell(done))
    except connection.StoreError as error:
        # SQLite does not say which of the two files it means.
        raise WorkFailed(f"{target}: not written: {error}") from error
    file_bytes = target.stat().st_size
    if as_json:
        print_json({"file": path_text(target), "bytes": file_bytes})
    else:
        typer.echo(
            f"{target}: {size(file_bytes)}; to restore it, stop all proxies, remove cache.db-wal"
            " and cache.db-shm, and put it in the place of cache.db"
        )


@cache_app.command(name="export")
def export(  # noqa: PLR0913 - one parameter an option
    target: Annotated[str, typer.Argument(metavar="FILE", help="- for standard output.")],
    *,
    config_file: ConfigOption = None,
    namespace: NamespaceOption = None,
    space: SpaceOption = None,
    force: Annotated[bool, typer.Option("--force", help="Overwrite FILE if it exists.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Write entries to one file, for another machine; `cat` joins such files."""
    settings = loader.load(config_file, purpose="inspect")
    if target != STREAM:
        _check_target(Path(target), force=force)
    choice = PurgeFilter(namespace=namespace, space=space)
    report = archive.ExportReport()
    with open_store_for_reading(settings) as database:
        check_known(settings, database, namespace, space)
        total, _ = count_entries(database, choice)
        with _open_target(target, force=force) as file, progress("exporting", total) as tell:
            rows = _count_rows(archive.export_rows(database, choice, report), tell)
            frame_count = archive.write(file, rows)
    damaged = count(report.damaged, "damaged one")
    left_out = f", {damaged} left out" if report.damaged else ""
    if as_json and target != STREAM:
        print_json({"file": path_text(target), "entries": frame_count, "damaged": report.damaged})
    else:
        typer.echo(
            f"{target}: {count(frame_count, 'entry', 'entries')}{left_out}", err=target == STREAM
        )


def _check_target(path: Path, *, force: bool) -> None:
    """Raise WorkFailed if the target cannot or must not be written, before anything is read."""
    if not path.name or path.is_dir():
        raise WorkFailed(f"{path_text(path)}: is a directory; name a file")
    if not path.parent.is_dir():
        raise WorkFailed(f"{path_text(path)}: there is no such folder")
    if path.exists() and not path.is_file():
        # A file would replace a device or a pipe for everybody.
        raise WorkFailed(f"{path_text(path)}: is no regular file; - is standard output")
    if not force and os.path.lexists(path):
        raise WorkFailed(f"{path_text(path)} exists; it is not overwritten without --force")


@contextmanager
def _open_target(target: str, *, force: bool) -> Iterator[BinaryIO]:
    """Give a file that gets its name only when it is whole. Raises WorkFailed."""
    if target == STREAM:
        yield sys.stdout.buffer
        sys.stdout.buffer.flush()
        return
    try:
        with atomic_file.opened(Path(target), exclusive=not force) as file:
            yield file
    except FileExistsError as error:
        raise WorkFailed(
            f"{target} exists by now; it is not overwritten without --force"
        ) from error
    except OSError as error:
        raise WorkFailed(f"{target}: {error.strerror or error}") from error


def _count_rows(rows: Iterator[Row], tell: Any) -> Iterator[Row]:  # noqa: ANN401 - a function
    for number, row in enumerate(rows, start=1):
        tell(number)
        yield row


@cache_app.command(name="stats")
def show_stats(
    *,
    config_file: ConfigOption = None,
    by: Annotated[
        list[ledger.By] | None,
        typer.Option(help="Show the usage, summed by this. Can be given several times."),
    ] = None,
    of_all_nodes: Annotated[
        bool, typer.Option("--all-nodes", help="With --by: the sums of all nodes together.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Show entries by namespace and space, the hit rate, and the saved cost."""
    settings = loader.load(config_file, purpose="inspect")
    columns = list(dict.fromkeys(by or ()))
    if of_all_nodes:
        _show_bill_of_nodes(settings, columns, as_json=as_json)
        return
    with open_store_for_reading(settings) as file:
        if columns:
            bill = [status.line(columns, *line) for line in ledger_reader.read(file.sql, columns)]
        else:
            store_stats = stats.gather(file)
    if columns:
        if as_json:
            print_json(bill)
        else:
            _print_bill(columns, bill)
        return
    values = _as_dict(settings, store_stats)
    nodes = _read_nodes(settings)
    if settings.cache.shared is not None:
        values["nodes"] = None if nodes is None else [status.node_fields(node) for node in nodes]
        values["all_nodes"] = None if nodes is None else status.all_fields(nodes)
    if as_json:
        print_json(values)
        return
    _print_stats(store_stats, values)
    if nodes:
        _print_nodes(values)


def _read_nodes(settings: Settings) -> "Sequence[NodeState] | None":
    """Return the nodes that share a Redis; None where there is but one, or it does not answer."""
    if settings.cache.shared is None:
        return None
    from .nodes import read_nodes  # noqa: PLC0415 - needs the extra `redis`

    nodes = read_nodes(settings)
    if nodes is None:
        typer.echo("the shared Redis does not answer: the sums are those of this node", err=True)
    return nodes


def _show_bill_of_nodes(settings: Settings, columns: Sequence[ledger.By], *, as_json: bool) -> None:
    if settings.cache.shared is None:
        raise WrongUsage("--all-nodes: there is one node; see `cache.shared`")
    nodes = _read_nodes(settings)
    if nodes is None:
        raise WorkFailed("the sums of other nodes are not known now")
    lines = ledger.add_up(nodes, columns) if columns else None
    if lines is None:
        raise WrongUsage(
            "--all-nodes: needs --by: day alone, or model, provider, client, namespace and space"
        )
    bill = [status.line(columns, *line) for line in lines]
    if as_json:
        print_json(bill)
    else:
        _print_bill(columns, bill)


def _print_nodes(shown: dict[str, Any]) -> None:
    from rich.table import Table  # noqa: PLC0415

    table = Table(box=None, pad_edge=False)
    for title in ("node", "state"):
        table.add_column(title, no_wrap=True)
    for title in ("inputs", "hit rate", "saved", "spent"):
        table.add_column(title, justify="right", no_wrap=True)
    now = time.time()
    for node in shown["nodes"]:
        last_sign = (
            "stopped" if node["is_stopped"] else f"last heard of {age(now - node['seen'])} ago"
        )
        _add_node(table, node["name"], "alive" if node["is_alive"] else last_sign, node)
    _add_node(table, "all nodes", "", shown["all_nodes"])
    console(MAX_TABLE_WIDTH).print(table)


def _add_node(table: Any, name: str, state: str, sums: dict[str, Any]) -> None:  # noqa: ANN401
    inputs = sums["hits"] + sums["joins"] + sums["misses"] + sums["duplicates"]
    cells = (f"{inputs:,}", share(inputs - sums["misses"], inputs))
    table.add_row(name, state, *cells, money(sums["usd_saved"]), money(sums["usd_billed"]))


def _as_dict(settings: Settings, store_stats: stats.Stats) -> dict[str, Any]:
    partitions = []
    for partition in store_stats.held:
        namespace, space, dimensions = partition.partition
        partitions.append(
            {
                "namespace": namespace,
                "space": space,
                "dimensions": dimensions,
                "entries": partition.entries,
                "bytes": partition.bytes,
                "oldest": partition.oldest,
                "newest": partition.newest,
                "last_used": partition.last_used,
                **status.usage_fields(partition.usage),
            }
        )
    return {
        "directory": path_text(settings.cache.directory.absolute()),
        "file_bytes": store_stats.file_bytes,
        "data_bytes": store_stats.data_bytes,
        "wal_bytes": store_stats.log_bytes,
        "size_limit_bytes": int(settings.cache.size_limit_gib * GIB),
        "entries": store_stats.entries,
        "counted_since": None if store_stats.since_day is None else store_stats.since_day * 86_400,
        **status.usage_fields(store_stats.usage),
        "partitions": partitions,
    }


def _print_stats(store_stats: stats.Stats, values: dict[str, Any]) -> None:
    from rich.table import Table  # noqa: PLC0415 - takes 50 ms, which `serve` is spared

    now = time.time()
    table = Table(box=None, pad_edge=False)
    for title in ("namespace", "space"):
        table.add_column(title, no_wrap=True)
    for title in (
        "width",
        "entries",
        "size",
        "oldest",
        "used",
        "hit rate",
        "tokens saved",
        "saved",
        "share",
    ):
        table.add_column(title, justify="right", no_wrap=True)
    for partition in values["partitions"]:
        spans_shown = (
            "" if partition[name] is None else age(now - partition[name])
            for name in ("oldest", "last_used")
        )
        inputs = (
            partition["hits"] + partition["joins"] + partition["misses"] + partition["duplicates"]
        )
        table.add_row(
            partition["namespace"] or "-",
            partition["space"],
            str(partition["dimensions"] or ""),
            f"{partition['entries']:,}",
            size(partition["bytes"]),
            *spans_shown,
            share(inputs - partition["misses"], inputs),
            f"{partition['tokens_saved']:,}",
            money(partition["usd_saved"]),
            share(partition["usd_saved"], partition["usd_saved"] + partition["usd_billed"]),
        )
    longest = max((len(partition["space"]) for partition in values["partitions"]), default=0)
    out = console(MAX_TABLE_WIDTH + longest)
    out.print(
        f"{count(store_stats.entries, 'entry', 'entries')}: {size(store_stats.data_bytes)} of data"
        f" and {size(store_stats.log_bytes)} of write-ahead log, of at most"
        f" {size(values['size_limit_bytes'])}",
        soft_wrap=True,
    )
    if values["partitions"]:
        out.print(table)
    usage = store_stats.usage
    if usage.inputs:
        out.print(
            f"{count(usage.inputs, 'input was', 'inputs were')} asked for,"
            f" {usage.misses:,} of them bought:"
            f" hit rate {share(usage.inputs - usage.misses, usage.inputs)},"
            f" {savings(values['usd_saved'], values['usd_billed'])},"
            f" {money(values['usd_billed'])} spent.",
            soft_wrap=True,
        )


def _print_bill(columns: Sequence[str], bill: list[dict[str, Any]]) -> None:
    from rich.table import Table  # noqa: PLC0415

    table = Table(box=None, pad_edge=False)
    for title in columns:
        table.add_column(title, no_wrap=True)
    for title in ("inputs", "bought", "tokens billed", "billed", "tokens saved", "saved", "share"):
        table.add_column(title, justify="right", no_wrap=True)
    for row in bill:
        inputs = row["hits"] + row["joins"] + row["misses"] + row["duplicates"]
        table.add_row(
            *(str(row[name] or "-") for name in columns),
            f"{inputs:,}",
            f"{row['misses']:,}",
            f"{row['tokens_billed']:,}",
            money(row["usd_billed"]),
            f"{row['tokens_saved']:,}",
            money(row["usd_saved"]),
            share(row["usd_saved"], row["usd_saved"] + row["usd_billed"]),
        )
    longest = max((sum(len(str(row[name])) for name in columns) for row in bill), default=0)
    console(MAX_TABLE_WIDTH + longest).print(table)
