"""SIGTERM while a body arrives: what has begun is read to its end and answered."""

import asyncio
import json
import os
import signal

import pytest
from any_server import AnyServer
from clock import until
from embedding_proxy.proxy.config.schema import Settings
from embedding_proxy.proxy.http.process import base_url, listen, serve
from fault_server import FaultServer
from talk import Talk

BODY = json.dumps({"model": "text-embedding-3-small", "input": "a" * 1000}).encode()
SECONDS = 60


def _head(path: str, *lines: bytes, length: int = len(BODY)) -> bytes:
    # The reply to `Expect` tells that the head was read.
    head = (f"POST {path} HTTP/1.1".encode(), b"Host: localhost", b"Expect: 100-continue", *lines)
    return b"\r\n".join((*head, b"Content-Length: %d" % length)) + b"\r\n\r\n"


@pytest.fixture
async def serving(tmp_path, upstream, monkeypatch, caplog):
    """Give a function that starts a proxy and returns its task and URL; and one that stops it."""
    monkeypatch.setenv("OPENAI_API_KEY", "k")
    caplog.set_level("INFO", "embedding_proxy.server")
    tasks = []

    async def start(
        other: AnyServer | FaultServer = upstream, grace_s: float = 30
    ) -> tuple[asyncio.Task, str]:
        settings = Settings.model_validate(
            {
                "server": {"port": 0, "grace_s": grace_s},
                "cache": {"directory": str(tmp_path / "cache")},
                "providers": {"openai": {"base_url": other.url}},
            }
        )
        listening = listen(settings)
        ready = asyncio.Event()
        tasks.append(asyncio.create_task(serve(settings, listening, ready.set)))
        await ready.wait()
        return tasks[-1], base_url(listening)

    yield start
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


async def _stop(caplog) -> None:
    """Send SIGTERM, and return once the proxy does what it does at first."""
    os.kill(os.getpid(), signal.SIGTERM)
    await until(lambda: "stopping" in caplog.text)
    for _ in range(100):
        await asyncio.sleep(0)


async def _continued(talk: Talk) -> None:
    assert b" 100 " in await talk.reader.readuntil(b"\r\n\r\n")


@pytest.mark.parametrize("arrived", [0, 1, len(BODY) - 1])
async def test_a_body_that_arrives_is_read_and_answered(arrived, serving, upstream, caplog):
    """An embeddings request gets its vectors, and the connection is closed in order."""
    task, url = await serving()
    async with asyncio.timeout(SECONDS), Talk(url, _head("/v1/embeddings")) as talk:
        await _continued(talk)
        await talk.send(BODY[:arrived])
        await _stop(caplog)
        await talk.send(BODY[arrived:-1])
        await talk.send(BODY[-1:])
        status, headers, content = await talk.response()
        assert (status, headers["connection"]) == (200, "close")
        assert len(content["data"]) == 1
        assert await talk.is_over()
        assert await task is signal.SIGTERM
    assert len(upstream.inputs) == 1


async def test_a_call_that_is_passed_on_is_finished_too(serving, caplog):
    """Its body goes on to the upstream, and the reply comes back."""
    async with AnyServer() as other:
        task, url = await serving(other)
        line = b"Content-Type: application/json"
        async with asyncio.timeout(SECONDS), Talk(url, _head("/v1/files", line)) as talk:
            await _continued(talk)
            await talk.send(BODY[:5])
            await until(lambda: other.seen)
            await _stop(caplog)
            await talk.send(BODY[5:-1])
            await talk.send(BODY[-1:])
            head = await talk.reader.readuntil(b"\r\n\r\n")
            assert head.startswith(b"HTTP/1.1 200 ")
            assert await talk.reader.readexactly(len(BODY)) == BODY
            assert await talk.is_over()
            assert await task is signal.SIGTERM


async def test_requests_that_were_read_in_a_row_are_all_answered(serving, upstream, caplog):
    """Those that were read before the signal are; one that comes after it is not."""
    task, url = await serving()
    upstream.gate = asyncio.Event()
    plain = _head("/v1/embeddings").replace(b"Expect: 100-continue\r\n", b"")
    bad = _head("/v1/embeddings", length=2).replace(b"Expect: 100-continue\r\n", b"") + b"{}"
    async with asyncio.timeout(SECONDS), Talk(url, plain + BODY + bad) as talk:
        await until(lambda: upstream.calls)
        await _stop(caplog)
        await talk.send(bad)
        upstream.gate.set()
        assert [(await talk.response())[0] for _ in range(2)] == [200, 400]
        assert await talk.is_over()
        assert await task is signal.SIGTERM


async def test_a_body_that_never_ends_is_given_up_with_the_grace(serving, caplog):
    """A client that stops sending holds the end up for the grace period at most."""
    task, url = await serving(grace_s=0.05)
    async with asyncio.timeout(SECONDS), Talk(url, _head("/v1/embeddings")) as talk:
        await _continued(talk)
        await _stop(caplog)
        assert await task is signal.SIGTERM


async def test_an_idle_connection_is_closed_at_once(serving, caplog):
    """Neither silence nor half a head is a request in progress."""
    task, url = await serving()
    async with (
        asyncio.timeout(SECONDS),
        Talk(url, b"") as silent,
        Talk(url, b"POST /v1/embeddings HTTP/1.1\r\nHo") as half,
    ):
        await _stop(caplog)
        assert await task is signal.SIGTERM
        assert await silent.is_over()
        assert await half.is_over()
