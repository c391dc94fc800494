"""What the suites share: upstreams on real sockets, the proxy on a real port, waits of zero."""

import os
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import aiohttp
import openai
import pytest
from aiohttp import web
from fault_server import FaultServer

from proxy.app import SERVICE, build_app
from proxy.service import EmbeddingService
from proxy.settings import Settings

os.environ["HF_HUB_OFFLINE"] = "1"


async def no_wait(_: float) -> None:
    """Wait between attempts for no time at all."""


@pytest.fixture(autouse=True)
def _no_keys(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Keep the machine's own keys, proxies and cache out of every test."""
    for name in ("OPENAI_API_KEY", "OPENROUTER_API_KEY", "OPENAI_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "xdg"))


@pytest.fixture
async def upstream() -> AsyncIterator[FaultServer]:
    """The first provider's upstream ("openai")."""
    async with FaultServer() as server:
        yield server


@pytest.fixture
async def second() -> AsyncIterator[FaultServer]:
    """The second provider's upstream ("openrouter")."""
    async with FaultServer() as server:
        yield server


class Proxy:
    """The proxy on a real port, with a client of each sort."""

    def __init__(self, url: str, app: web.Application, session: aiohttp.ClientSession) -> None:
        self.url = url
        self.app = app
        self.http = session
        self.client = openai.AsyncOpenAI(base_url=url, api_key="client-key", max_retries=0)

    @property
    def service(self) -> EmbeddingService:
        return self.app[SERVICE]

    async def post(self, body: object, **headers: str) -> aiohttp.ClientResponse:
        """POST to /embeddings and return the response, its body read."""
        async with self.http.post(
            f"{self.url}/embeddings",
            **({"data": body} if isinstance(body, bytes) else {"json": body}),
            headers=headers,
        ) as response:
            await response.read()
            return response


StartProxy = Callable[..., Awaitable[Proxy]]


@pytest.fixture
async def start_proxy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[StartProxy]:
    """Start proxies: `await start_proxy(openai=upstream, openrouter=second, server={…})`.

    Keyword arguments `openai` and `openrouter` are fault servers, all others sections of the
    configuration. Proxies of one test share a cache directory; `await start_proxy.stop()` is how
    a test restarts: stop, then start another.
    """
    async with AsyncExitStack() as stack:

        async def start(
            openai: FaultServer | None = None,
            openrouter: FaultServer | None = None,
            **sections: Any,
        ) -> Proxy:
            servers = {"openai": openai, "openrouter": openrouter}
            used = {name: server for name, server in servers.items() if server is not None}
            for name in used:
                monkeypatch.setenv(f"{name.upper()}_API_KEY", f"{name}-secret-key")
            settings = Settings.model_validate(
                {
                    "cache": {"directory": str(tmp_path / "cache")},
                    "providers": {
                        name: {"base_url": server.url} for name, server in used.items()
                    },
                    **sections,
                }
            )
            service = EmbeddingService(settings, sleep=no_wait)
            app = build_app(settings, service)
            runner = web.AppRunner(app, access_log=None, shutdown_timeout=0)
            await runner.setup()
            stack.push_async_callback(runner.cleanup)
            await web.TCPSite(runner, "127.0.0.1", 0).start()
            session = await stack.enter_async_context(aiohttp.ClientSession())
            proxy = Proxy(f"http://127.0.0.1:{runner.addresses[0][1]}/v1", app, session)
            stack.push_async_callback(proxy.client.close)
            return proxy

        async def stop() -> None:
            await stack.aclose()

        start.stop = stop  # type: ignore[attr-defined]
        yield start
