"""Spans of requests and calls, as an OpenTelemetry backend gets them."""

import pytest
from embedding_proxy.proxy.http import app as application
from embedding_proxy.proxy.http.tracing import Tracing
from fault_server import status, tokens_of
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind

MODEL = {"space": "s/m", "dimensions": 8, "price": 2.0, "routes": [
    {"provider": "openai", "model": "upstream-m"}]}  # fmt: skip
TRACE = "4bf92f3577b34da6a3ce929d0e0e4736"
PARENT = f"00-{TRACE}-00f067aa0ba902b7-01"


@pytest.fixture
async def traced(upstream, start_proxy, monkeypatch):
    """Give a proxy with traces, and a function that ends it and returns its spans by kind."""
    exporter = InMemorySpanExporter()
    monkeypatch.setattr(application, "_tracing", lambda _: Tracing(exporter))
    upstream.widths = {"upstream-m": 8}
    proxy = await start_proxy(openai=upstream, models={"m": MODEL})

    async def spans():
        await start_proxy.stop()
        found = exporter.get_finished_spans()
        return [[span for span in found if span.kind is kind] for kind in SpanKind][1:3]

    return proxy, spans


async def test_a_miss_is_a_request_and_a_call_below_it(traced, upstream):
    """Names and attributes by the conventions; the client's trace goes on to the provider."""
    proxy, spans = traced
    body = {"model": "m", "input": ["one text", "two"]}
    response = await proxy.post(body, traceparent=PARENT)
    (request,), (call,) = await spans()
    assert f"{request.context.trace_id:032x}" == f"{call.context.trace_id:032x}" == TRACE
    assert call.parent.span_id == request.context.span_id
    assert upstream.calls[0].headers["traceparent"].split("-")[2] == f"{call.context.span_id:016x}"
    assert call.name == "embeddings upstream-m"
    tokens = tokens_of("one text") + tokens_of("two")
    assert dict(call.attributes) == {
        "gen_ai.operation.name": "embeddings",
        "gen_ai.provider.name": "openai",
        "gen_ai.request.model": "upstream-m",
        "gen_ai.request.encoding_formats": ("base64",),
        "gen_ai.usage.input_tokens": tokens,
        "gen_ai.embeddings.dimension.count": 8,
        "embedding_proxy.inputs": 2,
    }
    assert dict(request.attributes) == {
        "http.request.method": "POST",
        "http.route": "embeddings",
        "http.response.status_code": 200,
        "gen_ai.request.model": "m",
        "embedding_proxy.request_id": response.headers["x-request-id"],
        "embedding_proxy.cache.result": "miss",
        "embedding_proxy.cache.hits": 0,
        "embedding_proxy.cache.misses": 2,
        "embedding_proxy.cache.coalesced": 0,
        "embedding_proxy.tokens.billed": tokens,
        "embedding_proxy.tokens.saved": 0,
    }


async def test_a_hit_says_so_and_bills_nothing(traced):
    """No call, and no token that a provider charged; also the third time the same body comes."""
    proxy, spans = traced
    for _ in range(3):
        await proxy.post({"model": "m", "input": "one text"})
    requests, calls = await spans()
    assert len(calls) == 1
    results = [span.attributes["embedding_proxy.cache.result"] for span in requests]
    assert results == ["miss", "hit", "hit"]
    for span in requests[1:]:
        assert span.attributes["embedding_proxy.tokens.billed"] == 0
        assert span.attributes["embedding_proxy.tokens.saved"] == tokens_of("one text")
        assert "gen_ai.usage.input_tokens" not in span.attributes


async def test_a_failure_has_its_reason_and_no_message(traced, upstream):
    """The message may quote the provider, and through it the input."""
    proxy, spans = traced
    upstream.script.append(status(402))
    assert (await proxy.post({"model": "m", "input": "a secret text"})).status == 402
    (request,), (call,) = await spans()
    assert call.attributes["error.type"] == "quota_exceeded"
    assert not call.status.is_ok
    assert request.attributes["http.response.status_code"] == 402
    assert call.events == ()
    assert "secret" not in call.to_json() + request.to_json()


async def test_without_traces_nothing_is_imported(upstream, start_proxy):
    """The default: calls are observed by nobody."""
    upstream.widths = {"upstream-m": 8}
    proxy = await start_proxy(openai=upstream, models={"m": MODEL})
    assert (await proxy.post({"model": "m", "input": "a"})).status == 200
    assert application._tracing(proxy.service.settings) is None
