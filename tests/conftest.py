"""What the suites share: upstreams on real sockets, the proxy on a real port, waits of zero."""

import asyncio
import atexit
import ctypes
import gc
import itertools
import logging
import math
import os
import shutil
import signal
import sys
import tempfile
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Generator, Iterator
from contextlib import AsyncExitStack, suppress
from functools import cache, cached_property
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import aiohttp
import hypothesis
import openai
import pytest
from aiohttp import web, web_app
from aioresponses import aioresponses
from any_server import AnyServer
from clock import some_turns
from command import Run, runner
from embedding_proxy.cache.disk import writer
from embedding_proxy.providers import attempts, local
from embedding_proxy.proxy.cli import output
from embedding_proxy.proxy.config.schema import Settings
from embedding_proxy.proxy.http import control, passthrough_upstream
from embedding_proxy.proxy.http.app import SERVICE, build_app
from embedding_proxy.proxy.http.app_runner import Runner
from embedding_proxy.proxy.http.metrics import Metrics
from embedding_proxy.proxy.http.response_cache import (
    CachedResponse,
    RequestKey,
    ResponseCache,
)
from embedding_proxy.proxy.http.status import Status
from embedding_proxy.proxy.service import client_keys
from embedding_proxy.proxy.service.embedding_service import EmbeddingService
from fault_server import FaultServer
from leaks import WATCH, watch_connections

os.environ["HF_HUB_OFFLINE"] = "1"
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # So it is where a shell put this into the background; proxies begun here would inherit it.
    signal.signal(signal.SIGINT, signal.default_int_handler)
TRIALS = {
    "test_batches",
    "test_clients",
    "test_crash",
    "test_disk_faults",
    "test_eviction_load",
    "test_example",
    "test_faults",
    "test_flow",
    "test_full_store",
    "test_fuzz",
    "test_index_trial",
    "test_lease_trial",
    "test_migrate",
    "test_oracle",
    "test_outage",
    "test_page_damage",
    "test_redis_cluster",
    "test_shared_leases",
    "test_shared_store",
    "test_shared_tier",
    "test_shared_trial",
    "test_storage_promises",
}
"""The tests that try the whole for long; what they pass through is tested part by part."""
SLOW = {
    "test_archive",
    "test_backup",
    "test_blocking",
    "test_cache_commands",
    "test_canary",
    "test_carry",
    "test_carver",
    "test_charges",
    "test_check",
    "test_cli",
    "test_dashboard_page",
    "test_client_keys",
    "test_compare",
    "test_config_pairs",
    "test_config_round_trip",
    "test_credential",
    "test_damage",
    "test_demo",
    "test_environments",
    "test_errors_page",
    "test_eviction",
    "test_exit_codes",
    "test_fallback",
    "test_forms",
    "test_indexing",
    "test_keys",
    "test_learned",
    "test_ledger",
    "test_limits",
    "test_lost_log",
    "test_makefile",
    "test_membership",
    "test_migrate_command",
    "test_migrate_run",
    "test_misses",
    "test_nodes",
    "test_outliving",
    "test_passthrough",
    "test_paths",
    "test_private_names",
    "test_provider_shapes",
    "test_purge",
    "test_reading_commands",
    "test_real",
    "test_schema",
    "test_short_reads",
    "test_steps",
    "test_upstream_answers",
    "test_workers",
    "test_write_ahead_log",
}
"""Further tests that `make quick` leaves out, beside those of `security/`: each takes seconds."""

LOGGERS = ("embedding_proxy", "embedding_proxy.migrate", "embedding_proxy.qdrant", "httpx")
"""Those whose level a command sets."""

MEMORY_BYTES = 8 << 30
"""What must be free there, since a run of the suite takes some gigabytes."""

collect_ignore = ["clients"]
"""Scripts that run in environments of their own."""

