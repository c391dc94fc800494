"""Through the whole proxy, on real sockets: failing parts, refused inputs, and gathering."""

import asyncio
import itertools

import aiohttp
import numpy as np
import orjson
import pytest
from aiohttp import web
from clock import until
from fault_server import Call, status, vector_of

MODEL = "text-embedding-3-small"
DOWN = status(503)
JSON = "application/json"


def unless(bad, error, fault=400):
    """Play vectors, but an error for calls that hold the bad input."""

    def of(server):
        async def act(request, payload):
            if bad in Call("", {}, payload).inputs:
                return await status(fault, {"error": error})(request, payload)
            body = orjson.dumps(server.reply(payload))
            return web.Response(body=body, content_type="application/json")

        return act

    return of


async def right(response, inputs):
    """Check that a reply holds the right vectors in the right order."""
    assert response.status == 200, await response.text()
    data = (await response.json())["data"]
    assert [item["index"] for item in data] == list(range(len(inputs)))
    for item, text in zip(data, inputs, strict=True):
        assert np.array_equal(np.array(item["embedding"], "<f4"), vector_of(MODEL, text))


async def ask(proxy, inputs, **fields):
    """Send one request."""
    return await proxy.post({"model": MODEL, "input": inputs, **fields})


@pytest.mark.parametrize("failing", [0, 100, 199], ids=["first", "middle", "last"])
async def test_a_retried_bulk_job_pays_only_for_what_failed(failing, upstream, start_proxy):
    """One part of a bulk request fails for good: the retry buys that one."""
    inputs = [f"text {i}" for i in range(200)]
    upstream.always = unless(inputs[failing], {"message": "down", "code": None}, 503)(upstream)
    proxy = await start_proxy(openai=upstream)
    failed = await ask(proxy, inputs)
    assert failed.status == 503
    assert failed.headers["Retry-After"]
    parts = {call.inputs[0]: len(call.inputs) for call in upstream.calls}
    assert len(parts) == 4
    bad = next(call for call in upstream.calls if inputs[failing] in call.inputs)
    upstream.calls.clear()
    upstream.always = None
    again = await ask(proxy, inputs)
    await right(again, inputs)
    assert sorted(upstream.inputs) == sorted(bad.inputs)
    assert int(again.headers["x-cache-misses"]) == len(bad.inputs) == 50
    assert int(again.headers["x-cache-hits"]) == 150


