"""The client of Redis: addresses, exchanges, limits, the breaker, clusters and sentinels."""

import asyncio
import contextlib
import re
import signal
import subprocess
import sys
import tempfile

import pytest
from embedding_proxy.cache.shared.address import RedisOptions, parse
from embedding_proxy.cache.shared.client import UNAVAILABLE, Command, RedisClient
from embedding_proxy.cache.shared.node import Refused
from embedding_proxy.cache.shared.tier import SharedTier
from pages import ROOT
from ports import own_port
from redis_server import RedisServer, needs_redis, redis_server, until

TLS = ROOT / "tests" / "data" / "tls"
PATIENCE = 30.0
"""A limit that no machine is too slow for."""


def client(url, **options):
    return RedisClient(RedisOptions(parse(url), **{"limit_s": PATIENCE, **options}))


@contextlib.asynccontextmanager
async def opened(url, **options):
    """Open a client, and wait until it has a server, however slow the machine is."""
    async with client(url, **options) as redis:
        await until(lambda: redis.is_available)
        yield redis


def setting(key, value, *more):
    return Command(key, (b"SET", key, value, *more))


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("redis://h", "redis://h:6379"),
        ("valkey://h", "redis://h:6379"),
        ("rediss://u:p%40w@h:7/3", "rediss://h:7/3"),
        ("valkeys://h", "rediss://h:6379"),
        ("redis://[::1]:7", "redis://[::1]:7"),
        ("redis+cluster://a,b:7", "redis+cluster://a:6379,b:7"),
        ("redis+sentinel://a,b:7/main/2", "redis+sentinel://a:26379,b:7/main/2"),
        ("unix:///run/redis.sock?db=2", "unix:///run/redis.sock?db=2"),
    ],
)
def test_an_address_is_read_and_shown_without_its_secrets(url, shown):
    """Each form of a URL is understood."""
    assert str(parse(url)) == shown
    assert "p@w" not in repr(parse(url))


@pytest.mark.parametrize(
    "url",
    [
        *(
            "",
            "h",
            "http://h",
            "redis:",
            "redis://",
            "redis://h:0",
            "redis://h:99999",
            "redis://a,b",
        ),
        *(
            "redis://h/x",
            "redis://h/1/2",
            "redis+cluster://h/1",
            "redis+sentinel://h",
            "unix://h/x",
        ),
        *("redis+sentinel://h/m/x", "redis://h h", "redis+other://h", "redis://h#x"),
    ],
)
def test_what_is_no_address_is_refused(url):
    """A mistake is a ValueError that says what is expected."""
    with pytest.raises(ValueError, match="expected an address like redis://"):
        parse(url)


def test_credentials_are_decoded():
    """A user and a password may hold any character, written as %XX."""
    address = parse("redis://us%2Fer:p%40w@h")
    assert (address.username, address.password) == ("us/er", "p@w")


@needs_redis
async def test_replies_come_in_the_order_of_the_commands():
    """Values, numbers, nothing, and refusals, each at the place of its command."""
    with redis_server() as server:
        async with opened(server.url) as redis:
            key = redis.key("r", b"\x00{1}")
            assert key == b"embedding-proxy:1:r:\x00{1}"
            replies = await redis.exchange(
                [
                    setting(key, b"1"),
                    Command(key, (b"INCR", key)),
                    Command(key, (b"GET", key)),
                    Command(key, (b"GET", b"other")),
                    Command(key, (b"LPUSH", key, b"x")),
                    Command(None, (b"PING",)),
                ]
            )
            assert replies[:4] == [b"OK", 2, b"2", None]
            assert isinstance(replies[4], Refused)
            assert replies[4].code == "WRONGTYPE"
            assert replies[5] == b"PONG"
            keys = [redis.key("r", bytes([n])) for n in range(200)]
            await redis.exchange([setting(key, key * 99) for key in keys[::2]])
            values = await redis.get_many(keys)
            assert values[::2] == [key * 99 for key in keys[::2]]
            assert values[1::2] == [None] * 100


@needs_redis
async def test_a_server_that_goes_is_left_alone_and_one_that_comes_back_is_used(caplog):
    """One warning when it goes, one line when it is back; nothing is raised."""
    caplog.set_level("INFO")
    with redis_server() as server:
        async with opened(server.url) as redis:
            assert await redis.exchange([setting(b"k", b"v")]) == [b"OK"]
            server.kill()
            while redis.is_available:
                assert await redis.get_many([b"k"]) == [UNAVAILABLE]
            assert await redis.get_many([b"k"] * 40) == [UNAVAILABLE] * 40
            server.start()
            await until(lambda: redis.is_available)
            assert await redis.get_many([b"k"]) == [None]
    lines = [record.getMessage() for record in caplog.records if "shared tier" in record.message]
    assert [line.split(" is ")[-1].split(" again")[0] for line in lines[:1]] == [
        "left alone until it answers"
    ]
    assert len(lines) == 2
    assert "answers again" in lines[1]