# New examples are drawn at each run: fewer at a time lose little, and keep the suite short. None
# may fail for the time it takes.
hypothesis.settings.register_profile("suite", max_examples=25, deadline=None)
hypothesis.settings.load_profile("suite")


# Half a second and 70 MB each time.
local._load = cache(local._load)


def pytest_configure(config: pytest.Config) -> None:
    """Make the thousands of small stores, which are synced, in memory, where there is room.

    It halves the time of the suite. `TMPDIR` says otherwise.
    """
    memory = Path("/dev/shm")
    if hasattr(config, "workerinput") or "TMPDIR" in os.environ or not os.access(memory, os.W_OK):
        return
    if shutil.disk_usage(memory).free > MEMORY_BYTES:
        folder = tempfile.mkdtemp(prefix="tests-", dir=memory)
        os.environ["TMPDIR"] = tempfile.tempdir = folder
        # Last of all: services that a test left open are closed at the end of the process, too.
        atexit.register(shutil.rmtree, folder, ignore_errors=True)


def pytest_collection_finish() -> None:
    """Take the tests themselves for permanent.

    Full collections wait until a quarter as many objects have come as there are: beside those of
    9,000 tests that is so rare that hundreds of megabytes of cycles gather.
    """
    gc.collect()
    gc.freeze()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what `make quick` leaves out."""
    for item in items:
        if item.path.stem in TRIALS | SLOW or item.path.parent.name == "security":
            item.add_marker("slow")


TESTS = itertools.count(1)


def pytest_runtest_logfinish() -> None:
    """Give back to the system, from time to time, what large bodies have left free on the heap."""
    if next(TESTS) % 100 == 0:
        gc.collect()
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if os.name == "posix" else None
        if trim is not None:
            trim(0)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None]:
    """Measure no coverage in the trials of the whole, nor where a test says `untraced`.

    Measuring takes half of their time or more. It is done here because pytest-cov's own `no_cover`
    has no effect in the processes of xdist.
    """
    if item.path.stem not in TRIALS and item.get_closest_marker("untraced") is None:
        return (yield)
    own, of_threads = sys.gettrace(), threading.gettrace()
    sys.settrace(None)
    threading.settrace(None)
    try:
        return (yield)
    finally:
        threading.settrace(of_threads)
        sys.settrace(own)


watch_connections()

if hasattr(signal, "SIGHUP"):
    # Under `nohup` it is ignored, and what the tests start would inherit that and never end by it.
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


LEVELS = {logger: logger.level for logger in map(logging.getLogger, (None, *LOGGERS))}


@pytest.fixture(autouse=True)
def _no_leaks(tmp_path: Path) -> Iterator[None]:
    """Fail a test in which a key, or a text, came out where it should not."""
    WATCH.begin()
    root = logging.getLogger()
    root.addHandler(WATCH)
    yield
    root.removeHandler(WATCH)
    # A command sets levels for its process, which here goes on to other tests.
    for logger, level in LEVELS.items():
        if logger.level != level:
            logger.setLevel(level)
    problems = WATCH.problems(tmp_path / "cache")
    assert not problems, "\n".join(problems[:20])


async def no_wait(_: float) -> None:
    """Wait between attempts for no time at all."""


@pytest.fixture(autouse=True)
def _no_keys(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Keep the machine's own keys, proxies and cache out of every test."""
    names = ("OPENAI_API_KEY", "OPENROUTER_API_KEY", "OPENAI_BASE_URL", "EMBEDDING_PROXY_CONFIG")
    for name in names:
        monkeypatch.delenv(name, raising=False)
    for name in ("XDG_DATA_HOME", "XDG_CONFIG_HOME"):
        monkeypatch.setenv(name, str(tmp_path / "xdg"))


