"""A proxy whose base URL leads back to it: found at the start, in `check`, and by its requests."""

import asyncio
import re
import socket
from pathlib import Path

import aiohttp
import pytest
import yaml
from aiohttp import web
from any_server import AnyServer
from embedding_proxy.providers.upstream import hops
from embedding_proxy.proxy.config.schema import Settings
from embedding_proxy.proxy.http.loop_guard import installation_id
from http_proxy import Relay

GOOD = {"model": "text-embedding-3-small", "input": "a"}
SECONDS = 60


def lead(relay, proxy):
    """Let a relay lead to a proxy."""
    relay.to = int(proxy.url.removesuffix("/v1").rpartition(":")[2])


@pytest.fixture
async def relay():
    async with Relay() as relay:
        yield relay


@pytest.fixture
async def other_relay():
    async with Relay() as relay:
        yield relay


@pytest.fixture
def start(start_proxy, tmp_path):
    """Give a function that starts a proxy before one address, with a cache of its own."""
    started = 0

    async def start(upstream, **sections):
        nonlocal started
        started += 1
        sections = {"passthrough": "openai", **sections}
        return await start_proxy(
            openai=upstream, cache={"directory": str(tmp_path / f"cache-{started}")}, **sections
        )

    return start


async def looped(response, says):
    """Check that a reply says that there is a loop, and that no client asks again."""
    error = (await response.json())["error"]
    assert (response.status, error["code"], error["type"]) == (508, "loop_detected", "server_error")
    assert says in error["message"]
    assert response.headers["x-should-retry"] == "false"
    assert "Retry-After" not in response.headers


async def test_embeddings_of_ones_own_are_refused(relay, start):
    """The proxy asks itself once; the client is told which key to set."""
    proxy = await start(relay)
    lead(relay, proxy)
    async with asyncio.timeout(SECONDS):
        for text in "abcdefgh":
            response = await proxy.post({**GOOD, "input": text})
            await looped(response, "set providers.openai.base_url to the upstream's own address")
    health = proxy.service.upstreams.of("openai")
    assert health.attempts == 8
    assert health.failures == {"loop_detected": 8}
    assert relay.connections <= 8


async def test_another_route_answers_in_its_place(relay, start_proxy, second):
    """A route that leads back is one that failed: the next one is asked."""
    proxy = await start_proxy(openai=relay, openrouter=second)
    lead(relay, proxy)
    assert (await proxy.post(GOOD)).headers["x-embedding-provider"] == "openrouter"
    assert len(second.calls) == 1


async def test_other_calls_of_ones_own_are_refused(relay, start):
    """What is passed through comes back once, and the list of models is there without theirs."""
    proxy = await start(relay)
    lead(relay, proxy)
    async with asyncio.timeout(SECONDS):
        async with proxy.http.post(f"{proxy.url}/chat/completions", json={}) as response:
            await looped(response, "Set providers.openai.base_url to the upstream's own address.")
        async with proxy.http.get(f"{proxy.url}/models") as response:
            assert response.status == 200
        async with proxy.http.get(
            f"{proxy.url}/realtime", headers=_upgrade(), timeout=aiohttp.ClientTimeout(SECONDS)
        ) as response:
            assert response.status == 508
            assert response.headers["x-should-retry"] == "false"
    assert relay.connections <= 3


def _upgrade():
    """Return the headers that ask for a WebSocket."""
    return {
        "Upgrade": "websocket",
        "Connection": "Upgrade",
        "Sec-WebSocket-Version": "13",
        "Sec-WebSocket-Key": "dGhlIHNhbXBsZSBub25jZQ==",
    }


@pytest.mark.parametrize("path", ["embeddings", "chat/completions"])
async def test_a_circle_of_two_is_found(path, relay, other_relay, start):
    """One asks the other, which asks the first: that one knows its own request."""
    first = await start(relay)
    second = await start(other_relay)
    lead(relay, second)
    lead(other_relay, first)
    async with asyncio.timeout(SECONDS), first.http.post(f"{first.url}/{path}", json=GOOD) as reply:
        await looped(reply, "")
    assert (relay.connections, other_relay.connections) == (1, 1)


async def test_proxies_behind_one_another_are_no_loop(relay, start):
    """A local proxy before the team's: embeddings, other calls and WebSockets arrive."""

    async def act(request: web.Request) -> web.StreamResponse:
        if "Upgrade" not in request.headers:
            return web.Response(body=await request.read())
        socket = web.WebSocketResponse()
        await socket.prepare(request)
        await socket.send_str("there")
        await socket.close()
        return socket

    async with AnyServer(act) as upstream:
        team = await start(upstream)
        lead(relay, team)
        local = await start(relay)
        async with local.http.post(f"{local.url}/chat/completions", data=b"sent") as response:
            assert await response.read() == b"sent"
        async with local.http.ws_connect(f"{local.url}/realtime") as socket:
            assert await socket.receive_str() == "there"
        ids = [call.headers[hops.HEADER].split(", ") for call in upstream.seen]
        assert [len(set(one)) for one in ids] == [2, 2]


