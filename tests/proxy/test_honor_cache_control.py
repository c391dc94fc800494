"""`server.honor_cache_control`: whose `Cache-Control` counts."""

import pytest
from embedding_proxy.proxy.config.loader import ConfigError
from embedding_proxy.proxy.config.schema import Server
from pages import taken
from pydantic import ValidationError

SMALL = "text-embedding-3-small"
KEYS = [{"key": "plain"}, {"key": "boss", "admin": True}]


async def _verdicts(proxy, key="any", **headers):
    """Return what `x-cache` says of a request that is known, and of the same with headers."""
    body = {"model": SMALL, "input": "a"}
    for sent in ({}, headers):
        response = await proxy.post(body, Authorization=f"Bearer {key}", **sent)
    return response.headers.get("x-cache", str(response.status))


@pytest.mark.parametrize(
    ("honor", "key", "verdict"),
    [
        (True, "plain", "miss"),
        (True, "boss", "miss"),
        ("admin", "plain", "hit"),
        ("admin", "boss", "miss"),
        (False, "plain", "hit"),
        (False, "boss", "hit"),
    ],
)
async def test_the_header_counts_for_whom_it_should(honor, key, verdict, start_proxy, upstream):
    """`no-cache` buys anew for everybody, for keys with `admin: true`, or for nobody."""
    server = {"keys": KEYS, "honor_cache_control": honor}
    proxy = await start_proxy(openai=upstream, server=server)
    assert await _verdicts(proxy, key, **{"Cache-Control": "no-cache"}) == verdict
    assert len(upstream.calls) == (2 if verdict == "miss" else 1)


@pytest.mark.parametrize(("honor", "verdict"), [(True, "miss"), ("admin", "miss"), (False, "hit")])
async def test_without_keys_everybody_is_an_admin(honor, verdict, start_proxy, upstream):
    """An open proxy is on a loopback address; whoever asks there is its operator."""
    proxy = await start_proxy(openai=upstream, server={"honor_cache_control": honor})
    assert await _verdicts(proxy, **{"Cache-Control": "no-cache"}) == verdict


async def test_a_header_that_does_not_count_says_nothing_at_all(start_proxy, upstream):
    """With `false` neither `no-store` nor `only-if-cached` nor an age does anything."""
    proxy = await start_proxy(openai=upstream, server={"honor_cache_control": False})
    body = {"model": SMALL, "input": "new"}
    first = await proxy.post(body, **{"Cache-Control": "no-store, only-if-cached, max-age=0"})
    assert (first.status, first.headers["x-cache"]) == (200, "miss")
    assert (await proxy.post(body)).headers["x-cache"] == "hit"


async def test_many_inputs_of_two_keys_are_told_apart(start_proxy, upstream):
    """A long body, kept by its digest, is answered by the terms of the key that sends it."""
    server = {"keys": KEYS, "honor_cache_control": "admin"}
    proxy = await start_proxy(openai=upstream, server=server)
    body = {"model": SMALL, "input": [f"text {number}" for number in range(200)]}
    verdicts = []
    for key in ("plain", "plain", "boss", "plain"):
        headers = {"Authorization": f"Bearer {key}", "Cache-Control": "no-cache"}
        verdicts.append((await proxy.post(body, **headers)).headers["x-cache"])
    assert verdicts == ["miss", "hit", "miss", "hit"]


async def test_pragma_is_not_looked_at(start_proxy, upstream):
    """What some libraries send beside the header buys nothing, and neither does it by `admin`."""
    server = {"honor_cache_control": "admin"}
    proxy = await start_proxy(openai=upstream, server=server)
    assert await _verdicts(proxy, Pragma="no-cache") == "hit"


@pytest.mark.parametrize("value", ["yes", "Admin", 1, None, "on"])
def test_another_value_is_refused(value):
    """What is none of the three is no configuration, and the remedy is named."""
    with pytest.raises(ValidationError, match="expected true, admin or false"):
        Server(honor_cache_control=value)


def test_a_mistake_is_told_with_its_key(tmp_path):
    """The message names the file, the key and what may stand there."""
    with pytest.raises(ConfigError, match=r"server\.honor_cache_control: expected true, admin or"):
        taken("server: {honor_cache_control: sometimes}", tmp_path)
