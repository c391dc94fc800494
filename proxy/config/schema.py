"""What a configuration may say: its sections, keys, types and defaults.

The keys of providers, models, the index and the shared tier are in `providers`, `models`, `index`
and `shared` beside this file.

Settings objects stay in `proxy`; the packages below it take plain arguments.
"""

import ipaddress
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

from embedding_proxy.providers import registry
from embedding_proxy.providers.client_credential import client_key_mistake
from embedding_proxy.providers.model_catalog import CATALOGUE
from pydantic import Field, PrivateAttr, ValidationInfo, field_validator, model_validator

from . import keys_file, references
from .errors import KeyPath, Problem, Problems, refuse, suggestion
from .fields import (
    INSPECTED,
    CacheMode,
    FilePath,
    Honor,
    HostName,
    HostPort,
    Name,
    Number,
    ProviderName,
    Section,
    WebOrigin,
    Whole,
)
from .index import Index
from .keys_file import namespace_mistake
from .models import ModelConfig, from_catalogue
from .providers import ProviderConfig
from .shared import Shared

KINDS: tuple[str, ...] = (*registry.KINDS, registry.LOCAL)
"""The built-in kinds of provider; one that is named like its kind need not say so."""
DEFAULT_PROVIDERS = ("openai", "openrouter", "local")
"""The kinds that are there when a configuration names none."""


class ClientKey(Section):
    """A key that clients send, the part of the cache that is theirs, and its name in the ledger."""

    key: Annotated[Name, Field(repr=False)]
    namespace: str = ""
    name: str = ""
    admin: Annotated[bool, Field(strict=True)] = False

    @field_validator("key")
    @classmethod
    def _one_that_can_be_sent(cls, value: str) -> str:
        return _sendable(value)

    @field_validator("namespace")
    @classmethod
    def _not_the_proxys_own(cls, value: str) -> str:
        mistake = namespace_mistake(value)
        if mistake:
            raise ValueError(mistake)
        return value


class Tls(Section):
    """The certificate that clients see, and its key: PEM files."""

    cert: FilePath
    key: FilePath


class Server(Section):
    """Where clients connect, and what they may send."""

    host: Name = "127.0.0.1"
    port: Annotated[Whole, Field(ge=0, le=65535)] = 8080
    workers: Annotated[Whole, Field(ge=1, le=64)] = 1
    node: Annotated[str, Field(pattern=r"^[A-Za-z0-9._-]{1,64}$")] | None = None
    """The name of this node among those that share a Redis; without it the machine's."""
    tls: Tls | None = None
    max_body_mib: Annotated[Number, Field(gt=0, le=1e5)] = 64
    allow_oversize: bool = True
    head_timeout_s: Annotated[Number, Field(gt=0)] = 10
    body_timeout_s: Annotated[Number, Field(gt=0)] = 10
    send_timeout_s: Annotated[Number, Field(gt=0)] = 10
    max_unread_mib: Annotated[Number, Field(gt=0, le=1e7)] = 256
    request_timeout_s: Annotated[Number, Field(gt=0)] = 300
    drain_s: Annotated[Number, Field(ge=0, le=3600)] = 0
    grace_s: Annotated[Number, Field(gt=0, le=3600)] = 30
    batch_window_ms: Annotated[Number, Field(ge=0, le=1000)] = 0
    unknown_models: Literal["forward", "reject"] = "forward"
    drift_check_hours: Annotated[Number, Field(gt=0, le=1e5)] | None = 24
    keys: Annotated[tuple[ClientKey, ...], Field(repr=False)] = ()
    keys_file: FilePath | None = None
    """Without it, `keys_file.FILE_NAME` in the folder of the cache: see `Settings.keys_path`."""
    metrics_token: Annotated[Name | None, Field(repr=False)] = None
    metrics_listen: HostPort | None = None
    cors: tuple[WebOrigin, ...] = ()
    allowed_hosts: tuple[HostName, ...] = ()
    max_connections: Annotated[Whole, Field(ge=1, le=1_000_000)] = 4096
    max_connections_per_address: Annotated[Whole, Field(ge=1, le=1_000_000)] | None = None
    honor_cache_control: Honor = True
    fast_path: Annotated[bool, Field(strict=True)] = True

    @field_validator("honor_cache_control", mode="before")
    @classmethod
    def _yes_no_or_admin(cls, value: object) -> object:
        if not isinstance(value, bool) and value != "admin":
            raise ValueError("expected true, admin or false")
        return value

    @field_validator("metrics_token")
    @classmethod
    def _token_that_can_be_sent(cls, value: str | None) -> str | None:
        return value and _sendable(value)

    @field_validator("cors", "allowed_hosts", mode="before")
    @classmethod
    def _one_alone(cls, value: object) -> object:
        return [value] if isinstance(value, str) else value

    @field_validator("keys", mode="before")
    @classmethod
    def _keys_alone(cls, value: object) -> object:
        """Take a key that stands alone for one of the common namespace."""
        if not isinstance(value, list | tuple):
            return value
        return [entry if isinstance(entry, dict | ClientKey) else {"key": entry} for entry in value]

    @model_validator(mode="after")
    def _keys_fit(self) -> "Server":
        refuse(self._misfits())
        return self

    def _misfits(self) -> Iterator[Problem]:
        """Yield keys that stand there twice."""
        first: dict[str, int] = {}
        for i, entry in enumerate(self.keys):
            if first.setdefault(entry.key.strip(), i) != i:
                yield Problem(
                    ("keys", i, "key"),
                    f"is the key of server.keys.{first[entry.key.strip()]}, too; remove one",
                )
            if self.metrics_token is not None and entry.key.strip() == self.metrics_token.strip():
                yield Problem(
                    ("metrics_token",),
                    f"is the key of server.keys.{i}, too, which may do more; choose another token",
                    needs=(("keys", i, "key"),),
                )


