"""Upstreams in the wild, as a client sees them: what they really answer is served, or explained.

Which fault gets what is the table of `test_faults`; the shapes themselves are in `test_error_body`.
"""

import json

import numpy as np
import pytest
from fault_server import status, succeeding, vector_of

MODEL = "text-embedding-3-small"
LINES = "\n".join(
    f"2026-03-01T12:00:0{i}.123456Z INFO checkout-worker-{i} request=9f86d081884c7d659a2feaa0c55ad"
    f" finished=true elapsed=1{i}ms retries={i}"
    for i in range(5)
)
CHUNKS = [f"{LINES}\nthe last job failed", f"{LINES}\nall is well, and nobody waits"]
"""Two chunks of a log that differ in their last line alone."""


def alike(payload_of):
    """Return a change of a reply that gives inputs one vector if they are the same to the model."""

    def change(reply):
        first = {}
        for item, text in zip(reply["data"], payload_of(), strict=True):
            item["embedding"] = first.setdefault(text[:400], item["embedding"])

    return change


async def right(response, inputs, model=MODEL, width=1536):
    """Check that a reply holds the right vectors in the right order."""
    assert response.status == 200, await response.text()
    items = (await response.json())["data"]
    for one, text in zip(items, inputs, strict=True):
        assert np.array_equal(np.array(one["embedding"], "<f4"), vector_of(model, text, width))


async def message_of(response):
    """Return what a client is told."""
    return (await response.json())["error"]["message"]


@pytest.mark.parametrize("inputs", [["a"], ["a", "b", "c"]])
@pytest.mark.parametrize("usage", [..., None, 0, "3"], ids=str)
async def test_gemini_is_served(inputs, usage, upstream, start_proxy, caplog):
    """The kind `gemini` works although `index` is missing where it is 0, and `usage` is odd."""
    upstream.widths = {"gemini-embedding-001": 3072}

    def as_google(reply):
        del reply["data"][0]["index"]
        reply["model"] = "models/gemini-embedding-001"
        if usage is ...:
            del reply["usage"]
        else:
            reply["usage"] = {"prompt_tokens": usage} if usage is not None else None

    upstream.always = upstream.altered(as_google)
    section = {"base_url": upstream.url, "api_key_env": "PATH"}  # Any variable that is set.
    proxy = await start_proxy(providers={"gemini": section})
    body = {"model": "gemini-embedding-001", "input": inputs}
    await right(await proxy.post(body), inputs, "gemini-embedding-001", 3072)
    assert (await proxy.post(body)).headers["x-cache"] == "hit"
    assert len(upstream.calls) == 1
    assert caplog.text.count("leave out `index`") == 1


async def test_a_201_is_bought_once(upstream, start_proxy):
    """A good answer under another status of success is one purchase, billed and kept."""
    upstream.always = succeeding(201, b"\xef\xbb\xbf")
    proxy = await start_proxy(openai=upstream)
    reply = await proxy.post({"model": MODEL, "input": "one two"})
    await right(reply, ["one two"])
    assert (len(upstream.calls), reply.headers["x-tokens-billed"]) == (1, "2")


async def test_chunks_that_differ_beyond_the_models_cut_are_served(upstream, start_proxy):
    """Two texts may have one vector where a model cuts: they are served as a pair, in one call."""
    upstream.always = upstream.altered(alike(lambda: upstream.calls[-1].inputs))
    proxy = await start_proxy(openai=upstream)
    reply = await proxy.post({"model": MODEL, "input": CHUNKS})
    await right(reply, [CHUNKS[0]] * 2)
    assert len(upstream.calls) == 1
    assert (await proxy.post({"model": MODEL, "input": CHUNKS})).headers["x-cache"] == "hit"


async def test_one_vector_for_all_inputs_of_a_call_is_never_kept(upstream, start_proxy):
    """An upstream that fuses the inputs of a call gives a vector that is nobody's."""

    def fused(reply):
        numbers = reply["data"][0]["embedding"]
        for item in reply["data"]:
            item["embedding"] = numbers

    inputs = ["a cat", "a dog", "a bird"]
    upstream.always = upstream.altered(fused)
    proxy = await start_proxy(openai=upstream)
    await proxy.post({"model": MODEL, "input": inputs})
    upstream.always = None
    for text in inputs:
        await right(await proxy.post({"model": MODEL, "input": text}), [text])


