"""Converts a configuration of the older kind (`llm:`, `vector_store:`), nested or flat. Pure.

`read` takes the old file apart. It refuses a file that holds an API key. `convert` returns the new
configuration and says what became of each old key; unknown and empty ones are named and left out.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from embedding_proxy.providers import registry
from embedding_proxy.providers.base import Space
from embedding_proxy.providers.dimensions import can_give
from embedding_proxy.providers.model_catalog import CATALOGUE, ModelEntry

from .loader import ConfigError
from .providers import MAX_RETRIES

_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_REFERENCE = re.compile(r"\$\{([A-Za-z_][A-Za-z0-9_]*)\}")
_NAMED_SECRET = re.compile(r"(^|_)(api_?key|key|token|secret|password)$", re.IGNORECASE)
_LOOKS_SECRET = re.compile(r"\b(sk|pk)-[A-Za-z0-9_-]{8,}|//[^/@\s]*@")
# The known keys and their types. In the flat form they may begin with `embedding_`.
_TEXTS = ("provider", "model", "api_key_env", "api_key", "base_url")
_NUMBERS = ("dimensions", "max_retries", "timeout")
_EMBEDDING = (*_TEXTS, *_NUMBERS, "fallback_providers")
_STORE_TEXTS = ("type", "qdrant_url", "collection_prefix", "qdrant_api_key", "qdrant_api_key_env")
_STORE = (*_STORE_TEXTS, "embedding_dimension", "allow_dynamic_dimensions")


class OldValue(NamedTuple):
    """A value of the old file, and its place."""

    path: str
    value: Any


@dataclass(slots=True)
class OldConfig:
    """The content of an old file, by the names of the nested form."""

    embedding: dict[str, OldValue] = field(default_factory=dict)
    fallbacks: list[dict[str, OldValue]] = field(default_factory=list)
    store: dict[str, OldValue] = field(default_factory=dict)
    left_out: list[tuple[str, str]] = field(default_factory=list)
    """(path, why)"""


@dataclass(slots=True)
class ConvertedConfig:
    """Our configuration, and the fate of the old keys."""

    providers: dict[str, dict[str, Any]] = field(default_factory=dict)
    models: dict[str, dict[str, Any]] = field(default_factory=dict)
    qdrant: dict[str, Any] = field(default_factory=dict)
    notes: list[tuple[str, str]] = field(default_factory=list)
    """(old key, what became of it)"""
    warnings: list[str] = field(default_factory=list)

    def note(self, value: OldValue | None, outcome: str) -> None:
        """Note the fate of a key, if it exists."""
        if value is not None:
            self.notes.append((value.path, outcome))


@dataclass(frozen=True, slots=True)
class _Model:
    """A model at a provider: our name for it, and its catalog entry."""

    name: str
    provider: str
    upstream: str
    entry: ModelEntry

    @property
    def route(self) -> dict[str, str]:
        return {"provider": self.provider, "model": self.upstream}

    def describe(self) -> dict[str, Any]:
        """Return the keys that our configuration needs beside the routes."""
        if self.name in CATALOGUE and CATALOGUE[self.name] == self.entry:
            return {}
        description = {"space": self.entry.space, "dimensions": self.entry.dimensions or None}
        return {key: value for key, value in description.items() if value is not None}


def read(content: Mapping[Any, Any], file: str) -> OldConfig:
    """Parse an old configuration. Raises ConfigError if it holds a key, or is no such file.

    `file` is its name, for messages.
    """
    open_keys = [
        f"{file}: {path}: holds a key; put that into a variable, write the variable's name into"
        " `api_key_env` in its place, and convert again"
        for name in ("llm", "vector_store")
        for path in _find_keys(content.get(name), name)
    ]
    if open_keys:
        raise ConfigError(*open_keys)
    old = OldConfig()
    llm = _section(content.get("llm"), file, "llm")
    if llm.get("embedding") is None:
        _read_flat(llm, file, old)
    else:
        nested = _section(llm["embedding"], file, "llm.embedding")
        old.embedding = _take(nested, _EMBEDDING, file, "llm.embedding", old)
        others = [key for key in llm if key != "embedding"]
        old.left_out += [
            (f"llm.{key}", "not of embeddings, or older than llm.embedding") for key in others
        ]
    fallbacks = old.embedding.pop("fallback_providers", None)
    if fallbacks is not None:
        _read_fallbacks(fallbacks, file, old)
    store = _section(content.get("vector_store"), file, "vector_store")
    old.store = _take(store, _STORE, file, "vector_store", old)
    for key in content:
        if key not in ("llm", "vector_store"):
            old.left_out.append((str(key), "no matter of this proxy"))
    if not old.embedding and not old.store:
        raise ConfigError(
            f"{file}: says nothing of embeddings; expected llm.embedding, llm.embedding_model or"
            " vector_store, as in older configurations"
        )
    return old


def variable(section: Mapping[str, OldValue]) -> OldValue | None:
    """Return the name of the variable that holds a key."""
    if "api_key_env" in section:
        return section["api_key_env"]
    api_key = section.get("api_key")
    reference = api_key and _REFERENCE.fullmatch(api_key.value)
    return OldValue(api_key.path, reference[1]) if api_key and reference else None


def _find_keys(value: object, path: str) -> Iterator[str]:
    """Yield the paths of values that are keys by their name or form."""
    last = path.rpartition(".")[2]
    if isinstance(value, dict):
        for key, below in value.items():
            yield from _find_keys(below, f"{path}.{key}")
    elif isinstance(value, list):
        for i, below in enumerate(value):
            yield from _find_keys(below, f"{path}.{i}")
    elif isinstance(value, str) and value and not _REFERENCE.fullmatch(value):
        no_name = last.endswith("_env") and not _VARIABLE.fullmatch(value)
        if no_name or _NAMED_SECRET.search(last) or _LOOKS_SECRET.search(value):
            yield path


def _section(value: object, file: str, path: str) -> Mapping[Any, Any]:
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise ConfigError(f"{file}: {path}: expected keys with values below it")
    return value


def _read_flat(llm: Mapping[Any, Any], file: str, old: OldConfig) -> None:
    """Read the flat form, whose other keys may belong to a chat model."""
    if llm.get("embedding_model") is None:
        old.left_out += [(f"llm.{key}", "says nothing of embeddings") for key in llm]
        return
    # Keys beside another service's name are not for embeddings.
    plain_one, own_one = llm.get("provider"), llm.get("embedding_provider")
    own = plain_one is None or (plain_one in registry.KINDS and own_one in (None, plain_one))
    values = {}
    for key, value in llm.items():
        plain = str(key).removeprefix("embedding_")
        plain = "dimensions" if plain == "dimension" else plain
        if str(key).startswith("embedding_") and plain in _EMBEDDING:
            values[plain] = (key, value)
        elif own and plain in _EMBEDDING and plain not in ("model", "provider"):
            values.setdefault(plain, (key, value))
        elif own and key == "provider":
            values.setdefault("provider", (key, value))
    used = {key for key, _ in values.values()}
    old.left_out += [
        (f"llm.{key}", "not of embeddings, or unknown") for key in llm if key not in used
    ]
    for plain, (key, value) in values.items():
        _keep(plain, OldValue(f"llm.{key}", value), file, old.embedding, old)


def _read_fallbacks(fallbacks: OldValue, file: str, old: OldConfig) -> None:
    if not isinstance(fallbacks.value, list):
        raise ConfigError(f"{file}: {fallbacks.path}: expected a list of `provider` and `model`")
    for i, entry in enumerate(fallbacks.value):
        path = f"{fallbacks.path}.{i}"
        if not isinstance(entry, dict) or not {"provider", "model"} <= entry.keys():
            raise ConfigError(f"{file}: {path}: expected `provider` and `model`")
        old.fallbacks.append(_take(entry, (*_TEXTS, *_NUMBERS), file, path, old))


def _take(
    section: Mapping[Any, Any], names: Iterable[str], file: str, path: str, old: OldConfig
) -> dict[str, OldValue]:
    """Return the known keys of a section; note the others."""
    values: dict[str, OldValue] = {}
    for key, value in section.items():
        if key in names:
            _keep(key, OldValue(f"{path}.{key}", value), file, values, old)
        else:
            old.left_out.append((f"{path}.{key}", "unknown key"))
    return values


def _keep(
    key: str, old_value: OldValue, file: str, into: dict[str, OldValue], old: OldConfig
) -> None:
    value = old_value.value
    if value in (None, "", []):
        old.left_out.append((old_value.path, "empty"))
        return
    if key in _TEXTS + _STORE_TEXTS and not isinstance(value, str):
        raise ConfigError(f"{file}: {old_value.path}: expected a string")
    if key in (*_NUMBERS, "embedding_dimension") and (
        isinstance(value, bool) or not isinstance(value, int | float) or value < 0
    ):
        raise ConfigError(f"{file}: {old_value.path}: expected a number")
    into[key] = old_value


def convert(content: Mapping[Any, Any], file: str) -> ConvertedConfig:
    """Return the converted configuration; `file` is the name of the old one, for messages.

    Raises ConfigError if the file holds a key, or names an unknown provider without address.
    """
    old = read(content, file)
    converted = ConvertedConfig()
    width = None
    if old.embedding:
        first = _convert_first(old, file, converted)
        width = first.entry.dimensions
        _convert_fallbacks(old, file, first, converted)
    _convert_store(old, width, converted)
    converted.notes += [(path, f"left out: {why}") for path, why in old.left_out]
    return converted


def _convert_first(old: OldConfig, file: str, converted: ConvertedConfig) -> _Model:
    section = old.embedding
    if "model" not in section:
        raise ConfigError(f"{file}: llm.embedding.model: is missing; add it")
    provider = section["provider"].value if "provider" in section else "openai"
    model = _model(provider, section["model"].value)
    _convert_provider(provider, section, file, converted)
    if "provider" not in section:
        converted.warnings.append(f"no provider is named: {provider} is taken, as it always was")
    converted.note(section.get("provider"), f"providers.{provider}")
    converted.note(section["model"], f"models.{model.name}, asked for at {provider}")
    model = _apply_dimensions(model, section.get("dimensions"), converted)
    converted.models[model.name] = {**model.describe(), "routes": [model.route]}
    return model


def _model(provider: str, upstream: str) -> _Model:
    """Return a model at a provider: its catalog entry, or its name alone."""
    for name, entry in CATALOGUE.items():
        if (provider, upstream) in entry.routes and (
            name == upstream or provider == registry.LOCAL
        ):
            return _Model(name, provider, upstream, entry)
    space = upstream if provider == "openrouter" else f"{provider}/{upstream}"
    return _Model(upstream, provider, upstream, ModelEntry(space, 0, 0.0, ()))


def _apply_dimensions(model: _Model, value: OldValue | None, converted: ConvertedConfig) -> _Model:
    """Return a model with the width of the old file, if it may have it."""
    native = model.entry.dimensions
    if value is None:
        return model
    dimensions = int(value.value)
    if not native:
        converted.note(value, f"models.{model.name}.dimensions")
        return replace(model, entry=replace(model.entry, dimensions=dimensions))
    if dimensions == native:
        converted.note(value, "left out: it is known of the model")
        return model
    converted.note(value, "no counterpart: each request asks for its width, `dimensions`")
    may = "can be cut to it" if model.entry.matryoshka and dimensions < native else "has no other"
    converted.warnings.append(
        f"{value.path} is {dimensions}, but {model.name} gives {native} numbers unless a request"
        f" asks otherwise, and {may}; the original never sent this key on"
    )
    return model


def _convert_provider(
    name: str, section: Mapping[str, OldValue], file: str, converted: ConvertedConfig
) -> None:
    """Add a provider of the old file; the first description of a provider counts."""
    entry = converted.providers.setdefault(name, {})
    address, time = section.get("base_url"), section.get("timeout")
    retries = section.get("max_retries")
    if name == registry.LOCAL and retries is not None:
        converted.note(retries, "left out: nobody is asked, so nobody is asked again")
        retries = None
    if retries is not None:
        retries = retries._replace(value=min(int(retries.value), MAX_RETRIES))
    key = variable(section)
    is_known = name in registry.KINDS or name == registry.LOCAL
    if not is_known:
        if address is None:
            raise ConfigError(
                f"{file}: {section['provider'].path}: there is no provider {name!r}; known:"
                f" {', '.join(sorted((*registry.KINDS, registry.LOCAL)))}; or give the `base_url`"
                " of one that speaks as OpenAI does"
            )
        entry.setdefault("kind", "openai_compatible")
    new_values = {"base_url": address, "api_key_env": key, "timeout_s": time, "retries": retries}
    for key_name, old_value in new_values.items():
        if old_value is None:
            continue
        if entry.setdefault(key_name, old_value.value) == old_value.value:
            converted.note(old_value, f"providers.{name}.{key_name}")
        else:
            converted.note(old_value, f"left out: providers.{name} has another {key_name} already")
            converted.warnings.append(
                f"{old_value.path}: give this provider a name and a `kind` of its own"
            )
    usual = registry.KINDS[name].profile.base_url if name in registry.KINDS else None
    if address is not None and usual is not None and address.value.rstrip("/") != usual:
        converted.warnings.append(
            f"providers.{name} asks {address.value}: if that serves other models under the same"
            " names, give them a `space` of their own"
        )


def _convert_fallbacks(
    old: OldConfig, file: str, first: _Model, converted: ConvertedConfig
) -> None:
    """Convert old fallbacks to routes of the same space, or to fallback models."""
    for value in old.fallbacks:
        if not {"provider", "model"} <= value.keys():
            raise ConfigError(f"{file}: llm.embedding.fallback_providers: an entry is empty")
        other = _model(value["provider"].value, value["model"].value)
        path = value["provider"].path.rpartition(".")[0]
        _convert_provider(other.provider, value, file, converted)
        if other.entry.space == first.entry.space:
            routes = converted.models[first.name]["routes"]
            if other.route not in routes:
                routes.append(other.route)
            converted.note(value.get("dimensions"), "left out: it is known of the model")
            converted.notes.append((path, f"models.{first.name}.routes: the same model"))
            continue
        other = _apply_dimensions(other, value.get("dimensions"), converted)
        _add_fallback(path, first, other, converted)


def _add_fallback(path: str, first: _Model, other: _Model, converted: ConvertedConfig) -> None:
    """Add a fallback model of another space, at a named width."""
    entry = converted.models.setdefault(other.name, {**other.describe(), "routes": []})
    if other.route not in entry["routes"]:
        entry["routes"].append(other.route)
    dimensions, native = first.entry.dimensions, other.entry.dimensions
    if not dimensions or not native:
        unknown = other.name if dimensions else first.name
        converted.notes.append(
            (path, f"models.{other.name}; no fallback: the width of {unknown} is not known")
        )
        return
    space = Space(other.entry.space, native, other.entry.matryoshka)
    width = (
        "strict"
        if can_give(space, dimensions, "strict")
        else "pad"
        if native < dimensions
        else "truncate"
    )
    fallbacks = converted.models[first.name].setdefault("fallback", [])
    if all(entry["model"] != other.name for entry in fallbacks):
        fallbacks.append({"model": other.name, "dimension_policy": width})
    converted.notes.append((path, f"models.{first.name}.fallback: another model, width {width}"))
    converted.warnings.append(
        f"{other.name} is another space than {first.name}: its vectors compare with none of the"
        " first. Answers of it say x-embedding-fallback: true; do not store them beside the others,"
        " or remove `fallback`"
    )


def _convert_store(old: OldConfig, width: int | None, converted: ConvertedConfig) -> None:
    section = old.store
    names = {"api_key": "qdrant_api_key", "api_key_env": "qdrant_api_key_env"}
    keys = {
        key_name: section[old_name] for key_name, old_name in names.items() if old_name in section
    }
    values = {"url": section.get("qdrant_url"), "api_key_env": variable(keys)}
    for key_name, old_value in values.items():
        if old_value is not None:
            converted.qdrant[key_name] = old_value.value
            converted.note(old_value, f"index.qdrant.{key_name}")
    if "collection_prefix" in section:
        prefix = section["collection_prefix"].value.rstrip("_") + "_"
        converted.qdrant["prefix"] = prefix
        converted.note(
            section["collection_prefix"],
            f"index.qdrant.prefix: collections are {prefix}MODEL-WIDTH, old ones stay",
        )
    if converted.qdrant and "url" not in converted.qdrant:
        converted.qdrant["url"] = "http://localhost:6333"
        converted.warnings.append("index.qdrant.url: the old file names none; say where Qdrant is")
    dimensions = section.get("embedding_dimension")
    converted.note(dimensions, "no counterpart: a collection has the width of its model")
    if dimensions is not None and width and dimensions.value != width:
        converted.warnings.append(
            f"{dimensions.path} is {dimensions.value}, but the model gives {width} numbers: the"
            " collections there were made for another model, or hold vectors that were cut"
        )
    converted.note(
        section.get("allow_dynamic_dimensions"),
        "no counterpart: each width has a collection of its own, none is ever changed",
    )
    converted.note(section.get("type"), "left out: Qdrant is the only store")
