"""What becomes of misses when upstreams refuse, fail, limit or hang: as both sides see it."""

import asyncio
import itertools

import aiohttp
import numpy as np
import orjson
import pytest
from aiohttp import web
from clock import until
from embedding_proxy.cache.disk import read_only
from fault_server import Call, status, vector_of

MODEL = "text-embedding-3-small"
JSON = "application/json"


def texts(count, name="text"):
    """Return inputs that are all different."""
    return [f"{name} {i}" for i in range(count)]


async def ask(proxy, inputs, **headers):
    """Send one request."""
    return await proxy.post({"model": MODEL, "input": inputs}, **headers)


async def right(response, inputs):
    """Check that a reply holds the right vectors in the right order."""
    assert response.status == 200, await response.text()
    data = (await response.json())["data"]
    assert [item["index"] for item in data] == list(range(len(inputs)))
    for item, text in zip(data, inputs, strict=True):
        assert np.array_equal(np.array(item["embedding"], "<f4"), vector_of(MODEL, text))


def unless(server, is_bad, act):
    """Play vectors, but another act for calls of which that holds."""

    async def play(request, payload):
        if is_bad(Call("", {}, payload).inputs):
            return await act(request, payload)
        return web.Response(body=orjson.dumps(server.reply(payload)), content_type=JSON)

    return play


def health(proxy):
    """Return what is known of the first provider."""
    return proxy.service.upstreams.of("openai")


# What a miss reads.


@pytest.mark.parametrize("count", [1, 16, 300])
async def test_a_miss_reads_each_address_once(count, upstream, start_proxy, monkeypatch):
    """Whatever reads it, and though some inputs are known: there is no look before the look."""
    proxy = await start_proxy(openai=upstream)
    known, new = texts(8, "known"), texts(count)
    await right(await ask(proxy, known), known)
    read, read_many = [], read_only.read_many

    def noted(sql, addresses, not_before):
        read.extend(addresses)
        return read_many(sql, addresses, not_before)

    monkeypatch.setattr(read_only, "read_many", noted)
    inputs = [*new, *known]
    await right(await ask(proxy, inputs), inputs)
    assert len(read) == len(set(read)) == count
    await right(await ask(proxy, inputs), inputs)
    assert len(read) == count


async def test_a_miss_reads_its_address_once_where_the_connection_is_kept(
    upstream, start_proxy, monkeypatch
):
    """Though what is looked up first is whether it can be answered without waiting."""
    proxy = await start_proxy(openai=upstream)
    await right(await ask(proxy, "first"), ["first"])
    read, read_many = [], read_only.read_many

    def noted(sql, addresses, not_before):
        read.extend(addresses)
        return read_many(sql, addresses, not_before)

    monkeypatch.setattr(read_only, "read_many", noted)
    for text in texts(5):
        await right(await ask(proxy, text), [text])
    assert len(read) == len(set(read)) == 5
    counters = proxy.service.counters
    assert (counters.memory_hits, counters.disk_hits, counters.misses) == (0, 0, 6)


# One input that an upstream fails with.


@pytest.mark.parametrize("place", [0, 20, 63])
async def test_a_text_that_the_upstream_chokes_on_costs_itself_alone(place, upstream, start_proxy):
    """Fails with 500 each time: it is found by halving and named, and the others are kept."""
    inputs = texts(64)
    upstream.always = unless(upstream, lambda call: inputs[place] in call, status(500))
    proxy = await start_proxy(openai=upstream)
    response = await ask(proxy, inputs)
    error = (await response.json())["error"]
    assert (response.status, error["code"], error["param"]) == (502, "upstream_error", "input"), (
        error
    )
    assert error["message"].endswith(f"(input {place})")
    assert len(upstream.calls) <= 3 + 2 * 6
    good = [call.inputs for call in upstream.calls if inputs[place] not in call.inputs]
    others = [text for text in inputs if text != inputs[place]]
    assert sorted(itertools.chain(*good)) == sorted(others)
    assert health(proxy).snapshot()["state"] == "closed"
    upstream.calls.clear()
    await right(await ask(proxy, others), others)
    assert upstream.calls == []


