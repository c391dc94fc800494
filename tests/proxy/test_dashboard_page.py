"""The dashboard in a real browser: its figures, charts and keys, and who gets nothing of it."""

import asyncio
import base64
import json
import random
from collections.abc import AsyncIterator

import browser
import pytest
from aiohttp import web
from any_server import AnyServer
from browser import Browser
from embedding_proxy.proxy.cli import formatting
from embedding_proxy.proxy.http.dashboard.session import COOKIE
from yarl import URL

pytestmark = pytest.mark.skipif(
    browser.PATH is None, reason="there is no Chromium: apt-get install chromium-headless-shell"
)

MODEL = "text-embedding-3-small"
KEYS = [{"key": "ours", "name": "ops", "admin": True}]
SECONDS = 180


@pytest.fixture
async def chromium() -> AsyncIterator[Browser]:
    """Give a browser."""
    async with Browser() as one:
        yield one


def _origin(proxy, host="127.0.0.1"):
    return str(URL(proxy.url).with_host(host).origin())


async def _text(page, name):
    return await page.run(f"document.getElementById({json.dumps(name)}).textContent")


async def _opened(chromium, proxy, path="/dashboard"):
    page = await chromium.open("about:blank")
    await page.watch()
    await page.go(_origin(proxy) + path)
    return page


async def _shown(page, name):
    await page.until(f"!document.getElementById({json.dumps(name)}).hidden")


async def test_a_first_start_becomes_figures(chromium, start_proxy, upstream):
    """It says how to begin; then the figures are those of /status, and nothing else is loaded."""
    proxy = await start_proxy(openai=upstream)
    async with asyncio.timeout(SECONDS):
        page = await _opened(chromium, proxy, "/")
        await _shown(page, "start")
        assert f"OPENAI_BASE_URL={proxy.url}" in await _text(page, "code-env")
        hidden = await page.run(
            "['hero', 'tiles', 'history', 'models', 'clients', 'providers', 'budgets', 'index',"
            " 'warnings', 'login', 'logout', 'timeline']"
            ".filter((id) => document.getElementById(id).checkVisibility())"
        )
        assert hidden == []
        for text in ("one text", "one text", "another"):
            assert (await proxy.post({"model": MODEL, "input": text})).status == 200
        await _shown(page, "hero")
        saved = "document.getElementById('ever-tokens').textContent"
        await page.until(f"{saved} !== '0 tokens saved'")
        async with proxy.http.get(proxy.url.replace("/v1", "/status")) as response:
            ever = (await response.json())["since_ever"]
        for name in ("today", "month", "ever"):
            assert await _text(page, f"{name}-usd") == formatting.money(ever["usd_saved"])
            assert await _text(page, f"{name}-tokens") == f"{ever['tokens_saved']:,} tokens saved"
            assert await _text(page, f"{name}-rate") == "33.3% hit rate"
        assert await _text(page, "hero-figure") == formatting.money(ever["usd_saved"])
        assert MODEL in await _text(page, "models")
        # One client, without a name: there is nothing to tell apart.
        assert await page.run("document.getElementById('clients').hidden")
        label = "document.getElementById('rate-chart').getAttribute('aria-label')"
        before = await page.run(label)
        for number in range(20):
            assert (await proxy.post({"model": MODEL, "input": f"{number}"})).status == 200
        await page.until(f"{label} !== {json.dumps(before)}")
    assert page.complaints == []
    assert {str(URL(one).origin()) for one in page.requested} == {_origin(proxy)}


