"""Connections that break off, stall, or speak no HTTP: told why, if anyone still listens."""

import asyncio
import json
import logging

import pytest
from aiohttp import web
from embedding_proxy.proxy.http.app_runner import Runner
from talk import Talk

GOOD = b'{"model":"text-embedding-3-small","input":"a"}'
LINE = b"POST /v1/embeddings HTTP/1.1\r\nHost: h\r\n"
KEY = b"sk-canary-0123456789"


def _request(body: bytes = GOOD, length: int | None = None, head: bytes = LINE) -> bytes:
    return head + b"Content-Length: %d\r\n\r\n" % (length or len(body)) + body


def _refused(code: int, content: dict, message: str) -> bool:
    """Say whether a response is an error in OpenAI's shape, with this message."""
    error = content["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert error["type"] == "invalid_request_error"
    assert message in error["message"]
    return 400 <= code < 500


def _alarms(caplog) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


HALF = {
    "counted": _request(length=1000),
    "counted, nothing came": _request(b"", length=1000),
    "in chunks": LINE + b'Transfer-Encoding: chunked\r\n\r\n5\r\n{"mod\r\n',
    "in the midst of a chunk": LINE + b'Transfer-Encoding: chunked\r\n\r\nff\r\n{"mod',
}


@pytest.mark.parametrize("sent", HALF.values(), ids=HALF)
async def test_half_a_body_and_an_end_is_told_why(sent, upstream, start_proxy, caplog):
    """A client that stops sending in the midst of a body, but listens, gets a 400 and the end."""
    proxy = await start_proxy(openai=upstream)
    async with Talk(proxy.url, sent, end=True) as talk:
        code, headers, content = await talk.response()
        assert _refused(code, content, "The request body ")
        assert headers["x-request-id"].startswith("req_")
        assert await talk.is_over()
    assert (await proxy.post(json.loads(GOOD))).status == 200
    assert upstream.inputs == ["a"]
    assert not _alarms(caplog)


@pytest.mark.parametrize("sent", HALF.values(), ids=HALF)
async def test_half_a_body_and_a_reset_is_forgotten(sent, upstream, start_proxy, caplog):
    """A client that vanishes in the midst of a body leaves nothing behind, no alarm either."""
    proxy = await start_proxy(openai=upstream)
    async with Talk(proxy.url, sent) as talk:
        talk.reset()
    assert (await proxy.post(json.loads(GOOD))).status == 200
    await start_proxy.stop()
    assert upstream.inputs == ["a"]
    assert not _alarms(caplog)


async def test_half_a_body_and_silence_is_a_408(upstream, start_proxy):
    """A body of which nothing more comes is given up after the configured time."""
    proxy = await start_proxy(openai=upstream, server={"body_timeout_s": 0.05})
    async with Talk(proxy.url, _request(length=1000)) as talk:
        code, _, content = await talk.response()
        talk.reset()
    assert _refused(code, content, "nothing came for 0.05 s")
    assert code == 408
    assert (await proxy.post(json.loads(GOOD))).status == 200
    assert upstream.inputs == ["a"]


async def test_too_large_a_body_is_refused_before_it_is_sent(upstream, start_proxy):
    """A length over the limit is a 413 at once; nobody waits for the body."""
    proxy = await start_proxy(openai=upstream)
    async with Talk(proxy.url, _request(b"", length=1 << 40)) as talk:
        code, _, content = await talk.response()
        talk.reset()
    assert _refused(code, content, "larger than 64 MiB")
    assert code == 413


async def test_a_length_of_thousands_of_zeros_is_refused(upstream, start_proxy, caplog):
    """A number that only the parser reads is the client's fault, and no alarm."""
    proxy = await start_proxy(openai=upstream)
    head = LINE + b"Content-Length: " + 5000 * b"0" + b"2\r\n\r\n{}"
    async with Talk(proxy.url, head) as talk:
        code, _, content = await talk.response()
        assert await talk.is_over()
    assert _refused(code, content, "Content-Length")
    assert not _alarms(caplog)


async def test_requests_in_a_row_are_each_answered(upstream, start_proxy):
    """Requests sent without waiting are answered in turn, on one connection."""
    proxy = await start_proxy(openai=upstream)
    async with Talk(proxy.url, _request() + _request(b"{}")) as talk:
        assert [(await talk.response())[0] for _ in range(2)] == [200, 400]


async def test_an_end_before_any_request_is_no_request(upstream, start_proxy, caplog):
    """A connection that is opened and closed, as probes of a port do, gets no answer."""
    proxy = await start_proxy(openai=upstream)
    async with Talk(proxy.url, b"", end=True) as talk:
        assert await talk.is_over()
    assert not _alarms(caplog)


NO_HTTP = {
    "the beginning of TLS": (b"\x16\x03\x01\x02\x00\r\n\r\n", "HTTPS traffic"),
    "noise": (b"\x00\xff\r\n\r\n", "Invalid method"),
    "a length that is no number": (LINE + b"Content-Length: x\r\n\r\n", "Content-Length"),
    "a chunk without a size": (
        LINE + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n\r\n",
        "chunk size",
    ),
    "a header beyond bounds": (
        LINE + b"Authorization: Bearer " + KEY * 500 + b"\r\n\r\n",
        "more than 8190 bytes",
    ),
    "a header with a control character": (LINE + b"X: " + KEY + b"\x00\r\n\r\n", ""),
    "a path of raw bytes": (b"GET /\xff" + KEY + b" HTTP/1.1\r\n\r\n", "path"),
}


@pytest.mark.parametrize(("sent", "message"), NO_HTTP.values(), ids=NO_HTTP)
async def test_what_is_no_http_is_told_so_in_openais_shape(
    sent, message, upstream, start_proxy, caplog
):
    """Bytes that are no request get a 400 and the end, and nothing of them is repeated."""
    caplog.set_level(logging.DEBUG, "embedding_proxy")
    proxy = await start_proxy(openai=upstream)
    async with Talk(proxy.url, sent) as talk:
        code, _, content = await talk.response()
        assert await talk.is_over()
    assert _refused(code, content, "The request is not valid HTTP: ")
    assert message in content["error"]["message"]
    assert KEY.decode() not in f"{content} {caplog.text}"
    assert f"status {code}" in caplog.text
    assert (await proxy.post(json.loads(GOOD))).status == 200
    assert upstream.inputs == ["a"]


async def test_a_bug_beyond_the_application_stays_aiohttps_500(caplog):
    """What fails where no middleware catches it is a plain 500, with its traceback in the log."""

    async def broken(_: web.Request) -> web.Response:
        raise RuntimeError("sk-canary")

    app = web.Application()
    app.router.add_get("/", broken)
    runner = Runner(app)
    await runner.setup()
    await runner.listen()
    url = f"http://127.0.0.1:{runner.addresses[0][1]}"
    async with asyncio.timeout(60), Talk(url, b"GET / HTTP/1.1\r\nHost: h\r\n\r\n") as talk:
        head = await talk.reader.readuntil(b"\r\n\r\n")
    await runner.cleanup()
    assert head.startswith(b"HTTP/1.1 500 ")
    assert b"canary" not in head
    assert any(record.exc_info and record.levelno == logging.ERROR for record in caplog.records)


async def test_a_request_and_an_end_is_answered(start_proxy):
    """A client may close its side after a whole request; it still gets its reply."""
    proxy = await start_proxy()
    async with Talk(proxy.url, b"GET /v1/models HTTP/1.1\r\nHost: h\r\n\r\n", end=True) as talk:
        assert (await talk.response())[0] == 200
