"""The types of values in a configuration, and the base class of its sections.

No message about an address repeats it: a key may have been pasted into it.
"""

import ipaddress
import re
import ssl
from pathlib import Path
from typing import Annotated, Literal, TypeAlias
from urllib.parse import SplitResult, urlsplit

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationInfo,
)
from yarl import URL

from . import references

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
_EXPECTED_ADDRESS = "expected an address like https://host/v1"
_ENDPOINTS = (
    "/embeddings",
    "/chat/completions",
    "/completions",
    "/responses",
    "/models",
)
_HOST = re.compile(r"[^\x00-\x20!\"#$%&'()*+,/:;<=>?@\[\\\]^`{|}~]+")


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


def http_url(value: str) -> str:
    """Return the address of an HTTP server as it is. Raises ValueError with a remedy.

    >>> http_url("http://[::1]:8000/v1")
    'http://[::1]:8000/v1'
    """
    parts = _parse(value)
    if "@" in parts.netloc:
        raise ValueError(
            f"{_EXPECTED_ADDRESS}, without user and password; a key goes into the variable that"
            " api_key_env names"
        )
    if "?" in value:
        raise ValueError(f"{_EXPECTED_ADDRESS}, without a query string (from ? on)")
    if "#" in value:
        raise ValueError(f"{_EXPECTED_ADDRESS}, without a fragment (from # on)")
    return value


def base_url(value: str) -> str:
    """Return the address of a provider unchanged. Raises ValueError with a remedy.

    An address that ends in an endpoint is refused, because the proxy appends `/embeddings` itself.
    """
    parts = _parse(value)
    if "@" not in parts.netloc:
        path = parts.path.rstrip("/").lower()
        for end in _ENDPOINTS:
            if path.endswith(end):
                raise ValueError(
                    f"ends in {end}, which is probably a mistake: the proxy appends the path of"
                    f" the call; write it without {end}"
                )
    if "?" in value and "api-version=" in value:
        raise ValueError(
            f"{_EXPECTED_ADDRESS}, without a query string; the version of Azure's API goes into"
            " options: {api_version: …}"
        )
    return http_url(value)


def proxy_url(value: str) -> str:
    """Return the address of an HTTP proxy unchanged, with its credentials.

    Raises ValueError with a remedy.
    """
    expected = "expected the address of an HTTP proxy like http://user:password@host:3128"
    scheme = value.partition("://")[0].lower()
    if scheme.startswith("socks"):
        raise ValueError(f"{expected}; SOCKS is not supported")
    if "://" not in value:
        raise ValueError(f"{expected}; it has no http://")
    try:
        parts = _parse(value)
    except ValueError as error:
        raise ValueError(str(error).replace(_EXPECTED_ADDRESS, expected)) from None
    if parts.path not in ("", "/") or "?" in value or "#" in value:
        raise ValueError(
            f"{expected}, without a path; a sign such as / # ? @ in a password is written %2F %23"
            " %3F %40"
        )
    user, _, password = parts.netloc.rpartition("@")[0].partition(":")
    if not (user + password).isascii():
        raise ValueError(f"{expected}; write a sign that is not ASCII as %XX")
    return value


def _parse(value: str) -> SplitResult:
    """Return the parts of an address with a usable host and port. Raises ValueError."""
    if not re.match(r"https?://", value, re.IGNORECASE):
        raise ValueError(_EXPECTED_ADDRESS)
    if re.search(r"[\x00-\x20\x7f\\]", value):
        raise ValueError(f"{_EXPECTED_ADDRESS}, without spaces, line breaks and backslashes")
    authority = re.split(r"[/?#]", value.partition("://")[2], maxsplit=1)[0]
    host_and_port = authority.rpartition("@")[2]
    if host_and_port.startswith("["):
        host, bracket, port = host_and_port[1:].partition("]")
        if not bracket or not _is_ipv6(host) or (port and not port.startswith(":")):
            raise ValueError(
                f"{_EXPECTED_ADDRESS}; an IPv6 address is written http://[::1]:8000/v1"
            )
        colon, port = port[:1], port[1:]
    else:
        host, colon, port = host_and_port.partition(":")
        if "[" in host_and_port or "]" in host_and_port or ":" in port:
            raise ValueError(
                f"{_EXPECTED_ADDRESS}; an IPv6 address is written http://[::1]:8000/v1"
            )
        if not host:
            raise ValueError(f"{_EXPECTED_ADDRESS}; its host is missing")
        if not _HOST.fullmatch(host):
            raise ValueError(f"{_EXPECTED_ADDRESS}; its host holds a sign that no host name has")
    if colon and not (port.isascii() and port.isdigit() and 1 <= int(port[:6]) <= 65535):
        raise ValueError(f"{_EXPECTED_ADDRESS}; its port is no number from 1 to 65535")
    try:
        # The library that will use the address decides.
        URL(value).port  # noqa: B018 - to see whether it can be had
        return urlsplit(value)
    except ValueError:
        raise ValueError(_EXPECTED_ADDRESS) from None


def _is_ipv6(host: str) -> bool:
    try:
        ipaddress.IPv6Address(host)
    except ValueError:
        return False
    return True


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
HttpUrl = Annotated[str, AfterValidator(http_url)]
BaseUrl = Annotated[str, AfterValidator(base_url)]
ProxyUrl = Annotated[str, AfterValidator(proxy_url)]


class Section(BaseModel):
    """A part of the configuration; knows its keys and refuses others."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        protected_namespaces=(),
        # A value may be a key, so no message and no traceback holds it.
        hide_input_in_errors=True,
    )