@pytest.fixture(autouse=True)
def _short_stop(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let no upstream that says nothing hold up the end of a test."""
    monkeypatch.setattr(attempts, "CLOSE_S", 0.01)


PATIENT = (
    (client_keys, "PROOF_S", 60.0),
    (control, "PATIENCE_S", 60.0),
    (output, "LINE_SECONDS", math.inf),
    (passthrough_upstream, "_LIST_SECONDS", 60.0),
    (writer, "WARNING_SECONDS", math.inf),
)
"""Limits that a machine which is slow enough reaches, in seconds."""


@pytest.fixture(autouse=True)
def _patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let no such limit decide a test; one that is about a limit sets it."""
    for module, name, seconds in PATIENT:
        monkeypatch.setattr(module, name, seconds)


@pytest.fixture
async def move(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], Awaitable[None]]:
    """Give a function that moves the clock of the event loop by so many seconds.

    What is given a time that no machine needs, and is moved beyond it once all is as the test wants
    it, ends by no chance.
    """
    loop, ahead = asyncio.get_running_loop(), 0.0
    if not isinstance(loop, asyncio.BaseEventLoop):
        pytest.skip("uvloop's clock cannot be moved")
    real = loop.time
    monkeypatch.setattr(loop, "time", lambda: real() + ahead)

    async def forward(seconds: float) -> None:
        nonlocal ahead
        ahead += seconds
        await some_turns()

    return forward


@pytest.fixture
async def upstream() -> AsyncIterator[FaultServer]:
    """Give the first provider's upstream ("openai")."""
    async with FaultServer() as server:
        yield server


@pytest.fixture
async def second() -> AsyncIterator[FaultServer]:
    """Give the second provider's upstream ("openrouter")."""
    async with FaultServer() as server:
        yield server


@pytest.fixture
async def other() -> AsyncIterator[AnyServer]:
    """Give an upstream that other calls than those for embeddings are passed to."""
    async with AnyServer() as server:
        yield server


IS_FAST = os.environ.get("TEST_FAST_PATH", "on") == "on"
"""TEST_FAST_PATH=off has the whole suite run with `server.fast_path: false`."""


if os.environ.get("TEST_LOOP") == "uvloop":
    import uvloop

    def pytest_asyncio_loop_factories() -> dict[str, Callable[[], asyncio.AbstractEventLoop]]:
        """Have the tests run on the loop that the proxy runs on."""
        return {"uvloop": uvloop.new_event_loop}


class Proxy:
    """The proxy on a real port, with a client of each sort."""

    def __init__(self, url: str, app: web.Application, session: aiohttp.ClientSession) -> None:
        self.url = url
        self.app = app
        self.http = session

    @cached_property
    def client(self) -> openai.AsyncOpenAI:
        """The official client; without certificates, which take some 50 ms to read."""
        http = openai.DefaultAsyncHttpxClient(verify=False)
        return openai.AsyncOpenAI(
            base_url=self.url, api_key="client-key", max_retries=0, http_client=http
        )

    async def close(self) -> None:
        """Close the client, if there is one."""
        if "client" in self.__dict__:
            await self.client.close()

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


