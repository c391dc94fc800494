"""The application on a real port: every bad request gets its 4xx, and everyone OpenAI's shape."""

import asyncio
import base64
import gzip
import json
import logging
import zlib
from types import SimpleNamespace

import aiohttp
import numpy as np
import openai
import pytest
from aiohttp import web
from embedding_proxy.proxy.http.middleware import _not_found
from fault_server import status

SMALL = "text-embedding-3-small"
ADA = "text-embedding-ada-002"
GOOD = {"model": SMALL, "input": "a"}
MIB = 1 << 20


async def _send(proxy, body, method="POST", path="/v1/embeddings", **headers):
    """Send a body, as JSON unless it is bytes or a stream; return the response and its error."""
    as_it_is = isinstance(body, bytes) or hasattr(body, "__aiter__")
    sent = {"data": body} if as_it_is else {"json": body}
    url = proxy.url.removesuffix("/v1") + path
    async with proxy.http.request(method, url, headers=headers, **sent) as response:
        assert response.content_type == "application/json"
        content = await response.json()
    if response.status >= 400:
        assert content.keys() == {"error"}
        assert content["error"].keys() == {"message", "type", "param", "code"}
        return response, content["error"]
    return response, content


async def _in_parts(*parts: bytes):
    for part in parts:
        yield part


# The body, then the status, `param` and part of the message that it gets.
BAD = {
    "no body": (b"", 400, None, "could not be parsed as JSON"),
    "not JSON": (b"input=a", 400, None, "could not be parsed as JSON"),
    "JSON cut short": (b'{"model":"m","in', 400, None, "could not be parsed as JSON"),
    "not UTF-8": (b'{"model":"m","input":"\xff"}', 400, None, "could not be parsed as JSON"),
    "not an object": (b'["a"]', 400, None, "must be a JSON object"),
    "no model": ({"input": "a"}, 400, "model", "provide a model"),
    "unknown model": ({**GOOD, "model": "a/gpt"}, 404, "model", "The model `a/gpt` does not exist"),
    "no input": ({"model": SMALL}, 400, "input", "'$.input' is invalid"),
    "null": ({**GOOD, "input": None}, 400, "input", "'$.input' is invalid"),
    "empty string": ({**GOOD, "input": ""}, 400, "input", "must not be an empty string"),
    "empty string inside": ({**GOOD, "input": ["a", ""]}, 400, "input", "'$.input[1]' is invalid"),
    "empty list": ({**GOOD, "input": []}, 400, "input", "must not be an empty array"),
    "strings and tokens": ({**GOOD, "input": ["a", 1]}, 400, "input", "'$.input[1]' is invalid"),
    "strings and lists": ({**GOOD, "input": ["a", [1]]}, 400, "input", "'$.input[1]' is invalid"),
    "null in a list": ({**GOOD, "input": ["a", None]}, 400, "input", "'$.input[1]' is invalid"),
    "boolean token": ({**GOOD, "input": [[1], [2, True]]}, 400, "input", "'$.input[1][1]' is"),
    "negative width": ({**GOOD, "dimensions": -1}, 400, "dimensions", "integer of at least 1"),
    "zero width": ({**GOOD, "dimensions": 0}, 400, "dimensions", "integer of at least 1"),
    "width beyond": ({**GOOD, "dimensions": 1537}, 400, "dimensions", "at most 1536"),
    "boolean width": ({**GOOD, "dimensions": True}, 400, "dimensions", "integer of at least 1"),
    "fractional width": ({**GOOD, "dimensions": 8.0}, 400, "dimensions", "integer of at least 1"),
    "width of a fixed model": (
        {**GOOD, "model": ADA, "dimensions": 1536},
        400,
        "dimensions",
        "This model does not support specifying dimensions.",
    ),
    "unknown encoding": (
        {**GOOD, "encoding_format": "base32"},
        400,
        "encoding_format",
        "'float' or 'base64'",
    ),
    "user of the wrong type": ({**GOOD, "user": {}}, 400, "user", "'user' must be a string"),
    "field too deep to send on": (
        b'{"model":"%b","input":"a","x":%b}' % (SMALL.encode(), b"[" * 300 + b"]" * 300),
        400,
        None,
        "cannot be sent on",
    ),
    "field of the local model": (
        {"model": "wordllama-embed", "input": "a", "task": "q"},
        400,
        None,
        "Unrecognized request argument supplied: task",
    ),
    "tokens of the local model": (
        {"model": "wordllama-embed", "input": [100257]},
        400,
        "input",
        "takes token arrays",
    ),
}


