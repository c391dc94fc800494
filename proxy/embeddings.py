"""POST /v1/embeddings: the room where a request lives."""

import asyncio
from collections import Counter

from aiohttp import web

from providers.base import Outcome

from . import wire
from .service import EmbeddingService, Result


class Embeddings:
    """Answers embedding requests from a service."""

    def __init__(self, service: EmbeddingService) -> None:
        self._service = service

    async def post(
        self, request: web.Request, body: bytes, namespace: str = ""
    ) -> web.StreamResponse:
        """Answer one request from a namespace's part of the cache. Raises EmbeddingError."""
        asked = wire.parse(body)
        control = ", ".join(request.headers.getall("Cache-Control", ()))
        result = await self._service.answer(asked, namespace, control)
        chunks = wire.render(
            result.embedded.vectors,
            dimensions=result.dimensions,
            encoding=asked.encoding,
            model=asked.model,
            prompt_tokens=result.tokens,
        )
        headers = _headers(result)
        if len(asked.inputs) <= wire.VECTORS_A_CHUNK:
            return web.Response(
                body=b"".join(chunks), content_type="application/json", headers=headers
            )
        response = web.StreamResponse(headers=headers)
        response.content_type = "application/json"
        await response.prepare(request)
        for chunk in chunks:
            await response.write(chunk)
            # A write to a fast reader does not wait; other requests get their turn here.
            await asyncio.sleep(0)
        await response.write_eof()
        return response


def _headers(result: Result) -> dict[str, str]:
    """Return what a reply says about the cache; the counts are of distinct inputs."""
    counts = Counter(result.outcomes)
    hits, joins, misses = (counts[how] for how in (Outcome.HIT, Outcome.JOIN, Outcome.MISS))
    bought = joins or misses
    verdict = ("partial" if hits else "miss") if bought else "hit"
    headers = {
        "x-cache": verdict,
        "x-cache-hits": str(hits),
        "x-cache-joined": str(joins),
        "x-cache-misses": str(misses),
        "x-embedding-space": result.space.label,
        "x-tokens-billed": str(result.tokens_billed),
        "x-tokens-saved": str(result.tokens - result.tokens_billed),
    }
    if result.fallback:
        headers["x-embedding-fallback"] = "true"
    if result.embedded.providers:
        headers["x-embedding-provider"] = ", ".join(result.embedded.providers)
    return headers
