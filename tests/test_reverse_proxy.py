"""nginx, as deploy/nginx has it, in front of a proxy; skipped where there is no nginx."""

import asyncio
import io
import json
import os
import re
import shutil
import ssl
import subprocess

import aiohttp
import pytest
from aiohttp import web
from pages import ROOT
from ports import own_port
from yarl import URL

NGINX = shutil.which("nginx", path=f"{os.environ.get('PATH', '')}:/usr/sbin")
SITE = (ROOT / "deploy" / "nginx" / "embedding-proxy.conf").read_text(encoding="utf-8")
PART = b"x" * (1 << 20)
PARTS = 30
SECONDS = 60

OPENSSL = shutil.which("openssl")

pytestmark = pytest.mark.skipif(not (NGINX and OPENSSL), reason="nginx or openssl is missing")


@pytest.fixture(scope="module")
def certificate(tmp_path_factory):
    """Give a folder with a certificate for localhost and its key."""
    folder = tmp_path_factory.mktemp("tls")
    command = [OPENSSL, "req", "-x509", "-nodes", "-newkey", "ec", "-pkeyopt"]
    command += ["ec_paramgen_curve:prime256v1", "-subj", "/CN=localhost", "-addext"]
    command += ["subjectAltName=DNS:localhost", "-keyout", f"{folder}/embedding-proxy.key"]
    command += ["-out", f"{folder}/embedding-proxy.crt"]
    subprocess.run(command, check=True, capture_output=True)
    return folder


@pytest.fixture
async def http(certificate):
    """Give a client that knows the certificate."""
    context = ssl.create_default_context(cafile=certificate / "embedding-proxy.crt")
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(ssl=context)) as session:
        yield session


@pytest.fixture
def start_nginx(certificate, tmp_path):
    """Give a function that starts nginx before a base URL, and returns its own and its folder."""
    folder = tmp_path / "nginx"
    folder.mkdir()
    conf = folder / "nginx.conf"
    command = [NGINX, "-c", str(conf), "-e", str(folder / "error.log")]
    started = []

    def start(url):
        port = own_port()
        # TLS is part of what is tried: nginx gathers small writes before it encrypts them.
        site = SITE.replace("/etc/nginx/tls", str(certificate))
        site = re.sub(r"^ *listen \[::\].*\n", "", site, flags=re.MULTILINE)
        site = site.replace("listen 443 ssl;", f"listen 127.0.0.1:{port} ssl;")
        site = site.replace("127.0.0.1:8080", URL(url).authority)
        places = "".join(
            f"{name}_temp_path {folder}/temp_{name};\n"
            for name in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
        )
        user = "user root;\n" if os.geteuid() == 0 else ""
        conf.write_text(
            f"{user}pid {folder}/pid;\nworker_processes 1;\nevents {{}}\n"
            f"http {{\naccess_log off;\n{places}{site}}}\n"
        )
        # It returns when the port is taken.
        subprocess.run(command, check=True, capture_output=True)
        started.append(port)
        return f"https://localhost:{port}/v1"

    yield start
    if started:
        subprocess.run([*command, "-s", "stop"], check=True, capture_output=True)


async def test_an_event_arrives_before_the_next_is_made(other, start_proxy, start_nginx, http):
    """By default nginx buffers replies, but none of a stream: the proxy tells it so."""
    next_one = asyncio.Event()

    async def act(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        for _ in range(3):
            await response.write(b"data: 1\n\n")
            await next_one.wait()
            next_one.clear()
        return response

    other.act = act
    proxy = await start_proxy(openai=other, passthrough="openai")
    url = start_nginx(proxy.url)
    async with asyncio.timeout(SECONDS), http.post(f"{url}/responses", data=b"{}") as reply:
        for _ in range(3):
            assert await reply.content.readuntil(b"\n\n") == b"data: 1\n\n"
            next_one.set()
        assert await reply.read() == b""


async def test_an_upload_goes_on_as_it_comes_and_into_no_file(
    other, start_proxy, start_nginx, http, tmp_path
):
    """The upstream has the first part before the last is sent; nginx's folders stay empty."""
    first = asyncio.Event()

    async def act(request: web.Request) -> web.Response:
        size = 0
        async for part in request.content.iter_any():
            size += len(part)
            first.set()
        return web.json_response({"bytes": size})

    other.act = act
    proxy = await start_proxy(openai=other, passthrough="openai")
    url = start_nginx(proxy.url)
    written = []

    async def parts():
        for i in range(PARTS):
            if i == PARTS - 1:
                await first.wait()
                written.extend(path for path in tmp_path.rglob("temp_*/**/*") if path.is_file())
            yield PART

    async with asyncio.timeout(SECONDS), http.post(f"{url}/files", data=parts()) as reply:
        assert await reply.json() == {"bytes": PARTS * len(PART)}
    assert written == []


async def test_a_large_request_for_embeddings_is_the_proxys_to_judge(
    upstream, start_proxy, start_nginx, http
):
    """One of 30 MB is answered; of one that is too large the proxy says so in OpenAI's shape."""
    upstream.widths = {"m": 8}
    model = {"space": "s/m", "dimensions": 8, "routes": [{"provider": "openai", "model": "m"}]}
    limit = PARTS + 1
    proxy = await start_proxy(openai=upstream, models={"m": model}, server={"max_body_mib": limit})
    url = start_nginx(proxy.url)
    for parts, status in ((PARTS, 200), (limit, 413)):
        # Few that differ, so that the upstream gets a call of a common size.
        inputs = [f"{i % 32} {PART[::64].decode()}" for i in range(64 * parts)]
        body = {"model": "m", "input": inputs}
        data = io.BytesIO(json.dumps(body).encode())
        head = {"Content-Type": "application/json"}
        async with asyncio.timeout(SECONDS):
            async with http.post(f"{url}/embeddings", data=data, headers=head) as reply:
                content = await reply.json()
        assert reply.status == status
        assert ("data" in content) == (status == 200)
        assert status == 200 or "server.max_body_mib" in content["error"]["message"]


async def test_an_upstream_hears_that_the_client_left(other, start_proxy, start_nginx, http):
    """Both close theirs: nginx its connection to the proxy, and the proxy that to the upstream."""
    is_over = asyncio.Event()

    async def act(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        try:
            await response.write(b"data: 1\n\n")
            await asyncio.Event().wait()
        finally:
            is_over.set()
        return response

    other.act = act
    proxy = await start_proxy(openai=other, passthrough="openai")
    url = start_nginx(proxy.url)
    async with asyncio.timeout(SECONDS):
        reply = await http.post(f"{url}/responses", data=b"{}")
        await reply.content.readuntil(b"\n\n")
        # Not `close`, by which asyncio would wait for nginx to say goodbye, too.
        reply.connection.transport.abort()
        await is_over.wait()


async def test_while_the_proxy_is_away_clients_are_told_to_try_again(start_nginx, http):
    """A 503 in OpenAI's shape, from nginx itself."""
    url = start_nginx(f"http://127.0.0.1:{own_port()}/v1")
    async with http.post(f"{url}/embeddings", data=b"{}") as reply:
        assert (reply.status, reply.headers["Retry-After"]) == (503, "1")
        assert (await reply.json())["error"]["code"] == "proxy_unreachable"
