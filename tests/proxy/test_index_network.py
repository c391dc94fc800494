"""The way to Qdrant: by gRPC, with a private CA, and what is said when it is lost."""

import asyncio
import gc
import ssl
from pathlib import Path

import numpy as np
import pytest
from aiohttp import web
from embedding_proxy.index.client import Connection
from embedding_proxy.index.collection_reader import CollectionReader
from embedding_proxy.index.errors import UntrustedCertificate
from fault_server import vector_of
from index_helpers import COLLECTION, SMALL, arrived, ask, holds, section, until
from qdrant_grpc import QdrantGrpc
from qdrant_server import QdrantServer

TLS = Path(__file__).parents[1] / "data" / "tls"


@pytest.fixture
async def qdrant():
    async with QdrantServer() as server:
        yield server


async def _failure(proxy, words):
    indexer = proxy.service.indexing.indexer

    async def told():
        return words in str((await indexer.snapshot())["last_failure"])

    await until(told)


# gRPC


async def test_points_go_by_grpc(start_proxy, upstream, qdrant):
    """They are the same to the last bit, and are found; nothing goes over HTTP."""
    async with QdrantGrpc(qdrant) as front:
        index = section(qdrant, prefer_grpc=True, grpc_port=front.port)
        proxy = await start_proxy(upstream, index=index)
        await ask(proxy, "a", "b", index={"payload": [{"n": 1, "f": 0.5, "l": ["x", None]}, {}]})
        assert (await arrived(proxy))["refused"] == []
        points = {p["payload"]["text"]: p for p in (await qdrant.points(COLLECTION)).values()}
        assert points["a"]["vector"] == [float(x) for x in vector_of(SMALL, "a").astype(np.float32)]
        payload = points["a"]["payload"]
        assert (payload["n"], payload["f"], payload["l"]) == (1, 0.5, ["x", None])
        (hit, _) = await proxy.service.query("a", SMALL)
        assert hit.text == "a"
        assert qdrant.requests == []
        await start_proxy.stop()


async def test_failures_by_grpc_are_those_of_http(start_proxy, upstream, qdrant):
    """An outage, a limit, a batch that is too large and a bad point: all else arrives."""
    async with QdrantGrpc(qdrant) as front:
        index = section(qdrant, prefer_grpc=True, grpc_port=front.port)
        proxy = await start_proxy(upstream, index=index)
        front.failures = [
            (429, "Write rate limit exceeded, request larger than rate limiter capacity"),
            (400, "Bad request: Max points count limit of 3 reached!"),
            (500, "Service internal error: panicked"),
            (403, "Forbidden: Write access to collection is required"),
            (429, "Rate limiting exceeded: try later"),
            (400, "Wrong input: this one not"),
        ]  # fmt: skip
        await ask(proxy, *"abcdef")
        told = await arrived(proxy)
        assert not front.failures
        assert told["refused_points"] == 1
        assert "this one not" in told["refused"][0]["reason"]
        assert len(await qdrant.points(COLLECTION)) == 5
        await front.stop()
        await ask(proxy, "g")
        await _failure(proxy, f"no answer from 127.0.0.1:{front.port}")
        await front.start()
        await holds(qdrant, 6)
        await start_proxy.stop()


# Certificates. The client leaves the socket of a refused handshake open until it is collected.


@pytest.fixture
def _collected():
    yield
    gc.collect()


@pytest.fixture
async def secure(qdrant):
    """Give a function that puts TLS before Qdrant, with a certificate of that name."""
    runners = []

    async def start(name):
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(TLS / f"{name}.crt", TLS / "server.key")
        app = web.Application(client_max_size=32 << 20)
        app.router.add_route("*", "/{path:.*}", qdrant._handle)
        runner = web.AppRunner(app, shutdown_timeout=0.01)
        await runner.setup()
        runners.append(runner)
        await web.TCPSite(runner, "127.0.0.1", 0, ssl_context=context).start()
        return f"https://127.0.0.1:{runner.addresses[0][1]}"

    yield start
    for runner in runners:
        await runner.cleanup()


@pytest.mark.usefixtures("_collected")
@pytest.mark.filterwarnings("ignore::ResourceWarning")
async def test_a_private_ca_is_trusted_where_it_is_named(secure, start_proxy, upstream, qdrant):
    """Without it the points wait, and the reason says what to set."""
    url = await secure("server")
    index = {"qdrant": {"url": url, "ca_file": str(TLS / "ca.pem")}}
    proxy = await start_proxy(upstream, index=index)
    await ask(proxy, "a")
    await arrived(proxy)
    assert len(await qdrant.points(COLLECTION)) == 1
    await start_proxy.stop()
    proxy = await start_proxy(upstream, index={"qdrant": {"url": url}})
    await ask(proxy, "b")
    await _failure(proxy, "is not trusted while")
    told = await proxy.service.indexing.indexer.snapshot()
    assert "name it in ca_file" in told["last_failure"]
    assert (told["backlog_points"], told["refused_points"]) == (1, 0)


@pytest.mark.usefixtures("_collected")
@pytest.mark.filterwarnings("ignore::ResourceWarning")
@pytest.mark.parametrize("name", ["server", "expired", "selfsigned"])
async def test_a_certificate_that_is_not_trusted_is_asked_once(name, secure):
    """What reads collections waits for what passes, and that does not."""
    url, waits = await secure(name), []

    async def wait(seconds):
        waits.append(seconds)

    async with Connection(url=url) as connection:
        reader = CollectionReader(connection, sleep=wait)
        with pytest.raises(UntrustedCertificate, match="while reading the configuration of docs"):
            await reader.ask(lambda client: client.get_collection("docs"))
    assert waits == []


@pytest.mark.usefixtures("_collected")
@pytest.mark.filterwarnings("ignore::ResourceWarning")
async def test_a_server_without_tls_is_told(start_proxy, upstream, qdrant):
    """What to write instead."""
    url = qdrant.url.replace("http:", "https:")
    proxy = await start_proxy(upstream, index={"qdrant": {"url": url}})
    await ask(proxy, "a")
    await _failure(proxy, "does not speak TLS while reading aliases: its url begins with http:")


# What is said of a lost connection


@pytest.mark.parametrize(
    ("harm", "says"),
    [
        ("away", "connection refused by {} while "),
        ("cut", "the connection to {} was cut while writing points to "),
        ("slow", "no answer from {} in time while writing points to "),
    ],
)
async def test_a_lost_connection_is_told_with_host_and_deed(  # noqa: PLR0917 - fixtures
    harm, says, start_proxy, upstream, qdrant, caplog
):
    """And the log says what becomes of the points."""

    async def spoil(request):
        if not request.path.endswith("/points"):
            return None
        if harm == "slow":
            await asyncio.sleep(60)
        request.transport.abort()
        return web.Response()

    qdrant.always = spoil if harm != "away" else None
    proxy = await start_proxy(upstream, index=section(qdrant, timeout_s=1))
    if harm == "away":
        await qdrant.stop()
    await ask(proxy, "a")
    place = qdrant.url.removeprefix("http://")
    await _failure(proxy, says.format(place) + (COLLECTION if harm != "away" else ""))
    assert "points wait on disk, tried again in" in caplog.text
