"""What is kept of replies, for whom, how much of it, and what puts an end to it."""

import asyncio
import json
import re
import sys
import time

import pytest
from clock import Clock
from embedding_proxy.cache.ledger import Usage
from embedding_proxy.proxy.cli import main
from embedding_proxy.proxy.http import connection
from embedding_proxy.proxy.http.app_runner import RESPONSES
from embedding_proxy.proxy.http.response_cache import (
    _INPUT_BYTES,
    _OVERHEAD,
    MAX_RESPONSE,
    CachedResponse,
    RequestKey,
    ResponseCache,
)
from fault_server import status
from hypothesis import given
from hypothesis import strategies as st

MODEL = "text-embedding-3-small"
ASKED = {"model": MODEL, "input": "a b", "dimensions": 4}


def _reply(size: int, *, holds: bool = True, inputs: int = 0) -> CachedResponse:
    return CachedResponse(b"", bytes(size - _OVERHEAD), lambda: holds, inputs)


def _key(name: bytes) -> RequestKey:
    return RequestKey(b"head", name)


# --- the map -------------------------------------------------------------------------------------


def _kept(responses: ResponseCache) -> list[CachedResponse]:
    """Return the responses that are kept; other things are kept with them."""
    return [one for _, one in responses.lru.items() if isinstance(one, CachedResponse)]


@given(
    st.lists(st.tuples(st.booleans(), st.integers(0, 9), st.integers(1, 4)), max_size=60),
    st.integers(0, 9),
)
def test_no_more_is_kept_than_allowed_and_the_least_used_goes_first(acts, room):
    """It is as large as it says, never larger than it may be, and forgets in order of use."""
    responses, known = ResponseCache(room * _OVERHEAD), {}
    for keeps, number, size in acts:
        digest = bytes([number])
        key = _key(digest)
        if keeps:
            reply = _reply(size * _OVERHEAD)
            responses.put(key.whole, reply)
            known.pop(digest, None)
            if size <= room:
                known[digest] = reply
            while sum(len(one.body) + _OVERHEAD for one in known.values()) > room * _OVERHEAD:
                del known[next(iter(known))]
        else:
            assert responses.get(key, b"") is known.get(digest)
            if digest in known:
                known[digest] = known.pop(digest)
        assert _kept(responses) == list(known.values())
        assert responses.lru.size == sum(len(one.body) + _OVERHEAD for one in known.values())


def test_what_no_longer_holds_is_dropped():
    """It is asked each time; once it says no, nothing is left of it."""
    responses = ResponseCache(1 << 20)
    responses.put(b"1", _reply(5000, holds=False))
    assert responses.get(_key(b"1"), b"") is None
    assert (len(responses.lru), responses.lru.size) == (0, 0)


