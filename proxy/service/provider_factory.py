"""From settings to open providers, and to the routers over them.

Here the names in a configuration become objects: the only file that knows every kind of provider.
"""

import asyncio
import hashlib
import logging
import os
from collections.abc import Awaitable, Callable, Mapping
from contextlib import AsyncExitStack
from dataclasses import replace
from typing import TypeAlias

from embedding_proxy.providers import registry
from embedding_proxy.providers.allowance import SharedAllowance
from embedding_proxy.providers.base import Embedder
from embedding_proxy.providers.client_credential import key_mistake
from embedding_proxy.providers.local import Local
from embedding_proxy.providers.openai_compatible import HttpProvider
from embedding_proxy.providers.profile import Limits
from embedding_proxy.providers.routing.health import HealthRegistry
from embedding_proxy.providers.routing.route import Provider, Route
from embedding_proxy.providers.routing.router import Router
from embedding_proxy.providers.scheduling.scheduler import Scheduler
from embedding_proxy.proxy.config import models
from embedding_proxy.proxy.config.loader import ConfigError
from embedding_proxy.proxy.config.schema import Settings

CLIENTS_PAY = (
    "is asked with each client's own key; check, compare, migrate and drift checks have none"
)

log = logging.getLogger("embedding_proxy.opening")

MakeAllowance: TypeAlias = Callable[[str, Mapping[str, float]], SharedAllowance]
"""Makes what counts the limits a minute of an account, by the account's name and the limits."""


async def open_providers(
    settings: Settings,
    stack: AsyncExitStack,
    sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    allowance: MakeAllowance | None = None,
) -> dict[str, Provider]:
    """Open every provider that can be used. Raises ConfigError.

    The log names the others, if the configuration does. `allowance` gives what counts the limits a
    minute of one account for all nodes.
    """
    opened: dict[str, Provider] = {}
    for name, entry in settings.providers.items():
        if entry is None:
            continue
        if entry.kind == registry.LOCAL:
            opened[name] = await stack.enter_async_context(Local(name))
            continue
        if entry.uses_client_key:
            log.info("provider %s: %s", name, CLIENTS_PAY)
        variable, key = entry.key_variable, key_of(settings, name)
        if variable and not key:
            # One that nobody has named is there for whoever has its key.
            level = logging.WARNING if settings.names_providers else logging.DEBUG
            log.log(level, "provider %s is skipped: %s is not set", name, variable)
            continue
        check_network(settings, name)
        adapter = registry.find(entry.kind).adapter
        profile = entry.as_profile()
        limits = profile.limits
        profile = replace(profile, limits=_share(name, limits, settings.server.workers))
        provider = adapter(name, profile, api_key=key or None, sleep=sleep)
        if allowance is not None and isinstance(provider, HttpProvider):
            _share_limits(provider, limits, key, allowance)
        opened[name] = await stack.enter_async_context(provider)
    return opened


def _share_limits(
    provider: HttpProvider, limits: Limits, key: str, allowance: MakeAllowance
) -> None:
    """Let the limits a minute of a provider be those of all nodes, for each key that it takes."""
    known = {"requests": limits.requests_per_minute, "tokens": limits.tokens_per_minute}
    declared = {kind: limit for kind, limit in known.items() if limit is not None}
    if not declared:
        return

    def of_key(secret: str) -> SharedAllowance:
        # Two keys are two accounts. The digest tells them apart, and tells nothing of them.
        digest = hashlib.blake2b(
            secret.encode(), digest_size=8, person=b"provider limits"
        ).hexdigest()
        return allowance(f"{provider.name}:{digest}", declared)

    provider.share_limits(of_key(key), of_key)


def _share(name: str, limits: Limits, workers: int) -> Limits:
    """Return what each of so many worker processes may use of the limits of a provider."""
    if limits.concurrency < workers:
        log.warning(
            "provider %s: limits.concurrency is %d, and server.workers %d: each worker makes one"
            " call at a time, so there may be %d; set fewer workers to keep to the limit",
            *(name, limits.concurrency, workers, workers),
        )
    return limits.share(workers)


def key_of(settings: Settings, name: str) -> str:
    """Return a provider's key from the environment, or nothing. Raises ConfigError."""
    entry = settings.providers[name]
    variable = None if entry is None else entry.key_variable
    key = os.environ.get(variable, "").strip() if variable else ""
    mistake = key_mistake(key, variable or "")
    if mistake and settings.names_providers:
        path = ("providers", name, "api_key_env")
        raise ConfigError(settings.problem(path, f"{variable}: {mistake}"))
    if mistake:
        raise ConfigError(f"{variable}: {mistake}")
    return key


def check_network(settings: Settings, name: str) -> None:
    """Raise ConfigError if a provider cannot be reached in the way that is configured for it."""
    entry = settings.providers[name]
    if entry is None:
        return
    profile = entry.as_profile()
    try:
        profile.network.proxy_for(profile.base_url or "")
    except ValueError as error:
        raise ConfigError(settings.problem(("providers", name, "trust_env"), str(error))) from error


def make_scheduler(router: Router, settings: Settings, max_tokens: int | None = None) -> Embedder:
    """Return what makes batches of the inputs of all requests, and sends them to the routes.

    It refuses an input of more than `max_tokens`; None = nothing is known of it.
    """
    return Scheduler(router, settings.server.batch_window_ms / 1000, max_tokens)


def make_router(  # noqa: PLR0913 - what a router is made of
    settings: Settings,
    name: str,
    entry: models.ModelConfig,
    providers: Mapping[str, Provider],
    upstreams: HealthRegistry,
    *,
    sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
) -> Router:
    """Return the routes of a model, those whose provider can be used."""
    routes = [
        Route(
            providers[route.provider],
            route.model,
            route.price,
            retries=_retries(settings, route.provider),
        )
        for route in entry.routes
        if route.provider in providers
    ]
    remedy = _remedy(settings, name, entry)
    return Router(
        routes,
        unavailable=remedy,
        upstreams=upstreams,
        order=entry.routing_strategy,
        hedge_after_s=entry.hedge_after_s,
        sleep=sleep,
    )


def _retries(settings: Settings, provider: str) -> int | None:
    entry = settings.providers.get(provider)
    return None if entry is None else entry.retries


def _uses_client_keys(settings: Settings, provider: str) -> bool:
    entry = settings.providers.get(provider)
    return entry is not None and entry.uses_client_key


def _remedy(settings: Settings, name: str, entry: models.ModelConfig) -> str:
    """Say what to set so that the model can be asked for."""
    configured = [settings.providers.get(route.provider) for route in entry.routes]
    wanted = [one.key_variable for one in configured if one and one.key_variable]
    variables = list(dict.fromkeys(wanted))
    paid = [route.provider for route in entry.routes if _uses_client_keys(settings, route.provider)]
    if paid:
        return (
            f"The model `{name}` is asked for with each client's own key, and a command has none"
            f" (providers.{paid[0]}.auth)."
        )
    if not variables:
        names = " or ".join(dict.fromkeys(route.provider for route in entry.routes))
        return f"No provider for the model `{name}` is configured: add {names} to `providers`."
    return (
        f"No provider for the model `{name}` has a key:"
        f" set {' or '.join(variables)} and start the proxy again."
    )
