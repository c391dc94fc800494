"""DriftCheck: a provider that changes its model in silence is noticed; nobody else is troubled."""

import asyncio
import logging

import orjson
import pytest
from clock import Clock
from embedding_proxy.providers.route_check import TEXTS
from embedding_proxy.proxy.service import drift_check
from embedding_proxy.proxy.service.drift_check import DriftCheck
from fault_server import status, vector_of

MODEL = "text-embedding-3-small"
DAY = 86_400


@pytest.fixture
def clock(monkeypatch):
    """Give a clock for canaries, and make every service use it."""
    made = Clock()
    monkeypatch.setattr(DriftCheck.__init__, "__kwdefaults__", {"clock": made})
    return made


def _another_model(server):
    """Return a fault: the vectors of another model of the same width."""

    def change(reply):
        for item in reply["data"]:
            item["embedding"] = vector_of("another", item["index"]).tolist()

    return server.altered(change)


def _asked(server):
    return [call.inputs for call in server.calls if call.inputs == list(TEXTS)]


async def _look(proxy, text):
    """Buy one text, so that the model is in use, and ask the canaries that are due."""
    assert (await proxy.post({"model": MODEL, "input": text})).status == 200
    return await proxy.service.drift_check.check()


async def test_a_model_that_stays_the_same(upstream, second, start_proxy, clock, caplog):
    """Every route in use is asked once a day, and what was bought first is bought once."""
    proxy = await start_proxy(openai=upstream, openrouter=second)
    assert await proxy.service.drift_check.check() == [], "nothing was bought yet"
    found = await _look(proxy, "a")
    assert [(one["provider"], one["cosine"]) for one in found] == [
        ("openai", pytest.approx(1, abs=1e-6)),
        ("openrouter", pytest.approx(1, abs=1e-6)),
    ]
    assert found == proxy.service.drift_check.results
    assert (len(_asked(upstream)), len(_asked(second))) == (2, 1)
    assert await _look(proxy, "b") == [], "a day has not passed"
    clock.now += DAY
    assert await proxy.service.drift_check.check() == [], "nothing was bought since"
    assert len(await _look(proxy, "c")) == 2
    assert (len(_asked(upstream)), len(_asked(second))) == (3, 2)
    assert not [r for r in caplog.records if r.levelno >= logging.ERROR]


async def test_a_model_that_changes_is_told_loudly(upstream, second, start_proxy, clock, caplog):
    """The route that answers otherwise is named, in the log and in what was found."""
    proxy = await start_proxy(openai=upstream, openrouter=second)
    await _look(proxy, "a")
    upstream.always = _another_model(upstream)
    clock.now += DAY
    first, other = await _look(proxy, "b")
    assert first["cosine"] < 0.2
    assert other["cosine"] > 0.999
    (record,) = [r for r in caplog.records if r.levelno >= logging.ERROR]
    assert "openai: THE MODEL text-embedding-3-small HAS CHANGED" in record.getMessage()
    upstream.always = None
    clock.now += DAY
    first, _ = await _look(proxy, "c")
    assert first["cosine"] > 0.999


async def test_over_a_restart_and_several_workers(upstream, start_proxy, clock):
    """Another process goes on with the same first answers, and asks nothing that is not due."""
    proxy = await start_proxy(openai=upstream)
    other = await start_proxy(openai=upstream)
    assert len(await _look(proxy, "a")) == 1
    assert await _look(other, "b") == []
    clock.now += DAY
    assert len(await _look(other, "e")) == 1
    assert await _look(proxy, "f") == [], "the other one has just asked"
    await start_proxy.stop()
    proxy = await start_proxy(openai=upstream)
    assert await _look(proxy, "c") == []
    clock.now += DAY
    upstream.always = _another_model(upstream)
    (found,) = await _look(proxy, "d")
    assert found["cosine"] < 0.2


async def test_a_provider_that_fails_is_no_changed_model(upstream, second, start_proxy, clock):
    """A route that does not answer has no finding, and is not asked again the same day."""
    proxy = await start_proxy(openai=upstream, openrouter=second)
    await _look(proxy, "a")
    clock.now += DAY
    assert (await proxy.post({"model": MODEL, "input": "b"})).status == 200
    upstream.always = status(404)
    (found,) = await proxy.service.drift_check.check()
    assert found["provider"] == "openrouter"
    calls = len(upstream.calls)
    upstream.always = None
    assert await _look(proxy, "c") == []
    assert len(upstream.calls) == calls + 1


async def test_a_resting_provider_is_left_alone(upstream, second, start_proxy, clock):
    """A provider that rests, here for want of credit, is not asked by canaries either."""
    upstream.always = status(402)
    proxy = await start_proxy(openai=upstream, openrouter=second)
    (found,) = await _look(proxy, "a")
    assert (found["provider"], len(upstream.calls)) == ("openrouter", 1)


