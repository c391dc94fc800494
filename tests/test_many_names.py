"""Whatever clients and upstreams name: memory, metrics and tables stay bounded, and sums exact."""

import asyncio
import sqlite3
from collections import Counter
from contextlib import closing

import orjson
import pytest
from embedding_proxy.cache import ledger
from embedding_proxy.cache.disk import bounds, store
from embedding_proxy.cache.key import OTHER_NAMESPACE
from embedding_proxy.providers import openai_compatible
from embedding_proxy.proxy.service import embedding_service
from embedding_proxy.proxy.service.client_keys import HASH_KEY_FILE
from fault_server import tokens_of

MAX_LEDGER_KEYS, MAX_PARAMETER_SETS, MAX_PARTITIONS, MAX_OTHER_MODELS = 60, 20, 80, 20
"""In short; the bounds are the same whatever their numbers are."""
REQUESTS = 300
AT_ONCE = 50
PRICE = 2.0
TEXT = "three short words"
TOKENS = tokens_of(TEXT)
MODELS = {
    "m": {
        "space": "s/m",
        "dimensions": 8,
        "price": PRICE,
        "routes": [{"provider": "openai", "model": "m"}],
    }
}
MAX_SERIES = 12 * (MAX_LEDGER_KEYS + 2) + MAX_OTHER_MODELS + 100
"""Of the ledger 8 a line; the rest is a provider's or a worker's."""


@pytest.fixture(autouse=True)
def _low_bounds(monkeypatch):
    for module in (ledger, bounds, store, embedding_service):
        monkeypatch.setattr(module, "MAX_LEDGER_KEYS", MAX_LEDGER_KEYS)
    monkeypatch.setattr(bounds, "MAX_PARAMETER_SETS", MAX_PARAMETER_SETS)
    monkeypatch.setattr(bounds, "MAX_PARTITIONS", MAX_PARTITIONS)
    monkeypatch.setattr(openai_compatible, "MAX_OTHER_MODELS", MAX_OTHER_MODELS)


async def _series(proxy):
    """Return the value of each line of /metrics, by name and by the text of its labels."""
    async with proxy.http.get(proxy.url.removesuffix("/v1") + "/metrics") as response:
        lines = (await response.text()).splitlines()
    series = {}
    for line in lines:
        if not line.startswith("#"):
            labels, _, value = line.rpartition(" ")
            assert labels not in series
            series[labels] = float(value)
    return series


def _sums(series):
    """Return the sums over all lines of each counter, by its name and its last label."""
    sums = Counter()
    for labels, value in series.items():
        name, _, rest = labels.removeprefix("embedding_proxy_").partition("{")
        sums[name, rest.rpartition(",")[2].rstrip("}")] += value
    return sums


async def _status(proxy):
    async with proxy.http.get(proxy.url.removesuffix("/v1") + "/status") as response:
        return orjson.loads(await response.read())


async def _ask_all(ask):
    """Make all requests, some at a time."""
    for start in range(0, REQUESTS, AT_ONCE):
        replies = await asyncio.gather(*map(ask, range(start, start + AT_ONCE)))
        assert {reply.status for reply in replies} == {200}


def _rows(directory, statement):
    with closing(sqlite3.connect(directory / "v1" / "cache.db")) as file:
        return file.execute(statement).fetchall()


def _assert_exact(series):
    """Assert that all lines together tell what was bought: each request one input."""
    sums = _sums(series)
    assert sums["inputs_total", 'outcome="misses"'] == REQUESTS
    assert sums["tokens_total", 'kind="billed"'] == REQUESTS * TOKENS
    dollars = REQUESTS * TOKENS * PRICE / 1e6
    assert sums["cost_usd_total", 'kind="billed"'] == pytest.approx(dollars, rel=1e-9)


@pytest.mark.untraced
async def test_further_fields_and_names_in_replies(upstream, start_proxy, tmp_path):
    """Each request has a field of its own, and each reply names another model."""
    upstream.widths = {"m": 8}
    numbers = iter(range(10 * REQUESTS))
    upstream.always = upstream.altered(lambda reply: reply.update(model=f"name {next(numbers)}"))
    proxy = await start_proxy(openai=upstream, models=MODELS)

    async def ask(number):
        return await proxy.post({"model": "m", "input": TEXT, f"field_{number % 7}": number})

    await _ask_all(ask)
    # What is kept under a shared label is found like any other.
    for number in (0, MAX_PARAMETER_SETS, REQUESTS - 1):
        assert (await ask(number)).headers["x-cache"] == "hit"
    assert len(proxy.service.counted) <= MAX_LEDGER_KEYS + 2
    status = await _status(proxy)
    assert len(status["other_models"]["openai"]) == MAX_OTHER_MODELS + 1
    assert sum(status["other_models"]["openai"].values()) == REQUESTS
    assert status["since_start"]["tokens_billed"] == REQUESTS * TOKENS
    await start_proxy.stop()
    proxy = await start_proxy(openai=upstream, models=MODELS)
    series = await _series(proxy)
    assert len(series) < MAX_SERIES
    _assert_exact(series)
    directory = tmp_path / "cache"
    assert len(_rows(directory, "SELECT 1 FROM Partitions")) <= MAX_PARAMETER_SETS + 3
    assert len(_rows(directory, "SELECT 1 FROM Usage")) <= 2 * (MAX_LEDGER_KEYS + 2)
    spaces = _rows(directory, "SELECT space, count(*) FROM Entries JOIN Partitions ON"
                   " Partitions.id = partition GROUP BY space")  # fmt: skip
    assert dict(spaces)["s/m?other"] == REQUESTS - MAX_PARAMETER_SETS


@pytest.mark.untraced
async def test_clients_own_keys(upstream, start_proxy, tmp_path):
    """Each request has a key of its own, and so a namespace and a client of its own."""
    upstream.widths = {"m": 8}
    providers = {"openai": {"base_url": upstream.url, "auth": "client"}}
    sections = {"models": MODELS, "providers": providers}
    proxy = await start_proxy(**sections)

    async def ask(number):
        headers = {"Authorization": f"Bearer sk-number-{number:010}"}
        return await proxy.post({"model": "m", "input": TEXT}, **headers)

    await _ask_all(ask)
    for number in (0, REQUESTS - 1):
        assert (await ask(number)).headers["x-cache"] == "hit"
    assert len(proxy.service.counted) <= MAX_LEDGER_KEYS + 2
    status = await _status(proxy)
    assert status["since_start"]["tokens_billed"] == REQUESTS * TOKENS
    await start_proxy.stop()
    proxy = await start_proxy(**sections)
    series = await _series(proxy)
    assert len(series) < MAX_SERIES
    _assert_exact(series)
    rest = f'model="other",provider="openai",client="other",namespace="{OTHER_NAMESPACE}"'
    inputs = series[f'embedding_proxy_inputs_total{{{rest},outcome="misses"}}']
    assert inputs >= REQUESTS - 2 * MAX_LEDGER_KEYS
    directory = tmp_path / "cache"
    assert (directory / "v1" / HASH_KEY_FILE).exists()
    assert len(_rows(directory, "SELECT 1 FROM Partitions")) <= MAX_PARTITIONS + 2
    assert len(_rows(directory, "SELECT 1 FROM Usage")) <= 2 * (MAX_LEDGER_KEYS + 2)
    assert len(_rows(directory, "SELECT 1 FROM Entries")) == REQUESTS