async def test_the_keyboard_logs_in_reads_charts_and_logs_out(chromium, start_proxy, upstream):
    """Every control is reached by Tab; arrows read the chart; the log-out ends the session."""
    proxy = await start_proxy(openai=upstream, server={"keys": KEYS})
    admin = {"Authorization": "Bearer ours"}
    for _ in range(2):
        assert (await proxy.post({"model": MODEL, "input": "a"}, **admin)).status == 200
    async with asyncio.timeout(SECONDS):
        page = await _opened(chromium, proxy)
        await _shown(page, "login")
        await page.call("Input.insertText", text="wrong")
        await page.press("Enter", "\r")
        await page.until("document.getElementById('login-error').textContent")
        assert await page.run("document.getElementById('board').hidden")
        assert "$" not in await page.run("document.body.innerText")
        await page.call("Input.insertText", text="ours")
        await page.press("Enter", "\r")
        await _shown(page, "board")
        assert await page.run("document.cookie") == ""
        await page.go(_origin(proxy) + "/dashboard")
        await _shown(page, "board")
        focused = "document.activeElement.id || document.activeElement.name"
        seen = []
        while "latency-chart" not in seen:
            await page.press("Tab")
            seen.append(await page.run(focused))
            assert len(seen) < 30
        wanted = ["logout", "span", "what", "history-chart", "csv", "png", "rate-chart"]
        assert [one for one in seen if one in wanted] == wanted
        await page.run("document.getElementById('history-chart').focus()")
        legend = "document.getElementById('history-legend').textContent"
        whole = await page.run(legend)
        await page.press("ArrowLeft")
        latest = await page.until(f"{legend} !== {json.dumps(whole)} && {legend}")
        await page.press("ArrowLeft")
        await page.until(f"{legend} !== {json.dumps(latest)}")
        await page.run("document.getElementById('logout').click()")
        await _shown(page, "login")
        cookies = await page.call("Network.getCookies")
        assert cookies["cookies"] == []
    # The 401 of the look before the log-in is in Chromium's log, and no more than that.
    assert [one for one in page.complaints if "401" not in one] == []


async def test_exports(chromium, start_proxy, upstream):
    """CSV holds what the chart shows; PNG is a picture."""
    proxy = await start_proxy(openai=upstream)
    for _ in range(2):
        assert (await proxy.post({"model": MODEL, "input": "a"})).status == 200
    async with asyncio.timeout(SECONDS):
        page = await _opened(chromium, proxy)
        await _shown(page, "history")
        csv = await page.run("fetch(document.getElementById('csv').href).then((r) => r.text())")
        assert csv.startswith("day,hits,")
        await page.run("document.querySelector('input[value=day]').click()")
        await page.until("document.getElementById('csv').href.includes('span=day')")
        csv = await page.run("fetch(document.getElementById('csv').href).then((r) => r.text())")
        assert csv.startswith("hour,hits,")
        await page.run(
            "window.made = null; const url = URL.createObjectURL;"
            "URL.createObjectURL = (blob) => { window.made = blob; return url.call(URL, blob); };"
            "document.getElementById('png').click()"
        )
        read = (
            "new Promise((done) => { const reader = new FileReader();"
            " reader.onload = () => done(reader.result); reader.readAsDataURL(window.made); })"
        )
        await page.until("window.made !== null")
        kind, _, content = (await page.run(read)).partition(",")
        assert kind == "data:image/png;base64"
        picture = base64.b64decode(content)
        assert picture.startswith(b"\x89PNG")
        assert len(picture) > 5000
    assert page.complaints == []


async def test_numbers_are_those_of_the_command_line(chromium, start_proxy):
    """Money, shares, sizes and ages, of many magnitudes and at ties."""
    proxy = await start_proxy()
    chance = random.Random(3)
    money = [0, 0.125, 0.375, 2.675, 1.005, 0.001, 0.01, 0.1, 0.0149, 1234.5, 1e6, -3.5, 1e-9]
    money += [chance.uniform(1, 10) * 10.0**power for power in range(-9, 9) for _ in range(20)]
    whole = [(1, 3), (9_999_999, 10_000_000), (0, 0), (1, 16), (3, 16), (1, 10**6), (5, 5)]
    sizes = [0, 999, 1000, 6_184_000, 1_250_000, 10**13]
    async with asyncio.timeout(SECONDS):
        page = await _opened(chromium, proxy)
        source = await page.run("fetch('dashboard/static/dashboard.js').then((r) => r.text())")
        numbers = source[source.index("/* Like toFixed") : source.index("function compact")]
        told = await page.run(
            f"(() => {{ const HOUR = 3600, DAY = 86400; {numbers};"
            f"return [{json.dumps(money)}.map(money),"
            f" {json.dumps(whole)}.map(([a, b]) => share(a, b)), {json.dumps(sizes)}.map(size)];"
            "})()"
        )
    assert told[0] == [formatting.money(usd) for usd in money]
    assert told[1] == [formatting.share(*pair) for pair in whole]
    assert told[2] == [formatting.size(one) for one in sizes]


