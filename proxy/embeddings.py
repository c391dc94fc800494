"""POST /v1/embeddings: the room where a request lives."""

import asyncio
from functools import partial

from aiohttp import web

from proxy.embedding.result import Result
from proxy.http.caller import Caller
from proxy.http.repeating import AGAIN

from . import wire
from .service import EmbeddingService

# Up to this many bytes, reading a body is quicker than handing it to a thread.
_PARSE_INLINE = 1 << 18


class Embeddings:
    """Answers embedding requests from a service."""

    def __init__(self, service: EmbeddingService) -> None:
        self._service = service

    async def post(self, request: web.Request, body: bytes, caller: Caller) -> web.StreamResponse:
        """Answer one request. Raises EmbeddingError."""
        parse = partial(
            wire.parse, body, self._service.most_inputs, request.match_info.get("model")
        )
        asked = parse() if len(body) <= _PARSE_INLINE else await asyncio.to_thread(parse)
        control = ", ".join(request.headers.getall("Cache-Control", ()))
        result = await self._service.answer(asked, caller, control)
        form = wire.Form(result.dimensions, asked.encoding, asked.model, result.tokens)
        chunks = wire.render(result.embedded.vectors, form)
        headers = _headers(result)
        if len(asked.inputs) <= form.vectors_a_chunk:
            # What stood in may not be needed again; and indexing is done anew for each request.
            if result.embedded.again and not result.fallback and self._service.indexing is None:
                request[AGAIN] = result.embedded.again, result.embedded.vectors
            return web.Response(
                body=b"".join(chunks), content_type="application/json", headers=headers
            )
        response = web.StreamResponse(headers=headers)
        response.content_type = "application/json"
        response.content_length = form.length(len(asked.inputs))
        await response.prepare(request)
        for chunk in chunks:
            await response.write(chunk)
            # A write to a fast reader does not wait; other requests get their turn here.
            await asyncio.sleep(0)
        await response.write_eof()
        return response


def _headers(result: Result) -> dict[str, str]:
    """Return what a reply says about the cache; the counts are of distinct inputs."""
    usage = result.usage
    bought = usage.joins or usage.misses
    verdict = ("partial" if usage.hits else "miss") if bought else "hit"
    headers = {
        "x-cache": verdict,
        "x-cache-hits": str(usage.hits),
        "x-cache-joined": str(usage.joins),
        "x-cache-misses": str(usage.misses),
        "x-embedding-space": result.space.label,
        "x-tokens-billed": str(usage.tokens_billed),
        "x-tokens-saved": str(usage.tokens_saved),
    }
    if result.fallback:
        headers["x-embedding-fallback"] = "true"
    if result.embedded.providers:
        headers["x-embedding-provider"] = ", ".join(result.embedded.providers)
    return headers