def _sendable(key: str) -> str:
    """Return a key as it is. Raises ValueError for one that no client can send."""
    mistake = client_key_mistake(key)
    if mistake:
        raise ValueError(mistake)
    return key


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _is_there(path: Path) -> bool:
    try:
        path.stat()
    except OSError:
        return False
    return True


def _default_directory() -> Path:
    home = os.environ.get("XDG_DATA_HOME", "")
    try:
        base = (
            Path(home)
            if Path(home).is_absolute()
            else references.home_directory() / ".local" / "share"
        )
    except ValueError as error:
        raise Problems(
            [Problem(("directory",), f"{error}, or XDG_DATA_HOME, or this key")]
        ) from error
    return base / "embedding-proxy"


class Log(Section):
    """What is written to stderr, and how."""

    level: Literal["debug", "info", "warning", "error"] = "info"
    format: Literal["auto", "text", "json"] = "auto"
    requests: Annotated[bool, Field(strict=True)] = True


class Traces(Section):
    """OpenTelemetry spans; variables of the environment say where they go."""

    enabled: Annotated[bool, Field(strict=True)] = False


class Cache(Section):
    """What is kept, where, and how much of it."""

    directory: FilePath = Path()
    """Without it, a folder of the user's: see `_default_directory`."""
    size_limit_gib: Annotated[Number, Field(gt=0, le=1e6)] = 50
    memory_mib: Annotated[Number, Field(ge=0, le=1e7)] = 256
    ttl_days: Annotated[Number, Field(gt=0)] | None = None
    pinned_namespaces: tuple[str, ...] = ()
    mode: CacheMode = "normal"
    shared: Shared | None = None

    @field_validator("shared", mode="before")
    @classmethod
    def _url_alone(cls, value: object) -> object:
        return {"url": value} if isinstance(value, str) else value

    @model_validator(mode="before")
    @classmethod
    def _in_the_users_folder(cls, value: object) -> object:
        if isinstance(value, dict) and "directory" not in value:
            return {**value, "directory": _default_directory()}
        return value


def _plain_line(problem: Problem) -> str:
    return f"{problem.key}: {problem.message}"


@dataclass(frozen=True)
class SettingsSource:
    """Where settings come from. It makes no two of them differ."""

    line: Callable[[Problem], str] = field(default=_plain_line, compare=False)


