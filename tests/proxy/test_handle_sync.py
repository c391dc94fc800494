"""Bodies under heads that came before: which are answered at once, for whom, how it is counted."""

import gzip
import json
from dataclasses import replace

import pytest
from conftest import Proxy
from embedding_proxy.cache.disk.store import Store
from embedding_proxy.cache.tiers import Tiers
from embedding_proxy.proxy.http import openai_format, response_cache
from embedding_proxy.proxy.http.app_runner import RESPONSES
from embedding_proxy.proxy.http.framing import plain_request
from fault_server import FaultServer
from hypothesis import given
from hypothesis import strategies as st
from talk import Talk

MODEL = "text-embedding-3-small"
KNOWN = ["a", "b", "c"]


def _body(given: object, **fields: object) -> bytes:
    return json.dumps({"model": MODEL, "input": given, "dimensions": 4, **fields}).encode()


def _post(body: bytes, *lines: bytes, path: bytes = b"/v1/embeddings") -> bytes:
    head = (b"POST %b HTTP/1.1" % path, b"Host: h", b"Content-Length: %d" % len(body), *lines)
    return b"\r\n".join(head) + b"\r\n\r\n" + body


async def _ask(proxy: Proxy, *requests: bytes) -> list[tuple[int, dict[str, str], dict]]:
    """Send requests on one connection, each once the last one was answered."""
    async with Talk(proxy.url, b"") as talk:
        replies = []
        for request in requests:
            await talk.send(request)
            replies.append(await talk.response())
        return replies


@pytest.fixture
async def proxy(upstream, start_proxy):
    """Give a proxy that knows three texts, and no head."""
    proxy = await start_proxy(openai=upstream)
    await proxy.post({"model": MODEL, "input": KNOWN, "dimensions": 4})
    return proxy


def _split(data: bytes) -> tuple[bytes, bytes] | None:
    """Return what a request's head is known by, and its body; None unless data is one request."""
    found = plain_request(data, data.find(b"\r\n\r\n"), len(data))
    if found is None or found.end != len(data):
        return None
    return found.head, data[found.begin :]


# --- what is known by its head --------------------------------------------------------------------


@given(st.binary(max_size=30), st.binary(max_size=30), st.sampled_from([b"", b"0", b"000"]))
def test_a_head_is_known_whatever_the_length_of_its_body(one, other, zeros):
    """Of two requests that differ in nothing but their bodies, the heads are the same."""
    first, second = (_split(_post(body)) for body in (one, other))
    spelt = _split(_post(other).replace(b"Length: ", b"Length: " + zeros))
    assert first
    assert second
    assert spelt
    assert first[0] == second[0] == spelt[0]
    assert (first[1], second[1], spelt[1]) == (one, other, other)


@given(st.binary(max_size=9), st.integers(-3, 3), st.sampled_from([b"X: 1", b"x-key: 2"]))
def test_nothing_else_of_a_head_may_differ(body, more, line):
    """One with another line is another; and what is not one whole request is none."""
    plain, lined = _split(_post(body)), _split(_post(body, line))
    assert plain
    assert lined
    assert plain[0] != lined[0]
    request = _post(body)
    cut = request[:more] if more < 0 else request + bytes(more)
    assert (_split(cut) is not None) == (more == 0)


@pytest.mark.parametrize(
    "request_",
    [
        b"POST / HTTP/1.1\r\nHost: h\r\n\r\n",
        b"POST / HTTP/1.1\r\nContent-Length: 1",
        b"POST / HTTP/1.1\r\nContent-Length: +1\r\n\r\nx",
        b"POST / HTTP/1.1\r\nContent-Length : 1\r\n\r\nx",
        b"POST / HTTP/1.1\r\nX-Content-Length: 1\r\n\r\nx",
        b"POST / HTTP/1.1\r\nX: 1\r\n\r\n\r\nContent-Length: 1\r\n\r\nx",
        b"POST / HTTP/1.1\r\nContent-Length: " + 5000 * b"0" + b"1\r\n\r\nx",
        b"",
    ],
)
def test_a_length_that_is_not_plain_makes_no_head_known(request_):
    """It is left to aiohttp, as are heads without one."""
    assert _split(request_) is None


async def test_heads_take_no_more_than_their_room(proxy, at_once, monkeypatch):
    """Clients that send something else in each head are answered as ever."""
    monkeypatch.setattr(proxy.app[RESPONSES].heads, "max_size", 6 * response_cache._OVERHEAD)
    requests = [_post(_body("a"), b"X-Trace: %d" % number) for number in range(20)]
    replies = await _ask(proxy, *requests)
    assert {reply[1]["x-cache"] for reply in replies} == {"hit"}
    assert not at_once
    assert 0 < len(proxy.app[RESPONSES].heads) <= 6


# --- what is answered so --------------------------------------------------------------------------