@pytest.mark.parametrize("count", [2, 3, 5, 64])
@pytest.mark.parametrize("known", [0, 2])
@pytest.mark.parametrize("code", [500, 502, 503])
async def test_an_outage_blames_no_input(code, known, count, upstream, start_proxy):
    """Every call fails, each input's own as well: that is the provider, and no input is named."""
    proxy = await start_proxy(openai=upstream)
    hits = texts(known, "known")
    if hits:
        await right(await ask(proxy, hits), hits)
    upstream.always = status(code)
    response = await ask(proxy, [*hits, *texts(count)])
    error = (await response.json())["error"]
    assert response.status in (502, 503), error
    assert (error["param"], "(input" in error["message"]) == (None, False), error


async def test_that_text_keeps_nobody_else_from_the_upstream(upstream, start_proxy):
    """However often it is sent again, the circuit stays closed for innocent texts."""
    upstream.always = unless(upstream, lambda call: "bad" in call, status(500))
    proxy = await start_proxy(openai=upstream)
    await ask(proxy, ["bad", *texts(7)])
    for i in range(20):
        assert (await ask(proxy, "bad")).status == 502
        await right(await ask(proxy, f"innocent {i}"), [f"innocent {i}"])
    shown = health(proxy).snapshot()
    assert (shown["state"], shown["opened"]) == ("closed", 0)


async def test_around_several_such_texts_all_others_are_kept(upstream, start_proxy):
    """Each is found, in a few tries of the client at most, and the good ones are bought once."""
    inputs = texts(98)
    bad = {inputs[3], inputs[60]}
    upstream.always = unless(upstream, lambda call: bad & {*call}, status(500))
    proxy = await start_proxy(openai=upstream)
    for _ in range(2):
        assert (await ask(proxy, inputs)).status == 502
    others = [text for text in inputs if text not in bad]
    good = [text for call in upstream.calls if not bad & {*call.inputs} for text in call.inputs]
    assert sorted(good) == sorted(others)
    upstream.calls.clear()
    await right(await ask(proxy, others), others)
    assert upstream.calls == []
    assert health(proxy).snapshot()["state"] == "closed"


@pytest.mark.parametrize("code", [500, 502, 503])
async def test_one_text_alone_that_always_fails_keeps_nobody_from_the_upstream(
    code, upstream, start_proxy
):
    """That the same text fails again tells nothing new of the provider."""
    upstream.always = unless(upstream, lambda call: "bad" in call, status(code))
    proxy = await start_proxy(openai=upstream)
    for i in range(15):
        assert (await ask(proxy, "bad")).status in (502, 503)
        await right(await ask(proxy, f"innocent {i}"), [f"innocent {i}"])
    assert health(proxy).snapshot()["opened"] == 0


@pytest.mark.parametrize("code", [500, 503])
async def test_the_circuit_opens_at_the_fifth_failure(code, upstream, start_proxy):
    """An upstream that fails with every text is left alone after five calls, whatever it says."""
    upstream.always = status(code)
    proxy = await start_proxy(openai=upstream)
    _own_clock(proxy)
    for i in range(4):
        await ask(proxy, f"text {i}")
    assert len(upstream.calls) == 5
    assert health(proxy).snapshot()["state"] == "open"


@pytest.mark.parametrize("code", [500, 503])
async def test_one_text_that_is_tried_again_and_again_opens_no_circuit(code, upstream, start_proxy):
    """However often a provider is to be asked again: the failures of one text do not suffice."""
    upstream.always = unless(upstream, lambda call: "bad" in call, status(code))
    providers = {"openai": {"base_url": upstream.url, "retries": 8}}
    proxy = await start_proxy(openai=upstream, providers=providers)
    _own_clock(proxy)
    await ask(proxy, "bad")
    assert len(upstream.calls) > 5
    assert health(proxy).snapshot()["opened"] == 0
    await right(await ask(proxy, "innocent"), ["innocent"])


