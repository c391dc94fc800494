"""Keys and texts that an upstream repeats, in each place and encoding, come out nowhere.

`leaks` watches all of it: log, status, metrics, files and replies. Here it is also asked at once,
so that a failure names its case, and the upstream is known to have been asked.
"""

import asyncio
import base64
import gzip
import json
import logging
from contextlib import suppress

import aiohttp
import orjson
import pytest
from aiohttp import WSMsgType, web
from embedding_proxy.providers.network import Network
from embedding_proxy.providers.profile import Profile
from embedding_proxy.providers.redaction import MAX_BYTES, QuotedInputs, Redactor
from embedding_proxy.providers.vendors import OpenAI
from embedding_proxy.proxy import log
from embedding_proxy.proxy.config.loader import ConfigError, validate_content
from embedding_proxy.proxy.config.schema import Settings
from fault_server import FaultServer, status
from http_proxy import HttpProxy
from leaks import WATCH, found_in, spellings
from qdrant_server import QdrantServer, answer
from talk import Talk

MODEL = "text-embedding-3-small"
KEY = 'sk-canary+0a1B/2c3D"4e5F\\6g7H<8i>&9j=0kLm'
CLIENT = "sk-client+9Z8y/7X6w=5V4u-3T2s1R0q"
TEXT = 'A diary of 0a1B2c3D: "über" 今日 <b>4e5F</b> & more, that nobody else may read.'
SPELLED = spellings(KEY)
PASSWORD = "pa55-Word+of/the=proxy"


def _clean(told: str, *secrets: str) -> None:
    """Fail if a text holds a secret."""
    for secret in secrets:
        assert not found_in(secret, told), told[:2000]


def _json(body, code=400, **headers):
    """Play a reply of JSON."""
    return status(code, body, headers)


def _error(said, code=400):
    return _json({"error": {"message": said, "type": "t", "param": None, "code": None}}, code)


def _with_reason(said):
    async def act(_request, _payload):
        return web.Response(status=500, reason=said, body=b"{}")

    return act


def _spoilt(upstream, change):
    return upstream.altered(change)


# Where an upstream repeats what it was sent: its reply, from itself and what is repeated.
PLACES = {
    "reason": lambda _, said: _with_reason(said),
    "header": lambda _, said: _json({}, 500, **{"x-said": said}),
    "Retry-After": lambda _, said: _json({}, 429, **{"Retry-After": said}),
    "Location": lambda _, said: _json({}, 302, Location=f"http://other.example/?k={said}"),
    "Content-Encoding": lambda _, said: _json({}, 200, **{"Content-Encoding": said}),
    "message of a 400": lambda _, said: _error(f"bad: {said}!"),
    "message of a 401": lambda _, said: _error(f"key={said}", 401),
    "message of a 403": lambda _, said: _error(f"key={said}", 403),
    "message of a 404": lambda _, said: _error(said, 404),
    "message of a 429": lambda _, said: _error(f"'{said}' is limited", 429),
    "message of a 500": lambda _, said: _error(f"request: {said}", 500),
    "code": lambda _, said: _json({"error": {"message": "m", "code": said}}),
    "type": lambda _, said: _json({"error": {"message": "m", "type": said}}),
    "param": lambda _, said: _json({"error": {"message": "m", "param": said}}),
    "detail": lambda _, said: _json({"detail": [{"loc": ["input", said], "msg": said}]}, 422),
    "plain text": lambda _, said: status(500, f"echo {said}".encode()),
    "page": lambda _, said: status(502, f"<html><title>{said}</title>".encode()),
    "UTF-16": lambda _, said: status(500, said.encode("utf-16")),
    "200 with an error": lambda _, said: _error(f"bad: {said}", 200),
    "embedding in an error": lambda _, said: _json({"error": said, "embedding": said}, 500),
    "200 that is no JSON": lambda _, said: status(200, f"data: {said}".encode()),
    "model": lambda up, said: _spoilt(up, lambda reply: reply.update(model=said)),
    "usage": lambda up, said: _spoilt(up, lambda reply: reply.update(usage={said: said})),
    "embedding": lambda up, said: _spoilt(
        up, lambda reply: reply["data"][0].update(embedding=said)
    ),
    "index": lambda up, said: _spoilt(up, lambda reply: reply["data"][0].update(index=said)),
    "a further field": lambda up, said: _spoilt(up, lambda reply: reply.update({said: said})),
    "trailing bytes": lambda up, said: status(
        200, orjson.dumps(up.reply({"model": MODEL, "input": "a"})) + said.encode()
    ),
}