@needs_redis
async def test_a_server_that_is_not_there_at_the_start_delays_nothing():
    """To open the client fails at nothing; what is asked is unavailable."""
    with redis_server() as server:
        server.kill()
        async with client(server.url) as redis:
            assert not redis.is_available
            assert await redis.exchange([setting(b"k", b"v")]) == [UNAVAILABLE]


@needs_redis
async def test_a_stopped_server_is_given_up_after_the_limit():
    """Exchanges with it end, and then the breaker keeps others from waiting."""
    with redis_server() as server:
        async with opened(server.url, limit_s=0.005) as redis:
            server.signal(signal.SIGSTOP)
            while redis.is_available:
                assert await redis.get_many([b"k"]) == [UNAVAILABLE]
            assert redis.counters.timeouts >= 1
            server.signal(signal.SIGCONT)
            await until(lambda: redis.is_available)


@needs_redis
async def test_a_cancelled_exchange_closes_its_connection():
    """Its replies are nobody's: the next exchange is on another connection."""
    with redis_server() as server:
        async with opened(server.url, max_connections=1) as redis:
            await redis.exchange([setting(b"a", b"1"), setting(b"b", b"2")])
            (node,) = redis.nodes.values()
            server.signal(signal.SIGSTOP)
            task = asyncio.create_task(redis.get_many([b"a"]))
            await until(lambda: node.connections == 1 and not node._idle)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert node.connections == 0
            server.signal(signal.SIGCONT)
            assert await redis.get_many([b"b"]) == [b"2"]


@needs_redis
async def test_a_password_is_sent_and_a_wrong_one_is_named(caplog):
    """With the right one, and the rights that the page names, it works; a wrong one is told."""
    page = (ROOT / "docs" / "storage.md").read_text(encoding="utf-8")
    rights = re.search(r"`(~embedding-proxy:\* [^`]+)`", page)[1]
    with redis_server() as server:
        server.call("ACL", "SETUSER", "proxy", "on", ">hunter2", *rights.split())
        url = f"{server.url}/1"
        async with opened(url, username="proxy", password="hunter2") as redis:
            tier = SharedTier(redis)
            assert await tier.prove_writes() == ""
            assert await tier.eviction_policy() is None
            key = redis.key("r", b"k")
            assert await redis.exchange([setting(key, b"v")]) == [b"OK"]
            assert await redis.get_many([key]) == [b"v"]
            ((role, *_),) = await redis.exchange([Command(None, (b"ROLE",))])
            assert role == b"master"
            (reply,) = await redis.exchange([setting(b"other", b"v")])
            assert isinstance(reply, Refused)
            assert reply.code == "NOPERM" or "permission" in reply.message
        async with client(server.url, username="proxy", password="hunter3") as redis:
            assert not redis.is_available
    assert "hunter" not in caplog.text
    assert "username-password pair" in caplog.text or "WRONGPASS" in caplog.text


def test_nothing_imports_redis_without_a_shared_tier():
    """Who does not use it does not wait for its import."""
    source = (
        "import sys; import embedding_proxy.proxy.service.embedding_service;"
        " import embedding_proxy.proxy.http.app, embedding_proxy.proxy.cli.main;"
        " print([m for m in sys.modules if m.partition('.')[0] == 'redis'])"
    )
    done = subprocess.run(
        [sys.executable, "-c", source], capture_output=True, check=True, text=True
    )
    assert done.stdout.strip() == "[]"


@needs_redis
async def test_tls_with_a_ca_of_ones_own():
    """With the CA it works; without, the server is not trusted, and nothing is sent to it."""
    port = own_port()
    server = RedisServer(
        *("--tls-port", str(port), "--tls-auth-clients", "no"),
        *("--tls-cert-file", str(TLS / "server.crt"), "--tls-key-file", str(TLS / "server.key")),
        *("--tls-ca-cert-file", str(TLS / "ca.pem")),
    )
    try:
        server.start()
        url = f"rediss://localhost:{port}"
        async with opened(url, ca_file=str(TLS / "ca.pem")) as redis:
            assert await redis.exchange([setting(b"k", b"v")]) == [b"OK"]
            assert await redis.get_many([b"k"] * 50) == [b"v"] * 50
        async with client(url) as redis:
            assert not redis.is_available
            assert "CERTIFICATE_VERIFY_FAILED" in redis.reason
    finally:
        server.close()


@needs_redis
async def test_a_server_of_the_same_machine_may_be_asked_by_a_socket():
    """Its path is in the URL; a system allows only short ones."""
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        path = f"{folder}/s"
        with redis_server("--unixsocket", path):
            async with opened(f"unix://{path}?db=1") as redis:
                assert await redis.exchange([setting(b"k", b"v")]) == [b"OK"]