ATTACK = """
(async () => {
    const target = TARGET + '/dashboard';
    const told = {};
    const tried = async (name, promise) => {
        told[name] = await promise.then((value) => String(value), (error) => error.name);
    };
    const read = (reply) => reply.type === 'opaque' ? 'opaque' : reply.text();
    for (const path of ['', '/state', '/history', '/history.csv', '/events']) {
        for (const mode of ['cors', 'no-cors']) {
            const given = {mode, credentials: 'include'};
            await tried(`${mode} ${path}`, fetch(target + path, given).then(read));
        }
    }
    const given = {method: 'POST', mode: 'no-cors', credentials: 'include'};
    given.body = JSON.stringify({key: 'ours'});
    await tried('login', fetch(target + '/login', given).then(read));
    await tried('events', new Promise((done) => {
        const source = new EventSource(target + '/events', {withCredentials: true});
        source.onopen = () => done('open');
        source.onerror = () => { source.close(); done('error'); };
    }));
    await tried('frame', new Promise((done) => {
        const frame = document.createElement('iframe');
        frame.onload = () => {
            let shown = 'unreadable';
            try { shown = frame.contentDocument.body.innerText; } catch {}
            done(shown);
        };
        frame.src = target;
        document.body.append(frame);
    }));
    return told;
})()
"""


@pytest.mark.parametrize("keys", [[], KEYS], ids=["open", "keys"])
async def test_a_foreign_page_gets_nothing(keys, chromium, start_proxy, upstream):
    """Though its user is logged in, and `server.cors` lets every page call."""
    proxy = await start_proxy(openai=upstream, server={"keys": keys, "cors": ["*"]})

    async def page_of_another(_: web.Request) -> web.Response:
        return web.Response(text="<!doctype html><body></body>", content_type="text/html")

    async with AnyServer(page_of_another) as server, asyncio.timeout(SECONDS):
        own = await _opened(chromium, proxy)
        if keys:
            await _shown(own, "login")
            await own.call("Input.insertText", text="ours")
            await own.press("Enter", "\r")
        await _shown(own, "board")
        for host in ("evil.example", "localhost"):
            page = await chromium.open(str(URL(server.url).with_host(host).origin()) + "/")
            target = json.dumps(_origin(proxy))
            told = await page.run(ATTACK.replace("TARGET", target))
            assert len(told) == 13
            for name, what in told.items():
                shown = (name, what)
                if name == "events":
                    assert what == "error", shown
                elif name == "frame":
                    assert what in {"unreadable", ""}, shown
                else:
                    # `server.cors` lets the page read that it is refused.
                    refusal = "origin_not_allowed" in what
                    assert refusal or what in {"opaque", "TypeError"}, shown
                assert "usd" not in what
        # The page itself in a frame of its own origin is nothing either.
        framed = await own.run(
            "new Promise((done) => { const frame = document.createElement('iframe');"
            " frame.onload = () => { let text = 'unreadable';"
            " try { text = frame.contentDocument.body.innerText; } catch {} done(text); };"
            " frame.src = '/dashboard'; document.body.append(frame); })"
        )
        assert "Saved" not in framed


async def test_a_wrong_cookie_gets_the_form(chromium, start_proxy):
    """A page with a cookie that was signed elsewhere shows no figure."""
    proxy = await start_proxy(server={"keys": KEYS})
    async with asyncio.timeout(SECONDS):
        page = await chromium.open("about:blank")
        url = _origin(proxy) + "/dashboard"
        await page.call("Network.setCookie", name=COOKIE, value="ab" * 56, url=url)
        await page.go(url)
        await _shown(page, "login")
        assert "Saved" not in await page.run("document.body.innerText")
