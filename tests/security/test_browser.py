"""A real browser on foreign pages, at an open proxy: nothing is bought, indexed or read."""

import asyncio
import json
from collections.abc import AsyncIterator

import browser
import pytest
from aiohttp import web
from any_server import AnyServer
from browser import Browser, Page
from conftest import Proxy
from pages import ROOT
from qdrant_server import QdrantServer
from yarl import URL

pytestmark = pytest.mark.skipif(
    browser.PATH is None, reason="there is no Chromium: apt-get install chromium-headless-shell"
)

MODEL = "text-embedding-3-small"
SECONDS = 60
KNOWN = "a text that is cached"
ATTACKS = (ROOT / "tests" / "data" / "page_attacks.js").read_text(encoding="utf-8")
UNREADABLE = {"opaque", "error", "load", "true", "TypeError: Failed to fetch"}
"""What a page hears that learns nothing; an image, a script and a frame may have been loaded."""
LOADING = {"image", "script", "style", "prefetch"}
"""Whose `load` would mean that something was served."""


@pytest.fixture
async def chromium() -> AsyncIterator[Browser]:
    """Give a browser."""
    async with Browser() as one:
        yield one


@pytest.fixture
async def pages() -> AsyncIterator[AnyServer]:
    """Give a server of empty pages."""

    async def page(_: web.Request) -> web.Response:
        return web.Response(text="<!doctype html><body></body>", content_type="text/html")

    async with AnyServer(page) as server:
        yield server


@pytest.fixture
async def qdrant() -> AsyncIterator[QdrantServer]:
    """Give the vector store that an open proxy writes to."""
    async with QdrantServer() as server:
        yield server


@pytest.fixture
async def opened(start_proxy, upstream, other, qdrant) -> AsyncIterator[Proxy]:
    """Give an open proxy, a text in its cache; in the end nothing has been asked of it."""
    proxy = await start_proxy(openai=upstream)
    assert (await proxy.post({"model": MODEL, "input": KNOWN})).status == 200
    await start_proxy.stop()
    index = {"qdrant": {"url": qdrant.url}}
    proxy = await start_proxy(other, passthrough="openai", index=index)
    yield proxy
    await start_proxy.stop()
    assert other.seen == []
    assert proxy.service.counted == {}
    assert qdrant.upserts == 0


def _at(url: str, host: str) -> str:
    """Return the origin of a server under another host name."""
    return str(URL(url).with_host(host).origin())


async def _tried(page: Page, target: str) -> dict[str, str]:
    """Try every attack, and return what the page could read by each."""
    names = {"TARGET": target, "MODEL": MODEL, "KNOWN": KNOWN, "NAME": "of a page "}
    given = "".join(f"const {name} = {json.dumps(value)};\n" for name, value in names.items())
    return await page.run(f"(async () => {{\n{given}{ATTACKS}\n}})()")


def _readable(told: dict[str, str]) -> dict[str, str]:
    """Return what a page could read, or was served."""
    return {
        name: what
        for name, what in told.items()
        if what not in UNREADABLE or (name in LOADING and what == "load")
    }


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
async def test_a_page_of_another_machine(host, chromium, pages, opened):
    """Whatever it tries: no call upstream, no hit, no point, and it reads nothing."""
    async with asyncio.timeout(SECONDS):
        page = await chromium.open(_at(pages.url, "evil.example") + "/")
        told = await _tried(page, _at(opened.url, host))
    assert len(told) == 23
    assert _readable(told) == {}


async def test_the_attacks_reach_who_does_not_check(chromium, pages, other):
    """Else the other tests would show nothing: a server that serves everybody hears of each."""
    other.act = _open_to_all
    async with asyncio.timeout(SECONDS):
        page = await chromium.open(_at(pages.url, "evil.example") + "/")
        told = await _tried(page, _at(other.url, "127.0.0.1"))
    posts = [one for one in other.seen if (one.method, one.target) == ("POST", "/v1/embeddings")]
    assert len(posts) == 10
    assert {"null", _at(pages.url, "evil.example")} == {one.headers["Origin"] for one in posts}
    assert {one.target for one in other.seen} >= {
        *("/metrics", "/status", "/v1/models", "/v1/assistants", "/v1/threads", "/v1/realtime"),
        *("/v1/chat/completions", "/v1/files", "/v1/responses", "/v1/responses/stream"),
    }
    assert told["websocket"] == "open"


