"""The options of `embedding-proxy migrate`, and the models, collections and texts that they name.

A model is named as a client names it, or with the provider before it that is to serve it:
`text-embedding-3-large`, `openrouter/openai/text-embedding-3-large`.
"""

import difflib
import os
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from embedding_proxy.index.client import Connection
from embedding_proxy.index.errors import Denied
from embedding_proxy.index.migration.cutover import MissingLimit
from embedding_proxy.index.migration.runner import MigrationRequest, Regime
from embedding_proxy.index.migration.state import FOLDER, MigrationState
from embedding_proxy.index.migration.text_template import READINGS, Rule, TemplateError
from embedding_proxy.providers import vector
from embedding_proxy.providers.base import Space, Vector
from embedding_proxy.providers.dimension_policy import can_give
from embedding_proxy.providers.errors import InvalidAnswer
from embedding_proxy.providers.profile import Limits, limits_of
from embedding_proxy.proxy.config import loader
from embedding_proxy.proxy.config.loader import ConfigError
from embedding_proxy.proxy.config.models import ModelConfig
from embedding_proxy.proxy.config.schema import Settings
from embedding_proxy.proxy.service import index_writes
from embedding_proxy.proxy.service.embedding_service import EmbeddingService
from embedding_proxy.proxy.service.inputs import CostPreview
from embedding_proxy.proxy.service.provider_factory import CLIENTS_PAY

from .migrate_process import ShieldedTask
from .output import check_utf8, progress

MAX_END_S = 120.0
"""How long answers are waited for when a run is stopped."""
CLIENT = "migrate"
"""On whose account the purchases of a migration go in the ledger."""
API_KEY = "QDRANT_API_KEY"
"""The variable of the key of a server that is named on the command line."""
_TEXTS = ("text_field", "template", "text_by")
_KEYS = {*_TEXTS, "vector", "into"}

CollectionsArgument = Annotated[
    list[str] | None,
    typer.Argument(metavar="COLLECTION...", help="Collections or aliases."),
]
ToOption = Annotated[
    str | None,
    typer.Option("--to", help="The new model. openrouter/MODEL uses only openrouter."),
]
FromOption = Annotated[
    str | None, typer.Option("--from", help="The model of the old vectors, if known.")
]
DimensionsOption = Annotated[
    int | None, typer.Option(help="The new dimensions. Default: those of the model.")
]
FieldOption = Annotated[
    str | None,
    typer.Option(help="Field of the payload with the text; unless given, content, or as it says."),
]
TemplateOption = Annotated[
    str | None, typer.Option(help='A text made of several fields: "{title} {description} {tags}".')
]
ByOption = Annotated[
    str | None,
    typer.Option(help=f"What makes the texts: {', '.join(READINGS)}, or of a package of yours."),
]
FileOption = Annotated[
    Path | None,
    typer.Option("--file", help="YAML with a text_field, template or text_by for each collection."),
]
RegimeOption = Annotated[
    Regime, typer.Option(help="Source of the new vectors. auto chooses and says why.")
]
VectorOption = Annotated[
    str | None, typer.Option("--vector", help="The vector to migrate, if points have several.")
]
MissingOption = Annotated[
    str,
    typer.Option(
        "--allow-missing",
        metavar="N|N%",
        help="Go on though so many points, or such a share of them, could not be carried.",
    ),
]
DualOption = Annotated[
    bool | None,
    typer.Option(
        "--dual-write/--no-dual-write",
        help="Let the proxy write what it indexes to both collections, until finalize.",
    ),
]
IntoOption = Annotated[
    str | None, typer.Option(help="Name of the new collection, if only one is migrated.")
]
QdrantOption = Annotated[
    str | None,
    typer.Option(help="URL of a server, or a folder. Default: index.qdrant. Key: QDRANT_API_KEY."),
]
NamespaceOption = Annotated[str, typer.Option(help="Namespace of the cache.", callback=check_utf8)]
SampleOption = Annotated[
    int, typer.Option(min=1, help="Texts to embed to verify that vectors may be copied.")
]
PassesOption = Annotated[
    int, typer.Option(min=1, help="Maximum number of comparisons with the old collection.")
]


@dataclass(frozen=True, slots=True)
class NamedModel:
    """A model as the command line names it."""

    asked: str
    """As it was named."""
    name: str
    entry: ModelConfig
    provider: str | None
    """The only one that may serve it; None = its routes in their order."""

    @property
    def space(self) -> Space:
        """The space of its vectors."""
        return self.entry.as_space()


