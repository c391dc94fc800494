"""`embedding-proxy run -- COMMAND`: run a command with a proxy of its own for its embeddings.

The proxy listens on a free port of the loopback address for as long as the command runs. The
command finds it in the variables that OpenAI's libraries read. Its standard streams, its signals
and its exit code are those of `run`; what the cache has saved is told on stderr when it has ended.
"""

import asyncio
import os
import signal
import sys
from collections.abc import Mapping, Sequence
from contextlib import closing
from functools import reduce
from typing import Annotated, Self

import typer
from embedding_proxy.cache.ledger import Usage
from embedding_proxy.providers.charge import NANO
from embedding_proxy.proxy import log
from embedding_proxy.proxy.config.errors import KeyPath
from embedding_proxy.proxy.config.loader import read_configuration
from embedding_proxy.proxy.config.schema import Settings
from embedding_proxy.proxy.http import process
from embedding_proxy.proxy.http.request_metrics import EMBEDDINGS

from . import startup
from .formatting import count, money, savings, share
from .output import ConfigOption, SetOption, fail, parse_settings, printable, say

OWN_SERVER: Mapping[KeyPath, object] = {
    ("server", "host"): "127.0.0.1",
    ("server", "port"): 0,
    ("server", "workers"): 1,
    ("server", "tls"): None,
    ("server", "metrics_listen"): None,
}
"""Replacements in the section `server`: the proxy serves only the command."""
URL_VARIABLES = ("OPENAI_BASE_URL", "OPENAI_API_BASE")
"""The variables that clients read the address from: OpenAI's libraries, and older ones."""
KEY_VARIABLE = "OPENAI_API_KEY"
PLACEHOLDER_KEY = "embedding-proxy"
"""The placeholder for a key that is not set: OpenAI's libraries do not start without one."""
NOT_EXECUTABLE, NOT_FOUND = 126, 127
"""The exit codes of shells for a command that cannot be run."""
FORWARDED_SIGNALS = (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
TERMINAL_SIGNALS = (signal.SIGINT, signal.SIGQUIT)
"""A terminal also sends these to the command, which is in the same process group."""


class CommandUnusable(Exception):
    """The command cannot be started; the message says why, and `code` is a shell's exit code."""

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.code = code


def run(
    command: Annotated[
        list[str], typer.Argument(help="The command and its arguments, best after `--`.")
    ],
    config_file: ConfigOption = None,
    frozen: Annotated[  # noqa: FBT002 - typer's signature
        bool,
        typer.Option(
            "--frozen", help="Buy nothing: what is not cached is an error. Needs no provider key."
        ),
    ] = False,
    replaced: SetOption = None,
) -> None:
    """Run a command with OPENAI_BASE_URL set to a proxy of its own, and tell what was saved."""
    startup.check_open_files()
    overrides = parse_settings(replaced)
    overrides.update(OWN_SERVER)
    if frozen:
        overrides["cache", "mode"] = "frozen"
    configuration = read_configuration(config_file, overrides=overrides, purpose="serve")
    startup.check_environment(configuration)
    settings = configuration.settings
    log.configure("warning", settings.log.format)
    if KEY_VARIABLE not in os.environ and (lack := _lacking_key(settings)):
        say(f"run: {lack}; set {KEY_VARIABLE} to it")
    with closing(process.listen(settings)) as listening:
        environment = command_environment(process.base_url(listening), settings, os.environ)
        instance = process.Instance(settings, listening, lambda: settings)
        try:
            code = process.run_event_loop(_run_beside(instance, command, environment))
        except CommandUnusable as error:
            fail(f"run: {error}", error.code)
    # Purchases that were in progress when the command ended are counted now.
    usage = reduce(Usage.plus, instance.service.counted.values(), Usage())
    failures = {
        status: number
        for (route, status), number in instance.requests.by_status.items()
        if route == EMBEDDINGS and status >= 400
    }
    say(summary(usage, failures, is_frozen=frozen))
    sys.exit(code)


def command_environment(
    url: str, settings: Settings, environment: Mapping[str, str]
) -> dict[str, str]:
    """Return the environment of the command: `environment` with the address of the proxy.

    A key that is set stays, because the proxy may forward it. Without one, it is the first key of
    `server.keys`, which the proxy accepts, or a placeholder.
    """
    keys = settings.server.keys
    key = keys[0].key if keys else PLACEHOLDER_KEY
    urls = dict.fromkeys(URL_VARIABLES, url)
    return {**environment, KEY_VARIABLE: environment.get(KEY_VARIABLE) or key, **urls}


async def _run_beside(
    instance: process.Instance, command: Sequence[str], environment: Mapping[str, str]
) -> int:
    """Run a command while the proxy serves, and return its exit code as a shell does.

    Raises CommandUnusable, StoreError.
    """
    async with instance:
        with _SignalForwarder() as signals:
            try:
                child = await asyncio.create_subprocess_exec(*command, env=environment)
            except OSError as error:
                code = NOT_FOUND if isinstance(error, FileNotFoundError) else NOT_EXECUTABLE
                reason = error.strerror or str(error)
                raise CommandUnusable(f"{printable(command[0])}: {reason}", code) from error
            signals.send_to(child)
            code = await child.wait()
    return 128 - code if code < 0 else code


class _SignalForwarder:
    """Forwards the signals of this process to the command, which decides what they mean."""

    def __init__(self) -> None:
        self._child: asyncio.subprocess.Process | None = None
        self._early: list[signal.Signals] = []
        """The signals that came before the command was started."""
        is_foreground = _is_in_foreground()
        self._numbers = {
            number: not (is_foreground and number in TERMINAL_SIGNALS)
            for number in (*FORWARDED_SIGNALS, *TERMINAL_SIGNALS)
        }
        """Whether signals are forwarded. The command has already got those of a terminal."""

    def __enter__(self) -> Self:
        loop = asyncio.get_running_loop()
        for number, is_sent in self._numbers.items():
            loop.add_signal_handler(number, self._forward if is_sent else _ignore, number)
        return self

    def __exit__(self, *_: object) -> None:
        loop = asyncio.get_running_loop()
        for number in self._numbers:
            loop.remove_signal_handler(number)

    def send_to(self, child: asyncio.subprocess.Process) -> None:
        """Send all signals to the command, from the first one on."""
        self._child = child
        for number in self._early:
            self._forward(number)

    def _forward(self, number: signal.Signals) -> None:
        if self._child is None:
            self._early.append(number)
        elif self._child.returncode is None:
            self._child.send_signal(number)


def _ignore(_: signal.Signals) -> None:
    """Ignore a signal that the terminal has also sent to the command."""


def _is_in_foreground() -> bool:
    """Tell whether a terminal sends its signals to this process and its children."""
    try:
        return os.tcgetpgrp(0) == os.getpgrp()
    except OSError:
        return False


def _lacking_key(settings: Settings) -> str:
    """Return which key the command needs and is not given here; empty if it needs none."""
    if settings.keys_path.exists() and not settings.server.keys:
        return "the proxy wants a key of `embedding-proxy keys add`"
    if any(entry is not None and entry.uses_client_key for entry in settings.providers.values()):
        return "a provider is asked with the key of the command (`auth: client`)"
    return ""


def summary(usage: Usage, failures: Mapping[int, int], *, is_frozen: bool = False) -> str:
    """Return one line about the savings of the cache while a command ran.

    `failures` are the numbers of requests that failed, by status.

    >>> usage = Usage(hits=3, misses=1, nanodollars_saved=3000, nanodollars_billed=1000)
    >>> summary(usage, {})
    '4 inputs: 3 from the cache (75.0%), 1 bought for $0.000001; $0.000003 saved (75.0%)'
    >>> summary(Usage(hits=1), {404: 2}, is_frozen=True)
    '1 input: 1 from the cache (100.0%), nothing bought; $0.00 saved; 2 requests failed (404: 2)'
    """
    unpaid = usage.inputs - usage.misses
    if not (usage.inputs or failures):
        return (
            "the command has embedded nothing through the proxy; it has to use OPENAI_BASE_URL,"
            " as OpenAI's libraries do"
        )
    billed, saved = usage.nanodollars_billed / NANO, usage.nanodollars_saved / NANO
    percent = f" ({share(unpaid, usage.inputs)})" if usage.inputs else ""
    bought = "nothing bought" if is_frozen else f"{usage.misses:,} bought for {money(billed)}"
    line = (
        f"{count(usage.inputs, 'input')}: {unpaid:,} from the cache{percent}, {bought};"
        f" {savings(saved, billed)}"
    )
    if not failures:
        return line
    by_status = ", ".join(f"{status}: {number:,}" for status, number in sorted(failures.items()))
    return f"{line}; {count(sum(failures.values()), 'request')} failed ({by_status})"
