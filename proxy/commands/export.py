"""`embedding-proxy cache export`: entries in one file, to be carried elsewhere."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, BinaryIO

import typer

from cache import atomic_file
from cache.disk.purge import Choice, count
from cache.maintenance import archive, transfer
from cache.row import Row
from proxy import config

from .cache import NamespaceOption, SpaceOption, app, opened_for_reading
from .common import ConfigOption, JsonOption, WorkFailed, path_text, print_json, progress

STREAM = "-"


@app.command(name="export")
def export(
    target: Annotated[str, typer.Argument(metavar="FILE", help="- is standard output.")],
    *,
    config_file: ConfigOption = None,
    namespace: NamespaceOption = None,
    space: SpaceOption = None,
    as_json: JsonOption = False,
) -> None:
    """Write entries to one file, to be carried elsewhere; such files can be joined with cat."""
    settings = config.load(config_file, purpose="inspect")
    choice = Choice(namespace=namespace, space=space)
    report = transfer.Read()
    with opened_for_reading(settings) as database:
        total, _ = count(database, choice)
        with _written(target) as file, progress("exporting", total) as tell:
            rows = _told(transfer.rows(database, choice, report), tell)
            written = archive.write(file, rows)
    left_out = f", {report.damaged} damaged ones left out" if report.damaged else ""
    if as_json and target != STREAM:
        print_json({"file": path_text(target), "entries": written, "damaged": report.damaged})
    else:
        typer.echo(f"{target}: {written:,} entries{left_out}", err=target == STREAM)


@contextmanager
def _written(target: str) -> Iterator[BinaryIO]:
    """Give a file that is there under its name only once it is whole. Raises WorkFailed."""
    if target == STREAM:
        yield sys.stdout.buffer
        sys.stdout.buffer.flush()
        return
    path = Path(target)
    if not path.name or path.is_dir():
        raise WorkFailed(f"{target}: is a directory; name a file")
    try:
        with atomic_file.opened(path) as file:
            yield file
    except OSError as error:
        raise WorkFailed(f"{target}: {error.strerror or error}") from error


def _told(rows: Iterator[Row], tell: Any) -> Iterator[Row]:  # noqa: ANN401 - a function
    for number, row in enumerate(rows, start=1):
        tell(number)
        yield row
