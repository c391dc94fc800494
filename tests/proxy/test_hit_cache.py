"""By what a long request is known: all of it, in pieces, between which others get their turn."""

import asyncio
import hashlib

import pytest
from conftest import IS_FAST
from embedding_proxy.proxy.http.app_runner import RESPONSES
from embedding_proxy.proxy.http.response_cache import HitCache, Hits, ResponseCache
from embedding_proxy.proxy.service.request import Client

_PIECE, MIN_BODY = HitCache._PIECE, HitCache.MIN_BODY

LENGTHS = [MIN_BODY, _PIECE - 1, _PIECE, _PIECE + 1, 3 * _PIECE, 3 * _PIECE + 1]


@pytest.fixture
def responses(monkeypatch):
    """Return what digests without a secret."""
    monkeypatch.setattr("secrets.token_bytes", bytes)
    return ResponseCache(0)


@pytest.mark.parametrize("length", LENGTHS)
async def test_it_is_that_of_the_whole_request(length, responses):
    """However it is cut, what is digested is who asked, how, and every byte of the body."""
    body = bytes(range(256)) * (length // 256 + 1)
    found = await HitCache(responses).digest(body[:length], Client("team", "me"), "no-store", "m")
    head = b"4:team2:me0:8:no-store1:m"
    assert found == hashlib.sha256(bytes(64) + head + body[:length]).digest()


@pytest.mark.parametrize("place", [0, _PIECE - 1, _PIECE, 2 * _PIECE, 2 * _PIECE + 9])
async def test_no_byte_is_left_out(place, responses):
    """Two bodies that differ in one byte are two requests."""
    body = bytearray(2 * _PIECE + 10)
    one = await HitCache(responses).digest(bytes(body), Client(), "", None)
    body[place] = 1
    assert await HitCache(responses).digest(bytes(body), Client(), "", None) != one


async def test_a_short_body_has_none(responses):
    """It is parsed as quickly."""
    assert await HitCache(responses).digest(bytes(MIN_BODY - 1), Client(), "", None) is None


async def test_others_get_their_turn(responses):
    """A long body takes as many turns as it has pieces."""
    task, turns = (
        asyncio.ensure_future(HitCache(responses).digest(bytes(5 * _PIECE), Client(), "", None)),
        0,
    )
    while not task.done():
        await asyncio.sleep(0)
        turns += 1
    assert turns >= 5


@pytest.mark.skipif(not IS_FAST, reason="the fast path is off")
async def test_a_long_response_that_comes_again_is_kept_whole(start_proxy, upstream):
    """Its bytes stay the same; what is bought anew ends it, and each is counted."""
    proxy = await start_proxy(openai=upstream)
    asked = {
        "model": "text-embedding-3-small",
        "input": [f"{number} of a long request" for number in range(60)],
        "encoding_format": "base64",
    }
    bodies = []
    for _ in range(5):
        reply = await proxy.post(asked)
        bodies.append((reply.headers["x-cache"], reply.content_length, await reply.text()))
    assert [one[0] for one in bodies] == ["miss", "hit", "hit", "hit", "hit"]
    assert len(set(bodies[1:])) == 1
    assert bodies[0][2] == bodies[1][2]
    kept = [one for _, one in proxy.app[RESPONSES].lru.items() if isinstance(one, Hits)]
    assert [one.rendered.decode() for one in kept] == [bodies[1][2]]
    assert sum(usage.hits for usage in proxy.service.counted.values()) == 4 * 60
    upstream.always = upstream.altered(
        lambda reply: reply.update(upstream.reply(asked | {"input": asked["input"][::-1]}))
    )
    anew = await (await proxy.post(asked, **{"Cache-Control": "no-cache"})).text()
    assert anew != bodies[1][2]
    for _ in range(3):
        assert await (await proxy.post(asked)).text() == anew


@pytest.mark.skipif(not IS_FAST, reason="the fast path is off")
async def test_a_response_without_room_is_not_kept_whole(start_proxy, upstream):
    """One may take a part of what all may take."""
    proxy = await start_proxy(openai=upstream, cache={"memory_mib": 2})
    asked = {
        "model": "text-embedding-3-small",
        "input": [f"{number} of a long request" for number in range(60)],
        "encoding_format": "base64",
    }
    bodies = {await (await proxy.post(asked)).text() for _ in range(4)}
    assert len(bodies) == 1
    kept = [one for _, one in proxy.app[RESPONSES].lru.items() if isinstance(one, Hits)]
    assert [one.rendered for one in kept] == [b""]
