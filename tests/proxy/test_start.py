"""The start: what the log says once the proxy answers, and the address that can be pasted."""

import asyncio
import logging
import os
import re
import signal
from importlib.metadata import version

import aiohttp
import pytest
from embedding_proxy.cache.maintenance.stats import read_size
from embedding_proxy.proxy.cli import startup
from embedding_proxy.proxy.config.schema import Settings
from embedding_proxy.proxy.http import process


@pytest.fixture
def started(tmp_path, monkeypatch, caplog):
    """Give a function that starts and stops a proxy; it returns its base URL and the log."""
    monkeypatch.setenv("OPENAI_API_KEY", "k")
    caplog.set_level(logging.INFO, "embedding_proxy")

    async def run(texts=0, **sections) -> tuple[str, list[str], list[str]]:
        caplog.clear()
        sections.setdefault("cache", {"directory": str(tmp_path / "cache")})
        keys = sections.pop("server", {})
        settings = Settings.model_validate({"server": {"port": 0, **keys}, **sections})
        with process.listen(settings) as listening:
            url, ready = process.base_url(listening), asyncio.Event()

            def announce() -> None:
                startup.report(settings, url)
                ready.set()

            task = asyncio.create_task(process.serve(settings, listening, announce))
            waiting = asyncio.create_task(ready.wait())
            await asyncio.wait([task, waiting], return_when=asyncio.FIRST_COMPLETED)
            if texts:
                body = {"model": "text-embedding-3-small", "input": [f"t{i}" for i in range(texts)]}
                async with (
                    aiohttp.ClientSession() as session,
                    session.post(f"{url}/embeddings", json=body, headers={"api-key": "k"}) as reply,
                ):
                    assert reply.status == 200
            os.kill(os.getpid(), signal.SIGTERM)
            await task
        warned = [one.getMessage() for one in caplog.records if one.levelno >= logging.WARNING]
        return url, [*caplog.messages], warned

    return run


async def test_the_log_tells_version_cache_and_providers(started, upstream, tmp_path):
    """The folder is absolute, with what it holds; the second start finds what the first bought."""
    providers = {"openai": {"base_url": upstream.url}}
    url, said, warned = await started(2, providers=providers)
    root = url.removesuffix("/v1")
    assert f"status: {root}/status, metrics: {root}/metrics" in said
    assert f"embedding-proxy {version('embedding-proxy')}" in said
    line = rf"cache: {re.escape(str(tmp_path / 'cache'))}: COUNT, [\d.]+ kB of at most 53\.7 GB"
    assert [one for one in said if re.fullmatch(line.replace("COUNT", "0 entries"), one)]
    assert "providers ready: local, openai" in said
    assert "calls that are not ours are passed to openai" in said
    assert warned == []
    _, said, _ = await started(providers=providers)
    assert [one for one in said if re.fullmatch(line.replace("COUNT", "2 entries"), one)]


async def test_nobody_is_warned_of_providers_that_nobody_named(started, monkeypatch):
    """The default ones are there for whoever has a key; one that is named is missed."""
    monkeypatch.delenv("OPENAI_API_KEY")
    monkeypatch.setenv("OPENROUTER_API_KEY", "k")
    _, said, warned = await started()
    assert "providers ready: local, openrouter" in said
    assert warned == []
    _, said, warned = await started(providers={"openai": {}, "openrouter": {}})
    assert warned == ["provider openai is skipped: OPENAI_API_KEY is not set"]


async def test_a_start_without_a_remote_provider_says_what_that_means(started, monkeypatch):
    """One line with all remedies; and none about calls that cannot be passed on."""
    monkeypatch.delenv("OPENAI_API_KEY")
    _, said, (warned,) = await started()
    assert warned.startswith("no remote provider is ready, so an input that is not in the cache is")
    assert warned.endswith("set OPENAI_API_KEY or OPENROUTER_API_KEY and start again")
    assert "providers ready: local" in said
    assert not [one for one in said if "are passed to" in one]
    for sections in ({"providers": {"local": {}}}, {"cache": {"mode": "frozen"}}):
        _, said, warned = await started(**sections)
        assert warned == []


@pytest.mark.parametrize(
    ("host", "shown"),
    [("0.0.0.0", "127.0.0.1"), ("127.0.0.1", "127.0.0.1"), ("localhost", "127.0.0.1")],
)
async def test_the_address_can_be_pasted(host, shown, started, upstream):
    """It is one that a client of this machine reaches; nobody connects to all addresses."""
    keys = {"host": host, "keys": ["k"]}
    providers = {"openai": {"base_url": upstream.url}}
    url, _, _ = await started(1, server=keys, providers=providers)
    assert re.fullmatch(rf"http://{re.escape(shown)}:\d+/v1", url)
    assert len(upstream.calls) == 1


def test_a_folder_without_a_store_holds_nothing(tmp_path):
    """To look makes no file."""
    assert read_size(tmp_path) is None
    (tmp_path / "v1").mkdir()
    (tmp_path / "v1" / "cache.db").write_bytes(b"no database" * 1000)
    assert read_size(tmp_path) is None
    assert [one.name for one in (tmp_path / "v1").iterdir()] == ["cache.db"]
