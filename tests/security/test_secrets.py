"""The provider's key reaches neither clients nor the log, whatever an upstream says."""

import base64
import gzip
import itertools
import json
import logging
from urllib.parse import quote

import pytest
from aiohttp import WSMsgType, web
from embedding_proxy.providers.redaction import MAX_BYTES, Redactor
from fault_server import status
from hypothesis import given
from hypothesis import strategies as st

MODEL = "text-embedding-3-small"
KEY = "sk-canary+KEY/0123456789&abcdef=wxyz"
PLAIN = "0123456789"
"""A part of the key that looks the same in JSON, HTML and URLs."""


def _spelled(key):
    """Return a key as upstreams may repeat it."""
    raw = key.encode()
    return {
        "plain": key,
        "with its scheme": f"Authorization: Bearer {key}",
        "cut short": f"{key[:20]}... is wrong",
        "masked": f"{key[:6]}***{key[-4:]}",
        "its end": f"***{key[-6:]}",
        "url": quote(key, safe=""),
        "lower-case url": quote(key, safe="").replace("%2F", "%2f").replace("%2B", "%2b"),
        "whole url": "".join(f"%{byte:02x}" for byte in raw),
        "base64": base64.b64encode(raw).decode(),
        "base64 of a header": base64.b64encode(b"Bearer " + raw).decode(),
        "base64 of a pair": base64.b64encode(b":" + raw).decode(),
        "html": key.replace("&", "&amp;"),
        "html numbers": "".join(f"&#{byte};" for byte in raw),
    }


SPELLED = _spelled(KEY)


def _leaks(text):
    """Return the parts of the key that a text shows: five characters of it, or of its base64."""
    readings = [base64.b64encode(b"\0" * n + KEY.encode()).decode()[4:-4] for n in range(3)]
    readings += [KEY[6:-5], SPELLED["whole url"], SPELLED["html numbers"]]
    return [
        part[n : n + 8]
        for part in readings
        for n in range(len(part) - 7)
        if part[n : n + 8] in text
    ]


@pytest.fixture
def provider(monkeypatch):
    """Give the settings of a provider with the canary key, but for its address."""
    monkeypatch.setenv("CANARY_KEY", KEY)
    return {"api_key_env": "CANARY_KEY", "kind": "openai"}


@pytest.mark.parametrize("case", [*itertools.product([200, 401, 422, 500], SPELLED)])
async def test_an_upstreams_error_is_told_without_the_key(
    case, provider, upstream, start_proxy, caplog
):
    """In the message, the code, the type and the parameter, also beside the word `embedding`."""
    caplog.set_level(logging.DEBUG)
    code, spelling = case
    said = SPELLED[spelling]
    error = {"message": f'"embedding": {said}.', "type": said, "code": said, "param": said}
    body = {"object": "error", "error": error, "embedding": said}
    upstream.always = status(code, body, {"x-request-id": said.replace("\n", "")})
    proxy = await start_proxy(
        providers={"canary": {"base_url": upstream.url, **provider}},
        models={MODEL: {"routes": [{"provider": "canary", "model": MODEL}]}},
    )
    reply = await proxy.post({"model": MODEL, "input": "a"})
    assert reply.status >= 400
    told = f"{await reply.text()}\n{dict(reply.headers)}"
    assert not _leaks(told)
    assert not _leaks(caplog.text)
    status_page = await (await proxy.http.get(proxy.url.replace("/v1", "/status"))).text()
    assert not _leaks(status_page)


@pytest.mark.parametrize("code", [302, 401, 500])
@pytest.mark.parametrize("packed", [False, True])
async def test_a_refusal_that_is_passed_through_is_told_without_the_key(
    packed, code, provider, other, start_proxy
):
    """In the body, compressed or not, in the headers and in the reason of the status line."""

    async def act(request: web.Request) -> web.Response:
        said = SPELLED[request.query["spelling"]]
        body = json.dumps({"error": {"message": f'"embedding": {said}'}, "embedding": 1}).encode()
        return web.Response(
            status=code,
            reason=f"Because of {said}",
            body=gzip.compress(body) if packed else body,
            headers={
                "x-said": said,
                "Location": f"http://elsewhere.example/?key={said}",
                **({"Content-Encoding": "gzip"} if packed else {}),
            },
        )

    other.act = act
    proxy = await start_proxy(
        providers={"canary": {"base_url": other.url, **provider}}, passthrough="canary", models={}
    )
    for spelling in SPELLED:
        query = {"spelling": spelling}
        async with proxy.http.get(
            f"{proxy.url}/files", params=query, allow_redirects=False
        ) as reply:
            assert reply.status == code
            assert not _leaks(f"{await reply.text()}\n{reply.headers}\n{reply.reason}"), spelling
    assert other.seen[0].headers["Authorization"] == f"Bearer {KEY}"


