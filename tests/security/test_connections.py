"""Connections that say nothing, or are too many: closed in time, and they starve nobody."""

import asyncio
import itertools
import json
import logging
import socket
from contextlib import AsyncExitStack, suppress
from unittest.mock import Mock

import pytest
from clock import until
from embedding_proxy.proxy.config.schema import Server, Settings
from embedding_proxy.proxy.http import connection_limits
from embedding_proxy.proxy.http.app_runner import LIMITS
from embedding_proxy.proxy.http.connection import Connection
from embedding_proxy.proxy.http.connection_limits import MIN_WAIT_S, ConnectionLimits
from pydantic import ValidationError
from talk import Talk

MODEL = "text-embedding-3-small"
SECONDS = 60
SOON = 0.2
AT_ONCE = 60
"""Connections; a listening socket has room for more."""


def _post(text: str) -> bytes:
    body = json.dumps({"model": MODEL, "input": text}).encode()
    head = b"POST /v1/embeddings HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n"
    return head % len(body) + body


def _is_error(content: dict, code: str | None) -> bool:
    error = content["error"]
    return error.keys() == {"message", "type", "param", "code"} and error["code"] == code


# --- heads ----------------------------------------------------------------------------------------


async def test_a_silent_connection_is_closed(start_proxy):
    """Before the first request too, and without a word: nobody has asked anything."""
    proxy = await start_proxy(server={"head_timeout_s": SOON})
    async with asyncio.timeout(SECONDS), Talk(proxy.url, b"") as talk:
        assert await talk.is_over()


PARTIAL = {
    "at the start": (b"", b"POST /v1/embeddings HTTP/1.1\r\nHo"),
    "without a line's end": (b"", b"P"),
    "after empty lines": (b"", b"\r\n\r\nPOST /v1"),
    "after a request": (_post("a"), b"POST /v1/embeddings HTTP/1.1\r\nHost: localhost\r\n"),
}


@pytest.mark.parametrize("case", PARTIAL)
async def test_a_head_that_does_not_end_is_a_408(case, start_proxy, upstream, move, monkeypatch):
    """The first head of a connection, or a later one; a byte now and then wins no time."""
    whole, partial = PARTIAL[case]
    arrived, receive = [], Connection.data_received

    def noted(connection, data):
        arrived.append(data)
        receive(connection, data)

    monkeypatch.setattr(Connection, "data_received", noted)
    proxy = await start_proxy(openai=upstream, server={"head_timeout_s": 100})
    async with Talk(proxy.url, whole) as talk:
        if whole:
            assert (await talk.response())[0] == 200
        await talk.send(partial)
        await until(lambda: b"".join(arrived) == whole + partial)
        await move(101)
        status, headers, content = await talk.response()
        assert (status, headers["connection"]) == (408, "close")
        assert _is_error(content, None)
        assert await talk.is_over()


async def test_a_head_behind_a_request_has_its_time_too(start_proxy, upstream):
    """What came in one segment with the request before it is not forgotten."""
    proxy = await start_proxy(openai=upstream, server={"head_timeout_s": SOON})
    async with asyncio.timeout(SECONDS), Talk(proxy.url, _post("a") + b"POST /v1") as talk:
        assert [(await talk.response())[0] for _ in range(2)] == [200, 408]
        assert await talk.is_over()


async def test_bytes_now_and_then_do_not_lengthen_the_time(start_proxy):
    """The time runs from the first byte on."""
    proxy = await start_proxy(server={"head_timeout_s": SOON})
    async with asyncio.timeout(SECONDS), Talk(proxy.url, b"GET / HTTP/1.1\r\n") as talk:
        reply = asyncio.create_task(talk.response())
        while not reply.done():
            await talk.send(b"x: y\r\n")
            await asyncio.wait([reply], timeout=SOON / 5)
        assert (await reply)[0] == 408