@pytest.fixture
def canary(monkeypatch):
    """Give what the settings of a provider with the canary key are, from its address."""
    monkeypatch.setenv("CANARY_KEY", KEY)

    def sections(url, **more):
        provider = {"base_url": url, "api_key_env": "CANARY_KEY", "kind": "openai", **more}
        route = {"provider": "canary", "model": MODEL}
        return {"providers": {"canary": provider}, "models": {MODEL: {"routes": [route]}}}

    return sections


async def _whole(reply: aiohttp.ClientResponse) -> str:
    return f"{reply.reason}\n{dict(reply.headers)}\n{await reply.text('utf-8', 'replace')}"


async def _page(proxy, path) -> str:
    """Return what the proxy tells of itself."""
    return await (await proxy.http.get(proxy.url.replace("/v1", path))).text()


@pytest.mark.parametrize("place", PLACES)
async def test_a_key_comes_back_in_no_encoding(place, canary, upstream, start_proxy, caplog):
    """Neither to the client, nor into the log, the status and the metrics."""
    caplog.set_level(logging.DEBUG)
    proxy = await start_proxy(**canary(upstream.url))
    for n, said in enumerate(dict.fromkeys(SPELLED.values())):
        upstream.always = PLACES[place](upstream, said)
        proxy.service.upstreams._healths.clear()
        before = len(upstream.calls)
        reply = await proxy.post({"model": MODEL, "input": f"{place} {n}"})
        assert len(upstream.calls) > before
        _clean(await _whole(reply), KEY)
        _clean(caplog.text + await _page(proxy, "/status"), KEY)
        caplog.clear()
    # What is counted stays counted.
    _clean(await _page(proxy, "/metrics"), KEY)


@pytest.mark.parametrize("place", PLACES)
async def test_a_text_comes_back_in_no_encoding(place, canary, upstream, start_proxy, caplog):
    """An error repeats no input, to nobody: one call may hold the texts of several clients."""
    caplog.set_level(logging.DEBUG)
    proxy = await start_proxy(**canary(upstream.url))
    for n, said in enumerate(dict.fromkeys(spellings(TEXT).values())):
        upstream.always = PLACES[place](upstream, said)
        proxy.service.upstreams._healths.clear()
        before = len(upstream.calls)
        reply = await proxy.post({"model": MODEL, "input": f"{n} {TEXT}"})
        assert len(upstream.calls) > before
        _clean(await _whole(reply), TEXT)
        _clean(caplog.text + await _page(proxy, "/status"), TEXT)
        caplog.clear()
    # What is counted stays counted.
    _clean(await _page(proxy, "/metrics"), TEXT)


@pytest.mark.parametrize("encoding", SPELLED)
async def test_a_clients_key_comes_back_in_no_encoding(encoding, upstream, start_proxy, caplog):
    """`auth: client`: what the provider says of it while it is proved, and afterwards."""
    caplog.set_level(logging.DEBUG)
    said = spellings(CLIENT)[encoding]
    proxy = await start_proxy(
        providers={"openai": {"base_url": upstream.url, "auth": "client"}},
        models={MODEL: {"routes": [{"provider": "openai", "model": MODEL}]}},
    )
    bearer = {"Authorization": f"Bearer {CLIENT}"}
    for code in (500, 401, 422):
        upstream.always = _error(f"for {said}.", code)
        proxy.service.upstreams._healths.clear()
        reply = await proxy.post({"model": MODEL, "input": "a"}, **bearer)
        assert reply.status >= 400
        _clean(await _whole(reply) + caplog.text + await _page(proxy, "/status"), CLIENT)
    _clean(await _page(proxy, "/metrics"), CLIENT)
    assert upstream.calls