def test_what_each_input_takes_counts():
    """A short reply to many inputs is as large as what tells whether it still holds."""
    responses = ResponseCache(1 << 20)
    responses.put(b"1", _reply(2000, inputs=3))
    assert responses.lru.size == 2000 + 3 * _INPUT_BYTES
    responses.put(b"2", _reply(2000, inputs=MAX_RESPONSE // _INPUT_BYTES))
    assert len(responses.lru) == 1


def test_a_reply_that_is_too_long_is_not_kept():
    """One may take so much and no more, however much room there is."""
    responses = ResponseCache(1 << 30)
    responses.put(b"1", _reply(MAX_RESPONSE + 1))
    assert not _kept(responses)
    responses.put(b"1", _reply(MAX_RESPONSE))
    assert len(_kept(responses)) == 1


def test_a_request_is_known_by_a_digest_of_this_process():
    """Equal requests have equal digests, of 32 bytes, which are nobody else's to make."""
    ours, others = ResponseCache(1), ResponseCache(1)
    key = ours.key(b"a", b"b")
    assert key == ours.key(b"a", b"b")
    assert key.head == ours.key(b"a", b"c").head
    told = [key, ours.key(b"ab", b""), ours.key(b"", b"ab"), others.key(b"a", b"b")]
    assert len({one for each in told for one in (each.head, each.whole)}) == 8
    assert (len(key.head), len(key.whole)) == (32, 32)


# --- what puts an end to one ----------------------------------------------------------------------


async def _ask(proxy, asked: object = ASKED, **headers: str):
    reply = await proxy.post(asked, **headers)
    assert reply.status == 200
    return (await reply.json())["data"], reply.headers


async def _known(proxy, repeated: list[CachedResponse]) -> object:
    """Ask until the reply is one that was given before; return what it holds."""
    for _ in range(3):
        data, _headers = await _ask(proxy)
    assert len(repeated) == 1
    del repeated[:]
    return data


def _other_vectors(upstream) -> None:
    """Let the upstream answer otherwise from now on, as a model that was changed does."""
    upstream.always = upstream.altered(lambda reply: reply.update(upstream.reply(ASKED | OTHER)))


OTHER = {"input": "something else", "encoding_format": "base64"}


async def test_a_newer_purchase_is_served_at_once(upstream, start_proxy, repeated):
    """Who asks as ever gets what another client has just had bought anew."""
    proxy = await start_proxy(openai=upstream)
    before = await _known(proxy, repeated)
    _other_vectors(upstream)
    anew, _ = await _ask(proxy, **{"Cache-Control": "no-cache"})
    assert anew != before
    for given_again in (0, 1, 2):
        assert (await _ask(proxy))[0] == anew
        assert len(repeated) == given_again


async def test_age_puts_an_end_to_it(upstream, start_proxy, repeated):
    """What may not be served any more by its age is not served from a reply either."""
    proxy = await start_proxy(openai=upstream, cache={"ttl_days": 1})
    clock = Clock()
    clock.now = time.time()
    proxy.service._storage.tiers.memory.clock = clock
    await _known(proxy, repeated)
    clock.now += 86_000
    await _ask(proxy)
    assert len(repeated) == 1
    clock.now += 401
    await _ask(proxy)
    assert len(repeated) == 1


@pytest.fixture
def command_on(tmp_path, monkeypatch):
    """Give what runs `cache …` on a proxy's cache, and lets the proxy heed it."""
    config = tmp_path / "config.yaml"
    config.write_text(json.dumps({"cache": {"directory": str(tmp_path / "cache")}}))

    async def run(proxy, *arguments: str) -> None:
        command = ["embedding-proxy", "cache", *arguments, "--config", str(config)]
        monkeypatch.setattr(sys, "argv", command)
        with pytest.raises(SystemExit):
            await asyncio.to_thread(main.main)
        await proxy.service._storage.store._apply_purges()

    return run


async def test_a_purge_by_a_command_puts_an_end_to_it(upstream, start_proxy, repeated, command_on):
    """Once the deletion is heeded, as for what is in memory, it is bought again."""
    proxy = await start_proxy(openai=upstream)
    await _known(proxy, repeated)
    await command_on(proxy, "purge", "--all", "--yes")
    assert (await _ask(proxy))[1]["x-cache"] == "miss"
    assert not repeated
    assert upstream.inputs == ["a b", "a b"]


async def test_eviction_from_memory_does_not_make_it_wrong(upstream, start_proxy, repeated):
    """With little memory, what others displaced there is still what it was."""
    proxy = await start_proxy(openai=upstream, cache={"memory_mib": 0.04})
    before = await _known(proxy, repeated)
    for number in range(8):
        await proxy.post({"model": MODEL, "input": f"text {number}", "dimensions": 4})
    disk_hits = proxy.service.counters.disk_hits
    data, headers = await _ask(proxy)
    assert (data, headers["x-cache"]) == (before, "hit")
    assert len(repeated) == 1
    assert proxy.service.counters.disk_hits == disk_hits


async def test_what_is_bought_anew_after_its_eviction_is_served(upstream, start_proxy, repeated):
    """Memory does not hold the entry that the kept reply was made of, and knows it all the same."""
    proxy = await start_proxy(openai=upstream, cache={"memory_mib": 0.04})
    before = await _known(proxy, repeated)
    for number in range(8):
        await proxy.post({"model": MODEL, "input": f"text {number}", "dimensions": 4})
    _other_vectors(upstream)
    anew, _ = await _ask(proxy, **{"Cache-Control": "no-cache"})
    assert anew != before
    assert (await _ask(proxy))[0] == anew
    assert not repeated


async def test_what_is_only_asked_so_stays_in_memory(upstream, start_proxy, repeated):
    """Others displace what was used longer ago, and each such reply is a use."""
    proxy = await start_proxy(openai=upstream, cache={"memory_mib": 0.04})
    await _known(proxy, repeated)
    for number in range(8):
        await proxy.post({"model": MODEL, "input": f"text {number}", "dimensions": 4})
        await _ask(proxy)
    assert len(repeated) == 8


@pytest.mark.parametrize("mode", ["refresh", "off"])
async def test_modes_that_buy_anew_repeat_nothing(mode, upstream, start_proxy, repeated):
    """Where each request has to be bought, nothing is kept."""
    await (await start_proxy(openai=upstream)).post(ASKED)
    await start_proxy.stop()
    proxy = await start_proxy(openai=upstream, cache={"mode": mode})
    for _ in range(3):
        await _ask(proxy)
    assert len(upstream.calls) == 4
    assert not repeated
    assert not _kept(proxy.app[RESPONSES])


@pytest.mark.parametrize("said", ["no-cache", "no-store", "max-age=60"])
async def test_requests_on_terms_of_their_own_repeat_nothing(said, upstream, start_proxy, repeated):
    """What a request says of the cache is heeded each time."""
    proxy = await start_proxy(openai=upstream)
    await _ask(proxy)
    for _ in range(3):
        await _ask(proxy, **{"Cache-Control": said})
    assert not repeated
    assert not _kept(proxy.app[RESPONSES])


@pytest.mark.parametrize(
    ("mode", "said", "code"), [("frozen", "", 404), ("normal", "only-if-cached", 504)]
)
async def test_what_may_not_be_bought_is_refused_once_it_is_gone(
    *, mode, said, code, upstream, start_proxy, repeated, command_on
):
    """Where nothing is bought, what is there is given again, and no longer than it is there."""
    await (await start_proxy(openai=upstream)).post(ASKED)
    await start_proxy.stop()
    proxy = await start_proxy(openai=upstream, cache={"mode": mode})
    for _ in range(4):
        await _ask(proxy, **{"Cache-Control": said})
    assert len(repeated) == 3
    await command_on(proxy, "purge", "--all", "--yes")
    assert (await proxy.post(ASKED, **{"Cache-Control": said})).status == code
    assert len(repeated) == 3
    assert len(upstream.calls) == 1


async def test_one_that_stood_in_is_not_repeated(upstream, second, start_proxy, repeated):
    """The first model is asked each time, so that it is served as soon as it is back."""
    second.widths = {"mistralai/mistral-embed-2312": 1024}
    fallback = {"model": "mistralai/mistral-embed-2312", "dimension_policy": "pad"}
    models = {MODEL: {"fallback": fallback, "routes": [{"provider": "openai", "model": MODEL}]}}
    proxy = await start_proxy(openai=upstream, openrouter=second, models=models)
    asked = {"model": MODEL, "input": "a b"}
    upstream.always = status(404)
    for _ in range(4):
        assert (await _ask(proxy, asked))[1]["x-embedding-fallback"] == "true"
    upstream.always = None
    for _ in range(4):
        assert "x-embedding-fallback" not in (await _ask(proxy, asked))[1]
    assert len(repeated) == 2


async def test_where_points_are_not_known_nothing_is_repeated(upstream, start_proxy, repeated):
    """Each request goes to Qdrant as well, though its vectors are known."""

    class Taken:
        count = 0

        async def take(self, *_: object) -> None:
            self.count += 1

        def knows(self, *_: object) -> bool:
            return False

        def reusable(self, *_: object) -> None:
            return None

    proxy = await start_proxy(openai=upstream)
    proxy.service.indexing = taken = Taken()
    for _ in range(4):
        await _ask(proxy)
    proxy.service.indexing = None
    assert taken.count == 4
    assert not repeated


NOT_KEPT = {
    "partly known": {"model": MODEL, "input": ["a b", "new"]},
    "twice the same": {"model": MODEL, "input": ["a b", "a b"]},
    "nothing known": {"model": MODEL, "input": ["new", "newer"]},
    "streamed": {"model": MODEL, "input": [f"text {number}" for number in range(50)]},
    "refused": {"model": MODEL, "input": ""},
}


@pytest.mark.parametrize("asked", NOT_KEPT.values(), ids=NOT_KEPT)
async def test_nothing_else_is_kept(asked, upstream, start_proxy, repeated, request):
    """What is no whole hit, an error, or too much is answered anew each time."""
    proxy = await start_proxy(openai=upstream)
    texts = [f"text {number}" for number in range(50)]
    await proxy.post({"model": MODEL, "input": ["a b", *texts]})
    for _ in range(1 if "new" in asked["input"] else 3):
        await proxy.post(asked)
        assert not _kept(proxy.app[RESPONSES])
    assert not repeated


# --- whose it is ----------------------------------------------------------------------------------


async def test_a_wrong_key_gets_nothing(upstream, start_proxy, repeated):
    """Whatever was kept, who has no right key is refused; who has another name sees his own."""
    keys = [{"key": "one"}, {"key": "two", "namespace": "two"}, {"key": "three", "name": "third"}]
    proxy = await start_proxy(openai=upstream, server={"keys": keys})
    before = None
    for key in ("one", "two"):
        for outcome in ("miss", "hit", "hit"):
            data, headers = await _ask(proxy, Authorization=f"Bearer {key}")
            assert headers["x-cache"] == outcome
        assert data != before
        before = data
        _other_vectors(upstream)
    assert len(repeated) == 2
    for given_as in ("Bearer ones", "Bearer ", "one", "bearer  none"):
        assert (await proxy.post(ASKED, Authorization=given_as)).status == 401
    assert (await proxy.post(ASKED)).status == 401
    assert len(repeated) == 2
    await _ask(proxy, Authorization="Bearer three")
    assert len(repeated) == 2


async def test_each_is_counted_as_any_other(upstream, start_proxy, repeated):
    """Ledger, status and metrics say the same of a reply, however it came to be."""
    keys = [{"key": "k", "name": "ci", "admin": True}, {"key": "l", "name": "dev"}]
    proxy = await start_proxy(openai=upstream, server={"keys": keys})
    counts = {"k": 7, "l": 4}
    for key, count in counts.items():
        for _ in range(count):
            await _ask(proxy, Authorization=f"Bearer {key}")
    assert len(repeated) == 7 - 2 + 4 - 1
    sums = {heading.client: Usage() for heading in proxy.service.counted}
    for heading, usage in proxy.service.counted.items():
        sums[heading.client] = sums[heading.client].plus(usage)
    tokens = sums["ci"].tokens_saved // 6
    assert tokens > 0
    assert (sums["ci"].hits, sums["ci"].misses) == (6, 1)
    assert (sums["dev"].hits, sums["dev"].misses, sums["dev"].tokens_saved) == (4, 0, 4 * tokens)
    assert sums["ci"].nanodollars_saved == 6 * tokens * 20
    known = {"Authorization": "Bearer k"}
    place = proxy.url.removesuffix("/v1")
    async with proxy.http.get(f"{place}/status", headers=known) as reply:
        told = await reply.json()
    assert told["since_start"]["hits"] == 10
    assert told["since_start"]["tokens_saved"] == 10 * tokens
    hits = {"memory_hits": 10, "disk_hits": 0, "shared_hits": 0}
    assert told["tiers"] == {**hits, "misses": 1, "mismatches": 0}
    await proxy.service._storage.store._writer.flush()
    async with proxy.http.get(f"{place}/metrics", headers=known) as reply:
        lines = await reply.text()
    for client, hits in (("ci", 6), ("dev", 4)):
        told = re.findall(rf'inputs_total{{.*client="{client}".*outcome="hits".*}} (.*)', lines)
        assert sum(map(float, told)) == hits
    assert re.search(r'cache_lookups_total{.*result="memory"} 10.0', lines)


async def test_each_has_an_id_and_the_time_of_its_own(upstream, start_proxy, repeated, monkeypatch):
    """All other headers are those of the reply that was kept, each once."""
    proxy = await start_proxy(openai=upstream)
    await _known(proxy, repeated)
    moments = iter(("Mon, 01 Jan 2001 00:00:00 GMT", "Tue, 02 Jan 2001 00:00:00 GMT"))
    monkeypatch.setattr(connection, "rfc822_formatted_time", lambda: next(moments))
    (_, first), (_, second) = [await _ask(proxy) for _ in range(2)]
    assert len(repeated) == 2
    assert first["Date"] != second["Date"]
    assert first["x-request-id"] != second["x-request-id"]
    assert all(re.fullmatch("req_[0-9a-f]{32}", one["x-request-id"]) for one in (first, second))
    without = [
        sorted(pair for pair in one.items() if pair[0].lower() not in ("date", "x-request-id"))
        for one in (first, second)
    ]
    assert without[0] == without[1]
    assert all(len(one) == len(without[0]) + 2 for one in (first, second))
    assert {"x-cache", "x-tokens-saved", "Content-Type", "Server"} <= set(first)


async def test_neither_texts_nor_keys_are_kept(upstream, start_proxy, repeated):
    """What is left of a request is a digest, and where its vectors are."""
    keys = [{"key": "sk-canary-key", "name": "ci"}]
    proxy = await start_proxy(openai=upstream, server={"keys": keys})
    asked = {"model": MODEL, "input": 99 * "canary text", "dimensions": 4, "user": "canary user"}
    for _ in range(3):
        await proxy.post(asked, Authorization="Bearer sk-canary-key")
    assert len(repeated) == 1
    kept = repr(proxy.app[RESPONSES].lru.items())
    assert "CachedHit(" in kept
    assert "canary" not in kept
