"""From settings to open providers, and to the models that can be asked for.

Here the names in a configuration become objects: the only file that knows every kind of provider.
"""

import asyncio
import logging
import os
from collections.abc import Awaitable, Callable, Mapping
from contextlib import AsyncExitStack
from dataclasses import dataclass

from cache.embedder import CachingEmbedder, Filled
from cache.flight import Flights
from cache.tiers import Tiers
from providers import kinds
from providers.base import Embedder, Space
from providers.batcher import Batcher
from providers.gather import Gatherer
from providers.health import Upstreams
from providers.limits import Limits
from providers.local import Local
from providers.router import Provider, Route, Router
from providers.within import limits_of

from . import model_entry
from .config import ConfigError
from .model_entry import Fallback
from .settings import Settings
from .widths import Policy

log = logging.getLogger("embedding_proxy.opening")


@dataclass(frozen=True, slots=True)
class Model:
    """A model that can be asked for."""

    name: str
    space: Space
    price: float
    """USD per million tokens."""
    router: Router
    """The routes that can be used; it knows no cache."""
    embedder: Embedder
    """What requests are asked of: the cache around the router."""
    dimensions_refused: bool = False
    """Whether `dimensions` is an error even at the native width, as for OpenAI's ada-002."""
    width: Policy = "strict"
    """What may be done for a width that the model does not have."""
    fallbacks: tuple[Fallback, ...] = ()
    """Models of other spaces that may stand in when no route answers, in this order."""

    @property
    def usable(self) -> bool:
        """Whether a provider is configured; without one, what is cached is still served."""
        return bool(self.router.routes)


async def open_providers(
    settings: Settings,
    stack: AsyncExitStack,
    sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
) -> dict[str, Provider]:
    """Open every provider that can be used; name the others in the log. Raises ConfigError."""
    opened: dict[str, Provider] = {}
    for name, entry in settings.providers.items():
        if entry is None:
            continue
        if entry.kind == kinds.LOCAL:
            opened[name] = await stack.enter_async_context(Local(name))
            continue
        variable = entry.key_variable
        key = os.environ.get(variable, "").strip() if variable else ""
        if variable and not key:
            log.warning("provider %s is skipped: %s is not set", name, variable)
            continue
        if not (key.isascii() and key.isprintable()):
            raise ConfigError(f"{variable}: its value is no key: it holds a line break or the like")
        adapter = kinds.find(entry.kind).adapter
        opened[name] = await stack.enter_async_context(
            adapter(name, entry.as_profile(), api_key=key or None, sleep=sleep)
        )
    return opened


def make_models(
    settings: Settings,
    providers: Mapping[str, Provider],
    tiers: Tiers,
    upstreams: Upstreams,
    sleep: Callable[[float], Awaitable[None]],
) -> dict[str, Model]:
    """Return every configured model, by name.

    Tiers, flights, and what is known of the providers are shared by all of them.
    """
    flights: Flights[Filled] = Flights()
    models = {}
    for name, entry in settings.models.items():
        router = make_router(settings, name, providers, upstreams, sleep)
        models[name] = Model(
            name=name,
            space=entry.as_space(),
            price=entry.price,
            router=router,
            embedder=CachingEmbedder(batched(router, settings), tiers, flights),
            dimensions_refused=entry.dimensions_refused,
            width=entry.width,
            fallbacks=entry.fallback,
        )
    return models


def batched(router: Router, settings: Settings) -> Embedder:
    """Return what divides requests among calls of the routes, and gathers small ones if asked."""
    limits = limits_of(router.routes[0].provider) if router.routes else Limits()
    window_s = settings.server.gather_ms / 1000
    return Gatherer(router, limits, window_s) if window_s else Batcher(router, limits)


def make_router(
    settings: Settings,
    name: str,
    providers: Mapping[str, Provider],
    upstreams: Upstreams,
    sleep: Callable[[float], Awaitable[None]],
) -> Router:
    """Return the routes of a configured model, those whose provider can be used."""
    entry = settings.models[name]
    routes = [
        Route(providers[route.provider], route.model, route.price)
        for route in entry.routes
        if route.provider in providers
    ]
    remedy = _remedy(settings, name, entry)
    return Router(
        routes,
        unavailable=remedy,
        upstreams=upstreams,
        order=entry.order,
        hedge_after_s=entry.hedge_after_s,
        sleep=sleep,
    )


def _remedy(settings: Settings, name: str, entry: model_entry.Model) -> str:
    """Say what to set so that the model can be asked for."""
    configured = [settings.providers.get(route.provider) for route in entry.routes]
    wanted = [one.key_variable for one in configured if one and one.key_variable]
    variables = list(dict.fromkeys(wanted))
    if not variables:
        names = " or ".join(dict.fromkeys(route.provider for route in entry.routes))
        return f"No provider for the model `{name}` is configured: add {names} to `providers`."
    return (
        f"No provider for the model `{name}` has a key:"
        f" set {' or '.join(variables)} and start the proxy again."
    )
