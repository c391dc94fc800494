"""Running on a port: the address that is announced, and an end that drops no request."""

import asyncio
import os
import signal
import socket
from types import SimpleNamespace

import aiohttp
import pytest
from aiohttp import web
from clock import until
from embedding_proxy.cache.disk.store import StoreError
from embedding_proxy.providers import attempts
from embedding_proxy.proxy.config.schema import Settings
from embedding_proxy.proxy.http import process
from embedding_proxy.proxy.http.process import PortUnavailable, base_url, listen, serve
from fault_server import hang
from ports import own_port

GRACE_SECONDS = 30.0
GOOD = {"model": "text-embedding-3-small", "input": "a"}


@pytest.fixture
def settings(tmp_path, upstream, monkeypatch) -> Settings:
    """Give the settings of a proxy on any free port, in front of the upstream."""
    monkeypatch.setenv("OPENAI_API_KEY", "k")
    return _settings(tmp_path, upstream)


def _settings(tmp_path, upstream, timeout_s=60, **keys) -> Settings:
    return Settings.model_validate(
        {
            "server": {"port": 0, **keys},
            "cache": {"directory": str(tmp_path / "cache")},
            "providers": {"openai": {"base_url": upstream.url, "timeout_s": timeout_s}},
        }
    )


async def _started(settings: Settings) -> tuple[asyncio.Task[signal.Signals], str]:
    """Return the task that serves, and the URL it announced."""
    listening = listen(settings)
    ready = asyncio.Event()
    task = asyncio.create_task(serve(settings, listening, ready.set))
    await ready.wait()
    return task, base_url(listening)


@pytest.mark.parametrize("number", process.IMPATIENT_SIGNALS)
async def test_a_signal_ends_it_in_good_order(number, settings):
    """Told to stop, it says what told it; then the port is free, and the cache can be reopened."""
    for outcome in ("miss", "hit"):
        task, url = await _started(settings)
        async with aiohttp.ClientSession() as session:
            async with session.post(f"{url}/embeddings", json=GOOD) as response:
                assert response.headers["x-cache"] == outcome
            os.kill(os.getpid(), number)
            assert await task is number
            with pytest.raises(aiohttp.ClientConnectorError):
                await session.get(f"{url}/models")


async def test_a_request_that_outlasts_the_grace_is_dropped(tmp_path, upstream, monkeypatch):
    """A request in progress holds the end up for the time of grace, and no longer."""
    monkeypatch.setenv("OPENAI_API_KEY", "k")
    settings = _settings(tmp_path, upstream, grace_s=0.01)
    arrived, release = asyncio.Event(), asyncio.Event()

    async def hold(*_) -> web.Response:
        arrived.set()
        await release.wait()
        return web.Response()

    upstream.script.append(hold)
    task, url = await _started(settings)
    try:
        async with aiohttp.ClientSession() as session, asyncio.timeout(60):
            request = asyncio.create_task(session.post(f"{url}/embeddings", json=GOOD))
            await arrived.wait()
            os.kill(os.getpid(), signal.SIGTERM)
            assert await task is signal.SIGTERM
            with pytest.raises(aiohttp.ClientError):
                await request
    finally:
        release.set()


async def test_the_grace_is_over_when_it_says(tmp_path, upstream, monkeypatch, caplog):
    """A hung upstream holds the end up for GRACE_SECONDS and CLOSE_S, and not for longer."""
    monkeypatch.setenv("OPENAI_API_KEY", "k")
    caplog.set_level("INFO", "embedding_proxy")
    monkeypatch.setattr(attempts, "CLOSE_S", 4 * GRACE_SECONDS)
    ahead, loop = 0.0, asyncio.get_running_loop()
    real = loop.time
    monkeypatch.setattr(loop, "time", lambda: real() + ahead)
    upstream.script.append(hang())
    patient = _settings(tmp_path, upstream, timeout_s=10 * GRACE_SECONDS)
    task, url = await _started(patient)
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=None)) as session:
        request = asyncio.create_task(session.post(f"{url}/embeddings", json=GOOD))
        await until(lambda: upstream.calls)
        os.kill(os.getpid(), signal.SIGTERM)
        await until(lambda: "stopping" in caplog.text)
        for _ in range(2):
            for _ in range(100):
                await asyncio.sleep(0)
            assert not task.done()
            ahead += GRACE_SECONDS / 2 + 2
        await until(lambda: "waiting up to" in caplog.text)
        assert not task.done()
        ahead += attempts.CLOSE_S
        async with asyncio.timeout(GRACE_SECONDS / 2):
            assert await task is signal.SIGTERM
        with pytest.raises(aiohttp.ClientError):
            await request


async def test_a_port_in_use_is_named(settings, tmp_path, upstream):
    """A port that another process listens on is an error with host, port and reason."""
    port = own_port()
    with socket.create_server(("127.0.0.1", port)):
        taken = _settings(tmp_path, upstream, port=port)
        with pytest.raises(
            PortUnavailable, match=rf"^cannot listen on 127\.0\.0\.1:{port}: .*in use"
        ):
            listen(taken)
    task, url = await _started(taken)
    assert url == f"http://127.0.0.1:{port}/v1"
    os.kill(os.getpid(), signal.SIGTERM)
    await task


@pytest.mark.parametrize(
    ("host", "message"),
    [
        ("192.0.2.1", r"192\.0\.2\.1:0: Cannot assign .*; server\.host is no address of this"),
        ("2001:db8::1", r"\[2001:db8::1\]:0: .*"),
        ("nowhere.invalid", r"nowhere\.invalid:0: .*; server\.host is no host name that this"),
    ],
)
def test_a_host_that_cannot_be_listened_on_is_told_with_a_remedy(
    host, message, tmp_path, upstream, monkeypatch
):
    """The error has the address as it can be pasted, the reason, and what to do."""

    def unknown(address, **_):
        if address[0].endswith(".invalid"):
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        return real(address)

    real = socket.create_server
    monkeypatch.setattr(socket, "create_server", unknown)
    settings = _settings(tmp_path, upstream, host=host, keys=["a-key"])
    with pytest.raises(PortUnavailable, match=f"^cannot listen on {message}"):
        listen(settings)


async def test_a_cache_that_cannot_be_opened_comes_before_the_port(settings, tmp_path):
    """Where the cache cannot be opened nothing is announced."""
    (tmp_path / "cache").write_text("")
    with listen(settings) as listening, pytest.raises(StoreError, match="cache"):
        await serve(settings, listening, pytest.fail)


@pytest.mark.parametrize(
    ("host", "url"),
    [("127.0.0.1", "http://127.0.0.1:{}/v1"), ("localhost", "http://127.0.0.1:{}/v1")],
)
def test_the_url_holds_the_real_port(host, url, tmp_path, upstream):
    """The URL is fit to be pasted: an address that was taken, and the port that was."""
    with listen(_settings(tmp_path, upstream, host=host)) as listening:
        assert process.base_url(listening) == url.format(listening.getsockname()[1])


def test_the_url_of_an_ipv6_address_has_brackets():
    """Brackets keep the address and the port apart."""
    listening = SimpleNamespace(getsockname=lambda: ("::1", 8080, 0, 0))
    assert process.base_url(listening) == "http://[::1]:8080/v1"
