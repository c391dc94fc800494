"""The dashboard's routes: what they tell, to whom, and that nothing is done while nobody looks."""

import asyncio
import json
import re
import signal
import time
from datetime import UTC, datetime

import aiohttp
import pytest
from embedding_proxy.cache import ledger
from embedding_proxy.providers.charge import NANO, SpendingLimit
from embedding_proxy.proxy.config.keys_file import KeysFile, StoredKey, digest, new_key
from embedding_proxy.proxy.config.schema import Settings
from embedding_proxy.proxy.http import dashboard_figures
from embedding_proxy.proxy.http.app import DASHBOARD, METRICS, REQUESTS
from embedding_proxy.proxy.http.dashboard import samples
from embedding_proxy.proxy.http.dashboard.session import COOKIE
from embedding_proxy.proxy.http.process import Instance, base_url, listen
from embedding_proxy.proxy.http.status import READINESS
from fault_server import status
from own_process import own_process
from qdrant_server import QdrantServer
from yarl import URL

MODEL = "text-embedding-3-small"
KEYS = [
    {"key": "ours", "name": "ops", "admin": True},
    {"key": "theirs", "name": "search"},
]
DATA = ("state", "history", "history.csv", "events")
SECONDS = 120
NOW = datetime(2026, 11, 30, 12, tzinfo=UTC)


def _place(proxy, path=""):
    return proxy.url.removesuffix("/v1") + "/dashboard" + path


async def _get(proxy, path="", **headers):
    async with proxy.http.get(_place(proxy, path), headers=headers) as response:
        return response, await response.read()


async def _state(proxy, **headers):
    response, body = await _get(proxy, "/state", **headers)
    assert response.status == 200
    return json.loads(body)


async def _log_in(proxy, key="ours", **headers):
    """Log in; return the reply, and the cookie as it was set."""
    url = _place(proxy, "/login")
    async with proxy.http.post(url, json={"key": key}, headers=headers) as response:
        await response.read()
        proxy.http.cookie_jar.clear()
        return response, response.headers.get("Set-Cookie", "")


class Events:
    """The events of one viewer."""

    def __init__(self, response):
        self._response = response

    async def next(self, name):
        """Return what the next event of a name holds; None at the end."""
        async with asyncio.timeout(SECONDS):
            while line := await self._response.content.readline():
                if line == f"event: {name}\n".encode():
                    data = await self._response.content.readline()
                    return json.loads(data.removeprefix(b"data: "))
        return None


@pytest.fixture
def _quick(monkeypatch):
    """Sample without rests."""
    monkeypatch.setattr(samples, "TICK_S", 0.01)
    monkeypatch.setattr(samples, "MAX_GAP_S", 1e6)


async def test_browsers_get_the_page_and_programs_what_they_got(start_proxy):
    """At `/` it is by what is accepted; the page needs no key, and holds no figure."""
    proxy = await start_proxy(server={"keys": KEYS})
    root = proxy.url.removesuffix("v1")
    browser = {"Accept": "text/html,application/xhtml+xml,*/*;q=0.8"}
    async with proxy.http.get(root, headers=browser) as response:
        at_root = await response.read()
        assert (response.status, response.content_type) == (200, "text/html")
    response, page = await _get(proxy)
    assert page == at_root
    for accepted in ({}, {"Accept": "*/*"}, {"Accept": "application/json"}):
        async with proxy.http.get(root, headers=accepted) as response:
            assert (await response.json())["name"] == "embedding-proxy"
            assert response.headers["Vary"] == "Accept"


async def test_the_page_is_whole_and_may_load_nothing_else(start_proxy):
    """All that it names is served; no inline script or style, no other address, and no frame."""
    proxy = await start_proxy()
    response, page = await _get(proxy)
    policy = dict(
        part.strip().split(" ", 1)
        for part in response.headers["Content-Security-Policy"].split(";")
    )
    assert policy["frame-ancestors"] == policy["default-src"] == "'none'"
    assert policy["script-src"] == policy["style-src"] == "'self'"
    assert response.headers["X-Frame-Options"] == "DENY"
    text = page.decode()
    named = re.findall(r'(?:src|href)="(dashboard/[^"]+)"', text)
    assert len(named) == 7
    assert not re.search(r"https?:|<style|\sstyle=|\son[a-z]+=|<script>", text)
    for name in named:
        async with proxy.http.get(proxy.url.removesuffix("v1") + name) as response:
            content = await response.text()
            assert response.status == 200
            assert response.headers["X-Content-Type-Options"] == "nosniff"
            assert "@import" not in content
    for name in ("uPlot.LICENSE.txt", "..%2Fsession.py", "nothing"):
        assert (await _get(proxy, f"/static/{name}"))[0].status == 404