@pytest.mark.parametrize("packed", [False, True])
async def test_a_refusal_that_is_passed_through_holds_it_in_no_encoding(
    packed, canary, other, start_proxy, caplog
):
    """In reason, headers and body, whatever the body is."""
    caplog.set_level(logging.DEBUG)
    proxy = await start_proxy(**canary(other.url), passthrough="canary")
    for said in dict.fromkeys(SPELLED.values()):
        for body in (
            json.dumps({"error": {"message": f"key={said}"}}),
            f"<p>{said}</p>",
            f"data: {said}\n\n",
            said[:20] + "\r\n " + said[20:],
        ):

            async def act(_, said=said, text=body):
                body = text.encode()
                return web.Response(
                    status=401,
                    reason=f"No: {said}",
                    body=gzip.compress(body) if packed else body,
                    headers={
                        "x-said": said,
                        "Location": f"/{said}",
                        "Retry-After": said,
                        **({"Content-Encoding": "gzip"} if packed else {}),
                    },
                )

            other.act = act
            async with proxy.http.get(f"{proxy.url}/files", allow_redirects=False) as reply:
                assert reply.status == 401
                told = await _whole(reply)
            _clean(told + told.replace("\r\n ", ""), KEY)
    _clean(caplog.text, KEY)


STREAMED = ["plain", "JSON", "JSON with slashes", "URL", "HTML", "base64 at 0", "base64 at 2"]


@pytest.mark.parametrize("encoding", STREAMED)
async def test_a_good_stream_holds_stars_in_its_place(encoding, canary, other, start_proxy):
    """An error inside a stream that has begun well; the pieces do not matter, nor the type."""
    said = SPELLED[encoding]
    whole = f'data: {{"error": "{said}!"}}\n\n'.encode()

    async def act(request: web.Request) -> web.StreamResponse:
        reply = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await reply.prepare(request)
        for n in range(0, len(whole), 11):
            await reply.write(whole[n : n + 11])
        return reply

    other.act = act
    proxy = await start_proxy(**canary(other.url), passthrough="canary")
    async with proxy.http.get(f"{proxy.url}/chat") as reply:
        told = await reply.read()
    assert len(told) == len(whole)
    _clean(told.decode(), KEY)


async def test_a_compressed_good_reply_ends_before_the_key(canary, other, start_proxy, caplog):
    """What cannot be overwritten is cut off, and the log says why."""
    before = [f"line {n}\n".encode() for n in range(5000)]
    packed = gzip.compress(b"".join(before) + f'"{KEY}"'.encode() + b"".join(before))

    async def act(request: web.Request) -> web.StreamResponse:
        reply = web.StreamResponse(headers={"Content-Encoding": "gzip"})
        await reply.prepare(request)
        for n in range(0, len(packed), 100):
            await reply.write(packed[n : n + 100])
        return reply

    other.act = act
    proxy = await start_proxy(**canary(other.url), passthrough="canary")
    told = b""
    with pytest.raises(aiohttp.ClientPayloadError):  # noqa: PT012 - where it is raised is timing
        async with proxy.http.get(f"{proxy.url}/chat") as reply:
            async for chunk in reply.content.iter_any():
                told += chunk
    # The end may come with the first bytes, and the client then gives none of them.
    assert not told or told.startswith(b"line 0")
    assert b"sk-canary" not in told
    assert "cut off" in caplog.text


async def test_a_compressed_good_reply_without_it_is_the_same_to_the_byte(
    canary, other, start_proxy
):
    """It stays compressed; an encoding that nobody knows goes on as well."""
    proxy = await start_proxy(**canary(other.url), passthrough="canary")
    session = aiohttp.ClientSession(auto_decompress=False)
    async with session:
        for encoding, body in (
            ("gzip", gzip.compress(b"sk-canary+0a1B" + bytes(300_000))),
            ("gzip", gzip.compress(b"short")),
            ("unheard-of", b"\x00\x01" * 9000),
        ):

            async def act(_, encoding=encoding, body=body):
                return web.Response(body=body, headers={"Content-Encoding": encoding})

            other.act = act
            async with session.get(f"{proxy.url}/files") as reply:
                assert await reply.read() == body
                assert reply.headers["Content-Encoding"] == encoding


@pytest.mark.parametrize("said", [KEY, base64.b64encode(KEY.encode()).decode()])
async def test_a_websocket_holds_stars_in_its_place(said, canary, other, start_proxy):
    """In texts, in bytes, and in the reason for closing, which stays short enough for its frame."""

    async def act(request: web.Request) -> web.StreamResponse:
        socket = web.WebSocketResponse()
        await socket.prepare(request)
        await socket.send_str(f"wrong: {said}")
        await socket.send_bytes(f"wrong: {said}".encode())
        await socket.close(code=4001, message=f"{said} {'ü' * 30}".encode()[:122])
        return socket

    other.act = act
    proxy = await start_proxy(**canary(other.url), passthrough="canary")
    async with proxy.http.ws_connect(f"{proxy.url}/realtime") as socket:
        text, data, end = [await socket.receive() for _ in range(3)]
    assert (text.type, data.type, end.data) == (WSMsgType.TEXT, WSMsgType.BINARY, 4001)
    _clean(f"{text.data}\n{data.data.decode()}\n{end.extra}", KEY)


