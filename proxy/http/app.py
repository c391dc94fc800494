"""build_app(settings): the only wiring of HTTP. One cleanup context a resource."""

import socket
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING

from aiohttp import web
from embedding_proxy.proxy.config.keys_file import KeysFile
from embedding_proxy.proxy.config.schema import Settings
from embedding_proxy.proxy.http.connection_limits import ConnectionLimits
from embedding_proxy.proxy.http.cors import Cors
from embedding_proxy.proxy.http.descriptor_watch import watch_descriptors
from embedding_proxy.proxy.http.loop_guard import loop_guard
from embedding_proxy.proxy.http.metrics import Metrics
from embedding_proxy.proxy.http.models import Models
from embedding_proxy.proxy.http.origin_check import OriginCheck
from embedding_proxy.proxy.http.pace import MIN_BYTES_PER_S, UnreadReplies
from embedding_proxy.proxy.http.request_log import RequestLog
from embedding_proxy.proxy.http.request_metrics import RequestMetrics
from embedding_proxy.proxy.http.response_cache import HitCache, JSONVectorCache, ResponseCache
from embedding_proxy.proxy.http.status import Status
from embedding_proxy.proxy.service.embedding_service import EmbeddingService
from embedding_proxy.proxy.service.request import CALLER
from embedding_proxy.proxy.service.storage import MIB, REPLIES_SHARE

from . import request_body, request_log, status
from .app_runner import (
    CONNECTION,
    HEAD_TIMEOUT_S,
    LIMITS,
    LINES,
    REQUESTS,
    RESPONSES,
    SEND_TIMEOUT_S,
    UNREAD,
)
from .auth import Authenticator, KeysWatch, read_keys
from .dashboard_figures import Figures
from .dashboard_routes import Dashboard
from .embeddings import Embeddings
from .metrics_listener import MetricsListener
from .middleware import METRICS_PATH, Observers, admin_only, request_middleware
from .passthrough import Passthrough
from .passthrough_upstream import PREFIXES, PassthroughUpstream

if TYPE_CHECKING:
    from .tracing import Tracing

RETRY_HEADER = "x-stainless-retry-count"
"""Sent by OpenAI's own clients, and all that is built on them: they repeat a request by
themselves."""
SERVICE = web.AppKey("service", EmbeddingService)
METRICS = web.AppKey("metrics", Metrics)
DASHBOARD = web.AppKey("dashboard", Dashboard)


def build_app(
    settings: Settings,
    service: EmbeddingService | None = None,
    metrics_socket: socket.socket | None = None,
) -> web.Application:
    """Return the application; its service is opened at start-up and closed at the end.

    `service` replaces the one that the settings name, which is how tests inject waits of zero.
    `metrics_socket` listens at `server.metrics_listen`. Raises ConfigError for a file of keys with
    mistakes.
    """
    service = service or EmbeddingService(settings)
    server = settings.server
    keys_file = KeysFile(settings.keys_path)
    access = Authenticator(server.keys, read_keys(keys_file), server.metrics_token)
    cors = Cors(server.cors)
    service.namespaces = lambda: access.namespaces
    tracing = _tracing(settings)
    requests, lines = RequestMetrics(), RequestLog(is_enabled=settings.log.requests)
    observers = Observers(requests, lines, tracing)
    app = web.Application(
        middlewares=[
            request_middleware(access, cors, OriginCheck(server, cors, access), observers),
            loop_guard(settings),
        ]
    )
    app[SERVICE] = service
    app[status.READINESS] = status.Readiness()
    reply_bytes = int(settings.cache.memory_mib * MIB * REPLIES_SHARE)
    app[RESPONSES] = responses = ResponseCache(
        reply_bytes,
        is_enabled=server.fast_path and tracing is None,
        max_body=int(server.max_body_mib * MIB),
    )
    app[LIMITS] = ConnectionLimits.of(server)
    app[REQUESTS] = requests
    app[LINES] = lines
    app[HEAD_TIMEOUT_S] = server.head_timeout_s
    app[SEND_TIMEOUT_S] = server.send_timeout_s
    app[UNREAD] = unread = UnreadReplies(int(server.max_unread_mib * MIB))
    passthrough = None
    if settings.passthrough_provider is not None:
        origin = PassthroughUpstream(settings, access)
        passthrough = Passthrough(origin, settings)

        async def open_origin(_: web.Application) -> AsyncIterator[None]:
            async with origin:
                yield

        app.cleanup_ctx.append(open_origin)

    async def open_service(_: web.Application) -> AsyncIterator[None]:
        async with service:
            yield

    app.cleanup_ctx.append(open_service)
    metrics = Metrics(service, requests)
    app[METRICS] = metrics
    app.cleanup_ctx.append(metrics.run)
    if tracing is not None:
        app.cleanup_ctx.append(tracing.run)
    if metrics_socket is not None:
        app.cleanup_ctx.append(MetricsListener(metrics_socket, metrics.get).run)
    app.cleanup_ctx.append(KeysWatch(keys_file, access, responses.forget).run)
    app.cleanup_ctx.append(watch_descriptors)
    app.on_response_prepare.append(request_log.add_request_id)
    app.on_response_prepare.append(cors.mark)
    embeddings = Embeddings(service, HitCache(responses), JSONVectorCache(responses), unread)
    responses.handler = embeddings
    _add_routes(app, embeddings, service, settings, access, passthrough, metrics)
    _add_dashboard(app, service, access)
    return app


