"""Calls that are not ours, passed to a provider and back: as they are, as they come."""

import asyncio
import gzip
import json
import logging
import os
from socket import SHUT_RDWR
from socket import socket as Socket  # noqa: N812

import aiohttp
import openai
import pytest
from aiohttp import WSMsgType, web
from clock import until
from embedding_proxy.providers.upstream import hops
from embedding_proxy.proxy.http.app_runner import LIMITS
from yarl import URL

KEY = "openai-secret-key"
CHAT = {"model": "gpt-x", "messages": [{"role": "user", "content": "hi"}]}
SECONDS = 60


@pytest.fixture
def start(start_proxy, other):
    """Give a function that starts a proxy which passes calls to the upstream."""

    async def start(**sections):
        return await start_proxy(openai=other, **{"passthrough": "openai", **sections})

    return start


def _says(status=200, body=b"{}", **headers):
    async def act(_: web.Request) -> web.Response:
        return web.Response(status=status, body=body, headers=headers)

    return act


async def test_chat_arrives_chunk_by_chunk_with_tool_calls_and_usage(other, start):
    """The openai client has the first chunk before the upstream has made the second."""
    first_is_there = asyncio.Event()
    call = {"index": 0, "id": "call_1", "type": "function"}
    deltas = [
        {"role": "assistant", "content": "Hel"},
        {"tool_calls": [{**call, "function": {"name": "weather", "arguments": '{"ci'}}]},
        {"tool_calls": [{"index": 0, "function": {"arguments": 'ty":"Ulm"}'}}]},
    ]
    common = {"id": "c", "object": "chat.completion.chunk", "created": 1, "model": "gpt-x"}
    usage = {"prompt_tokens": 3, "completion_tokens": 4, "total_tokens": 7}

    async def act(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        for delta in deltas:
            chunk = {**common, "choices": [{"index": 0, "delta": delta, "finish_reason": None}]}
            await response.write(b"data: %b\n\n" % json.dumps(chunk).encode())
            await first_is_there.wait()
        end = {**common, "choices": [], "usage": usage}
        await response.write(b"data: %b\n\ndata: [DONE]\n\n" % json.dumps(end).encode())
        return response

    other.act = act
    proxy = await start()
    async with asyncio.timeout(SECONDS):
        stream = await proxy.client.chat.completions.create(**CHAT, stream=True)
        chunks = [await anext(stream)]
        first_is_there.set()
        chunks += [chunk async for chunk in stream]
    assert chunks[0].choices[0].delta.content == "Hel"
    calls = [chunk.choices[0].delta.tool_calls[0] for chunk in chunks[1:3]]
    assert (calls[0].id, calls[0].function.name) == ("call_1", "weather")
    assert "".join(one.function.arguments for one in calls) == '{"city":"Ulm"}'
    assert chunks[-1].usage.total_tokens == 7


async def test_a_head_arrives_before_the_body_does(other, start):
    """A client learns that its stream has begun although nothing of it was sent yet."""
    end = asyncio.Event()

    async def act(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        await end.wait()
        return response

    other.act = act
    proxy = await start()
    async with asyncio.timeout(SECONDS), proxy.http.get(f"{proxy.url}/responses/r") as response:
        assert response.content_type == "text/event-stream"
        end.set()
        assert await response.read() == b""


@pytest.mark.parametrize("method", ["GET", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"])
async def test_every_method_is_passed_with_its_body(method, other, start):
    """Whatever the method, the body goes there and comes back."""
    proxy = await start()
    async with proxy.http.request(method, f"{proxy.url}/batches/b", data=b"sent") as response:
        assert await response.read() == b"sent"
    assert (other.seen[0].method, other.seen[0].target) == (method, "/v1/batches/b")


async def test_head_has_the_length_and_no_body(other, start):
    """HEAD tells what GET would, and the connection can be used again."""
    other.act = _says(body=b"x" * 1000)
    proxy = await start()
    for _ in range(2):
        async with proxy.http.head(f"{proxy.url}/files/f/content") as response:
            assert (response.status, response.headers["Content-Length"]) == (200, "1000")
            assert await response.read() == b""
    assert {call.method for call in other.seen} == {"HEAD"}


@pytest.mark.parametrize("status", [204, 304])
async def test_a_reply_without_a_body_ends(status, other, start):
    """What has no body by its status is not waited for, and has none here either."""
    other.act = _says(status=status, body=None)
    proxy = await start()
    async with asyncio.timeout(SECONDS), proxy.http.get(f"{proxy.url}/files/f") as response:
        assert (response.status, await response.read()) == (status, b"")


@pytest.mark.parametrize(
    "target",
    [
        "/files?after=a%2Fb&limit=2&x=%E4%BD%A0&empty=&flag&plus=a+b",
        "/files/a%2Fb%20c;v=1/content",
        "/files?filter[a]=1&q=%7B%22a%22%3A1%7D&t='()*!~:@,$",
        "/files?path=../x&url=https://h/p?q=1",
        "/vector_stores/%C3%A9//x/",
        "/realtime?model=gpt-4o%2drealtime",
    ],
)
@pytest.mark.parametrize("prefix", ["/v1", "/api/v1", "/openai/v1"])
async def test_paths_and_queries_arrive_byte_by_byte(prefix, target, other, start):
    """Nothing is quoted, unquoted, sorted or dropped on the way."""
    proxy = await start()
    host, _, port = proxy.url.removeprefix("http://").removesuffix("/v1").partition(":")
    reader, writer = await asyncio.open_connection(host, port)
    writer.write(f"GET {prefix}{target} HTTP/1.1\r\nHost: h\r\n\r\n".encode())
    assert b" 200 " in await reader.readline()
    writer.close()
    assert [call.target for call in other.seen] == ["/v1" + target]


@pytest.mark.parametrize("path", ["../admin", "f/../../admin", "%2e%2E/admin", "a/./b"])
async def test_a_path_does_not_lead_out_of_the_base_url(path, other, start):
    """The key is used below the provider's base URL and nowhere else."""
    proxy = await start()
    host, _, port = proxy.url.removeprefix("http://").removesuffix("/v1").partition(":")
    reader, writer = await asyncio.open_connection(host, port)
    writer.write(f"GET /v1/{path} HTTP/1.1\r\nHost: h\r\n\r\n".encode())
    assert b" 404 " in await reader.readline()
    writer.close()
    assert not other.seen


async def test_headers_go_on_but_for_those_that_are_not_the_upstreams(other, start):
    """What SDKs say arrives; what is of the connection, of this proxy or of a person does not."""
    proxy = await start(
        providers={"openai": {"base_url": other.url, "headers": {"X-Team": "ours"}}},
    )
    sent = {
        "OpenAI-Beta": "assistants=v2",
        "OpenAI-Organization": "org-1",
        "X-Stainless-Lang": "python",
        "Idempotency-Key": "i",
        "User-Agent": "test/1",
        "Accept": "text/event-stream",
        "Accept-Encoding": "br",
        "x-team": "theirs",
    }
    kept = {
        "Authorization": "Bearer sk-client",
        "api-key": "sk-client",
        "x-api-key": "sk-client",
        "x-proxy-key": "sk-client",
        "Proxy-Authorization": "sk-client",
        "Cookie": "session=1",
        "Forwarded": "for=10.0.0.1",
        "X-Forwarded-For": "10.0.0.1",
        "X-Real-IP": "10.0.0.1",
        "Origin": "http://localhost:3000",
        "Referer": "http://localhost:3000/secret",
        "Connection": "X-Hop, keep-alive",
        "X-Hop": "1",
        "Keep-Alive": "timeout=5",
        "TE": "trailers",
    }
    async with proxy.http.post(f"{proxy.url}/x", data=b"a", headers={**sent, **kept}) as response:
        assert response.status == 200
    seen = other.seen[0].headers
    assert seen["Authorization"] == f"Bearer {KEY}"
    assert seen["Host"] == other.url.removeprefix("http://").removesuffix("/v1")
    assert seen.getall("X-Team") == ["ours"]
    del sent["x-team"]
    assert {name: seen.get(name) for name in sent} == sent
    assert {name.lower() for name in seen} == {
        *(name.lower() for name in sent),
        *("authorization", "host", "x-team", "content-type", "content-length", hops.HEADER),
    }


async def test_headers_that_a_client_does_not_send_are_not_made_up(other, start):
    """No Accept-Encoding, no agent: the upstream sees the client, not the proxy's library."""
    proxy = await start()
    skip = ("Accept", "Accept-Encoding", "User-Agent")
    async with proxy.http.get(f"{proxy.url}/x", skip_auto_headers=skip) as response:
        assert response.status == 200
    own = {"host", "authorization", hops.HEADER}
    assert {name.lower() for name in other.seen[0].headers} == own


async def test_the_replys_headers_are_the_upstreams(other, start):
    """Status, reason, repeated headers and the upstream's id stay; its origin's rules do not."""

    async def act(_: web.Request) -> web.Response:
        response = web.Response(status=299, reason="Rather Fine", body=b"a")
        response.headers["x-request-id"] = "req_theirs"
        response.headers["x-ratelimit-remaining-tokens"] = "7"
        response.headers["Server"] = "theirs"
        response.headers.add("Set-Cookie", "a=1")
        response.headers.add("Set-Cookie", "b=2")
        response.headers["Access-Control-Allow-Origin"] = "*"
        response.headers["Strict-Transport-Security"] = "max-age=1"
        response.headers["Alt-Svc"] = "h3"
        response.headers["Keep-Alive"] = "timeout=5"
        response.headers["X-Accel-Redirect"] = "/internal"
        response.headers["X-Accel-Buffering"] = "yes"
        return response

    other.act = act
    proxy = await start()
    async with proxy.http.get(f"{proxy.url}/x") as response:
        assert (response.status, response.reason) == (299, "Rather Fine")
        assert response.headers.getall("X-Accel-Buffering") == ["no"]
        assert response.headers["x-request-id"] == "req_theirs"
        assert response.headers["x-ratelimit-remaining-tokens"] == "7"
        assert response.headers["Server"] == "theirs"
        assert response.headers.getall("Set-Cookie") == ["a=1", "b=2"]
        names = {name.lower() for name in response.headers}
    assert not names & {
        "access-control-allow-origin",
        "strict-transport-security",
        "alt-svc",
        "keep-alive",
        "x-accel-redirect",
    }


@pytest.mark.parametrize("status", [400, 401, 404, 429, 500, 503, 529])
async def test_a_refusal_arrives_unchanged_and_is_not_tried_again(status, other, start):
    """The upstream's errors are the client's, to the byte, and nothing is asked twice."""
    body = b'{"error": {"message": "theirs",  "type": null}}'
    other.act = _says(status, body, **{"Retry-After": "20", "Content-Type": "application/json"})
    proxy = await start()
    for _ in range(6):
        async with proxy.http.post(f"{proxy.url}/chat/completions", json=CHAT) as response:
            assert (response.status, await response.read()) == (status, body)
            assert response.headers["Retry-After"] == "20"
            assert "x-should-retry" not in response.headers
    assert len(other.seen) == 6


async def test_a_redirect_is_the_clients_to_follow(other, start):
    """The key goes to one origin: a redirect is passed on, not followed."""
    other.act = _says(302, b"", Location="http://elsewhere.example/v1/x")
    proxy = await start()
    async with proxy.http.get(f"{proxy.url}/x", allow_redirects=False) as response:
        assert response.status == 302
        assert response.headers["Location"] == "http://elsewhere.example/v1/x"
    assert len(other.seen) == 1


async def test_compressed_bodies_stay_compressed(other, start):
    """Both ways, bytes that are compressed are not touched, nor is the word that they are."""
    packed = gzip.compress(b"sent")
    taken = []

    async def act(request: web.Request) -> web.Response:
        taken.append((await request.read(), request.headers["Content-Encoding"]))
        return web.Response(body=packed, headers={"Content-Encoding": "gzip"})

    other.act = act
    proxy = await start()
    headers = {"Content-Encoding": "gzip"}
    async with (
        asyncio.timeout(SECONDS),
        proxy.http.post(
            f"{proxy.url}/x", data=packed, headers=headers, auto_decompress=False
        ) as response,
    ):
        assert await response.read() == packed
        assert response.headers["Content-Encoding"] == "gzip"
        assert response.headers["Content-Length"] == str(len(packed))
    assert taken == [(packed, "gzip")]


async def test_a_multipart_upload_arrives_untouched(other, start):
    """The openai client's upload of a file is the same bytes there, its length included."""

    async def act(request: web.Request) -> web.Response:
        form = await request.post()
        content = form["file"].file.read()
        made = {"id": "file-1", "object": "file", "bytes": len(content), "created_at": 1}
        made |= {"filename": form["file"].filename, "purpose": form["purpose"], "status": "done"}
        return web.json_response(made)

    other.act = act
    proxy = await start(server={"max_body_mib": 1 / 1024})
    content = bytes(range(256)) * 1000
    made = await proxy.client.files.create(file=("a.bin", content), purpose="batch")
    assert (made.bytes, made.filename, made.purpose) == (len(content), "a.bin", "batch")
    assert "Transfer-Encoding" not in other.seen[0].headers


async def test_a_body_of_unknown_length_is_passed_on_as_it_grows(other, start):
    """Upload and reply may go on at once: each part is there before the next is sent."""
    heard: asyncio.Queue[bytes] = asyncio.Queue()

    async def act(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        async for part in request.content.iter_any():
            heard.put_nowait(part)
            await response.write(part.upper())
        return response

    async def parts():
        for part in (b"a", b"b", b"c"):
            yield part
            assert await heard.get() == part

    other.act = act
    proxy = await start()
    async with asyncio.timeout(SECONDS), proxy.http.post(f"{proxy.url}/x", data=parts()) as reply:
        assert await reply.read() == b"ABC"
    assert other.seen[0].headers["Transfer-Encoding"] == "chunked"


@pytest.mark.parametrize("head", ["Content-Length: 9", "Transfer-Encoding: chunked"])
async def test_who_stops_amid_an_upload_and_listens_hears_why(head, other, start):
    """A client that breaks its own body off gets the 400 that it would get for embeddings."""
    begun = asyncio.Event()

    async def act(request: web.Request) -> web.Response:
        begun.set()
        return web.Response(body=await request.read())

    other.act = act
    proxy = await start()
    host, _, port = proxy.url.removeprefix("http://").removesuffix("/v1").partition(":")
    reader, writer = await asyncio.open_connection(host, port)
    writer.write(f"POST /v1/x HTTP/1.1\r\nHost: h\r\n{head}\r\n\r\n1\r\na\r\n".encode())
    await begun.wait()
    writer.write_eof()
    async with asyncio.timeout(SECONDS):
        answer = await reader.read()
    writer.close()
    assert answer.startswith(b"HTTP/1.1 400 ")
    assert b"The request body broke off." in answer


async def test_an_early_refusal_of_an_upload_arrives(other, start):
    """An upstream that refuses before it has read the whole is heard; the rest is dropped."""
    over = asyncio.Event()

    async def body():
        yield b"a"
        await over.wait()
        yield b"b"

    other.act = _says(413, b"too large")
    proxy = await start()
    async with (
        asyncio.timeout(SECONDS),
        proxy.http.post(f"{proxy.url}/files", data=body()) as reply,
    ):
        assert (reply.status, await reply.read()) == (413, b"too large")
        over.set()
    async with proxy.http.get(f"{proxy.url}/x") as reply:
        assert reply.status == 413


async def test_connections_are_kept_on_both_sides(other, start):
    """Calls one after the other share a connection here, and one there."""
    proxy = await start()
    for _ in range(5):
        async with proxy.http.post(f"{proxy.url}/x", data=b"a") as response:
            assert await response.read() == b"a"
            assert "Connection" not in response.headers
    assert len(proxy.app[LIMITS]) == 1
    assert len(other.connections) == 1


@pytest.mark.parametrize("after", [b"", b"data: 1\n\n"], ids=["before a word", "amid the stream"])
async def test_an_upstream_hears_that_the_client_left(after, other, start, caplog):
    """When the client goes away the call is given up there, and nobody raises an alarm."""
    begun, given_up = asyncio.Event(), asyncio.Event()

    async def act(request: web.Request) -> web.StreamResponse:
        try:
            response = web.StreamResponse()
            if after:
                await response.prepare(request)
                await response.write(after)
            begun.set()
            await asyncio.Event().wait()
        finally:
            given_up.set()

    other.act = act
    proxy = await start()
    host, _, port = proxy.url.removeprefix("http://").removesuffix("/v1").partition(":")
    reader, writer = await asyncio.open_connection(host, port)
    writer.write(b"POST /v1/x HTTP/1.1\r\nHost: h\r\nContent-Length: 1\r\n\r\na")
    await begun.wait()
    if after:
        await reader.readuntil(after)
    writer.close()
    async with asyncio.timeout(60):
        await given_up.wait()
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


async def test_an_upstream_hears_that_an_upload_broke_off(other, start):
    """A body whose rest never comes is broken there too, not one that ended early."""
    broken = asyncio.Event()

    async def act(request: web.Request) -> web.StreamResponse:
        begun.set()
        try:
            await request.read()
        finally:
            broken.set()
        raise AssertionError("the body was taken for whole")

    other.act, begun = act, asyncio.Event()
    proxy = await start()
    host, _, port = proxy.url.removeprefix("http://").removesuffix("/v1").partition(":")
    for head in (b"Content-Length: 9\r\n\r\na", b"Transfer-Encoding: chunked\r\n\r\n1\r\na\r\n"):
        begun.clear()
        broken.clear()
        _, writer = await asyncio.open_connection(host, port)
        writer.write(b"POST /v1/x HTTP/1.1\r\nHost: h\r\n" + head)
        await begun.wait()
        writer.close()
        async with asyncio.timeout(60):
            await broken.wait()


@pytest.mark.parametrize("length", [None, "1000"], ids=["chunked", "counted"])
async def test_a_reply_that_breaks_off_is_broken_here(length, other, start):
    """What came is passed on, and the client can tell that it is not the whole."""

    async def act(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Length": length} if length else {})
        await response.prepare(request)
        await response.write(b"half")
        request.transport.abort()
        return response

    other.act = act
    proxy = await start()
    async with proxy.http.get(f"{proxy.url}/x") as response:
        assert await response.content.readexactly(4) == b"half"
        with pytest.raises(aiohttp.ClientPayloadError):
            await response.read()


async def test_a_client_of_http_1_0_can_tell_too(other, start):
    """Where the end of the connection is the end of the reply, a broken one ends in a reset."""

    async def act(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        await response.write(b"half")
        request.transport.abort()
        return response

    other.act = act
    proxy = await start()
    host, _, port = proxy.url.removeprefix("http://").removesuffix("/v1").partition(":")
    reader, writer = await asyncio.open_connection(host, port)
    writer.write(b"GET /v1/x HTTP/1.0\r\n\r\n")
    with pytest.raises(ConnectionResetError):
        await reader.read()
    writer.close()


async def test_an_upstream_that_cannot_be_reached_is_a_502(other, start):
    """A connection that is refused, or cut before the reply, is told in OpenAI's shape."""

    async def act(request: web.Request) -> web.StreamResponse:
        request.transport.abort()
        return web.Response()

    other.act = act
    proxy = await start()
    with pytest.raises(openai.InternalServerError, match="server disconnected") as error:
        await proxy.client.chat.completions.create(**CHAT)
    assert (error.value.status_code, error.value.code) == (502, "upstream_unreachable")
    assert len(other.seen) == 1
    await other.__aexit__()
    with pytest.raises(openai.InternalServerError, match="openai: connection refused by 127"):
        await proxy.client.chat.completions.create(**CHAT)


async def test_a_stale_connection_is_not_tried_again(other, start):
    """Not even a GET is sent twice when a kept connection turns out to be dead."""
    proxy = await start()
    async with proxy.http.get(f"{proxy.url}/x") as response:
        assert response.status == 200

    async def act(request: web.Request) -> web.StreamResponse:
        request.transport.abort()
        return web.Response()

    other.act = act
    async with proxy.http.get(f"{proxy.url}/x") as response:
        assert response.status == 502
    assert len(other.seen) == 2


@pytest.mark.parametrize("begun", [False, True])
async def test_a_call_in_which_nothing_moves_is_given_up(begun, other, start, move):
    """An upstream that falls silent costs the configured time: a 504, or a broken reply."""

    async def act(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        if begun:
            await response.prepare(request)
            await response.write(b"half")
        await asyncio.Event().wait()

    other.act = act
    proxy = await start(passthrough_idle_timeout_s=100)
    asking = asyncio.create_task(proxy.http.get(f"{proxy.url}/x"))
    if begun:
        response = await asking
        assert await response.content.readexactly(4) == b"half"
        await move(101)
        with pytest.raises(aiohttp.ClientPayloadError):
            await response.read()
    else:
        await until(lambda: other.seen)
        await move(101)
        error = (await (await asking).json())["error"]
        assert ((await asking).status, error["code"]) == (504, "upstream_timeout")
        assert "nothing moved for 100 s" in error["message"]


async def test_calls_that_are_ours_are_never_passed_on(other, start):
    """Whatever the method, embeddings stay here: a 405 says what is allowed."""
    proxy = await start()
    for path in ("/embeddings", "/embeddings/", "/engines/m/embeddings"):
        for method in ("GET", "PUT", "DELETE"):
            async with proxy.http.request(method, proxy.url + path) as response:
                assert (response.status, response.headers["Allow"]) == (405, "POST")
    assert not other.seen


@pytest.mark.parametrize("method", ["TRACE", "CONNECT"])
async def test_no_method_that_shows_the_key_is_passed(method, other, start):
    """An upstream answers TRACE with the request it got, key and all."""
    proxy = await start()
    host, _, port = proxy.url.removeprefix("http://").removesuffix("/v1").partition(":")
    reader, writer = await asyncio.open_connection(host, port)
    writer.write(f"{method} /v1/x HTTP/1.1\r\nHost: h\r\n\r\n".encode())
    status = (await reader.readline()).split()[1]
    assert status == (b"405" if method == "TRACE" else b"404")
    writer.close()
    assert not other.seen


async def test_off_is_openais_404(other, start):
    """With `passthrough: null`, other calls get what OpenAI says of an unknown URL."""
    proxy = await start(passthrough=None)
    with pytest.raises(openai.NotFoundError, match="Invalid URL") as caught:
        await proxy.client.chat.completions.create(**CHAT)
    assert caught.value.code == "unknown_url"
    assert not other.seen


async def test_a_provider_without_a_key_is_told_with_the_remedy(other, start, monkeypatch):
    """Nobody is asked without a key; the error names the variable."""
    proxy = await start()
    monkeypatch.delenv("OPENAI_API_KEY")
    proxy = await start(providers={"acme": {
        "kind": "openai", "base_url": other.url, "api_key_env": "ACME_KEY"
    }}, passthrough="acme")  # fmt: skip
    with pytest.raises(openai.PermissionDeniedError, match="set ACME_KEY") as caught:
        await proxy.client.chat.completions.create(**CHAT)
    assert (caught.value.status_code, caught.value.code) == (403, "provider_not_configured")
    assert not other.seen


async def test_a_frozen_proxy_passes_nothing(other, start):
    """Where nothing is bought, chat is not either."""
    proxy = await start(cache={"mode": "frozen"})
    with pytest.raises(openai.NotFoundError, match=r"cache\.mode is frozen"):
        await proxy.client.chat.completions.create(**CHAT)
    assert [model.id async for model in proxy.client.models.list()]
    assert not other.seen


async def test_the_proxys_keys_are_asked_for_first(other, start):
    """A call without a key of ours is not passed on, and a key of ours goes no further."""
    proxy = await start(server={"keys": ["ours"]})
    with pytest.raises(openai.AuthenticationError):
        await proxy.client.chat.completions.create(**CHAT)
    assert not other.seen
    client = proxy.client.with_options(api_key="ours")
    async with proxy.http.get(
        f"{proxy.url}/x", headers={"Authorization": f"Bearer {client.api_key}"}
    ) as response:
        assert response.status == 200
    assert other.seen[0].headers["Authorization"] == f"Bearer {KEY}"


async def test_a_clients_own_key_is_sent_where_configured(other, start):
    """With `passthrough_auth: client` the caller's key is used, and the provider's is not."""
    proxy = await start(passthrough_auth="client")
    for headers in ({"Authorization": "Bearer sk-own"}, {}):
        async with proxy.http.get(f"{proxy.url}/x", headers=headers) as response:
            assert response.status == 200
    assert [call.headers.get("Authorization") for call in other.seen] == ["Bearer sk-own", None]
    assert KEY not in str(other.seen)


async def test_two_keys_come_in_two_headers(other, start):
    """Where both a key of ours and the client's own are needed, neither is taken for the other."""
    proxy = await start(passthrough_auth="client", server={"keys": ["ours"]})
    both = {"Authorization": "Bearer sk-own", "x-proxy-key": "ours"}
    async with proxy.http.get(f"{proxy.url}/x", headers=both) as response:
        assert response.status == 200
    assert other.seen[0].headers["Authorization"] == "Bearer sk-own"
    assert "ours" not in str(other.seen)
    for headers in ({"Authorization": "Bearer ours"}, {"x-proxy-key": "ours", "Authorization": "bearer ours"}):  # fmt: skip # noqa: E501
        async with proxy.http.get(f"{proxy.url}/x", headers=headers) as response:
            error = (await response.json())["error"]
            assert response.status == 401
            assert "this proxy's key in `x-proxy-key`" in error["message"]
    assert len(other.seen) == 1


async def test_azures_key_goes_in_azures_header(other, start_proxy, monkeypatch):
    """Each kind of provider gets its key as it wants it."""
    monkeypatch.setenv("AZURE_OPENAI_API_KEY", "azure-secret")
    proxy = await start_proxy(
        providers={"azure": {"base_url": other.url}}, passthrough="azure", models={}
    )
    async with proxy.http.get(f"{proxy.url}/x", headers={"Authorization": "Bearer c"}) as response:
        assert response.status == 200
    assert other.seen[0].headers["api-key"] == "azure-secret"
    assert "Authorization" not in other.seen[0].headers


async def test_a_page_of_another_site_cannot_spend(other, start):
    """Without keys, what a browser sends for some page is refused unless its origin is allowed."""
    proxy = await start(server={"cors": ["https://app.example"]})
    allowed = {
        "https://app.example": 200,
        "http://localhost:3000": 200,
        "app://obsidian.md": 200,
        "https://evil.example": 403,
        "http://127.0.0.1.evil.example": 403,
        "null": 403,
    }
    for origin, status in allowed.items():
        async with proxy.http.post(
            f"{proxy.url}/x", data=b"a", headers={"Origin": origin}
        ) as response:
            assert response.status == status
    proxy = await start(server={"keys": ["ours"]})
    headers = {"Origin": "https://evil.example", "Authorization": "Bearer ours"}
    async with proxy.http.post(f"{proxy.url}/x", data=b"a", headers=headers) as response:
        assert response.status == 200


async def test_no_key_appears_in_the_log(other, start, caplog):
    """Neither the provider's key nor the client's is written down, whatever goes wrong."""
    caplog.set_level(logging.DEBUG)
    proxy = await start()
    headers = {"Authorization": "Bearer sk-client-key"}
    for act in (_says(500), _says(401)):
        other.act = act
        async with proxy.http.post(f"{proxy.url}/x", data=b"a", headers=headers) as response:
            await response.read()

    async def cut(request: web.Request) -> web.StreamResponse:
        request.transport.abort()
        return web.Response()

    other.act = cut
    async with proxy.http.post(f"{proxy.url}/x", data=b"a", headers=headers) as response:
        assert response.status == 502
    with pytest.raises(aiohttp.WSServerHandshakeError):
        await proxy.http.ws_connect(
            f"{proxy.url}/realtime", protocols=["openai-insecure-api-key.sk-client-key"]
        )
    ours = [r.getMessage() for r in caplog.records if not r.name.startswith("asyncio")]
    assert "sk-client-key" not in str(ours)
    assert KEY not in str(ours)


async def _socket(request: web.Request) -> web.StreamResponse:
    socket = web.WebSocketResponse(protocols=["realtime"], max_msg_size=0)
    await socket.prepare(request)
    async for message in socket:
        if message.data == "bye":
            await socket.close(code=4001, message=b"theirs")
        elif message.type is WSMsgType.TEXT:
            await socket.send_str(message.data.upper())
        else:
            await socket.send_bytes(message.data * 2)
    return socket


async def test_a_websocket_is_bridged(other, start):
    """Texts, bytes, the protocol and how it is closed pass through; a key among protocols not."""
    other.act = _socket
    proxy = await start()
    key = "openai-insecure-api-key.sk-client"
    async with (
        asyncio.timeout(SECONDS),
        proxy.http.ws_connect(
            URL(f"{proxy.url}/realtime?model=a%2Fb", encoded=True),
            protocols=["realtime", key],
            max_msg_size=0,
        ) as socket,
    ):
        assert socket.protocol == "realtime"
        await socket.send_str("hi")
        assert (await socket.receive()).data == "HI"
        await socket.send_bytes(b"x" * (5 << 20))
        assert len((await socket.receive()).data) == 10 << 20
        await socket.send_str("bye")
        message = await socket.receive()
        assert (message.data, message.extra) == (4001, "theirs")
    seen = other.seen[0]
    assert seen.target == "/v1/realtime?model=a%2Fb"
    assert seen.headers["Authorization"] == f"Bearer {KEY}"
    assert seen.headers["Sec-WebSocket-Protocol"] == "realtime"


async def test_an_upstream_hears_that_a_websocket_is_gone(other, start):
    """A client that vanishes, or closes in order, is gone for the upstream within a second."""
    ended: asyncio.Queue[int | None] = asyncio.Queue()
    connected = asyncio.Event()

    async def act(request: web.Request) -> web.StreamResponse:
        socket = web.WebSocketResponse()
        await socket.prepare(request)
        connected.set()
        try:
            await socket.receive()
        finally:
            ended.put_nowait(socket.close_code)
        return socket

    other.act = act
    proxy = await start()
    socket = await proxy.http.ws_connect(f"{proxy.url}/realtime")
    await connected.wait()
    await socket.close(code=4002)
    async with asyncio.timeout(60):
        assert await ended.get() == 4002
    connected.clear()
    socket = await proxy.http.ws_connect(f"{proxy.url}/realtime")
    await connected.wait()
    with Socket(fileno=os.dup(socket.get_extra_info("socket").fileno())) as own:
        own.shutdown(SHUT_RDWR)
    async with asyncio.timeout(60):
        assert await ended.get() != 4002


async def test_a_refused_websocket_says_with_which_status(other, start):
    """An upstream that does not upgrade is told as the error it gave."""
    other.act = _says(401)
    proxy = await start()
    with pytest.raises(aiohttp.WSServerHandshakeError) as caught:
        await proxy.http.ws_connect(f"{proxy.url}/realtime")
    assert caught.value.status == 401
