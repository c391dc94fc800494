"""The command `serve` as people run it: large bodies in little memory, and who leaves is seen."""

import asyncio
import sys

import aiohttp
import pytest
from aiohttp import web
from any_server import AnyServer
from flow import MB, PIECE, _act, measure, serving

PIECES = 30
# What may lie in buffers on the way: ours, and those of the kernel on four sockets.
MOST_ON_THE_WAY = 24 * MB


@pytest.mark.skipif(sys.platform != "linux", reason="memory is read from /proc")
async def test_memory_stays_flat_under_large_bodies(tmp_path):
    """30 MB up and 30 MB down take no more memory than a few of their chunks."""
    async with AnyServer(_act) as upstream, serving(tmp_path, upstream) as (pid, url):
        for flow in await measure(pid, url, PIECES):
            assert flow.moved == PIECES * MB
            assert flow.grown < 10 * MB


async def test_a_client_that_leaves_is_noticed_on_the_servers_own_loop(tmp_path):
    """With uvloop too, the upstream hears that nobody listens any more."""
    begun, given_up = asyncio.Event(), asyncio.Event()

    async def act(request: web.Request) -> web.StreamResponse:
        begun.set()
        try:
            await asyncio.Event().wait()
        finally:
            given_up.set()

    async with AnyServer(act) as upstream, serving(tmp_path, upstream) as (_, url):
        host, _, port = url.removeprefix("http://").removesuffix("/v1").partition(":")
        _, writer = await asyncio.open_connection(host, port)
        writer.write(b"POST /v1/x HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1\r\n\r\na")
        async with asyncio.timeout(60):
            await begun.wait()
        writer.close()
        async with asyncio.timeout(60):
            await given_up.wait()


async def test_a_slow_reader_slows_the_upstream_down(start_proxy):
    """Nothing is gathered for a client that does not read: the upstream has to wait."""
    waits, sent = asyncio.Event(), []

    async def act(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        while not waits.is_set() and len(sent) < 200:
            try:
                async with asyncio.timeout(0.3):
                    await response.write(PIECE)
            except TimeoutError:
                waits.set()
            sent.append(len(PIECE))
        return response

    async with AnyServer(act) as upstream:
        proxy = await start_proxy(openai=upstream, passthrough="openai")
        async with proxy.http.get(f"{proxy.url}/files/f/content") as response:
            async with asyncio.timeout(60):
                await waits.wait()
            assert sum(sent) < MOST_ON_THE_WAY
            assert len(await response.read()) == sum(sent)


async def test_a_slow_upstream_slows_the_client_down(start_proxy):
    """Nothing is gathered for an upstream that does not read: the client has to wait."""
    goes_on, sent = asyncio.Event(), []

    async def act(request: web.Request) -> web.StreamResponse:
        await goes_on.wait()
        return await _act(request)

    async def body():
        loop = asyncio.get_running_loop()
        while not goes_on.is_set() and len(sent) < 200:
            sent.append(len(PIECE))
            watch = loop.call_later(0.3, goes_on.set)
            yield PIECE
            watch.cancel()

    async with AnyServer(act) as upstream:
        proxy = await start_proxy(openai=upstream, passthrough="openai")
        timeout = aiohttp.ClientTimeout(total=60)
        async with proxy.http.post(f"{proxy.url}/files", data=body(), timeout=timeout) as response:
            assert int(await response.text()) == sum(sent)
        assert sum(sent) < MOST_ON_THE_WAY