def _add_dashboard(app: web.Application, service: EmbeddingService, access: Authenticator) -> None:
    """Add the page for people. Its routes come after those of the metrics that it reads."""
    figures = Figures(service, app[METRICS], access)
    is_encrypted = service.settings.server.tls is not None
    app[DASHBOARD] = dashboard = Dashboard(service, access, figures, app[REQUESTS], is_encrypted)
    app.cleanup_ctx.append(dashboard.run)
    dashboard.add_routes(app)


def _tracing(settings: Settings) -> "Tracing | None":
    """Return what traces requests. Raises ConfigError where that is wanted and not installed."""
    if not settings.traces.enabled:
        return None
    from .tracing import Tracing  # noqa: PLC0415 - an extra

    return Tracing()


def _add_routes(  # noqa: PLR0913, PLR0917 - what the routes lead to
    app: web.Application,
    embeddings: Embeddings,
    service: EmbeddingService,
    settings: Settings,
    access: Authenticator,
    passthrough: Passthrough | None,
    metrics: Metrics,
) -> None:
    models, server = Models(service, passthrough), settings.server
    max_bytes = int(server.max_body_mib * MIB)
    takes_keys = any(
        provider.uses_client_key for provider in settings.providers.values() if provider
    )

    async def post_embeddings(request: web.Request) -> web.StreamResponse:
        # Of the waiting time that a client has, what is held back is worth a tenth at most.
        request[CONNECTION].hold_body(int(MIN_BYTES_PER_S * server.body_timeout_s / 10))
        content = await request_body.read(request, max_bytes, server.body_timeout_s)
        caller = request[CALLER]
        if takes_keys:
            caller = caller._replace(api_key=access.own_key(request.headers))
        retries = request.headers.get(RETRY_HEADER)
        if retries is not None:
            caller = caller._replace(retries=int(bool(retries.strip("0"))))
        return await embeddings.post(request, content, caller)

    for prefix in (*PREFIXES, ""):
        for slash in ("", "/"):
            path = f"{prefix}/embeddings{slash}"
            app.router.add_post(path, post_embeddings)
            app.router.add_get(f"{prefix}/models{slash}", models.list)
        # The ids of OpenRouter's models hold slashes.
        app.router.add_get(f"{prefix}/models/{{id:.+?}}{{slash:/?}}", models.get)
    # OpenAI's first form, and Azure's.
    for folder in ("/v1/engines", "/openai/deployments"):
        path = f"{folder}/{{model:.+?}}/embeddings{{slash:/?}}"
        app.router.add_post(path, post_embeddings)
    if passthrough is not None:
        for prefix in PREFIXES:
            # At a path of ours another method is a 405; `Passthrough` refuses all its spellings.
            path = prefix + r"/{rest:(?!(engines/.+/)?embeddings/?$).*}"
            app.router.add_route("*", path, passthrough.handle)
    app.router.add_get("/status", Status(service).get)
    app.router.add_get(METRICS_PATH, admin_only(metrics.get))
    for path in status.LIVE_PATHS:
        app.router.add_get(path, status.live)
    app.router.add_get("/readyz", status.ready)
    app.router.add_get(status.DESCRIPTION_PATH, status.describe)