async def test_an_outage_is_not_searched_for_a_bad_input(upstream, start_proxy):
    """Where every call fails with 500 a few calls tell, and the circuit of the provider opens."""
    upstream.always = status(500)
    proxy = await start_proxy(openai=upstream)
    response = await ask(proxy, texts(64))
    assert response.status == 502
    assert "input" not in (await response.json())["error"]["message"]
    assert len(upstream.calls) <= 3 + 2 * 2
    assert health(proxy).snapshot()["state"] == "open"


@pytest.mark.parametrize("count", [1, 3])
async def test_bad_vectors_are_named_by_the_clients_own_index(count, upstream, start_proxy):
    """Among hits and duplicates; the good ones of the same answer are kept, and bought once."""
    inputs = ["known", *texts(40), "text 5", "text 7"]
    bad = ["text 5", "text 20", "text 39"][:count]

    async def act(request, payload):
        reply = upstream.reply(payload)
        for text, item in zip(Call("", {}, payload).inputs, reply["data"], strict=True):
            if text in bad:
                item["embedding"] = None
        return web.Response(body=orjson.dumps(reply), content_type=JSON)

    proxy = await start_proxy(openai=upstream)
    await ask(proxy, "known")
    upstream.always = act
    response = await ask(proxy, inputs)
    error = (await response.json())["error"]
    assert (response.status, error["code"]) == (502, "upstream_invalid_answer")
    assert error["message"].endswith("(input 6)")
    assert [call.inputs for call in upstream.calls[2:]] == [[text] for text in bad]
    good = [text for text in texts(40) if text not in bad]
    upstream.calls.clear()
    await right(await ask(proxy, good), good)
    assert upstream.calls == []
    assert health(proxy).snapshot()["state"] == "closed"


@pytest.mark.parametrize("act", ["zero", "500"])
async def test_the_one_input_that_is_not_cached_is_named(act, upstream, start_proxy):
    """Though it goes alone, the client has sent it among others, and knows it by its index."""
    inputs = texts(10)
    proxy = await start_proxy(openai=upstream)
    await ask(proxy, [*inputs[:8], inputs[9]])

    async def zero(_, payload):
        reply = upstream.reply(payload)
        reply["data"][0]["embedding"] = [0.0] * 1536
        return web.Response(body=orjson.dumps(reply), content_type=JSON)

    upstream.always = zero if act == "zero" else status(500)
    response = await ask(proxy, inputs)
    error = (await response.json())["error"]
    assert response.status == 502
    assert error["message"].endswith("(input 8)")
    assert error["param"] == "input"


async def test_one_vector_for_all_texts_is_never_kept(upstream, second, start_proxy):
    """Also where it comes for each of them alone: then the next route is asked, and it is right."""
    one = vector_of(MODEL, "always the same").tolist()

    async def act(_, payload):
        reply = upstream.reply(payload)
        for item in reply["data"]:
            item["embedding"] = one
        return web.Response(body=orjson.dumps(reply), content_type=JSON)

    upstream.always = act
    words = ["apple", "river", "castle", "number", "window"]
    proxy = await start_proxy(openai=upstream)
    response = await ask(proxy, words)
    assert response.status == 502
    assert "one vector for inputs that differ" in (await response.json())["error"]["message"]
    proxy = await start_proxy(openai=upstream, openrouter=second)
    await right(await ask(proxy, words), words)
    assert [call.inputs for call in second.calls] == [words]


