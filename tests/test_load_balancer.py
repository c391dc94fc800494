"""nginx, as deploy/compose has it before three nodes; skipped where there is no nginx."""

import os
import re
import shutil
import subprocess
from contextlib import AsyncExitStack

import aiohttp
import pytest
from aiohttp import web
from any_server import AnyServer
from pages import ROOT
from ports import own_port
from yarl import URL

NGINX = shutil.which("nginx", path=f"{os.environ.get('PATH', '')}:/usr/sbin")
CONF = (ROOT / "deploy" / "compose" / "nodes-nginx.conf").read_text(encoding="utf-8")

pytestmark = pytest.mark.skipif(not NGINX, reason="nginx is missing")


@pytest.fixture
async def nodes():
    """Give three servers in the place of nodes, each of which echoes what it is sent."""
    async with AsyncExitStack() as stack:
        yield [await stack.enter_async_context(AnyServer()) for _ in range(3)]


@pytest.fixture
def start_nginx(tmp_path):
    """Give a function that starts nginx before some addresses, and returns its own."""
    file = tmp_path / "nginx.conf"
    command = [NGINX, "-c", str(file), "-e", str(tmp_path / "error.log")]
    started = []

    def start(addresses):
        port = own_port()
        text = CONF.replace("/tmp/", f"{tmp_path}/").replace("listen 8080", f"listen {port}")
        # One that goes to stderr would keep the pipe open.
        text = text.replace("error_log stderr", f"error_log {tmp_path}/error.log")
        text = re.sub(r"^worker_\w+ .*\n", "", text, flags=re.MULTILINE)
        text = re.sub(r"worker_connections \d+", "worker_connections 64", text)
        for number, address in enumerate(addresses, 1):
            text = text.replace(f"proxy-{number}:8080", address)
        file.write_text(f"user root;\n{text}" if os.geteuid() == 0 else text)
        subprocess.run(command, check=True, capture_output=True)
        started.append(port)
        return f"http://127.0.0.1:{port}/v1/embeddings"

    yield start
    if started:
        subprocess.run([*command, "-s", "stop"], check=True, capture_output=True)


def _addresses(nodes):
    return [URL(node.url).authority for node in nodes]


async def test_nodes_take_turns(nodes, start_nginx):
    """Equal bodies go to all of them: no affinity."""
    url = start_nginx(_addresses(nodes))
    async with aiohttp.ClientSession() as http:
        for _ in range(12):
            async with http.post(url, data=b"body") as reply:
                assert await reply.read() == b"body"
    assert [len(node.seen) for node in nodes] == [4, 4, 4]


async def test_a_node_that_is_away_costs_no_request(nodes, start_nginx):
    """What a node that refuses connections would have got, the next one gets."""
    url = start_nginx([*_addresses(nodes[:2]), f"127.0.0.1:{own_port()}"])
    async with aiohttp.ClientSession() as http:
        for _ in range(12):
            async with http.post(url, data=b"body") as reply:
                assert await reply.read() == b"body"
    assert sum(len(node.seen) for node in nodes[:2]) == 12
    assert all(len(node.seen) > 1 for node in nodes[:2])


async def test_what_a_node_has_heard_is_never_sent_to_another(nodes, start_nginx):
    """It may have bought something: the client gets a 503, and tries again."""

    async def act(request: web.Request) -> web.StreamResponse:
        await request.read()
        request.transport.abort()
        return web.Response()

    for node in nodes:
        node.act = act
    url = start_nginx(_addresses(nodes))
    async with aiohttp.ClientSession() as http, http.post(url, data=b"body") as reply:
        assert (reply.status, reply.headers["Retry-After"]) == (503, "1")
        assert (await reply.json())["error"]["code"] == "proxy_unreachable"
    assert sum(len(node.seen) for node in nodes) == 1


async def test_while_no_node_is_there_clients_are_told_to_try_again(start_nginx):
    """A 503 in OpenAI's shape, from nginx itself."""
    url = start_nginx([f"127.0.0.1:{own_port()}" for _ in range(3)])
    async with aiohttp.ClientSession() as http, http.post(url, data=b"{}") as reply:
        assert (reply.status, reply.headers["Retry-After"]) == (503, "1")
        assert (await reply.json())["error"]["code"] == "proxy_unreachable"