async def test_a_list_of_models_does_not_hold_it(canary, other, start_proxy):
    """The list of the provider that calls are passed to is joined to ours."""

    async def act(_: web.Request) -> web.Response:
        models = [{"id": f"model-{name}", "said": SPELLED[name]} for name in STREAMED]
        return web.json_response({"data": [*models, {"id": KEY}]})

    other.act = act
    proxy = await start_proxy(**canary(other.url), passthrough="canary")
    async with proxy.http.get(f"{proxy.url}/models") as reply:
        told = await reply.text()
    assert "model-plain" in told
    _clean(told, KEY)


@pytest.mark.parametrize("trust_env", [False, True])
async def test_credentials_of_an_http_proxy_come_back_nowhere(  # noqa: PLR0917 - fixtures
    trust_env, canary, upstream, start_proxy, caplog, monkeypatch
):
    """The HTTP proxy passes them on, and the upstream repeats them."""
    caplog.set_level(logging.DEBUG)
    pair = base64.b64encode(f"me:{PASSWORD}".encode()).decode()
    async with HttpProxy() as way:
        url = f"http://me:{PASSWORD.replace('/', '%2F')}@127.0.0.1:{way.port}"
        network = {"trust_env": True} if trust_env else {"proxy": url}
        if trust_env:
            monkeypatch.setenv("http_proxy", url)
            monkeypatch.setenv("no_proxy", "")
        proxy = await start_proxy(**canary(upstream.url, **network))
        for said in (PASSWORD, pair, f"Basic {pair}", *spellings(PASSWORD).values()):
            upstream.always = _error(f"sent: {said}", 422)
            reply = await proxy.post({"model": MODEL, "input": "a"})
            assert reply.status == 422
            _clean(await _whole(reply) + caplog.text, PASSWORD, pair)
        assert way.heads


async def test_qdrants_key_and_texts_come_out_nowhere(  # noqa: PLR0917 - fixtures
    canary, upstream, start_proxy, caplog, monkeypatch, tmp_path
):
    """Not in the log, the status, the metrics, and the reasons that the outbox keeps."""
    caplog.set_level(logging.DEBUG)
    monkeypatch.setenv("QDRANT_CANARY", KEY)
    async with QdrantServer(api_key=KEY) as qdrant:
        index = {"qdrant": {"url": qdrant.url, "api_key_env": "QDRANT_CANARY"}}
        proxy = await start_proxy(openai=upstream, index=index)
        for n, (one, other) in enumerate(
            zip(SPELLED.values(), spellings(TEXT).values(), strict=True)
        ):
            told = f"Wrong input: {one}, {other}"
            qdrant.always = _refusing_points(told, 400 if n % 2 else 422)
            await proxy.post({"model": MODEL, "input": [f"{TEXT} {n}"]})
            await _until(proxy, n + 1)
        pages = await _page(proxy, "/status") + await _page(proxy, "/metrics")
        assert "Wrong input" in pages or "not shown" in pages or "***" in pages
        _clean(pages + caplog.text, KEY, TEXT)
        assert not WATCH.problems(tmp_path / "cache")
        qdrant.always = answer(403, f"{KEY} is not allowed")
        await proxy.post({"model": MODEL, "input": ["another text"]})


def _refusing_points(told, code):
    async def act(request):
        if request.method == "PUT" and request.path.endswith("/points"):
            return await answer(code, told)(request)
        return None

    return act


async def _until(proxy, count):
    """Wait until so many points have been refused."""
    async with asyncio.timeout(60):
        indexer = proxy.service.indexing.indexer
        while (await indexer.snapshot())["refused_points"] < count:  # noqa: ASYNC110
            await asyncio.sleep(0.01)