class Settings(Section):
    """A whole configuration, defaults filled in."""

    server: Server = Server()
    log: Log = Log()
    traces: Traces = Traces()
    cache: Annotated[Cache, Field(validate_default=True)] = Field(
        default_factory=dict  # type: ignore[assignment]
    )
    providers: Annotated[
        dict[ProviderName, ProviderConfig | None], Field(validate_default=True)
    ] = Field(
        default_factory=lambda: {kind: {} for kind in DEFAULT_PROVIDERS}  # type: ignore[arg-type]
    )
    models: Annotated[dict[Name, ModelConfig], Field(validate_default=True)] = Field(
        default_factory=dict
    )
    index: Index = Index()
    passthrough: Name | None = "openai"
    """The provider that answers all other calls. The default one need not be configured."""
    passthrough_auth: Literal["provider", "client"] = "provider"
    passthrough_idle_timeout_s: Annotated[Number, Field(gt=0)] = 1800
    passthrough_max_message_mib: Annotated[Number, Field(gt=0, le=1024)] = 16

    _source: SettingsSource = PrivateAttr(default_factory=SettingsSource)

    def problem(self, path: KeyPath, message: str) -> str:
        """Return a line that tells what is wrong with a key: `file:line: key: problem; remedy`.

        For mistakes that show only when the settings are used.
        """
        return self._source.line(Problem(path, message))

    def set_source(self, line: Callable[[Problem], str]) -> None:
        """Say where the settings come from: `line` adds file and line to a problem."""
        self._source = SettingsSource(line)

    @model_validator(mode="before")
    @classmethod
    def _empty_sections(cls, value: object) -> object:
        """Take `server:` with nothing below it, say all commented out, for its defaults."""
        if isinstance(value, dict):
            return {
                key: entry
                for key, entry in value.items()
                if entry is not None or key == "passthrough"
            }
        return value

    @field_validator("providers", mode="before")
    @classmethod
    def _named_like_their_kind(cls, value: object) -> object:
        if not isinstance(value, dict):
            return value
        return {
            name: {"kind": name, **entry} if isinstance(entry, dict) and _is_kind(name) else entry
            for name, entry in {"local": {}, **value}.items()
        }

    @field_validator("models", mode="before")
    @classmethod
    def _over_the_catalogue(cls, value: object) -> object:
        if not isinstance(value, dict):
            return value
        catalogue = {name: from_catalogue(entry) for name, entry in CATALOGUE.items()}
        entries = {
            name: {**catalogue.get(name, {}), **entry} if isinstance(entry, dict) else entry
            for name, entry in value.items()
        }
        return {**catalogue, **entries}

    @model_validator(mode="after")
    def _sections_fit(self, info: ValidationInfo) -> "Settings":
        """Refuse what each section may say for itself, and not beside the others."""
        is_inspected = (info.context or {}).get(INSPECTED)
        refuse(
            problem
            for check in (
                *(() if is_inspected else (self._offers_to_a_network,)),
                self._keys_without_variable,
                self._routes_to_nowhere,
                self._passes_to_nobody,
                self._origins_for_clients,
                self._fallbacks_that_cannot_answer,
                self._spaces_described_twice,
            )
            for problem in check()
        )
        return self

    def _offers_to_a_network(self) -> Iterator[Problem]:
        """Yield credit that is offered to a whole network."""
        server = self.server
        if not server.keys and not _is_loopback(server.host) and not _is_there(self.keys_path):
            yield Problem(
                ("server", "host"),
                f"{server.host} can be reached by others: set server.keys, or host 127.0.0.1, or"
                " add a key with `embedding-proxy keys add NAME`",
                needs=(("server", "keys"), ("server", "keys_file"), ("cache", "directory")),
            )

    def _keys_without_variable(self) -> Iterator[Problem]:
        """Yield providers that would be sent the key of another origin, for want of a name."""
        for name, entry in self.providers.items():
            if entry is None or entry.kind == name or entry.api_key_env is not None:
                continue
            if entry.key_variable is not None:
                yield Problem(
                    ("providers", name, "api_key_env"),
                    "is missing; name the variable that holds the key of this provider (OpenAI's"
                    " key is for the provider named openai)",
                    needs=tuple(("providers", name, key) for key in ("kind", "api_key", "key")),
                )

    def _routes_to_nowhere(self) -> Iterator[Problem]:
        """Yield misspelt providers; one of the catalogue's that is not configured is no error."""
        for name, model in self.models.items():
            for i, route in enumerate(model.routes):
                if route.provider not in self.providers and route.provider not in KINDS:
                    yield Problem(
                        ("models", name, "routes", i, "provider"),
                        f"there is no provider {route.provider!r}; known:"
                        f" {', '.join(sorted(self.providers))}"
                        f"{suggestion(route.provider, {*self.providers, *KINDS})}",
                        needs=(("providers", route.provider),),
                    )

    def _passes_to_nobody(self) -> Iterator[Problem]:
        """Yield a misspelt provider, and the local model, which knows nothing but embeddings."""
        if (
            "passthrough" in self.model_fields_set
            and self.passthrough
            and not self.passthrough_provider
        ):
            remote = [n for n, entry in self.providers.items() if entry and entry.kind != "local"]
            yield Problem(
                ("passthrough",),
                f"there is no such provider to pass calls to; known:"
                f" {', '.join(sorted(remote)) or 'none'}; null = nobody"
                f"{suggestion(self.passthrough, remote)}",
                needs=(("providers", self.passthrough, "kind"),),
            )

    def _origins_for_clients(self) -> Iterator[Problem]:
        """Yield a second origin for one key: a client sends one, and it belongs to one."""
        taking = {
            name: provider
            for name, provider in self.providers.items()
            if provider and provider.uses_client_key
        }
        if taking and self.passthrough_auth == "client" and self.passthrough_provider:
            taking[self.passthrough or ""] = self.passthrough_provider
        (first, *others) = taking or [""]
        for other in others:
            if taking[other].origin != taking[first].origin:
                yield Problem(
                    ("providers", first),
                    f"a client sends one key, and it would go to two origins, those of {first} and"
                    f" {other}; let one of them have a key of the proxy's (api_key_env,"
                    " passthrough_auth: provider), or run a second proxy for it",
                    needs=tuple(
                        ("providers", name, key)
                        for name in (first, other)
                        for key in ("kind", "key", "base_url")
                    ),
                )

    def _fallbacks_that_cannot_answer(self) -> Iterator[Problem]:
        for name, model in self.models.items():
            for i, fallback in enumerate(model.fallback):
                other = self.models.get(fallback.model)
                if other is None:
                    near = suggestion(fallback.model, self.models)
                    problem: str | None = f"there is no model of that name{near or '; add it'}"
                else:
                    problem = fallback.objection(model, other)
                if problem is not None:
                    path = ("models", name, "fallback")
                    facts = [
                        ("models", model_name, key)
                        for model_name in (name, fallback.model)
                        for key in ("space", "dimensions", "matryoshka")
                    ]
                    needs = [(*path, i, "model"), ("models", fallback.model)]
                    if other is not None:
                        needs += [(*path, i, "dimension_policy"), *facts]
                    yield Problem(path, f"{fallback.model}: {problem}", needs=tuple(needs))

    def _spaces_described_twice(self) -> Iterator[Problem]:
        """Yield two descriptions of one space: they would disagree about the same records."""
        first: dict[str, tuple[str, ModelConfig]] = {}
        for name, model in self.models.items():
            other, model_before = first.setdefault(model.space, (name, model))
            for key in ("dimensions", "matryoshka"):
                if getattr(model_before, key) != getattr(model, key):
                    yield Problem(
                        ("models", name, key),
                        f"{getattr(model, key)} here, but {getattr(model_before, key)} in"
                        f" models.{other}, of the same space {model.space}; make them equal, or"
                        " give this model a space of its own",
                        needs=tuple(
                            ("models", model_name, fact)
                            for model_name in (name, other)
                            for fact in ("space", key)
                        ),
                    )

    @property
    def keys_path(self) -> Path:
        """The file of clients' keys."""
        return self.server.keys_file or self.cache.directory / keys_file.FILE_NAME

    @property
    def passthrough_provider(self) -> ProviderConfig | None:
        """The provider that other calls are passed to, if it is configured."""
        entry = self.providers.get(self.passthrough or "")
        return None if entry is None or entry.kind == registry.LOCAL else entry

    @property
    def names_providers(self) -> bool:
        """Whether somebody has named the providers; the default ones are there for whoever can."""
        return "providers" in self.model_fields_set


def _is_kind(name: object) -> bool:
    """Tell whether a provider of that name may leave out its kind."""
    if name in KINDS:
        return True
    try:
        return isinstance(name, str) and bool(registry.find(name))
    except registry.UnknownKind:
        return False