async def _open_to_all(request: web.Request) -> web.StreamResponse:
    if "Upgrade" in request.headers:
        sink = web.WebSocketResponse()
        await sink.prepare(request)
        return sink
    return web.Response(text="{}", content_type="text/html")


async def test_a_page_whose_name_is_rebound_to_this_machine(chromium, opened):
    """For the browser page and proxy are one origin; the proxy does not go by that name."""
    place = _at(opened.url, "evil.example")
    async with asyncio.timeout(SECONDS):
        page = await chromium.open(f"{place}/livez")
        told = await _tried(page, place)
    read = {name: what.removeprefix("read: ") for name, what in _readable(told).items()}
    assert len(read) >= 5
    assert {json.loads(what)["error"]["code"] for what in read.values()} == {"host_not_allowed"}


async def test_a_form_that_leads_the_whole_window_to_the_proxy(chromium, pages, opened):
    """A navigation is refused as well, and shows the refusal."""
    action = _at(opened.url, "127.0.0.1") + "/v1/embeddings"
    name = json.dumps({"model": MODEL, "input": "a"})[:-1] + ', "user": "'
    async with asyncio.timeout(SECONDS):
        page = await chromium.open(_at(pages.url, "evil.example") + "/")
        form = {"enctype": "text/plain", "method": "post", "action": action}
        field = {"name": name, "value": '"}'}
        await page.run(
            f"const form = Object.assign(document.createElement('form'), {json.dumps(form)});"
            f"form.append(Object.assign(document.createElement('input'), {json.dumps(field)}));"
            "document.body.append(form); form.submit();"
        )
        await page.arrived(action)
        assert "origin_not_allowed" in await page.run("document.body.innerText")


READ = """
fetch(%s, {method: 'POST', headers: %s, body: %s})
    .then(async (reply) => [reply.status, reply.headers.get('x-cache'), (await reply.json()).model])
    .catch(String)
"""


def _read(proxy, text: str, **headers: str) -> str:
    body = json.dumps({"model": MODEL, "input": text})
    url = f"{_at(proxy.url, '127.0.0.1')}/v1/embeddings"
    return READ % tuple(map(json.dumps, (url, headers, body)))


@pytest.mark.parametrize("keys", [[], ["ours"]], ids=["open", "keys"])
async def test_a_page_that_is_configured(keys, chromium, pages, start_proxy, upstream):
    """A page of an origin in `server.cors` calls and reads, preflight and headers included."""
    origin = _at(pages.url, "app.example")
    proxy = await start_proxy(openai=upstream, server={"cors": [origin], "keys": keys})
    json_type = {"Content-Type": "application/json", "Authorization": "Bearer ours"}
    async with asyncio.timeout(SECONDS):
        page = await chromium.open(f"{origin}/")
        for found in ("miss", "hit"):
            assert await page.run(_read(proxy, "a", **json_type)) == [200, found, MODEL]
        elsewhere = await chromium.open(_at(pages.url, "evil.example") + "/")
        assert await elsewhere.run(_read(proxy, "b", **json_type)) == "TypeError: Failed to fetch"
    assert upstream.inputs == ["a"]


async def test_a_page_of_this_machine(chromium, pages, start_proxy, upstream):
    """It may call; it reads the reply only where `server.cors` names it."""
    proxy = await start_proxy(openai=upstream)
    async with asyncio.timeout(SECONDS):
        page = await chromium.open(_at(pages.url, "localhost") + "/")
        assert await page.run(_read(proxy, "a")) == "TypeError: Failed to fetch"
    assert upstream.inputs == ["a"]