@pytest.mark.parametrize("encoding", ["plain", "URL twice", "hexadecimal", "base64 at 1"])
async def test_check_prints_it_in_no_encoding(encoding, canary, upstream, command, tmp_path):
    """Which key is refused is told by the name of its variable."""
    config = tmp_path / "config.yaml"
    sections = canary(upstream.url)
    config.write_text(json.dumps({**sections, "cache": {"directory": str(tmp_path / "cache")}}))
    for code in (401, 500, 200):
        upstream.always = _error(f"Incorrect: {SPELLED[encoding]}", code)
        done = await asyncio.to_thread(command, "check", "--config", config)
        assert done.code == 1
        _clean(done.out + done.err, KEY)
    assert upstream.calls


async def test_a_request_that_is_no_http_leaves_no_key_in_the_log(start_proxy, caplog):
    """Aiohttp's own words about it quote the line."""
    caplog.set_level(logging.DEBUG)
    proxy = await start_proxy()
    for head in (
        f"GET / HTTP/1.1\r\nHost: h\r\nAuthorization: Bearer {CLIENT}\x01\r\n\r\n",
        f"GET / HTTP/1.1\r\nHost: h\r\nAuthorization : Bearer {CLIENT}\r\n\r\n",
        f"GET /?key={CLIENT} HTTP/9\r\nHost: h\r\n\r\n",
        f"{CLIENT} / HTTP/1.1\r\nHost: h\r\n\r\n",
        f"GET / HTTP/1.1\r\nHost: h\r\nContent-Length: {CLIENT}\r\n\r\n",
        f"GET /nothing HTTP/1.1\r\nHost: h\r\nExpect: {CLIENT}\r\n\r\n",
        f"GET http://{CLIENT}@h/v1/x HTTP/1.1\r\nHost: h\r\n\r\n",
    ):
        async with Talk(proxy.url, head.encode()) as talk:
            assert (await talk.response())[0] >= 400
    _clean(caplog.text, CLIENT)


def test_what_is_shown_of_objects_holds_no_key(monkeypatch):
    """Of settings, profiles, and what a transport gets, as a traceback or a debugger shows them."""
    monkeypatch.setenv("CANARY_KEY", KEY)
    settings = Settings.model_validate(
        {
            "server": {"keys": [KEY]},
            "providers": {
                "openai": {
                    "headers": {"x-gateway": KEY},
                    "proxy": f"http://me:{PASSWORD.replace('/', '%2F')}@h:1",
                    "options": {},
                },
            },
        }
    )
    profile = settings.providers["openai"].as_profile()
    assert profile.headers["x-gateway"] == KEY
    provider = OpenAI("openai", profile, api_key=KEY)
    shown = [settings, profile, provider, Network(proxy=f"http://me:{PASSWORD}@h:1")]
    _clean(" ".join(map(repr, shown)) + " ".join(map(str, shown)), KEY, PASSWORD)
    assert KEY in profile.secrets(None)
    _clean(repr(Profile(headers={"x": KEY}, options={"y": KEY})), KEY)


@pytest.mark.parametrize(
    "content",
    [
        {"server": {"keys": [{"key": KEY, "name": 5}]}},
        {"server": {"keys": KEY}},
        {"providers": {"openai": {"base_url": f"https://{CLIENT}@h/v1"}}},
        {"providers": {"openai": {"base_url": f"https://h/v1?key={CLIENT}"}}},
        {"providers": {"openai": {"proxy": f"http://me:{CLIENT}@h:1/x"}}},
        {"providers": {"openai": {"api_key_env": CLIENT}}},
        {"providers": {"openai": {"headers": {"x": [KEY]}}}},
        {"providers": {"openai": {"key": KEY}}},
        {"index": {"qdrant": {"url": f"http://{CLIENT}@h"}}},
    ],
)
def test_an_error_of_the_configuration_holds_no_value(content):
    """Nor does the traceback of one, which shows what caused it."""
    with pytest.raises(ConfigError) as caught:
        validate_content(content, "config.yaml")
    shown = log.LineFormatter().formatException((caught.type, caught.value, caught.tb))
    assert "config.yaml" in shown
    _clean(shown + repr(caught.value.__cause__), KEY, CLIENT)


async def test_errors_of_the_library_show_no_headers_in_the_log(other):
    """Aiohttp's errors hold the whole request, and asyncio logs them where nobody awaits."""

    async def act(_: web.Request) -> web.Response:
        return web.Response(status=500)

    other.act = act
    keys = {"Authorization": f"Bearer {CLIENT}", "api-key": CLIENT}
    async with (
        aiohttp.ClientSession(headers=keys) as session,
        session.get(f"{other.url}/x") as reply,
    ):
        with pytest.raises(aiohttp.ClientResponseError) as caught:
            reply.raise_for_status()
    shown = log.LineFormatter().format(
        logging.LogRecord(
            "asyncio", 40, "f", 1, "future: %r %s", (caught.value, f"http://me:{CLIENT}@h/"), None
        )
    )
    assert "RequestInfo" in shown
    _clean(shown, CLIENT)


