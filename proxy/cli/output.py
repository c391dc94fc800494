"""What commands share: their options, what they print, and how they end."""

import os
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn, TextIO

import typer
from embedding_proxy.proxy.config.errors import ConfigError, KeyPath
from embedding_proxy.proxy.log import escape

if TYPE_CHECKING:
    from embedding_proxy.proxy.config.schema import Settings
    from rich.console import Console

CONFIG_VARIABLE = "EMBEDDING_PROXY_CONFIG"


def _configuration_file(file: Path | None) -> Path | None:
    """Return the configuration file of a command: the one that is named, or is found."""
    if file is not None:
        return file
    from embedding_proxy.proxy.config import loader  # noqa: PLC0415 - for `--help`

    return loader.find()


ConfigOption = Annotated[
    Path | None,
    typer.Option(
        "--config",
        "-c",
        envvar=CONFIG_VARIABLE,
        callback=_configuration_file,
        help="Configuration file. Default: ./embedding-proxy.yaml, then"
        " ~/.config/embedding-proxy/config.yaml, then the built-in one.",
    ),
]
SetOption = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="Replaces a key of the configuration, as in cache.mode=frozen. Can be given several"
        " times.",
    ),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON, for scripts.")]

MAX_LINE = 20_000
"""Characters of the line with which a command fails."""
MAX_TABLE_WIDTH = 120
"""Characters of a line of a table, beside the names in it."""
LINE_SECONDS = 5.0
"""How often long work says how far it is where there is no terminal."""
_KEY_PART = re.compile(r'"[^"]+"|[^".=]+')
_SETTING = re.compile(r'((?:"[^"]+"|[^".=]+)(?:\.(?:"[^"]+"|[^".=]+))*)=(.*)', re.DOTALL)
_SECONDS = {"s": 1, "min": 60, "h": 3600, "d": 86_400, "w": 7 * 86_400}


class WorkFailed(Exception):
    """The work of a command failed; the message is one line."""


class WrongUsage(Exception):
    """The command line asks for what cannot be; the message is one line.

    Unlike that of a ConfigError, it is shown as it is: it repeats what is in the store.
    """


@contextmanager
def handle_failures() -> Iterator[None]:
    """End with one line and an exit code when something foreseeable goes wrong.

    A configuration gets a line for each of its mistakes.
    """
    try:
        yield
    except BrokenPipeError:
        # Whoever read our output has had enough; nothing more can be said to it.
        sys.exit(1)
    except WrongUsage as error:
        fail(str(error), 2)
    except Exception as error:
        reason = _describe_environment(error)
        if reason is not None:
            fail(reason, 1)
        # Imported once there is a failure: what could not be imported could not fail either.
        from embedding_proxy.proxy.http.workers import WorkerFailed  # noqa: PLC0415

        if isinstance(error, ConfigError):
            *others, last = error.problems
            for problem in others:
                say(problem)
            fail(last, 2)
        if isinstance(error, WorkerFailed):
            if error.has_said_why:
                sys.exit(error.code)
            fail(str(error), error.code)
        if not isinstance(error, _foreseeable()):
            raise
        fail(str(error), 1)


def _describe_environment(error: Exception) -> str | None:
    """Return what the system, its limits or the installation lack; None for any other failure.

    Nothing is imported for it: that may be what fails.
    """
    if isinstance(error, OSError):
        reason = error.strerror or str(error)
        return reason if error.filename is None else f"{path_text(error.filename)}: {reason}"
    has_no_thread = isinstance(error, RuntimeError) and "can't start new thread" in str(error)
    if isinstance(error, MemoryError) or has_no_thread:
        return "there is not enough memory; raise the limit (ulimit -v), or end other programs"
    if isinstance(error, ImportError):
        # numpy says the cause in the last of many lines.
        *_, last = str(error).splitlines() or [""]
        return (
            f"{last.strip()}; either the installation is not complete (install it again), or the"
            " limit on memory (ulimit -v) or on open files (ulimit -n) is too low"
        )
    return None


def _foreseeable() -> tuple[type[Exception], ...]:
    """Return the failures whose message is all there is to say; imported once there is one."""
    from embedding_proxy.cache.disk.connection import StoreError  # noqa: PLC0415
    from embedding_proxy.cache.maintenance.archive import ArchiveError  # noqa: PLC0415
    from embedding_proxy.cache.maintenance.import_source import SourceError  # noqa: PLC0415
    from embedding_proxy.index.errors import QdrantFailure  # noqa: PLC0415
    from embedding_proxy.index.migration.runner import MigrationRefused  # noqa: PLC0415
    from embedding_proxy.index.migration.state import MigrationStateError  # noqa: PLC0415
    from embedding_proxy.index.migration.text_template import TemplateError  # noqa: PLC0415
    from embedding_proxy.providers.errors import EmbeddingError  # noqa: PLC0415
    from embedding_proxy.proxy.http.process import PortUnavailable  # noqa: PLC0415

    return (
        ArchiveError,
        EmbeddingError,
        MigrationStateError,
        MigrationRefused,
        PortUnavailable,
        QdrantFailure,
        SourceError,
        StoreError,
        TemplateError,
        WorkFailed,
    )


