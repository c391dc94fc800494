"""What commands ask of the Redis that nodes share, with more patience than a request has."""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from typing import TypeVar

from embedding_proxy.cache.disk import connection, ledger_reader
from embedding_proxy.cache.ledger import COLUMNS, MAX_LEDGER_KEYS, By
from embedding_proxy.cache.shared.client import RedisClient
from embedding_proxy.cache.shared.client_budget import SharedSpending
from embedding_proxy.cache.shared.node_registry import NodeName, NodeState, Registry, read_node_id
from embedding_proxy.proxy.config.schema import Settings
from embedding_proxy.proxy.service.storage import GIB, node_name, shared_tier

from .output import WorkFailed

T = TypeVar("T")

LIMIT_S = 2.0
"""A command can wait longer for an answer than a request."""


def node_of(settings: Settings) -> NodeName:
    """Return which node the cache folder of a configuration is. Raises OSError."""
    return NodeName(read_node_id(settings.cache.directory), node_name(settings))


def run_with_client(settings: Settings, work: Callable[[RedisClient], Awaitable[T]]) -> T:
    """Return what some work with the shared Redis returns. Raises WorkFailed without one."""
    configured = shared_tier(settings, LIMIT_S)
    if configured is None:
        raise WorkFailed("cache.shared is not configured")

    async def run() -> T:
        async with configured.redis as client:
            return await work(client)

    return asyncio.run(run())


def read_others_billed(
    settings: Settings, clients: Sequence[tuple[str, int, int]]
) -> list[int] | None:
    """Return the nanodollars that other nodes have billed some clients; None if that is not known.

    A client is its name, the first day of its period (since 1970), and what this node has billed.
    """
    node = node_of(settings)

    async def ask(client: RedisClient) -> list[int] | None:
        spending = SharedSpending(client, node.id)
        others = []
        for name, first_day, here in clients:
            answer = await spending.settle(name, first_day, here=here)
            if answer is None:
                return None
            others.append(answer.others)
        return others

    return run_with_client(settings, ask)


def read_nodes(settings: Settings) -> Sequence[NodeState] | None:
    """Return all nodes, with the sums of their ledgers; None while the Redis does not answer.

    Those of this node are as its ledger has them now. Raises StoreError, WorkFailed.
    """
    node = node_of(settings)
    nodes = run_with_client(settings, lambda client: Registry(client, node).read())
    if nodes is None:
        return None
    cache = settings.cache
    limit = int(cache.size_limit_gib * GIB)
    with connection.opened_for_reading(cache.directory, limit, cache.pinned_namespaces) as file:
        sums = tuple(ledger_reader.read(file.sql, COLUMNS, MAX_LEDGER_KEYS))
        days = tuple(ledger_reader.read(file.sql, [By.DAY]))
    others = [other for other in nodes.nodes if other.id != node.id]
    entry = next((other for other in nodes.nodes if other.id == node.id), None)
    own = entry or NodeState(
        *node, nodes.now, is_alive=False, is_stopped=True, ahead_s=0.0, version=""
    )
    nodes_known = [*others, replace(own, sums=sums, days=days)]
    return sorted(nodes_known, key=lambda node: (node.name, node.id))
