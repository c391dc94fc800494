"""Web pages at an open proxy: none of another machine buys anything, on whichever route."""

import json

import aiohttp
import pytest
from any_server import AnyServer
from embedding_proxy.proxy.config.schema import Settings
from pydantic import ValidationError
from talk import Talk

MODEL = "text-embedding-3-small"
FOREIGN = [
    {"Origin": "https://evil.example"},
    {"Origin": "http://localhost.evil.example:8080"},
    {"Origin": "null"},
    {"Sec-Fetch-Site": "cross-site"},
    {"Origin": "https://evil.example", "Sec-Fetch-Site": "same-origin"},
]
ROUTES = [
    ("POST", "/v1/embeddings"),
    ("POST", "/embeddings/"),
    ("POST", f"/openai/deployments/{MODEL}/embeddings"),
    ("POST", f"/v1/engines/{MODEL}/embeddings"),
    ("GET", "/v1/models"),
    ("GET", f"/v1/models/{MODEL}"),
    ("GET", "/status"),
    ("GET", "/metrics"),
    ("GET", "/"),
    ("GET", "/nowhere"),
    ("POST", "/v1/chat/completions"),
    ("OPTIONS", "/v1/embeddings"),
]
KEYS = [{"key": "plain"}, {"key": "boss", "admin": True}]


def _body(text: str) -> bytes:
    return json.dumps({"model": MODEL, "input": text}).encode()


def _post(text: str, *lines: str, host: str = "localhost") -> bytes:
    body = _body(text)
    head = ["POST /v1/embeddings HTTP/1.1", f"Host: {host}", f"Content-Length: {len(body)}", *lines]
    return "\r\n".join(head).encode() + b"\r\n\r\n" + body