@pytest.mark.parametrize("bad", [None, [0.0] * 1536, [0.5] * 7, "AAAA", [float("nan")] * 1536])
async def test_a_bad_vector_costs_the_others_nothing(bad, upstream, start_proxy):
    """Of 64 inputs 63 are bought once and kept; the bad one is asked for again, then alone."""
    inputs = [f"text {i}" for i in range(64)]

    def spoil(reply):
        asked = upstream.calls[-1].inputs
        if "text 5" in asked:
            reply["data"][asked.index("text 5")]["embedding"] = bad

    async def act(request, payload):
        reply = upstream.reply(payload)
        spoil(reply)
        return await status(200, json.dumps(reply).encode())(request, payload)

    upstream.always = act
    proxy = await start_proxy(openai=upstream)
    reply = await proxy.post({"model": MODEL, "input": inputs})
    assert reply.status == 502
    assert "embedding 0: " in await message_of(reply) or "input 5" in await message_of(reply)
    assert {text: upstream.inputs.count(text) for text in inputs if text != "text 5"} == (
        dict.fromkeys((text for text in inputs if text != "text 5"), 1)
    )
    assert [call.inputs for call in upstream.calls[1:]] == [["text 5"]] * len(upstream.calls[1:])
    upstream.calls.clear()
    upstream.always = None
    await right(await proxy.post({"model": MODEL, "input": inputs}), inputs)
    assert upstream.inputs == ["text 5"]


async def test_a_call_with_a_bad_vector_is_on_the_bill_once(upstream, start_proxy):
    """What the ledger says was billed is what the upstream was asked for, bad vectors included."""

    def spoil(reply):
        if len(reply["data"]) > 1:
            reply["data"][1]["embedding"] = [0.0] * 1536

    upstream.always = upstream.altered(spoil)
    proxy = await start_proxy(openai=upstream)
    inputs = ["one two three", "four five", "six"]
    await right(await proxy.post({"model": MODEL, "input": inputs}), inputs)
    assert upstream.inputs == [*inputs, "four five"]
    ((_, sums),) = await proxy.service.ledger([])
    assert sums.tokens_billed == 3 + 2 + 1 + 2


@pytest.mark.parametrize("reset", ["4102444800", "4102444800000", "2100-01-01T00:00:00Z", "9999h"])
@pytest.mark.parametrize("code", [200, 429])
async def test_no_header_locks_a_model_out(code, reset, upstream, start_proxy):
    """Whatever date or time an upstream names, its model is asked again within an hour."""
    headers = {
        "x-ratelimit-limit-requests": "1",
        "x-ratelimit-remaining-requests": "0",
        "x-ratelimit-reset-requests": reset,
    }
    body = upstream.reply({"model": MODEL, "input": ["a"], "encoding_format": "base64"})
    upstream.always = status(code, body, headers)
    proxy = await start_proxy(openai=upstream, server={"request_timeout_s": 30})
    await proxy.post({"model": MODEL, "input": "a"})
    reply = await proxy.post({"model": MODEL, "input": "b"})
    assert reply.status in (429, 503)
    assert 0 < int(reply.headers["Retry-After"]) <= 3600


@pytest.mark.parametrize("reset", ["0", "0s", "1767225600", "2026-01-01T00:00:00Z"])
async def test_a_reset_in_the_past_is_now(reset, upstream, start_proxy):
    """Where all is said to be used up until a moment that has passed, nobody waits."""
    headers = {
        "x-ratelimit-limit-requests": "1",
        "x-ratelimit-remaining-requests": "0",
        "x-ratelimit-reset-requests": reset,
    }
    proxy = await start_proxy(openai=upstream, server={"request_timeout_s": 30})
    for text in ("a", "b", "c"):
        payload = {"model": MODEL, "input": [text], "encoding_format": "base64"}
        upstream.always = status(200, upstream.reply(payload), headers)
        await right(await proxy.post({"model": MODEL, "input": text}), [text])


REASONS = {
    "detail": ({"detail": "no such table"}, "no such table"),
    "fastapi": ({"detail": [{"loc": ["body", "x"], "msg": "is required"}]}, "body.x: is required"),
    "message": ({"message": "no such table"}, "no such table"),
    "error": ({"error": "no such table"}, "no such table"),
    "vllm": ({"object": "error", "message": "no such table"}, "no such table"),
    "google": ([{"error": {"message": "no such table", "status": "X"}}], "no such table"),
    "errors": ({"errors": [{"message": "no such table"}]}, "no such table"),
    "text": (b"no such table\r\n", "no such table"),
    "html": (b"<html><head><title>No Such Table</title></head></html>", "No Such Table"),
}


