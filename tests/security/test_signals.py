"""Signals to stop, sent to the real process: what has begun ends in order, and nothing hangs."""

import asyncio
import json
import os
import signal
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import suppress
from pathlib import Path

import aiohttp
import pytest
from aiohttp import WSMsgType, web
from any_server import AnyServer
from clock import until
from talk import Talk

MODEL = "text-embedding-3-small"
SECONDS = 60
BODY = json.dumps({"model": MODEL, "input": "a" * 1000}).encode()
SHORT_GRACE = 0.3


class Served:
    """The proxy as a process of its own, at the head of a process group."""

    def __init__(self, process: asyncio.subprocess.Process, url: str, log: Path) -> None:
        self.process = process
        self.url = url
        self._log = log

    @property
    def log(self) -> str:
        return self._log.read_text(encoding="utf-8")

    def send(self, number: signal.Signals, *, to_group: bool = False) -> None:
        """Send a signal: to the process, or to all that it has started as well."""
        (os.killpg if to_group else os.kill)(self.process.pid, number)

    async def is_stopping(self, times: int = 1) -> None:
        """Wait until that many processes have said that they stop."""
        await until(lambda: self.log.count("stopping: ") >= times)


Serve = Callable[..., Awaitable[Served]]


@pytest.fixture
async def serve(tmp_path, monkeypatch) -> AsyncIterator[Serve]:
    """Give a function that starts the proxy in front of an upstream."""
    monkeypatch.setenv("OPENAI_API_KEY", "k")
    started = []

    async def start(base_url: str, workers: int = 1, grace_s: float = 30) -> Served:
        config, log = tmp_path / "config.yaml", tmp_path / "log"
        content = {
            "server": {"port": 0, "workers": workers, "grace_s": grace_s},
            "cache": {"directory": str(tmp_path / "cache")},
            "providers": {"openai": {"base_url": base_url}},
        }
        config.write_text(json.dumps(content))  # JSON is YAML
        with log.open("wb") as errors:
            process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", "embedding_proxy", "serve", "--config", str(config)),
                stdout=asyncio.subprocess.PIPE,
                stderr=errors,
                start_new_session=True,
            )
        started.append(process)
        line = (await process.stdout.readline()).decode()
        assert line.startswith("export OPENAI_BASE_URL="), log.read_text()
        return Served(process, line.partition("=")[2].strip(), log)

    yield start
    for process in started:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        await process.wait()


def _head(path: str, *lines: bytes) -> bytes:
    # The reply to `Expect` tells that the head was read.
    head = (f"POST {path} HTTP/1.1".encode(), b"Host: localhost", b"Expect: 100-continue", *lines)
    return b"\r\n".join((*head, b"Content-Length: %d" % len(BODY))) + b"\r\n\r\n"


async def _begun(url: str) -> Talk:
    """Return a request whose head was read, and whose body is yet to come."""
    talk = await Talk(url, _head("/v1/embeddings")).__aenter__()
    assert b" 100 " in await talk.reader.readuntil(b"\r\n\r\n")
    return talk


STOPS = {
    "SIGTERM": (signal.SIGTERM, 1, False, 0),
    "SIGINT": (signal.SIGINT, 1, False, 130),
    "SIGTERM to two workers": (signal.SIGTERM, 2, False, 0),
    "SIGINT to two workers": (signal.SIGINT, 2, False, 130),
    "SIGTERM to the whole group": (signal.SIGTERM, 2, True, 0),
    "Ctrl-C": (signal.SIGINT, 2, True, 130),
}


@pytest.mark.parametrize("case", STOPS)
async def test_bodies_that_arrive_are_read_and_answered(case, serve, upstream):
    """Whoever is told, and by whichever signal, and however many workers there are."""
    number, workers, to_group, code = STOPS[case]
    async with asyncio.timeout(SECONDS):
        served = await serve(upstream.url, workers)
        talks = [await _begun(served.url) for _ in range(4)]
        served.send(number, to_group=to_group)
        await served.is_stopping(workers)
        for talk in talks:
            await talk.send(BODY)
            status, headers, _ = await talk.response()
            assert (status, headers["connection"]) == (200, "close")
            assert await talk.is_over()
            talk.writer.close()
        assert await served.process.wait() == code
    assert "Traceback" not in served.log


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=str)
async def test_a_second_signal_ends_it_at_once(number, workers, serve, upstream):
    """Requests in progress are dropped, those of workers too."""
    async with asyncio.timeout(SECONDS):
        served = await serve(upstream.url, workers, grace_s=3600)
        talk = await _begun(served.url)
        served.send(number)
        await served.is_stopping(workers)
        served.send(number)
        # Python tells of Ctrl-C in its own way.
        assert await served.process.wait() in {-number, 130 if number == signal.SIGINT else None}
        assert await talk.is_over()
        talk.writer.close()


