"""Spans of requests and of calls of providers, by OpenTelemetry.

A request is a span of kind SERVER, with what came from the cache; a call of a provider is a span of
kind CLIENT below it, by the conventions for generative AI
(https://opentelemetry.io/docs/specs/semconv/gen-ai/gen-ai-spans/#embeddings). Tokens that the cache
saved are never among `gen_ai.usage.input_tokens`: only what a provider charged is. No span holds an
input or a key.

Spans go where the variables OTEL_EXPORTER_OTLP_… say. While traces are off, nothing of this is
imported.
"""

from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from importlib.metadata import version

from aiohttp import web
from embedding_proxy.providers import request_context
from embedding_proxy.providers.errors import EmbeddingError
from embedding_proxy.proxy.config.errors import ConfigError

try:
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter
    from opentelemetry.trace import Span, SpanKind, Status, StatusCode
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
except ImportError as error:
    raise ConfigError(
        "traces.enabled: needs OpenTelemetry: `pip install 'opentelemetry-sdk>=1.30'"
        " 'opentelemetry-exporter-otlp-proto-http>=1.30'`"
    ) from error

from .request_log import MODEL, REQUEST_ID
from .request_metrics import CLIENT_GONE, route_name

_CACHE_HEADERS = {
    "x-cache-hits": "embedding_proxy.cache.hits",
    "x-cache-misses": "embedding_proxy.cache.misses",
    "x-cache-joined": "embedding_proxy.cache.coalesced",
    "x-tokens-billed": "embedding_proxy.tokens.billed",
    "x-tokens-saved": "embedding_proxy.tokens.saved",
}
"""Headers of a reply, and the attributes that have their numbers."""
_context = TraceContextTextMapPropagator()


class Tracing:
    """Makes the spans of one application."""

    def __init__(self, exporter: SpanExporter | None = None) -> None:
        """Prepare; `exporter` replaces the one that sends spans by OTLP over HTTP."""
        names = {"service.name": "embedding-proxy", "service.version": version("embedding-proxy")}
        self._provider = TracerProvider(resource=Resource.create(names))
        self._provider.add_span_processor(BatchSpanProcessor(exporter or OTLPSpanExporter()))
        self._tracer = self._provider.get_tracer("embedding_proxy")

    async def run(self, _: web.Application) -> AsyncIterator[None]:
        """Hear of calls of providers as long as the application runs; then send what is left."""
        former, request_context.observer.begin_call = (
            request_context.observer.begin_call,
            self.call,
        )
        try:
            yield
        finally:
            if request_context.observer.begin_call == self.call:
                request_context.observer.begin_call = former
            self._provider.shutdown()

    @contextmanager
    def request(self, request: web.Request) -> Iterator["_RequestSpan"]:
        """Trace a request while the block runs."""
        with self._tracer.start_as_current_span(
            f"{request.method} {route_name(request)}",
            context=_context.extract(request.headers),
            kind=SpanKind.SERVER,
        ) as span:
            headers: dict[str, str] = {}
            _context.inject(headers)
            request_context.traceparent.set(headers.get(request_context.TRACEPARENT, ""))
            told = _RequestSpan(span)
            try:
                yield told
            finally:
                told.finish(request)

    @contextmanager
    def call(self, provider: str, model: str, inputs: int) -> Iterator["_CallSpan"]:
        """Trace a call of a provider while the block runs."""
        with self._tracer.start_as_current_span(
            f"embeddings {model}",
            kind=SpanKind.CLIENT,
            attributes={
                "gen_ai.operation.name": "embeddings",
                "gen_ai.provider.name": provider,
                "gen_ai.request.model": model,
                "gen_ai.request.encoding_formats": ["base64"],
                "embedding_proxy.inputs": inputs,
            },
            record_exception=False,
            set_status_on_exception=False,
        ) as span:
            headers: dict[str, str] = {}
            _context.inject(headers)
            token = request_context.traceparent.set(headers.get(request_context.TRACEPARENT, ""))
            try:
                yield _CallSpan(span)
            except EmbeddingError as error:
                # Its message may quote what the provider said.
                span.set_attribute("error.type", error.reason)
                span.set_status(Status(StatusCode.ERROR))
                raise
            finally:
                request_context.traceparent.reset(token)


class _RequestSpan:
    """The span of one request."""

    def __init__(self, span: Span) -> None:
        self._span = span
        self.response: web.StreamResponse | None = None
        """The reply, once there is one."""

    def finish(self, request: web.Request) -> None:
        """Say how the request ended."""
        status = CLIENT_GONE if self.response is None else self.response.status
        self._span.set_attributes(
            {
                "http.request.method": request.method,
                "http.route": route_name(request),
                "http.response.status_code": status,
                "embedding_proxy.request_id": request[REQUEST_ID],
            }
        )
        if MODEL in request:
            self._span.set_attribute("gen_ai.request.model", request[MODEL])
        headers = {} if self.response is None else self.response.headers
        if "x-cache" in headers:
            self._span.set_attribute("embedding_proxy.cache.result", headers["x-cache"])
        for header, name in _CACHE_HEADERS.items():
            if header in headers:
                self._span.set_attribute(name, int(headers[header]))
        if status >= 500:
            self._span.set_attribute("error.type", str(status))
            self._span.set_status(Status(StatusCode.ERROR))


class _CallSpan:
    """The span of one call of a provider."""

    def __init__(self, span: Span) -> None:
        self._span = span

    def answered(self, tokens: int | None, dimensions: int) -> None:
        """Note what the call was charged, in tokens, and the width of its vectors."""
        if tokens is not None:
            self._span.set_attribute("gen_ai.usage.input_tokens", tokens)
        if dimensions:
            self._span.set_attribute("gen_ai.embeddings.dimension.count", dimensions)