async def test_a_model_that_fuses_inputs_is_asked_for_each_alone(upstream, start_proxy):
    """One vector for all inputs of a call is never kept; each is asked for alone from then on."""

    async def act(request, payload):
        reply = upstream.reply(payload)
        for item in reply["data"]:
            item["embedding"] = reply["data"][0]["embedding"]
        return web.Response(body=orjson.dumps(reply), content_type=JSON)

    upstream.always = act
    proxy = await start_proxy(openai=upstream)
    words = ["apple", "river", "castle", "number", "window"]
    await right(await ask(proxy, words), words)
    assert sorted(len(call.inputs) for call in upstream.calls) == [1] * 5 + [5]
    upstream.calls.clear()
    more = ["yellow", "seven", "harbour"]
    await right(await ask(proxy, more), more)
    assert [len(call.inputs) for call in upstream.calls] == [1] * 3


# Batches that are too large.

TOO_MANY = {
    "DashScope": (400, {"error": {
        "message": "<400> InternalError.Algo.InvalidParameter: Value error, batch size is invalid,"
                   " it should not be larger than 10.: input.contents",
        "type": "InvalidParameter", "param": None, "code": "InvalidParameter"}}),
    "TEI": (413, {"error": "batch size 50 > maximum allowed batch size 10", "type": "Validation"}),
    "Cohere": (400, {"message": "invalid request: total number of texts must be at most 10 texts"}),
    "pydantic": (422, {"detail": [{"loc": ["body", "input"], "type": "too_long",
        "msg": "List should have at most 10 items after validation, not 50"}]}),
    "no word": (413, b""),
}  # fmt: skip


@pytest.mark.parametrize("name", TOO_MANY)
async def test_a_smaller_batch_limit_is_learned(name, upstream, start_proxy, caplog):
    """The first request finds it in a few calls; the next one is 20 calls for 200 inputs."""
    code, body = TOO_MANY[name]
    upstream.always = unless(upstream, lambda call: len(call) > 10, status(code, body))
    proxy = await start_proxy(openai=upstream)
    first, second = texts(200), texts(200, "other")
    await right(await ask(proxy, first), first)
    refused = [call for call in upstream.calls if len(call.inputs) > 10]
    assert len(refused) <= (4 if name != "no word" else 8)
    assert len(upstream.calls) - len(refused) <= 24
    upstream.calls.clear()
    await right(await ask(proxy, second), second)
    assert len(upstream.calls) == 20
    told = [one.getMessage() for one in caplog.records if "batch_limits" in one.name]
    assert len(told) == 1
    assert "at most 10 inputs in one call" in told[0]


async def test_an_input_that_is_too_large_teaches_no_limit(upstream, start_proxy):
    """A 413 because of one long input is that input's alone; later batches are as large as ever."""
    upstream.always = unless(upstream, lambda call: "long" in call, status(413, b""))
    proxy = await start_proxy(openai=upstream)
    response = await ask(proxy, [*texts(30), "long", *texts(30, "more")])
    assert response.status == 413
    upstream.calls.clear()
    others = texts(60, "other")
    await right(await ask(proxy, others), others)
    assert len(upstream.calls) == 1


async def test_a_body_that_is_too_large_teaches_its_size_and_no_number(upstream, start_proxy):
    """A server that limits bodies gets smaller ones, but short texts go together as before."""

    def is_large(call):
        return sum(map(len, call)) > 200_000

    upstream.always = unless(upstream, is_large, status(413, b"<html>413</html>"))
    proxy = await start_proxy(openai=upstream)
    long = [f"{i} " + "x" * 20_000 for i in range(40)]
    await right(await ask(proxy, long), long)
    upstream.calls.clear()
    again = [f"{i} again " + "x" * 20_000 for i in range(40)]
    await right(await ask(proxy, again), again)
    assert not any(is_large(call.inputs) for call in upstream.calls)
    upstream.calls.clear()
    short = texts(60)
    await right(await ask(proxy, short), short)
    assert len(upstream.calls) == 1


# Rate limits.


