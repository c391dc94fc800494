"""CORS: off unless configured; then browsers may ask without a key, and read the headers."""

import pytest

PAGE = "https://app.example"
ASKS = {
    "Origin": PAGE,
    "Access-Control-Request-Method": "POST",
    "Access-Control-Request-Headers": "authorization,content-type",
}
GOOD = {"model": "text-embedding-3-small", "input": "a"}


def _cors(response) -> dict[str, str]:
    return {
        name.lower().removeprefix("access-control-"): value
        for name, value in response.headers.items()
        if name.lower().startswith("access-control-")
    }


async def _ask(proxy, path="/embeddings", **headers):
    async with proxy.http.options(proxy.url + path, headers={**ASKS, **headers}) as response:
        await response.read()
        return response


@pytest.mark.parametrize("path", ["/embeddings", "/models", "/chat/completions"])
async def test_without_configuration_no_page_is_let_in(path, upstream, start_proxy):
    """By default a preflight is refused, and so is a simple request of a page."""
    proxy = await start_proxy(openai=upstream, server={"keys": ["ours"]})
    assert (await _ask(proxy, path)).status == 401
    proxy = await start_proxy(openai=upstream)
    assert (await _ask(proxy, path)).status == 403
    reply = await proxy.post(GOOD, Origin=PAGE)
    assert (reply.status, _cors(reply), "Vary" in reply.headers) == (403, {}, False)


@pytest.mark.parametrize("origins", [PAGE, [PAGE, "https://b.example"]])
@pytest.mark.parametrize("path", ["/embeddings", "/models", "/chat/completions"])
async def test_a_preflight_is_answered_without_a_key(origins, path, upstream, start_proxy):
    """Browsers send no key with their question; the answer names the page and what it asked for."""
    proxy = await start_proxy(openai=upstream, server={"keys": ["ours"], "cors": origins})
    reply = await _ask(proxy, path)
    assert reply.status == 204
    assert _cors(reply) == {
        "allow-origin": PAGE,
        "allow-methods": "POST",
        "allow-headers": "authorization,content-type",
        "expose-headers": "*",
        "max-age": "86400",
    }
    assert "Origin" in ", ".join(reply.headers.getall("Vary"))
    assert not upstream.calls


async def test_replies_may_be_read_errors_too(upstream, start_proxy):
    """The page sees every reply and its headers, also that its key is wrong."""
    proxy = await start_proxy(openai=upstream, server={"keys": ["ours"], "cors": [PAGE]})
    for key, status in (("ours", 200), ("wrong", 401)):
        reply = await proxy.post(GOOD, Origin=PAGE, Authorization=f"Bearer {key}")
        assert (reply.status, reply.headers["Access-Control-Allow-Origin"]) == (status, PAGE)


async def test_another_page_is_not_let_in(upstream, start_proxy):
    """What is not listed gets no leave, and caches are told that the answer depends on who asks."""
    proxy = await start_proxy(openai=upstream, server={"cors": [PAGE]})
    for origin in ("https://app.example.evil", "http://app.example", "null"):
        assert (await _ask(proxy, Origin=origin)).status == 403
        reply = await proxy.post(GOOD, Origin=origin)
        assert (_cors(reply), reply.headers["Vary"]) == ({}, "Origin")


async def test_a_star_lets_every_page_in(upstream, start_proxy):
    """With `*` any origin is answered with it; a request of no browser is told nothing."""
    proxy = await start_proxy(openai=upstream, server={"cors": "*"})
    assert _cors(await _ask(proxy, Origin="null"))["allow-origin"] == "*"
    assert _cors(await proxy.post(GOOD)) == {}