@pytest.mark.parametrize(("body", "code", "param", "message"), BAD.values(), ids=BAD)
async def test_a_bad_request_is_refused_and_harms_nobody(
    *, body, code, param, message, upstream, start_proxy
):
    """Each bad body gets its 4xx, no upstream hears of it, and the next request is answered."""
    proxy = await start_proxy(openai=upstream)
    response, error = await _send(proxy, body)
    assert (response.status, error["param"]) == (code, param)
    assert error["type"] == "invalid_request_error"
    assert message in error["message"]
    assert response.headers["x-should-retry"] == "false"
    assert not upstream.calls
    assert (await _send(proxy, GOOD))[0].status == 200


async def test_a_body_of_70_mb_reaches_the_official_client_as_a_413(upstream, start_proxy):
    """The openai client sees the refusal of a body of 70 MB, not a broken connection."""
    proxy = await start_proxy(openai=upstream)
    with pytest.raises(openai.APIStatusError, match=r"larger than 64 MiB") as caught:
        await proxy.client.embeddings.create(model=SMALL, input=["x" * (7 * MIB)] * 10)
    assert caught.value.status_code == 413
    assert not upstream.calls
    assert (await proxy.client.embeddings.create(model=SMALL, input="a")).model == SMALL


@pytest.mark.parametrize(
    ("body", "headers"),
    [
        (b" " * 2000, {}),
        (_in_parts, {}),
        (gzip.compress(b" " * 2000), {"Content-Encoding": "gzip"}),
    ],
    ids=["declared", "chunked", "compressed"],
)
async def test_the_limit_of_a_body_counts_however_it_comes(body, headers, upstream, start_proxy):
    """A body over the limit gets 413 with the limit, also undeclared, and after decompression."""
    proxy = await start_proxy(openai=upstream, server={"max_body_mib": 1 / 1024})
    sent = body if isinstance(body, bytes) else body(b" " * 1000, b" " * 25)
    response, error = await _send(proxy, sent, **headers)
    assert response.status == 413
    assert "larger than 0.000976562 MiB (server.max_body_mib)" in error["message"]
    response, _ = await _send(proxy, json.dumps(GOOD).encode().ljust(1024))
    assert response.status == 200


@pytest.mark.parametrize(
    "content",
    [
        b"no gzip at all",
        gzip.compress(json.dumps(GOOD).encode())[:-12],
        gzip.compress(json.dumps(GOOD).encode())[:-8] + b"12345678",
        gzip.compress(json.dumps(GOOD).encode())[:-8],
        gzip.compress(json.dumps(GOOD).encode()) + gzip.compress(b" ")[:-9],
        gzip.compress(json.dumps(GOOD).encode()) + b"\x1f",
        gzip.compress(json.dumps(GOOD).encode()) + b"and more",
        gzip.compress(json.dumps(GOOD).encode()) + b"\0\0more",
    ],
    ids=[
        *("garbage", "cut", "wrong checksum", "no checksum", "second member cut"),
        *("second member not begun", "something behind", "something behind zeros"),
    ],
)
async def test_a_broken_gzip_body_is_a_400(content, upstream, start_proxy, caplog):
    """A body that does not decompress is the client's mistake, and no alarm in the log."""
    proxy = await start_proxy(openai=upstream)
    broken = {"Content-Encoding": "gzip", "Connection": "close"}
    response, _ = await _send(proxy, content, **broken)
    assert response.status == 400
    assert not upstream.calls
    assert (await _send(proxy, GOOD))[0].status == 200
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]