async def test_clients_see_none_of_it(upstream, start_proxy, clock):
    """The first answers are in a namespace of their own: a client that asks the same text buys."""
    proxy = await start_proxy(openai=upstream)
    await _look(proxy, "a")
    reply = await proxy.post({"model": MODEL, "input": TEXTS[0]})
    assert reply.headers["x-cache"] == "miss"


@pytest.mark.parametrize("spoilt", [b"", b"[]", b'{"routes": 1}', b'{"routes": ['])
async def test_a_spoilt_file_is_written_anew(spoilt, upstream, start_proxy, clock):
    """What was found is no more than that: without it the canaries are asked again."""
    proxy = await start_proxy(openai=upstream)
    await _look(proxy, "a")
    (file,) = (proxy.service.settings.cache.directory).rglob("canaries.json")
    file.write_bytes(spoilt)
    clock.now += DAY
    assert len(await _look(proxy, "b")) == 1
    assert len(proxy.service.drift_check.results) == 1


async def test_they_are_looked_after_in_the_background(upstream, start_proxy, monkeypatch, caplog):
    """Left to itself, the proxy looks; what goes wrong is logged, and it looks again."""
    monkeypatch.setattr(drift_check, "CHECK_INTERVAL_S", 0.01)
    looks = 0

    async def look(self):
        nonlocal looks
        looks += 1
        raise RuntimeError("made up")

    monkeypatch.setattr(DriftCheck, "check", look)
    proxy = await start_proxy(openai=upstream)
    while looks < 3:
        await proxy.post({"model": MODEL, "input": "a"})
    assert "the drift check failed" in caplog.text


async def test_they_can_be_switched_off(upstream, start_proxy):
    """`drift_check_hours: null` is never."""
    proxy = await start_proxy(openai=upstream, server={"drift_check_hours": None})
    assert proxy.service.drift_check is None


async def test_a_model_that_was_asked_for_by_name(upstream, start_proxy, clock):
    """A model that no configuration names has its canaries too, once its width is known."""
    proxy = await start_proxy(openai=upstream)
    assert (await proxy.post({"model": "text-embedding-9", "input": "a"})).status == 200
    (found,) = await proxy.service.drift_check.check()
    assert found["upstream_model"] == "text-embedding-9"


async def test_one_worker_at_a_time_asks(upstream, start_proxy, clock):
    """Of several that look at the same moment one asks; what it found is known to the others."""
    upstream.gate = asyncio.Event()
    proxies = [await start_proxy(openai=upstream) for _ in range(3)]
    asked = [proxy.post({"model": MODEL, "input": f"{i}"}) for i, proxy in enumerate(proxies)]
    upstream.gate.set()
    assert [reply.status for reply in await asyncio.gather(*asked)] == [200] * 3
    looks = await asyncio.gather(*(proxy.service.drift_check.check() for proxy in proxies))
    assert sorted(map(len, looks)) == [0, 0, 1]
    assert [await proxy.service.drift_check.check() for proxy in proxies] == [[], [], []]
    # Four texts bought first, and four asked anew.
    assert len(_asked(upstream)) == 2
    (file,) = proxies[0].service.settings.cache.directory.rglob("canaries.json")
    assert not list(file.parent.glob("*.part"))


async def test_a_route_that_failed_is_not_asked_by_another_worker(upstream, start_proxy, clock):
    """That a route was asked counts for all workers, whether or not it has answered."""
    proxy, other = await start_proxy(openai=upstream), await start_proxy(openai=upstream)
    assert len(await _look(proxy, "a")) == 1
    clock.now += DAY
    for one, text in ((proxy, "b"), (other, "c")):
        assert (await one.post({"model": MODEL, "input": text})).status == 200
    upstream.always = status(404)
    calls = len(upstream.calls)
    assert await proxy.service.drift_check.check() == []
    assert await other.service.drift_check.check() == []
    assert len(upstream.calls) == calls + 1


async def test_what_is_kept_of_routes_is_bounded(upstream, start_proxy, clock, monkeypatch):
    """Clients name models: of so many routes something is kept, of the ones asked last."""
    monkeypatch.setattr(drift_check, "MAX_ROUTES", 3)
    proxy = await start_proxy(openai=upstream)
    for i in range(5):
        clock.now += 1
        assert (await proxy.post({"model": f"text-embedding-{i}", "input": "a"})).status == 200
        assert len(await proxy.service.drift_check.check()) == 1
    (file,) = proxy.service.settings.cache.directory.rglob("canaries.json")
    content = orjson.loads(file.read_bytes())
    names = [f"text-embedding-{i}" for i in (2, 3, 4)]
    assert [one["upstream_model"] for one in content["routes"]] == names
    assert [row[2] for row in content["asked"]] == names
    assert [one["upstream_model"] for one in proxy.service.drift_check.results] == names
