"""The groups of commands, whose modules are imported when one of their commands is called.

All the commands together take half a second to import. So a group knows the names of its commands
and the first sentence of what each does, for `--help`, and where the rest is.
"""

import importlib
import logging
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, ClassVar, NamedTuple

import typer
from typer.core import TyperCommand, TyperGroup

from .imports import importing


class Place(NamedTuple):
    """Where a command is, and what it does."""

    module: str
    """In this package. It adds the command to the group, or has a function for it."""
    help: str
    """The first sentence of its docstring: a test sees that they agree."""
    attribute: str = ""
    """The name of that function; empty where the module adds the command by itself."""
    context: Mapping[str, Any] = MappingProxyType({})
    """Settings of the command's context: how its arguments are read."""


class LazyGroup(TyperGroup):
    """A group of commands that are imported when they are called."""

    app: ClassVar[typer.Typer]
    places: ClassVar[Mapping[str, Place]]

    def list_commands(self, ctx: Any) -> list[str]:  # noqa: ANN401, ARG002 - typer's own class
        """Return the names of all commands, those that are always there first."""
        own = [name for name in self.commands if name not in self.places]
        return [*own, *self.places]

    def get_command(self, ctx: Any, cmd_name: str) -> Any:  # noqa: ANN401 - as above
        """Return a command; one that is not imported yet is there with its name and help only."""
        place = self.places.get(cmd_name)
        if place is not None and cmd_name not in self.commands:
            return TyperCommand(cmd_name, help=place.help, short_help=place.help)
        return super().get_command(ctx, cmd_name)

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:  # noqa: ANN401 - as above
        """Return the command that is called, imported."""
        if args:
            self.load(args[0])
        return super().resolve_command(ctx, args)

    def load(self, name: str) -> None:
        """Import a command, if it is one of those that are imported late."""
        place = self.places.get(name)
        if place is None or name in self.commands:
            return
        with importing():
            module = importlib.import_module(f".{place.module}", __package__)
        app = self.app
        if place.attribute:
            app = plain_app()
            function = getattr(module, place.attribute)
            app.command(name=name, context_settings=dict(place.context))(function)
        command: Any = typer.main.get_command(app)
        if app is self.app and isinstance(command, TyperGroup):
            # A Typer of one command, and no callback, is that command.
            command = command.commands[name]
        command.name = name
        self.commands[name] = command


def plain_app(**options: Any) -> typer.Typer:  # noqa: ANN401 - as above
    """Return a Typer whose help and errors are plain text: rich takes 0.1 s to import."""
    return typer.Typer(add_completion=False, rich_markup_mode=None, **options)


def group(help_: str, places: Mapping[str, Place], **options: Any) -> typer.Typer:  # noqa: ANN401
    """Return a group of commands; `options` are those of Typer."""
    own = type("_Group", (LazyGroup,), {"places": places})
    made = plain_app(cls=own, no_args_is_help=True, help=help_, short_help=help_, **options)
    own.app = made  # type: ignore[attr-defined]
    return made


cache_app = group(
    "Inspect, verify, copy, import and purge the cache.",
    {
        "stats": Place(
            "cache",
            "Show entries by namespace and space, the hit rate, and the saved cost.",
        ),
        "verify": Place("cache_verify", "Read every record and report damage."),
        "purge": Place(
            "cache_purge",
            "Delete the entries that match all given options, also from running proxies.",
        ),
        "backup": Place(
            "cache",
            "Copy all entries and the ledger to FILE, while proxies run.",
        ),
        "export": Place(
            "cache",
            "Write entries to one file, for another machine; `cat` joins such files.",
        ),
        "import": Place(
            "cache_import",
            "Add the entries of an export, or embeddings that you already own.",
        ),
    },
)

migrate_app = group(
    "Move Qdrant collections to the vectors of another model or provider, and back.",
    {
        "plan": Place(
            "migrate",
            "Show what a migration does, costs and needs; nothing is bought or changed.",
        ),
        "run": Place(
            "migrate",
            "Fill new collections beside the old ones, or continue after an interruption.",
        ),
        "status": Place("migrate_cutover", "Show the progress of migrations and the next step."),
        "cutover": Place(
            "migrate_cutover",
            "Verify the new collections and switch the aliases of the old ones to them.",
        ),
        "rollback": Place(
            "migrate_cutover",
            "Switch the aliases back to the old collections; the new ones stay.",
        ),
        "finalize": Place("migrate_cutover", "Delete the old collections; asks twice."),
    },
)


@migrate_app.callback()
def _say_what_is_waited_for() -> None:
    logging.getLogger("embedding_proxy.migrate").setLevel(logging.WARNING)


index_app = group(
    "Look at what waits for Qdrant, try again what it refused, send again what it has lost.",
    {
        "status": Place(
            "index", "Say what waits for Qdrant, and what was put aside, with the reasons."
        ),
        "retry": Place("index", "Try again at once what was put aside."),
        "resync": Place(
            "index",
            "Send again what was indexed and is not in Qdrant any more, from the cache.",
        ),
    },
)

config_app = group(
    "Begin a configuration, show what applies, print its schema; convert an older one.",
    {
        "init": Place(
            "config",
            "Write a short configuration to begin with; commands in that folder use it.",
            "init",
        ),
        "show": Place(
            "config",
            "Show every key with its value, and which key variables are set.",
            "show_config",
        ),
        "schema": Place(
            "config",
            "Print a JSON schema of the configuration, with which editors complete and check it.",
            "print_schema",
        ),
        "convert": Place(
            "config",
            "Convert an older configuration (llm.embedding, vector_store).",
            "convert_old",
        ),
    },
)

keys_app = group(
    "Make, list, replace and revoke the keys that clients send.",
    {
        "add": Place(
            "keys", "Make a key for a client, and print it: it is not shown a second time."
        ),
        "list": Place("keys", "Show the keys of the file, and what of their budgets is spent."),
        "revoke": Place("keys", "Let the keys of a name in no longer."),
        "rotate": Place(
            "keys", "Make a new key for a name, and print it; the old one is valid for a while."
        ),
    },
)

OTHERS = {
    "run": Place(
        "run",
        "Run a command with OPENAI_BASE_URL set to a proxy of its own, and tell what was saved.",
        "run",
        {"allow_interspersed_args": False},
    ),
    "warm": Place(
        "warm",
        "Embed the texts of files ahead of time, after showing what that costs.",
        "warm",
    ),
    "check": Place(
        "check",
        "Test the cache, Qdrant and every provider with a real embedding; compare the routes.",
        "check",
    ),
    "compare": Place(
        "compare",
        "Compare models and providers: latency, errors, cost, storage and agreement.",
        "compare",
    ),
    "reload": Place(
        "reload",
        "Let the running proxy read its configuration anew, without dropping a request.",
        "reload",
    ),
}
"""Those that stand beside the groups."""