def find_model(settings: Settings, text: str, option: str) -> NamedModel:
    """Return the model that an option names. Raises ConfigError."""
    if (entry := settings.models.get(text)) is not None:
        return _check_dimensions(NamedModel(text, text, entry, None), option)
    provider, _, rest = text.partition("/")
    if rest and settings.providers.get(provider) is not None:
        for name, entry in settings.models.items():
            routes = [route for route in entry.routes if route.provider == provider]
            if routes and (name == rest or rest in {route.model for route in routes}):
                return _check_dimensions(NamedModel(text, name, entry, provider), option)
    near = difflib.get_close_matches(text, settings.models, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]}?" if near else "`models` in the configuration can add it"
    raise ConfigError(f"{option}: there is no model {text!r}; {hint}")


def _check_dimensions(model: NamedModel, option: str) -> NamedModel:
    if model.entry.dimensions is None:
        raise ConfigError(f"{option}: say how wide its vectors are: models.{model.name}.dimensions")
    return model


def width_of(model: NamedModel, dimensions: int | None) -> int:
    """Return the width to migrate to; the native one if none is asked for. Raises ConfigError."""
    native = model.space.dimensions
    if dimensions is None:
        return native
    if not can_give(model.space, dimensions, "strict"):
        what = f"1 to {native}" if model.space.matryoshka else f"{native} and no other"
        raise ConfigError(f"--dimensions: {model.name} gives {what}")
    return dimensions


def settings_for(settings: Settings, model: NamedModel) -> Settings:
    """Return the settings of a service that serves a migration. Raises ConfigError.

    No model of another space may stand in: its vectors would be lost among the others. Nor is what
    is embedded indexed, as what clients ask for is.
    """
    if settings.cache.mode in ("off", "refresh"):
        raise ConfigError(
            f"cache.mode: {settings.cache.mode}: a migration that is interrupted would buy again"
            " what it has bought; set normal"
        )
    routes = tuple(
        route for route in model.entry.routes if model.provider in (None, route.provider)
    )
    entry = model.entry.model_copy(update={"routes": routes, "fallback": ()})
    server = settings.server.model_copy(update={"drift_check_hours": None, "allow_oversize": True})
    models = {**settings.models, model.name: entry}
    index = settings.index.model_copy(update={"qdrant": None})
    return settings.model_copy(update={"server": server, "models": models, "index": index})


class Target:
    """The model that a migration goes to, behind our own cache and routes."""

    def __init__(
        self,
        service: EmbeddingService,
        model: NamedModel,
        dimensions: int,
        namespace: str = "",
        client: str = CLIENT,
    ) -> None:
        self.name = model.name
        self.asked = model.asked
        self.space = model.space
        self.dimensions = dimensions
        self.shield = ShieldedTask()
        self._service = service
        self._namespace = namespace
        self._client = client

    @property
    def unusable_reason(self) -> str | None:
        """What to set before the model can be asked for; None if it can."""
        model = self._service.models[self.name]
        if model.client_key_policy is not None and not model.client_key_policy.has_other_routes:
            provider = model.client_key_policy.providers[0]
            return f"{self.name}: provider {provider} {CLIENTS_PAY}"
        return None if model.usable else model.router.unavailable

    @property
    def limits(self) -> Limits:
        """What the provider that is asked first takes; the usual where none can be asked."""
        routes = self._service.models[self.name].router.routes
        return limits_of(routes[0].provider) if routes else Limits()

    async def embed(
        self, texts: Sequence[str], *, anew: bool = False
    ) -> tuple[Sequence[Vector], int]:
        """Return a vector for each of 1…N texts, and how many were bought; `anew` buys all.

        Whoever is called off meanwhile finds them in the cache the next time. Raises
        EmbeddingError.
        """
        buying = self._service.embed(
            list(texts),
            self.name,
            dimensions=None if self.dimensions == self.space.dimensions else self.dimensions,
            namespace=self._namespace,
            client=self._client,
            cache_control="no-cache" if anew else "",
        )
        result = await self.shield(buying)
        if result.space != self.space or result.dimensions != self.dimensions:
            raise InvalidAnswer(result.space.name, "is not the space that was asked for")
        vectors = vector.derive(result.embedded.vectors, self.dimensions)
        return vectors, result.usage.misses

    async def finish(self) -> None:
        """Wait until all that was asked for is in the cache, or has failed."""
        await self.shield.wait(MAX_END_S)

    async def look(self, texts: Sequence[str]) -> Sequence[CostPreview]:
        """Return what is known of each text; nothing is bought, and nothing changes."""
        return await self._service.preview(texts, self.name, namespace=self._namespace)


class Steps:
    """Shows the progress of a migration, and says afterwards what was done last."""

    def __init__(self) -> None:
        self._title = ""

    def __call__(self, title: str, total: float) -> AbstractContextManager[Callable[[float], None]]:
        """Show the progress of a step."""
        self._title = title
        return progress(title, total)

    def __str__(self) -> str:
        return f", while {self._title}" if self._title else ""