@pytest.mark.parametrize("encoding", SPELLED)
@pytest.mark.parametrize("around", ["{}", "a{}b", 'key="{}"', "/{}/", "<{}>", "x={}&y"])
def test_no_encoding_passes_the_redaction(encoding, around):
    """Alone, amid other characters, and within a long text."""
    for text in (
        around.format(SPELLED[encoding]),
        "word " * 5000 + around.format(SPELLED[encoding]),
    ):
        _clean(Redactor(KEY).redact_text(text), KEY)


@pytest.mark.parametrize("encoding", spellings(TEXT))
def test_no_encoding_of_an_input_is_repeated(encoding):
    """Whole, or from somewhere in it on."""
    quoted = QuotedInputs(["another input of this call", TEXT])
    said = f"cannot embed {spellings(TEXT)[encoding]}: too long"
    _clean(quoted.hide(said), TEXT)
    assert quoted.hide(f"cut: {TEXT[9:60]}…") == "cut: ***…"
    assert quoted.hide("maximum context length is 8192 tokens") == (
        "maximum context length is 8192 tokens"
    )


def test_ordinary_errors_stay_readable():
    """What vendors say without a key goes on as it is."""
    redactor = Redactor("sk-proj-0123456789abcdefghijklmnop", "gateway-0123456789")
    for text in (
        "You exceeded your current quota, please check your plan and billing details.",
        "This model's maximum context length is 8192 tokens, however you requested 10000.",
        "Rate limit reached for text-embedding-3-large in organization org-1a2b3c4d5e6f7a8b9c0d",
        "request_id: 6b1f0e8a-2c1d-4d3e-9f0a-1b2c3d4e5f60",
    ):
        assert redactor.redact_text(text) == text


def test_a_megabyte_is_searched_to_its_end():
    """A key at the end of the longest body is found, in an encoding of an encoding as well."""
    for name in ("plain", "URL twice", "JSON numbers", "hexadecimal", "base64 at 0"):
        body = b"x y " * ((MAX_BYTES - 2000) // 4) + SPELLED[name].encode()
        redactor = Redactor(KEY)
        assert not redactor.is_clean(body)
        assert len(body) <= MAX_BYTES
        found = redactor.redact(body)
        _clean(found.decode() if redactor.is_clean(found) else "", KEY)


async def test_the_watch_finds_a_leak(start_proxy, upstream, tmp_path):
    """What `leaks` does for each test: a key in a reply, a log, a file, a file's name."""
    upstream.always = status(200)
    WATCH.heard({"Authorization": f"Bearer {CLIENT}"}, [TEXT])
    for secret, name in ((CLIENT, "key"), (TEXT, "text")):
        logging.getLogger("embedding_proxy.x").warning("said %s", secret)
        assert any(f"holds a {name}" in one for one in WATCH.problems())
        WATCH._told.clear()
    assert not WATCH.problems()
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / spellings(CLIENT)["hexadecimal"]).write_text(CLIENT)
    assert len(WATCH.problems(tmp_path / "cache")) == 2
    proxy = await start_proxy()
    async with proxy.http.get(f"{proxy.url}/{spellings(CLIENT)['whole URL']}x") as reply:
        assert reply.status == 404
    assert any("a reply" in one for one in WATCH.problems())
    WATCH.begin()
    with suppress(FileNotFoundError):
        (tmp_path / "cache" / spellings(CLIENT)["hexadecimal"]).unlink()


async def test_the_upstream_repeats_the_key_everywhere(upstream):
    """Else the watch would have nothing to find."""
    assert isinstance(upstream, FaultServer)
    upstream.script.append(status(500))
    async with aiohttp.ClientSession(headers={"Authorization": f"Bearer {CLIENT}"}) as session:
        for _ in range(2):
            async with session.post(upstream.url, json={"model": MODEL, "input": "a"}) as reply:
                assert CLIENT in reply.headers.values()
                assert (reply.status == 500) == (CLIENT in await reply.text())
