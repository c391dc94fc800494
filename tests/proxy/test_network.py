"""The way to an upstream: through an HTTP proxy, and past whose certificates."""

import asyncio
import logging
import re
import ssl
from contextlib import AsyncExitStack
from pathlib import Path

import pytest
import yaml
from aiohttp import WSMsgType, web
from any_server import AnyServer
from embedding_proxy.providers.network import Network
from embedding_proxy.proxy.config.loader import ConfigError, load
from embedding_proxy.proxy.config.schema import Settings
from embedding_proxy.proxy.service.provider_factory import open_providers
from fault_server import FaultServer
from http_proxy import HttpProxy

TLS = Path(__file__).parents[1] / "data" / "tls"
CA = str(TLS / "ca.pem")
GOOD = {"model": "text-embedding-3-small", "input": "a"}
PASSWORD = "very%40secret"


def certified(name: str) -> ssl.SSLContext:
    """Return what a server needs that has this certificate."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(TLS / f"{name}.crt", TLS / "server.key")
    return context


@pytest.fixture(autouse=True)
def _no_proxies(monkeypatch):
    """Keep the machine's own proxies out."""
    for name in ("http", "https", "all", "no"):
        monkeypatch.delenv(f"{name}_proxy", raising=False)
        monkeypatch.delenv(f"{name.upper()}_PROXY", raising=False)


@pytest.fixture
async def secure():
    """Give an upstream that speaks HTTPS, with a certificate of our own CA."""
    async with FaultServer(tls=certified("server")) as server:
        yield server


@pytest.fixture
def start(start_proxy):
    """Give a function that starts a proxy before one provider, reached as these keys say."""

    async def start(server, passthrough=None, **keys):
        providers = {"openai": {"base_url": server.url, **keys}}
        return await start_proxy(openai=server, providers=providers, passthrough=passthrough)

    return start


async def message_of(response) -> str:
    return (await response.json())["error"]["message"]


# HTTP proxies


async def test_embeddings_go_through_the_proxy(start, upstream):
    """The proxy sees the whole address and its own credentials; the upstream sees the key alone."""
    async with HttpProxy(credentials="me:secret") as way:
        proxy = await start(upstream, proxy=way.url)
        for text in ("a", "b"):
            assert (await proxy.post({**GOOD, "input": text})).status == 200
    assert way.asked[0] == f"POST {upstream.url}/embeddings"
    assert len(upstream.calls) == 2
    assert upstream.calls[0].headers["Authorization"] == "Bearer openai-secret-key"


async def test_https_goes_through_a_tunnel(start, secure):
    """The proxy is asked for a tunnel, and sees neither the key nor the call."""
    async with HttpProxy(credentials="me:secret") as way:
        proxy = await start(secure, proxy=way.url, ca_file=CA)
        assert (await proxy.post(GOOD)).status == 200
    assert way.asked == [f"CONNECT localhost:{secure.port}"]
    assert b"openai-secret-key" not in way.heads[0]
    assert "Proxy-Authorization" not in secure.calls[0].headers


async def test_other_calls_and_websockets_go_through_the_proxy(start):
    """What is passed through takes the way of its provider, messages of a WebSocket included."""

    async def act(request: web.Request) -> web.StreamResponse:
        if "Upgrade" not in request.headers:
            return web.Response(body=await request.read())
        socket = web.WebSocketResponse()
        await socket.prepare(request)
        async for message in socket:
            await socket.send_str(message.data.upper())
        return socket

    async with HttpProxy() as way, AnyServer(act) as other:
        proxy = await start(other, "openai", proxy=way.url)
        async with proxy.http.post(f"{proxy.url}/chat/completions", data=b"sent") as response:
            assert await response.read() == b"sent"
        async with asyncio.timeout(60), proxy.http.ws_connect(f"{proxy.url}/realtime") as socket:
            await socket.send_str("a")
            message = await socket.receive()
            assert (message.type, message.data) == (WSMsgType.TEXT, "A")
        assert len(other.connections) == len(way.asked), "nobody came past the proxy"
        assert way.asked[0] == f"POST {other.url}/chat/completions"


@pytest.mark.parametrize("scheme", ["http", "https"])
async def test_a_proxy_that_refuses_the_credentials_is_named(
    scheme, start, upstream, secure, caplog
):
    """It is asked once, and neither the reply nor the log shows what was refused."""
    caplog.set_level(logging.DEBUG)
    server = upstream if scheme == "http" else secure
    async with HttpProxy(credentials="me:other") as way:
        given = way.url.replace("other", PASSWORD)
        proxy = await start(server, "openai", proxy=given, ca_file=CA)
        response = await proxy.post(GOOD)
        assert len(way.asked) == 1
        async with proxy.http.post(f"{proxy.url}/moderations", json=GOOD) as passed:
            await passed.read()
    shown = caplog.text
    for one in (response, passed):
        assert one.status == 502
        assert "openai: HTTP proxy: it refuses the credentials" in await message_of(one)
        shown += await one.text()
    assert len(way.asked) == 2
    assert not server.calls
    assert PASSWORD not in shown
    assert "very@secret" not in shown