async def _streaming(act: Callable[[web.StreamResponse], Awaitable[None]]) -> AnyServer:
    async def stream(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        await response.write(b"data: 1\n\n")
        await act(response)
        return response

    return AnyServer(stream)


@pytest.mark.parametrize("workers", [1, 2])
async def test_a_stream_goes_on_until_its_end(workers, serve):
    """Its last events come after the signal, and then the process ends."""
    gate = asyncio.Event()

    async def rest(response: web.StreamResponse) -> None:
        await gate.wait()
        await response.write(b"data: 2\n\n")

    async with (
        asyncio.timeout(SECONDS),
        await _streaming(rest) as other,
        aiohttp.ClientSession() as session,
    ):
        served = await serve(other.url, workers)
        async with session.post(f"{served.url}/responses", json={}) as response:
            assert await response.content.readline() == b"data: 1\n"
            served.send(signal.SIGTERM)
            await served.is_stopping(workers)
            gate.set()
            assert (await response.content.read()).endswith(b"data: 2\n\n")
        assert await served.process.wait() == 0
    assert "Traceback" not in served.log


async def test_a_stream_without_an_end_is_cut_after_the_grace(serve):
    """So that no half is taken for the whole."""

    async def rest(_: web.StreamResponse) -> None:
        await asyncio.Event().wait()

    async with (
        asyncio.timeout(SECONDS),
        await _streaming(rest) as other,
        aiohttp.ClientSession() as session,
    ):
        served = await serve(other.url, grace_s=SHORT_GRACE)
        async with session.post(f"{served.url}/responses", json={}) as response:
            assert await response.content.readline() == b"data: 1\n"
            served.send(signal.SIGTERM)
            with pytest.raises(aiohttp.ClientError):
                await response.content.read()
        assert await served.process.wait() == 0
    assert "Traceback" not in served.log


@pytest.mark.parametrize("workers", [1, 2])
async def test_websockets_are_closed_after_the_grace(workers, serve):
    """Messages go on meanwhile; then both ends hear that the proxy goes away (1001)."""
    codes = []

    async def act(request: web.Request) -> web.StreamResponse:
        ends = web.WebSocketResponse()
        await ends.prepare(request)
        async for message in ends:
            await ends.send_str(message.data)
        codes.append(ends.close_code)
        return ends

    async with (
        asyncio.timeout(SECONDS),
        AnyServer(act) as other,
        aiohttp.ClientSession() as session,
    ):
        served = await serve(other.url, workers, grace_s=2)
        async with session.ws_connect(f"{served.url}/realtime") as talk:
            served.send(signal.SIGTERM)
            await talk.send_str("still there")
            assert (await talk.receive()).data == "still there"
            last = await talk.receive()
            assert (last.type, talk.close_code) == (WSMsgType.CLOSE, 1001)
        assert await served.process.wait() == 0
    assert codes == [1001]
    assert "Traceback" not in served.log


async def test_a_reply_that_nobody_reads_holds_up_nothing(serve, upstream):
    """For longer than the grace."""
    inputs = [str(number) for number in range(500)]
    body = json.dumps({"model": MODEL, "input": inputs, "encoding_format": "float"}).encode()
    head = b"POST /v1/embeddings HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n"
    async with asyncio.timeout(SECONDS):
        served = await serve(upstream.url, grace_s=SHORT_GRACE)
        async with Talk(served.url, head % len(body) + body) as talk:
            await talk.reader.readuntil(b"\r\n\r\n")
            served.send(signal.SIGTERM)
            assert await served.process.wait() == 0
    assert "Traceback" not in served.log
