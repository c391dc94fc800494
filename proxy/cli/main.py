"""The command `embedding-proxy`.

Exit codes: 0 done, 1 the work failed or something is wrong, 2 wrong usage or configuration, 130
interrupted. What a command needs is imported when it is called: `--help` and `--version` need
nothing of it.
"""

import io
import os
import signal
import sys
from contextlib import ExitStack
from typing import TYPE_CHECKING, Annotated

import typer

from .groups import OTHERS, cache_app, config_app, group, index_app, keys_app, migrate_app
from .imports import EXIT_CODE, importing
from .output import (
    ConfigOption,
    SetOption,
    discard_unwritten,
    fail,
    handle_failures,
    parse_settings,
)

if TYPE_CHECKING:
    import socket

    from embedding_proxy.proxy.config.schema import Settings
    from embedding_proxy.proxy.http import control

app = group(
    "A caching proxy for OpenAI's embeddings API: no text is bought twice.",
    OTHERS,
    # A flag without a value is converted by typer, which imports pydantic for it.
    context_settings={
        "default_map": {"help": False},
        "help_option_names": ["--help", "-h"],
    },
    pretty_exceptions_enable=False,
)
app.add_typer(cache_app, name="cache")
app.add_typer(index_app, name="index")
app.add_typer(migrate_app, name="migrate")
app.add_typer(config_app, name="config")
app.add_typer(keys_app, name="keys")


def _show_version(value: bool) -> None:  # noqa: FBT001 - typer's signature
    if value:
        from importlib import metadata  # noqa: PLC0415 - as all that is imported late

        typer.echo(f"embedding-proxy {metadata.version('embedding-proxy')}")
        raise typer.Exit


@app.callback()
def _root(
    *,
    version: Annotated[  # noqa: ARG001 - its callback does it
        bool,
        typer.Option(
            "--version",
            "-V",
            callback=_show_version,
            is_eager=True,
            help="Print the version and exit.",
        ),
    ] = False,
) -> None:
    import logging  # noqa: PLC0415

    from embedding_proxy.proxy import log  # noqa: PLC0415

    logging.basicConfig(level=logging.ERROR, handlers=[log.handler()])
    # What a command waits for.
    logging.getLogger("embedding_proxy.qdrant").setLevel(logging.WARNING)


@app.command()
def serve(  # noqa: PLR0913, PLR0915, PLR0917 - its options
    config_file: ConfigOption = None,
    host: Annotated[str | None, typer.Option(help="Replaces server.host.")] = None,
    port: Annotated[int | None, typer.Option(help="Replaces server.port.")] = None,
    workers: Annotated[int | None, typer.Option(help="Replaces server.workers.")] = None,
    take_over: Annotated[  # noqa: FBT002 - typer's signature
        bool,
        typer.Option("--take-over", help="Take the port over from the proxy that runs; it stops."),
    ] = False,
    replaced: SetOption = None,
    verbose: Annotated[  # noqa: FBT002
        bool, typer.Option("--verbose", "-v", help="Log more, instead of log.level.")
    ] = False,
    quiet: Annotated[  # noqa: FBT002
        bool, typer.Option("--quiet", "-q", help="Log warnings and errors alone.")
    ] = False,
) -> None:
    """Run the proxy until SIGTERM or Ctrl-C."""
    with importing():
        import logging  # noqa: PLC0415

        from embedding_proxy.proxy import log  # noqa: PLC0415
        from embedding_proxy.proxy.config import loader  # noqa: PLC0415
        from embedding_proxy.proxy.config.fields import MODES  # noqa: PLC0415
        from embedding_proxy.proxy.http import control, process  # noqa: PLC0415
        from embedding_proxy.proxy.http.workers import Supervisor  # noqa: PLC0415

        from . import startup_log  # noqa: PLC0415

    logging.getLogger().setLevel(logging.INFO)
    # The client of Qdrant would have each of its calls in the log.
    logging.getLogger("httpx").setLevel(logging.WARNING)
    given = {"host": host, "port": port, "workers": workers}
    overrides = parse_settings(replaced)
    overrides.update(
        {("server", name): value for name, value in given.items() if value is not None}
    )

    def load() -> "Settings":
        configuration = loader.read_configuration(config_file, overrides=overrides, purpose="serve")
        startup_log.check_environment(configuration)
        settings = configuration.settings
        if verbose or quiet:
            level = "debug" if verbose else "warning"
            log_section = settings.log.model_copy(update={"level": level})
            settings = settings.model_copy(update={"log": log_section})
        return settings

    startup_log.check_open_files()
    settings = load()
    log.configure(settings.log.level, settings.log.format)
    if settings.cache.mode != "normal":
        logging.getLogger("embedding_proxy").warning(
            "cache.mode is %s: %s", settings.cache.mode, MODES[settings.cache.mode]
        )
    directory = settings.cache.directory
    with ExitStack() as stack:
        if take_over:
            sockets = process.take_over(settings)
        else:
            sockets = [process.listen(settings), *process.listen_metrics(settings)]
        listening, *others = map(stack.enter_context, sockets)
        metrics_socket = others[0] if others else None
        path = control.socket_path(directory, listening.getsockname()[1])

        def announce() -> "control.Listener | None":
            url = process.base_url(listening, is_encrypted=settings.server.tls is not None)
            startup_log.report(settings, url, config_file)
            if take_over:
                control.ask(path, control.STOP)
            listener = control.listen(path)
            typer.echo(f"export OPENAI_BASE_URL={url}")
            return listener

        def work(
            settings: "Settings", ready: "process.Announce", channel: "socket.socket | None" = None
        ) -> signal.Signals:
            with handle_failures():
                served = process.serve(
                    settings,
                    listening,
                    ready,
                    load,
                    channel=channel,
                    metrics_socket=metrics_socket,
                )
                return process.run_event_loop(served)

        if settings.server.workers == 1:
            told = work(settings, announce)
        else:
            told = Supervisor(settings, listening, work, load, *others).run(announce)
    if told is signal.SIGINT:
        raise typer.Exit(EXIT_CODE)


@app.command(short_help="Embed text with the local model, twice, and show the cache hits.")
def demo() -> None:
    """Embed text with the local model, twice, and show the cache hits."""
    try:
        with importing():
            from .demo import DemoFailed, run  # noqa: PLC0415 - needs the demo extra
    except ImportError as error:
        fail(str(error).strip().rpartition("\n")[2], 1)
    try:
        run()
    except DemoFailed as error:
        fail(f"demo: {error}", 1)


def main() -> None:
    """Run the command line; every foreseeable failure is one line and an exit code."""
    for name in ("stdin", "stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by whoever started us
            setattr(sys, name, open(os.devnull, "r" if name == "stdin" else "w"))  # noqa: PTH123, SIM115
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # What the encoding of a terminal lacks is shown as an escape.
            stream.reconfigure(errors="backslashreplace")
    try:
        with handle_failures():
            app()
    finally:
        for stream in (sys.stdout, sys.stderr):
            discard_unwritten(stream)