@pytest.mark.parametrize(("place", "count"), [(0, 3), (7, 150), (149, 150), (75, 150)])
async def test_a_refused_input_has_its_own_index(place, count, upstream, start_proxy):
    """Among hits and duplicates the client is told the place in its own request."""
    proxy = await start_proxy(openai=upstream)
    inputs = [f"text {i // 2}" for i in range(count)]
    inputs[place] = "bad"
    known = list(dict.fromkeys(inputs[1 : count // 3]))
    known = [item for item in known if item != "bad"]
    if known:
        await ask(proxy, known)
    error = {"message": "too long", "type": "invalid_request_error", "param": None, "code": None}
    upstream.always = unless("bad", error)(upstream)
    refused = await ask(proxy, inputs)
    assert (refused.status, refused.headers["x-should-retry"]) == (400, "false")
    assert (await refused.json())["error"] == {
        **error,
        "message": f"too long (input {place})",
        "param": "input",
    }
    upstream.calls.clear()
    good = [item for item in inputs if item != "bad"]
    reply = await ask(proxy, good)
    await right(reply, good)
    assert upstream.calls == []


async def test_a_refusal_of_another_field_is_passed_on_as_it_is(upstream, start_proxy):
    """What is wrong with a field is told in the upstream's words, after one call."""
    error = {"message": "no such thing", "type": "t", "param": "user", "code": "c"}
    upstream.always = status(400, {"error": error})
    proxy = await start_proxy(openai=upstream)
    refused = await ask(proxy, ["a", "b"])
    assert (refused.status, (await refused.json())["error"]) == (400, error)
    assert len(upstream.calls) == 1


@pytest.mark.parametrize("error", [400, 413])
async def test_a_call_too_large_is_divided_unseen(error, upstream, start_proxy):
    """The client of an upstream that takes less than it says notices nothing."""
    code = "max_tokens_per_request" if error == 400 else None

    async def act(request, payload):
        if len(Call("", {}, payload).inputs) > 5:
            body = {"error": {"message": "large", "type": code, "param": None, "code": code}}
            return await status(error, body)(request, payload)
        body = orjson.dumps(upstream.reply(payload))
        return web.Response(body=body, content_type="application/json")

    upstream.always = act
    proxy = await start_proxy(openai=upstream)
    inputs = [f"text {i}" for i in range(40)]
    reply = await ask(proxy, inputs)
    await right(reply, inputs)
    assert reply.headers["x-cache-misses"] == "40"


async def test_each_part_may_go_to_another_route(upstream, second, start_proxy):
    """A part that the first provider cannot answer is the second's; both are named."""
    inputs = [f"text {i}" for i in range(130)]
    upstream.always = unless(inputs[100], {"message": "down"}, 503)(upstream)
    proxy = await start_proxy(openai=upstream, openrouter=second)
    reply = await ask(proxy, inputs)
    await right(reply, inputs)
    assert reply.headers["x-embedding-provider"] == "openai, openrouter"
    assert inputs[100] in second.inputs
    assert len(second.inputs) < len(inputs)


async def test_a_thousand_identical_requests_are_one_call(upstream, start_proxy):
    """However many ask for the same at once, it is bought once."""
    upstream.gate = asyncio.Event()
    proxy = await start_proxy(openai=upstream)
    asking = [asyncio.create_task(ask(proxy, "same")) for _ in range(1000)]
    await until(lambda: upstream.calls)
    upstream.gate.set()
    replies = await asyncio.gather(*asking)
    assert {reply.status for reply in replies} == {200}
    assert upstream.inputs == ["same"]


async def test_a_thousand_small_requests_are_few_calls(upstream, start_proxy):
    """With gathering on, different inputs of many requests are bought together."""
    upstream.gate = asyncio.Event()
    proxy = await start_proxy(openai=upstream, server={"batch_window_ms": 50})
    inputs = [f"text {i}" for i in range(1000)]
    counter = itertools.count(1)
    real = proxy.service.answer

    async def answer(*arguments):
        if next(counter) == len(inputs):
            upstream.gate.set()
        return await real(*arguments)

    proxy.service.answer = answer
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as proxy.http:
        replies = await asyncio.gather(*(ask(proxy, item) for item in inputs))
    for reply, item in zip(replies, inputs, strict=True):
        await right(reply, [item])
    assert sorted(upstream.inputs) == sorted(inputs)
    assert len(upstream.calls) <= 16


async def test_gathered_with_anothers_bad_input_all_others_are_answered(upstream, start_proxy):
    """Who sends a bad input is refused, in the words for a single one; nobody else notices."""
    error = {"message": "too long", "type": "invalid_request_error", "param": None, "code": None}
    upstream.always = unless("text 7", error)(upstream)
    proxy = await start_proxy(openai=upstream, server={"batch_window_ms": 50})
    inputs = [f"text {i}" for i in range(20)]
    replies = await asyncio.gather(*(ask(proxy, item) for item in inputs))
    for reply, item in zip(replies, inputs, strict=True):
        if item == "text 7":
            assert (reply.status, (await reply.json())["error"]) == (400, error)
        else:
            await right(reply, [item])
    bought = [call.inputs for call in upstream.calls if "text 7" not in call.inputs]
    assert sorted(itertools.chain(*bought)) == sorted(set(inputs) - {"text 7"})


def narrow(first, second, **limits):
    """Return providers of which the first takes 64 inputs in a call, and the second 10."""
    return {
        "openai": {"base_url": first.url, "limits": {"inputs": 64, **limits}},
        "openrouter": {"base_url": second.url, "limits": {"inputs": 10}},
    }


def failing_once(server, *bad, code=503):
    """Play vectors, but an error for the first call that holds each of these inputs."""
    left = set(bad)

    async def act(request, payload):
        hit = left & set(Call("", {}, payload).inputs)
        left.difference_update(hit)
        if hit:
            return await status(code)(request, payload)
        return web.Response(body=orjson.dumps(server.reply(payload)), content_type=JSON)

    return act


async def test_a_bulk_job_pays_again_only_for_the_calls_that_failed(upstream, second, start_proxy):
    """Its parts fail at the first route; at the second, which takes less, some calls in the middle.

    What the second answered is not asked for again, by the same request or by a later one.
    """
    inputs = [f"text {i}" for i in range(200)]
    upstream.always = status(404)
    second.always = failing_once(second, "text 25", "text 111", "text 199")
    proxy = await start_proxy(
        openai=upstream, openrouter=second, providers=narrow(upstream, second)
    )
    reply = await ask(proxy, inputs)
    await right(reply, inputs)
    assert reply.headers["x-embedding-provider"] == "openrouter"
    assert sorted(upstream.inputs) == sorted(inputs)
    failed = [inputs[place : place + 10] for place in (20, 110, 190)]
    assert sorted(second.inputs) == sorted([*inputs, *itertools.chain(*failed)])
    second.calls.clear()
    again = await ask(proxy, inputs)
    assert again.headers["x-cache"] == "hit"
    assert second.calls == []


async def test_what_a_narrow_route_answered_is_not_asked_of_the_next(upstream, second, start_proxy):
    """The one that takes 10 inputs is asked first and fails in the middle; the other has the rest.

    Both are named, and every input was answered once.
    """
    inputs = [f"text {i}" for i in range(60)]
    second.always = failing_once(second, "text 25", code=404)
    routes = [
        {"provider": "openai", "model": MODEL, "price": 2},
        {"provider": "openrouter", "model": MODEL, "price": 1},
    ]
    proxy = await start_proxy(
        openai=upstream,
        openrouter=second,
        providers=narrow(upstream, second),
        models={
            MODEL: {
                "space": "s",
                "dimensions": 1536,
                "routing_strategy": "cheapest",
                "routes": routes,
            }
        },
    )
    reply = await ask(proxy, inputs)
    await right(reply, inputs)
    assert reply.headers["x-embedding-provider"] == "openrouter, openai"
    assert upstream.inputs == inputs[20:30]
    assert sorted(second.inputs) == sorted(inputs)


async def test_who_queues_behind_a_rate_limit_goes_on_at_once(upstream, second, start_proxy):
    """One call learns that the limit is used up for long; the crowd behind it is asked elsewhere.

    For the first provider that is one call and one failure, and its other models are asked on.
    """
    upstream.script.append(status(429, headers={"Retry-After": "40"}))
    upstream.gate = asyncio.Event()
    proxy = await start_proxy(
        openai=upstream, openrouter=second, providers=narrow(upstream, second, concurrency=1)
    )
    arrived, real = itertools.count(1), proxy.service.answer

    async def answer(*arguments):
        if next(arrived) == 40:
            upstream.gate.set()
        return await real(*arguments)

    proxy.service.answer = answer
    crowd = [asyncio.create_task(ask(proxy, f"text {i}")) for i in range(40)]
    replies = await asyncio.gather(*crowd)
    assert {reply.status for reply in replies} == {200}
    assert {reply.headers["x-embedding-provider"] for reply in replies} == {"openrouter"}
    assert len(upstream.calls) == 1
    shown = proxy.service.upstreams.snapshot()["openai"]
    assert (shown["state"], shown["attempts"]) == ("closed", 1)
    assert shown["failures"] == {"rate_limited": 1}
    assert shown["rests"] == {MODEL: pytest.approx(40, abs=2)}
    other = await proxy.post({"model": "text-embedding-ada-002", "input": "a"})
    assert other.headers["x-embedding-provider"] == "openai"


async def test_a_bulk_job_that_queues_is_answered_and_holds_up_no_other_model(
    upstream, start_proxy
):
    """The upstream says that a model's limit is used up: its calls wait, and others pass."""
    left = {f"x-ratelimit-{what}-requests": n for what, n in
            (("limit", "100"), ("remaining", "0"), ("reset", "10m"))}  # fmt: skip

    async def act(request, payload):
        told = left if payload["model"] == MODEL else {}
        body = orjson.dumps(upstream.reply(payload))
        return web.Response(body=body, content_type=JSON, headers=told)

    upstream.always = act
    proxy = await start_proxy(openai=upstream)
    throttled, open_now = [], asyncio.Event()

    async def sleep(seconds):
        throttled.append(seconds)
        await open_now.wait()

    await ask(proxy, "the first")
    router = proxy.service.models[MODEL].router
    provider = router.routes[0].provider
    for throttle in (provider._queue._declared, *provider._queue._learned.values()):
        throttle._sleep = sleep
    inputs = [f"text {i}" for i in range(1000)]
    bulk = asyncio.create_task(ask(proxy, inputs))
    await until(lambda: throttled)
    async with asyncio.timeout(60):
        for i in range(5):
            other = await proxy.post({"model": "text-embedding-ada-002", "input": f"{i}"})
            assert other.status == 200
    assert not bulk.done()
    open_now.set()
    await right(await bulk, inputs)
    shown = proxy.service.upstreams.snapshot()["openai"]
    assert (shown["state"], shown["failures"], shown["rests"]) == ("closed", {}, {})


@pytest.mark.parametrize("fault", [429, 503, 500])
async def test_a_half_that_goes_on_to_the_next_route_comes_back_to_its_search(
    fault, upstream, second, start_proxy
):
    """A refused batch is halved; a half that meets another failure is answered elsewhere."""
    first_half = {"a", "b"}

    async def act(request, payload):
        inputs = set(payload["input"])
        if inputs == first_half:
            return await status(fault)(request, payload)
        if inputs > first_half:
            return await status(400)(request, payload)
        return web.json_response(upstream.reply(payload))

    upstream.always = act
    proxy = await start_proxy(openai=upstream, openrouter=second)
    response = await proxy.post({"model": "text-embedding-3-small", "input": [*"abcd"]})
    assert response.status == 200, await response.text()
    assert set(second.inputs) <= first_half
