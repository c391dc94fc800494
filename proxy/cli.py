"""The command `embedding-proxy`.

Exit codes: 0 done, 1 the work failed, 2 wrong usage or configuration, 130 interrupted.
"""

import asyncio
import logging
import os
import signal
import sys
from collections.abc import Callable, Coroutine
from functools import cache
from importlib import metadata
from typing import Annotated, Any, TypeVar

import typer

from proxy.commands.common import ConfigOption, fail, one_line
from proxy.http.cache_control import MEANING
from proxy.own_address import check_own_address

from . import config, log, server
from . import workers as processes

T = TypeVar("T")

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="A caching proxy for OpenAI-compatible embeddings: no text is paid for twice.",
)


@cache
def complete() -> typer.Typer:
    """Return the app with all its commands. To import them takes a fifth of a second."""
    from .commands import (  # noqa: PLC0415 - as said
        cache,
        check,
        compare,
        config,
        export,
        migrate,
        migrate_end,
        stats,
        take_in,
        verify,
    )

    # These add themselves to the groups `cache` and `migrate`.
    _ = export, stats, take_in, verify, migrate_end
    app.add_typer(cache.app, name="cache")
    app.add_typer(config.app, name="config")
    app.add_typer(migrate.app, name="migrate")
    app.command()(check.check)
    app.command()(compare.compare)
    return app


def _show_version(value: bool) -> None:  # noqa: FBT001 - typer's signature
    if value:
        typer.echo(f"embedding-proxy {metadata.version('embedding-proxy')}")
        raise typer.Exit


@app.callback()
def _root(
    *,
    version: Annotated[  # noqa: ARG001 - its callback does it
        bool,
        typer.Option("--version", callback=_show_version, is_eager=True, help="Show it and exit."),
    ] = False,
) -> None:
    logging.basicConfig(level=logging.ERROR, handlers=[log.handler()])


@app.command()
def serve(
    config_file: ConfigOption = None,
    host: Annotated[str | None, typer.Option(help="Instead of server.host.")] = None,
    port: Annotated[int | None, typer.Option(help="Instead of server.port.")] = None,
    workers: Annotated[int | None, typer.Option(help="Instead of server.workers.")] = None,
) -> None:
    """Run the proxy until it is told to stop."""
    logging.getLogger().setLevel(logging.INFO)
    # The client of Qdrant would have each of its calls in the log.
    logging.getLogger("httpx").setLevel(logging.WARNING)
    given = {"host": host, "port": port, "workers": workers}
    overrides = {name: value for name, value in given.items() if value is not None}
    settings = config.load(config_file, overrides=overrides)
    if settings.cache.mode != "normal":
        logging.getLogger("embedding_proxy").warning(
            "cache.mode is %s: %s", settings.cache.mode, MEANING[settings.cache.mode]
        )
    check_own_address(settings, config_file)
    with server.listen(settings) as listening:

        def announce() -> None:
            typer.echo(f"export OPENAI_BASE_URL={server.base_url(listening)}")

        def work(ready: Callable[[], None]) -> signal.Signals:
            with one_line():
                serving = server.serve(settings, listening, ready, is_worker=count > 1)
                return _run(serving)

        count = settings.server.workers
        told = work(announce) if count == 1 else processes.run(count, work, announce)
    if told is signal.SIGINT:
        raise typer.Exit(130)


@app.command()
def demo() -> None:
    """Embed real text on the local model, twice, and show what came from the cache."""
    try:
        from .demo import DemoFailed, run  # noqa: PLC0415 - needs the demo extra
    except ImportError as error:
        fail(str(error), 1)
    try:
        run()
    except DemoFailed as error:
        fail(f"demo: {error}", 1)


def _run(main: Coroutine[Any, Any, T]) -> T:
    with asyncio.Runner(loop_factory=_loop_factory()) as runner:
        return runner.run(main)


def _loop_factory() -> Callable[[], asyncio.AbstractEventLoop] | None:
    try:
        from uvloop import new_event_loop  # noqa: PLC0415 - not there on Windows
    except ImportError:
        return None
    return new_event_loop


def main() -> None:
    """Run the command line; every foreseeable failure is one line and an exit code."""
    for name in ("stdin", "stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by whoever started us
            setattr(sys, name, open(os.devnull, "r" if name == "stdin" else "w"))  # noqa: PTH123, SIM115
    with one_line():
        # Whoever serves is waited for.
        (app if sys.argv[1:2] == ["serve"] else complete())()
