"""Misses of requests whose head is known: answered without aiohttp's server, and not otherwise."""

import asyncio
import json
import logging

import pytest
from aiohttp import web
from conftest import IS_FAST
from embedding_proxy.providers.upstream import hops
from embedding_proxy.proxy.http.app_runner import LIMITS, REQUESTS, RESPONSES, Runner
from embedding_proxy.proxy.http.embeddings import Embeddings
from embedding_proxy.proxy.http.response_cache import ResponseCache
from fault_server import FaultServer, hang, status
from talk import Talk

MODEL = "text-embedding-3-small"
TRACE = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"
OF_ITS_OWN = ("content-length", "date", "x-request-id")
pytestmark = pytest.mark.skipif(not IS_FAST, reason="the fast path is off")


def post(given: object, *lines: str) -> bytes:
    """Return a request."""
    body = json.dumps({"model": MODEL, "input": given, "dimensions": 4}).encode()
    head = ("POST /v1/embeddings HTTP/1.1", "Host: h", f"Content-Length: {len(body)}", *lines)
    return "\r\n".join(head).encode() + b"\r\n\r\n" + body


@pytest.fixture
def read_by_aiohttp(monkeypatch):
    """Return a list that grows with each request that aiohttp has read."""
    requests: list[web.BaseRequest] = []
    make = Runner._make_request

    def counted(runner, *arguments):
        requests.append(make(runner, *arguments))
        return requests[-1]

    monkeypatch.setattr(Runner, "_make_request", counted)
    return requests


def common(headers: dict[str, str]) -> dict[str, str]:
    """Return the headers without those that each reply has of its own."""
    return {name: value for name, value in headers.items() if name not in OF_ITS_OWN}


async def test_a_miss_is_answered_without_aiohttp(upstream, start_proxy, read_by_aiohttp, caplog):
    """Its reply, its line in the log and its count are those of a request that aiohttp read."""
    caplog.set_level(logging.INFO, "embedding_proxy.requests")
    proxy = await start_proxy(upstream)
    async with Talk(proxy.url, post("some text")) as talk:
        first = await talk.response()
        await talk.send(post("more text"))
        second = await talk.response()
    assert len(read_by_aiohttp) == 1
    assert first[0] == second[0] == 200
    assert common(first[1]) == common(second[1])
    assert second[1]["x-cache"] == "miss"
    assert first[1]["x-request-id"] != second[1]["x-request-id"]
    assert [call.inputs for call in upstream.calls] == [["some text"], ["more text"]]
    lines = [record.fields for record in caplog.records if record.msg == "request"]
    assert [line["request_id"] for line in lines] == [
        reply[1]["x-request-id"] for reply in (first, second)
    ]
    assert [{**line, "request_id": "", "ms": 0} for line in lines[:1]] == [
        {**line, "request_id": "", "ms": 0} for line in lines[1:]
    ]
    assert lines[1]["usd"] > 0
    requests = proxy.app[REQUESTS]
    assert requests.by_status == {("embeddings", 200): 2}
    assert requests.in_flight == 0


async def test_a_call_carries_on_what_the_head_says(upstream, start_proxy, read_by_aiohttp):
    """The proxies that a request has passed and its trace go along, as they do with aiohttp."""
    proxy = await start_proxy(upstream)
    lines = (f"{hops.HEADER}: another", f"traceparent: {TRACE}")
    async with Talk(proxy.url, post("one", *lines)) as talk:
        await talk.response()
        await talk.send(post("two", *lines))
        assert (await talk.response())[0] == 200
    assert len(read_by_aiohttp) == 1
    first, second = (call.headers for call in upstream.calls)
    assert first[hops.HEADER] == second[hops.HEADER] == f"another, {first[hops.HEADER][9:]}"
    assert len(first[hops.HEADER]) > len("another, ")
    assert first["traceparent"] == second["traceparent"] == TRACE


