"""Malformed requests cost themselves only: those beside them are answered, and nobody waits."""

import asyncio
import json
from collections.abc import Callable

import pytest
from embedding_proxy.proxy.http.connection import Connection
from talk import Talk

MODEL = "text-embedding-3-small"
SECONDS = 60
LINE = b"POST /v1/embeddings HTTP/1.1\r\nHost: h\r\n"
CHUNKED = LINE + b"Transfer-Encoding: chunked\r\n\r\n"


def _post(text: str = "a", *lines: bytes) -> bytes:
    body = json.dumps({"model": MODEL, "input": text}).encode()
    return LINE + b"".join(lines) + b"Content-Length: %d\r\n\r\n" % len(body) + body


async def _codes(url: str, *pieces: bytes, end: bool = False) -> list[int]:
    """Send pieces, and return the status of each response until the connection is closed."""
    codes = []
    async with asyncio.timeout(SECONDS), Talk(url, pieces[0], end=end) as talk:
        for piece in pieces[1:]:
            await talk.send(piece)
        while not talk.reader.at_eof():
            try:
                codes.append((await talk.response())[0])
            except asyncio.IncompleteReadError:
                break
    return codes


MALFORMED = {
    "noise": b"\x00\x01\r\n\r\n",
    "both framings": LINE + b"Content-Length: 4\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    "no length": LINE + b"Content-Length: x\r\n\r\n",
    "a bad chunk": CHUNKED + b"zz\r\n\r\n",
    "no host": b"GET /livez HTTP/1.1\r\n\r\n",
}


@pytest.mark.parametrize("what", MALFORMED)
@pytest.mark.parametrize("fast_path", [True, False])
async def test_a_request_ahead_of_a_malformed_one_is_answered(
    what, fast_path, upstream, start_proxy
):
    """Both came in one segment: the good one gets its vectors, the other its 400."""
    proxy = await start_proxy(openai=upstream, server={"fast_path": fast_path})
    assert await _codes(proxy.url, _post() + MALFORMED[what]) == [200, 400]
    body = _post().partition(b"\r\n\r\n")[2]
    chunked = CHUNKED + b"%x\r\n" % len(body) + body + b"\r\n0\r\n\r\n"
    assert await _codes(proxy.url, _post() + chunked + MALFORMED[what]) == [200, 200, 400]


@pytest.mark.parametrize("behind", [b"\r\n", b"garbage", _post()])
async def test_what_follows_the_last_request_is_ignored(behind, upstream, start_proxy):
    """A client that says `Connection: close` gets its reply, whatever it sends behind it."""
    proxy = await start_proxy(openai=upstream)
    assert await _codes(proxy.url, _post("a", b"Connection: close\r\n") + behind) == [200]


@pytest.mark.parametrize("protocol", [b"h2c", b"TLS/1.0", b"websocket"])
async def test_a_request_behind_an_upgrade_is_answered(protocol, upstream, start_proxy):
    """An upgrade that the proxy does not know is ignored, as RFC 9110 (7.8) allows."""
    proxy = await start_proxy(openai=upstream)
    upgrade = b"Connection: Upgrade\r\nUpgrade: " + protocol + b"\r\n"
    last = _post("c", b"Connection: close\r\n")
    assert await _codes(proxy.url, _post("a", upgrade) + _post("b") + last) == [200, 200, 200]


@pytest.mark.parametrize("fast_path", [True, False])
async def test_requests_in_a_row_and_an_end_are_all_answered(fast_path, upstream, start_proxy):
    """A client may close its side behind several requests; it listens for every reply."""
    proxy = await start_proxy(openai=upstream, server={"fast_path": fast_path})
    sent = b"".join(map(_post, "abca"))
    assert await _codes(proxy.url, sent, end=True) == [200] * 4


BROKEN = {
    "at once": (CHUNKED + b"zz\r\n\r\n",),
    "behind the head": (CHUNKED, b"zz\r\n\r\n"),
    "amid the body": (CHUNKED + b"1\r\n{\r\n", b"zz\r\n\r\n"),
    "a chunk too long": (CHUNKED + b"1\r\n{", b'"a"\r\n'),
    "a bad trailer": (CHUNKED + b"1\r\n{\r\n", b"0\r\nbad trailer\r\n\r\n"),
}


