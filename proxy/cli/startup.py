"""The start of `serve`: what is checked before it, and what the log says after it.

Checked are open files, the providers' and clients' keys, proxies, certificates, and that no
provider's address is the proxy's own (a loop over other machines or names is found by the requests
in it: `proxy.http.loop_guard`). The log names the version, the configuration, the cache, and the
providers that are ready.
"""

import ipaddress
import logging
import socket
from collections.abc import Iterator
from contextlib import closing, suppress
from importlib import metadata
from pathlib import Path

from embedding_proxy.cache.maintenance.stats import read_size
from embedding_proxy.providers import descriptors, local, registry
from embedding_proxy.proxy.config.keys_file import KeysFile
from embedding_proxy.proxy.config.loader import ConfigError, Configuration
from embedding_proxy.proxy.config.schema import Settings
from embedding_proxy.proxy.http import tls
from embedding_proxy.proxy.http.auth import read_keys
from embedding_proxy.proxy.service.provider_factory import check_network, key_of
from embedding_proxy.proxy.service.storage import GIB
from yarl import URL

from .formatting import count, size
from .output import WorkFailed, path_text

log = logging.getLogger("embedding_proxy.start")

MIN_OPEN_FILES = 48
"""With fewer file descriptors, the first requests of a proxy may fail."""
_Address = ipaddress.IPv4Address | ipaddress.IPv6Address
_LOOPBACK: dict[int, _Address] = {
    4: ipaddress.IPv4Address("127.0.0.1"),
    6: ipaddress.IPv6Address("::1"),
}


def check_open_files() -> None:
    """Raise the limit on open files to its maximum. Raises WorkFailed if that is too low."""
    descriptors.raise_limit()
    allowed = descriptors.limit()
    if allowed < MIN_OPEN_FILES:
        raise WorkFailed(
            f"the limit on open files (ulimit -n) is {allowed}, and the proxy needs at least"
            f" {MIN_OPEN_FILES}; raise it, and start again"
        )


def check_environment(configuration: Configuration) -> None:
    """Raise ConfigError for all faults outside the file: keys, proxies, the own address."""
    problems: list[str] = []
    for check in (check_own_address, _check_keys):
        try:
            check(configuration)
        except ConfigError as error:
            problems += error.problems
    settings = configuration.settings
    if (
        settings.server.tls is not None
        and (problem := tls.problem(settings.server.tls)) is not None
    ):
        key, message = problem
        problems.append(configuration.problem(("server", "tls", *filter(None, [key])), message))
    providers = {} if settings.cache.mode == "frozen" else settings.providers
    for name, entry in providers.items():
        if entry is None or entry.kind == registry.LOCAL:
            continue
        try:
            if not key_of(settings, name) and entry.key_variable:
                continue
        except ConfigError as error:
            problems += error.problems
        try:
            check_network(settings, name)
        except ConfigError as error:
            problems += error.problems
    if problems:
        raise ConfigError(*dict.fromkeys(problems))


def _check_keys(configuration: Configuration) -> None:
    """Raise ConfigError if the named file of clients' keys is missing or has mistakes."""
    settings = configuration.settings
    if read_keys(KeysFile(settings.keys_path)) is None and settings.server.keys_file is not None:
        message = "there is no such file; make it with `embedding-proxy keys add NAME`"
        raise ConfigError(configuration.problem(("server", "keys_file"), message))


def report(settings: Settings, url: str, file: Path | None = None) -> None:
    """Log it, when the proxy answers requests at a base URL. `file` is that of the settings."""
    log.info("embedding-proxy %s", metadata.version("embedding-proxy"))
    log.info("configuration: %s", "built in" if file is None else path_text(file.absolute()))
    log.info("%s", _cache_line(settings))
    root = url.removesuffix("/v1")
    log.info("status: %s/status, metrics: %s/metrics", root, root)
    if settings.cache.mode == "frozen":
        return
    ready = list(_ready(settings))
    log.info("providers ready: %s", ", ".join(ready) or "none")
    remote = [name for name in ready if not _is_local(settings, name)]
    remote_names = [name for name in settings.providers if not _is_local(settings, name)]
    if remote_names and not remote:
        entries = (entry for entry in settings.providers.values() if entry is not None)
        variables = dict.fromkeys(
            provider.key_variable for provider in entries if provider.key_variable
        )
        log.warning(
            "no remote provider is ready, so an input that is not in the cache is answered with an"
            " error%s; set %s and start again",
            " unless its model is local" if ready else "",
            " or ".join(variables),
        )


def _cache_line(settings: Settings) -> str:
    cache = settings.cache
    limit = size(cache.size_limit_gib * GIB)
    store_size = read_size(cache.directory)
    if store_size is None:
        return f"cache: {path_text(cache.directory)}: cannot be read; at most {limit}"
    return (
        f"cache: {path_text(cache.directory)}: {count(store_size.entries, 'entry', 'entries')},"
        f" {size(store_size.file_bytes)} of at most {limit}"
    )


def _ready(settings: Settings) -> Iterator[str]:
    """Yield the providers that can be called."""
    for name, entry in settings.providers.items():
        if entry is None:
            continue
        if entry.kind == registry.LOCAL:
            if local.is_installed():
                yield name
        elif entry.key_variable is None or key_of(settings, name):
            yield name


def _is_local(settings: Settings, name: str) -> bool:
    """Tell whether a provider is not remote: disabled, or in this process."""
    entry = settings.providers[name]
    return entry is None or entry.kind == registry.LOCAL


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
    own_addresses = _resolve(listening)
    for address in _resolve(host):
        # To connect to 0.0.0.0 is to connect to this machine.
        reached = _LOOPBACK[address.version] if address.is_unspecified else address
        if reached in own_addresses:
            return True
        if any(own.is_unspecified for own in own_addresses) and _is_of_this_machine(reached):
            return True
    return False


def _resolve(host: str) -> set[_Address]:
    """Return the addresses of a host; none if it has none, because nothing is reached then."""
    with suppress(ValueError):
        return {ipaddress.ip_address(host)}
    if host == "localhost" or host.endswith(".localhost"):
        return set(_LOOPBACK.values())
    with suppress(OSError, UnicodeError):
        infos = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
        return {ipaddress.ip_address(str(info[4][0]).partition("%")[0]) for info in infos}
    return set()


def _is_of_this_machine(address: _Address) -> bool:
    """Tell whether an address is one of this machine's: only those can be bound."""
    if address.is_loopback:
        return True
    family = socket.AF_INET if address.version == 4 else socket.AF_INET6
    with suppress(OSError), closing(socket.socket(family, socket.SOCK_STREAM)) as probe:
        probe.bind((str(address), 0))
        return True
    return False
