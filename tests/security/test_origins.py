"""A provider's key goes to that provider's origin and nowhere else, whatever asks for it."""

import asyncio
from collections.abc import AsyncIterator

import aiohttp
import pytest
from aiohttp import web
from any_server import AnyServer
from embedding_proxy.providers.network import BaseUrl, ForeignOrigin, Network
from hypothesis import given
from hypothesis import strategies as st
from talk import Talk
from yarl import URL

KEY = "openai-secret-key"


@pytest.fixture
async def foreign() -> AsyncIterator[AnyServer]:
    """Give a server that is nobody's provider."""
    async with AnyServer() as server:
        yield server


REFUSED = [
    "t://x/v1/files",
    "pany://x/v1/files",
    "ws://x/v1/files",
    "t://x/v1/embeddings",
    "t://x/livez",
    "http://user@x/v1/files",
    "http://user:password@x/v1/files",
    "HTTPS://user@x/v1/files",
    "http://x",
    "//x/v1/files",
    "///v1/files",
    "/%2Fx/v1/files",
    "/%252Fx/v1/files",
    "/%5Cx/v1/files",
    "/\\x/v1/files",
    "/v1/a\\b",
    "/v1/a%5Cb",
    "/v1/a%255Cb",
    "http://x//y/v1/files",
]


@pytest.mark.parametrize("target", REFUSED)
async def test_a_target_that_could_name_another_host_is_a_400(target, other, start_proxy):
    """Another scheme, a second host, a user name or a backslash is refused, and nobody is asked."""
    proxy = await start_proxy(openai=other, passthrough="openai")
    async with Talk(proxy.url, f"GET {target} HTTP/1.1\r\nHost: h\r\n\r\n".encode()) as talk:
        status, headers, body = await talk.response()
    assert (status, headers["content-type"]) == (400, "application/json")
    assert body["error"]["type"] == "invalid_request_error"
    assert "user" not in body["error"]["message"].replace("user name", "")
    assert not other.seen


@pytest.mark.parametrize("base", ["https://api.acme.com", "https://api.acme.com/v1", "http://h:81"])
@given(st.text(st.characters(codec="ascii", exclude_categories=["Cc"]), max_size=30))
def test_no_target_leaves_the_origin_of_a_base_url(base, target):
    """What is built below a base URL has its scheme, host and port, or is not built."""
    try:
        url = BaseUrl(base).join(target)
    except (ValueError, ForeignOrigin):
        return
    assert url.origin() == URL(base).origin()
    assert str(url).startswith(f"{base}/")


async def test_a_call_to_another_origin_is_not_sent(foreign, other):
    """The session of an upstream refuses every other address before a header is written."""
    async with Network().open_session(other.url, connections=1) as session:
        with pytest.raises(ForeignOrigin):
            await session.get(foreign.url, headers={"api-key": KEY})
        async with session.get(f"{other.url}/x") as reply:
            assert reply.status == 200
    assert not foreign.seen


async def test_a_redirect_is_not_followed_with_the_key(foreign, other):
    """Also a caller that lets aiohttp follow redirects does not leave the origin."""

    async def act(_: web.Request) -> web.Response:
        return web.Response(status=307, headers={"Location": f"{foreign.url}/x"})

    other.act = act
    async with Network().open_session(other.url, connections=1) as session:
        with pytest.raises(ForeignOrigin):
            await session.get(f"{other.url}/x", headers={"api-key": KEY})
    assert not foreign.seen


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
async def test_a_websocket_does_not_follow_a_redirect(status, foreign, other, start_proxy):
    """A handshake that is answered with a redirect has failed; the key stays where it is."""

    async def act(_: web.Request) -> web.Response:
        return web.Response(status=status, headers={"Location": f"{foreign.url}/realtime"})

    other.act = act
    proxy = await start_proxy(
        openai=other,
        passthrough="azure",
        providers={"azure": {"base_url": other.url, "api_key_env": "OPENAI_API_KEY"}},
    )
    async with asyncio.timeout(60):
        with pytest.raises(aiohttp.WSServerHandshakeError) as caught:
            await proxy.http.ws_connect(f"{proxy.url}/realtime")
    assert caught.value.status == 502
    assert other.seen[0].headers["api-key"] == KEY
    assert not foreign.seen