async def test_a_proxy_that_is_down_is_named(start, upstream):
    """The address in the message is the proxy's, without its credentials."""
    proxy = await start(upstream, proxy=f"http://me:{PASSWORD}@127.0.0.1:1")
    response = await proxy.post(GOOD)
    message = "openai: HTTP proxy: connection refused by 127.0.0.1:1"
    assert await message_of(response) == message
    assert not upstream.calls


@pytest.mark.parametrize(
    ("variables", "is_used"),
    [
        ({"HTTP_PROXY": "{}"}, True),
        ({"http_proxy": "{}"}, True),
        ({"ALL_PROXY": "{}"}, True),
        ({"HTTPS_PROXY": "{}"}, False),
        ({"HTTP_PROXY": "{}", "NO_PROXY": "127.0.0.1"}, False),
        ({"HTTP_PROXY": "{}", "NO_PROXY": "other.example"}, True),
        ({}, False),
    ],
)
async def test_the_environment_is_obeyed_where_that_is_said(
    variables, is_used, start, upstream, monkeypatch
):
    """`trust_env` takes the usual variables, NO_PROXY among them."""
    async with HttpProxy() as way:
        for name, value in variables.items():
            monkeypatch.setenv(name, value.format(way.url))
        proxy = await start(upstream, trust_env=True)
        assert (await proxy.post(GOOD)).status == 200
    assert bool(way.asked) is is_used


def test_nothing_of_netrc_is_read(monkeypatch, tmp_path):
    """Only the proxy comes from the environment: no password of ~/.netrc goes to an upstream."""
    netrc = tmp_path / "netrc"
    netrc.write_text("machine 127.0.0.1 login a password b")
    monkeypatch.setenv("NETRC", str(netrc))
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:3128")
    way = Network(trust_env=True).proxy_for("http://h.example/v1")
    assert (way.user, way.host, way.port) == (None, "127.0.0.1", 3128)


@pytest.mark.parametrize("value", ["http://proxy.example", "proxy.example:3128"])
def test_a_proxy_of_the_environment_has_a_scheme_or_a_port(value, monkeypatch):
    """One of the two tells an address from a word."""
    monkeypatch.setenv("HTTPS_PROXY", value)
    way = Network(trust_env=True).proxy_for("https://h.example/v1")
    assert way.host == "proxy.example"


@pytest.mark.parametrize("value", [f"socks5://me:{PASSWORD}@h:1", "junk", f"{PASSWORD}", "a b:1"])
async def test_a_variable_that_holds_no_proxy_is_a_config_error(value, monkeypatch):
    """It is named, and not shown: it may hold a password."""
    monkeypatch.setenv("HTTPS_PROXY", value)
    monkeypatch.setenv("OPENAI_API_KEY", "k")
    settings = Settings.model_validate({"providers": {"openai": {"trust_env": True}}})
    said = r"^providers\.openai\.trust_env: the variable HTTPS_PROXY holds no address of an HTTP"
    async with AsyncExitStack() as stack:
        with pytest.raises(ConfigError, match=said) as caught:
            await open_providers(settings, stack)
    assert PASSWORD not in str(caught.value)


# Certificates


async def test_a_ca_of_ones_own_is_trusted(start, secure):
    """Embeddings and other calls go to a server with its certificate."""
    proxy = await start(secure, "openai", ca_file=CA)
    assert (await proxy.post(GOOD)).status == 200
    async with proxy.http.post(f"{proxy.url}/moderations", json=GOOD) as response:
        assert response.status == 200


@pytest.mark.parametrize("call", ["embeddings", "moderations"])
@pytest.mark.parametrize(
    ("certificate", "keys", "why"),
    [
        ("server", {}, "its issuer is not known (localhost:{}); name its CA in ca_file, if"),
        ("selfsigned", {}, "it is self-signed (localhost:{}); name its CA in ca_file, if it is"),
        ("expired", {"ca_file": CA}, "it has expired (localhost:{})"),
        ("other", {"ca_file": CA}, "it is for another host name (localhost:{})"),
    ],
)
async def test_a_certificate_that_is_not_trusted_says_why(certificate, keys, why, call, start):
    """Who signed it, when it ended or whose it is: that is for the operator to mend."""
    async with FaultServer(tls=certified(certificate)) as server:
        proxy = await start(server, "openai", **keys)
        async with proxy.http.post(f"{proxy.url}/{call}", json=GOOD) as response:
            message = await message_of(response)
        assert response.status == 502
    assert message.startswith("openai: certificate not trusted: " + why.format(server.port))
    assert not server.calls


