"""Waits that an upstream asks for are bounded, and no failure is told as plain text."""

import json
import logging
import time
from email.utils import formatdate

import aiohttp
import pytest
from aiohttp import web
from embedding_proxy.index.errors import Unavailable, translate
from embedding_proxy.providers.upstream.retry_after import (
    MAX_TOLD_WAIT,
    MAX_WAIT,
    client_header,
    client_wait,
    seconds_until,
)
from embedding_proxy.proxy.http import middleware
from embedding_proxy.proxy.http.errors import Failure
from fault_server import status
from hypothesis import given
from hypothesis import strategies as st
from talk import Talk

MODEL = "text-embedding-3-small"
DAY = 86_400
BEYOND = [
    "1e308",
    "1e400",
    "nan",
    "inf",
    "-1",
    "9" * 20,
    "9" * 5000,
    "Fri, 31 Dec 9999 23:59:59 GMT",
    "Fri, 31 Dec 9999 23:59:59 -2359",
    "9999-12-31T23:59:59Z",
    "99999999",
    "9999h",
]


@pytest.mark.parametrize("name", ["Retry-After", "retry-after-ms", "x-ratelimit-reset-requests"])
@pytest.mark.parametrize("wait", BEYOND)
@pytest.mark.parametrize("code", [429, 503])
async def test_no_wait_beyond_a_day_is_told(code, wait, name, upstream, start_proxy):
    """An absurd wait gets an error in OpenAI's shape, with a wait of a day at most."""
    upstream.always = status(code, headers={name: wait})
    proxy = await start_proxy(openai=upstream)
    for _ in range(2):
        reply = await proxy.post({"model": MODEL, "input": "a"})
        assert reply.status == code
        assert reply.content_type == "application/json"
        assert 0 <= int(reply.headers["Retry-After"]) <= DAY
        assert 0 <= int(reply.headers["retry-after-ms"]) <= DAY * 1000


async def test_a_wait_of_some_hours_is_told_and_kept_for_one(upstream, start_proxy):
    """The client hears what the provider asks for; the proxy asks again after an hour."""
    upstream.always = status(429, headers={"Retry-After": "36000"})
    proxy = await start_proxy(openai=upstream)
    first = await proxy.post({"model": MODEL, "input": "a"})
    assert first.headers["Retry-After"] == "36000"
    later = await proxy.post({"model": MODEL, "input": "b"})
    assert int(later.headers["Retry-After"]) <= MAX_WAIT
    assert len(upstream.calls) == 1


@pytest.mark.parametrize("code", [200, 429, 503])
async def test_no_wait_beyond_a_day_is_passed_through(code, other, start_proxy):
    """A header that no client should read is left out, and a longer wait is told as a day."""
    sent = [(name, wait) for name in ("Retry-After", "x-ratelimit-reset-tokens") for wait in BEYOND]

    async def act(request: web.Request) -> web.Response:
        name, wait = sent[int(request.query["n"])]
        return web.Response(status=code, headers={name: wait})

    other.act = act
    proxy = await start_proxy(openai=other, passthrough="openai")
    for n, (name, _) in enumerate(sent):
        async with proxy.http.get(f"{proxy.url}/x?n={n}") as reply:
            assert reply.status == code
            assert reply.headers.get(name, str(DAY)) == str(DAY)


async def test_a_wait_within_a_day_is_passed_through_as_it_is(other, start_proxy):
    """Seconds, durations and dates that can be believed are not rewritten."""
    date = formatdate(time.time() + 3600, usegmt=True)
    told = {"Retry-After": date, "retry-after-ms": "1500", "x-ratelimit-reset-tokens": "6m0s"}

    async def act(_: web.Request) -> web.Response:
        return web.Response(status=429, headers=told)

    other.act = act
    proxy = await start_proxy(openai=other, passthrough="openai")
    async with proxy.http.get(f"{proxy.url}/x") as reply:
        assert {name: reply.headers[name] for name in told} == told


