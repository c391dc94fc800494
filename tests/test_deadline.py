"""What was paid for outlives its request: a deadline, a client or a process that goes ends nothing.

The clock of the event loop is moved by hand, so that nothing here waits or depends on speed.
"""

import asyncio
from dataclasses import replace
from functools import partial

import aiohttp
import orjson
import pytest
from aiohttp import web
from clock import some_turns, until
from embedding_proxy.providers import attempts
from embedding_proxy.providers.errors import EmbeddingError
from fault_server import hang, tokens_of

MODEL = "text-embedding-3-small"
NEW = "text-embedding-9"
FOR_EVER = 1e6
"""Seconds; the provider's own limits of time are not what is tried."""
FIRST_ROUTE_S, EXTRA_S, REQUEST_S = 150, 75, 300
"""What a request of 300 s leaves the first of two routes; then for a reply that is arriving."""
CLOSE_S = 100.0
"""Seconds that calls have when the proxy stops; more than any of this takes by the real clock."""


class Halves:
    """Plays a good reply in two parts, the second when the test says so."""

    def __init__(self, server):
        self.server = server
        self.has_begun = asyncio.Event()
        self.may_end = asyncio.Event()

    async def __call__(self, request, payload):
        body = orjson.dumps(self.server.reply(payload))
        response = web.StreamResponse(headers={"Content-Length": str(len(body))})
        response.content_type = "application/json"
        await response.prepare(request)
        await response.write(body[: len(body) // 2])
        self.has_begun.set()
        await self.may_end.wait()
        await response.write(body[len(body) // 2 :])
        return response


@pytest.fixture
def close_s(monkeypatch):
    """Give the calls that were sent CLOSE_S seconds when the proxy stops."""
    monkeypatch.setattr(attempts, "CLOSE_S", CLOSE_S)


def under_way(proxy):
    """Return how far each attempt of a proxy has got."""
    return list(proxy.service.upstreams.attempts._tasks.values())


def ask(proxy, text="a", model=MODEL, **headers):
    """Start a request that waits as long as it takes."""

    async def post():
        timeout = aiohttp.ClientTimeout(total=None)
        body = {"model": model, "input": text}
        url = f"{proxy.url}/embeddings"
        async with proxy.http.post(url, json=body, headers=headers, timeout=timeout) as response:
            await response.read()
            return response

    return asyncio.create_task(post())


async def start(start_proxy, openai, openrouter=None, **sections):
    """Start a proxy whose providers have all the time."""
    servers = {"openai": openai, "openrouter": openrouter}
    providers = {
        name: {"base_url": server.url, "timeout_s": FOR_EVER}
        for name, server in servers.items()
        if server is not None
    }
    extra = sections.pop("provider", {})
    providers["openai"] |= extra
    sections["providers"] = providers
    proxy = await start_proxy(openai=openai, openrouter=openrouter, **sections)
    for route in proxy.service.models[MODEL].router.routes:
        transport = route.provider._transport
        transport._timeouts = replace(transport._timeouts, min_bytes_per_s=0.0)
    return proxy


async def billed(proxy):
    """Return the tokens and inputs that the ledger has on disk as bought."""
    ((_, usage),) = await proxy.service.ledger([]) or [((), None)]
    return (usage.tokens_billed, usage.misses) if usage else (0, 0)


async def reading(proxy, reply):
    """Wait until the proxy reads a reply of which half has come."""
    await reply.has_begun.wait()
    await until(lambda: any(one.has_reply for one in under_way(proxy)))


@pytest.mark.parametrize("leaving", ["the deadline", "cancelled"])
async def test_a_reply_that_arrives_when_the_client_is_gone_is_kept_and_billed(
    leaving, upstream, second, start_proxy, move
):
    """It gets its 504, or is cancelled; the reply is read to its end: asked again it is a hit.

    Another route is left, so the first one has only a share of the request's time.
    """
    reply = Halves(upstream)
    upstream.script.append(reply)
    proxy = await start(start_proxy, upstream, second)
    if leaving == "the deadline":
        request = ask(proxy)
    else:
        request = asyncio.create_task(proxy.service.embed("a", MODEL))
    await reading(proxy, reply)
    if leaving == "the deadline":
        await move(REQUEST_S + 1)
        assert (await request).status == 504
    else:
        request.cancel()
        await move(FIRST_ROUTE_S + 1)
    await move(EXTRA_S + 1)
    reply.may_end.set()
    await until(lambda: not under_way(proxy))
    again = await ask(proxy)
    assert (again.status, again.headers["x-cache"]) == (200, "hit")
    assert (len(upstream.calls), len(second.calls)) == (1, 0)
    assert await billed(proxy) == (tokens_of("a"), 1)


async def test_a_share_of_the_time_ends_no_call(upstream, second, start_proxy, move):
    """The next route answers the client; what the first one then brings is billed as well."""
    upstream.gate = asyncio.Event()
    proxy = await start(start_proxy, upstream, second)
    request = ask(proxy)
    await until(lambda: any(one.is_sent for one in under_way(proxy)) and upstream.calls)
    await move(FIRST_ROUTE_S + 1)
    assert (await request).headers["x-embedding-provider"] == "openrouter"
    upstream.gate.set()
    await until(lambda: not under_way(proxy))
    await proxy.service._registry.in_flight.close()
    assert (len(upstream.calls), len(second.calls)) == (1, 1)
    assert await billed(proxy) == (2 * tokens_of("a"), 1)


async def test_the_slower_of_two_routes_side_by_side_is_billed(upstream, second, start_proxy):
    """A hedge that answers first does not hang up on the other, which charges for its answer."""
    reply = Halves(upstream)
    upstream.script.append(reply)
    second.gate = reply.has_begun
    models = {MODEL: {"hedge_after_s": 0.5}}
    proxy = await start(start_proxy, upstream, second, models=models)
    assert (await ask(proxy)).headers["x-embedding-provider"] == "openrouter"
    reply.may_end.set()
    await until(lambda: not under_way(proxy))
    await proxy.service._registry.in_flight.close()
    assert await billed(proxy) == (2 * tokens_of("a"), 1)


async def test_a_reply_that_has_begun_is_read_beyond_the_time_of_its_attempt(
    upstream, start_proxy, move
):
    """For half of that time more: then the upstream is given up, as it was not paid for silence."""
    proxy = await start(start_proxy, upstream, provider={"timeout_s": 200, "retries": 0})
    for text, seconds, status in (("a", 299, 200), ("b", 301, 504)):
        reply = Halves(upstream)
        upstream.script.append(reply)
        request = ask(proxy, text)
        await reading(proxy, reply)
        await move(199)
        await move(seconds - 199)
        reply.may_end.set()
        assert (await request).status == status, await (await request).text()


async def test_a_width_is_learned_though_nobody_waits_for_it(upstream, start_proxy, move):
    """The first answer of a model of unknown width tells it after the deadline, too."""
    upstream.widths = {NEW: 40}
    reply = Halves(upstream)
    upstream.script.append(reply)
    proxy = await start(start_proxy, upstream)
    request = ask(proxy, model=NEW)
    await reading(proxy, reply)
    await move(REQUEST_S + 1)
    assert (await request).status == 504
    reply.may_end.set()
    await until(lambda: not under_way(proxy))
    again = await ask(proxy, model=NEW)
    assert (again.status, again.headers["x-cache"]) == (200, "hit")
    assert len(upstream.calls) == 1


async def test_a_key_is_proved_though_its_client_is_gone(upstream, start_proxy, move):
    """What proves a client's key is not bought once more when the deadline has passed."""
    reply = Halves(upstream)
    upstream.script.append(reply)
    proxy = await start(start_proxy, upstream, provider={"auth": "client"})
    key = {"Authorization": "Bearer sk-anne-0123456789"}
    request = ask(proxy, **key)
    await reading(proxy, reply)
    await move(REQUEST_S + 1)
    assert (await request).status == 504
    reply.may_end.set()
    await until(lambda: not under_way(proxy))
    again = await ask(proxy, **key)
    assert (again.status, again.headers["x-cache"]) == (200, "hit")
    assert len(upstream.calls) == 1


@pytest.mark.parametrize(("control", "calls"), [("", 1), ("no-cache", 2)], ids=["any", "no-cache"])
async def test_the_call_that_proves_a_key_is_waited_for_by_the_next_request(
    control, calls, upstream, start_proxy, move
):
    """It is not made again while it is under way, unless the client wants a new answer."""
    reply = Halves(upstream)
    upstream.script.append(reply)
    proxy = await start(start_proxy, upstream, provider={"auth": "client"})
    key = {"Authorization": "Bearer sk-anne-0123456789"}
    request = ask(proxy, **key)
    await reading(proxy, reply)
    await move(REQUEST_S + 1)
    assert (await request).status == 504
    again = ask(proxy, **key, **{"Cache-Control": control})
    in_flight = proxy.service._registry.in_flight
    await until(lambda: any(fetch.waiters for fetch in in_flight._fetches.values()))
    await until(lambda: len(upstream.calls) == calls)
    reply.may_end.set()
    assert (await again).status == 200
    assert len(upstream.calls) == calls
    assert await billed(proxy) == (calls * tokens_of("a"), calls)


async def test_the_call_that_tells_a_width_proves_a_key_as_well(upstream, start_proxy, move):
    """It is waited for by the next request with the same key, and not made again to prove that."""
    upstream.widths = {NEW: 40}
    reply = Halves(upstream)
    upstream.script.append(reply)
    proxy = await start(start_proxy, upstream, provider={"auth": "client"})
    key = {"Authorization": "Bearer sk-anne-0123456789"}
    request = ask(proxy, model=NEW, **key)
    await reading(proxy, reply)
    await move(REQUEST_S + 1)
    assert (await request).status == 504
    again = ask(proxy, model=NEW, **key)
    learner = proxy.service._registry._learner
    await until(lambda: any(one.waiters for one in learner._learning.values()))
    reply.may_end.set()
    assert (await again).status == 200
    assert len(upstream.calls) == 1
    assert await billed(proxy) == (tokens_of("a"), 1)


async def sent(proxy, upstream):
    """Wait until the upstream has a call of the proxy."""
    await until(lambda: any(one.is_sent for one in under_way(proxy)) and upstream.calls)


async def stopping(start_proxy, proxy):
    """Begin to stop the proxy; return the task when only CLOSE_S is left to the calls."""
    all_attempts = proxy.service.upstreams.attempts
    task = asyncio.create_task(start_proxy.stop())
    await until(lambda: all_attempts.is_closing or task.done())
    return task


@pytest.mark.usefixtures("close_s")
@pytest.mark.parametrize("is_arriving", [True, False], ids=["arriving", "silent"])
@pytest.mark.parametrize("client", ["waits", "has a 504", "is cancelled"])
async def test_a_call_that_was_sent_is_kept_when_the_proxy_stops(
    client, is_arriving, upstream, start_proxy, move
):
    """It is answered within CLOSE_S, stored and billed, though its reply had not begun."""
    reply = Halves(upstream)
    upstream.script.append(reply)
    if not is_arriving:
        upstream.gate = asyncio.Event()
    proxy = await start(start_proxy, upstream)
    if client == "is cancelled":
        request = asyncio.create_task(proxy.service.embed("a", MODEL))
    else:
        request = ask(proxy)
    await sent(proxy, upstream)
    if is_arriving:
        await reading(proxy, reply)
    if client == "has a 504":
        await move(REQUEST_S + 1)
        assert (await request).status == 504
    elif client == "is cancelled":
        request.cancel()
        await some_turns()
    stop = await stopping(start_proxy, proxy)
    await move(CLOSE_S / 2)
    assert not stop.done()
    if upstream.gate is not None:
        upstream.gate.set()
    reply.may_end.set()
    await stop
    await asyncio.wait([request])
    upstream.gate = None
    proxy = await start(start_proxy, upstream)
    assert (await ask(proxy)).headers["x-cache"] == "hit"
    assert len(upstream.calls) == 1
    assert await billed(proxy) == (tokens_of("a"), 1)


@pytest.mark.usefixtures("close_s")
@pytest.mark.parametrize("is_arriving", [True, False], ids=["arriving", "silent"])
async def test_a_hung_upstream_delays_the_stop_by_the_time_it_has(
    is_arriving, upstream, start_proxy, move, caplog
):
    """After CLOSE_S the call is given up, the log says so, and the proxy has stopped."""
    reply = Halves(upstream)
    upstream.script.append(reply if is_arriving else hang())
    proxy = await start(start_proxy, upstream)
    request = ask(proxy)
    await sent(proxy, upstream)
    if is_arriving:
        await reading(proxy, reply)
    stop = await stopping(start_proxy, proxy)
    await move(CLOSE_S - 1)
    assert not stop.done()
    await move(2)
    await stop
    await asyncio.wait([request])
    assert request.exception() is not None or request.result().status >= 500
    assert "1 calls were not answered" in caplog.text


@pytest.mark.usefixtures("close_s")
async def test_a_call_that_was_not_sent_ends_at_once_when_the_proxy_stops(upstream, start_proxy):
    """What waits for a place among the calls is dropped; what was sent before it is kept."""
    upstream.gate = asyncio.Event()
    limits = {"limits": {"concurrency": 1}}
    proxy = await start(start_proxy, upstream, provider=limits)
    first = ask(proxy)
    await until(lambda: upstream.calls)
    second = ask(proxy, "b")
    await until(lambda: len(proxy.service._registry.in_flight) == 2)
    stop = await stopping(start_proxy, proxy)
    await some_turns()
    assert not stop.done()
    upstream.gate.set()
    await stop
    await asyncio.wait([first, second])
    assert len(upstream.calls) == 1
    proxy = await start(start_proxy, upstream)
    assert await billed(proxy) == (tokens_of("a"), 1)


@pytest.mark.usefixtures("close_s")
async def test_a_canary_that_was_sent_is_billed_when_the_proxy_stops(upstream, start_proxy):
    """Its answer is read within CLOSE_S, as the upstream charges for it."""
    proxy = await start(start_proxy, upstream)
    assert (await ask(proxy)).status == 200
    looking = asyncio.create_task(proxy.service.drift_check.check())
    await until(lambda: len(upstream.calls) == 2)
    upstream.gate = asyncio.Event()
    await until(lambda: len(upstream.calls) == 3)
    looking.cancel()
    await asyncio.wait([looking])
    stop = await stopping(start_proxy, proxy)
    upstream.gate.set()
    await stop
    upstream.gate = None
    proxy = await start(start_proxy, upstream)
    charged = sum(tokens_of(text) for call in upstream.calls for text in call.inputs)
    assert (await billed(proxy))[0] == charged


async def _played(made, steps, attempt):
    """Note how far an attempt gets; `sent` marks it as sent, other steps are waited for."""
    made.append("begun")
    for step in steps:
        if step == "sent":
            attempt.is_sent = True
        elif isinstance(step, Exception):
            raise step
        else:
            await step.wait()
    made.append("ended")


@pytest.mark.parametrize("is_sent", [True, False])
@pytest.mark.parametrize("ending", ["time", "cancelled"])
async def test_only_what_was_sent_goes_on(is_sent, ending):
    """An attempt that waits for its turn ends with its request, and no call is made for it."""
    all_attempts, going_on, made = attempts.Attempts(), asyncio.Event(), []
    steps = ["sent", going_on] if is_sent else [going_on]

    def work(attempt):
        return _played(made, steps, attempt)

    if ending == "time":
        attempt = attempts.Attempt()
        task = all_attempts.start(work(attempt), attempt)
        await until(lambda: made)
        assert all_attempts.abandon(task) is not is_sent
    else:
        waiting = asyncio.create_task(all_attempts.make(work))
        await until(lambda: made)
        waiting.cancel()
        await asyncio.wait([waiting])
        assert waiting.cancelled()
    going_on.set()
    await until(lambda: not all_attempts._tasks)
    assert made == (["begun", "ended"] if is_sent else ["begun"])


async def test_no_call_is_sent_once_the_proxy_stops(monkeypatch):
    """What was not sent ends at once, what was sent goes on, what begins now is not sent."""
    monkeypatch.setattr(attempts, "CLOSE_S", FOR_EVER)
    all_attempts, going_on, later = attempts.Attempts(), asyncio.Event(), []
    sent_steps, unsent_steps = [], []
    plans = [(sent_steps, ["sent", going_on]), (unsent_steps, [going_on])]
    tasks = [
        asyncio.create_task(all_attempts.make(partial(_played, made, steps)))
        for made, steps in plans
    ]
    await until(lambda: sent_steps and unsent_steps)
    closing = asyncio.create_task(all_attempts.close())
    await some_turns()
    assert [task.done() for task in (closing, *tasks)] == [False, False, True]

    async def late(attempt):
        later.append(attempt.is_abandoned)

    await all_attempts.make(late)
    going_on.set()
    await asyncio.wait([closing, tasks[0]])
    assert tasks[1].cancelled()
    assert (sent_steps, unsent_steps, later) == (["begun", "ended"], ["begun"], [True])


async def test_a_late_failure_is_told_in_the_log_alone(caplog):
    """Nobody waits for an abandoned attempt, so its failure is no error of anybody."""
    caplog.set_level("INFO")
    all_attempts, going_on = attempts.Attempts(), asyncio.Event()

    attempt, steps = attempts.Attempt(), ["sent", going_on, EmbeddingError("made up")]
    task = all_attempts.start(_played([], steps, attempt), attempt)
    await until(lambda: attempt.is_sent)
    assert not all_attempts.abandon(task)
    going_on.set()
    await until(lambda: not all_attempts._tasks)
    assert "nobody waits for any more failed: made up" in caplog.text
