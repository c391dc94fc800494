"""What is stored, opened once: the disk, the memory before it, and what was learned of models.

A configuration that is loaded anew uses the same storage as long as its cache section is the same:
nothing that is in memory is lost, and a purchase that is under way is waited for, not made again.
"""

import asyncio
import logging
import os
import socket
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING, Self

from embedding_proxy.cache.disk.file_leases import FileLeases
from embedding_proxy.cache.disk.store import Store
from embedding_proxy.cache.in_flight import InFlight
from embedding_proxy.cache.memory import Memory
from embedding_proxy.cache.shared.address import RedisOptions
from embedding_proxy.cache.tiers import Tiers
from embedding_proxy.proxy.config.errors import ConfigError
from embedding_proxy.proxy.config.schema import Cache, Settings

from . import drift_check
from .budgets import Budgets
from .learned_dimensions import WIDTHS_FILE, LearnedDimensions

if TYPE_CHECKING:
    from embedding_proxy.cache.shared.client import RedisClient
    from embedding_proxy.cache.shared.redis_leases import RedisLeases
    from embedding_proxy.cache.shared.tier import SharedTier

    from .membership import Membership

log = logging.getLogger("embedding_proxy.shared")

MIB = 1 << 20
GIB = 1 << 30
DAY = 86_400
REPLIES_SHARE = 0.5
"""The part of the memory that is left to whole replies (see `http.response_cache`)."""


class Storage:
    """The tiers of one cache section. Whoever uses it holds it; the last one out closes it."""

    def __init__(
        self,
        cache: Cache,
        workers: int = 1,
        shared: "SharedTier | None" = None,
        node: str = "",
    ) -> None:
        """`workers` is how many processes buy on the account of one client at the same time.

        `shared` is the tier of several machines (see `shared_tier`); it is opened and closed here.
        `node` is this machine's name among them.
        """
        self.cache = cache
        self.node = node
        self.membership: Membership | None = None
        """What this node knows of others; None without `shared`, and where the folder is not
        writable."""
        self.shared = shared
        ttl_s = cache.ttl_days and cache.ttl_days * DAY
        self.store = Store(
            cache.directory,
            int(cache.size_limit_gib * GIB),
            ttl_s=ttl_s,
            # Frozen, nothing could be bought again.
            deletes_expired=cache.mode != "frozen",
            pinned=(*cache.pinned_namespaces, drift_check.NAMESPACE),
        )
        self.memory = Memory(int(cache.memory_mib * MIB * (1 - REPLIES_SHARE)), ttl_s)
        self.tiers = Tiers(self.memory, self.store, shared)
        self.learned = LearnedDimensions(self.store.folder / WIDTHS_FILE)
        self._leases = FileLeases(self.store.folder)
        self._shared_leases = _shared_leases(self._leases, shared)
        self.in_flight = InFlight(self._shared_leases or self._leases)
        self.budgets = Budgets(self.store, workers)
        """What clients with budgets have spent."""
        self.counts_owner: object = None
        """Who publishes the counters of the tiers: one at a time, or they would count twice."""
        self._holders = 0
        self._opening = asyncio.Lock()
        self._stack = AsyncExitStack()

    async def __aenter__(self) -> Self:
        """Hold it; the first one opens it. Raises StoreError if the directory cannot be used."""
        async with self._opening:
            if not self._holders:
                self._stack.callback(self._leases.close)
                await self._stack.enter_async_context(self.store)
                if self.shared is not None:
                    await self._stack.enter_async_context(self.shared)
                    self._stack.push_async_callback(self.tiers.flush_copies)
                    await self._join(self.shared.redis)
                if self._shared_leases is not None:
                    self._stack.push_async_callback(self._shared_leases.aclose)
                await self.learned.refresh()
            self._holders += 1
        return self

    async def _join(self, redis: "RedisClient") -> None:
        """Become one of the nodes that share a Redis."""
        # As the client: where it is not configured, nothing imports it.
        from embedding_proxy.cache.shared.client_budget import SharedSpending  # noqa: PLC0415
        from embedding_proxy.cache.shared.node_registry import NodeName, read_node_id  # noqa: PLC0415

        from .membership import Membership  # noqa: PLC0415

        try:
            identity = await asyncio.to_thread(read_node_id, self.cache.directory)
        except OSError as error:
            log.warning(
                "this node heeds the purges of others, and has no other part in what nodes"
                " share: %s",
                error,
            )
            identity = ""
        node = NodeName(identity, self.node)
        self.membership = membership = Membership(redis, self.store, self.budgets, node)
        if identity:
            self.budgets.share(SharedSpending(redis, identity), lambda: membership.alive)
        self.tiers.is_purged = membership.is_purged
        self.tiers.is_purged_shared = membership.is_purged_shared
        await self._stack.enter_async_context(membership)
        self._stack.push_async_callback(self.budgets.aclose)

    async def __aexit__(self, *exc: object) -> None:
        """Let go of it; the last one closes it."""
        async with self._opening:
            self._holders -= 1
            if not self._holders:
                await self._stack.aclose()


def _shared_leases(local: FileLeases, shared: "SharedTier | None") -> "RedisLeases | None":
    if shared is None:
        return None
    from embedding_proxy.cache.shared.redis_leases import RedisLeases  # noqa: PLC0415 - an extra

    return RedisLeases(local, shared)


def make_storage(settings: Settings) -> Storage:
    """Return the storage that a configuration names, not yet opened. Raises ConfigError."""
    workers, shared = settings.server.workers, shared_tier(settings)
    return Storage(settings.cache, workers, shared, node_name(settings))


def node_name(settings: Settings) -> str:
    """Return the name of this node: the configured one, or the machine's."""
    return settings.server.node or socket.gethostname()


def shared_tier(settings: Settings, limit_s: float | None = None) -> "SharedTier | None":
    """Return the tier of `cache.shared`, not yet opened; None without. Raises ConfigError.

    `limit_s` is another time limit of its exchanges than the configured one.
    """
    shared = settings.cache.shared
    if shared is None:
        return None
    try:
        # An extra: nothing imports it where it is not configured.
        from embedding_proxy.cache.shared.client import RedisClient  # noqa: PLC0415
        from embedding_proxy.cache.shared.tier import SharedTier  # noqa: PLC0415
    except ImportError as error:
        remedy = "needs the extra `redis`: pip install 'redis[hiredis]>=8'"
        raise ConfigError(settings.problem(("cache", "shared"), remedy)) from error
    redis = RedisClient(
        RedisOptions(
            shared.address,
            prefix=shared.prefix,
            username=shared.username or "",
            password=_secret(settings, "password_env"),
            sentinel_password=_secret(settings, "sentinel_password_env"),
            ca_file=None if shared.ca_file is None else str(shared.ca_file),
            limit_s=limit_s or shared.timeout_ms / 1000,
            max_connections=shared.max_connections,
        )
    )
    ages = [days for days in (shared.ttl_days, settings.cache.ttl_days) if days is not None]
    return SharedTier(
        redis,
        ttl_s=min(ages) * DAY if ages else None,
        is_float16=shared.element_type == "float16",
    )


def _secret(settings: Settings, key: str) -> str:
    """Return what the variable holds that a key of `cache.shared` names. Raises ConfigError."""
    variable = getattr(settings.cache.shared, key)
    if variable is None:
        return ""
    secret = os.environ.get(variable, "")
    if not secret:
        problem = f"the variable {variable} is not set"
        raise ConfigError(settings.problem(("cache", "shared", key), problem))
    return secret