def discard_unwritten(stream: TextIO) -> None:
    """Drop what a stream cannot write: Python would try again at its end, and exit with 120."""
    try:
        stream.flush()
    except OSError:
        with open(os.devnull, "w") as nowhere:  # noqa: PTH123
            os.dup2(nowhere.fileno(), stream.fileno())


def fail(message: str, code: int) -> NoReturn:
    """Print one line to stderr and exit."""
    say(message)
    sys.exit(code)


def say(message: str) -> None:
    """Print one line to stderr, if it can be written to."""
    with suppress(OSError):
        typer.echo(f"embedding-proxy: {escape(message, MAX_LINE)}", err=True)


def check_utf8(option: str | None) -> str | None:
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


def has_terminal() -> bool:
    """Tell whether a question can be asked on stderr, and answered on stdin."""
    return sys.stdin.isatty() and sys.stderr.isatty()


def need_terminal(command: str, option: str, *, is_sure: bool) -> None:
    """Raise WrongUsage where a question would have to be asked and there is no terminal for it.

    A script must not hang, nor go on with what nobody has agreed to.
    """
    if not (is_sure or has_terminal()):
        raise WrongUsage(
            f"{command}: there is no terminal to ask on; say {option} if it is to be done"
        )


def confirm(question: str) -> None:
    """Ask on stderr, and end the command with exit code 1 for anything but yes.

    Raises KeyboardInterrupt for Ctrl-C, which typer would take for a no.
    """
    try:
        typer.confirm(question, abort=True, err=True)
    except typer.Abort as error:
        if isinstance(error.__context__, KeyboardInterrupt):
            raise KeyboardInterrupt from None
        raise


def tell_store(settings: "Settings") -> None:
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
    import orjson  # noqa: PLC0415 - for `--help`, which is spared it

    typer.echo(orjson.dumps(value, option=orjson.OPT_INDENT_2).decode())


@contextmanager
def progress(
    what: str, total: float | None = None, note: Callable[[], str] = str
) -> Iterator[Callable[[float], None]]:
    """Show how far long work is: a bar on a terminal, plain lines elsewhere; both on stderr.

    Gives a function that is told how much is done so far, of `total`. `note` gives what else is
    shown with it.
    """
    if not sys.stderr.isatty():
        yield _lines(what, total, note)
        return
    from rich.console import Console  # noqa: PLC0415 - takes 50 ms, which `serve` is spared
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn  # noqa: PLC0415

    columns = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bars:
        task = bars.add_task(what, total=total)

        def tell(done: float) -> None:
            bars.update(task, completed=done, description=f"{what} {note()}".rstrip())

        yield tell


def _lines(what: str, total: float | None, note: Callable[[], str]) -> Callable[[float], None]:
    due = time.monotonic() + LINE_SECONDS

    def tell(done: float) -> None:
        nonlocal due
        if time.monotonic() >= due:
            due = time.monotonic() + LINE_SECONDS
            far = f"{done:,.0f}" if not total else f"{min(done / total, 1):.0%}"
            typer.echo(f"{what}: {far} {note()}".rstrip(), err=True)

    return tell


def parse_settings(texts: Sequence[str] | None) -> dict[KeyPath, object]:
    """Return what `--set` replaces: values as YAML reads them, by the parts of their keys.

    A part that holds a dot is put in quotes. Raises ConfigError.

    >>> parse_settings(["server.port=0", 'models."a.b".price=0.1', "server.cors=[]"])
    {('server', 'port'): 0, ('models', 'a.b', 'price'): 0.1, ('server', 'cors'): []}
    """
    from embedding_proxy.proxy.config import yaml_file  # noqa: PLC0415 - for `--help`

    settings: dict[KeyPath, object] = {}
    for text in texts or ():
        match = _SETTING.fullmatch(text)
        if match is None:
            raise ConfigError("--set: expected a key and a value, as in cache.mode=frozen")
        parts = (part[1:-1] if part[0] == '"' else part for part in _KEY_PART.findall(match[1]))
        try:
            settings[tuple(parts)] = yaml_file.parse(match[2]).content
        except yaml_file.YamlError as error:
            raise ConfigError(f"--set {match[1]}: {error}") from error
    return settings


def parse_duration(text: str, option: str) -> float:
    """Return the length of a span such as `90d`, in seconds. Raises ConfigError.

    >>> parse_duration("1.5h", "--older-than")
    5400.0
    """
    match = re.fullmatch(r"(\d{1,12}(?:\.\d{1,12})?)\s*([a-z]+)", text.strip())
    if not match or match[2] not in _SECONDS:
        raise ConfigError(f"{option}: expected a number and one of s, min, h, d, w, as in 90d")
    return float(match[1]) * _SECONDS[match[2]]


def past_time(now: float, text: str | None, option: str) -> float | None:
    """Return the moment a span ago; None without one. Raises ConfigError."""
    return None if text is None else max(0.0, now - parse_duration(text, option))