async def test_during_a_short_cooldown_a_request_waits(upstream, start_proxy):
    """As a client would directly: a further request is answered when the rest is over."""
    upstream.script.append(status(429, headers={"Retry-After": "5"}))
    proxy = await start_proxy(openai=upstream)
    clock = _own_clock(proxy)
    first = await ask(proxy, "a", **{"x-stainless-retry-count": "0"})
    assert (first.status, first.headers["Retry-After"]) == (429, "5")
    await right(await ask(proxy, "b"), ["b"])
    assert clock.waits == [5.0]
    assert len(upstream.calls) == 2


async def test_during_a_long_cooldown_a_request_gets_429_with_what_is_left(upstream, start_proxy):
    """Clients that wait on 429 alone wait as they would directly, and no upstream is asked."""
    upstream.script.append(status(429, headers={"Retry-After": "90"}))
    proxy = await start_proxy(openai=upstream)
    clock = _own_clock(proxy)
    assert (await ask(proxy, "a")).headers["Retry-After"] == "90"
    clock.now += 30
    later = await ask(proxy, "b")
    assert (later.status, later.headers["Retry-After"]) == (429, "60")
    assert (await later.json())["error"]["code"] == "rate_limit_exceeded"
    assert len(upstream.calls) == 1


async def test_a_limit_that_is_used_up_is_shown(upstream, start_proxy):
    """Whoever wonders why a model waits finds it at /status."""
    told = {f"x-ratelimit-{what}-requests": n for what, n in
            (("limit", "100"), ("remaining", "0"), ("reset", "10m"))}  # fmt: skip
    payload = {"model": MODEL, "input": "a", "encoding_format": "base64"}
    body = orjson.dumps(upstream.reply(payload))
    upstream.script.append(status(200, body, told))
    proxy = await start_proxy(openai=upstream)
    await right(await ask(proxy, "a"), ["a"])
    async with proxy.http.get(proxy.url.removesuffix("/v1") + "/status") as response:
        shown = await response.json()
    assert 0 < shown["rate_limit_waits_s"]["openai"][MODEL] <= 600


@pytest.mark.parametrize("wait", ["0", "Wed, 21 Oct 2015 07:28:00 GMT"])
async def test_a_rate_limit_that_is_over_already_has_a_cooldown(wait, upstream, start_proxy):
    """A clock that is ahead, or a careless header, makes no storm of calls."""
    upstream.always = status(429, headers={"Retry-After": wait})
    proxy = await start_proxy(openai=upstream)
    clock = _own_clock(proxy)
    for i in range(4):
        assert (await ask(proxy, f"text {i}")).status == 429
    assert len(upstream.calls) <= 3 + 3
    assert len(clock.waits) >= 3
    assert min(clock.waits) > 0


@pytest.mark.parametrize("headers", [{}, {"Retry-After": "2"}])
async def test_a_client_that_retries_by_itself_makes_no_more_calls_than_directly(
    headers, upstream, start_proxy
):
    """A rate limit that lasts costs OpenAI's own client three calls, with the proxy or without."""
    upstream.always = status(429, headers=headers)
    proxy = await start_proxy(openai=upstream)
    _own_clock(proxy)
    for attempt in range(3):
        response = await ask(proxy, "a", **{"x-stainless-retry-count": str(attempt)})
        assert response.status == 429
    assert len(upstream.calls) == 3


async def test_a_rate_limit_that_lasts_is_not_met_three_times_by_every_request(
    upstream, start_proxy
):
    """Whoever comes while it is known makes one call at most, and waits for the rest first."""
    upstream.always = status(429)
    proxy = await start_proxy(openai=upstream)
    _own_clock(proxy)
    for i in range(4):
        assert (await ask(proxy, f"text {i}")).status == 429
    assert len(upstream.calls) <= 3 + 3


# What no second try mends.