@pytest.mark.parametrize("code", [400, 404, 500])
@pytest.mark.parametrize("shape", REASONS)
async def test_the_reason_reaches_client_and_log(shape, code, upstream, start_proxy, caplog):
    """Whatever shape an error has, a client and the log are told why, and with which status."""
    body, reason = REASONS[shape]
    upstream.always = status(code, body)
    proxy = await start_proxy(openai=upstream)
    reply = await proxy.post({"model": MODEL, "input": "a"})
    error = (await reply.json())["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert reason in error["message"]
    if code == 400:
        assert reply.status == 400
    else:
        assert f"status {code}: {reason}" in error["message"]
        assert f"status {code}: {reason}" in caplog.text


@pytest.mark.parametrize("hint", [True, False])
async def test_a_404_names_the_address(hint, upstream, start_proxy):
    """A base URL without its version is the commonest cause, and the client is told."""
    upstream.always = status(404, {"detail": "Not Found"})
    base = upstream.url.removesuffix("/v1") if hint else upstream.url
    proxy = await start_proxy(openai=upstream, providers={"openai": {"base_url": base}})
    message = await message_of(await proxy.post({"model": MODEL, "input": "a"}))
    assert f"Not Found (asked: POST {base}/embeddings" in message
    assert ("the base URL has no version path such as /v1" in message) is hint


@pytest.mark.parametrize("code", [200, 400, 401, 403, 404, 500])
@pytest.mark.parametrize(
    "shape",
    [
        {"error": {"message": "{}", "code": "{}", "type": "{}", "param": "{}"}, "embedding": 1},
        {"error": {"message": "see", "metadata": {"raw": "{} is bad"}}, "embedding": "x"},
        {"detail": [{"loc": ["embedding", "{}"], "msg": "{} is bad"}]},
        '<html><title>{}</title>"embedding"',
    ],
    ids=["openai", "raw", "fastapi", "html"],
)
async def test_no_key_reaches_a_client_or_the_log(shape, code, upstream, start_proxy, caplog):
    """Also where the body that repeats it speaks of an embedding, which an answer does too."""
    text = shape if isinstance(shape, str) else json.dumps(shape)
    upstream.always = status(code, text.replace("{}", "openai-secret-key").encode())
    proxy = await start_proxy(openai=upstream)
    reply = await proxy.post({"model": MODEL, "input": "a"})
    assert reply.status >= 400
    assert "openai-secret" not in await reply.text() + caplog.text
    assert "***" in await reply.text()


async def test_an_honest_400_that_quotes_the_user_blames_nobody_else(upstream, second, start_proxy):
    """A text about bills and keys is refused like any other: no provider goes out of service."""
    text = "insufficient_quota: API key not valid"
    refusal = {"error": {"message": f"The input '{text}' is too long", "code": "too_long"}}
    upstream.holding = {text: status(400, refusal)}
    proxy = await start_proxy(openai=upstream, openrouter=second)
    reply = await proxy.post({"model": MODEL, "input": text})
    assert (reply.status, second.calls) == (400, [])
    await right(await proxy.post({"model": MODEL, "input": "another"}), ["another"])
    assert len(upstream.calls) == 2


ARREARS = {"error": {"message": "Access denied.", "code": "Arrearage", "type": "Arrearage"}}


async def test_trouble_with_the_account_costs_one_call(upstream, second, start_proxy):
    """A 400 about the bill is no search for a bad input: one call, then the other provider."""
    inputs = [f"text {i}" for i in range(64)]
    upstream.always = status(400, ARREARS)
    proxy = await start_proxy(openai=upstream, openrouter=second)
    await right(await proxy.post({"model": MODEL, "input": inputs}), inputs)
    await right(await proxy.post({"model": MODEL, "input": "one more"}), ["one more"])
    assert (len(upstream.calls), len(second.calls)) == (1, 2)


async def test_a_flagged_input_is_found_and_named(upstream, start_proxy):
    """A 403 of moderation is about one input: it is found, the others are kept, nobody rests."""
    flagged = {"error": {"code": 403, "message": "flagged", "metadata": {"reasons": ["x"]}}}
    upstream.holding = {"text 2": status(403, flagged)}
    proxy = await start_proxy(openai=upstream)
    inputs = [f"text {i}" for i in range(4)]
    reply = await proxy.post({"model": MODEL, "input": inputs})
    assert (reply.status, await message_of(reply)) == (403, "flagged (input 2)")
    others = [text for text in inputs if text != "text 2"]
    again = await proxy.post({"model": MODEL, "input": others})
    assert again.headers["x-cache"] == "hit"


async def test_a_clients_own_key_that_google_refuses_is_the_clients(upstream, start_proxy):
    """A 400 about a key is a 401 to the client whose key it is."""
    body = {"error": {"code": 400, "details": [{"reason": "API_KEY_INVALID"}], "message": "no"}}
    upstream.always = status(400, [body])
    proxy = await start_proxy(providers={"openai": {"base_url": upstream.url, "auth": "client"}})
    reply = await proxy.post({"model": MODEL, "input": "a"}, Authorization="Bearer sk-anne-01234")
    assert reply.status == 401
    assert (await reply.json())["error"]["code"] == "invalid_api_key"


@pytest.mark.parametrize(
    ("inputs", "code"),
    [(["猫", "狗"], 502), (["سلام", "مرحبا"], 502), (["👍", "👎"], 502), (["猫", " 猫\n"], 200)],
)
async def test_one_vector_for_texts_of_any_script(inputs, code, upstream, start_proxy):
    """OpenAI's models read every script, so one vector for two texts is a wrong answer."""

    def same(reply):
        for item in reply["data"]:
            item["embedding"] = vector_of(MODEL, "one").tolist()

    upstream.always = upstream.altered(same)
    proxy = await start_proxy(openai=upstream)
    response = await proxy.post({"model": MODEL, "input": inputs})
    assert response.status == code
    if code == 502:
        assert "one vector for inputs that differ" in await message_of(response)
        upstream.always = None
        await right(await proxy.post({"model": MODEL, "input": inputs}), inputs)
