"""No file descriptor left: a line in the log, hits go on, no provider is blamed, it recovers."""

import asyncio
import errno
import json
import resource
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import AsyncExitStack
from pathlib import Path

import aiohttp
import pytest
from embedding_proxy.providers import descriptors
from qdrant_server import QdrantServer
from talk import Talk

MODEL = "text-embedding-3-small"
LIMIT = 64
SECONDS = 60


def _post(text: str, path: str = "/v1/embeddings") -> bytes:
    body = json.dumps({"model": MODEL, "input": text}).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n\r\n"
    return head.encode() + body


async def _ask(talk: Talk, request: bytes) -> tuple[int, dict[str, str], dict]:
    await talk.send(request)
    return await talk.response()


class Served:
    """The proxy as a process of its own."""

    def __init__(self, process: subprocess.Popen[bytes], url: str, log: Path) -> None:
        self.process = process
        self.url = url
        self._log = log

    @property
    def log(self) -> str:
        return self._log.read_text(encoding="utf-8")

    def limit(self, soft: int) -> None:
        """Let it have that many descriptors from now on."""
        resource.prlimit(self.process.pid, resource.RLIMIT_NOFILE, (soft, LIMIT))

    def lowest_free(self) -> int:
        """Return the number that its next descriptor would have."""
        taken = {int(path.name) for path in Path(f"/proc/{self.process.pid}/fd").iterdir()}
        return next(number for number in range(LIMIT) if number not in taken)


@pytest.fixture(params=["uvloop", "asyncio"])
def serve(request, tmp_path, upstream, monkeypatch) -> Iterator[Callable[..., Served]]:
    """Give a function that starts `embedding-proxy serve` under `ulimit -n 64`, on either loop."""
    monkeypatch.setenv("OPENAI_API_KEY", "k")
    config = tmp_path / "config.yaml"
    log = tmp_path / "log"
    started = []

    own_loop = "cli._loop_factory = lambda: None;" if request.param == "asyncio" else ""
    code = f"from embedding_proxy.proxy.cli import main as cli; {own_loop} cli.main()"
    command = [sys.executable, "-c", code, "serve", "--config", str(config)]

    def start(**sections: object) -> Served:
        content = {
            "server": {"port": 0},
            "cache": {"directory": str(tmp_path / "cache"), "memory_mib": 0},
            "providers": {"openai": {"base_url": upstream.url}},
            **sections,
        }
        config.write_text(json.dumps(content))  # JSON is YAML
        with log.open("wb") as errors:
            process = subprocess.Popen(
                ["/bin/sh", "-c", f'ulimit -n {LIMIT} && exec "$@"', "sh", *command],
                stdout=subprocess.PIPE,
                stderr=errors,
            )
        started.append(process)
        line = process.stdout.readline().decode()
        assert line.startswith("export OPENAI_BASE_URL="), log.read_text()
        return Served(process, line.partition("=")[2].strip(), log)

    yield start
    for process in started:
        process.kill()
        process.wait()
        process.stdout.close()


async def _buy_before(start_proxy, upstream) -> None:
    """Put a text into the cache that the process is going to open."""
    proxy = await start_proxy(openai=upstream)
    assert (await proxy.post({"model": MODEL, "input": "known"})).status == 200
    await start_proxy.stop()


async def test_silent_connections_under_ulimit_64(serve, start_proxy, upstream):
    """Two hundred of them: a line in the log, hits and misses go on, and nothing is blamed."""
    await _buy_before(start_proxy, upstream)
    served = await asyncio.to_thread(serve)
    async with asyncio.timeout(SECONDS), AsyncExitStack() as stack:
        for _ in range(200):
            await stack.enter_async_context(Talk(served.url, b""))
        for text, found in (("known", "hit"), ("new", "miss"), ("new", "hit")):
            status = 503
            while status == 503:  # Until the silent ones have waited for long enough.
                async with Talk(served.url, _post(text)) as talk:
                    status, headers, _ = await talk.response()
            assert (status, headers["x-cache"]) == (200, found)
    assert "is reached: connections that wait for a request are closed for new ones" in served.log
    assert "Traceback" not in served.log
    served.process.send_signal(signal.SIGTERM)
    assert await asyncio.to_thread(served.process.wait, SECONDS) == 0