@pytest.mark.parametrize(
    ("body", "headers"),
    [
        (_in_parts, {}),
        (gzip.compress(json.dumps(GOOD).encode()), {"Content-Encoding": "gzip"}),
        (zlib.compress(json.dumps(GOOD).encode()), {"Content-Encoding": "deflate"}),
        (zlib.compress(json.dumps(GOOD).encode(), wbits=-15), {"Content-Encoding": "deflate"}),
        (gzip.compress(json.dumps(GOOD).encode().ljust(3 * MIB)), {"Content-Encoding": "GZIP"}),
        (json.dumps(GOOD).encode(), {"Content-Type": "text/plain"}),
        (json.dumps(GOOD).encode(), {"Expect": "100-continue"}),
    ],
    ids=[
        "chunked",
        "gzip",
        "deflate",
        "bare deflate",
        "far larger than it looks",
        "another type",
        "asks first",
    ],
)
async def test_a_good_body_may_come_in_any_form(body, headers, upstream, start_proxy):
    """Chunks, gzip, another content type and `Expect: 100-continue` are all fine."""
    proxy = await start_proxy(openai=upstream)
    sent = body if isinstance(body, bytes) else body(b'{"model":', b'"%b",' % SMALL.encode(),
                                                     b'"input":"a"}')  # fmt: skip
    response, content = await _send(proxy, sent, **headers)
    assert (response.status, content["model"]) == (200, SMALL)
    assert upstream.inputs == ["a"]


@pytest.mark.parametrize("size", [1, 7, 1000], ids=lambda size: f"pieces of {size}")
@pytest.mark.parametrize("padding", [b"", bytes(600)], ids=["", "padded"])
async def test_a_gzip_body_of_several_members_is_one_body(size, padding, upstream, start_proxy):
    """Members that stand one behind another are read to the end, wherever the pieces are cut."""
    proxy = await start_proxy(openai=upstream)
    text = json.dumps(GOOD).encode()
    members = [gzip.compress(text[:10]), gzip.compress(b""), gzip.compress(text[10:])]
    body = b"".join(members) + padding
    pieces = [body[start : start + size] for start in range(0, len(body), size)]
    response, content = await _send(proxy, _in_parts(*pieces), **{"Content-Encoding": "gzip"})
    assert (response.status, content["model"]) == (200, SMALL)
    assert upstream.inputs == ["a"]


async def test_members_that_stand_for_nothing_do_not_go_on_for_ever(upstream, start_proxy):
    """The limit of a body holds for what is sent, too, not only for what comes of it."""
    proxy = await start_proxy(openai=upstream, server={"max_body_mib": 1 / 1024})
    sent = _in_parts(*[gzip.compress(b"")] * 60)
    response, error = await _send(proxy, sent, **{"Content-Encoding": "gzip"})
    assert response.status == 413
    assert "server.max_body_mib" in error["message"]


HALF = "\ud800"
HALVES = {
    "an input": ({"input": ["a", HALF]}, "$.input[1]", "input"),
    "the input": ({"input": f"a{HALF}"}, "$.input", "input"),
    "the model": ({"model": HALF}, "$.model", "model"),
    "the user": ({"user": HALF}, "$.user", "user"),
    "deep": ({"note": {"x": [1, HALF]}}, "$.note.x[1]", "note"),
    "a name": ({f"n{HALF}": 1}, r"$.n\ud800", r"n\ud800"),
    "a payload": ({"index": {"payload": [{"t": HALF}]}}, "$.index.payload[0].t", "index"),
}


@pytest.mark.parametrize(("fields", "place", "param"), HALVES.values(), ids=HALVES)
async def test_half_of_a_surrogate_pair_is_named(fields, place, param, upstream, start_proxy):
    """A text that is no Unicode is a 400 that names its place, wherever it stands."""
    proxy = await start_proxy(openai=upstream)
    for escaped in (True, False):
        text = json.dumps({**GOOD, **fields}, ensure_ascii=escaped)
        response, error = await _send(proxy, text.encode("utf-8", "surrogatepass"))
        assert (response.status, error["param"]) == (400, param)
        assert f"'{place}' is invalid: it holds half of a surrogate pair" in error["message"]
    assert not upstream.calls


