"""The sums of the ledger as people and scripts read them: plain values, dollars instead of nano.

What operators' tools ask: is the process alive, does it take requests, what does it serve.

GET /status: what an operator wants to know of a running proxy, as JSON.

With several workers, what is told since the start is told by the worker that happens to answer;
what is told since ever is the store's, and so everyone's.
"""

import os
import time
from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import orjson
from aiohttp import web
from embedding_proxy.cache.ledger import By, Usage, add_up
from embedding_proxy.providers.charge import NANO
from embedding_proxy.providers.routing.retry_budget import MAX_TOKENS
from embedding_proxy.proxy.service.embedding_service import EmbeddingService
from embedding_proxy.proxy.service.request import CALLER, Client

if TYPE_CHECKING:
    from embedding_proxy.cache.shared.node_registry import NodeState
    from embedding_proxy.proxy.service.membership import Membership


def usage_fields(usage: Usage) -> dict[str, Any]:
    """Return sums by name."""
    return {
        "hits": usage.hits,
        "joins": usage.joins,
        "misses": usage.misses,
        "duplicates": usage.duplicates,
        "tokens_saved": usage.tokens_saved,
        "tokens_billed": usage.tokens_billed,
        "hit_rate": round(usage.hit_rate, 4),
        "usd_saved": usage.nanodollars_saved / NANO,
        "usd_billed": usage.nanodollars_billed / NANO,
    }


def line(by: Sequence[By], names: Sequence[Any], usage: Usage) -> dict[str, Any]:
    """Return one line of the ledger, with what it is summed by; a day as a date of UTC.

    >>> line([By.DAY, By.CLIENT], [20_000, "ci"], Usage(hits=1))["day"]
    '2024-10-04'
    """
    fields = {column.value: name for column, name in zip(by, names, strict=True)}
    if By.DAY in by:
        fields["day"] = datetime.fromtimestamp(86_400 * fields["day"], UTC).date().isoformat()
    return {**fields, **usage_fields(usage)}


def node_fields(node: "NodeState") -> dict[str, Any]:
    """Return one node that shares a Redis, and the sums of its ledger."""
    total = Usage()
    for _, usage in node.sums:
        total = total.plus(usage)
    return {
        "name": node.name,
        "id": node.id,
        "is_alive": node.is_alive,
        "is_stopped": node.is_stopped,
        "seen": round(node.seen, 3),
        "clock_ahead_s": node.ahead_s,
        "version": node.version,
        **usage_fields(total),
    }


def all_fields(nodes: "Sequence[NodeState]") -> dict[str, Any]:
    """Return the sums of all nodes, by model and by client, too."""
    by_model, by_client = add_up(nodes, [By.MODEL]) or [], add_up(nodes, [By.CLIENT]) or []
    clients = {client: usage_fields(usage) for (client,), usage in by_client if client}
    return {**_totals({model: usage for (model,), usage in by_model}), "clients": clients}


LIVE_PATHS = ("/livez", "/healthz", "/health")
"""Other tools' names for the first lead to the same answer."""
DESCRIPTION_PATH = "/openapi.json"
OPEN_PATHS = frozenset({*LIVE_PATHS, "/readyz", DESCRIPTION_PATH})
"""Answered without a key: probes have none, and the description is that of every installation."""
ROOT = "/"
"""Answered without a key, too: whoever opens the address in a browser sends none."""

_PLACES = {
    "embeddings": "POST /v1/embeddings",
    "models": "GET /v1/models",
    "status": "GET /status",
    "metrics": "GET /metrics",
    "probes": "GET /livez, GET /readyz",
    "description": "GET /openapi.json",
}


async def live(_: web.Request) -> web.Response:
    """Answer 200 as long as the event loop turns."""
    return web.json_response({"status": "ok"})


class Readiness:
    """Whether requests should be sent here."""

    is_stopping = False


READINESS = web.AppKey("readiness", Readiness)


async def ready(request: web.Request) -> web.Response:
    """Answer 200 until the proxy was told to stop, then 503. It never depends on a provider.

    The store was opened before the port was.
    """
    if request.app[READINESS].is_stopping:
        return web.json_response({"status": "stopping"}, status=503)
    return web.json_response({"status": "ok"})


async def describe(_: web.Request) -> web.Response:
    """Answer with the OpenAPI description of the proxy's own routes."""
    return web.Response(body=description(), content_type="application/json")


@cache
def description() -> bytes:
    """Return the OpenAPI description: the file `openapi.json` beside this one, as it stands."""
    return Path(__file__).with_name("openapi.json").read_bytes()


async def root(request: web.Request) -> web.Response:
    """Answer with what this is and where to look, as JSON that people can read.

    The version is for those who may use the proxy: for others it would be a hint at its faults.
    """
    caller = request.get(CALLER)
    content: dict[str, object] = {"name": "embedding-proxy"}
    if caller is not None:
        content["version"] = version("embedding-proxy")
    else:
        content["key"] = "send one of this proxy's keys as `Authorization: Bearer KEY`"
    content["base_url"] = "this address, with /v1 appended"
    content["routes"] = _PLACES
    body = orjson.dumps(content, option=orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE)
    return web.Response(body=body, content_type="application/json", charset="utf-8")