async def test_a_connection_between_requests_is_kept(start_proxy, upstream):
    """One that is idle outlives a silent one that was opened after its last answer."""
    proxy = await start_proxy(openai=upstream, server={"head_timeout_s": SOON})
    async with asyncio.timeout(SECONDS), Talk(proxy.url, _post("a")) as talk:
        for _ in range(3):  # Answered by aiohttp, then by the fast path.
            assert (await talk.response())[0] == 200
            async with Talk(proxy.url, b"") as silent:
                assert await silent.is_over()
            await talk.send(_post("a"))
        assert (await talk.response())[0] == 200


async def test_a_request_that_takes_long_is_not_cut(start_proxy, upstream):
    """The time is the head's, not the request's."""
    proxy = await start_proxy(openai=upstream, server={"head_timeout_s": SOON})
    upstream.gate = asyncio.Event()
    async with asyncio.timeout(SECONDS), Talk(proxy.url, _post("a")) as talk:
        async with Talk(proxy.url, b"") as silent:
            assert await silent.is_over()
        upstream.gate.set()
        assert (await talk.response())[0] == 200


# --- how many -------------------------------------------------------------------------------------


async def test_silent_connections_starve_nobody(start_proxy, upstream, caplog):
    """Beyond the limit the oldest silent ones are closed, and every request is answered."""
    proxy = await start_proxy(openai=upstream, server={"max_connections": 8})
    # Each look at the clock is two seconds later: all that wait have waited for long.
    proxy.app[LIMITS].clock = itertools.count(step=2).__next__
    async with asyncio.timeout(SECONDS), AsyncExitStack() as stack:
        talk = await stack.enter_async_context(Talk(proxy.url, _post("a")))
        assert (await talk.response())[0] == 200
        silent = [await stack.enter_async_context(Talk(proxy.url, b"")) for _ in range(50)]
        assert await silent[0].is_over()
        assert len(proxy.app[LIMITS]) <= 8
        # Who has been served keeps its connection; and a new one finds room.
        await talk.send(_post("a"))
        assert (await talk.response())[1]["x-cache"] == "hit"
        new = await stack.enter_async_context(Talk(proxy.url, _post("b")))
        assert (await new.response())[0] == 200
    told = [one for one in caplog.records if "server.max_connections" in one.getMessage()]
    assert len(told) == 1
    assert told[0].levelno == logging.WARNING


async def test_where_all_are_busy_a_new_one_is_refused(start_proxy, upstream):
    """It gets a 503 in OpenAI's shape and may come again; those in progress are answered."""
    server = {"max_connections": 2, "max_connections_per_address": 2}
    proxy = await start_proxy(openai=upstream, server=server)
    upstream.gate = asyncio.Event()
    async with (
        asyncio.timeout(SECONDS),
        Talk(proxy.url, _post("a")) as first,
        Talk(proxy.url, _post("b")) as second,
    ):
        await until(lambda: len(upstream.calls) >= 2)
        async with Talk(proxy.url, b"") as third:
            status, headers, content = await third.response()
            assert (status, headers["retry-after"]) == (503, "1")
            assert _is_error(content, "proxy_overloaded")
            assert await third.is_over()
        upstream.gate.set()
        assert [(await one.response())[0] for one in (first, second)] == [200, 200]
    await until(lambda: not len(proxy.app[LIMITS]))
    response = await proxy.post({"model": MODEL, "input": "c"})
    assert response.status == 200
    assert set(upstream.inputs) == {"a", "b", "c"}


@pytest.mark.parametrize("limit", ["max_connections", "max_connections_per_address"])
async def test_of_requests_at_one_instant_each_has_a_reply(limit, start_proxy, upstream):
    """Those beyond the limit get a 503, and none is closed for another before it was read."""
    proxy = await start_proxy(openai=upstream, server={limit: 10})
    host, _, port = proxy.url.removeprefix("http://").partition("/")[0].partition(":")
    loop = asyncio.get_running_loop()
    clients = []
    try:
        # The event loop does nothing meanwhile: it finds all of them, and what they have sent.
        for _ in range(AT_ONCE):
            clients.append(socket.create_connection((host, int(port))))
            clients[-1].sendall(_post("a"))
            clients[-1].setblocking(False)  # noqa: FBT003 - the library's own
        async with asyncio.timeout(SECONDS):
            replies = [await loop.sock_recv(client, 1 << 16) for client in clients]
    finally:
        for client in clients:
            client.close()
    found = [reply[:12] for reply in replies]
    assert set(found) == {b"HTTP/1.1 200", b"HTTP/1.1 503"}
    assert found.count(b"HTTP/1.1 200") < AT_ONCE / 2
    assert all(b"proxy_overloaded" in one for one in replies if one.startswith(b"HTTP/1.1 503"))