async def test_embeddings_pass_through_two_proxies(relay, start, upstream):
    """What the team's proxy has is a hit there; each call names both."""
    team = await start(upstream)
    lead(relay, team)
    local = await start(relay)
    assert (await local.post(GOOD)).status == 200
    assert (await team.post(GOOD)).headers["x-cache"] == "hit"
    (call,) = upstream.calls
    assert len(set(call.headers[hops.HEADER].split(", "))) == 2


@pytest.mark.parametrize("path", ["embeddings", "chat/completions"])
@pytest.mark.parametrize(("passed", "status"), [(hops.MAX_HOPS - 1, 200), (hops.MAX_HOPS, 508)])
async def test_a_chain_has_an_end(passed, status, path, start, upstream):
    """A loop in which no id repeats ends after a few proxies."""
    proxy = await start(upstream)
    headers = {hops.HEADER: ",".join(f"made-up-{i}" for i in range(passed))}
    async with proxy.http.post(f"{proxy.url}/{path}", json=GOOD, headers=headers) as response:
        assert response.status == status
        if status == 508:
            await looped(response, "has passed 5 proxies already")
    assert len(upstream.calls) == (status == 200)


async def test_each_request_has_a_chain_of_its_own(start, upstream):
    """The next request on the same connection tells nothing of the one before."""
    proxy = await start(upstream)
    await proxy.post(GOOD, **{hops.HEADER: "made-up"})
    await proxy.post({**GOOD, "input": "b"})
    first, second = (call.headers[hops.HEADER].split(", ") for call in upstream.calls)
    assert first == ["made-up", *second]
    assert len(second) == 1


def test_an_id_is_that_of_an_installation():
    """Workers have the settings of their parent, and its id; other settings have another."""
    one, other = (Settings.model_validate({"server": {"port": port}}) for port in (1, 2))
    again = Settings.model_validate({"server": {"port": 1}})
    assert installation_id(one) == installation_id(again) != installation_id(other)


# The address itself


@pytest.mark.parametrize("name", ["check", "serve"])
@pytest.mark.parametrize(
    ("base_url", "server"),
    [
        ("http://127.0.0.1:8080/v1", {}),
        ("http://localhost:8080/v1", {}),
        ("http://LOCALHOST:8080", {}),
        ("http://0.0.0.0:8080/v1", {}),
        ("https://127.0.0.1:8080/v1", {}),
        ("http://127.0.0.1:9000/v1", {"port": 9000}),
        ("http://127.0.0.1:9000/v1", {"port": 9000, "host": "localhost"}),
        ("http://[::1]:9000/v1", {"port": 9000, "host": "::1"}),
        ("http://[::1]:9000/v1", {"port": 9000, "host": "::", "keys": ["k"]}),
        ("http://127.9.9.9:9000/v1", {"port": 9000, "host": "0.0.0.0", "keys": ["k"]}),
        ("http://this-machine.example:9000/v1", {"port": 9000, "host": "0.0.0.0", "keys": ["k"]}),
        ("http://127.0.0.1/v1", {"port": 80}),
    ],
)
def test_its_own_address_is_a_configuration_error(  # noqa: PLR0917
    name, base_url, server, command, tmp_path, monkeypatch
):
    """Whatever it is called: the file, the key and the remedy are said, and nothing is opened."""
    _resolve(monkeypatch)
    done = command(name, "--config", _written(tmp_path, base_url, server))
    assert (done.code, done.out) == (2, "")
    place = rf"{tmp_path}/config\.yaml:\d+: providers\.mine\.base_url: is the address that"
    assert re.search(place, done.err)
    assert "set the upstream's own address, or another server.port" in done.err
    assert done.err.count("\n") == 1


@pytest.mark.parametrize(
    ("base_url", "server"),
    [
        ("http://127.0.0.1:8081/v1", {}),
        ("http://[::1]:8080/v1", {}),
        ("http://192.0.2.1:8080/v1", {"host": "0.0.0.0", "keys": ["k"]}),
        ("http://elsewhere.example:8080/v1", {}),
        ("http://nowhere.example:8080/v1", {}),
        ("http://127.0.0.1:9000/v1", {"port": 0}),
    ],
)
def test_another_address_is_none(base_url, server, command, tmp_path, monkeypatch):
    """Another port, another machine, or a name that there is not."""
    _resolve(monkeypatch)
    done = command("check", "--offline", "--config", _written(tmp_path, base_url, server))
    assert (done.code, done.err) == (0, "")


def _resolve(monkeypatch):
    """Resolve a few names, and no others."""
    known = {"this-machine.example": "127.0.0.1", "elsewhere.example": "192.0.2.1"}

    def look_up(host, *_, **__):
        if host not in known:
            raise socket.gaierror(socket.EAI_NONAME, "made up")
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (known[host], 0))]

    monkeypatch.setattr("embedding_proxy.proxy.cli.startup.socket.getaddrinfo", look_up)


def _written(tmp_path, base_url, server) -> Path:
    file = tmp_path / "config.yaml"
    provider = {"kind": "openai_compatible", "base_url": base_url}
    cache = {"directory": str(tmp_path / "cache")}
    model = {"space": "m", "dimensions": 8, "routes": [{"provider": "mine", "model": "m"}]}
    sections = {"server": server, "providers": {"mine": provider}, "cache": cache}
    file.write_text(yaml.safe_dump({**sections, "models": {"m": model}}))
    return file
