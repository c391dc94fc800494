"""`embedding-proxy cache …`: the group of commands, what they share, and `backup`.

They look at the store, delete from it, copy it. Beside a running proxy.
"""

import difflib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from embedding_proxy.cache.disk import bounds, connection
from embedding_proxy.cache.disk.database import Database
from embedding_proxy.cache.disk.read_only import ReadableFile, ReadOnlyFile
from embedding_proxy.cache.maintenance import backup
from embedding_proxy.cache.row import OTHER_NAMESPACE
from embedding_proxy.providers.base import current_label
from embedding_proxy.proxy import config
from embedding_proxy.proxy.formatting import listed, size
from embedding_proxy.proxy.service import GIB
from embedding_proxy.proxy.settings.schema import Settings

from .common import (
    ConfigOption,
    JsonOption,
    WorkFailed,
    WrongUsage,
    path_text,
    plain,
    print_json,
    printable,
    progress,
    tell_store,
)
from .groups import cache_app as app

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


def check_known(
    settings: Settings, file: ReadableFile, namespace: str | None, space: str | None
) -> None:
    """Raise WrongUsage for a namespace or space of which the store holds nothing.

    Where namespaces or spaces share a partition, see `cache.disk.bounds`, it is not known which.
    """
    rows = file.sql("SELECT DISTINCT namespace, space FROM Partitions").fetchall()
    namespaces, spaces = sorted({row[0] for row in rows}), sorted({row[1] for row in rows})
    if OTHER_NAMESPACE in namespaces:
        return
    if namespace is not None and namespace not in ("", *namespaces):
        raise WrongUsage(_unknown("--namespace", "namespace", namespace, namespaces))
    if space is None:
        return
    label = current_label(space)
    rest = bounds.rest_of(label)
    if not any(one in (label, rest) or one.startswith(f"{label}?") for one in spaces):
        entry = settings.models.get(space)
        near = [] if entry is None else [entry.as_space().label]
        raise WrongUsage(_unknown("--space", "space", space, spaces, near))


def _unknown(
    option: str, what: str, name: str, known: list[str], near: list[str] | None = None
) -> str:
    near = [one for one in near or () if one in known] or difflib.get_close_matches(name, known, 1)
    meant = f"; did you mean {near[0]!r}?" if near else ""
    there = f"known: {listed(map(repr, known))}" if known else "it holds nothing yet"
    return f"{option}: the store has no {what} {name!r}{meant}; {there}"


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
    if not os.access(target.parent, os.W_OK):
        raise WorkFailed(f"{target}: its folder takes no files; name another one")
    settings = config.load(config_file, purpose="inspect")
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
        typer.echo(
            f"{target}: {size(written)}; to restore it, stop all proxies, remove cache.db-wal and"
            " cache.db-shm, and put it in the place of cache.db"
        )
