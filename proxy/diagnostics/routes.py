"""Which models and routes a check or a comparison looks at, and what came of asking them.

`choose_models` picks the models: enough to try every provider, and not the whole catalogue.
`find_routes` opens the providers as a start of the proxy does, and returns the routes of these
models, with the reason why one cannot be asked; it asks none of them. `compare` compares the
answers of routes.
"""

import difflib
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, replace
from typing import Literal

from embedding_proxy.cache.disk import connection
from embedding_proxy.providers import local, registry
from embedding_proxy.providers.base import Space
from embedding_proxy.providers.route_check import SAME, Probe, agreement
from embedding_proxy.providers.routing.health import HealthRegistry
from embedding_proxy.providers.routing.route import Route
from embedding_proxy.providers.routing.router import Router
from embedding_proxy.proxy.config.loader import ConfigError
from embedding_proxy.proxy.config.models import ModelConfig, unlisted_model
from embedding_proxy.proxy.config.schema import Settings
from embedding_proxy.proxy.service.learned_dimensions import WIDTHS_FILE, LearnedDimensions
from embedding_proxy.proxy.service.provider_factory import CLIENTS_PAY, make_router, open_providers


@dataclass(frozen=True, slots=True)
class ModelSelection:
    """The models to check."""

    named: Sequence[str]
    """Models that are not configured are requested by name, as the proxy does it."""
    must_work: bool = True
    """Whether a named model without a usable route is a problem."""
    also: Literal["nothing", "each provider", "all"] = "each provider"
    """Also one model of each usable provider without a named one, or all models."""


def choose_models(
    settings: Settings, choice: ModelSelection, usable: Collection[str]
) -> dict[str, ModelConfig]:
    """Return the chosen models by name. Raises ConfigError for an unknown one."""

    def providers_of(model: ModelConfig) -> set[str]:
        return {route.provider for route in model.routes} & {*usable}

    chosen = {
        name: settings.models.get(name) or _model_by_name(settings, name) for name in choice.named
    }
    for name, model in chosen.items():
        if name not in settings.models and not providers_of(model):
            raise _unknown_model(settings, name)
    providers = {provider for model in chosen.values() for provider in providers_of(model)}
    for name, model in settings.models.items():
        new = providers_of(model) - providers
        if (choice.also == "each provider" and new) or (
            choice.also == "all" and providers_of(model)
        ):
            chosen.setdefault(name, model)
            providers |= new
    # Models of one space share its vectors, whatever their names.
    spaces = {model.space for model in chosen.values()}
    for name, model in settings.models.items():
        if model.space in spaces and providers_of(model):
            chosen.setdefault(name, model)
    return chosen


def add_fallback_models(settings: Settings, names: Sequence[str]) -> tuple[str, ...]:
    """Return the names of models, and of their fallback models."""
    models = [settings.models[name] for name in names if name in settings.models]
    stand_ins = [fallback.model for model in models for fallback in model.fallback]
    return tuple(dict.fromkeys([*names, *stand_ins]))


def _model_by_name(settings: Settings, name: str) -> ModelConfig:
    """Return a model of which only the name is known, as the proxy does. Raises ConfigError."""
    asks = settings.server.unknown_models == "forward"
    model = unlisted_model(name) if asks else None
    if model is None:
        raise _unknown_model(settings, name)
    return model


def _unknown_model(settings: Settings, name: str) -> ConfigError:
    near = difflib.get_close_matches(name, settings.models, n=3, cutoff=0.4)
    hint = f"did you mean {' or '.join(near)}?" if near else "add it to `models`"
    return ConfigError(f"--model: there is no model {name!r}; {hint}")


@dataclass(frozen=True, slots=True)
class ProviderStatus:
    """Whether a provider of the configuration can be used."""

    state: Literal["usable", "skipped", "disabled"]
    kind: str | None
    why: str = ""
    """Why it cannot be used, or is not needed."""


@dataclass(slots=True)
class RouteResult:
    """A route in one space, the models that lead to it, and the result of its call."""

    models: list[str]
    space: Space
    provider: str
    upstream_model: str
    route: Route | None
    """None if the provider cannot be used."""
    why: str = "not asked"
    """Why it was not called, or failed; empty after an answer."""
    probe: Probe | None = None

    @property
    def ok(self) -> bool | None:
        """Whether the answer was good; None if it was not called."""
        return None if self.probe is None else self.probe.failure is None

    @property
    def width(self) -> int:
        """The dimensions of its vectors; 0 if it has returned none."""
        return len(self.probe.vectors[0]) // 4 if self.probe and self.probe.vectors else 0

    def __str__(self) -> str:
        return f"{self.provider} ({self.upstream_model})"