@pytest.mark.parametrize(
    ("given", "place"),
    [
        ([{"text": "a"}], "[0]"),
        ([None], "[0]"),
        ([["a"]], "[0][0]"),
        ([1.5], "[0]"),
        ([True], "[0]"),
        (["a", {"text": "b"}], "[1]"),
        ([[1], None], "[1]"),
        ([1, None], "[1]"),
        ([[1, 2.5]], "[0][1]"),
    ],
    ids=str,
)
async def test_what_is_neither_text_nor_tokens_is_told_what_is(given, place, upstream, start_proxy):
    """An input of another kind is a 400 that names its place and says what is taken."""
    proxy = await start_proxy(openai=upstream)
    response, error = await _send(proxy, {**GOOD, "input": given})
    assert (response.status, error["param"]) == (400, "input")
    assert error["message"].startswith(f"'$.input{place}' is invalid")
    assert "only text and token ids are taken" in error["message"]


async def test_an_unknown_compression_is_a_415(upstream, start_proxy):
    """A body that cannot be decompressed here is refused with what may be sent instead."""
    proxy = await start_proxy(openai=upstream)
    response, error = await _send(proxy, b"\x0b", **{"Content-Encoding": "br"})
    assert (response.status, response.headers["Connection"]) == (415, "close")
    assert "send it plain, or as gzip or deflate" in error["message"]


ALIASES = [
    "/v1/embeddings",
    "/v1/embeddings/",
    "/embeddings",
    "/embeddings/",
    "/api/v1/embeddings",
    "/openai/v1/embeddings",
    f"/v1/engines/{SMALL}/embeddings",
    f"/openai/deployments/{SMALL}/embeddings?api-version=2024-10-21",
    f"/openai/deployments/openai%2F{SMALL}/embeddings/?api-version=2024-10-21",
]


@pytest.mark.parametrize("path", ALIASES)
async def test_aliases_of_the_route(path, upstream, start_proxy):
    """With or without /v1 or a slash at the end, OpenRouter's or Azure's, it is the same route."""
    proxy = await start_proxy(openai=upstream)
    response, content = await _send(proxy, GOOD, path=path)
    assert (response.status, len(content["data"])) == (200, 1)


@pytest.mark.parametrize("body", [{"input": "a"}, {"input": "a", "model": "another"}])
async def test_a_model_in_the_path_counts(body, upstream, start_proxy):
    """Where the path names the model, the body need not, and does not prevail."""
    proxy = await start_proxy(openai=upstream)
    response, content = await _send(proxy, body, path=f"/v1/engines/{ADA}/embeddings")
    assert (response.status, content["model"]) == (200, ADA)


async def test_the_official_azure_client_is_answered(upstream, start_proxy):
    """The client AzureOpenAI, with its path and its `api-key`, needs another endpoint only."""
    proxy = await start_proxy(openai=upstream, server={"keys": ["secret"]})
    async with openai.AsyncAzureOpenAI(
        azure_endpoint=proxy.url.removesuffix("/v1"),
        api_key="secret",
        api_version="2024-10-21",
        max_retries=0,
    ) as client:
        reply = await client.embeddings.create(model=SMALL, input="a")
    assert (reply.model, len(reply.data[0].embedding)) == (SMALL, 1536)


@pytest.mark.parametrize("name", ["api-key", "X-API-Key", "x-proxy-key"])
async def test_a_key_may_come_in_other_headers(name, upstream, start_proxy):
    """Azure's header, and others in use, hold a key as well as Authorization does."""
    proxy = await start_proxy(openai=upstream, server={"keys": ["secret"]})
    for key, code in (("secret", 200), ("wrong", 401), ("", 401)):
        response, _ = await _send(proxy, GOOD, **{name: key})
        assert response.status == code
    both = {name: "secret", "Authorization": "Bearer of-another-service"}
    assert (await _send(proxy, GOOD, **both))[0].status == 200
    assert "secret" not in str(upstream.calls[0].headers).replace("openai-secret-key", "")


