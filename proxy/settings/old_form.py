"""Reads a configuration of the older kind (`llm:`, `vector_store:`), nested or flat. Pure.

A key that lies open in it is refused. What is unknown, or empty, is named and left out.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from embedding_proxy.providers import kinds
from embedding_proxy.proxy.config import ConfigError

_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_REFERENCE = re.compile(r"\$\{([A-Za-z_][A-Za-z0-9_]*)\}")
_NAMED_SECRET = re.compile(r"(^|_)(api_?key|key|token|secret|password)$", re.IGNORECASE)
_LOOKS_SECRET = re.compile(r"\b(sk|pk)-[A-Za-z0-9_-]{8,}|//[^/@\s]*@")

# What may be said of embeddings, and of which type; the flat form may put `embedding_` before it.
_TEXTS = ("provider", "model", "api_key_env", "api_key", "base_url")
_NUMBERS = ("dimensions", "max_retries", "timeout")
_EMBEDDING = (*_TEXTS, *_NUMBERS, "fallback_providers")
_STORE_TEXTS = ("type", "qdrant_url", "collection_prefix", "qdrant_api_key", "qdrant_api_key_env")
_STORE = (*_STORE_TEXTS, "embedding_dimension", "allow_dynamic_dimensions")


class Said(NamedTuple):
    """A value of the old file, and where it stands."""

    path: str
    value: Any


@dataclass(slots=True)
class Old:
    """What an old file says: by the names of the nested form, whichever it has."""

    embedding: dict[str, Said] = field(default_factory=dict)
    fallbacks: list[dict[str, Said]] = field(default_factory=list)
    store: dict[str, Said] = field(default_factory=dict)
    left_out: list[tuple[str, str]] = field(default_factory=list)
    """(path, why)"""


def read(content: Mapping[Any, Any], file: str) -> Old:
    """Take an old configuration apart. Raises ConfigError for one that holds a key, or none of it.

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
    old = Old()
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
    listed = old.embedding.pop("fallback_providers", None)
    if listed is not None:
        _read_fallbacks(listed, file, old)
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


def variable(said: Mapping[str, Said]) -> Said | None:
    """Return the name of the variable that holds a key, named or referred to."""
    if "api_key_env" in said:
        return said["api_key_env"]
    given = said.get("api_key")
    found = given and _REFERENCE.fullmatch(given.value)
    return Said(given.path, found[1]) if given and found else None


def _find_keys(value: object, path: str) -> Iterator[str]:
    """Yield where a key lies open below a path: something called so, or looking so."""
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


def _read_flat(llm: Mapping[Any, Any], file: str, old: Old) -> None:
    """Read the older form, whose other keys may be about a model that chats."""
    if llm.get("embedding_model") is None:
        old.left_out += [(f"llm.{key}", "says nothing of embeddings") for key in llm]
        return
    # What stands there beside another service's name is not for embeddings.
    plain_one, own_one = llm.get("provider"), llm.get("embedding_provider")
    own = plain_one is None or (plain_one in kinds.KINDS and own_one in (None, plain_one))
    found = {}
    for key, value in llm.items():
        plain = str(key).removeprefix("embedding_")
        plain = "dimensions" if plain == "dimension" else plain
        if str(key).startswith("embedding_") and plain in _EMBEDDING:
            found[plain] = (key, value)
        elif own and plain in _EMBEDDING and plain not in ("model", "provider"):
            found.setdefault(plain, (key, value))
        elif own and key == "provider":
            found.setdefault("provider", (key, value))
    used = {key for key, _ in found.values()}
    old.left_out += [
        (f"llm.{key}", "not of embeddings, or unknown") for key in llm if key not in used
    ]
    for plain, (key, value) in found.items():
        _keep(plain, Said(f"llm.{key}", value), file, old.embedding, old)


def _read_fallbacks(listed: Said, file: str, old: Old) -> None:
    if not isinstance(listed.value, list):
        raise ConfigError(f"{file}: {listed.path}: expected a list of `provider` and `model`")
    for i, entry in enumerate(listed.value):
        path = f"{listed.path}.{i}"
        if not isinstance(entry, dict) or not {"provider", "model"} <= entry.keys():
            raise ConfigError(f"{file}: {path}: expected `provider` and `model`")
        old.fallbacks.append(_take(entry, (*_TEXTS, *_NUMBERS), file, path, old))


def _take(
    section: Mapping[Any, Any], known: Iterable[str], file: str, path: str, old: Old
) -> dict[str, Said]:
    """Return what is known of a section; name the rest."""
    found: dict[str, Said] = {}
    for key, value in section.items():
        if key in known:
            _keep(key, Said(f"{path}.{key}", value), file, found, old)
        else:
            old.left_out.append((f"{path}.{key}", "unknown key"))
    return found


def _keep(key: str, said: Said, file: str, into: dict[str, Said], old: Old) -> None:
    value = said.value
    if value in (None, "", []):
        old.left_out.append((said.path, "empty"))
        return
    if key in _TEXTS + _STORE_TEXTS and not isinstance(value, str):
        raise ConfigError(f"{file}: {said.path}: expected a string")
    if key in (*_NUMBERS, "embedding_dimension") and (
        isinstance(value, bool) or not isinstance(value, int | float) or value < 0
    ):
        raise ConfigError(f"{file}: {said.path}: expected a number")
    into[key] = said