class StartProxy:
    """Starts proxies that share a cache directory; `stop` and another start is a restart."""

    def __init__(self, directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self._directory = directory
        self._monkeypatch = monkeypatch
        self._stack = AsyncExitStack()
        self._proxies: list[Proxy] = []

    async def __call__(
        self,
        openai: FaultServer | None = None,
        openrouter: FaultServer | None = None,
        **sections: Any,
    ) -> Proxy:
        """Start a proxy with these upstreams, their keys set, and these sections of the config."""
        servers = {"openai": openai, "openrouter": openrouter}
        used = {name: server for name, server in servers.items() if server is not None}
        for name in used:
            self._monkeypatch.setenv(f"{name.upper()}_API_KEY", f"{name}-secret-key")
        if used:
            urls = {name: {"base_url": server.url} for name, server in used.items()}
            sections = {"providers": urls, **sections}
        # Nothing is passed through unless a test says so.
        sections = {"passthrough": None, **sections}
        # Tests that write requests byte by byte name the host `h`.
        server = {"allowed_hosts": ["h"], "fast_path": IS_FAST}
        sections["server"] = {**server, **sections.get("server", {})}
        cache = {"directory": str(self._directory), **sections.get("cache", {})}
        sections = {**sections, "cache": cache}
        settings = Settings.model_validate(sections)
        app = build_app(settings, EmbeddingService(settings, sleep=no_wait))
        runner = Runner(app, shutdown_timeout=0.01)
        await runner.setup()
        self._stack.push_async_callback(runner.cleanup)
        await runner.listen()
        session = await self._stack.enter_async_context(aiohttp.ClientSession())
        proxy = Proxy(f"http://127.0.0.1:{runner.addresses[0][1]}/v1", app, session)
        self._stack.push_async_callback(proxy.close)
        self._proxies.append(proxy)
        return proxy

    async def stop(self) -> None:
        """Stop all proxies that were started."""
        self._proxies.clear()
        await self._stack.aclose()

    async def tell(self) -> None:
        """Note what the proxies that run tell of themselves; see `leaks`."""
        for proxy in self._proxies:
            for page in (Status, Metrics):
                with suppress(Exception):  # A test may have broken anything.
                    async with asyncio.timeout(2):
                        told = await page(proxy.service).get(None)
                    WATCH.note(page.__name__, told.body.decode())


@pytest.fixture
async def start_proxy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[StartProxy]:
    """Give a function that starts proxies in front of fault servers."""
    start = StartProxy(tmp_path / "cache", monkeypatch)
    yield start
    await start.tell()
    await start.stop()
    # aiohttp would keep the last 1,024 proxies alive, with all that they hold in memory.
    for cached in vars(web_app).values():
        if hasattr(cached, "cache_clear"):
            cached.cache_clear()


@pytest.fixture
def repeated(monkeypatch: pytest.MonkeyPatch) -> list[CachedResponse]:
    """Give a list of the replies that were given again, without anything being parsed."""
    if not IS_FAST:
        pytest.skip("the fast path is off")
    given: list[CachedResponse] = []
    get = ResponseCache.get

    def noted(cache: ResponseCache, key: RequestKey, body: bytes) -> CachedResponse | None:
        kept = cache.lru.get(key.whole)
        kept = cache.lru.get(kept) if isinstance(kept, bytes) else kept
        response = get(cache, key, body)
        if response is not None and response is kept:
            given.append(response)
        return response

    monkeypatch.setattr(ResponseCache, "get", noted)
    return given


@pytest.fixture
def at_once(monkeypatch: pytest.MonkeyPatch) -> list[CachedResponse]:
    """Give a list of the replies to bodies under heads that had come before."""
    if not IS_FAST:
        pytest.skip("the fast path is off")
    given: list[CachedResponse] = []
    get = ResponseCache.get

    def noted(cache: ResponseCache, key: RequestKey, body: bytes) -> CachedResponse | None:
        kept = cache.lru.get(key.whole)
        kept = cache.lru.get(kept) if isinstance(kept, bytes) else kept
        response = get(cache, key, body)
        if response is not None and response is not kept:
            given.append(response)
        return response

    monkeypatch.setattr(ResponseCache, "get", noted)
    return given


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Give a function that runs `embedding-proxy` in this process."""
    return runner(monkeypatch, capsys)


class _Response(aiohttp.ClientResponse):
    """What aiohttp 3.14 asks of a response and aioresponses 0.7.9 does not know: a writer."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, stream_writer=Mock(output_size=0), **kwargs)


@pytest.fixture
def mocked_http(monkeypatch: pytest.MonkeyPatch) -> Iterator[aioresponses]:
    """Answer aiohttp's requests without a socket: `mocked_http.post(url, payload=…)`."""
    monkeypatch.setattr("aioresponses.core.ClientResponse", _Response)
    with aioresponses() as mocked:
        yield mocked
