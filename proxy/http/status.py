"""GET /status: what an operator wants to know of a running proxy, as JSON.

With several workers, what is told since the start is told by the worker that happens to answer;
what is told since ever is the store's, and so everyone's.
"""

import os
import time
from dataclasses import asdict
from importlib.metadata import version

import orjson
from aiohttp import web
from embedding_proxy.cache.ledger import By
from embedding_proxy.cache.usage import Usage
from embedding_proxy.providers.routing.retry_budget import MAX_TOKENS
from embedding_proxy.proxy.service import EmbeddingService

from . import sums


class Status:
    """Tells how a service is."""

    def __init__(self, service: EmbeddingService) -> None:
        self._service = service
        self._started = time.time()

    async def get(self, _: web.Request) -> web.Response:
        """Answer with everything."""
        service = self._service
        upstreams, directory = service.upstreams, service.settings.cache.directory
        content = {
            "version": version("embedding-proxy"),
            "worker": os.getpid(),
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
            "canaries": service.canaries.findings if service.canaries else [],
            "retry_budget": {
                "tokens": round(upstreams.budget.tokens, 1),
                "max_tokens": MAX_TOKENS,
                "can_retry": upstreams.budget.can_retry,
            },
            "tiers": asdict(service.counters),
            "index": await service.indexing.indexer.snapshot() if service.indexing else None,
            "since_start": self._since_start(),
            "since_ever": await self._since_ever(),
        }
        return web.Response(body=orjson.dumps(content), content_type="application/json")

    def _since_start(self) -> dict[str, object]:
        by_model: dict[str, Usage] = {}
        for heading, usage in self._service.counted.items():
            by_model[heading.model] = by_model.get(heading.model, Usage()).plus(usage)
        return _told(by_model)

    async def _since_ever(self) -> dict[str, object] | None:
        """Return the sums on disk; None while it cannot be read."""
        rows = await self._service.ledger([By.MODEL])
        return None if rows is None else _told({model: usage for (model,), usage in rows})


def _told(by_model: dict[str, Usage]) -> dict[str, object]:
    total = Usage()
    for usage in by_model.values():
        total = total.plus(usage)
    models = {model: sums.shown(usage) for model, usage in sorted(by_model.items())}
    return {**sums.shown(total), "models": models}
