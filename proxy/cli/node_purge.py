"""A purge on all nodes that share a Redis: what `cache purge` tells them, and who has made it.

The purge is written to the log of this node first, then told, then made here: a command that is
killed in between is made up for by the proxy of this node. See `cache.shared.purge_log`.
"""

import asyncio
import secrets
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

import typer
from embedding_proxy.cache.disk.connection import folder_of
from embedding_proxy.cache.disk.lock import WriterLock
from embedding_proxy.cache.disk.purge import PurgeFilter
from embedding_proxy.cache.shared import sweep
from embedding_proxy.cache.shared.client import RedisClient
from embedding_proxy.cache.shared.node_registry import (
    NodeName,
    Nodes,
    NodeState,
    Registry,
)
from embedding_proxy.cache.shared.purge_exchange import NodeReceipt, PurgeExchange
from embedding_proxy.cache.shared.purge_log import LoggedPurge, PurgeLog, time_of_purge
from embedding_proxy.proxy.config.schema import Settings
from embedding_proxy.proxy.service.membership import APPLY_LOCK

from .formatting import age, count, join_names
from .nodes import node_of, run_with_client

T = TypeVar("T")

MAX_AHEAD_S = 5.0
"""A purge is dated ahead by this at most: what is bought until then counts as purged, too."""
POLL_S = 0.2
_LOCK_S = 30.0


@dataclass(frozen=True, slots=True)
class NodeResult:
    """What is known of a purge on one node."""

    name: str
    state: str
    """`done`; `pending`: it is alive, and has not said so yet; `down`: it makes it at its start."""
    deleted: int | None
    seen: float | None
    """When a node that is down was heard of last, in seconds since 1970; None if it was stopped."""


class NodePurge:
    """One purge on all nodes. Synchronous, for a command. Raises WorkFailed, OSError."""

    def __init__(self, settings: Settings, choice: PurgeFilter) -> None:
        self._settings = settings
        self._choice = choice
        self._directory: Path = settings.cache.directory
        self._log = PurgeLog(folder_of(self._directory))
        self._purge: LoggedPurge | None = None
        self.is_told = False
        """Whether the other nodes can know of it."""
        self.results: list[NodeResult] = []
        """What is known of each node, in the end."""
        self.swept: int | None = None
        """How many records were deleted in the shared tier; None if not all could be."""

    def begin(self) -> None:
        """Log the purge, and tell it, before anything is deleted."""
        nodes = self._run(lambda client: self._registry(client).read(has_sums=False))
        now = time.time() if nodes is None else self._latest(nodes)
        self._purge = purge = LoggedPurge(secrets.token_hex(8), self._choice, time_of_purge(now))
        self._log.change(lambda record: record.add([purge]))
        self.is_told = self._run(lambda client: PurgeExchange(client).add([purge]))
        if self.is_told:
            confirmed = replace(purge, is_told=True)
            self._log.change(lambda record: record.add([confirmed]))

    @staticmethod
    def _latest(nodes: Nodes) -> float:
        """Return the latest time that nodes may have stored something with; say whose is wrong."""
        ahead = [(nodes.ahead_s(node), node.name) for node in nodes.nodes]
        ahead.append((time.time() - nodes.now, "this machine"))
        for seconds, name in ahead:
            if seconds > MAX_AHEAD_S:
                typer.echo(
                    f"the clock of {name} is {seconds:,.0f} s ahead of that of Redis: what was"
                    " stored by it lately may stay; set it right, and purge again after that time",
                    err=True,
                )
        return nodes.now + min(max(0.0, max(ahead)[0]), MAX_AHEAD_S)

    @contextmanager
    def applying(self) -> Iterator[None]:
        """Keep the proxy of this node from making it at the same time."""
        with closing(WriterLock(self._directory / APPLY_LOCK, _LOCK_S)) as lock, lock:
            yield

    def end(self, deleted: int, wait_s: float) -> None:
        """Note that this node has made it, delete in the shared tier, and wait for other nodes."""
        purge = self._purge
        if purge is None:
            return
        self._log.mark_done(purge.id)
        receipt = NodeReceipt(*self._node, deleted)
        self.swept = self._run(lambda client: self._sweep(client, purge)) if self.is_told else None
        self.results = self._run(lambda client: self._wait(client, purge.id, receipt, wait_s))

    def describe(self) -> Iterator[str]:
        """Yield lines that say which nodes have made it, and when the others will."""
        results, swept = self.results, self.swept
        if swept is None:
            yield "not all could be deleted in the shared tier; what is left there is not served"
        else:
            yield f"{count(swept, 'record', 'records')} deleted in the shared tier"
        done = [
            f"{result.name} ({result.deleted:,})" for result in results if result.state == "done"
        ]
        yield f"{count(len(done), 'node has', 'nodes have')} deleted it: {join_names(done)}"
        pending = [result.name for result in results if result.state == "pending"]
        if pending:
            verb = "has" if len(pending) == 1 else "have"
            yield f"{join_names(pending)} {verb} not said so yet"
        now = time.time()
        for result in results:
            if result.state == "down":
                last_sign = (
                    f"last heard of {age(now - result.seen)} ago" if result.seen else "stopped"
                )
                yield f"{result.name} was {last_sign}: it deletes it when it starts"

    @property
    def _node(self) -> NodeName:
        return node_of(self._settings)

    def _registry(self, client: RedisClient) -> Registry:
        return Registry(client, self._node)

    def _run(self, work: Callable[[RedisClient], Awaitable[T]]) -> T:
        return run_with_client(self._settings, work)

    async def _sweep(self, client: RedisClient, purge: LoggedPurge) -> int | None:
        # The proxies leave it to this command; it is killed for a while only.
        is_claimed = await sweep.claim(client, purge, self._node.id)
        try:
            deleted = await sweep.delete(client, [purge])
        except sweep.Interrupted:
            # The proxies do it.
            return None
        finally:
            if is_claimed:
                await sweep.release(client, [purge])
        await PurgeExchange(client).mark_swept([purge])
        return deleted

    async def _wait(
        self, client: RedisClient, purge: str, receipt: NodeReceipt, wait_s: float
    ) -> list[NodeResult]:
        exchange, registry = PurgeExchange(client), self._registry(client)
        deadline = time.monotonic() + wait_s
        await exchange.acknowledge(purge, receipt)
        while True:
            receipts = await exchange.receipts(purge)
            nodes = await registry.read(has_sums=False)
            if receipts is None or nodes is None:
                return [NodeResult(receipt.name, "done", receipt.deleted, None)]
            results = _results(receipts or [receipt], nodes.nodes)
            if all(result.state != "pending" for result in results) or time.monotonic() >= deadline:
                return results
            await asyncio.sleep(POLL_S)


def _results(receipts: Sequence[NodeReceipt], nodes: Sequence[NodeState]) -> list[NodeResult]:
    done = {result.node: result for result in receipts}
    results = [NodeResult(result.name, "done", result.deleted, None) for result in receipts]
    for node in nodes:
        if node.id not in done:
            state = "pending" if node.is_alive else "down"
            results.append(
                NodeResult(node.name, state, None, None if node.is_stopped else node.seen)
            )
    return sorted(results, key=lambda result: result.name)
