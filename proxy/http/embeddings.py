"""POST /v1/embeddings: answers from kept responses, from the cache, or through the service."""

import asyncio
from collections.abc import Callable, Iterable, Sequence
from functools import partial

import orjson
from aiohttp import web
from embedding_proxy.providers import request_context
from embedding_proxy.providers.base import Vector
from embedding_proxy.providers.charge import NANO
from embedding_proxy.providers.upstream import hops
from embedding_proxy.proxy.http.pace import UnreadReplies
from embedding_proxy.proxy.http.request_log import MODEL, USD
from embedding_proxy.proxy.http.response_cache import (
    CONTEXT,
    REUSE,
    Answer,
    CachedResponse,
    HitCache,
    Hits,
    JSONVectorCache,
    RequestContext,
    header_lines,
)
from embedding_proxy.proxy.service.cache_policy import effective_cache_control
from embedding_proxy.proxy.service.embedding_result import Result
from embedding_proxy.proxy.service.embedding_service import EmbeddingService
from embedding_proxy.proxy.service.index_options import NO_INDEX_OPTIONS
from embedding_proxy.proxy.service.request import Client, EmbeddingRequest

from . import openai_format
from .app_runner import CONNECTION

# Up to this many bytes, reading a body is quicker than handing it to a thread.
_PARSE_INLINE = 1 << 20
# Inputs, of a request that is answered without a turn for others.
_FEW = 8
_PART = 1 << 20
"""Bytes of a reply that is kept as a whole, sent at a time."""
# Of a long reply: about half a millisecond's work. More at a time would not be quicker.
_CHUNKS_AT_A_TIME = 4