async def test_figures_are_those_of_the_status(start_proxy, upstream, monkeypatch):
    """Today, this month and ever; by model; and a part that has nothing to tell is null."""
    monkeypatch.setattr(dashboard_figures, "SHARE", 0)
    monkeypatch.setitem(dashboard_figures.MIN_REST_S, "store", 0)
    monkeypatch.setitem(dashboard_figures.MIN_REST_S, "age", 0)
    proxy = await start_proxy(openai=upstream)
    first = await _state(proxy)
    assert first["saved"]["ever"]["hits"] == 0
    assert first["saved"]["since"] is None
    for text in ("a", "a", "b", "a"):
        assert (await proxy.post({"model": MODEL, "input": text})).status == 200
    state = await _state(proxy)
    async with proxy.http.get(proxy.url.replace("/v1", "/status")) as response:
        ever = (await response.json())["since_ever"]
    models = ever.pop("models")
    ever.pop("clients")
    assert state["saved"]["ever"] == state["saved"]["today"] == state["saved"]["month"] == ever
    assert ever["hits"] == 2
    assert {line["name"]: line["ever"] for line in state["models"]} == models
    assert [one["name"] for one in state["providers"]] == ["openai"]
    assert state["providers"][0]["attempts"] == 2
    assert state["store"]["entries"] == 2
    assert abs(state["store"]["oldest"] - time.time()) < 3600
    assert state["index"] is state["failovers"] is None
    assert state["budgets"] == state["warnings"] == []


async def test_an_outbox_and_failovers_are_told_where_there_are_any(start_proxy, upstream, second):
    """What waits for Qdrant, and a call that failed over."""
    upstream.always = status(500)
    async with QdrantServer() as qdrant:
        proxy = await start_proxy(
            openai=upstream, openrouter=second, index={"qdrant": {"url": qdrant.url}}
        )
        assert (await proxy.post({"model": MODEL, "input": "a"})).status == 200
        proxy.app[METRICS]._publish()
        proxy.app[METRICS].failovers.flush()
        state = await _state(proxy)
    assert state["index"].keys() >= {"backlog_points", "refused_points"}
    told = state["failovers"]
    assert sum(told["failures"]["openai"]) >= 1
    assert sum(told["failovers"][MODEL]) == 1
    names = {one["name"]: one for one in state["providers"]}
    assert names["openai"]["failures"] == {"upstream_error": names["openai"]["attempts"]}


@pytest.mark.parametrize("names", [1000, 1])
async def test_budgets_of_clients(names, start_proxy, upstream, tmp_path, monkeypatch):
    """What each has spent of its own, the nearest to its end first; also where names are summed."""
    monkeypatch.setattr(ledger, "MAX_LEDGER_KEYS", names)
    limits = {"rich": SpendingLimit(NANO), "poor": SpendingLimit(100, "day"), "free": None}
    made = {name: new_key() for name in limits}
    stored = [
        StoredKey(name, digest(made[name]), NOW, limit=limit, is_admin=limit is None)
        for name, limit in limits.items()
    ]
    KeysFile(tmp_path / "cache" / "keys.yaml").change(lambda _: stored)
    proxy = await start_proxy(openai=upstream)
    for name in ("rich", "poor"):
        headers = {"Authorization": f"Bearer {made[name]}"}
        body = {"model": MODEL, "input": f"a text of {name}"}
        assert (await proxy.post(body, **headers)).status == 200
    state = await _state(proxy, Authorization=f"Bearer {made['free']}")
    assert [(one["client"], one["period"], one["usd"]) for one in state["budgets"]] == [
        ("poor", "day", 1e-7),
        ("rich", "ever", 1.0),
    ]
    spent = [one["usd_billed"] for one in state["budgets"]]
    assert all(spent)
    told = {line["name"]: line["ever"]["usd_billed"] for line in state["clients"]}
    if names == 1:
        assert len(told) == 2
        assert sum(told.values()) == pytest.approx(sum(spent))
    else:
        assert told == {"poor": spent[0], "rich": spent[1]}