@pytest.mark.parametrize("what", BROKEN)
async def test_a_malformed_body_is_refused_at_once(what, upstream, start_proxy):
    """Its request does not wait for more until the time for the body is up."""
    proxy = await start_proxy(openai=upstream, server={"body_timeout_s": 3600})
    async with asyncio.timeout(SECONDS), Talk(proxy.url, BROKEN[what][0]) as talk:
        for piece in BROKEN[what][1:]:
            await talk.send(piece)
        code, headers, content = await talk.response()
        assert (code, headers["connection"]) == (400, "close")
        assert content["error"]["message"].startswith("The request is not valid HTTP: ")
        assert await talk.is_over()
    assert not upstream.calls


@pytest.mark.parametrize("turns", range(12))
async def test_a_body_that_turns_out_malformed_behind_its_reply_ends_the_connection(
    turns, start_proxy, monkeypatch
):
    """Whenever it does: before the reply, while it is sent, or when the rest is being dropped."""
    finish = Connection.finish

    def finish_and_read_on(connection: Connection, *, is_kept_open: bool) -> None:
        finish(connection, is_kept_open=is_kept_open)
        _call_in(turns, lambda: connection.data_received(b"zz\r\n\r\n"))

    monkeypatch.setattr(Connection, "finish", finish_and_read_on)
    proxy = await start_proxy(server={"body_timeout_s": 3600})
    head = b"PATCH http://u:p@h/v1/models HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\n"
    async with asyncio.timeout(SECONDS), Talk(proxy.url, head + b"1\r\na\r\n") as talk:
        assert (await talk.response())[0] == 400
        assert await talk.is_over()


def _call_in(turns: int, call: Callable[[], None]) -> None:
    if turns:
        asyncio.get_running_loop().call_soon(_call_in, turns - 1, call)
    else:
        call()


async def test_a_malformed_body_that_nobody_reads_ends_the_connection(start_proxy):
    """The request is answered, and what cannot be read behind it is not waited for."""
    proxy = await start_proxy(server={"body_timeout_s": 3600})
    head = b"GET /livez HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\n"
    assert (await _codes(proxy.url, head, b"zz\r\n\r\n"))[0] == 200


@pytest.mark.parametrize("value", [b"\x80", b"a miracle", b""])
@pytest.mark.parametrize(("path", "code"), [(b"/livez", 200), (b"/nowhere", 404)])
async def test_an_expectation_that_is_not_known_is_ignored(value, path, code, start_proxy):
    """Whatever the bytes and the path, as RFC 9110 (10.1.1) allows."""
    proxy = await start_proxy()
    sent = b"GET " + path + b" HTTP/1.1\r\nHost: h\r\nConnection: close\r\nExpect: " + value
    assert await _codes(proxy.url, sent + b"\r\n\r\n") == [code]


async def test_a_client_of_an_older_version_is_not_told_to_go_on(upstream, start_proxy):
    """HTTP/1.0 has no interim replies (RFC 9110, 10.1.1)."""
    proxy = await start_proxy(openai=upstream)
    sent = _post("a", b"Expect: 100-continue\r\n").replace(b"HTTP/1.1", b"HTTP/1.0")
    assert await _codes(proxy.url, sent) == [200]


@pytest.mark.parametrize("version", [b"0.9", b"2.0", b"1.2", b"3.7"])
@pytest.mark.parametrize("target", [b"GET /livez", b"POST /v1/embeddings"])
async def test_another_version_of_http_is_refused(version, target, start_proxy):
    """The refusal is one of HTTP/1.1, for no other is spoken here."""
    proxy = await start_proxy()
    sent = target + b" HTTP/" + version + b"\r\nHost: h\r\nContent-Length: 2\r\n\r\n{}"
    async with asyncio.timeout(SECONDS), Talk(proxy.url, sent) as talk:
        data = await talk.reader.read()
    head, _, body = data.partition(b"\r\n\r\n")
    assert head.startswith((b"HTTP/1.1 400 ", b"HTTP/1.0 400 "))
    assert json.loads(body)["error"]["message"].startswith("The request is not valid HTTP: ")
