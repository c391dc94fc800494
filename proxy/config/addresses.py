"""Checks of the addresses in a configuration: what is wrong with one, and what to write instead.

No message repeats a value: a key may have been pasted into it.
"""

import ipaddress
import re
from urllib.parse import SplitResult, urlsplit

from yarl import URL

EXPECTED = "expected an address like https://host/v1"
_ENDPOINTS = (
    "/embeddings",
    "/chat/completions",
    "/completions",
    "/responses",
    "/models",
)
_HOST = re.compile(r"[^\x00-\x20!\"#$%&'()*+,/:;<=>?@\[\\\]^`{|}~]+")


def http_url(value: str) -> str:
    """Return the address of an HTTP server as it is. Raises ValueError with a remedy.

    >>> http_url("http://[::1]:8000/v1")
    'http://[::1]:8000/v1'
    """
    parts = _parse(value)
    if "@" in parts.netloc:
        raise ValueError(
            f"{EXPECTED}, without user and password; a key goes into the variable that api_key_env"
            " names"
        )
    if "?" in value:
        raise ValueError(f"{EXPECTED}, without a query string (from ? on)")
    if "#" in value:
        raise ValueError(f"{EXPECTED}, without a fragment (from # on)")
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
            f"{EXPECTED}, without a query string; the version of Azure's API goes into"
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
        raise ValueError(str(error).replace(EXPECTED, expected)) from None
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
        raise ValueError(EXPECTED)
    if re.search(r"[\x00-\x20\x7f\\]", value):
        raise ValueError(f"{EXPECTED}, without spaces, line breaks and backslashes")
    authority = re.split(r"[/?#]", value.partition("://")[2], maxsplit=1)[0]
    host_and_port = authority.rpartition("@")[2]
    if host_and_port.startswith("["):
        host, bracket, port = host_and_port[1:].partition("]")
        if not bracket or not _is_ipv6(host) or (port and not port.startswith(":")):
            raise ValueError(f"{EXPECTED}; an IPv6 address is written http://[::1]:8000/v1")
        colon, port = port[:1], port[1:]
    else:
        host, colon, port = host_and_port.partition(":")
        if "[" in host_and_port or "]" in host_and_port or ":" in port:
            raise ValueError(f"{EXPECTED}; an IPv6 address is written http://[::1]:8000/v1")
        if not host:
            raise ValueError(f"{EXPECTED}; its host is missing")
        if not _HOST.fullmatch(host):
            raise ValueError(f"{EXPECTED}; its host holds a sign that no host name has")
    if colon and not (port.isascii() and port.isdigit() and 1 <= int(port[:6]) <= 65535):
        raise ValueError(f"{EXPECTED}; its port is no number from 1 to 65535")
    try:
        # The library that will use the address decides.
        URL(value).port  # noqa: B018 - to see whether it can be had
        return urlsplit(value)
    except ValueError:
        raise ValueError(EXPECTED) from None


def _is_ipv6(host: str) -> bool:
    try:
        ipaddress.IPv6Address(host)
    except ValueError:
        return False
    return True