async def _told(response: aiohttp.ClientResponse) -> tuple[int, str | None]:
    """Return status and code of an error; it has OpenAI's four keys."""
    error = (await response.json())["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    return response.status, error["code"]


@pytest.mark.parametrize("headers", FOREIGN, ids=str)
async def test_no_route_serves_a_page_of_another_machine(headers, start_proxy, upstream):
    """Every route but the probes refuses it, text/plain too, and nothing is bought."""
    async with AnyServer() as other:
        proxy = await start_proxy(openai=other, passthrough="openai")
        place = proxy.url.removesuffix("/v1")
        for method, path in ROUTES:
            data = _body("a") if method == "POST" else None
            sent = {"Content-Type": "text/plain", **headers}
            async with proxy.http.request(
                method, place + path, data=data, headers=sent
            ) as response:
                assert await _told(response) == (403, "origin_not_allowed"), path
        assert other.seen == []
        for path in ("/livez", "/readyz", "/healthz", "/health"):
            async with proxy.http.get(place + path, headers=headers) as response:
                assert response.status == 200


@pytest.mark.parametrize(
    "headers",
    [
        {"Origin": "http://localhost:3000", "Sec-Fetch-Site": "cross-site"},
        {"Origin": "http://[::1]:3000"},
        {"Origin": "http://proxy.internal"},
        {"Origin": "app://obsidian.md", "Sec-Fetch-Site": "cross-site"},
        {"Origin": "https://app.example", "Sec-Fetch-Site": "cross-site"},
        {"Sec-Fetch-Site": "none"},
        {"Sec-Fetch-Site": "same-origin"},
    ],
    ids=str,
)
async def test_pages_of_this_machine_and_of_cors_are_served(headers, start_proxy, upstream):
    """What the operator runs or names may call as before."""
    server = {"cors": ["https://app.example"], "allowed_hosts": "proxy.internal"}
    proxy = await start_proxy(openai=upstream, server=server)
    response = await proxy.post({"model": MODEL, "input": "a"}, **headers)
    assert response.status == 200


async def test_keys_take_the_place_of_the_check(start_proxy, upstream):
    """A page that has a key may call, under whatever name."""
    proxy = await start_proxy(openai=upstream, server={"keys": ["ours"]})
    headers = {"Origin": "https://evil.example", "Host": "evil.example"}
    for key, status in (("ours", 200), ("other", 401)):
        response = await proxy.post(
            {"model": MODEL, "input": "a"}, Authorization=f"Bearer {key}", **headers
        )
        assert response.status == status


HOSTS = {
    "localhost": 200,
    "LOCALHOST:8080": 200,
    "localhost.": 200,
    "127.0.0.1:1": 200,
    "127.1.2.3": 200,
    "[::1]:8080": 200,
    "a.localhost": 200,
    "proxy.internal:80": 200,
    "evil.example": 421,
    "evil.example:8080": 421,
    "127.0.0.1.evil.example": 421,
    "localhost.evil.example": 421,
    "proxy.internal.evil.example": 421,
    "0.0.0.0:8080": 421,
    "10.0.0.1": 421,
    "": 421,
    "localhost:8080@evil.example": 421,
}


@pytest.mark.parametrize("host", HOSTS)
async def test_an_open_proxy_answers_only_under_its_own_names(host, start_proxy, upstream):
    """DNS rebinding finds a 421 in OpenAI's shape, and nothing is bought."""
    proxy = await start_proxy(openai=upstream, server={"allowed_hosts": ["Proxy.Internal"]})
    async with Talk(proxy.url, _post("a", host=host)) as talk:
        status, headers, content = await talk.response()
    assert status == HOSTS[host]
    if status == 421:
        assert content["error"].keys() == {"message", "type", "param", "code"}
        assert content["error"]["code"] == "host_not_allowed"
        assert "server.allowed_hosts" in content["error"]["message"]
        assert headers["x-should-retry"] == "false"
    assert len(upstream.inputs) == (status == 200)


async def test_a_foreign_host_is_refused_on_every_route(start_proxy, upstream):
    """Pages, preflights and other routes are refused too; probes are answered."""
    proxy = await start_proxy(openai=upstream, server={"cors": "*"})
    place = proxy.url.removesuffix("/v1")
    headers = {"Host": "evil.example", "Origin": "http://evil.example"}
    for method, path in ROUTES:
        sent = {**headers, "Access-Control-Request-Method": "POST"}
        async with proxy.http.request(method, place + path, headers=sent) as response:
            assert await _told(response) == (421, "host_not_allowed"), path
    async with proxy.http.get(f"{place}/livez", headers=headers) as response:
        assert response.status == 200


async def test_the_fast_path_serves_no_page_either(start_proxy, upstream, repeated, at_once):
    """A head that differs in `Origin` or `Host` from one that was served is checked anew."""
    proxy = await start_proxy(openai=upstream)
    async with Talk(proxy.url, _post("a")) as talk:
        assert (await talk.response())[0] == 200
        for text in ("a", "b", "a"):
            await talk.send(_post(text))
            assert (await talk.response())[0] == 200
        given = len(repeated) + len(at_once)
        assert given
        for request, status in (
            (_post("a", "Origin: https://evil.example"), 403),
            (_post("a", "Sec-Fetch-Site: cross-site"), 403),
            (_post("a", host="evil.example"), 421),
        ):
            for _ in range(2):
                await talk.send(request)
                assert (await talk.response())[0] == status
    assert len(repeated) + len(at_once) == given
    assert upstream.inputs == ["a", "b"]


async def test_no_websocket_is_opened_for_a_page(start_proxy):
    """Browsers ask nobody before they open one."""
    async with AnyServer() as other:
        proxy = await start_proxy(openai=other, passthrough="openai")
        with pytest.raises(aiohttp.WSServerHandshakeError) as caught:
            await proxy.http.ws_connect(f"{proxy.url}/realtime", origin="https://evil.example")
        assert caught.value.status == 403
        assert other.seen == []


@pytest.mark.parametrize("path", ["/metrics", "/%6detrics"])
@pytest.mark.parametrize("method", ["GET", "HEAD"])
async def test_metrics_are_for_admins(path, method, start_proxy):
    """With keys, only one with `admin: true` reads them."""
    proxy = await start_proxy(server={"keys": KEYS})
    place = proxy.url.removesuffix("/v1")
    for key, status in (("boss", 200), ("plain", 403), ("", 401)):
        sent = {"Authorization": f"Bearer {key}"} if key else {}
        async with proxy.http.request(method, place + path, headers=sent) as response:
            assert response.status == status
            if key == "plain" and method == "GET":
                assert await _told(response) == (403, "insufficient_permissions")


@pytest.mark.parametrize("path", ["/status", "/st%61tus"])
async def test_the_status_of_everybody_is_for_admins(path, start_proxy):
    """With keys, other clients are told what is their own."""
    proxy = await start_proxy(server={"keys": KEYS})
    place = proxy.url.removesuffix("/v1")
    for key, status, is_all in (("boss", 200, True), ("plain", 200, False), ("", 401, False)):
        sent = {"Authorization": f"Bearer {key}"} if key else {}
        async with proxy.http.get(place + path, headers=sent) as response:
            assert response.status == status
            assert ("providers" in await response.json()) == is_all


async def test_without_keys_everybody_here_reads_metrics(start_proxy):
    """Only a proxy on loopback has no keys."""
    proxy = await start_proxy()
    for path in ("/metrics", "/status"):
        async with proxy.http.get(proxy.url.removesuffix("/v1") + path) as response:
            assert response.status == 200


@pytest.mark.parametrize("name", ["https://a.example", "a.example:80", "*", "", "a/b"])
def test_an_allowed_host_is_a_name_alone(name):
    """What could never match is refused when the configuration is read."""
    with pytest.raises(ValidationError, match="without scheme and port"):
        Settings.model_validate({"server": {"allowed_hosts": [name]}})