async def test_known_texts_in_new_bodies_are_answered_at_once(proxy, upstream, at_once):
    """The first request teaches the head; each later one gets what it asks for, in its form."""
    (_, _, first), *later = await _ask(
        proxy,
        _post(_body("a")),
        _post(_body("b")),
        _post(_body(["c", "a"], user="u")),
        _post(_body("a", encoding_format="float")),
        _post(_body("a", dimensions=2)),
    )
    assert len(at_once) == 4
    assert [reply[1]["x-cache"] for reply in later] == 4 * ["hit"]
    assert later[1][2]["data"][1]["embedding"] == first["data"][0]["embedding"]
    assert [reply[1]["x-cache-hits"] for reply in later] == ["1", "2", "1", "1"]
    assert len(later[3][2]["data"][0]["embedding"]) == 2
    assert upstream.inputs == KNOWN


async def test_a_miss_teaches_a_head_as_well(upstream, start_proxy, at_once):
    """What was bought under it is a hit at once."""
    proxy = await start_proxy(openai=upstream)
    replies = await _ask(proxy, _post(_body("new")), _post(_body("new", user="u")))
    assert [reply[1]["x-cache"] for reply in replies] == ["miss", "hit"]
    assert len(at_once) == 1


NOT_AT_ONCE = {
    "unknown": _body("new"),
    "partly known": _body(["a", "new"]),
    "twice": _body(["a", "a"]),
    "tokens": _body([1, 2]),
    "many": _body([f"text {number}" for number in range(9)]),
    "refused": _body(""),
    "no JSON": b"{",
    "no model": _body("a", model=""),
    "not to be indexed": _body("a", index=False),
}


@pytest.mark.parametrize("body", NOT_AT_ONCE.values(), ids=NOT_AT_ONCE)
async def test_all_else_is_read(body, proxy, at_once):
    """It is answered as it would be under a head that nobody has seen."""
    _, under_it = await _ask(proxy, _post(_body("a")), _post(body))
    assert not at_once
    (alone,) = await _ask(proxy, _post(body, b"X-Last: 1"))
    assert under_it[0] == alone[0]


async def test_a_reply_is_kept_and_so_repeated(proxy, at_once, repeated):
    """The same body once more is not even parsed."""
    await _ask(proxy, _post(_body("a")), *(3 * [_post(_body("b"))]))
    assert (len(at_once), len(repeated)) == (1, 2)


@pytest.mark.parametrize("said", [b"no-cache", b"no-store", b"max-age=60"])
async def test_what_a_head_says_of_the_cache_is_heeded(said, proxy, upstream, at_once):
    """Under terms of its own, no request is answered at once."""
    line = b"Cache-Control: " + said
    before = len(upstream.inputs)
    replies = await _ask(proxy, *(_post(_body(text), line) for text in KNOWN))
    assert {reply[0] for reply in replies} == {200}
    assert not at_once
    assert len(upstream.inputs) - before == (3 if said == b"no-cache" else 0)


async def test_a_compressed_body_is_read(proxy, at_once):
    """Its head does not make it known."""
    bodies = [gzip.compress(_body(text)) for text in KNOWN]
    replies = await _ask(proxy, *(_post(body, b"Content-Encoding: gzip") for body in bodies))
    assert [reply[0] for reply in replies] == [200, 200, 200]
    assert not at_once


async def test_a_model_that_the_path_names_counts(proxy, at_once):
    """It is part of the head."""
    path = b"/openai/deployments/%b/embeddings?api-version=1" % MODEL.encode()
    bodies = [b'{"input":"%b","dimensions":4}' % text.encode() for text in KNOWN]
    replies = await _ask(proxy, *(_post(body, path=path) for body in bodies))
    assert [reply[1]["x-cache"] for reply in replies] == 3 * ["hit"]
    assert len(at_once) == 2


async def test_a_width_by_a_strategy_is_not_given_at_once(upstream, start_proxy, at_once):
    """Other code makes those vectors, which may take its time."""
    proxy = await start_proxy(openai=upstream, models={MODEL: {"dimension_policy": "pad"}})
    requests = [_post(_body("a", dimensions=1540, user=f"{n}")) for n in range(3)]
    assert [reply[0] for reply in await _ask(proxy, *requests)] == [200, 200, 200]
    assert len(at_once) == 2
    models = proxy.service.models
    models[MODEL] = replace(models[MODEL], dimension_policy="acme")
    assert (await _ask(proxy, _post(_body("a", user="x"))))[0][0] == 500
    assert len(at_once) == 2


# --- whose it is ----------------------------------------------------------------------------------


