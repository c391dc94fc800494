"""`embedding-proxy config …`: what applies, one to begin with, its schema, and older ones."""

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer
from embedding_proxy.cache import atomic_file
from embedding_proxy.proxy.config import json_schema, loader, show
from embedding_proxy.proxy.config.legacy import ConvertedConfig, convert

from .output import (
    ConfigOption,
    JsonOption,
    SetOption,
    WorkFailed,
    parse_settings,
    path_text,
    print_json,
    printable,
)

STARTER = """\
# The configuration of embedding-proxy. It holds what differs from the defaults.
# All keys and their defaults: `embedding-proxy config show`; what they do: docs/configuration.md.
# For an editor that completes keys: `embedding-proxy config schema > schema.json`, and this line
#   # yaml-language-server: $schema=schema.json

server:
  port: 8080
  # keys: ["${PROXY_KEY}"]    # what clients must send; without keys, only this machine may call

# cache:
#   directory: embeddings     # relative to this file; without it, ~/.local/share/embedding-proxy

providers:
  openai: {}                  # its key is in OPENAI_API_KEY
  # openrouter: {}            # answers when openai does not; its key is in OPENROUTER_API_KEY
"""
"""What `config init` writes."""


def show_config(
    *,
    config_file: ConfigOption = None,
    everything: Annotated[
        bool, typer.Option("--all", help="Also the models of the catalog.")
    ] = False,
    replaced: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show every key with its value, and which key variables are set.

    The output is a configuration that `config show` can read. It holds no key: a secret of the file
    is shown as ${NAME}. To serve with the output, set that variable.
    """
    overrides = parse_settings(replaced)
    configuration = loader.read_configuration(config_file, overrides=overrides, purpose="inspect")
    settings = configuration.settings
    values = show.values(settings, configuration.content, everything=everything)
    keys = show.keys_of(settings)
    if as_json:
        key_states = {
            name: {"variable": key_variable, "set": is_set}
            for name, (key_variable, is_set) in keys.items()
        }
        file = None if config_file is None else path_text(config_file)
        print_json({"config": file, "keys": key_states, "settings": values})
        return
    typer.echo(printable(f"# What applies with {path_text(config_file or loader.BUILT_IN)}"))
    left_out = len(settings.models) - len(values["models"])
    if left_out:
        typer.echo(f"# and {left_out} more models of the catalogue, which --all shows.")
    for name, (variable, is_set) in keys.items():
        state = "is set" if is_set else "is not set: this provider is skipped"
        typer.echo(f"# {name}: {variable} {state}")
    for line in configuration.unresolved:
        typer.echo(printable(f"# {line}"))
    for name in show.computed_names(values, configuration.content):
        typer.echo(f"# {name} stands for a secret of that file; set this variable to serve with it")
    typer.echo(loader.dump(values), nl=False)


def init(
    file: Annotated[Path, typer.Argument(help="Where to write it.", show_default=True)] = Path(
        loader.FILE_NAME
    ),
) -> None:
    """Write a short configuration to begin with; commands in that folder use it."""
    _write_new(file, STARTER)
    typer.echo(printable(f"{path_text(file)} is written; test it: embedding-proxy check --offline"))


def print_schema() -> None:
    """Print a JSON schema of the configuration, with which editors complete and check it."""
    print_json(json_schema.build())


def _write_new(file: Path, text: str) -> None:
    """Write a file that is not there yet. Raises WorkFailed, OSError."""
    try:
        atomic_file.write(file, text.encode(), mode=0o666, exclusive=True)
    except FileExistsError as error:
        raise WorkFailed(f"{path_text(file)} exists; it is not overwritten") from error


def convert_old(
    old_file: Annotated[Path, typer.Argument(metavar="OLD_FILE")],
    *,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", metavar="FILE", help="Write to FILE. Default: stdout."),
    ] = None,
) -> None:
    """Convert an older configuration (llm.embedding, vector_store).

    Messages on stderr say what became of each key.
    """
    if output is not None and output.exists():
        raise WorkFailed(f"{path_text(output)} exists; it is not overwritten")
    name = path_text(old_file)
    done = convert(loader.read(old_file), name)
    text = "\n".join([*_written(done, name), ""])
    loader.validate_content(_sections(done), f"{name}, converted")
    if output is None:
        typer.echo(text, nl=False)
    else:
        _write_new(output, text)
    for line in _report(done):
        typer.echo(line, err=True)


def _sections(done: ConvertedConfig) -> dict[str, object]:
    sections: dict[str, object] = {}
    if done.providers:
        sections |= {"providers": done.providers, "models": done.models}
    if done.qdrant:
        sections["index"] = {"qdrant": done.qdrant}
    return sections


def _report(done: ConvertedConfig) -> Iterator[str]:
    for path, what in done.notes:
        yield printable(f"{path} -> {what}")
    for warning in done.warnings:
        yield printable(f"warning: {warning}")


def _written(done: ConvertedConfig, name: str) -> Iterator[str]:
    """Yield the lines of our file: what became of the old keys as comments, then the sections."""
    yield printable(f"# Converted from {name}. What became of its keys:")
    for line in _report(done):
        yield f"#   {line}"
    yield "# All other keys have their defaults: `embedding-proxy config show` tells them."
    for section, value in _sections(done).items():
        yield ""
        yield loader.dump({section: value}).rstrip()
