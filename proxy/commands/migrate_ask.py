"""What `embedding-proxy migrate` is asked for: its options, and what they come to."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from embedding_proxy.index.connection import Connection
from embedding_proxy.index.migrate import Wanted
from embedding_proxy.index.migration.journal import MigrationState
from embedding_proxy.index.migration.regime import Regime
from embedding_proxy.index.migration.template import Rule, TemplateError
from embedding_proxy.proxy import config
from embedding_proxy.proxy.config import ConfigError
from embedding_proxy.proxy.embedding.indexing import connection as configured
from embedding_proxy.proxy.settings.schema import Settings

from .common import plain
from .migrating import Named, named, width_of

CollectionsArgument = Annotated[
    list[str] | None,
    typer.Argument(metavar="COLLECTION...", help="Collections, or aliases of them."),
]
ToOption = Annotated[
    str | None,
    typer.Option("--to", help="The new model; openrouter/MODEL is served by openrouter alone."),
]
FromOption = Annotated[
    str | None, typer.Option("--from", help="The model of the old vectors, if it is known.")
]
DimensionsOption = Annotated[
    int | None, typer.Option(help="The new width; the model's own unless given.")
]
FieldOption = Annotated[
    str | None, typer.Option(help="Field of the payload with the text: content unless given.")
]
TemplateOption = Annotated[
    str | None, typer.Option(help='Several fields instead: "{title} {description} {tags}".')
]
ByOption = Annotated[
    str | None, typer.Option(help="What makes the texts, of a package of yours; see the guide.")
]
FileOption = Annotated[
    Path | None,
    typer.Option("--file", help="YAML: a text_field, template or text_by for each collection."),
]
RegimeOption = Annotated[
    Regime, typer.Option(help="Where the new vectors come from; auto chooses, and says why.")
]
VectorOption = Annotated[
    str | None, typer.Option("--vector", help="The vector to migrate, where points have several.")
]
IntoOption = Annotated[
    str | None, typer.Option(help="Name of the new collection, for a single one.")
]
QdrantOption = Annotated[
    str | None,
    typer.Option(
        help="URL of a server, or folder; index.qdrant unless given. Key: QDRANT_API_KEY."
    ),
]
NamespaceOption = Annotated[str, typer.Option(help="The part of the cache to use.", callback=plain)]
SampleOption = Annotated[
    int, typer.Option(min=1, help="Texts embedded to prove that vectors may be copied.")
]
PassesOption = Annotated[
    int, typer.Option(min=1, help="Whole comparisons with the old collection, at most.")
]

API_KEY = "QDRANT_API_KEY"
"""The variable of the key of a server that is named on the command line."""
DEFAULT_FIELD = "content"
_TEXTS = ("text_field", "template", "text_by")
_KEYS = {*_TEXTS, "vector", "into"}


@dataclass(frozen=True, slots=True)
class Texts:
    """Where the texts of all collections are that say nothing of their own."""

    field: str | None = None
    template: str | None = None
    by: str | None = None
    file: Path | None = None
    vector: str | None = None
    into: str | None = None


@dataclass(frozen=True, slots=True)
class Asked:
    """What a command is to do."""

    settings: Settings
    model: Named
    dimensions: int
    wanted: Sequence[Wanted]


def asked(  # noqa: PLR0913 - what is asked for, by name
    *,
    config_file: Path | None,
    names: Sequence[str] | None,
    to: str | None,
    old: str | None,
    dimensions: int | None,
    texts: Texts,
    regime: Regime,
) -> Asked:
    """Return what the options say. Raises ConfigError."""
    settings = config.load(config_file)
    if to is None:
        raise ConfigError("--to: name the model to migrate to")
    model = named(settings, to, "--to")
    space = named(settings, old, "--from").space if old else None
    mapping = {} if texts.file is None else _mapping(texts.file)
    collections = _chosen(names, mapping)
    if texts.into and len(collections) > 1:
        raise ConfigError("--into is for one collection; a --file can name one for each")
    wanted = []
    for name in collections:
        own = mapping.get(name, {})
        wanted.append(
            Wanted(
                collection=name,
                rule=_rule(name, own, texts),
                regime=regime,
                old_space=space,
                vector=own.get("vector", texts.vector),
                into=own.get("into", texts.into),
            )
        )
    return Asked(settings, model, width_of(model, dimensions), wanted)


def names_of(names: Sequence[str] | None, file: Path | None) -> list[str]:
    """Return the collections that are named, or else those of the file. Raises ConfigError."""
    return _chosen(names, {} if file is None else _mapping(file))


def _chosen(names: Sequence[str] | None, mapping: Mapping[str, object]) -> list[str]:
    collections = list(dict.fromkeys(names or mapping))
    if not collections:
        raise ConfigError("name the collections to migrate, or give --file")
    return collections


def _mapping(path: Path) -> dict[str, Mapping[str, str]]:
    found: dict[str, Mapping[str, str]] = {}
    for name, entry in config.load_mapping(path).items():
        said: Any = {} if entry is None else entry
        if not isinstance(name, str) or not isinstance(said, dict):
            raise ConfigError(f"{path}: {name}: expected keys such as `text_field: content`")
        for key, value in said.items():
            if key not in _KEYS:
                known = ", ".join(sorted(_KEYS))
                raise ConfigError(f"{path}: {name}.{key}: unknown key; known here: {known}")
            if not isinstance(value, str):
                raise ConfigError(f"{path}: {name}.{key}: expected a string; put it in quotes")
        found[name] = said
    return found


def _rule(name: str, own: Mapping[str, str], texts: Texts) -> Rule:
    field, template, by = (own.get(key) for key in _TEXTS)
    if not {*_TEXTS} & own.keys():
        field, template, by = texts.field, texts.template, texts.by
    if sum(one is not None for one in (field, template, by)) > 1:
        raise ConfigError(f"{name}: give a text field, a template or text-by, not both")
    try:
        if template is not None:
            return Rule.template(template)
        if by is not None:
            return Rule.brought(by)
        return Rule.field(DEFAULT_FIELD if field is None else field)
    except TemplateError as error:
        raise ConfigError(f"{name}: {error}") from error


def connection(settings: Settings, place: str | None) -> Connection:
    """Return the Qdrant that is asked for. Raises ConfigError."""
    if place is None:
        if settings.index.qdrant is None:
            raise ConfigError("--qdrant: give the URL of a Qdrant, or set index.qdrant")
        return configured(settings.index.qdrant)
    if place.startswith(("http://", "https://")):
        key = API_KEY if os.environ.get(API_KEY) else None
        return Connection(url=place.rstrip("/"), api_key_env=key)
    path = Path(place)
    # The client would make the folder.
    if not (path / "meta.json").is_file():
        raise ConfigError(f"--qdrant: {place} is no URL, and no folder of Qdrant's embedded mode")
    return Connection(path=path.resolve())


def journal_of(settings: Settings, qdrant: Connection, collection: str) -> MigrationState:
    """Return where the state of a migration is kept."""
    return MigrationState(journal_folder(settings), str(qdrant).rstrip("/"), collection)


def journal_folder(settings: Settings) -> Path:
    """Return the folder of all journals: beside the store."""
    return settings.cache.directory / "migrations"