@pytest.mark.parametrize("header", [None, "Bearer wrong", "Basic secret", "Bearer s\udcffcret"])
async def test_the_key_comes_before_the_cache(header, upstream, start_proxy):
    """What is cached is not served, nor hinted at, to one who has no key."""
    await _send(await start_proxy(openai=upstream), GOOD)
    proxy = await start_proxy(openai=upstream, server={"keys": ["secret"]})
    headers = {} if header is None else {"Authorization": header}
    response, error = await _send(proxy, GOOD, **headers)
    assert (response.status, error["code"]) == (401, "invalid_api_key")
    assert not [name for name in response.headers if name.lower().startswith("x-cache")]
    response, _ = await _send(proxy, GOOD, Authorization="Bearer secret")
    assert (response.status, response.headers["x-cache"]) == (200, "hit")
    assert len(upstream.calls) == 1


async def test_the_key_comes_before_the_body(upstream, start_proxy):
    """One who has no key is refused while the body is still on its way."""
    proxy = await start_proxy(openai=upstream, server={"keys": ["secret"]})
    end = asyncio.Event()

    async def endless():
        yield b"{"
        await end.wait()

    async with asyncio.timeout(60):
        response, _ = await _send(proxy, endless())
    assert response.status == 401


@pytest.mark.parametrize("key", ["secret", "second"])
async def test_any_of_the_keys_lets_the_official_client_in(key, upstream, start_proxy):
    """The openai client's key is compared with all of the proxy's, and stays with the proxy."""
    proxy = await start_proxy(openai=upstream, server={"keys": ["secret", "second"]})
    await proxy.client.with_options(api_key=key).embeddings.create(model=SMALL, input="a")
    assert upstream.calls[0].headers["Authorization"] == "Bearer openai-secret-key"
    with pytest.raises(openai.AuthenticationError, match="Incorrect API key"):
        await proxy.client.embeddings.create(model=SMALL, input="a")


# Method, path, body; then the status, and whether keys are set.
EVERY_RESPONSE = {
    "whole": ("POST", "/v1/embeddings", GOOD, 200, ()),
    "streamed": ("POST", "/v1/embeddings", {**GOOD, "input": ["a"] * 33}, 200, ()),
    "models": ("GET", "/v1/models", b"", 200, ()),
    "probe": ("GET", "/livez", b"", 200, ("secret",)),
    "bad body": ("POST", "/v1/embeddings", b"", 400, ()),
    "no key": ("POST", "/v1/embeddings", GOOD, 401, ("secret",)),
    "no route": ("POST", "/v1/chat/completions", b"{}", 404, ()),
    "wrong method": ("PUT", "/v1/embeddings", b"{}", 405, ()),
    "too large": ("POST", "/v1/embeddings", b" " * 2000, 413, ()),
    "no provider": ("POST", "/v1/embeddings", {**GOOD, "model": "baai/bge-m3"}, 403, ()),
}


@pytest.mark.parametrize(
    ("method", "path", "body", "code", "keys"), EVERY_RESPONSE.values(), ids=EVERY_RESPONSE
)
async def test_every_response_has_an_id_of_its_own(
    *, method, path, body, code, keys, upstream, start_proxy
):
    """Whatever the answer, streamed ones included, x-request-id is there and never the same."""
    proxy = await start_proxy(openai=upstream, server={"keys": keys, "max_body_mib": 1 / 1024})
    ids = set()
    for _ in range(2):
        response, _ = await _send(proxy, body, method, path)
        assert response.status == code
        ids.add(response.headers["x-request-id"])
    assert len(ids) == 2
    assert all(request_id.startswith("req_") for request_id in ids)


@pytest.mark.parametrize(
    ("method", "path", "code", "error_code"),
    [
        ("GET", "/index.html", 404, "unknown_url"),
        ("POST", "/v1", 404, "unknown_url"),
        ("POST", "/v1/chat/completions", 404, "unknown_url"),
        ("GET", "/v1/embeddings/x", 404, "unknown_url"),
        ("POST", "/v2/embeddings", 404, "unknown_url"),
        ("GET", "/v1/embeddings", 405, None),
        ("DELETE", "/embeddings/", 405, None),
        ("DELETE", "/v1/models/m", 405, None),
        ("POST", "/livez", 405, None),
        ("POST", "/health", 405, None),
        ("POST", "/", 405, None),
        ("GET", "/" + "x" * 4000, 404, "unknown_url"),
    ],
)
async def test_what_is_not_there_is_told_in_openais_shape(
    method, path, code, error_code, start_proxy
):
    """An unknown path is a 404, a known one with another method a 405; both say what was asked."""
    proxy = await start_proxy()
    response, error = await _send(proxy, b"", method, path)
    assert (response.status, error["code"]) == (code, error_code)
    assert (error["type"], error["param"]) == ("invalid_request_error", None)
    assert f"({method} {path[:200]})" in error["message"]
    assert response.headers["x-should-retry"] == "false"


