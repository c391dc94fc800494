"""What a configuration comes to: every key with the value that applies, ready to be a file again.

No secret is in it: what only the environment should hold stands there as a reference `${NAME}`,
that of the file or one made up. `config show` reads such a file as it is; to serve with it, the
variables have to be set, so that nobody serves with a placeholder for a key.
"""

import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from embedding_proxy.providers import registry

from .fields import Section
from .providers import NETWORK, TIMEOUTS, ProviderConfig
from .schema import Settings

_WHOLE_REFERENCE = re.compile(r"\$\{[^}]*\}")
_VARIABLE = re.compile(r"\$\{([A-Za-z_][A-Za-z0-9_]*)")


def values(settings: Settings, content: Mapping[Any, Any], *, everything: bool) -> dict[str, Any]:
    """Return the sections of a configuration, defaults filled in.

    `content` is what its file holds. Of the models, those that it names are shown, or all: the
    others are the catalogue's in any case.
    """
    shown: dict[str, Any] = {
        name: _plain_value(getattr(settings, name)) for name in Settings.model_fields
    }
    # The default is a provider that need not be there; one that is named has to be.
    shown["passthrough"] = settings.passthrough if settings.passthrough_provider else None
    keys = _content_at(content, "server", "keys")
    for i, entry in enumerate(shown["server"]["keys"]):
        given = keys[i] if isinstance(keys, list) else None
        given = given.get("key") if isinstance(given, dict) else given
        entry["key"] = _reference(given, f"CLIENT_KEY_{i + 1}")
    if settings.server.metrics_token is not None:
        token = _content_at(content, "server", "metrics_token")
        shown["server"]["metrics_token"] = _reference(token, "METRICS_TOKEN")
    shared = settings.cache.shared
    if shared is not None and "@" in shared.url:
        url = _content_at(content, "cache", "shared", "url")
        shown["cache"]["shared"]["url"] = _reference(url, "REDIS_URL")
    for name, provider in settings.providers.items():
        if provider is not None:
            written = _content_at(content, "providers", name)
            shown["providers"][name] = _provider(name, provider, written)
    if not everything:
        named = content.get("models") or {}
        shown["models"] = {name: shown["models"][name] for name in named}
    return shown


def computed_names(shown: object, content: object) -> list[str]:
    """Return the variables of what is shown that the file does not refer to, in order."""
    referred = set(_variables(content))
    return [name for name in dict.fromkeys(_variables(shown)) if name not in referred]


def keys_of(settings: Settings) -> dict[str, tuple[str, bool]]:
    """Return, by provider, the variable that holds its key, and whether it is set."""
    named = {
        name: provider.key_variable for name, provider in settings.providers.items() if provider
    }
    return {
        name: (variable, bool(os.environ.get(variable, "").strip()))
        for name, variable in named.items()
        if variable
    }


def _variables(value: object) -> Iterator[str]:
    """Yield the names of all `${NAME}` below a value."""
    if isinstance(value, Mapping):
        for item in value.values():
            yield from _variables(item)
    elif isinstance(value, list):
        for item in value:
            yield from _variables(item)
    elif isinstance(value, str):
        yield from _VARIABLE.findall(value)


def _provider(name: str, provider: ProviderConfig, written: object) -> dict[str, Any]:
    """Return what applies to a provider: of what it does not say, its kind's defaults.

    `written` is what the file says of it.
    """
    if provider.kind == registry.LOCAL:
        return {"kind": provider.kind, "timeout_s": _plain_value(provider.timeout_s)}
    profile = provider.as_profile()
    written = written if isinstance(written, Mapping) else {}
    headers = _content_at(written, "headers")
    shown = {
        field: _plain_value(getattr(profile, field, None)) for field in ProviderConfig.model_fields
    }
    shown |= {"kind": provider.kind, "auth": provider.auth, "share_cache": provider.share_cache}
    shown["retries"] = provider.retries
    shown |= {key: _plain_value(getattr(profile.network, key)) for key in NETWORK}
    if "@" in (profile.network.proxy or ""):
        made_up = re.sub(r"[^A-Z0-9]", "_", f"{name}_PROXY".upper())
        shown["proxy"] = _reference(written.get("proxy"), made_up)
    shown |= {key: _plain_value(getattr(profile.timeouts, own)) for key, own in TIMEOUTS.items()}
    shown["limits"] = {
        field: getattr(profile.limits, field) for field in type(provider.limits).model_fields
    }
    shown["headers"] = dict(profile.headers)
    own = registry.find(provider.kind).profile.headers
    for header, value in provider.headers.items():
        if own.get(header) == value:
            continue  # What the kind says itself is no secret.
        reference = headers.get(header) if isinstance(headers, dict) else None
        made_up = re.sub(r"[^A-Z0-9]", "_", f"{name}_{header}".upper())
        shown["headers"][header] = _reference(reference, f"HEADER_{made_up}")
    return shown


def _reference(value: object, made_up: str) -> str:
    """Return what stands for a secret: the file's own reference, if it holds nothing else."""
    if isinstance(value, str) and _WHOLE_REFERENCE.fullmatch(value) and ":-" not in value:
        return value
    return f"${{{made_up}}}"


def _content_at(content: object, *path: str) -> object:
    for part in path:
        content = content.get(part) if isinstance(content, dict) else None
    return content


def _plain_value(value: object) -> Any:  # noqa: ANN401 - whatever YAML can hold
    """Return a value in YAML's own types; a whole number without its point."""
    if isinstance(value, Section):
        return {name: _plain_value(getattr(value, name)) for name in type(value).model_fields}
    if isinstance(value, Mapping):
        return {key: _plain_value(item) for key, item in value.items()}
    if isinstance(value, tuple | list | frozenset):
        return [
            _plain_value(item)
            for item in (sorted(value) if isinstance(value, frozenset) else value)
        ]
    if isinstance(value, Path):
        return os.fsencode(value).decode(errors="replace")
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return value
