"""The second route answers when the first cannot, and each provider's key stays with its origin.

What each fault gets is the table of `test_faults`.
"""

import contextlib
import math

import numpy as np
import openai
import pytest
from embedding_proxy.providers.routing import circuit_breaker
from fault_server import status, vector_of

MODEL = "text-embedding-3-small"


async def test_second_route_answers(upstream, second, start_proxy):
    """The official client gets the right vectors, is told who computed them, and sees no fault."""
    upstream.always = status(500)
    proxy = await start_proxy(openai=upstream, openrouter=second)
    reply = await proxy.client.embeddings.with_raw_response.create(model=MODEL, input=["a", "b"])
    assert reply.headers["x-embedding-provider"] == "openrouter"
    assert reply.headers["x-embedding-space"] == "openai/text-embedding-3-small"
    for item, text in zip(reply.parse().data, ("a", "b"), strict=True):
        got = np.array(item.embedding, dtype=np.float32)
        assert got.tobytes() == vector_of(MODEL, text).tobytes()
    assert second.calls[0].payload["model"] == f"openai/{MODEL}"
    assert upstream.calls, "the first route was asked first"


@pytest.mark.parametrize("is_retry", [True, False])
async def test_a_success_after_a_failure_is_told_in_the_log(
    is_retry, upstream, second, start_proxy, caplog
):
    """A retry and a failover: who answered, in which attempt, and why. No text is shown."""
    caplog.set_level("INFO", "embedding_proxy.router")
    upstream.script.append(status(500))
    upstream.always = None if is_retry else status(500)
    proxy = await start_proxy(openai=upstream, openrouter=None if is_retry else second)
    assert (await proxy.post({"model": MODEL, "input": ["a secret text"]})).status == 200
    (line,) = [one.getMessage() for one in caplog.records if "answered" in one.getMessage()]
    answered = f"openai: answered for model {MODEL}"
    if not is_retry:
        answered = f"openrouter: answered for model openai/{MODEL}"
    attempt = 2 if is_retry else len(upstream.calls) + 1
    assert line == f"{answered} in attempt {attempt}, after upstream_error at openai"
    assert "secret text" not in caplog.text
    caplog.clear()
    assert (await proxy.post({"model": MODEL, "input": ["another"]})).status == 200
    assert is_retry is ("answered" not in caplog.text)


async def test_a_provider_without_credit_is_left_alone(upstream, second, start_proxy):
    """Row 3: later requests go straight to the second provider, of every model."""
    upstream.always = status(402)
    proxy = await start_proxy(openai=upstream, openrouter=second)
    for i, model in enumerate((MODEL, MODEL, "text-embedding-ada-002")):
        assert (await proxy.post({"model": model, "input": f"{i}"})).status == 200
    assert (len(upstream.calls), len(second.calls)) == (1, 3)


async def test_nobody_is_asked_when_everybody_is_down(upstream, second, start_proxy, monkeypatch):
    """Row 23: hits go on; misses get 503 with Retry-After, and no call is made for them."""
    # However slow the machine is, no probe falls due.
    monkeypatch.setattr(circuit_breaker, "FIRST_OPEN_S", 100.0)
    proxy = await start_proxy(openai=upstream, openrouter=second)
    await proxy.post({"model": MODEL, "input": "known"})
    upstream.always = second.always = status(500)
    for i in range(10):
        reply = await proxy.post({"model": MODEL, "input": f"unknown {i}"})
    calls = len(upstream.calls) + len(second.calls)
    refused = [await proxy.post({"model": MODEL, "input": f"more {i}"}) for i in range(20)]
    assert len(upstream.calls) + len(second.calls) == calls
    for reply in refused[:3]:
        error = (await reply.json())["error"]
        assert (reply.status, error["code"]) == (503, "upstream_unavailable")
        assert "openai: it failed 5 times in a row" in error["message"]
        assert "secret" not in error["message"]
        wait_ms = int(reply.headers["retry-after-ms"])
        assert 0 < wait_ms <= 100_000
        assert int(reply.headers["Retry-After"]) == math.ceil(wait_ms / 1000)
    hit = await proxy.post({"model": MODEL, "input": "known"})
    assert (hit.status, hit.headers["x-cache"]) == (200, "hit")


async def test_refused_connection_goes_to_the_second_route(upstream, second, start_proxy):
    """A provider that cannot be reached costs the client nothing, and what is bought is kept."""
    proxy = await start_proxy(openai=upstream, openrouter=second)
    await upstream.stop()
    request = {"model": MODEL, "input": "a"}
    first = await proxy.post(request)
    assert (first.status, first.headers["x-embedding-provider"]) == (200, "openrouter")
    await second.stop()
    again = await proxy.post(request)
    assert (again.status, again.headers["x-cache"]) == (200, "hit")
    assert "x-embedding-provider" not in again.headers
    assert await again.text() == await first.text()