class Status:
    """Tells how a service is."""

    def __init__(self, service: EmbeddingService) -> None:
        self._service = service
        self._started = time.time()

    async def get(self, request: web.Request | None) -> web.Response:
        """Answer an admin with everything, others with what is their own."""
        caller = Client(is_admin=True) if request is None else request[CALLER]
        content = await (self._everything() if caller.is_admin else self._own(caller))
        return web.Response(body=orjson.dumps(content), content_type="application/json")

    async def _own(self, caller: Client) -> dict[str, object]:
        usage = await self._service.client_ledger(caller.client)
        return {
            "name": caller.client,
            "namespace": caller.namespace,
            "since_ever": None if usage is None else usage_fields(usage),
            **await self._own_of_all_nodes(caller),
            "budget": await self._spent(caller),
        }

    async def _own_of_all_nodes(self, caller: Client) -> dict[str, object]:
        """Return a client's sums on all nodes; nothing where there is but one."""
        membership = self._membership
        if membership is None:
            return {}
        nodes = await membership.nodes()
        lines = None if nodes is None else add_up(nodes, [By.CLIENT])
        sums = None if lines is None else dict(lines).get((caller.client,), Usage())
        return {"all_nodes": None if sums is None else usage_fields(sums)}

    @property
    def _membership(self) -> "Membership | None":
        return None if self._service.storage is None else self._service.storage.membership

    async def _nodes(self) -> dict[str, object] | None:
        """Return all nodes that share a Redis, and their sums; None where there is but one.

        Both are None while the Redis does not answer.
        """
        membership = self._membership
        if membership is None:
            return None
        nodes = await membership.nodes()
        return {
            "id": membership.node.id,
            "alive": membership.alive,
            "conflict": membership.conflict or None,
            "clock_ahead_s": round(membership.ahead_s, 3),
            "pending_purges": membership.pending_purges,
            "nodes": None if nodes is None else [node_fields(node) for node in nodes],
            "since_ever": None if nodes is None else all_fields(nodes),
        }

    async def _spent(self, caller: Client) -> dict[str, object] | None:
        """Return a client's budget and what is left of it; None where there is none."""
        limit = caller.limit
        if limit is None:
            return None
        billed = await self._service.billed(caller)
        left = max(0, limit.nanodollars - billed)
        return {
            "usd": limit.nanodollars / NANO,
            "period": limit.period,
            "usd_billed": billed / NANO,
            "usd_left": left / NANO,
        }

    async def _everything(self) -> dict[str, object]:
        service = self._service
        upstreams, directory = service.upstreams, service.settings.cache.directory
        shared = None if service.storage is None else service.storage.shared
        return {
            "version": version("embedding-proxy"),
            "node": "" if service.storage is None else service.storage.node,
            "started": int(self._started),
            "cache": {"directory": os.fsencode(directory).decode(errors="replace")},
            "uptime_s": round(time.time() - self._started, 1),
            "models": {
                model.name: {
                    "space": model.space.label,
                    "usable": model.usable,
                    "why": None if model.usable else model.router.unavailable,
                }
                for model in service.models.values()
            },
            "providers": upstreams.snapshot(),
            "rate_limit_waits_s": {
                provider: {model: round(wait, 3) for model, wait in waits.items()}
                for provider, waits in service.rate_limit_waits.items()
            },
            "other_models": service.other_models,
            "canaries": service.drift_check.results if service.drift_check else [],
            "retry_budget": {
                "tokens": round(upstreams.budget.tokens, 1),
                "max_tokens": MAX_TOKENS,
                "can_retry": upstreams.budget.can_retry,
            },
            "tiers": asdict(service.counters),
            "shared": None if shared is None else shared.snapshot(),
            "index": await service.indexing.indexer.snapshot() if service.indexing else None,
            "nodes": await self._nodes(),
            "since_start": self._since_start(),
            "since_ever": await self._since_ever(),
        }

    def _since_start(self) -> dict[str, object]:
        by_model: dict[str, Usage] = {}
        for heading, usage in self._service.counted.items():
            by_model[heading.model] = by_model.get(heading.model, Usage()).plus(usage)
        return _totals(by_model)

    async def _since_ever(self) -> dict[str, object] | None:
        """Return the sums on disk; None while it cannot be read."""
        by_model = await self._service.ledger([By.MODEL])
        by_client = await self._service.ledger([By.CLIENT])
        if by_model is None or by_client is None:
            return None
        clients = {client: usage_fields(usage) for (client,), usage in by_client if client}
        return {**_totals({model: usage for (model,), usage in by_model}), "clients": clients}


def _totals(by_model: dict[str, Usage]) -> dict[str, object]:
    total = Usage()
    for usage in by_model.values():
        total = total.plus(usage)
    models = {model: usage_fields(usage) for model, usage in sorted(by_model.items())}
    return {**usage_fields(total), "models": models}