@given(st.text(max_size=70) | st.floats().map(str) | st.integers().map(str))
def test_whatever_a_header_says_the_wait_is_a_number_within_bounds(text):
    """No text makes the reader fail."""
    wait = seconds_until(text, 0.0)
    assert wait is None or 0 <= wait <= MAX_TOLD_WAIT
    for name in ("retry-after", "retry-after-ms", "x-ratelimit-reset"):
        assert isinstance(client_header(name, text, 0.0), str | None)


@given(st.floats())
def test_every_wait_can_be_told(seconds):
    """Whatever number an error holds, a response can be made of it."""
    headers = Failure(503, "m", "server_error", retry_after=seconds).response().headers
    assert 0 <= int(headers["Retry-After"]) <= DAY
    assert 0 <= client_wait(seconds) <= MAX_TOLD_WAIT


@pytest.mark.parametrize("wait", BEYOND)
def test_qdrants_waits_are_bounded_as_well(wait):
    """It is read by the same function as an upstream's."""
    from qdrant_client.http.exceptions import UnexpectedResponse  # noqa: PLC0415

    error = translate(UnexpectedResponse(503, "busy", b"", aiohttp.typedefs.CIMultiDict()))
    assert isinstance(error, Unavailable)
    headers = aiohttp.typedefs.CIMultiDict({"retry-after": wait})
    error = translate(UnexpectedResponse(503, "busy", b"", headers))
    assert error.retry_after_s is None or 0 <= error.retry_after_s <= MAX_TOLD_WAIT


HEAD = b" HTTP/1.1\r\nHost: h\r\n"
BAD = {
    "no request line": b"BOGUS\r\n\r\n",
    "a version from the future": b"GET / HTTP/3.7\r\n\r\n",
    "a target that is too long": b"GET /" + b"a" * 20_000 + HEAD + b"\r\n",
    "a header that is too long": b"GET /livez" + HEAD + b"x: " + b"a" * 70_000 + b"\r\n\r\n",
    "a bad port": b"GET http://user:password@h:99999/v1/x" + HEAD + b"\r\n",
    "two hosts": b"GET /livez" + HEAD + b"Host: i\r\n\r\n",
    "two lengths": b"POST /livez" + HEAD + b"Content-Length: 1\r\nContent-Length: 2\r\n\r\n",
    "a bad chunk": b"POST /v1/embeddings" + HEAD + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n\r\n",
    "a strange expectation elsewhere": b"GET /nowhere" + HEAD + b"Expect: a miracle\r\n\r\n",
    "a method that is not allowed": b"DELETE /v1/embeddings" + HEAD + b"\r\n",
    "a path that is not there": b"GET /nowhere" + HEAD + b"\r\n",
    "a body that is too large": b"POST /v1/embeddings"
    + HEAD
    + b"Content-Length: 99999999999\r\n\r\n",
    "all methods": b"CONNECT h:1" + HEAD + b"\r\n",
    "asterisk": b"OPTIONS *" + HEAD + b"\r\n",
}


@pytest.mark.parametrize("what", BAD)
async def test_no_error_is_plain_text(what, start_proxy):
    """Errors that aiohttp makes by itself are in OpenAI's shape, and repeat nothing of a URL."""
    proxy = await start_proxy()
    async with Talk(proxy.url, BAD[what]) as talk:
        code, headers, body = await talk.response()
    assert 400 <= code < 500
    assert headers["content-type"] == "application/json"
    assert headers["x-request-id"].startswith("req_")
    assert set(body["error"]) == {"message", "type", "param", "code"}
    assert "password" not in json.dumps(body)


async def test_a_failure_outside_of_the_handler_is_a_500_in_openais_shape(
    start_proxy, monkeypatch, caplog
):
    """Also where the code that surrounds every request is what fails; the log says why."""

    def fail(*_: object) -> None:
        raise RuntimeError("made up")

    monkeypatch.setattr(middleware.target, "check", fail)
    proxy = await start_proxy()
    caplog.set_level(logging.ERROR)
    reply = await proxy.http.get(proxy.url.replace("/v1", "/livez"))
    error = (await reply.json())["error"]
    assert (reply.status, reply.content_type) == (500, "application/json")
    assert "made up" not in error["message"]
    assert "made up" in caplog.text