@pytest.mark.parametrize(
    "escaped", ["".join(f"\\u{ord(c):04x}" for c in KEY), KEY.replace("/", r"\/")]
)
async def test_a_key_in_escapes_of_json_is_found(escaped, provider, other, start_proxy):
    """A passed-through body that holds the key in an encoding of JSON does not arrive."""

    async def act(_: web.Request) -> web.Response:
        return web.Response(status=401, body=f'{{"error": "{escaped}"}}'.encode())

    other.act = act
    proxy = await start_proxy(
        providers={"canary": {"base_url": other.url, **provider}}, passthrough="canary", models={}
    )
    async with proxy.http.get(f"{proxy.url}/files") as reply:
        body = await reply.read()
        assert reply.status == 401
    assert KEY not in json.dumps(json.loads(body)).replace("\\/", "/")


@pytest.mark.parametrize("encoding", ["", "gzip", "unheard-of"])
async def test_a_refusal_that_cannot_be_searched_is_not_shown(
    encoding, provider, other, start_proxy
):
    """One that is too long, or cannot be decoded, becomes an error in OpenAI's shape."""
    body = b"x" * (MAX_BYTES + 1) if encoding != "unheard-of" else b"\x8b\x01"

    async def act(_: web.Request) -> web.Response:
        packed = gzip.compress(body) if encoding == "gzip" else body
        headers = {"Content-Encoding": encoding} if encoding else {}
        return web.Response(status=429, body=packed, headers={"Retry-After": "7", **headers})

    other.act = act
    proxy = await start_proxy(
        providers={"canary": {"base_url": other.url, **provider}}, passthrough="canary", models={}
    )
    async with proxy.http.get(f"{proxy.url}/files") as reply:
        error = (await reply.json())["error"]
        assert (reply.status, reply.headers["Retry-After"]) == (429, "7")
        assert "is not shown" in error["message"]
        assert "Content-Encoding" not in reply.headers


async def test_a_long_key_in_a_good_reply_is_overwritten(provider, other, start_proxy):
    """An error inside a stream of status 200 does not tell it; the length stays as announced."""

    async def act(request: web.Request) -> web.StreamResponse:
        whole = f'data: {{"error": "{KEY}"}}\n\n'.encode()
        reply = web.StreamResponse(headers={"Content-Length": str(len(whole))})
        await reply.prepare(request)
        for n in range(0, len(whole), 7):
            await reply.write(whole[n : n + 7])
        return reply

    other.act = act
    proxy = await start_proxy(
        providers={"canary": {"base_url": other.url, **provider}}, passthrough="canary", models={}
    )
    async with proxy.http.get(f"{proxy.url}/x") as reply:
        assert await reply.text() == f'data: {{"error": "{"*" * len(KEY)}"}}\n\n'


async def test_a_websocket_does_not_tell_the_key(provider, other, start_proxy):
    """Neither a message of an upstream nor its reason for closing holds it."""

    async def act(request: web.Request) -> web.StreamResponse:
        socket = web.WebSocketResponse()
        await socket.prepare(request)
        await socket.send_str(f"error: {KEY}")
        await socket.close(code=4001, message=f"wrong: {KEY}".encode())
        return socket

    other.act = act
    proxy = await start_proxy(
        providers={"canary": {"base_url": other.url, **provider}}, passthrough="canary", models={}
    )
    async with proxy.http.ws_connect(f"{proxy.url}/realtime") as socket:
        message = await socket.receive()
        assert (message.type, message.data) == (WSMsgType.TEXT, "error: " + "*" * len(KEY))
        assert (await socket.receive()).extra == "wrong: ***"


async def test_other_secrets_of_a_provider_are_removed_as_well(provider, upstream, start_proxy):
    """A header that the operator configured may hold a key of a gateway."""
    upstream.always = status(400, {"error": {"message": "gateway-secret-1 is not known"}})
    proxy = await start_proxy(
        providers={
            "canary": {
                "base_url": upstream.url,
                "headers": {"cf-aig-authorization": "Bearer gateway-secret-1"},
                **provider,
            }
        },
        models={MODEL: {"routes": [{"provider": "canary", "model": MODEL}]}},
    )
    reply = await proxy.post({"model": MODEL, "input": "a"})
    assert (await reply.json())["error"]["message"] == "*** is not known"


@given(
    st.lists(st.sampled_from([KEY, KEY[:9], KEY[:20], "a", " ", KEY[5:]]), max_size=9), st.data()
)
def test_a_stream_is_overwritten_wherever_it_is_cut(pieces, data):
    """The pieces in which bytes arrive make no difference, and no length changes."""
    text = "".join(pieces).encode()
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=5)))
    passing = Redactor(KEY).stream()
    parts = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    told = b"".join(map(passing.feed, parts)) + passing.finish()
    assert told == text.replace(KEY.encode(), b"*" * len(KEY))