async def test_a_failure_reads_as_ever(upstream, start_proxy, read_by_aiohttp, caplog):
    """Its handler tells it: one error, one count, one id, and no call beyond the first."""
    caplog.set_level(logging.INFO)
    proxy = await start_proxy(upstream)
    refusal = status(400, {"error": {"message": "no", "code": "bad", "type": "x", "param": None}})
    async with Talk(proxy.url, post("well")) as talk:
        await talk.response()
        upstream.script += [refusal, refusal]
        await talk.send(post("ill"))
        known = await talk.response()
        await talk.send(post("ill too", "X-Other: 1"))
        other = await talk.response()
        await talk.send(post("well again"))
        assert (await talk.response())[0] == 200
    assert known[0] == other[0] == 400
    assert known[2] == other[2]
    assert common(known[1]) == common(other[1])
    assert len(upstream.calls) == 4
    assert proxy.app[REQUESTS].by_status == {("embeddings", 200): 2, ("embeddings", 400): 2}
    assert proxy.app[REQUESTS].in_flight == 0
    errors = [line for line in caplog.messages if known[1]["x-request-id"] in line]
    assert len(errors) == 1
    assert MODEL in errors[0]


async def test_a_defect_is_a_500(upstream, start_proxy, monkeypatch):
    """What is our own fault is told by its handler, and the connection goes on."""
    proxy = await start_proxy(upstream)
    async with Talk(proxy.url, post("well")) as talk:
        await talk.response()
        with monkeypatch.context() as patch:
            patch.setattr("embedding_proxy.proxy.http.embeddings._headers", lambda _: 1 / 0)
            await talk.send(post("ill"))
            assert (await talk.response())[0] == 500
        await talk.send(post("well again"))
        assert (await talk.response())[0] == 200


async def test_it_is_a_request_of_the_application_that_has_looked(
    upstream, start_proxy, monkeypatch
):
    """An application that takes its place in that moment does not answer it, nor end the former."""
    proxy = await start_proxy(upstream)
    counts, handlers = [], []
    answer, handle = Runner.answer, Embeddings.handle

    def noted(runner, connection, key, start):
        former = runner._generation
        before = former.requests
        answer(runner, connection, key, start)
        counts.append(former.requests - before)
        # What `replace` does once the new one is open.
        runner.responses = ResponseCache(0)
        runner.responses.handler = None

    def told(embeddings, *arguments):
        handlers.append(embeddings)
        return handle(embeddings, *arguments)

    monkeypatch.setattr(Runner, "answer", noted)
    monkeypatch.setattr(Embeddings, "handle", told)
    async with Talk(proxy.url, post("zero")) as talk:
        await talk.response()
        await talk.send(post("one"))
        assert (await talk.response())[1]["x-cache"] == "miss"
    assert counts == [1]
    assert handlers == [proxy.app[RESPONSES].handler]


async def test_what_comes_behind_it_is_answered_in_order(upstream, start_proxy):
    """Requests that are sent without a wait for replies are answered one after the other."""
    proxy = await start_proxy(upstream)
    live = b"GET /livez HTTP/1.1\r\nHost: h\r\n\r\n"
    async with Talk(proxy.url, post("zero")) as talk:
        await talk.response()
        await talk.send(post("one") + live + post("two") + post("zero") + post("three"))
        replies = [await talk.response() for _ in range(5)]
    assert [reply[1].get("x-cache") for reply in replies] == ["miss", None, "miss", "hit", "miss"]


async def test_a_body_that_is_too_large_is_refused_as_under_an_unknown_head(upstream, start_proxy):
    """Nothing of it is bought; a body of the very length that is allowed is answered."""
    largest = post("x" * 900)
    allowed = len(largest) - largest.find(b"\r\n\r\n") - 4
    proxy = await start_proxy(upstream, server={"max_body_mib": allowed / 2**20})
    async with Talk(proxy.url, post("zero")) as talk:
        await talk.response()
        await talk.send(largest)
        assert (await talk.response())[0] == 200
        await talk.send(post("x" * 901))
        assert (await talk.response())[0] == 413
    assert upstream.inputs == ["zero", "x" * 900]


