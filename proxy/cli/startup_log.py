"""What the log says at a start: the version, the cache, and which providers can be asked."""

import logging
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

from embedding_proxy.cache.maintenance.stats import read_size
from embedding_proxy.providers import descriptors, local, registry
from embedding_proxy.proxy.config.keys_file import KeysFile
from embedding_proxy.proxy.config.loader import ConfigError, Configuration
from embedding_proxy.proxy.config.own_address import check_own_address
from embedding_proxy.proxy.config.schema import Settings
from embedding_proxy.proxy.http import tls
from embedding_proxy.proxy.http.auth import read_keys
from embedding_proxy.proxy.service.provider_factory import check_network, key_of
from embedding_proxy.proxy.service.storage import GIB

from .formatting import count, size
from .output import WorkFailed, path_text

log = logging.getLogger("embedding_proxy.start")

MIN_OPEN_FILES = 48
"""With fewer, a proxy may run out of them amid its first requests."""


def check_open_files() -> None:
    """Raise the limit on open files as far as it goes. Raises WorkFailed if that is too low."""
    descriptors.raise_limit()
    allowed = descriptors.limit()
    if allowed < MIN_OPEN_FILES:
        raise WorkFailed(
            f"the limit on open files (ulimit -n) is {allowed}, and the proxy needs at least"
            f" {MIN_OPEN_FILES}; raise it, and start again"
        )


def check_environment(configuration: Configuration) -> None:
    """Raise ConfigError with all that is wrong beside the file: keys, proxies, the own address."""
    problems: list[str] = []
    for check in (check_own_address, _check_keys):
        try:
            check(configuration)
        except ConfigError as error:
            problems += error.problems
    settings = configuration.settings
    if settings.server.tls is not None and (found := tls.problem(settings.server.tls)) is not None:
        key, message = found
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
    """Raise ConfigError for a file of clients' keys that is named and lacks, or has mistakes."""
    settings = configuration.settings
    if read_keys(KeysFile(settings.keys_path)) is None and settings.server.keys_file is not None:
        missing = "there is no such file; make it with `embedding-proxy keys add NAME`"
        raise ConfigError(configuration.problem(("server", "keys_file"), missing))


def report(settings: Settings, url: str, file: Path | None = None) -> None:
    """Say it, once the proxy answers requests at a base URL. `file` is that of the settings."""
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
    named = [name for name in settings.providers if not _is_local(settings, name)]
    if named and not remote:
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
    held = read_size(cache.directory)
    if held is None:
        return f"cache: {path_text(cache.directory)}: cannot be read; at most {limit}"
    return (
        f"cache: {path_text(cache.directory)}: {count(held.entries, 'entry', 'entries')},"
        f" {size(held.file_bytes)} of at most {limit}"
    )


def _ready(settings: Settings) -> Iterator[str]:
    """Yield the providers that can be asked."""
    for name, entry in settings.providers.items():
        if entry is None:
            continue
        if entry.kind == registry.LOCAL:
            if local.is_installed():
                yield name
        elif entry.key_variable is None or key_of(settings, name):
            yield name


def _is_local(settings: Settings, name: str) -> bool:
    """Tell whether a provider is no remote one: disabled, or in this process."""
    entry = settings.providers[name]
    return entry is None or entry.kind == registry.LOCAL