async def test_history_by_hour_and_by_day(start_proxy, upstream):
    """What was just answered is in the present hour and day, of all, of its model, of no other."""
    proxy = await start_proxy(openai=upstream)
    for _ in range(3):
        await proxy.post({"model": MODEL, "input": "a"})
    for span, unit, seconds, points in (
        ("day", "hour", 3600, 24),
        ("week", "hour", 3600, 168),
        ("month", "day", 86_400, 31),
        ("year", "day", 86_400, 397),
    ):
        _, body = await _get(proxy, f"/history?span={span}")
        told = json.loads(body)
        assert told["unit"] == unit
        assert told["end"] - told["start"] == points - 1
        assert abs(told["end"] * seconds - time.time()) < seconds + 3600
        assert sum(point["hits"] for point in told["points"]) == 2
        _, body = await _get(proxy, f"/history?span={span}&model={MODEL}")
        assert json.loads(body)["points"] == told["points"]
        for other in ("model=other", "client=nobody"):
            _, body = await _get(proxy, f"/history?span={span}&{other}")
            assert json.loads(body)["points"] == []
        response, body = await _get(proxy, f"/history.csv?span={span}")
        names, row, rest = body.decode().split("\r\n")
        assert (response.content_type, rest) == ("text/csv", "")
        fields = dict(zip(names.split(","), row.split(","), strict=True))
        assert (fields["hits"], fields["misses"]) == ("2", "1")
        assert float(fields["usd_saved"]) == told["points"][0]["usd_saved"]
    response, body = await _get(proxy, "/history?span=century")
    assert (response.status, json.loads(body)["error"]["param"]) == (400, "span")


@pytest.mark.parametrize("path", DATA)
async def test_a_key_is_needed_and_an_admins_one(path, start_proxy):
    """Without one 401, with a client's 403; with an admin's, by header or by session, 200."""
    proxy = await start_proxy(server={"keys": KEYS})
    for headers, expected in (
        ({}, 401),
        ({"Authorization": "Bearer wrong"}, 401),
        ({"Cookie": f"{COOKIE}=deadbeef"}, 401),
        ({"Cookie": f"{COOKIE}=" + "0" * 112}, 401),
        ({"Authorization": "Bearer theirs"}, 403),
    ):
        response, body = await _get(proxy, f"/{path}", **headers)
        assert response.status == expected
        assert b"usd" not in body
    _, cookie = await _log_in(proxy)
    for headers in (
        {"Authorization": "Bearer ours"},
        {"Cookie": cookie.partition(";")[0]},
    ):
        async with proxy.http.get(_place(proxy, f"/{path}"), headers=headers) as response:
            assert response.status == 200


async def test_a_session_is_one_of_its_key_and_no_longer(start_proxy):
    """The cookie is for the page alone; a changed one, or that of a key that is gone, is none."""
    proxy = await start_proxy(server={"keys": KEYS})
    for key, expected in (("wrong", 401), ("theirs", 403), ("", 401)):
        response, cookie = await _log_in(proxy, key)
        assert (response.status, cookie) == (expected, "")
    async with proxy.http.post(_place(proxy, "/login"), data=b"[") as response:
        assert response.status == 400
    response, cookie = await _log_in(proxy)
    value, *attributes = cookie.split("; ")
    assert attributes == ["Max-Age=43200", "HttpOnly", "SameSite=Strict"]
    assert "ours" not in value
    assert (await _log_in(proxy, **{"X-Forwarded-Proto": "https"}))[1].endswith("; Secure")
    assert (await _state(proxy, Cookie=value))["has_session"] is True
    for changed in (value[:-1] + "fe"[value[-1] == "f"], value.replace("=", "=00"), value[:-2]):
        assert (await _get(proxy, "/state", Cookie=changed))[0].status == 401
    # It is good for no other route.
    async with proxy.http.get(proxy.url + "/models", headers={"Cookie": value}) as response:
        assert response.status == 401
    async with proxy.http.post(_place(proxy, "/logout")) as response:
        assert response.headers["Set-Cookie"].startswith(f"{COOKIE}=; Max-Age=0; ")
    await start_proxy.stop()
    # The signing key outlives a restart; a key that is an admin's no longer ends its sessions.
    proxy = await start_proxy(server={"keys": KEYS})
    assert (await _get(proxy, "/state", Cookie=value))[0].status == 200
    await start_proxy.stop()
    for keys in ([{**KEYS[0], "admin": False}], [{**KEYS[0], "key": "another"}]):
        proxy = await start_proxy(server={"keys": keys})
        assert (await _get(proxy, "/state", Cookie=value))[0].status == 401
        await start_proxy.stop()