async def _hold(upstream: FaultServer) -> asyncio.Event:
    """Have the next call wait for the event that is returned."""
    event = asyncio.Event()

    async def act(_: web.Request, payload: dict) -> web.Response:
        await event.wait()
        return web.json_response(upstream.reply(payload))

    upstream.script.append(act)
    return event


async def _until_called(upstream: FaultServer, count: int) -> None:
    async with asyncio.timeout(30):
        while len(upstream.calls) < count:  # noqa: ASYNC110 - nobody tells
            await asyncio.sleep(0)


@pytest.mark.parametrize("leave", ["end", "reset"])
async def test_what_a_client_that_has_left_was_bought_is_kept(upstream, start_proxy, leave):
    """One that has closed its own direction gets its reply, too."""
    proxy = await start_proxy(upstream)
    async with Talk(proxy.url, post("zero")) as talk:
        await talk.response()
        event = await _hold(upstream)
        await talk.send(post("one"))
        await _until_called(upstream, 2)
        if leave == "end":
            talk.writer.write_eof()
        else:
            talk.reset()
        await asyncio.sleep(0)
        event.set()
        if leave == "end":
            status_, headers, _ = await talk.response()
            assert status_ == 200
            assert headers["connection"] == "close"
            assert await talk.is_over()
    async with asyncio.timeout(30):
        while proxy.app[REQUESTS].in_flight:  # noqa: ASYNC110 - nobody tells
            await asyncio.sleep(0)
    async with Talk(proxy.url, post("one")) as talk:
        assert (await talk.response())[1]["x-cache"] == "hit"
    assert len(upstream.calls) == 2


async def test_a_failure_that_nobody_is_told_is_counted(upstream, start_proxy, caplog):
    """Its client has left: the count and a line in the log tell of it."""
    caplog.set_level(logging.INFO)
    proxy = await start_proxy(upstream)
    async with Talk(proxy.url, post("zero")) as talk:
        await talk.response()
        event = asyncio.Event()

        async def act(request: web.Request, payload: dict) -> web.StreamResponse:
            await event.wait()
            return await status(400)(request, payload)

        upstream.script.append(act)
        await talk.send(post("one"))
        await _until_called(upstream, 2)
        talk.reset()
        async with asyncio.timeout(30):
            while len(proxy.app[LIMITS]):  # noqa: ASYNC110 - nobody tells
                await asyncio.sleep(0)
        event.set()
        async with asyncio.timeout(30):
            while proxy.app[REQUESTS].in_flight:  # noqa: ASYNC110 - nobody tells
                await asyncio.sleep(0)
    assert proxy.app[REQUESTS].by_status == {("embeddings", 200): 1, ("embeddings", 499): 1}
    assert any("failed when its client had left" in line for line in caplog.messages)


async def test_a_proxy_that_stops_answers_it_first(upstream, start_proxy, monkeypatch):
    """The reply says that the connection is closed behind it."""
    monkeypatch.setattr(Runner, "cleanup", _patient(Runner.cleanup))
    proxy = await start_proxy(upstream)
    async with Talk(proxy.url, post("zero")) as talk:
        await talk.response()
        event = await _hold(upstream)
        await talk.send(post("one"))
        await _until_called(upstream, 2)
        stopping = asyncio.create_task(start_proxy.stop())
        for _ in range(5):
            await asyncio.sleep(0)
        event.set()
        status_, headers, _ = await talk.response()
        assert status_ == 200
        assert headers["connection"] == "close"
        await stopping


def _patient(cleanup):
    async def patient(runner):
        runner._shutdown_timeout = 30.0
        await cleanup(runner)

    return patient


async def test_a_proxy_that_stops_ends_what_has_no_end(upstream, start_proxy):
    """After the time for it, a request that still waits for its upstream is cut off."""
    proxy = await start_proxy(upstream)
    async with Talk(proxy.url, post("zero")) as talk:
        await talk.response()
        upstream.script.append(hang())
        await talk.send(post("one"))
        await _until_called(upstream, 2)
        stopping = asyncio.create_task(start_proxy.stop())
        await upstream.stop()
        await stopping
    assert proxy.app[REQUESTS].in_flight == 0