async def _refused(proxy, stack):
    """Return a connection for which there is no room, and which has its 503."""
    await stack.enter_async_context(Talk(proxy.url, b""))
    await until(lambda: len(proxy.app[LIMITS]))
    proxy.app[LIMITS].clock = itertools.repeat(0.0).__next__
    talk = await stack.enter_async_context(Talk(proxy.url, b""))
    assert (await talk.response())[0] == 503
    return talk


async def test_who_is_refused_may_send_its_request(start_proxy, monkeypatch):
    """A reset would keep many a client from its 503."""
    monkeypatch.setattr(connection_limits, "MAX_REFUSED_S", SECONDS)
    proxy = await start_proxy(server={"max_connections": 1})
    async with asyncio.timeout(SECONDS), AsyncExitStack() as stack:
        talk = await _refused(proxy, stack)
        for _ in range(20):
            await talk.send(b"x" * (1 << 16))
        assert await talk.is_over()


async def test_who_is_refused_and_sends_on_and_on_is_cut(start_proxy, monkeypatch):
    """It is read for a while only."""
    monkeypatch.setattr(connection_limits, "MAX_REFUSED_S", SOON)
    proxy = await start_proxy(server={"max_connections": 1})
    async with asyncio.timeout(SECONDS), AsyncExitStack() as stack:
        talk = await _refused(proxy, stack)
        with suppress(ConnectionError):
            while True:
                await talk.send(b"x")
                await asyncio.sleep(0)


@pytest.mark.parametrize("sent", [b"POST /v1/embeddings HTTP/1.1\r\nHo", b""])
async def test_who_has_begun_a_request_is_told_that_it_makes_way(sent, start_proxy, upstream):
    """A head that does not end keeps its place no longer than a silent connection."""
    proxy = await start_proxy(openai=upstream, server={"max_connections": 1})
    proxy.app[LIMITS].clock = itertools.count(step=2).__next__
    async with asyncio.timeout(SECONDS), Talk(proxy.url, _post("a")) as first:
        # Behind a reply it is known to have been read.
        await first.send(sent)
        assert (await first.response())[0] == 200
        async with Talk(proxy.url, _post("a")) as second:
            assert (await second.response())[0] == 200
        if sent:
            assert (await first.response())[0] == 503
        assert await first.is_over()


class Fake:
    """A connection."""

    is_closed = has_unread = False

    def evict(self) -> None:
        self.is_closed = True


