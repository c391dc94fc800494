"""What an operator is told of a running proxy."""

import socket
from importlib.metadata import version

from fault_server import status, tokens_of

MODELS = {
    "m": {"space": "s/m", "dimensions": 8, "price": 0.5, "routes": [
        {"provider": "openai", "model": "m"}]},
    "n": {"space": "s/n", "dimensions": 8, "routes": [
        {"provider": "openrouter", "model": "n"}]},
}  # fmt: skip
KEYS = [{"key": "k", "admin": True, "name": "ci"}]


async def _told(proxy, key="k"):
    url = proxy.url.removesuffix("/v1") + "/status"
    async with proxy.http.get(url, headers={"Authorization": f"Bearer {key}"}) as response:
        return response.status, await response.json()


async def test_the_state_is_told_to_those_who_have_a_key(start_proxy):
    """It says what a bill says, so it is not for everyone."""
    proxy = await start_proxy(server={"keys": KEYS})
    assert (await _told(proxy, "wrong"))[0] == 401
    assert (await _told(proxy))[0] == 200


async def test_models_and_providers_are_told_with_what_ails_them(upstream, start_proxy):
    """A model without a provider says what to set; a provider that fails says how."""
    upstream.always = status(401)
    proxy = await start_proxy(openai=upstream, models=MODELS)
    assert (await proxy.post({"model": "m", "input": "a"})).status == 403
    _, told = await _told(proxy)
    assert told["models"]["m"] == {"space": "s/m", "usable": True, "why": None}
    assert not told["models"]["n"]["usable"]
    assert "openrouter" in told["models"]["n"]["why"]
    assert told["providers"]["openai"]["why"] == "key refused"
    assert told["providers"]["openai"]["failures"] == {"authentication_error": 1}
    assert told["retry_budget"] == {"tokens": 20.0, "max_tokens": 20.0, "can_retry": True}
    assert (told["version"], told["node"]) == (version("embedding-proxy"), socket.gethostname())
    assert told["uptime_s"] >= 0
    assert told["cache"] == {"directory": str(proxy.service.settings.cache.directory)}
    assert told["cache"]["directory"].startswith("/")


async def test_the_bill_is_told_since_the_start_and_since_ever(upstream, start_proxy):
    """What was counted before a restart is in the one and not in the other."""
    upstream.widths = {"m": 8}
    for lives in (1, 2):
        proxy = await start_proxy(openai=upstream, models=MODELS, server={"keys": KEYS})
        for text in (f"text {lives}", "text 0"):
            asked = {"model": "m", "input": [text, text]}
            assert (await proxy.post(asked, Authorization="Bearer k")).status == 200
        _, told = await _told(proxy)
        misses = 3 - lives
        since = told["since_start"]
        assert (since["misses"], since["hits"], since["duplicates"]) == (misses, lives - 1, 2)
        assert since["tokens_billed"] == misses * tokens_of("text 0")
        assert since["usd_billed"] == misses * 2 * 500 / 1e9
        assert since["models"] == {"m": {name: since[name] for name in since["models"]["m"]}}
        assert told["tiers"]["misses"] == misses
        await start_proxy.stop()
    proxy = await start_proxy(openai=upstream, models=MODELS)
    _, told = await _told(proxy)
    assert told["since_start"]["models"] == {}
    ever = told["since_ever"]
    assert (ever["misses"], ever["hits"], ever["duplicates"]) == (3, 1, 4)
    assert ever["models"].keys() == {"m"}
