"""What Prometheus is told, read as Prometheus reads it."""

import re

from embedding_proxy.providers import errors
from embedding_proxy.providers.route_check import TEXTS
from fault_server import hang, status, tokens_of
from pages import ROOT
from ports import own_port
from prometheus_client.parser import text_string_to_metric_families
from qdrant_server import QdrantServer

MODEL = {"space": "s/m", "dimensions": 8, "price": 2.0, "routes": [
    {"provider": "openai", "model": "m"}]}  # fmt: skip
KEYS = [{"key": "k", "admin": True, "name": 'a "b"\\\n', "namespace": "team"}]
PAGE = (ROOT / "docs" / "metrics.md").read_text(encoding="utf-8")


async def _text(proxy):
    """Return what Prometheus is told."""
    url = proxy.url.removesuffix("/v1") + "/metrics"
    async with proxy.http.get(url, headers={"Authorization": "Bearer k"}) as response:
        assert response.status == 200
        assert response.headers["Content-Type"].startswith("text/plain; version=0.0.4")
        return await response.text()


async def _told(proxy):
    """Return the values by name and labels; every line is one of Prometheus' format."""
    told = {}
    for family in text_string_to_metric_families(await _text(proxy)):
        for sample in family.samples:
            key = sample.name.removeprefix("embedding_proxy_"), frozenset(sample.labels.items())
            assert key not in told
            told[key] = sample.value
    return told


async def test_counters_are_told_by_all_that_the_ledger_knows(upstream, start_proxy):
    """Inputs, tokens, dollars, look-ups and calls since ever, also after a restart."""
    upstream.widths = {"m": 8}
    sections = {"models": {"m": MODEL}, "server": {"keys": KEYS}}
    proxy = await start_proxy(openai=upstream, **sections)
    for _ in range(2):
        asked = {"model": "m", "input": ["one text", "one text"]}
        assert (await proxy.post(asked, Authorization="Bearer k")).status == 200
    found = frozenset({("result", "memory")})
    assert (await _told(proxy))["cache_lookups_total", found] == 1
    await start_proxy.stop()
    proxy = await start_proxy(openai=upstream, **sections)
    upstream.script.append(status(402))
    assert (await proxy.post({"model": "m", "input": "b"}, Authorization="Bearer k")).status == 402
    told = await _told(proxy)
    client = {("model", "m"), ("client", 'a "b"\\\n'), ("namespace", "team")}
    bought, served = {*client, ("provider", "openai")}, {*client, ("provider", "")}
    tokens = tokens_of("one text")
    for name, labels, value in (
        ("inputs_total", {*bought, ("outcome", "misses")}, 1),
        ("inputs_total", {*served, ("outcome", "hits")}, 1),
        ("inputs_total", {*served, ("outcome", "duplicates")}, 2),
        ("inputs_total", {*served, ("outcome", "misses")}, 0),
        ("tokens_total", {*bought, ("kind", "billed")}, tokens),
        ("tokens_total", {*served, ("kind", "saved")}, 3 * tokens),
        ("cost_usd_total", {*bought, ("kind", "billed")}, tokens * 2e-6),
        ("cache_lookups_total", {("result", "memory")}, 1),
        ("cache_lookups_total", {("result", "miss")}, 2),
        ("cache_corrupt_records_total", set(), 0),
        ("provider_attempts_total", {("provider", "openai")}, 2),
        ("provider_ready", {("provider", "openai")}, 0),
        ("circuit_breaker_state", {("provider", "openai")}, 2),
        ("requests_total", {("route", "embeddings"), ("status", "200")}, 2),
        ("requests_total", {("route", "embeddings"), ("status", "402")}, 1),
        ("request_duration_seconds_count", {("route", "embeddings")}, 3),
        ("upstream_duration_seconds_count", {("provider", "openai")}, 2),
        ("cache_entries", set(), 1),
        ("requests_in_flight", set(), 1),
    ):
        assert told[name, frozenset(labels)] == value, (name, labels)
    failures = {("provider", "openai"), ("reason", "quota_exceeded")}
    assert told["provider_failures_total", frozenset(failures)] == 1


async def test_another_model_and_the_canaries_are_told(upstream, start_proxy):
    """What hints at a model that was changed is there to be watched, here and in /status."""
    upstream.widths = {"m": 8}
    upstream.always = upstream.altered(lambda reply: reply.update(model="another"))
    proxy = await start_proxy(openai=upstream, models={"m": MODEL})
    assert (await proxy.post({"model": "m", "input": "a"})).status == 200
    (found,) = await proxy.service.drift_check.check()
    told = await _told(proxy)
    named = {("provider", "openai"), ("model", "another")}
    assert told["provider_model_mismatch_total", frozenset(named)] == 3
    route = {("space", "s/m"), ("provider", "openai"), ("upstream_model", "m")}
    assert told["model_drift_cosine_similarity", frozenset(route)] == found["cosine"] > 0.999
    async with proxy.http.get(proxy.url.removesuffix("/v1") + "/status") as response:
        content = await response.json()
    assert content["other_models"] == {"openai": {"another": 3}}
    assert content["canaries"] == [found]
    # Asked for by nobody, but paid for all the same: four texts bought first, and four asked anew.
    charged = 2 * sum(map(tokens_of, TEXTS)) + tokens_of("a")
    assert content["since_start"]["tokens_billed"] == charged