@pytest.mark.parametrize(
    ("act", "expected"),
    [
        (status(401), (403, "upstream_auth")),
        (status(429, {"error": {"message": "m", "type": "insufficient_quota", "param": None,
                                "code": "insufficient_quota"}}), (429, "insufficient_quota")),
        (status(402), (402, "insufficient_quota")),
    ],
)  # fmt: skip
async def test_what_no_second_try_mends_is_the_same_each_time(act, expected, upstream, start_proxy):
    """No client repeats it, and it does not change into something that is worth a wait."""
    upstream.always = act
    proxy = await start_proxy(openai=upstream)
    for text in ("a", "b", "c"):
        response = await ask(proxy, text)
        assert (response.status, (await response.json())["error"]["code"]) == expected
        assert response.headers["x-should-retry"] == "false"
        assert "Retry-After" not in response.headers
    assert len(upstream.calls) == 1


async def test_a_refused_key_at_one_provider_does_not_hide_a_rate_limit_at_the_other(
    upstream, second, start_proxy
):
    """What may pass is told rather than what will not."""
    upstream.always, second.always = status(401), status(429, headers={"Retry-After": "60"})
    proxy = await start_proxy(openai=upstream, openrouter=second)
    for text in ("a", "b"):
        response = await ask(proxy, text)
        assert (response.status, response.headers["Retry-After"]) == (429, "60")


# Many clients, few places.


async def test_while_all_places_are_taken_what_comes_is_put_together(upstream, start_proxy):
    """300 clients of one text each at a slow upstream of 8 places: some calls, not 300."""
    upstream.gate = asyncio.Event()
    proxy = await start_proxy(openai=upstream)
    inputs = texts(300)
    arrived, real = itertools.count(1), proxy.service.answer

    async def answer(*arguments):
        if next(arrived) == len(inputs):
            upstream.gate.set()
        return await real(*arguments)

    proxy.service.answer = answer
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as proxy.http:
        replies = await asyncio.gather(*(ask(proxy, text) for text in inputs))
    for reply, text in zip(replies, inputs, strict=True):
        await right(reply, [text])
    assert sorted(upstream.inputs) == sorted(inputs)
    assert len(upstream.calls) <= 8 + 8


async def test_a_call_that_outlives_its_request_is_kept_and_joined(upstream, start_proxy):
    """The client gets 504; its second try waits for the same call, and nothing is bought twice."""
    upstream.gate = asyncio.Event()
    proxy = await start_proxy(openai=upstream, server={"request_timeout_s": 0.2})
    assert (await ask(proxy, "a")).status == 504
    assert (await ask(proxy, ["a"])).status == 504
    upstream.gate.set()
    while (reply := await ask(proxy, "a")).status != 200:
        pass
    await right(reply, ["a"])
    assert upstream.inputs == ["a"]


async def test_a_client_that_goes_away_leaves_what_was_begun(upstream, start_proxy):
    """A call on the wire is paid for: it is finished, and its answer is kept."""
    upstream.gate = asyncio.Event()
    proxy = await start_proxy(openai=upstream)
    going = asyncio.create_task(ask(proxy, "a"))
    await until(lambda: upstream.calls)
    going.cancel()
    await asyncio.wait([going])
    upstream.gate.set()
    await right(await ask(proxy, "a"), ["a"])
    assert upstream.inputs == ["a"]


class _Clock:
    """The time that providers are left alone by; a wait moves it on."""

    def __init__(self):
        self.now = 1000.0
        self.waits = []

    async def sleep(self, seconds):
        self.waits.append(seconds)
        self.now += seconds


def _own_clock(proxy):
    """Let rests and waits of a proxy go by a clock that the test moves."""
    clock = _Clock()
    for model in proxy.service.models.values():
        model.router.sleep = clock.sleep
    upstreams = proxy.service.upstreams
    for name in ("openai", "openrouter"):
        health = upstreams.of(name)
        health._clock = health.cooldowns._clock = lambda: clock.now
    return clock
