"""What a configuration may say of one provider: which kind it is, and how it differs from it."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from embedding_proxy.providers import registry
from embedding_proxy.providers.openai_compatible import HttpProvider
from embedding_proxy.providers.profile import Profile
from embedding_proxy.providers.upstream.hops import HEADER as HOP_HEADER
from embedding_proxy.proxy import request_fields
from pydantic import Field, field_validator, model_validator

from .errors import Problem, is_plain_name, refuse, suggestion
from .fields import (
    BaseUrl,
    CertificateFile,
    Name,
    Number,
    ProxyUrl,
    Section,
    VariableName,
    Whole,
    base_url,
)

MAX_RETRIES = 100
_COUNT = Field(ge=1, le=10**9)

# What the transport and HTTP itself say is not the operator's to change; the key has its own way.
_KEY_HEADERS = {"authorization", "api-key", "x-api-key", "proxy-authorization", "cookie"}
_OWN_HEADERS = {
    *_KEY_HEADERS,
    "content-type",
    "content-length",
    "content-encoding",
    "accept-encoding",
    "transfer-encoding",
    "connection",
    "host",
    HOP_HEADER,
}

# Keys of the configuration, and the fields of Timeouts they set.
TIMEOUTS = {
    "timeout_s": "total_s",
    "connect_timeout_s": "connect_s",
    "first_byte_timeout_s": "first_byte_s",
    "min_bytes_per_s": "min_bytes_per_s",
    "min_rate_window_s": "min_rate_window_s",
}
# Keys that say how an upstream is reached: the fields of Network.
NETWORK = ("proxy", "trust_env", "ca_file")
# Keys that override the field of a profile of the same name, null included.
_FIELDS = ("encoding_format", "accepts_tokens", "dimensions_field", "forward_user", "unit_norm")


class LimitsConfig(Section):
    """The limits of a provider. A missing value is that of its kind."""

    inputs: Annotated[Whole, _COUNT] = 2048
    tokens: Annotated[Whole, _COUNT] | None = 300_000
    concurrency: Annotated[Whole, Field(ge=1, le=10_000)] = 8
    requests_per_minute: Annotated[Whole, _COUNT] | None = None
    tokens_per_minute: Annotated[Whole, _COUNT] | None = None
    from_headers: bool = True


class ProviderConfig(Section):
    """One provider. The defaults here are OpenAI's; a missing key has the value of its kind."""

    kind: Name
    base_url: BaseUrl | None = None
    api_key_env: VariableName | None = None
    auth: Literal["client"] | None = None
    share_cache: bool = False
    proxy: Annotated[ProxyUrl | None, Field(repr=False)] = None
    trust_env: bool = False
    ca_file: CertificateFile | None = None
    timeout_s: Annotated[Number, Field(gt=0)] = 60
    connect_timeout_s: Annotated[Number, Field(gt=0)] = 10
    first_byte_timeout_s: Annotated[Number, Field(gt=0)] | None = None
    min_bytes_per_s: Annotated[Number, Field(ge=0)] = 100
    min_rate_window_s: Annotated[Number, Field(gt=0)] = 15
    retries: Annotated[Whole, Field(ge=0, le=MAX_RETRIES)] | None = None
    limits: LimitsConfig = LimitsConfig()
    encoding_format: Literal["base64", "float"] | None = "base64"
    accepts_tokens: bool = True
    dimensions_field: Name | None = "dimensions"
    forward_user: bool = True
    extra_fields: tuple[Name, ...] | None = None
    neutral_fields: tuple[Name, ...] = ()
    unit_norm: bool = False
    headers: Annotated[dict[str, str], Field(repr=False)] = Field(default_factory=dict)
    options: dict[str, object] = Field(default_factory=dict)

    @model_validator(mode="before")
    @classmethod
    def _no_key_in_file(cls, value: object) -> object:
        if isinstance(value, dict):
            refuse(_keys_in_file(value))
        return value

    @field_validator("kind")
    @classmethod
    def _check_kind(cls, value: str) -> str:
        if value != registry.LOCAL:
            try:
                registry.find(value)
            except registry.UnknownKind as error:
                near = suggestion(value, (*registry.KINDS, registry.LOCAL))
                raise ValueError(f"{error}{near}") from error
        return value

    @field_validator("neutral_fields")
    @classmethod
    def _fit_to_send(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        unfit = (request_fields.neutral_field_problem([name]) for name in value)
        refuse(Problem((), f"{problem}; remove it") for problem in unfit if problem is not None)
        return value

    @field_validator("headers")
    @classmethod
    def _plain_headers(cls, value: dict[str, str]) -> dict[str, str]:
        refuse(_wrong_headers(value))
        return value

    @model_validator(mode="after")
    def _fits_its_kind(self) -> "ProviderConfig":
        """Refuse options that the kind does not know, and a missing address."""
        refuse(self._misfits())
        return self

    def _misfits(self) -> Iterator[Problem]:
        """Yield the problems of keys that exclude each other."""
        if self.kind == registry.LOCAL:
            for name in sorted(self.model_fields_set - {"kind", "timeout_s"}):
                yield Problem(
                    (name,), f"the local model has no {name}; remove it", needs=(("kind",),)
                )
            return
        profile = registry.find(self.kind).profile
        yield from self._misfits_of_the_clients_key()
        for name in self.options:
            if name not in profile.options:
                options = ", ".join(sorted(profile.options)) or "none"
                yield Problem(
                    ("options", name),
                    f"unknown option; known to this kind: {options}",
                    hides_name=not is_plain_name(name),
                    needs=(("kind",),),
                )
        if self.base_url is None and profile.base_url is None:
            yield Problem(
                ("base_url",),
                "is missing; this kind has no address of its own",
                needs=(("kind",),),
            )
        elif self.base_url is None and self.kind not in registry.KINDS:
            try:
                base_url(profile.base_url or "")
            except ValueError as error:
                yield Problem(
                    ("kind",), f"its base_url: {error}; give this provider one of its own"
                )
        if self.proxy is not None and self.trust_env:
            yield Problem(
                ("trust_env",),
                "proxy and trust_env exclude each other: name the proxy, or take that of the"
                " environment",
                needs=(("proxy",),),
            )

    def _misfits_of_the_clients_key(self) -> Iterator[Problem]:
        """Yield the problems of keys that exclude a client's key, or need one."""
        if not self.uses_client_key:
            if self.share_cache:
                yield Problem(
                    ("share_cache",),
                    "is for auth: client; other entries are shared in any case",
                    needs=(("auth",),),
                )
            return
        if self.api_key_env is not None:
            yield Problem(
                ("auth",),
                "auth: client and api_key_env exclude each other: the key is the client's own, or"
                " that of the variable; remove one of them",
                needs=(("api_key_env",),),
            )
        adapter = registry.find(self.kind).adapter
        if not (isinstance(adapter, type) and issubclass(adapter, HttpProvider)):
            yield Problem(
                ("auth",),
                f"auth: client is for kinds that send a key over HTTP; {self.kind} does not say so:"
                " name a variable in api_key_env, or leave it out",
                needs=(("kind",),),
            )

    @property
    def uses_client_key(self) -> bool:
        """Whether it is called with each client's own key."""
        return self.auth == "client"

    @property
    def origin(self) -> str:
        """Where it is: scheme, host and port; keys are sent there and nowhere else.

        >>> ProviderConfig(kind="openai", base_url="https://API.openai.com:443/v1").origin
        'https://api.openai.com:443'
        """
        parts = urlsplit(self.as_profile().base_url or "")
        port = parts.port or {"https": 443, "http": 80}.get(parts.scheme, 0)
        return f"{parts.scheme}://{parts.hostname}:{port}"

    @property
    def key_variable(self) -> str | None:
        """The variable that holds this provider's key; None if it needs none."""
        if self.kind == registry.LOCAL or self.uses_client_key:
            return None
        return self.api_key_env or registry.find(self.kind).profile.api_key_env

    def as_profile(self) -> Profile:
        """Return the profile of the kind, with the values of this entry."""
        profile = registry.find(self.kind).profile
        keys = self.model_fields_set
        fields = {name: getattr(self, name) for name in _FIELDS if name in keys}
        if "extra_fields" in keys:
            extra_fields = self.extra_fields
            fields["extra_fields"] = None if extra_fields is None else frozenset(extra_fields)
        neutral = self.neutral_fields if "neutral_fields" in keys else profile.neutral_fields
        # A neutral field that is declared as an extra one is sent, and stays neutral.
        fields["neutral_fields"] = frozenset(
            (*neutral, *filter(request_fields.is_neutral, self.extra_fields or ()))
        )
        limits = {name: getattr(self.limits, name) for name in self.limits.model_fields_set}
        network = {key: getattr(self, key) for key in NETWORK if key in keys}
        if self.ca_file is not None:
            network["ca_file"] = str(self.ca_file)
        times = {field: getattr(self, key) for key, field in TIMEOUTS.items() if key in keys}
        return replace(
            profile,
            base_url=self.base_url or profile.base_url,
            api_key_env=self.key_variable,
            by_client=self.uses_client_key,
            limits=replace(profile.limits, **limits),
            timeouts=replace(profile.timeouts, **times),
            network=replace(profile.network, **network),
            headers={**_without(profile.headers, self.headers), **self.headers},
            options={**profile.options, **self.options},
            **fields,
        )


def _keys_in_file(entry: Mapping[Any, Any]) -> Iterator[Problem]:
    """Yield the keys of an entry that hold a secret, or seem to hold one."""
    remedy = "a key does not belong in the file: name its variable in api_key_env"
    for name in ("api_key", "key"):
        if name in entry:
            yield Problem((name,), remedy)
    if entry.get("auth") not in (None, "client"):
        yield Problem(("auth",), f"expected client, or nothing; {remedy}")


def _wrong_headers(headers: Mapping[str, str]) -> Iterator[Problem]:
    """Yield headers that cannot be sent, or that the operator must not set."""
    for name, content in headers.items():
        if not re.fullmatch(r"[A-Za-z0-9!#$%&'*+.^_`|~-]+", name):
            yield Problem((), "holds something that is no name of a header; remove it")
        elif name.lower() in _OWN_HEADERS:
            yield Problem((name,), f"{name} is not to be set here; {_header_remedy(name.lower())}")
        elif not (content.isascii() and content.isprintable()):
            yield Problem(
                (name,),
                f"{name}: its value holds a line break or the like; write it as plain ASCII",
            )


def _header_remedy(name: str) -> str:
    if name in _KEY_HEADERS:
        return "a key goes into api_key_env"
    if name == "host":
        return "it is the host of base_url: set that, and remove this"
    return "the proxy sets it itself: remove it"


def _without(headers: Mapping[str, str], others: Mapping[str, str]) -> dict[str, str]:
    """Return the headers whose names, in any case, are not among the others."""
    names = {name.lower() for name in others}
    return {name: value for name, value in headers.items() if name.lower() not in names}