@pytest.mark.skipif(not hasattr(resource, "prlimit"), reason="only Linux has prlimit")
async def test_no_descriptor_left(serve, start_proxy, upstream):
    """Hits are served, a miss is the proxy's own 503, and both recover; the log tells it once."""
    await _buy_before(start_proxy, upstream)
    served = await asyncio.to_thread(serve)
    async with asyncio.timeout(SECONDS), Talk(served.url, _post("known")) as talk:
        assert (await talk.response())[1]["x-cache"] == "hit"
        while "no file descriptor is left" not in served.log:
            served.limit(served.lowest_free())
            assert (await _ask(talk, _post("known")))[1]["x-cache"] == "hit"
        for path in ("/v1/embeddings", "/v1/files"):
            for _ in range(8):  # More often than a circuit breaker bears.
                status, headers, content = await _ask(talk, _post("new", path))
                assert (status, headers["retry-after"]) == (503, "1")
                assert content["error"]["code"] == "proxy_overloaded"
                assert "openai" not in content["error"]["message"]
        assert (await _ask(talk, _post("known")))[1]["x-cache"] == "hit"
        assert len(upstream.calls) == 1
        served.limit(LIMIT)
        assert (await _ask(talk, _post("new")))[1]["x-cache"] == "miss"
        async with Talk(served.url, _post("known")) as new:
            assert (await new.response())[1]["x-cache"] == "hit"
    assert served.log.count("no file descriptor is left") == 1
    assert "Traceback" not in served.log


@pytest.mark.skipif(not hasattr(resource, "prlimit"), reason="only Linux has prlimit")
async def test_store_ledger_and_outbox_without_a_descriptor(
    serve, start_proxy, upstream, tmp_path, command
):
    """What is on disk is served and counted, what is to be indexed is kept, and then it arrives."""
    async with QdrantServer() as qdrant:
        proxy = await start_proxy(openai=upstream)
        texts = [str(number) for number in range(20)]
        assert (await proxy.post({"model": MODEL, "input": texts})).status == 200
        await start_proxy.stop()
        index = {"qdrant": {"url": qdrant.url}}
        served = await asyncio.to_thread(serve, index=index)
        async with asyncio.timeout(SECONDS), Talk(served.url, _post("0")) as talk:
            assert (await talk.response())[1]["x-cache"] == "hit"
            while "no file descriptor is left" not in served.log:
                # Anew each time: what was in use for a moment only may be free again.
                served.limit(served.lowest_free())
                await asyncio.sleep(0.01)
            for text in texts:
                status, headers, _ = await _ask(talk, _post(text))
                assert (status, headers["x-cache"]) == (200, "hit")
            served.limit(LIMIT)
            while len(await qdrant.points(f"{MODEL}-1536")) < len(texts):  # noqa: ASYNC110
                await asyncio.sleep(0.01)
        served.process.send_signal(signal.SIGTERM)
        assert await asyncio.to_thread(served.process.wait, SECONDS) == 0
    assert "Traceback" not in served.log
    assert len(upstream.calls) == 1
    stats = json.loads(
        command("cache", "stats", "--json", "--config", str(tmp_path / "config.yaml")).out
    )
    assert (stats["entries"], stats["hits"], stats["misses"]) == (20, 21, 20)


def _connector_error(number: int | None, kind: type[OSError] = OSError) -> aiohttp.ClientError:
    inner = kind(number, "x") if number is not None else kind("several")
    place = type("Key", (), {"host": "h", "port": 1, "ssl": True, "is_ssl": False})()
    return aiohttp.ClientConnectorError(place, inner)


@pytest.mark.parametrize(
    ("error", "exhausted", "cause"),
    [
        (OSError(errno.EMFILE, "x"), False, True),
        (_connector_error(errno.ENFILE), False, True),
        (_connector_error(errno.ECONNREFUSED), True, False),
        (_connector_error(None), True, True),
        (_connector_error(None), False, False),
        (_connector_error(socket.EAI_AGAIN, socket.gaierror), True, True),
        (_connector_error(socket.EAI_AGAIN, socket.gaierror), False, False),
        (ConnectionResetError(errno.ECONNRESET, "x"), True, False),
        (TimeoutError(), True, False),
    ],
    ids=str,
)
def test_what_is_for_want_of_a_descriptor(error, exhausted, cause, monkeypatch):
    """Where an error does not say so itself, as a resolver's, it is tried out."""
    monkeypatch.setattr(descriptors, "is_exhausted", lambda: exhausted)
    assert descriptors.is_cause(error) is cause


def test_a_warning_comes_once_a_minute():
    """The first at once, then after each minute."""
    times = iter((0.0, 1.0, 59.9, 60.0, 61.0, 200.0))
    occasional = descriptors.Interval(lambda: next(times))
    assert [occasional.is_due() for _ in range(6)] == [True, False, False, True, False, True]


def test_the_soft_limit_is_raised_to_the_hard_one():
    """As servers do: most systems give a thousand to begin with."""
    code = (
        "import resource as r; from embedding_proxy.providers import descriptors as d;"
        "r.setrlimit(r.RLIMIT_NOFILE, (50, 200)); d.raise_limit();"
        "print(r.getrlimit(r.RLIMIT_NOFILE), 150 < d.left() < 200, d.is_exhausted())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "(200, 200) True False\n"
