"""The probes: open to everyone, and of no opinion about providers."""

import pytest

from proxy.http.ops import DESCRIPTION_PATH, OPEN_PATHS


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
    for path in ("/livez/", "/livez/x", "/readyz%2F", "/v1/livez", "//livez", "/v1/models", "/"):
        async with proxy.http.get(proxy.url.removesuffix("/v1") + path) as response:
            assert response.status == (400 if path.startswith("//") else 401), path
