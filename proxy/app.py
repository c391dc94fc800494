"""build_app(settings): the only wiring of HTTP. One cleanup context a resource."""

import asyncio
import logging
import uuid
from collections.abc import AsyncIterator

from aiohttp import web
from aiohttp.typedefs import Handler, Middleware

from providers.base import EmbeddingError, InputRefused

from . import errors, ops
from .access import Access
from .embeddings import Embeddings
from .errors import Failure
from .models import Models
from .service import MIB, EmbeddingService
from .settings import Server, Settings

log = logging.getLogger("embedding_proxy.app")

SERVICE = web.AppKey("service", EmbeddingService)
REQUEST_ID = web.RequestKey("request_id", str)


def build_app(settings: Settings, service: EmbeddingService | None = None) -> web.Application:
    """Return the application; its service is opened at start-up and closed at the end.

    `service` replaces the one that the settings name, which is how tests inject waits of zero.
    """
    service = service or EmbeddingService(settings)
    server = settings.server
    app = web.Application(middlewares=[_guard(Access(server.keys))])
    app[SERVICE] = service

    async def open_service(_: web.Application) -> AsyncIterator[None]:
        async with service:
            yield

    app.cleanup_ctx.append(open_service)
    app.on_response_prepare.append(_stamp)
    _add_routes(app, service, server)
    return app


def _add_routes(app: web.Application, service: EmbeddingService, server: Server) -> None:
    embeddings, models = Embeddings(service), Models(service)
    most = int(server.max_body_mib * MIB)

    async def post_embeddings(request: web.Request) -> web.StreamResponse:
        return await embeddings.post(request, await _body(request, most, server.body_timeout_s))

    for prefix in ("/v1", ""):
        for slash in ("", "/"):
            app.router.add_post(f"{prefix}/embeddings{slash}", post_embeddings)
            app.router.add_get(f"{prefix}/models{slash}", models.list)
        # The ids of OpenRouter's models hold slashes.
        app.router.add_get(f"{prefix}/models/{{id:.+?}}{{slash:/?}}", models.get)
    app.router.add_get("/livez", ops.live)
    app.router.add_get("/readyz", ops.ready)


async def _body(request: web.Request, most: int, patience_s: float) -> bytes:
    """Read a whole body of at most `most` bytes, decompressed.

    Raises InputRefused for one that is larger, that breaks off, or of which nothing more arrives
    for `patience_s` seconds.
    """
    if (request.content_length or 0) > most:
        raise _too_large(most)
    chunks: list[bytes] = []
    size = 0
    try:
        while not request.content.at_eof():
            async with asyncio.timeout(patience_s):
                chunk = await request.content.readany()
            size += len(chunk)
            if size > most:
                raise _too_large(most)
            chunks.append(chunk)
    except TimeoutError as error:
        message = f"The request body stopped arriving; nothing came for {patience_s:g} s."
        raise InputRefused(message, status=408) from error
    except (web.RequestPayloadError, OSError) as error:
        raise InputRefused("The request body broke off or could not be decoded.") from error
    return b"".join(chunks)


def _too_large(most: int) -> InputRefused:
    limit = f"{most / MIB:g} MiB (server.max_body_mib)"
    return InputRefused(f"The request body is larger than {limit}.", status=413)


async def _stamp(request: web.Request, response: web.StreamResponse) -> None:
    """Give every response its request's id, streamed ones too."""
    response.headers["x-request-id"] = request.get(REQUEST_ID, "")


def _guard(access: Access) -> Middleware:
    """Return the middleware around everything: keys first, and every error in OpenAI's shape."""

    @web.middleware
    async def guard(request: web.Request, handler: Handler) -> web.StreamResponse:
        request_id = request[REQUEST_ID] = f"req_{uuid.uuid4().hex}"
        if request.path not in ops.OPEN_PATHS:
            refused = access.refusal(request.headers.get("Authorization"))
            if refused is not None:
                return refused.response()
        try:
            return await handler(request)
        except EmbeddingError as error:
            return errors.failure(error).response()
        except web.HTTPException as error:
            return _unrouted(request, error).response()
        except ConnectionError:
            # The client is gone, perhaps in the midst of a reply; nobody is left to tell.
            raise
        except Exception:
            # Whatever else it is, it is ours: the log gets the traceback, the client does not.
            log.exception("request %s failed", request_id)
            return errors.INTERNAL.response()

    return guard


def _unrouted(request: web.Request, error: web.HTTPException) -> Failure:
    """Return the error for a request that no handler takes."""
    what = f"({request.method} {request.path[:200]})"
    if error.status == 405:
        return Failure(405, f"Not allowed to do this here {what}.", "invalid_request_error")
    if error.status == 404:
        return Failure(404, f"Invalid URL {what}", "invalid_request_error", code="unknown_url")
    return Failure(error.status, error.reason, "invalid_request_error")
