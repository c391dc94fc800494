"""The routes that can be tried: those of some models, in the space of each, and why one cannot.

Providers are opened for it as for a start of the proxy; nothing is asked here.
"""

from collections.abc import Collection, Mapping
from contextlib import AsyncExitStack
from dataclasses import dataclass, replace
from typing import Literal

from embedding_proxy.cache.disk import connection
from embedding_proxy.providers import kinds, local
from embedding_proxy.providers.base import Space
from embedding_proxy.providers.routing.health import HealthRegistry
from embedding_proxy.providers.routing.router import Router
from embedding_proxy.proxy.embedding.learned import WIDTHS_FILE, LearnedDimensions
from embedding_proxy.proxy.embedding.opening import CLIENTS_PAY, make_router, open_providers
from embedding_proxy.proxy.settings.model_entry import ModelConfig
from embedding_proxy.proxy.settings.schema import Settings

from .choice import ModelSelection, choose
from .finding import RouteResult


@dataclass(frozen=True, slots=True)
class ProviderStatus:
    """Whether a provider that the configuration names can be used."""

    state: Literal["usable", "skipped", "disabled"]
    kind: str | None
    why: str = ""
    """Why it cannot, or is of no use."""


@dataclass(frozen=True, slots=True)
class Candidates:
    """What there is to try."""

    standings: Mapping[str, ProviderStatus]
    """Of each provider that the configuration names."""
    models: Mapping[str, ModelConfig]
    routers: Mapping[str, Router]
    findings: list[RouteResult]
    """The routes of the models, those of one space together, each route once."""


async def find(settings: Settings, choice: ModelSelection, stack: AsyncExitStack) -> Candidates:
    """Return the routes of the chosen models; providers close with `stack`. Raises ConfigError."""
    opened = await open_providers(settings, stack)
    standings = {name: _standing(settings, name, opened) for name in settings.providers}
    usable = {name: one for name, one in opened.items() if standings[name].state == "usable"}
    models = choose(settings, choice, usable)
    upstreams = HealthRegistry()
    routers = {
        name: make_router(settings, name, model, usable, upstreams)
        for name, model in models.items()
    }
    learned = LearnedDimensions(connection.folder_of(settings.cache.directory) / WIDTHS_FILE)
    await learned.refresh()
    return Candidates(standings, models, routers, _findings(models, routers, standings, learned))


def _standing(settings: Settings, name: str, opened: Collection[str]) -> ProviderStatus:
    entry = settings.providers[name]
    if entry is None:
        return ProviderStatus("disabled", None, "null in the configuration")
    if entry.by_client:
        return ProviderStatus("skipped", entry.kind, CLIENTS_PAY)
    if name not in opened:
        return ProviderStatus("skipped", entry.kind, f"{entry.key_variable} is not set")
    if entry.kind == kinds.LOCAL and not local.is_installed():
        return ProviderStatus("skipped", entry.kind, local.MISSING)
    if not any(route.provider == name for one in settings.models.values() for route in one.routes):
        return ProviderStatus(
            "usable", entry.kind, "no model has a route to it; add one to `models`"
        )
    return ProviderStatus("usable", entry.kind)


def _findings(
    models: Mapping[str, ModelConfig],
    routers: Mapping[str, Router],
    standings: Mapping[str, ProviderStatus],
    learned: LearnedDimensions,
) -> list[RouteResult]:
    """Return the routes of some models, those of one space together, each route once."""
    spaces = {}
    for name, model in models.items():
        space = model.as_space()
        # A width that the proxy has learned holds from then on.
        spaces[name] = replace(space, dimensions=space.dimensions or learned.get(space.name))
    order = list(dict.fromkeys(space.name for space in spaces.values()))
    found: dict[tuple[Space, str, str], RouteResult] = {}
    for name in sorted(routers, key=lambda name: order.index(spaces[name].name)):
        routes = {(route.name, route.model): route for route in routers[name].routes}
        for entry in models[name].routes:
            here = (entry.provider, entry.model)
            one = found.setdefault(
                (spaces[name], *here), RouteResult([], spaces[name], *here, routes.get(here))
            )
            if name not in one.models:
                one.models.append(name)
            if one.route is None:
                standing = standings.get(entry.provider)
                one.why = standing.why if standing else "the provider is not configured"
    return list(found.values())
