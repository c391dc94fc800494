"""Which models are asked for with the client's own key, and what the configuration says of it."""

from collections.abc import Container
from dataclasses import dataclass

from embedding_proxy.proxy.settings.model_entry import ModelConfig
from embedding_proxy.proxy.settings.schema import Settings


@dataclass(frozen=True, slots=True)
class ByClient:
    """That a model is asked for with the client's own key."""

    model: str
    space: str
    providers: tuple[str, ...]
    """Those that are asked with it; all of one origin."""
    origin: str
    share: bool
    """Whether what one key has bought is served to others."""
    others: bool
    """Whether the model has routes that need no client's key."""


def by_client(
    settings: Settings, name: str, entry: ModelConfig, usable: Container[str]
) -> ByClient | None:
    """Return how a model is asked for with clients' keys; None if it is not.

    `usable` are the names of the providers that can be asked.
    """
    routes = {route.provider: settings.providers.get(route.provider) for route in entry.routes}
    asked = {name: one for name, one in routes.items() if one is not None and one.by_client}
    if not asked:
        return None
    return ByClient(
        model=name,
        space=entry.space,
        providers=tuple(asked),
        origin=next(one.origin for one in asked.values()),
        share=all(one.share for one in asked.values()),
        others=any(provider in usable for provider in routes if provider not in asked),
    )