class Embeddings:
    """Answers embedding requests from a service: `http.response_cache.EmbeddingHandler`."""

    def __init__(
        self,
        service: EmbeddingService,
        hit_cache: HitCache,
        json_cache: JSONVectorCache,
        unread: UnreadReplies,
    ) -> None:
        self._service = service
        self._max_inputs = service.max_inputs
        self._hit_cache = hit_cache
        self._json_cache = json_cache
        self._unread = unread

    async def post(self, request: web.Request, body: bytes, caller: Client) -> web.StreamResponse:
        """Answer one request. Raises EmbeddingError."""
        # `Pragma` is not looked at: RFC 9111 keeps it for HTTP/1.0 clients, and says no more.
        control = effective_cache_control(
            ", ".join(request.headers.getall("Cache-Control", ())),
            self._service.settings.server.honor_cache_control,
            is_admin=caller.is_admin,
        )
        model = request.match_info.get("model")
        key, digest = request[CONNECTION].key, None
        embedding_request = None
        if key is not None:
            # Of this request and no other.
            parsed, key.embedding_request = key.embedding_request, None
            if key.failure is not None:
                request[MODEL] = "" if parsed is None else parsed.model
                raise key.failure
            if key.handler is self:
                embedding_request = parsed
        if embedding_request is None or embedding_request.lookup is None:
            digest = await self._hit_cache.digest(body, caller, control, model)
        cached = await self._hit_cache.get(digest)
        if cached is not None:
            hits, vectors = cached
            if vectors and self._hit_cache.has_room(hits):
                hits = await self._render(hits, vectors)
                self._hit_cache.put(digest, hits)
            return await self._send(request, hits, vectors)
        if embedding_request is None:
            named = partial(request.__setitem__, MODEL)
            parse = partial(openai_format.parse, body, self._max_inputs, model, named)
            embedding_request = (
                parse() if len(body) <= _PARSE_INLINE else await asyncio.to_thread(parse)
            )
        request[MODEL] = embedding_request.model
        waiting = caller._replace(is_connected=partial(_is_connected, request))
        result = await self._service.answer(embedding_request, waiting, control)
        request[USD] = result.usage.nanodollars_billed / NANO
        hits = self._hits(embedding_request, result)
        self._hit_cache.put(digest, hits)
        if not (caller.api_key or "Content-Encoding" in request.headers):
            passed, trace = hops.chain(), request_context.traceparent.get()
            request[CONTEXT] = RequestContext(caller, control, model, passed, trace)
        return await self._send(request, hits, result.embedded.vectors)

    def parse_sync(self, body: bytes, context: RequestContext) -> tuple[EmbeddingRequest, bytes]:
        """Return what a body asks for, and what of it decides the answer; see the protocol."""
        request = openai_format.parse(body, self._max_inputs, context.model)
        if (
            len(request.inputs) > _FEW
            or request.parameters
            or request.index is not NO_INDEX_OPTIONS
        ):
            return request, b""
        essence = (
            request.model,
            request.encoding,
            request.dimensions,
            request.inputs,
        )
        return request, orjson.dumps(essence)

    def handle_sync(
        self, request: EmbeddingRequest, context: RequestContext
    ) -> CachedResponse | None:
        """Answer one request if nothing has to be waited for; see the protocol."""
        result = self._service.embed_from_cache(request, context.caller, context.control)
        if result is None:
            return None
        return self._whole(self._hits(request, result), result.embedded.vectors, context)

    async def handle(
        self,
        request: EmbeddingRequest,
        context: RequestContext,
        is_connected: Callable[[], bool],
    ) -> Answer:
        """Answer one request of few inputs; see the protocol."""
        caller = context.caller._replace(is_connected=is_connected)
        result = await self._service.answer(request, caller, context.control)
        hits = self._hits(request, result)
        response = self._whole(hits, result.embedded.vectors, context)
        usd = result.usage.nanodollars_billed / NANO
        return Answer(response, request.model, hits.headers, usd)

    def _whole(
        self, hits: Hits, vectors: Sequence[Vector], context: RequestContext
    ) -> CachedResponse:
        body = openai_format.render_whole(vectors, hits.form, self._json_cache.json)
        headers = header_lines((*hits.headers.items(), ("Content-Length", str(len(body)))))
        return CachedResponse(context.lines + headers, body, _reuse(hits, vectors), len(vectors))

    def _hits(self, request: EmbeddingRequest, result: Result) -> Hits:
        form = openai_format.ResponseFormat(
            result.dimensions, request.encoding, request.model, result.tokens
        )
        cached_hit = self._service.reusable(result, request.index)
        return Hits(form, _headers(result), cached_hit, len(request.inputs))

    async def _send(
        self, request: web.Request, hits: Hits, vectors: Sequence[Vector]
    ) -> web.StreamResponse:
        form = hits.form
        if hits.rendered:
            parts = range(0, len(hits.rendered), _PART)
            view = memoryview(hits.rendered)
            return await self._stream(request, hits, (), (view[at : at + _PART] for at in parts))
        if len(vectors) > form.vectors_a_chunk:
            chunks = openai_format.render(vectors, form, self._json_cache.json)
            return await self._stream(request, hits, vectors, chunks)
        reuse = _reuse(hits, vectors)
        if reuse is not None:
            request[REUSE] = reuse, len(vectors)
        body = openai_format.render_whole(vectors, form, self._json_cache.json)
        return web.Response(body=body, content_type="application/json", headers=hits.headers)

    async def _render(self, hits: Hits, vectors: Sequence[Vector]) -> Hits:
        """Return hits with all that is to be sent of them, while others get their turn."""
        reuse = _reuse(hits, vectors)
        if reuse is None:
            return hits
        parts = []
        for number, chunk in enumerate(
            openai_format.render(vectors, hits.form, self._json_cache.json)
        ):
            parts.append(chunk)
            if number % _CHUNKS_AT_A_TIME == 0:
                await asyncio.sleep(0)
        return hits._replace(rendered=b"".join(parts), reuse=reuse)

    async def _stream(
        self,
        request: web.Request,
        hits: Hits,
        vectors: Sequence[Vector],
        chunks: Iterable[bytes | memoryview],
    ) -> web.StreamResponse:
        """Send a long reply as its client takes it."""
        response = web.StreamResponse(headers=hits.headers)
        response.content_type = "application/json"
        response.content_length = len(hits.rendered) or hits.form.length(len(vectors))
        await response.prepare(request)
        if request.transport is not None:  # Else nobody is there any more.
            self._unread.bound(request.transport)
            request.transport.set_write_buffer_limits(_CHUNKS_AT_A_TIME * openai_format.CHUNK)
        with self._unread.hold(len(hits.rendered) or sum(map(len, vectors))):
            for number, chunk in enumerate(chunks):
                # A write to a fast reader does not wait; other requests get their turn here.
                if number % _CHUNKS_AT_A_TIME == 0:
                    await asyncio.sleep(0)
                await response.write(chunk)
            await response.write_eof()
        return response


def _is_connected(request: web.Request) -> bool:
    return request.transport is not None and request[CONNECTION].is_listening


def _reuse(hits: Hits, vectors: Sequence[Vector]) -> Callable[[], bool] | None:
    """Return what validates a response with these vectors; None if it is given just once."""
    return None if hits.cached_hit is None else hits.cached_hit.reuse_of(vectors)


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