@pytest.mark.parametrize("keys", [[], KEYS], ids=["open", "keys"])
async def test_pages_of_other_origins_get_nothing(keys, start_proxy):
    """Whatever `server.cors` allows them elsewhere; but a link may lead to the page."""
    proxy = await start_proxy(server={"keys": keys, "cors": ["*"]})
    own = str(URL(proxy.url).origin())
    admin = {"Authorization": "Bearer ours"}
    for headers in (
        {"Origin": "https://evil.example"},
        {"Origin": "null"},
        {"Origin": "http://127.0.0.1:1"},
        {"Sec-Fetch-Site": "cross-site"},
        {"Sec-Fetch-Site": "same-site", "Sec-Fetch-Mode": "cors"},
        {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate", "Sec-Fetch-Dest": "iframe"},
        {"Sec-Fetch-Site": "same-origin", "Sec-Fetch-Dest": "iframe"},
    ):
        for path in ("", *(f"/{path}" for path in DATA)):
            response, body = await _get(proxy, path, **admin, **headers)
            assert response.status == 403
            assert json.loads(body)["error"]["code"] == "origin_not_allowed"
        async with proxy.http.post(
            _place(proxy, "/login"), json={"key": "ours"}, headers=headers
        ) as response:
            assert response.status == 403
            assert "Set-Cookie" not in response.headers
    for headers in ({"Origin": own}, {"Sec-Fetch-Site": "same-origin"}, {"Sec-Fetch-Site": "none"}):
        assert (await _get(proxy, "/state", **admin, **headers))[0].status == 200
    link = {
        "Sec-Fetch-Site": "cross-site",
        "Sec-Fetch-Mode": "navigate",
        "Sec-Fetch-Dest": "document",
    }
    assert (await _get(proxy, "", **link))[0].status == 200
    assert (await _get(proxy, "/state", **admin, **link))[0].status == 403


@pytest.mark.usefixtures("_quick")
async def test_events_tell_what_happens_and_nothing_is_done_when_nobody_looks(
    start_proxy, upstream, monkeypatch
):
    """Rates and state as they change, for any number of viewers by one reading; then silence."""
    proxy = await start_proxy(openai=upstream)
    dashboard, metrics = proxy.app[DASHBOARD], proxy.app[METRICS]
    readings = 0
    totals = metrics.totals

    async def counted():
        nonlocal readings
        readings += 1
        return await totals()

    monkeypatch.setattr(metrics, "totals", counted)
    await proxy.post({"model": MODEL, "input": "a"})
    assert readings == 0
    async with (
        proxy.http.get(_place(proxy, "/events")) as one,
        proxy.http.get(_place(proxy, "/events")) as other,
    ):
        assert one.content_type == "text/event-stream"
        viewers = Events(one), Events(other)
        for viewer in viewers:
            assert (await viewer.next("state"))["saved"]["ever"]["misses"] == 1
        await proxy.post({"model": MODEL, "input": "a"})
        for viewer in viewers:
            while not (sample := (await viewer.next("samples") or [{}])[-1]).get("hits_a_s"):
                assert sample is not None
            assert sample["hit_ms"][0] > 0
            while (await viewer.next("state"))["saved"]["ever"]["hits"] != 1:
                pass
        assert proxy.app[REQUESTS].in_flight == 0
        assert dashboard._sampler.viewers == 2
        task = dashboard._sampler._task
    async with asyncio.timeout(SECONDS):
        await task
    before = readings
    await proxy.post({"model": MODEL, "input": "b"})
    assert readings == before
    assert dashboard._sampler._task is None


@pytest.mark.usefixtures("_quick")
async def test_viewers_are_bounded_and_leave_with_their_session(start_proxy, monkeypatch):
    """One too many gets a 503; when the key is revoked, the events end."""
    monkeypatch.setattr(samples, "MAX_VIEWERS", 1)
    proxy = await start_proxy(server={"keys": KEYS})
    _, cookie = await _log_in(proxy)
    headers = {"Cookie": cookie.partition(";")[0]}
    async with proxy.http.get(_place(proxy, "/events"), headers=headers) as response:
        assert await Events(response).next("state")
        refused, _ = await _get(proxy, "/events", **headers)
        assert (refused.status, refused.headers["Retry-After"]) == (503, "30")
        access = proxy.app[DASHBOARD]._access
        access._own.clear()
        access.replace_stored(())
        assert await Events(response).next("never") is None


@pytest.mark.usefixtures("_quick")
@pytest.mark.parametrize("how", ["stop", "reload"])
async def test_events_end_when_the_proxy_stops_or_reloads(how, start_proxy):
    """They hold up neither."""
    proxy = await start_proxy()
    async with proxy.http.get(_place(proxy, "/events")) as response:
        events = Events(response)
        assert await events.next("state")
        if how == "stop":
            proxy.app[READINESS].is_stopping = True
        else:
            proxy.app[DASHBOARD].end_streams()
        assert await events.next("never") is None
    if how == "reload":
        # The former application takes no more; whoever asks it learns to come again.
        async with proxy.http.get(_place(proxy, "/events")) as response:
            assert await Events(response).next("state") is None


async def test_a_reload_ends_the_events_and_closes_the_former_application(
    tmp_path, upstream, monkeypatch
):
    """Who looks connects again, with the same session; nothing of the former one is left open."""
    monkeypatch.setenv("OPENAI_API_KEY", "k")
    settings = Settings.model_validate(
        {
            "server": {"port": 0, "keys": KEYS},
            "cache": {"directory": str(tmp_path / "cache")},
            "providers": {"openai": {"base_url": upstream.url}},
        }
    )
    listening = listen(settings)
    url = base_url(listening).replace("/v1", "/dashboard")
    async with (
        Instance(settings, listening, lambda: settings) as instance,
        aiohttp.ClientSession(cookie_jar=aiohttp.CookieJar(unsafe=True)) as http,
    ):
        async with http.post(f"{url}/login", json={"key": "ours"}) as response:
            assert response.status == 200
        async with http.get(f"{url}/events") as response:
            events = Events(response)
            assert await events.next("state")
            former = instance._app
            assert (await instance.reload()).code == 0
            assert await events.next("never") is None
        async with asyncio.timeout(SECONDS):
            await asyncio.gather(*instance._runner._retiring)
        assert former[DASHBOARD]._sampler.viewers == 0
        async with http.get(f"{url}/events") as response:
            assert await Events(response).next("state")


async def test_a_page_that_looks_does_not_hold_up_the_end(tmp_path, upstream):
    """On SIGTERM the events end by themselves, long before the time that requests have."""
    settings = {
        "server": {"grace_s": 3600, "workers": 2},
        "cache": {"directory": str(tmp_path / "cache")},
        "providers": {"openai": {"base_url": upstream.url}},
    }
    async with (
        own_process(tmp_path, upstream, settings=settings) as (process, url),
        aiohttp.ClientSession() as http,
        http.get(url.replace("/v1", "/dashboard/events")) as response,
        asyncio.timeout(SECONDS),
    ):
        assert await Events(response).next("state")
        process.send_signal(signal.SIGTERM)
        assert await Events(response).next("never") is None
        assert await process.wait() == 0


async def test_figures_are_of_all_workers(start_proxy, upstream):
    """Whichever answers: calls, latencies and purchases of another process are told."""
    asked, other = await start_proxy(openai=upstream), await start_proxy(openai=upstream)
    for text in ("a", "b"):
        assert (await asked.post({"model": MODEL, "input": text})).status == 200
    asked.app[METRICS]._publish()
    state = await _state(other)
    assert state["saved"]["ever"]["misses"] == 2
    assert state["providers"][0]["attempts"] == 2
    reading = await other.app[DASHBOARD]._figures.read()
    assert (sum(reading.hits), sum(reading.misses)) == (0, 2)
