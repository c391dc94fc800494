"""Every call that is not ours: streamed to one provider, and back, as it is.

Nothing is tried again or followed: what the upstream says, its errors and redirects included, is
what the client gets, but for the provider's key. What is sent waits for who receives, both ways.
"""

import logging
from collections.abc import AsyncIterator
from typing import Any

import aiohttp
from aiohttp import HttpVersion11, web
from embedding_proxy.providers.errors import InvalidRequest, UpstreamTimeout
from embedding_proxy.providers.upstream.transport import failure_reason
from embedding_proxy.proxy.config.schema import Settings
from embedding_proxy.proxy.http.pace import Pace, reset
from embedding_proxy.proxy.http.target import path_of
from multidict import CIMultiDict
from yarl import URL

from . import passthrough_websocket
from .idle_timeout import IdleTimeout, IdleTooLong
from .passthrough_reply import (
    SecretFound,
    redacted_chunks,
    redacted_headers,
    redacted_reason,
    redacted_reply,
)
from .passthrough_upstream import PREFIXES, PassthroughUpstream, reply_headers
from .request_body import MIB, BodyRefused, too_slow
from .target import may_be_embeddings

log = logging.getLogger("embedding_proxy.passthrough")

_METHODS = ("DELETE", "GET", "HEAD", "OPTIONS", "PATCH", "POST", "PUT")
"""Not TRACE: its answer would show the key."""


class Passthrough:
    """Passes calls to an origin."""

    def __init__(self, origin: PassthroughUpstream, settings: Settings) -> None:
        self._origin = origin
        self._idle_s = settings.passthrough_idle_timeout_s
        self._body_timeout_s = settings.server.body_timeout_s
        self._max_message = int(settings.passthrough_max_message_mib * MIB)
        self._frozen = settings.cache.mode == "frozen"

    async def models(self, request: web.Request) -> list[dict[str, Any]]:
        """Return the models that the origin lists besides ours; none if it cannot be asked."""
        return [] if self._frozen else await self._origin.models(request)

    async def handle(self, request: web.Request) -> web.StreamResponse:
        """Answer one call. Raises EmbeddingError, HTTPException, ConnectionError."""
        origin = self._origin
        if request.method not in _METHODS:
            raise web.HTTPMethodNotAllowed(request.method, _METHODS)
        if may_be_embeddings(request.method, request.raw_path) or not _is_below(request.raw_path):
            # Embeddings go through the cache or nowhere, whatever the upstream makes of a path.
            raise web.HTTPNotFound
        if self._frozen:
            raise InvalidRequest(
                f"cache.mode is frozen: nothing is bought, so this call is not passed to"
                f" {origin.name}.",
                status=404,
                code="not_cached",
            )
        url = origin.address(request)
        headers = origin.headers(request, url)
        try:
            async with IdleTimeout(request, self._idle_s) as idle_timeout:
                if passthrough_websocket.is_wanted(request):
                    return await passthrough_websocket.connect(
                        request, origin, url, headers, idle_timeout, self._max_message
                    )
                upload = _Upload(request, idle_timeout, self._body_timeout_s)
                async with await self._begun(request, url, headers, upload) as reply:
                    idle_timeout.note_progress()
                    return await self._send_reply(request, reply, idle_timeout)
        except IdleTooLong as error:
            raise UpstreamTimeout(origin.name, str(error)) from error

    async def _begun(
        self, request: web.Request, url: URL, headers: CIMultiDict[str], upload: "_Upload"
    ) -> aiohttp.ClientResponse:
        """Send the call and return the reply as soon as it begins. Raises EmbeddingError."""
        try:
            reply = await self._origin.session.request(
                request.method,
                url,
                headers=headers,
                data=upload.chunks() if request.body_exists else None,
                allow_redirects=False,
            )
        except (aiohttp.ClientError, OSError) as error:
            if upload.refusal is not None:
                raise upload.refusal from error
            raise self._origin.failure(error) from error
        return self._origin.check_reply(reply)

    async def _send_reply(
        self, request: web.Request, reply: aiohttp.ClientResponse, idle_timeout: IdleTimeout
    ) -> web.StreamResponse:
        """Give the client the reply as it comes. Raises ConnectionError if it breaks off."""
        redactor = self._origin.redactor
        headers = redacted_headers(reply_headers(reply.headers), redactor)
        reason = redacted_reason(reply.reason, redactor)
        is_good = 200 <= reply.status < 300
        chunks = self._chunks(request, reply, idle_timeout)
        if not (is_good or request.method == "HEAD" or reply.status == 304):
            return await redacted_reply(reply.status, reason, headers, chunks, redactor)
        # Tells a reverse proxy to pass each part on when it comes, as is done here.
        headers["X-Accel-Buffering"] = "no"
        response = web.StreamResponse(status=reply.status, reason=reason, headers=headers)
        await response.prepare(request)
        try:
            encoding = ",".join(headers.getall("Content-Encoding", ()))
            async for passed in redacted_chunks(chunks, encoding, redactor):
                await response.write(passed)
                idle_timeout.note_progress()
        except SecretFound as error:
            log.warning(
                "passthrough: %s: a compressed reply was cut off before the proxy's key, which it"
                " holds",
                self._origin.name,
            )
            raise self._break_off(request, "the reply holds a key") from error
        await response.write_eof()
        return response

    async def _chunks(
        self, request: web.Request, reply: aiohttp.ClientResponse, idle_timeout: IdleTimeout
    ) -> AsyncIterator[bytes]:
        while chunk := await self._next(request, reply):
            idle_timeout.note_progress()
            yield chunk

    async def _next(self, request: web.Request, reply: aiohttp.ClientResponse) -> bytes:
        try:
            return await reply.content.readany()
        except (aiohttp.ClientError, OSError) as error:
            why = failure_reason(error)
            log.info("passthrough: %s: %s amid a reply", self._origin.name, why)
            raise self._break_off(request, f"{why} amid a reply") from error

    @staticmethod
    def _break_off(request: web.Request, why: str) -> ConnectionAbortedError:
        """Return what ends a reply before its end, so that its client knows it."""
        if request.version < HttpVersion11 and request.transport is not None:
            reset(request.transport)
        return ConnectionAbortedError(why)


def _is_below(target: str) -> bool:
    """Tell whether a target begins, as it is spelled, with what is routed here.

    That is one of PREFIXES, or `/models/`. One that begins so only when it is decoded would be sent
    below the base URL with its prefix.
    """
    return path_of(target).startswith(tuple(f"{prefix}/" for prefix in (*PREFIXES, "/models")))


class _Upload:
    """The body of a call, as it comes from the client."""

    def __init__(self, request: web.Request, idle_timeout: IdleTimeout, timeout_s: float) -> None:
        self._content = request.content
        self._idle_timeout = idle_timeout
        self._timeout_s = timeout_s
        self.refusal: BodyRefused | None = None
        """Why it ended before its end, if it did."""

    async def chunks(self) -> AsyncIterator[bytes]:
        """Yield it; the next part is read when the one before has gone on."""
        pace = Pace(self._timeout_s)
        try:
            while chunk := await pace.read(self._content):
                self._idle_timeout.note_progress()
                yield chunk
        except TimeoutError:
            self.refusal = too_slow(self._timeout_s)
            raise
        except (web.RequestPayloadError, OSError):
            self.refusal = BodyRefused("The request body broke off.")
            raise