@dataclass(frozen=True, slots=True)
class Candidates:
    """The routes to try."""

    statuses: Mapping[str, ProviderStatus]
    """The status of each provider of the configuration."""
    models: Mapping[str, ModelConfig]
    routers: Mapping[str, Router]
    results: list[RouteResult]
    """The routes of the models, ordered by space, each route once."""


async def find_routes(
    settings: Settings, choice: ModelSelection, stack: AsyncExitStack
) -> Candidates:
    """Return the routes of the chosen models; providers close with `stack`. Raises ConfigError."""
    open_names = await open_providers(settings, stack)
    statuses = {name: _provider_status(settings, name, open_names) for name in settings.providers}
    usable = {
        name: provider for name, provider in open_names.items() if statuses[name].state == "usable"
    }
    models = choose_models(settings, choice, usable)
    upstreams = HealthRegistry()
    routers = {
        name: make_router(settings, name, model, usable, upstreams)
        for name, model in models.items()
    }
    learned = LearnedDimensions(connection.folder_of(settings.cache.directory) / WIDTHS_FILE)
    await learned.refresh()
    return Candidates(statuses, models, routers, _route_results(models, routers, statuses, learned))


def _provider_status(settings: Settings, name: str, open_names: Collection[str]) -> ProviderStatus:
    entry = settings.providers[name]
    if entry is None:
        return ProviderStatus("disabled", None, "null in the configuration")
    if entry.uses_client_key:
        return ProviderStatus("skipped", entry.kind, CLIENTS_PAY)
    if name not in open_names:
        return ProviderStatus("skipped", entry.kind, f"{entry.key_variable} is not set")
    if entry.kind == registry.LOCAL and not local.is_installed():
        return ProviderStatus("skipped", entry.kind, local.MISSING)
    if not any(
        route.provider == name for model in settings.models.values() for route in model.routes
    ):
        return ProviderStatus(
            "usable", entry.kind, "no model has a route to it; add one to `models`"
        )
    return ProviderStatus("usable", entry.kind)


def _route_results(
    models: Mapping[str, ModelConfig],
    routers: Mapping[str, Router],
    statuses: Mapping[str, ProviderStatus],
    learned: LearnedDimensions,
) -> list[RouteResult]:
    """Return the routes of some models, ordered by space, each route once."""
    spaces = {}
    for name, model in models.items():
        space = model.as_space()
        # A width that the proxy has learned applies from then on.
        spaces[name] = replace(space, dimensions=space.dimensions or learned.get(space.name))
    order = list(dict.fromkeys(space.name for space in spaces.values()))
    results: dict[tuple[Space, str, str], RouteResult] = {}
    for name in sorted(routers, key=lambda name: order.index(spaces[name].name)):
        routes = {(route.name, route.model): route for route in routers[name].routes}
        for entry in models[name].routes:
            here = (entry.provider, entry.model)
            result = results.setdefault(
                (spaces[name], *here), RouteResult([], spaces[name], *here, routes.get(here))
            )
            if name not in result.models:
                result.models.append(name)
            if result.route is None:
                status = statuses.get(entry.provider)
                result.why = status.why if status else "the provider is not configured"
    return list(results.values())


@dataclass(frozen=True, slots=True)
class Comparison:
    """Two routes of one space that answered, and the least cosine between their answers.

    It is 0 where their widths differ.
    """

    first: RouteResult
    second: RouteResult
    cosine: float

    @property
    def ok(self) -> bool:
        """Whether they are one model."""
        return self.cosine >= SAME


def compare(results: Sequence[RouteResult]) -> Iterator[Comparison]:
    """Compare the answers of each space with the first of them. They are one model, or two."""
    answers_by_space: defaultdict[str, list[tuple[RouteResult, Probe]]] = defaultdict(list)
    for result in results:
        if result.probe is not None and result.ok:
            answers_by_space[result.space.name].append((result, result.probe))
    for (first, base), *others in answers_by_space.values():
        for other, other_result in others:
            same = first.width == other.width
            cosine = agreement(base.vectors, other_result.vectors) if same else 0.0
            yield Comparison(first, other, cosine)
