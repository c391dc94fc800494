"""The probes and the page at `/`: open to everyone, and of no opinion about providers."""

from importlib.metadata import version

import pytest
from embedding_proxy.proxy.http.status import DESCRIPTION_PATH, OPEN_PATHS


def test_probes_have_the_names_that_tools_ask_for():
    """Kubernetes' own names, and those that most other tools ask for without being told."""
    assert {"/livez", "/readyz", "/healthz", "/health", DESCRIPTION_PATH} == OPEN_PATHS


@pytest.mark.parametrize("path", sorted(OPEN_PATHS - {DESCRIPTION_PATH}))
async def test_probes_need_no_key_and_no_provider(path, upstream, start_proxy):
    """Probes get 200 without a key, though keys are set and no provider answers."""
    proxy = await start_proxy(openai=upstream, server={"keys": ["k"]})
    await upstream.stop()
    async with proxy.http.get(proxy.url.removesuffix("/v1") + path) as response:
        assert (response.status, await response.json()) == (200, {"status": "ok"})


async def test_nothing_else_is_open(start_proxy):
    """Paths that only resemble a probe's are behind the keys like all others."""
    proxy = await start_proxy(server={"keys": ["k"]})
    paths = ("/livez/", "/livez/x", "/readyz%2F", "/v1/livez", "/v1/models", "/health/")
    for path in (*paths, "/?/", "/index.html"):
        async with proxy.http.get(proxy.url.removesuffix("/v1") + path) as response:
            assert response.status == (200 if path == "/?/" else 401), path


@pytest.mark.parametrize(
    ("keys", "sent", "is_known"),
    [((), None, True), (("k",), None, False), (("k",), "wrong", False), (("k",), "k", True)],
)
async def test_the_root_says_what_this_is_and_where_to_look(
    keys, sent, is_known, upstream, start_proxy
):
    """Name and routes for whoever opens it in a browser; the version for those who may ask."""
    proxy = await start_proxy(openai=upstream, server={"keys": keys})
    headers = {} if sent is None else {"Authorization": f"Bearer {sent}"}
    place = proxy.url.removesuffix("/v1")
    async with proxy.http.get(f"{place}/", headers=headers) as response:
        assert response.status == 200
        assert response.content_type == "application/json"
        text, told = await response.text(), await response.json()
    assert told["name"] == "embedding-proxy"
    assert told.get("version") == (version("embedding-proxy") if is_known else None)
    assert ("key" in told) == (not is_known)
    assert text.count("\n") > len(told)
    for routes in told["routes"].values():
        for route in routes.split(", "):
            method, path = route.split(" ")
            async with proxy.http.request(method, place + path) as reply:
                assert reply.status in ((200, 400) if not keys else (200, 401)), route
    for secret in ("openai-secret-key", upstream.url, str(proxy.service.settings.cache.directory)):
        assert secret not in text


async def test_the_root_takes_no_other_method(start_proxy):
    """What is posted there without a key meets no handler."""
    proxy = await start_proxy(server={"keys": ["k"]})
    async with proxy.http.post(proxy.url.removesuffix("/v1") + "/", json={}) as response:
        assert response.status == 405
