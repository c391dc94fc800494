"""The types of values in a configuration, and what every section of one does."""

import re
import ssl
from pathlib import Path
from typing import Annotated, Literal, TypeAlias

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationInfo,
)

from . import addresses, references

Mode: TypeAlias = Literal["normal", "frozen", "refresh", "off"]
"""`cache.mode`: what may be bought, and what is read from the cache."""
MODES: dict[Mode, str] = {
    "normal": "what is not cached is bought, once",
    "frozen": "nothing is bought; what is not cached is an error",
    "refresh": "everything is bought anew, and replaced in the cache",
    "off": "everything is bought; nothing is read from the cache or kept in it",
}
Honor: TypeAlias = Literal["admin"] | bool
"""`server.honor_cache_control`: whether a request's header counts, or only that of an admin."""
FOLDER = "folder"
"""In the context of a validation: the folder of the file (see `references.absolute_path`).
Without it relative paths are below the working directory."""
INSPECTED = "inspected"
"""In the context of a validation: whether the command calls no provider, so that files for calls
may be missing."""


def _no_bool(value: object) -> object:
    if isinstance(value, bool):
        raise ValueError("expected a number")  # noqa: TRY004 - pydantic reports ValueErrors
    return value


def _off(value: object) -> object:
    """Replace YAML's `off`, which it reads as false, by the word."""
    return "off" if value is False else value


def _web_origin(value: str) -> str:
    if value != "*" and not re.fullmatch(r"[a-z][a-z0-9+.-]*://[^/\s?#@*]+", value):
        raise ValueError("expected an origin like https://app.example.com, or *")
    return value


def _absolute(value: object, info: ValidationInfo) -> object:
    if not isinstance(value, str | Path):
        return value
    context = info.context or {}
    return references.absolute_path(value, context.get(FOLDER, Path()))


def _host_name(value: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9_.-]+|\[?[0-9A-Fa-f:.]+\]?", value):
        raise ValueError("expected a host name like proxy.example.com, without scheme and port")
    return value


def _holds_certificates(value: Path, info: ValidationInfo) -> Path:
    """Return the path of a file with certificates. Raises ValueError.

    A command that calls no provider does not need the file.
    """
    if (info.context or {}).get(INSPECTED):
        return value
    remedy = "expected a PEM file with the certificate of your CA (BEGIN CERTIFICATE)"
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(cafile=value)
    except ssl.SSLError as error:
        raise ValueError(f"holds no certificate; {remedy}") from error
    except OSError as error:
        raise ValueError(f"{value}: cannot be read: {error.strerror}; {remedy}") from error
    return value


def _host_and_port(value: str) -> str:
    host, _, port = value.rpartition(":")
    if not (host and port.isascii() and port.isdigit() and int(port) < 1 << 16):
        raise ValueError("expected an address like 127.0.0.1:9100 or [::1]:9100")
    return f"{_host_name(host)}:{int(port)}"


CacheMode = Annotated[Mode, BeforeValidator(_off)]
Number = Annotated[float, BeforeValidator(_no_bool), Field(allow_inf_nan=False)]
Whole = Annotated[int, BeforeValidator(_no_bool)]
Name = Annotated[str, Field(min_length=1)]
ProviderName = Annotated[str, Field(pattern=r"^[A-Za-z0-9._-]+$")]
VariableName = Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")]
WebOrigin = Annotated[str, AfterValidator(_web_origin)]
FilePath = Annotated[Path, BeforeValidator(_absolute)]
"""An absolute path, from the path in the file."""
CertificateFile = Annotated[FilePath, AfterValidator(_holds_certificates)]
HostName = Annotated[str, AfterValidator(_host_name)]
HostPort = Annotated[str, AfterValidator(_host_and_port)]
"""A host, and a port behind a colon; IPv6 in brackets."""
HttpUrl = Annotated[str, AfterValidator(addresses.http_url)]
BaseUrl = Annotated[str, AfterValidator(addresses.base_url)]
ProxyUrl = Annotated[str, AfterValidator(addresses.proxy_url)]


class Section(BaseModel):
    """A part of the configuration; knows its keys and refuses others."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        protected_namespaces=(),
        # A value may be a key, so no message and no traceback holds it.
        hide_input_in_errors=True,
    )