class Clock:
    """Seconds that pass as the test says."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_few_refused_connections_are_read():
    """Each holds a file descriptor; a share of those that are left."""
    limits = ConnectionLimits(1, max_refused=2)
    first, second, third = (Mock() for _ in range(3))
    assert [limits.hold_refused(one) for one in (first, second, third)] == [True, True, False]
    limits.release_refused(second)
    assert limits.hold_refused(third)
    assert not len(limits)
    limits.close_refused()
    assert [one.close.called for one in (first, second, third)] == [True, False, True]
    few = ConnectionLimits.of(Server(), left=lambda: 7)
    assert not few.hold_refused(first)


def test_who_has_just_come_or_sent_something_makes_no_way():
    """Nor who has just been answered: a request may be under way."""
    clock = Clock()
    limits = ConnectionLimits(3, 3, clock=clock)
    made = [Fake() for _ in range(3)]
    first, _, third = made
    for one in made:
        assert limits.enter(one, "")
    assert not limits.enter(Fake(), "")
    clock.now = 1.5 * MIN_WAIT_S
    limits.idle(third)
    first.has_unread = True
    assert limits.enter(Fake(), "")
    assert not limits.enter(Fake(), "")
    assert [one.is_closed for one in made] == [False, True, False]
    # Only now it has sent nothing for so long.
    first.has_unread = False
    clock.now += MIN_WAIT_S
    assert not limits.enter(Fake(), "")
    clock.now += MIN_WAIT_S / 2
    for _ in range(3):
        assert limits.enter(Fake(), "")
    assert not limits.enter(Fake(), "")
    assert [one.is_closed for one in made] == [True, True, True]


def test_one_address_has_its_own_limit():
    """Connections of one address make way for its own, not those of others."""
    limits = ConnectionLimits(10, 2, clock=itertools.count(step=2).__next__)
    other, *own = [Fake() for _ in range(4)]
    assert limits.enter(other, "10.0.0.2")
    assert all(limits.enter(one, "10.0.0.1") for one in own)
    assert [one.is_closed for one in (other, *own)] == [False, True, False, False]
    for one in own[1:]:
        limits.busy(one)
    assert not limits.enter(Fake(), "10.0.0.1")
    assert limits.enter(Fake(), "10.0.0.3")
    limits.idle(own[2])
    assert limits.enter(Fake(), "10.0.0.1")
    assert (own[1].is_closed, own[2].is_closed) == (False, True)


def test_who_never_asked_makes_way_first():
    """Then the one whose last answer is the oldest; never one with a request in progress."""
    limits = ConnectionLimits(4, 4, clock=itertools.count(step=2).__next__)
    busy, first, second, new = made = [Fake() for _ in range(4)]
    for one in made:
        assert limits.enter(one, "")
    limits.busy(busy)
    for one in (first, second, first):
        limits.idle(one)
    closed = []
    for _ in range(3):
        newest = Fake()
        assert limits.enter(newest, "")
        limits.busy(newest)
        closed += [one for one in made if one.is_closed and one not in closed]
    assert closed == [new, second, first]
    assert not limits.enter(Fake(), "")
    assert len(limits) == 4
    for one in (busy, busy):
        limits.leave(one)
    assert len(limits) == 3


def test_the_limits_leave_descriptors_for_calls_upstream(caplog):
    """Half of what is left is for clients, and it is told where that is less than configured."""
    limits = ConnectionLimits.of(Server(), left=lambda: 60)
    assert (limits.max_connections, limits.max_per_address) == (30, 22)
    assert "server.max_connections (4096)" in caplog.text
    caplog.clear()
    limits = ConnectionLimits.of(Server(max_connections_per_address=9), left=lambda: 1 << 16)
    assert (limits.max_connections, limits.max_per_address) == (4096, 9)
    assert not caplog.text


@pytest.mark.parametrize(
    "key", ["max_connections", "max_connections_per_address", "head_timeout_s"]
)
def test_a_limit_is_above_zero(key):
    """Zero would serve nobody."""
    with pytest.raises(ValidationError, match=key):
        Settings.model_validate({"server": {key: 0}})


async def test_a_request_and_a_reset_at_once_leave_no_traceback(start_proxy, monkeypatch, caplog):
    """A connection that is lost before its request was taken up is forgotten."""
    made = []
    connection_made = Connection.connection_made

    def noted(one: Connection, transport: asyncio.Transport) -> None:
        made.append(one)
        connection_made(one, transport)

    monkeypatch.setattr(Connection, "connection_made", noted)
    proxy = await start_proxy()
    async with Talk(proxy.url, b""):
        await until(lambda: made)
        for _ in range(3):
            await asyncio.sleep(0)
        made[0].data_received(b"GET /livez HTTP/1.1\r\nHost: localhost\r\n\r\n")
        transport = made[0].transport
        made[0].connection_lost(ConnectionResetError())
        transport.abort()
    await start_proxy.stop()
    made.clear()
    assert "Traceback" not in caplog.text
