"""Whether the providers of a configuration can be used: without one, every cache miss fails."""

from collections.abc import Collection, Iterable, Iterator, Mapping

from embedding_proxy.providers import kinds
from embedding_proxy.proxy.config import Configuration
from embedding_proxy.proxy.embedding.opening import CLIENTS_PAY
from embedding_proxy.proxy.settings.schema import Settings

from .candidates import ProviderStatus


def unusable(
    configuration: Configuration, standings: Mapping[str, ProviderStatus]
) -> Iterator[str]:
    """Yield a problem for each provider that the file names in vain, and for want of any.

    With `cache.mode: frozen` no provider is asked, so none has to be usable.
    """
    settings = configuration.settings
    if settings.cache.mode == "frozen":
        return
    usable = {name for name, one in standings.items() if _answers(one)}
    leading = {
        route.provider for model in settings.models.values() for route in model.routes
    } & usable
    in_vain = list(_in_vain(configuration, standings, usable, leading))
    if in_vain:
        yield from in_vain
    elif not leading:
        yield (
            "no provider can be asked: every input that is not in the cache is answered with an"
            f" error{_reasons(standings)}"
        )
    elif not _has_remote(settings, leading) and not _is_local_by_choice(configuration):
        yield (
            "no remote provider can be asked: every input that is not in the cache is answered"
            f" with an error, but for those of the local model{_reasons(standings)}"
        )


def _in_vain(
    configuration: Configuration,
    standings: Mapping[str, ProviderStatus],
    usable: Collection[str],
    leading: Collection[str],
) -> Iterator[str]:
    """Yield a problem for each provider that the file names and no request can reach."""
    for name in configuration.providers:
        why = standings[name].why
        if name not in usable:
            yield configuration.problem(("providers", name), f"this provider is skipped: {why}")
        elif name not in leading and configuration.settings.passthrough != name:
            yield configuration.problem(("providers", name), f"is never asked: {why}")


def _answers(standing: ProviderStatus) -> bool:
    """Tell whether requests may be answered by a provider."""
    return standing.state == "usable" or standing.why == CLIENTS_PAY


def _has_remote(settings: Settings, names: Iterable[str]) -> bool:
    entries = (settings.providers[name] for name in names)
    return any(entry is not None and entry.kind != kinds.LOCAL for entry in entries)


def _is_local_by_choice(configuration: Configuration) -> bool:
    """Tell whether the file names providers, and no remote one among them."""
    is_chosen = configuration.file is not None and configuration.settings.names_providers
    return is_chosen and not _has_remote(configuration.settings, configuration.providers)


def _reasons(standings: Mapping[str, ProviderStatus]) -> str:
    """Return why providers cannot be asked, with the remedies."""
    skipped = [f"{name}: {one.why}" for name, one in standings.items() if one.state == "skipped"]
    return f" ({'; '.join(skipped)})" if skipped else "; add a provider to `providers`"