@dataclass(frozen=True, slots=True)
class TextOptions:
    """Where the texts of all collections are that say nothing of their own."""

    field: str | None = None
    template: str | None = None
    by: str | None = None
    file: Path | None = None
    vector: str | None = None
    into: str | None = None


@dataclass(frozen=True, slots=True)
class MigrationOptions:
    """What a command is to do."""

    settings: Settings
    model: NamedModel
    dimensions: int
    wanted: Sequence[MigrationRequest]


def parse_options(  # noqa: PLR0913 - what is asked for, by name
    *,
    config_file: Path | None,
    names: Sequence[str] | None,
    to: str | None,
    old: str | None,
    dimensions: int | None,
    texts: TextOptions,
    regime: Regime,
) -> MigrationOptions:
    """Return what the options say. Raises ConfigError."""
    settings = loader.load(config_file)
    if to is None:
        raise ConfigError("--to: name the model to migrate to")
    model = find_model(settings, to, "--to")
    space = find_model(settings, old, "--from").space if old else None
    mapping = {} if texts.file is None else _read_mapping(texts.file)
    collections = _collection_names(names, mapping)
    if texts.into and len(collections) > 1:
        raise ConfigError("--into is for one collection; a --file can name one for each")
    wanted = []
    for name in collections:
        own = mapping.get(name, {})
        wanted.append(
            MigrationRequest(
                collection=name,
                rule=_rule(name, own, texts),
                regime=regime,
                old_space=space,
                vector=own.get("vector", texts.vector),
                into=own.get("into", texts.into),
            )
        )
    return MigrationOptions(settings, model, width_of(model, dimensions), wanted)


def missing_limit(text: str) -> MissingLimit:
    """Return how many points may be missing. Raises ConfigError."""
    found = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)%|([0-9]+)", text.strip())
    if found is None or float(found[1] or 0) > 100:
        raise ConfigError(f"--allow-missing: {text!r} is neither a number nor a share as 1%")
    return MissingLimit(int(found[2] or 0), float(found[1] or 0) / 100)


def names_of(names: Sequence[str] | None, file: Path | None) -> list[str]:
    """Return the collections that are named, or else those of the file. Raises ConfigError."""
    return _collection_names(names, {} if file is None else _read_mapping(file))


def _collection_names(names: Sequence[str] | None, mapping: Mapping[str, object]) -> list[str]:
    collections = list(dict.fromkeys(names or mapping))
    if not collections:
        raise ConfigError("name the collections to migrate, or give --file")
    return collections


def _read_mapping(path: Path) -> dict[str, Mapping[str, str]]:
    found: dict[str, Mapping[str, str]] = {}
    for name, entry in loader.load_mapping(path).items():
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


def _rule(name: str, own: Mapping[str, str], texts: TextOptions) -> Rule | None:
    """Return where the texts are; None if nothing says so."""
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
        return None if field is None else Rule.field(field)
    except TemplateError as error:
        raise ConfigError(f"{name}: {error}") from error


def connection(settings: Settings, place: str | None) -> Connection:
    """Return the Qdrant that is asked for. Raises ConfigError."""
    if place is None:
        if settings.index.qdrant is None:
            raise ConfigError("--qdrant: give the URL of a Qdrant, or set index.qdrant")
        return index_writes.connection(settings.index.qdrant)
    if place.startswith(("http://", "https://")):
        key = API_KEY if os.environ.get(API_KEY) else None
        return Connection(url=place.rstrip("/"), api_key_env=key)
    path = Path(place)
    # The client would make the folder.
    if not (path / "meta.json").is_file():
        raise ConfigError(f"--qdrant: {place} is no URL, and no folder of Qdrant's embedded mode")
    return Connection(path=path.resolve())


def key_hint(settings: Settings, place: str | None, error: Exception) -> str:
    """Return where the key is that Qdrant does not accept; nothing for another failure."""
    if not isinstance(error, Denied):
        return ""
    qdrant = settings.index.qdrant
    variable = API_KEY if place is not None or qdrant is None else qdrant.api_key_env
    if variable is None:
        return " (index.qdrant.api_key_env names no key)"
    has_key = bool(os.environ.get(variable))
    return f" (the key is in {variable})" if has_key else f" ({variable} is not set)"


def journal_of(settings: Settings, qdrant: Connection, collection: str) -> MigrationState:
    """Return where the state of a migration is kept."""
    return MigrationState(journal_folder(settings), str(qdrant).rstrip("/"), collection)


def journal_folder(settings: Settings) -> Path:
    """Return the folder of all journals: beside the store."""
    return settings.cache.directory / FOLDER