# The configuration


@pytest.mark.parametrize(
    ("keys", "key", "remedy"),
    [
        (
            {"ca_file": "/nowhere/ca.pem"},
            "ca_file",
            "cannot be read: No such file or directory;",
        ),
        ({"ca_file": "/"}, "ca_file", "expected a PEM file"),
        ({"ca_file": __file__}, "ca_file", "holds no certificate; expected a PEM file"),
        ({"ca_file": "~nobody-of-that-name/x"}, "ca_file", "there is no such user"),
        ({"proxy": "socks5://h:1"}, "proxy", "SOCKS is not supported"),
        ({"proxy": "h:3128"}, "proxy", "it has no http://"),
        ({"proxy": f"http://me:{PASSWORD}@h:x"}, "proxy", "its port is no number"),
        ({"proxy": f"http://me:{PASSWORD}/@h"}, "proxy", "expected the address of an HTTP proxy"),
        ({"proxy": f"http://me:{PASSWORD}#@h:1"}, "proxy", "expected the address of an HTTP pr"),
        ({"proxy": "http://"}, "proxy", "its host is missing"),
        ({"proxy": "http://h:1/x"}, "proxy", "without a path"),
        ({"proxy": "http://me:ü@h:1"}, "proxy", "write a sign that is not ASCII as %XX"),
        ({"proxy": "http://h:1", "trust_env": True}, "trust_env", "exclude each other: name the"),
        ({"headers": {"Proxy-Authorization": "x"}}, "headers.Proxy-Authorization", "is not to be"),
    ],
)
def test_a_mistake_is_named_with_file_key_and_remedy(keys, key, remedy, tmp_path):
    """One line, without the password of a proxy."""
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump({"providers": {"openai": keys}}))
    with pytest.raises(ConfigError) as caught:
        load(file)
    where = ".".join(part for part in ("providers.openai", key) if part)
    assert re.match(rf"{re.escape(str(file))}:\d: {where}: ", str(caught.value))
    assert remedy in str(caught.value)
    assert PASSWORD not in str(caught.value)


def test_a_path_of_a_ca_file_is_made_whole(monkeypatch, tmp_path):
    """`~` is the home folder, and what is left is absolute."""
    (tmp_path / "ca.pem").write_bytes(Path(CA).read_bytes())
    monkeypatch.setenv("HOME", str(tmp_path))
    settings = Settings.model_validate({"providers": {"openai": {"ca_file": "~/ca.pem"}}})
    assert settings.providers["openai"].as_profile().network.ca_file == str(tmp_path / "ca.pem")


@pytest.mark.parametrize(
    ("written", "shown"),
    [
        (f"http://me:{PASSWORD}@h:3128", "${OPENAI_PROXY}"),
        ("${THE_PROXY}", "${THE_PROXY}"),
        ("http://me:${PROXY_PASSWORD}@h:3128", "${OPENAI_PROXY}"),
        ("http://h:3128", "http://h:3128"),
    ],
)
def test_config_show_hides_the_credentials(written, shown, command, monkeypatch, tmp_path):
    """What is shown is a reference where there is a password, and loads once that is set."""
    monkeypatch.setenv("THE_PROXY", f"http://me:{PASSWORD}@h:3128")
    monkeypatch.setenv("PROXY_PASSWORD", PASSWORD)
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump({"providers": {"openai": {"proxy": written, "ca_file": CA}}}))
    done = command("config", "show", "--config", file)
    assert done.code == 0
    assert PASSWORD not in done.out
    assert PASSWORD not in repr(load(file))
    assert PASSWORD not in repr(load(file).providers["openai"].as_profile())
    values = yaml.safe_load(done.out)["providers"]["openai"]
    assert (values["proxy"], values["trust_env"], values["ca_file"]) == (shown, False, CA)
    monkeypatch.setenv("OPENAI_PROXY", f"http://me:{PASSWORD}@h:3128")
    file.write_text(done.out)
    assert load(file).providers["openai"].proxy.endswith("h:3128")


async def test_check_says_what_is_wrong_with_the_way(command, secure, monkeypatch, tmp_path):
    """The operator reads the cause in `check`, before the first request."""
    monkeypatch.setenv("OPENAI_API_KEY", "k")
    file = tmp_path / "config.yaml"
    providers = {"openai": {"base_url": secure.url}, "local": None}
    cache = {"directory": str(tmp_path / "cache")}
    file.write_text(yaml.safe_dump({"providers": providers, "cache": cache}))
    done = await asyncio.to_thread(command, "check", "--config", file)
    assert done.code == 1
    assert "certificate not trusted: its issuer is not known" in done.out
