"""What commands share: their options, what they print, and how they end."""

import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import orjson
import typer

from proxy.config import ConfigError
from proxy.log import escape
from proxy.settings.schema import Settings
from proxy.workers import WorkerFailed

if TYPE_CHECKING:
    from rich.console import Console

ConfigOption = Annotated[
    Path | None, typer.Option("--config", help="Configuration file; built-in defaults without it.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON, for scripts.")]

MAX_LINE = 20_000
"""Characters of the line with which a command fails."""
LINE_SECONDS = 5.0
"""How often long work says how far it is where there is no terminal."""


class WorkFailed(Exception):
    """The work of a command failed; the message is one line."""


@contextmanager
def one_line() -> Iterator[None]:
    """End with one line and an exit code when something foreseeable goes wrong."""
    try:
        yield
    except ConfigError as error:
        fail(str(error), 2)
    except BrokenPipeError:
        # Whoever read our output has had enough; nothing more can be said to it.
        with open(os.devnull, "w") as nowhere:  # noqa: PTH123
            os.dup2(nowhere.fileno(), sys.stdout.fileno())
        sys.exit(1)
    except WorkerFailed as error:
        if error.has_said_why:
            sys.exit(error.code)
        fail(str(error), error.code)
    except OSError as error:
        fail(str(error), 1)
    except Exception as error:
        if not isinstance(error, _foreseeable()):
            raise
        fail(str(error), 1)


def _foreseeable() -> tuple[type[Exception], ...]:
    """Return the failures whose message is all there is to say; imported once there is one."""
    from cache.disk.connection import StoreError  # noqa: PLC0415
    from cache.maintenance.archive import ArchiveError  # noqa: PLC0415
    from cache.maintenance.import_source import SourceError  # noqa: PLC0415
    from index.failures import QdrantFailure  # noqa: PLC0415
    from index.migrate import MigrationRefused  # noqa: PLC0415
    from index.migration.journal import JournalError  # noqa: PLC0415
    from index.migration.template import TemplateError  # noqa: PLC0415
    from providers.base import EmbeddingError  # noqa: PLC0415
    from proxy.server import PortUnavailable  # noqa: PLC0415

    return (
        ArchiveError,
        EmbeddingError,
        JournalError,
        MigrationRefused,
        PortUnavailable,
        QdrantFailure,
        SourceError,
        StoreError,
        TemplateError,
        WorkFailed,
    )


def fail(message: str, code: int) -> NoReturn:
    """Print one line to stderr and exit."""
    typer.echo(f"embedding-proxy: {escape(message, MAX_LINE)}", err=True)
    sys.exit(code)


def plain(option: str | None) -> str | None:
    """Return an option as it is; a callback. Raises ConfigError for what is not UTF-8."""
    if option is not None and not option.isascii():
        try:
            option.encode()
        except UnicodeEncodeError as error:
            raise ConfigError(f"{option!r}: is not UTF-8") from error
    return option


def path_text(path: Path | str) -> str:
    """Return a path as text that can be printed, whatever bytes it is made of."""
    return os.fsencode(path).decode(errors="replace")


def tell_store(settings: Settings) -> None:
    """Say on stderr which store a command works on: the folder of the cache, as absolute path.

    Not on stdout, which is for what was asked for.
    """
    directory = path_text(settings.cache.directory.absolute())
    typer.echo(printable(f"store: {directory}"), err=True)


def printable(line: str) -> str:
    """Replace what moves a terminal's cursor: names and messages are made by others."""
    return "".join(sign if sign.isprintable() else "?" for sign in line)


def console(width: int) -> "Console":
    """Return what prints; too wide for a terminal is better than a column of single letters."""
    from rich.console import Console  # noqa: PLC0415 - takes 50 ms, which `serve` is spared

    made = Console(highlight=False, markup=False, emoji=False)
    made.width = max(made.width, width)
    return made


def print_json(value: object) -> None:
    """Print a value as JSON of several lines."""
    typer.echo(orjson.dumps(value, option=orjson.OPT_INDENT_2).decode())


@contextmanager
def progress(what: str, total: float | None = None) -> Iterator[Callable[[float], None]]:
    """Show how far long work is: a bar on a terminal, plain lines elsewhere; both on stderr.

    Gives a function that is told how much is done so far, of `total`.
    """
    if not sys.stderr.isatty():
        yield _lines(what, total)
        return
    from rich.console import Console  # noqa: PLC0415 - takes 50 ms, which `serve` is spared
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn  # noqa: PLC0415

    columns = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bars:
        task = bars.add_task(what, total=total)
        yield lambda done: bars.update(task, completed=done)


def _lines(what: str, total: float | None) -> Callable[[float], None]:
    due = time.monotonic() + LINE_SECONDS

    def tell(done: float) -> None:
        nonlocal due
        if time.monotonic() >= due:
            due = time.monotonic() + LINE_SECONDS
            far = f"{done:,.0f}" if not total else f"{min(done / total, 1):.0%}"
            typer.echo(f"{what}: {far}", err=True)

    return tell


def size(count: float) -> str:
    """Return a number of bytes for people.

    >>> size(999), size(6_184_000)
    ('999 B', '6.2 MB')
    """
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} B" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def age(seconds: float) -> str:
    """Return a span of time for people.

    >>> age(30), age(3 * 3600), age(40 * 86_400)
    ('30 s', '3 h', '40 d')
    """
    for unit, length in (("d", 86_400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {unit}"
    return f"{max(0, seconds):.0f} s"
