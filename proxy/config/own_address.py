"""Finds a provider whose address is the one that this proxy listens on, before it asks itself.

A loop over other machines or names is found by the requests in it: `proxy.http.loop_guard`.
"""

import ipaddress
import socket
from contextlib import closing, suppress

from embedding_proxy.providers import registry
from yarl import URL

from .loader import ConfigError, Configuration

_Address = ipaddress.IPv4Address | ipaddress.IPv6Address
_LOOPBACK: dict[int, _Address] = {
    4: ipaddress.IPv4Address("127.0.0.1"),
    6: ipaddress.IPv6Address("::1"),
}


def check_own_address(configuration: Configuration) -> None:
    """Raise ConfigError if the base_url of providers is this proxy's own address.

    Host names are resolved only for a provider with the same port.
    """
    problems = []
    settings = configuration.settings
    host, port = settings.server.host, settings.server.port
    for name, entry in settings.providers.items():
        if entry is None or entry.kind == registry.LOCAL:
            continue
        url = URL(entry.as_profile().base_url or "")
        if url.port == port and url.host and _is_own(url.host, host):
            message = (
                f"is the address that this proxy listens on (port {port}), so it would ask itself;"
                " set the upstream's own address, or another server.port"
            )
            problems.append(configuration.problem(("providers", name, "base_url"), message))
    if problems:
        raise ConfigError(*problems)


def _is_own(host: str, listening: str) -> bool:
    """Tell whether a connection to `host` reaches a server that listens on `listening`."""
    taken = _resolve(listening)
    for address in _resolve(host):
        # To connect to 0.0.0.0 is to connect to this machine.
        reached = _LOOPBACK[address.version] if address.is_unspecified else address
        if reached in taken:
            return True
        if any(own.is_unspecified for own in taken) and _is_local(reached):
            return True
    return False


def _resolve(host: str) -> set[_Address]:
    """Return the addresses of a host; none if it has none, for then nothing is reached there."""
    with suppress(ValueError):
        return {ipaddress.ip_address(host)}
    if host == "localhost" or host.endswith(".localhost"):
        return set(_LOOPBACK.values())
    with suppress(OSError, UnicodeError):
        infos = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
        return {ipaddress.ip_address(str(info[4][0]).partition("%")[0]) for info in infos}
    return set()


def _is_local(address: _Address) -> bool:
    """Tell whether an address is one of this machine's: only those can be bound."""
    if address.is_loopback:
        return True
    family = socket.AF_INET if address.version == 4 else socket.AF_INET6
    with suppress(OSError), closing(socket.socket(family, socket.SOCK_STREAM)) as probe:
        probe.bind((str(address), 0))
        return True
    return False