async def test_passing_fault_is_tried_again_at_the_same_provider(upstream, second, start_proxy):
    """One hiccup of the first provider does not send the request elsewhere."""
    upstream.script.append(status(500))
    proxy = await start_proxy(openai=upstream, openrouter=second)
    reply = await proxy.post({"model": MODEL, "input": "a"})
    assert reply.headers["x-embedding-provider"] == "openai"
    assert len(upstream.calls) == 2
    assert not second.calls


async def test_refused_input_ends_the_matter(upstream, second, start_proxy):
    """A 400 is the client's to hear, in the upstream's own words; nobody else is asked."""
    body = {"error": {"message": "too long", "type": "x", "param": "input", "code": "c"}}
    upstream.always = status(400, body)
    proxy = await start_proxy(openai=upstream, openrouter=second)
    with pytest.raises(openai.BadRequestError) as caught:
        await proxy.client.embeddings.create(model=MODEL, input="a")
    assert caught.value.body == body["error"]
    assert len(upstream.calls) == 1
    assert not second.calls


async def test_each_key_goes_to_its_own_origin(upstream, second, start_proxy):
    """Each provider sees its own key, and neither the other's nor the client's."""
    upstream.always = status(500)
    proxy = await start_proxy(openai=upstream, openrouter=second)
    await proxy.client.embeddings.create(model=MODEL, input="a", user="alice")
    for server, own in ((upstream, "openai"), (second, "openrouter")):
        assert server.calls
        for call in server.calls:
            assert call.headers["Authorization"] == f"Bearer {own}-secret-key"
            everything = repr((call.headers, call.payload))
            for other in {"openai-secret", "openrouter-secret", "client-key"} - {f"{own}-secret"}:
                assert other not in everything


async def test_one_wire_format_a_provider(upstream, second, start_proxy):
    """OpenAI is asked for base64 and OpenRouter for floats, always at the native width."""
    upstream.always = status(500)
    proxy = await start_proxy(openai=upstream, openrouter=second)
    for i, encoding in enumerate(("float", "base64")):
        await proxy.client.embeddings.create(
            model=MODEL, input=f"{i}", encoding_format=encoding, dimensions=256
        )
    assert {call.payload["encoding_format"] for call in upstream.calls} == {"base64"}
    assert {call.payload["encoding_format"] for call in second.calls} == {"float"}
    assert not any("dimensions" in call.payload for call in upstream.calls + second.calls)


async def test_total_outage_is_the_upstreams_not_ours(upstream, second, start_proxy):
    """With every provider down, known inputs are served and unknown ones get OpenAI's shape."""
    proxy = await start_proxy(openai=upstream, openrouter=second)
    await proxy.client.embeddings.create(model=MODEL, input="known")
    await upstream.stop()
    await second.stop()
    hit = await proxy.post({"model": MODEL, "input": "known"})
    assert (hit.status, hit.headers["x-cache"]) == (200, "hit")
    missed = await proxy.post({"model": MODEL, "input": "unknown"})
    error = (await missed.json())["error"]
    assert missed.status == 502
    assert set(error) == {"message", "type", "param", "code"}
    assert missed.headers["Retry-After"]


async def test_no_key_is_said_clearly(start_proxy):
    """Without a key the error names the variable to set, and the local model works."""
    proxy = await start_proxy()
    with pytest.raises(openai.PermissionDeniedError) as caught:
        await proxy.client.embeddings.create(model=MODEL, input="a")
    assert "OPENAI_API_KEY" in caught.value.body["message"]
    assert caught.value.response.headers["x-should-retry"] == "false"
    reply = await proxy.client.embeddings.create(model="wordllama-embed", input="a")
    assert len(reply.data[0].embedding) == 256


async def test_cached_vectors_need_no_key(upstream, start_proxy, monkeypatch):
    """What was bought is served on, also by a proxy that has no key any more."""
    proxy = await start_proxy(openai=upstream)
    await proxy.client.embeddings.create(model=MODEL, input="a")
    await start_proxy.stop()
    monkeypatch.delenv("OPENAI_API_KEY")
    proxy = await start_proxy()
    assert (await proxy.post({"model": MODEL, "input": "a"})).headers["x-cache"] == "hit"
    with contextlib.suppress(openai.APIStatusError):
        await proxy.client.embeddings.create(model=MODEL, input="b")
    assert len(upstream.calls) == 1
