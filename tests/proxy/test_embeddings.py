"""POST /v1/embeddings: what the reply says of the cache, and how it is sent."""

import asyncio
import json

import pytest
from embedding_proxy.cache import embedder
from embedding_proxy.proxy.http.openai_format import ResponseFormat
from fault_server import status

SMALL = "text-embedding-3-small"
COUNTS = ("x-cache-hits", "x-cache-joined", "x-cache-misses")


async def _ask(proxy, inputs, **fields):
    """Return the headers and the body of an answer."""
    body = {"model": SMALL, "input": inputs, **fields}
    async with proxy.http.post(f"{proxy.url}/embeddings", json=body) as response:
        assert response.status == 200
        assert response.content_type == "application/json"
        return response.headers, await response.read()


# What is asked first, and then; the verdict, hits, misses, tokens billed and saved of the latter.
CASES = {
    "all new": ([], ["a b", "c"], "miss", (0, 2), (3, 0)),
    "all known": (["a b", "c"], ["c", "a b"], "hit", (2, 0), (0, 3)),
    "some known": (["c"], ["a b", "c", "d"], "partial", (1, 2), (3, 1)),
    "twice in one request": ([], ["a b", "a b", "a b"], "miss", (0, 1), (2, 4)),
    "twice and known": (["a b"], ["a b", "a b"], "hit", (1, 0), (0, 4)),
}


@pytest.mark.parametrize(
    ("first", "then", "verdict", "counts", "billed"), CASES.values(), ids=CASES
)
async def test_headers_say_how_a_request_was_answered(
    *, first, then, verdict, counts, billed, upstream, start_proxy
):
    """The counts are of distinct inputs, each input once; tokens are billed only for misses."""
    proxy = await start_proxy(openai=upstream)
    if first:
        await _ask(proxy, first)
    headers, body = await _ask(proxy, then)
    hits, misses = counts
    assert headers["x-cache"] == verdict
    assert [headers[name] for name in COUNTS] == [str(hits), "0", str(misses)]
    assert [headers[f"x-tokens-{name}"] for name in ("billed", "saved")] == [str(n) for n in billed]
    assert headers.get("x-embedding-provider") == ("openai" if misses else None)
    assert headers["x-embedding-space"] == f"openai/{SMALL}"
    assert json.loads(body)["usage"]["prompt_tokens"] == sum(billed)


async def test_a_request_that_waits_for_anothers_purchase_joins_it(
    upstream, start_proxy, monkeypatch
):
    """Two requests for one input at once buy it once: one misses, the other joins for nothing."""
    upstream.gate = asyncio.Event()
    waiting = []

    async def wait(fetches, joins) -> None:
        waiting.append(fetches)
        if len(waiting) == 2:
            upstream.gate.set()
        await real_wait(fetches, joins)

    real_wait = embedder.wait
    monkeypatch.setattr(embedder, "wait", wait)
    proxy = await start_proxy(openai=upstream)
    replies = await asyncio.gather(_ask(proxy, ["a"]), _ask(proxy, ["a"]))
    assert upstream.inputs == ["a"]
    by_misses = sorted((headers for headers, _ in replies), key=lambda h: h["x-cache-misses"])
    assert [[h[name] for name in COUNTS] for h in by_misses] == [["0", "1", "0"], ["0", "0", "1"]]
    assert [h["x-cache"] for h in by_misses] == ["miss", "miss"]
    assert [h["x-tokens-billed"] for h in by_misses] == ["0", "1"]
    assert [h["x-tokens-saved"] for h in by_misses] == ["1", "0"]
    assert replies[0][1] == replies[1][1]


CHUNK = {
    encoding: ResponseFormat(1536, encoding, SMALL, 1).vectors_a_chunk
    for encoding in ("base64", "float")
}


@pytest.mark.parametrize(
    ("count", "encoding"),
    [
        (1, "float"),
        (CHUNK["base64"], "base64"),
        (CHUNK["float"], "float"),
        (CHUNK["float"] + 1, "float"),
        (2 * CHUNK["base64"], "base64"),
    ],
)
async def test_a_reply_is_the_same_on_a_miss_and_on_a_hit(count, encoding, upstream, start_proxy):
    """Whole or streamed, a hit gives byte for byte what the miss gave, also after a restart."""
    asked = {"inputs": [f"text {i}" for i in range(count)], "encoding_format": encoding}
    proxy = await start_proxy(openai=upstream)
    headers, first = await _ask(proxy, **asked)
    _, second = await _ask(proxy, **asked)
    await start_proxy.stop()
    _, third = await _ask(await start_proxy(openai=upstream), **asked)
    assert first == second == third
    whole = count <= CHUNK[encoding]
    assert ("Content-Length" in headers) == (whole or encoding == "base64")
    assert [item["index"] for item in json.loads(first)["data"]] == list(range(count))
    assert len(upstream.calls) == 1


@pytest.mark.parametrize("model", [SMALL, f"openai/{SMALL}"])
async def test_the_reply_names_the_model_that_was_asked_for(model, upstream, start_proxy):
    """The reply's model is the client's word for it, the upstream gets its own."""
    proxy = await start_proxy(openai=upstream)
    _, body = await _ask(proxy, "a", model=model)
    assert json.loads(body)["model"] == model
    assert upstream.calls[0].payload["model"] == SMALL


async def test_other_fields_show_in_the_space(upstream, start_proxy):
    """A field that is sent on is named in x-embedding-space, its value is not; no other is."""
    proxy = await start_proxy(openai=upstream)
    headers, _ = await _ask(proxy, "a", task="q é", user="u", encoding_format="base64")
    assert headers["x-embedding-space"] == f"openai/{SMALL}?task=~00572efd1bddb074"
    assert upstream.calls[0].payload["task"] == "q é"


async def test_the_provider_that_computed_is_named(upstream, second, start_proxy):
    """After a failover x-embedding-provider names who answered, not who was asked first."""
    upstream.always = status(500)
    proxy = await start_proxy(openai=upstream, openrouter=second)
    headers, _ = await _ask(proxy, "a")
    assert headers["x-embedding-provider"] == "openrouter"
