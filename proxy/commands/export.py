"""`embedding-proxy cache export`: entries in one file, to be carried elsewhere."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, BinaryIO

import typer
from embedding_proxy.cache import atomic_file
from embedding_proxy.cache.disk.purge import Choice, count_entries
from embedding_proxy.cache.maintenance import archive, transfer
from embedding_proxy.cache.row import Row
from embedding_proxy.proxy import config
from embedding_proxy.proxy.formatting import count as entries

from .cache import NamespaceOption, SpaceOption, check_known, opened_for_reading
from .common import ConfigOption, JsonOption, WorkFailed, path_text, print_json, progress
from .groups import cache_app as app

STREAM = "-"


@app.command(name="export")
def export(  # noqa: PLR0913 - one parameter an option
    target: Annotated[str, typer.Argument(metavar="FILE", help="- is standard output.")],
    *,
    config_file: ConfigOption = None,
    namespace: NamespaceOption = None,
    space: SpaceOption = None,
    force: Annotated[
        bool, typer.Option("--force", help="Replace FILE if there is one already.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Write entries to one file, to be carried elsewhere; such files can be joined with cat."""
    settings = config.load(config_file, purpose="inspect")
    if target != STREAM:
        _check(Path(target), force=force)
    choice = Choice(namespace=namespace, space=space)
    report = transfer.Read()
    with opened_for_reading(settings) as database:
        check_known(settings, database, namespace, space)
        total, _ = count_entries(database, choice)
        with _written(target, force=force) as file, progress("exporting", total) as tell:
            rows = _told(transfer.rows(database, choice, report), tell)
            written = archive.write(file, rows)
    damaged = entries(report.damaged, "damaged one")
    left_out = f", {damaged} left out" if report.damaged else ""
    if as_json and target != STREAM:
        print_json({"file": path_text(target), "entries": written, "damaged": report.damaged})
    else:
        typer.echo(
            f"{target}: {entries(written, 'entry', 'entries')}{left_out}", err=target == STREAM
        )


def _check(path: Path, *, force: bool) -> None:
    """Raise WorkFailed for what cannot be written, or must not be, before anything is read."""
    if not path.name or path.is_dir():
        raise WorkFailed(f"{path_text(path)}: is a directory; name a file")
    if not path.parent.is_dir():
        raise WorkFailed(f"{path_text(path)}: there is no such folder")
    if path.exists() and not path.is_file():
        # A device or a pipe would be replaced by a file, for everybody.
        raise WorkFailed(f"{path_text(path)}: is no regular file; - is standard output")
    if not force and os.path.lexists(path):
        raise WorkFailed(f"{path_text(path)} exists; it is not overwritten without --force")


@contextmanager
def _written(target: str, *, force: bool) -> Iterator[BinaryIO]:
    """Give a file that is there under its name only once it is whole. Raises WorkFailed."""
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


def _told(rows: Iterator[Row], tell: Any) -> Iterator[Row]:  # noqa: ANN401 - a function
    for number, row in enumerate(rows, start=1):
        tell(number)
        yield row