# What the upstream does; then the status, code, and Retry-After that the client sees.
UPSTREAM = {
    "wrong key": (status(401), 403, "upstream_auth", None),
    "no credit": (status(402), 402, "insufficient_quota", None),
    "unknown model": (status(404), 404, "model_not_found", None),
    "too many": (status(429, headers={"Retry-After": "7"}), 429, "rate_limit_exceeded", "7"),
    "fault": (status(500), 502, "upstream_error", "1"),
    "overload": (status(503, headers={"retry-after-ms": "2500"}), 503, "upstream_error", "3"),
    "no JSON": (status(200, b"<html>"), 502, "upstream_invalid_answer", "1"),
    "refused input": (
        status(400, {"error": {"message": "too long", "type": "t", "param": "input", "code": "c"}}),
        400,
        "c",
        None,
    ),
}


@pytest.mark.parametrize(("act", "code", "error_code", "wait"), UPSTREAM.values(), ids=UPSTREAM)
async def test_an_upstreams_failure_is_told_in_openais_shape(
    *, act, code, error_code, wait, upstream, start_proxy
):
    """Each failure of an upstream has its status, its code, and a word on trying again."""
    upstream.always = act
    proxy = await start_proxy(openai=upstream)
    response, error = await _send(proxy, GOOD)
    assert (response.status, error["code"]) == (code, error_code)
    assert response.headers.get("Retry-After") == wait
    assert response.headers.get("x-should-retry") == (None if wait else "false")
    assert "secret-key" not in error["message"]


async def test_a_request_does_not_wait_longer_than_its_time(upstream, start_proxy):
    """A provider that hangs costs the client the configured time, and then a 504."""
    upstream.gate = asyncio.Event()
    proxy = await start_proxy(openai=upstream, server={"request_timeout_s": 0.05})
    try:
        async with asyncio.timeout(60):
            response, error = await _send(proxy, GOOD)
    finally:
        upstream.gate.set()
    assert (response.status, error["type"]) == (504, "server_error")
    assert response.headers["Retry-After"] == "1"


async def test_a_model_without_a_provider_is_told_with_the_remedy(start_proxy):
    """A model that nobody can be asked for is a 403 that names the variable, and is final."""
    proxy = await start_proxy()
    response, error = await _send(proxy, GOOD)
    assert (response.status, error["code"]) == (403, "provider_not_configured")
    assert "set OPENAI_API_KEY or OPENROUTER_API_KEY" in error["message"]
    assert response.headers["x-should-retry"] == "false"


async def test_an_unforeseen_error_is_logged_and_not_shown(
    upstream, start_proxy, monkeypatch, caplog
):
    """A bug is a 500 without details; the log has them, under the id that the client was given."""
    proxy = await start_proxy(openai=upstream)

    async def broken(*_) -> None:
        raise RuntimeError("sk-canary")

    monkeypatch.setattr(proxy.service, "answer", broken)
    response, error = await _send(proxy, GOOD)
    assert (response.status, error["type"], error["code"]) == (500, "server_error", None)
    assert "sk-canary" not in error["message"]
    assert response.headers["x-should-retry"] == "false"
    record = next(record for record in caplog.records if record.name == "embedding_proxy.guard")
    assert response.headers["x-request-id"] in record.getMessage()
    assert "sk-canary" in str(record.exc_info[1])