async def test_each_key_has_its_own_head(upstream, start_proxy, at_once):
    """A wrong key is refused, one of another namespace buys its own, and all is on its account."""
    keys = [{"key": "one", "name": "ci"}, {"key": "two", "namespace": "two", "name": "dev"}]
    proxy = await start_proxy(openai=upstream, server={"keys": keys})

    def asked(key: bytes, text: str, user: str = "") -> bytes:
        return _post(_body(text, user=user), b"Authorization: Bearer " + key)

    for key in (b"one", b"two"):
        told = [asked(key, text, f"{n}") for n, text in enumerate("ababac")]
        replies = await _ask(proxy, *told)
        verdicts = ["miss", "miss", "hit", "hit", "hit", "miss"]
        assert [reply[1]["x-cache"] for reply in replies] == verdicts
    assert upstream.inputs == ["a", "b", "c", "a", "b", "c"]
    assert len(at_once) == 6
    for key in (b"three", b"", b"on", b"one two"):
        (refused,) = await _ask(proxy, asked(key, "a"))
        assert refused[0] == 401
    sums = {heading.client: [0, 0] for heading in proxy.service.counted}
    for heading, usage in proxy.service.counted.items():
        sums[heading.client][0] += usage.hits
        sums[heading.client][1] += usage.misses
    assert sums == {"ci": [3, 3], "dev": [3, 3]}
    kept = repr(proxy.app[RESPONSES].heads.items())
    assert "'ci'" in kept
    assert "Bearer" not in kept


async def test_a_page_of_another_origin_is_told_so(upstream, start_proxy, at_once):
    """What a reply says to the page that asked is part of what is known of its head."""
    proxy = await start_proxy(openai=upstream, server={"cors": ["https://app.example"]})
    origin = b"Origin: https://app.example"
    replies = await _ask(proxy, *(_post(_body("a", user=f"{n}"), origin) for n in range(3)))
    assert len(at_once) == 2
    headers = [
        {name: value for name, value in reply[1].items() if name not in {"date", "x-request-id"}}
        for reply in replies[1:]
    ]
    assert headers[0] == headers[1]
    assert headers[0]["access-control-allow-origin"] == "https://app.example"


async def test_what_only_the_disk_has_is_answered_at_once(upstream: FaultServer, proxy, at_once):
    """The tiers are asked each time; what the page cache holds is not waited for either."""
    await _ask(proxy, _post(_body("a")), _post(_body("b")))
    assert len(at_once) == 1
    proxy.service._storage.tiers.memory.clear()
    upstream.calls.clear()
    ((_, headers, _),) = await _ask(proxy, _post(_body("b", user="u")))
    assert (headers["x-cache"], upstream.calls, len(at_once)) == ("hit", [], 2)
    assert proxy.service._storage.tiers.counters.disk_hits == 1


# --- what is not answered so ----------------------------------------------------------------------


@pytest.mark.parametrize("given", ["new", ["a", "new"], ["a", "b", "new", "c"]])
async def test_a_miss_is_parsed_and_looked_up_once(proxy, monkeypatch, given):
    """What the fast path found of a request goes on with it, and counts once."""
    addresses, bodies = [], []
    for name in ("lookup", "lookup_nowait"):
        _note_calls(monkeypatch, Store, name, lambda _store, some: addresses.extend(some))
    _note_calls(monkeypatch, openai_format, "parse", lambda body, *_: bodies.append(body))
    before = replace(proxy.service.counters)
    taught, missed, known = await _ask(proxy, *map(_post, map(_body, ["a", given, "new"])))
    assert [one[1]["x-cache"] for one in (taught, known)] == ["hit", "hit"]
    number = 1 if given == "new" else len(given)
    assert missed[1]["x-cache"] == ("miss" if number == 1 else "partial")
    assert [len(one["embedding"]) for one in missed[2]["data"]] == number * [4]
    assert (len(addresses), len(bodies)) == (1, 3)
    after = proxy.service.counters
    assert after.misses - before.misses == 1
    assert after.memory_hits - before.memory_hits == 1 + number - 1 + 1


async def test_a_body_in_chunks_is_not_taken_for_the_request_before(proxy):
    """Nothing of it is kept under the key of a request that was answered on its connection."""
    body = _body("b")
    chunks = b"%x\r\n%b\r\n0\r\n\r\n" % (len(body), body)
    head = b"POST /v1/embeddings HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\n"
    same = [_post(_body("a"))] * 3
    *known, other, again = await _ask(proxy, *same, head + chunks, same[0])
    assert [one[2]["data"] for one in (*known, again)] == [known[0][2]["data"]] * 4
    assert other[2]["data"] != known[0][2]["data"]


async def test_what_lands_behind_a_look_up_is_not_bought_again(proxy, upstream, monkeypatch):
    """Between the fast path and the handler another request may buy the same."""
    finish, spy = Tiers.finish, []

    async def bought_meanwhile(tiers, *given):
        if not spy:
            spy.append(1)
            await proxy.post({"model": MODEL, "input": "new", "dimensions": 4})
        return await finish(tiers, *given)

    (taught,) = await _ask(proxy, _post(_body("a")))
    monkeypatch.setattr(Tiers, "finish", bought_meanwhile)
    (late,) = await _ask(proxy, _post(_body("new")))
    assert (taught[0], late[0], spy) == (200, 200, [1])
    assert upstream.inputs == [*KNOWN, "new"]


def _note_calls(monkeypatch, where, name, note):
    """Let `note` see the arguments of each call."""
    call = getattr(where, name)

    def noted(*given, **named):
        note(*given)
        return call(*given, **named)

    monkeypatch.setattr(where, name, noted)
