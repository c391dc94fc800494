"""What Prometheus is told, read as Prometheus reads it."""

import os
import re

from embedding_proxy.providers.route_check import TEXTS
from fault_server import status, tokens_of

LINE = re.compile(r'(\w+)\{((?:\w+="(?:[^"\\\n]|\\[\\"n])*",?)*)\} (\S+)')
MODEL = {"space": "s/m", "dimensions": 8, "price": 2.0, "routes": [
    {"provider": "openai", "model": "m"}]}  # fmt: skip
KEYS = [{"key": "k", "admin": True, "name": 'a "b"\\\n', "namespace": "team"}]
WORKER = ("worker", str(os.getpid()))


async def _told(proxy):
    """Return the values by name and labels; every line is one of Prometheus' format."""
    url = proxy.url.removesuffix("/v1") + "/metrics"
    async with proxy.http.get(url, headers={"Authorization": "Bearer k"}) as response:
        assert response.status == 200
        assert response.headers["Content-Type"].startswith("text/plain; version=0.0.4")
        text = await response.text()
    assert text.endswith("\n")
    told, known = {}, set()
    for line in text.splitlines():
        if line.startswith("# "):
            known.add(line.split()[2])
            continue
        name, labels, value = LINE.fullmatch(line).groups()
        assert name in known
        pairs = frozenset(re.findall(r'(\w+)="((?:[^"\\]|\\.)*)"', labels))
        assert (name, pairs) not in told
        told[name.removeprefix("embedding_proxy_"), pairs] = float(value)
    return told


async def test_counters_are_told_by_all_that_the_ledger_knows(upstream, start_proxy):
    """Inputs, tokens and dollars since ever; look-ups and calls of this worker."""
    upstream.widths = {"m": 8}
    sections = {"models": {"m": MODEL}, "server": {"keys": KEYS}}
    proxy = await start_proxy(openai=upstream, **sections)
    for _ in range(2):
        asked = {"model": "m", "input": ["one text", "one text"]}
        assert (await proxy.post(asked, Authorization="Bearer k")).status == 200
    assert (await _told(proxy))["cache_lookups_total", frozenset({WORKER, ("result", "memory")})] == 1
    await start_proxy.stop()
    proxy = await start_proxy(openai=upstream, **sections)
    upstream.script.append(status(402))
    assert (await proxy.post({"model": "m", "input": "b"}, Authorization="Bearer k")).status == 402
    told = await _told(proxy)
    client = {("model", "m"), ("client", r"a \"b\"\\\n"), ("namespace", "team")}
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
        ("cache_lookups_total", {WORKER, ("result", "memory")}, 0),
        ("cache_lookups_total", {WORKER, ("result", "miss")}, 1),
        ("cache_corrupt_records_total", {WORKER}, 0),
        ("provider_attempts_total", {WORKER, ("provider", "openai")}, 1),
        ("provider_ready", {WORKER, ("provider", "openai")}, 0),
    ):
        assert told[name, frozenset(labels)] == value, (name, labels)
    failures = {WORKER, ("provider", "openai"), ("reason", "quota_exceeded")}
    assert told["provider_failures_total", frozenset(failures)] == 1


async def test_another_model_and_the_canaries_are_told(upstream, start_proxy):
    """What hints at a model that was changed is there to be watched, here and in /status."""
    upstream.widths = {"m": 8}
    upstream.always = upstream.altered(lambda reply: reply.update(model="another"))
    proxy = await start_proxy(openai=upstream, models={"m": MODEL})
    assert (await proxy.post({"model": "m", "input": "a"})).status == 200
    (found,) = await proxy.service.canaries.look()
    told = await _told(proxy)
    named = {WORKER, ("provider", "openai"), ("model", "another")}
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