async def test_a_client_that_leaves_amid_a_reply_is_no_alarm(upstream, start_proxy, caplog):
    """A client that goes away while a long reply is sent is let go, without a word of error."""
    proxy = await start_proxy(openai=upstream)
    asked = {**GOOD, "input": ["a"] * 2048}
    response = await proxy.http.post(f"{proxy.url}/embeddings", json=asked)
    await response.content.readany()
    response.close()
    assert (await _send(proxy, GOOD))[0].status == 200
    await start_proxy.stop()
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


@pytest.mark.parametrize("error", [web.HTTPGone(), web.HTTPExpectationFailed()])
def test_any_http_error_of_aiohttps_becomes_one_of_openais(error):
    """An error that aiohttp raises keeps its status and reason, in OpenAI's shape."""
    failure = _not_found(SimpleNamespace(method="GET", path="/"), error)
    assert (failure.status, failure.message) == (error.status, error.reason)
    assert (failure.kind, failure.retry_after) == ("invalid_request_error", None)


@pytest.mark.parametrize(("count", "bad"), [(1, 0), (64, 40)])
async def test_a_vector_without_a_head_is_a_502(count, bad, upstream, start_proxy):
    """What cannot be cut is refused before the reply begins, short or streamed."""

    def behead(reply):
        raw = np.eye(1, 1536, 1535, dtype="<f4").tobytes()
        reply["data"][bad]["embedding"] = base64.b64encode(raw).decode()

    upstream.always = upstream.altered(behead)
    proxy = await start_proxy(openai=upstream)
    inputs = [f"t{i}" for i in range(count)]
    assert (await proxy.post({**GOOD, "input": inputs, "dimensions": 8})).status == 502


async def test_a_failure_amid_a_reply_cuts_the_connection(upstream, start_proxy, monkeypatch):
    """A reply that cannot be finished is neither closed as if whole nor followed by another."""
    proxy = await start_proxy(openai=upstream)
    body = {**GOOD, "input": [f"t{i}" for i in range(64)]}
    assert (await proxy.post(body)).status == 200

    def breaks(*_args, **_kwargs):
        yield b'{"object":"list"'
        raise RuntimeError("in the midst")

    monkeypatch.setattr("embedding_proxy.proxy.http.openai_format.render", breaks)
    with pytest.raises(aiohttp.ClientPayloadError):
        await proxy.post(body)


async def test_a_long_field_leaves_the_reply_readable(upstream, start_proxy):
    """A field that is sent on may be longer than a header line."""
    proxy = await start_proxy(openai=upstream)
    reply = await proxy.post({**GOOD, "instruction": "x" * 9000})
    assert reply.status == 200
    assert "?blake2b=" in reply.headers["x-embedding-space"]


async def test_a_connection_that_will_close_says_so(upstream, start_proxy):
    """After a body that could not be read, the client's next request takes a new connection."""
    proxy = await start_proxy(openai=upstream)
    assert (await proxy.post(b"no gzip", **{"Content-Encoding": "gzip"})).status == 400
    assert (await proxy.post(GOOD)).status == 200


async def test_an_unknown_expectation_is_ignored(upstream, start_proxy):
    """RFC 9110 allows it; the official clients never send one."""
    proxy = await start_proxy(openai=upstream)
    assert (await proxy.post(GOOD, Expect="something")).status == 200
    assert (await proxy.post(GOOD, Expect="100-continue")).status == 200


async def test_a_405_names_what_is_allowed(start_proxy):
    """RFC 9110 demands it."""
    proxy = await start_proxy()
    async with proxy.http.get(f"{proxy.url}/embeddings") as response:
        assert response.headers["Allow"] == "POST"


async def test_a_key_opens_its_own_part_of_the_cache(upstream, start_proxy):
    """Clients of two namespaces buy for themselves; those of one share, whichever key they have."""
    keys = ["open", {"key": "a1", "namespace": "a"}, {"key": "a2", "namespace": "a"}]
    proxy = await start_proxy(openai=upstream, server={"keys": keys})
    seen = [
        (await proxy.post(GOOD, Authorization=f"Bearer {key}")).headers["x-cache"]
        for key in ("open", "a1", "a2", "open")
    ]
    assert seen == ["miss", "miss", "hit", "hit"]
    assert len(upstream.inputs) == 2