def _rows(heading):
    """Return the cells of the tables below a heading of the page, without their heads."""
    part = PAGE.partition(f"\n## {heading}\n")[2].partition("\n## ")[0]
    lines = [line for line in part.splitlines() if line.startswith("| `")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


async def test_the_page_tells_all_metrics_and_invents_none(upstream, start_proxy):
    """Names, types and labels are those that are exported."""
    upstream.widths = {"m": 8}
    upstream.always = upstream.altered(lambda reply: reply.update(model="another"))
    async with QdrantServer() as qdrant:
        index = {"qdrant": {"url": qdrant.url}}
        # Nobody answers there: the tier tells that, too.
        cache = {"shared": f"redis://127.0.0.1:{own_port()}"}
        sections = {"models": {"m": MODEL}, "server": {"keys": KEYS}, "index": index}
        proxy = await start_proxy(openai=upstream, cache=cache, **sections)
        for text, found in (("a", 200), ("b", 402)):
            asked = {"model": "m", "input": text}
            assert (await proxy.post(asked, Authorization="Bearer k")).status == found
            await proxy.service.drift_check.check()
            upstream.script.append(status(402))
        told, text = await _told(proxy), await _text(proxy)
        await start_proxy.stop()
    parts = re.compile(r"(?<=_seconds)_(bucket|count|sum)$")
    labels = {parts.sub("", name): {label for label, _ in pairs} for name, pairs in told}
    kinds = re.findall(r"# TYPE embedding_proxy_(\S+) (\S+)", text)
    exported = {(name, kind): labels[name] for name, kind in kinds}
    rows = _rows("All metrics")
    names = re.compile(r"`(\w+)`")
    assert exported == {
        (name.strip("`"), kind): set(names.findall(words)) for name, kind, words, _ in rows
    }
    assert len(rows) == len(exported)


def _classes(base):
    return [base, *(one for kind in base.__subclasses__() for one in _classes(kind))]


def test_each_error_has_a_reason_of_its_own_that_the_page_tells():
    """So no class of another name changes a label, and no two failures are told as one."""
    abstract = {errors.EmbeddingError, errors.ProviderError, errors.TransientError}
    kinds = [one for one in _classes(errors.EmbeddingError) if one.__module__ == errors.__name__]
    concrete = [one for one in kinds if one not in abstract]
    assert len(concrete) == 20
    assert all("reason" in vars(one) for one in concrete)
    reasons = [one.reason for one in concrete]
    assert sorted(reasons) == sorted(row[0].strip("`") for row in _rows("Reasons of failures"))
    assert len({*reasons, errors.EmbeddingError.reason}) == len(reasons) + 1
    assert all(re.fullmatch("[a-z_]+", reason) for reason in reasons)


async def test_retries_failovers_and_hedges_are_told_by_model(upstream, second, start_proxy):
    """What the routes of a model cost besides the first attempt of each batch."""
    upstream.widths = second.widths = {"m": 8}
    routes = [{"provider": name, "model": "m"} for name in ("openai", "openrouter")]
    model = {**MODEL, "routes": routes}
    models = {"hedged": {**model, "hedge_after_s": 0.001}, "plain": {**model, "space": "s/p"}}
    proxy = await start_proxy(openai=upstream, openrouter=second, models=models)
    for name, act in (("hedged", hang()), ("plain", status(500)), ("plain", status(402))):
        upstream.script.append(act)
        text = str(len(upstream.calls))
        assert (await proxy.post({"model": name, "input": text})).status == 200
    told = await _told(proxy)
    for name, hedged, plain in (
        ("retries_total", 0, 1),
        ("failovers_total", 0, 1),
        ("hedged_requests_total", 1, 0),
    ):
        for model_name, value in (("hedged", hedged), ("plain", plain)):
            assert told[name, frozenset({("model", model_name)})] == value, name


async def test_a_hit_of_the_fast_path_is_counted(upstream, start_proxy):
    """A repeated body is answered without a handler, and is a request like others."""
    upstream.widths = {"m": 8}
    proxy = await start_proxy(openai=upstream, models={"m": MODEL})
    for _ in range(3):
        assert (await proxy.post({"model": "m", "input": "a"})).status == 200
    told = await _told(proxy)
    labels = frozenset({("route", "embeddings"), ("status", "200")})
    assert told["requests_total", labels] == 3
    count = frozenset({("route", "embeddings")})
    assert told["request_duration_seconds_count", count] == 3
    top = frozenset({("route", "embeddings"), ("le", "+Inf")})
    assert told["request_duration_seconds_bucket", top] == 3


async def test_requests_nobody_serves_have_bounded_labels(upstream, start_proxy):
    """Paths, methods and models of clients are no labels."""
    proxy = await start_proxy(openai=upstream, models={"m": MODEL}, passthrough=None)
    address = proxy.url.removesuffix("/v1")
    for number in range(50):
        async with proxy.http.get(f"{address}/path-{number}") as response:
            assert response.status == 404
    told = await _told(proxy)
    routes = {dict(pairs)["route"] for name, pairs in told if name == "requests_total"}
    assert "unknown" in routes
    assert not any("path" in route for route in routes)
    labels = frozenset({("route", "unknown"), ("status", "404")})
    assert told["requests_total", labels] == 50
