"""Requests that come again byte for byte: the same replies in the same order, only sooner."""

import asyncio
import itertools
import json
import logging
import socket
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
from aiohttp import web
from clock import until
from conftest import IS_FAST, Proxy, StartProxy
from embedding_proxy.proxy.http import connection as module
from embedding_proxy.proxy.http.app_runner import LIMITS, RESPONSES
from embedding_proxy.proxy.http.connection import Connection
from fault_server import FaultServer
from hypothesis import given, settings
from hypothesis import strategies as st
from talk import Talk

MODEL = "text-embedding-3-small"
pytestmark = pytest.mark.skipif(not IS_FAST, reason="the fast path is off")


def _body(given: object, **fields: object) -> bytes:
    return json.dumps({"model": MODEL, "input": given, "dimensions": 4, **fields}).encode()


def _post(body: bytes, *lines: bytes, path: bytes = b"/v1/embeddings", of: bytes = b"1.1") -> bytes:
    head = (b"POST %b HTTP/%b" % (path, of), b"Host: h", b"Content-Length: %d" % len(body), *lines)
    return b"\r\n".join(head) + b"\r\n\r\n" + body


def _chunked(body: bytes) -> bytes:
    head = b"POST /v1/embeddings HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\n"
    return head + b"%x\r\n%b\r\n0\r\n\r\n" % (len(body), body)


KNOWN = _post(_body("known"))
OTHER = _post(_body("other"), b"X-Other: 1")
LIVE = b"GET /livez HTTP/1.1\r\nHost: h\r\n\r\n"
HEAD = KNOWN[: KNOWN.index(b"{")]


def _arrivals(monkeypatch: pytest.MonkeyPatch) -> Callable[[], int]:
    """Return what tells how many bytes have been read from connections."""
    arrived = [0]

    def counted(receive: Callable[[Connection, bytes], None]) -> Callable[..., None]:
        def data_received(connection: Connection, data: bytes) -> None:
            arrived[0] += len(data)
            receive(connection, data)

        return data_received

    monkeypatch.setattr(Connection, "data_received", counted(Connection.data_received))
    return lambda: arrived[0]


async def _learn(proxy: Proxy, *requests: bytes) -> None:
    """Ask each twice: it is bought, then it is a hit, whose reply is kept."""
    for request in requests:
        async with Talk(proxy.url, request) as talk:
            assert (await talk.response())[0] == 200
            await talk.send(request)
            assert (await talk.response())[1]["x-cache"] == "hit"


# --- the same as without -----------------------------------------------------------------------


numbers = itertools.count()
MADE = {
    "known": lambda _: KNOWN,
    "other": lambda _: OTHER,
    "new": lambda n: _post(_body(f"new {n}")),
    "new, soon known": lambda n: _post(_body(f"soon {n // 100}")),
    "for another user": lambda n: _post(_body("known", user=f"{n}")),
    "in floats": lambda n: _post(_body("known", user=f"{n}", encoding_format="float")),
    "at another width": lambda n: _post(_body("known", user=f"{n}", dimensions=8)),
    "at no width": lambda _: _post(_body("known", dimensions=0)),
    "in another space": lambda n: _post(_body("known", instruction=f"{n // 100}")),
    "several": lambda n: _post(_body(["known", "other", f"{n % 2}"])),
    "twice": lambda n: _post(_body(["known", "known"], user=f"{n}")),
    "tokens": lambda n: _post(_body([1, 2, 3], user=f"{n}")),
    "no model": lambda n: _post(_body("known", model="", user=f"{n}")),
    "by its path": lambda n: _post(
        b'{"input":"known","dimensions":4,"user":"%d"}' % n,
        path=b"/v1/engines/%b/embeddings" % MODEL.encode(),
    ),
    "zeros before its length": lambda n: _post(_body("known", user=f"{n}")).replace(
        b"Length: ", b"Length: 00"
    ),
    "anew": lambda _: _post(_body("known"), b"Cache-Control: no-cache"),
    "no request": lambda _: _post(b"{}"),
    "another path": lambda _: _post(_body("known"), path=b"/v1/nothing"),
    "no body": lambda _: _post(b""),
    "get": lambda _: LIVE,
    "in a body": lambda _: _post(KNOWN + b"\r\n\r\n" + KNOWN),
    "in a string": lambda n: _post(_body(f"{n} {KNOWN.decode()}")),
    "chunked": lambda _: _chunked(_body("known")),
    "chunked request": lambda _: _chunked(KNOWN),
    "in chunks, soon known": lambda n: _chunked(_body(f"chunked {n // 100}")),
    "empty lines before": lambda _: b"\r\n\r\n" + KNOWN,
    "expected": lambda _: _post(_body("known"), b"Expect: 100-continue"),
    "upgrade declined": lambda _: _post(b"{}", b"Connection: upgrade", b"Upgrade: websocket"),
    "old, kept": lambda _: _post(_body("known"), b"Connection: keep-alive", of=b"1.0"),
}
"""Requests by kind, each with one reply; they are given a number that no other request has."""
LAST = {
    "length twice": _post(_body("known"), b"Content-Length: 5"),
    "length and chunks": HEAD[:-2] + b"Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    "noise": b"\x16\x03\x01\r\n\r\n",
    "no host": b"POST /v1/embeddings HTTP/1.1\r\n\r\n",
    "half a head": LIVE[:-2] + b"X: ",
    "closing": _post(_body("known"), b"Connection: close"),
    "old": _post(_body("known"), of=b"1.0"),
}
"""What is the last on its connection, whatever follows: known requests do."""


@dataclass
class Sent:
    """A piece of a stream, and how many replies are awaited before it is sent."""

    piece: bytes
    after: int


@st.composite
def streams(draw: Any) -> list[tuple[str, tuple[float, ...], int]]:
    """Give kinds of requests, where each is cut, and how many replies its client waits for."""
    often = [*(5 * ["known"]), *(3 * ["for another user"]), "new"]
    kinds = st.sampled_from([*often, *MADE])
    cut = st.lists(st.floats(0, 1), max_size=3).map(tuple)
    # Whole; head and body apart; along with the next one; anywhere; byte by byte.
    cuts = st.sampled_from([(), (), (), (-1.0,), (-1.0,), (2.0,), (3.0,)]) | cut
    count = draw(st.integers(1, 9))
    return [
        (draw(kinds), draw(cuts), max(0, place - draw(st.sampled_from([0, 0, 1, 2, 9]))))
        for place in range(count)
    ]


def _pieces(stream: list[tuple[str, tuple[float, ...], int]], number: int) -> list[Sent]:
    """Return what to send, the same for the same number."""
    sent: list[Sent] = []
    joined, waits = b"", 0
    for place, (kind, cuts, after) in enumerate(stream):
        # What is sent along with one before it waits for no more than that did.
        waits = waits if joined else after
        made, joined = joined + MADE[kind](100 * number + place), b""
        if cuts == (2.0,) and place < len(stream) - 1:
            joined = made
            continue
        if cuts == (3.0,):
            places = list(range(1, len(made)))
        else:
            head = made.index(b"\r\n\r\n", 4) + 4
            places = sorted({head if at < 0 else int(at * len(made)) for at in cuts})
        parts = [made[a:b] for a, b in itertools.pairwise([0, *places, len(made)])]
        sent += [Sent(part, waits) for part in parts if part]
    return sent


class Heard:
    """Replies as they come."""

    def __init__(self) -> None:
        self.replies: list[tuple[int, dict[str, str], bytes]] = []
        self.over = False

    async def hear(self, reader: asyncio.StreamReader) -> None:
        try:
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
                status = int(head[0].split()[1])
                headers = dict(line.lower().split(": ", 1) for line in head[1:] if line)
                body = await reader.readexactly(int(headers.get("content-length", 0)))
                headers.pop("date", None)
                if status != 100:  # It may be left out when the body is there already.
                    assert headers.pop("x-request-id", "req_").startswith("req_")
                    self.replies.append((status, headers, body))
        except asyncio.IncompleteReadError as error:
            if error.partial:
                raise
        except ConnectionError:
            pass
        finally:
            self.over = True

    async def has(self, replies: int) -> None:
        """Wait for so many replies, or the end."""
        await until(lambda: self.over or len(self.replies) >= replies)


class Both:
    """Two proxies, with and without what is tested, that are told the same."""

    def __init__(self, tmp_path, monkeypatch) -> None:
        self._starts = [StartProxy(tmp_path / name, monkeypatch) for name in ("with", "without")]
        self._patch = monkeypatch

    async def start(self) -> None:
        self.upstream = await FaultServer().__aenter__()
        self.proxies = []
        for start, fast_path in zip(self._starts, (True, False), strict=True):
            server = {"fast_path": fast_path}
            self.proxies.append(await start(openai=self.upstream, server=server))
        self._arrived = _arrivals(self._patch)

    async def stop(self) -> None:
        for start in self._starts:
            await start.stop()
        await self.upstream.stop()

    async def hear(self, proxy: Proxy, sent: list[Sent], last: bytes | None, count: int) -> Any:
        """Send piece by piece, each read before the next; return the replies.

        Without a `last` request after which the connection is closed, `count` replies are awaited.
        """
        heard = Heard()
        await _learn(proxy, KNOWN, OTHER)
        async with Talk(proxy.url, b"") as talk:
            hearing = asyncio.create_task(heard.hear(talk.reader))
            total = self._arrived()
            end = [LIVE] if last is None else [last, KNOWN, KNOWN]
            for one in [*sent, *(Sent(piece, sent[-1].after) for piece in end)]:
                await heard.has(one.after)
                if not heard.over:
                    talk.writer.write(one.piece)
                    total += len(one.piece)
                await until(lambda: heard.over or self._arrived() >= total)  # noqa: B023
            if last is None:
                await heard.has(count)
                talk.writer.write_eof()
            await hearing
        return heard.replies


def test_a_stream_of_requests_gets_the_same_replies_as_without(
    tmp_path, monkeypatch, repeated, at_once
):
    """Mixed, malformed, pipelined, cut anywhere: none is answered twice, out of order or not."""
    both = Both(tmp_path, monkeypatch)
    with asyncio.Runner() as runner:
        runner.run(both.start())

        @settings(max_examples=30, deadline=None)
        @given(streams(), st.sampled_from([None, None, *LAST.values()]), st.sampled_from([0, 60]))
        def same(stream, last, held):
            monkeypatch.setattr(module, "HOLD_S", held)
            number = next(numbers)
            sent = _pieces(stream, number)
            count = len(stream) + 1
            told = [runner.run(both.hear(proxy, sent, last, count)) for proxy in both.proxies]
            assert told[0] == told[1]
            assert len(told[1]) >= count - bool(last)

        same()
        runner.run(both.stop())
    assert len(repeated) > 40
    assert at_once


# --- in order, and under its own name ------------------------------------------------------------


@pytest.fixture
def connections(monkeypatch) -> list[Connection]:
    """Give a list of the connections that are made; the last one comes last."""
    made: list[Connection] = []
    connection_made = Connection.connection_made

    def noted(connection: Connection, transport: asyncio.Transport) -> None:
        made.append(connection)
        connection_made(connection, transport)

    monkeypatch.setattr(Connection, "connection_made", noted)
    return made


async def test_what_came_first_is_answered_first(upstream, start_proxy, connections):
    """One that is known waits for those before it, and none's reply is kept as another's."""
    proxy = await start_proxy(openai=upstream)
    await _learn(proxy, KNOWN)
    first, second, third = (_post(_body(text)) for text in ("first", "second", "third"))
    gates = {text: asyncio.Event() for text in ("first", "second")}

    async def hold(request: web.Request, payload: dict[str, Any]) -> web.StreamResponse:
        (text,) = payload["input"]
        await gates[text].wait()
        return await upstream.altered(lambda _: None)(request, payload)

    upstream.holding = dict.fromkeys(gates, hold)
    async with Talk(proxy.url, first) as talk:
        await until(lambda: "first" in upstream.inputs)
        await talk.send(second)
        await until(lambda: connections[-1]._received)
        gates["first"].set()
        replies = [await talk.response()]
        await until(lambda: "second" in upstream.inputs)
        await talk.send(KNOWN)
        await talk.send(third)
        # Whether they wait or were answered: they are taken note of.
        await until(lambda: connections[-1]._received.endswith(third))
        gates["second"].set()
        replies += [await talk.response() for _ in range(3)]
    in_order = [reply[2]["data"] for reply in replies]
    for _ in range(3):
        alone = []
        for request in (first, second, KNOWN, third):
            async with Talk(proxy.url, request) as talk:
                alone.append((await talk.response())[2]["data"])
        assert alone == in_order


UNKNOWN = {
    "an old version": [_post(_body("known"), b"Connection: keep-alive", of=b"1.0")],
    "to be closed": [_post(_body("known"), b"Connection: close")],
    "in chunks": [_chunked(_body("known"))],
}


@pytest.mark.parametrize("pieces", UNKNOWN.values(), ids=UNKNOWN)
async def test_what_does_not_come_plain_and_whole_is_not_kept(
    pieces, upstream, start_proxy, repeated, monkeypatch
):
    """It is answered anew each time, in the version it was asked in."""
    proxy = await start_proxy(openai=upstream)
    arrived = _arrivals(monkeypatch)
    for _ in range(4):
        before = arrived()
        async with Talk(proxy.url, b"") as talk:
            for place, piece in enumerate(pieces, 1):
                await talk.send(piece)
                sent = before + sum(map(len, pieces[:place]))
                await until(lambda: arrived() == sent)  # noqa: B023
            async with asyncio.timeout(60):
                version = (await talk.reader.readline()).split()[0]
            assert version == (b"HTTP/1.0" if b"HTTP/1.0" in pieces[0] else b"HTTP/1.1")
    assert not repeated
    assert not len(proxy.app[RESPONSES].lru)


@pytest.mark.parametrize("other", ["chunked", "in pieces", "apart"])
async def test_what_is_not_known_by_itself_is_not_kept_as_what_came_before(
    other, upstream, start_proxy, monkeypatch
):
    """Behind a request that is known comes another one: each stays what it is."""
    monkeypatch.setattr(module, "HOLD_S", 0)
    proxy = await start_proxy(openai=upstream)
    await _learn(proxy, KNOWN)
    arrived = _arrivals(monkeypatch)
    body = _body("another")
    plain = _post(body)
    pieces = {
        "chunked": [_chunked(body)],
        "in pieces": [plain[:-9], plain[-9:]],
        "apart": [plain[: -len(body)], body],
    }[other]
    async with Talk(proxy.url, KNOWN) as talk:
        known = (await talk.response())[2]["data"]
        for _ in range(3):
            for piece in pieces:
                total = arrived() + len(piece)
                await talk.send(piece)
                await until(lambda: arrived() == total)  # noqa: B023
            assert (await talk.response())[2]["data"] != known
            await talk.send(KNOWN)
            assert (await talk.response())[2]["data"] == known


async def test_a_connection_whose_head_was_held_still_makes_way(
    upstream, start_proxy, connections, monkeypatch
):
    """It is busy while its head is held, and idle again when its request was answered."""
    monkeypatch.setattr(module, "HOLD_S", 60)
    proxy = await start_proxy(openai=upstream)
    await _learn(proxy, KNOWN)
    limits = proxy.app[LIMITS]
    await until(lambda: not len(limits))
    async with Talk(proxy.url, HEAD) as talk:
        await until(lambda: len(limits) and connections[-1]._hold._handle)
        assert limits._waiting.first(float("inf")) is None
        await talk.send(KNOWN[len(HEAD) :])
        assert (await talk.response())[0] == 200
        assert limits._waiting.first(float("inf")) is connections[-1]


async def test_a_client_that_reads_nothing_is_not_written_to_for_ever(
    upstream, start_proxy, connections, repeated, monkeypatch
):
    """Replies wait for a client that takes none: no more than a few are in memory for it."""
    proxy = await start_proxy(openai=upstream)
    large = _post(_body("large", dimensions=1536))
    await _learn(proxy, large)
    # Before the connection is made: a loop may look up its methods once.
    arrived = _arrivals(monkeypatch)
    with socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 16)
        client.connect((proxy.url[7:].split(":")[0], int(proxy.url[7:-3].split(":")[1])))
        client.settimeout(0)
        before = len(connections)
        await until(lambda: len(connections) > before)
        connection = connections[-1]
        ours = connection.transport.get_extra_info("socket")
        ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 16)
        sent = most = 0
        while sent < 100 and len(connection._received) < 9 * len(large):
            await asyncio.get_running_loop().sock_sendall(client, large)
            sent += 1
            await until(lambda: arrived() == sent * len(large))  # noqa: B023
            most = max(most, connection.transport.get_write_buffer_size())
        assert connection._is_writing_paused
        assert most < 1 << 17
        assert 0 < len(repeated) < sent
        reader, writer = await asyncio.open_connection(sock=client)
        for _ in range(sent):
            async with asyncio.timeout(60):
                head = await reader.readuntil(b"\r\n\r\n")
                assert head.startswith(b"HTTP/1.1 200 ")
                length = int(head.lower().partition(b"content-length: ")[2].split()[0])
                assert len(json.loads(await reader.readexactly(length))["data"]) == 1
        writer.write(LIVE)
        assert b" 200 " in await reader.readline()
        writer.close()


# --- ends ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("before", [b"", LIVE], ids=["at once", "after another"])
async def test_a_known_request_and_an_end_is_answered(before, upstream, start_proxy, repeated):
    """A client may close its side after its last request; it still gets the reply."""
    proxy = await start_proxy(openai=upstream)
    await _learn(proxy, KNOWN)
    async with Talk(proxy.url, before) as talk:
        if before:
            assert (await talk.response())[0] == 200
        await asyncio.sleep(0)
        talk.writer.write(KNOWN)
        talk.writer.write_eof()
        assert (await talk.response())[1]["x-cache"] == "hit"
        assert await talk.is_over()
    assert len(repeated) == 1


async def test_a_refused_body_hides_no_request(start_proxy, upstream, repeated):
    """What follows a head that was answered at once is its body, whatever it looks like."""
    keys = [{"key": "right"}]
    proxy = await start_proxy(openai=upstream, server={"keys": keys})
    known = _post(_body("known"), b"Authorization: Bearer right")
    await _learn(proxy, known)
    wrong = _post(known + known, b"Authorization: Bearer wrong")
    head, body = wrong[: wrong.index(known)], wrong[wrong.index(known) :]
    for lead in (b"", b"\r\n\r\n", b"\r\n"):
        async with Talk(proxy.url, lead + head + b"P") as talk:
            assert (await talk.response())[0] == 401
            for piece in (body[1 : len(known)], body[len(known) :], LIVE):
                await talk.send(piece)
            assert "x-cache" not in (await talk.response())[1]
    assert not repeated


async def test_an_idle_connection_is_closed_and_a_busy_one_is_not(
    upstream, start_proxy, connections, repeated, monkeypatch
):
    """What was asked last counts, also when it was answered without ado, or is a head so far."""
    proxy = await start_proxy(openai=upstream)
    await _learn(proxy, KNOWN)
    monkeypatch.setattr(module, "HOLD_S", 60)
    loop = asyncio.get_running_loop()
    connections.clear()
    async with Talk(proxy.url, b"") as talk:
        await until(lambda: connections)
        connection = connections[-1]
        for sent in (KNOWN, LIVE, HEAD):
            connection._idle_since -= 2 * module.KEEPALIVE_S
            await talk.send(sent)
            if sent is HEAD:
                await until(lambda: connection._hold._handle)
            else:
                assert (await talk.response())[0] == 200
                await until(lambda: connection._idle_since > loop.time() - module.KEEPALIVE_S)
            connection._check_idle()
            assert not connection.transport.is_closing()
        await talk.send(KNOWN[len(HEAD) :])
        assert (await talk.response())[0] == 200
        assert len(repeated) == 2
        connection._idle_since -= 2 * module.KEEPALIVE_S
        connection._check_idle()
        assert await talk.is_over()


# --- a head that is held -------------------------------------------------------------------------


async def test_a_head_alone_waits_for_its_body(upstream, start_proxy, connections, repeated):
    """Head and body that come apart are one request, known or not."""
    proxy = await start_proxy(openai=upstream)
    for outcome in ("miss", "hit", "hit"):
        async with Talk(proxy.url, HEAD) as talk:
            await until(lambda: connections and connections[-1]._hold._handle)
            await talk.send(KNOWN[len(HEAD) :])
            assert (await talk.response())[1]["x-cache"] == outcome
    assert len(repeated) == 1


async def test_a_body_that_never_comes_is_a_408(upstream, start_proxy):
    """A head that was held is read in the end, and its body waited for as ever."""
    proxy = await start_proxy(openai=upstream, server={"body_timeout_s": 0.05})
    await _learn(proxy, KNOWN)
    async with Talk(proxy.url, HEAD) as talk:
        assert (await talk.response())[0] == 408


@pytest.mark.parametrize("leave", ["end", "reset", "stop"])
async def test_a_held_head_is_let_go_with_its_connection(
    leave, upstream, start_proxy, *, connections, monkeypatch, caplog
):
    """A client that ends hears why; one that vanishes, or a stop, leaves nothing behind."""
    monkeypatch.setattr(module, "HOLD_S", 60)
    proxy = await start_proxy(openai=upstream)
    async with Talk(proxy.url, HEAD) as talk:
        await until(lambda: connections and connections[-1]._hold._handle)
        match leave:
            case "end":
                talk.writer.write_eof()
                assert (await talk.response())[0] == 400
            case "reset":
                talk.reset()
            case "stop":
                await start_proxy.stop()
                assert await talk.is_over()
        await until(lambda: connections[-1].transport is None)
    assert connections[-1]._hold._handle is None
    assert not upstream.calls
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


AT_ONCE = {
    "no body": (_post(b""), 400),
    "no length": (b"POST /v1/embeddings HTTP/1.1\r\nHost: h\r\n\r\n", 400),
    "a body that ends like a head": (_post(_body("known") + b"\r\n\r\n"), 200),
    "get": (LIVE, 200),
    "another path": (_post(b"{}", path=b"/v1/nothing"), 404),
    "expecting": (HEAD[:-2] + b"Expect: 100-continue\r\n\r\n", 100),
    "in chunks": (_chunked(b"")[:-5].replace(b"/v1/embeddings", b"/v1/nothing"), 404),
}


@pytest.mark.parametrize(("sent", "code"), AT_ONCE.values(), ids=AT_ONCE)
async def test_nothing_but_a_head_with_a_body_to_come_is_held(
    sent, code, upstream, start_proxy, monkeypatch
):
    """Whatever else comes is read at once, so that it takes no longer than before."""
    monkeypatch.setattr(module, "HOLD_S", 60)
    proxy = await start_proxy(openai=upstream)
    async with Talk(proxy.url, b"") as talk:
        await talk.send(sent)
        async with asyncio.timeout(60):
            assert int((await talk.reader.readline()).split()[1]) == code


async def test_the_official_client_is_answered_so(upstream, start_proxy, repeated):
    """The client that most people use says the same in the same bytes, on one connection."""
    proxy = await start_proxy(openai=upstream)
    vectors = [
        (await proxy.client.embeddings.create(model=MODEL, input=["a", "b"])).data[1].embedding
        for _ in range(6)
    ]
    assert len(repeated) == 4
    assert all(vector == vectors[0] for vector in vectors)
    assert upstream.inputs == ["a", "b"]


async def test_without_the_fast_path_nothing_is_repeated(upstream, start_proxy, repeated, at_once):
    """`server.fast_path: false` has every request parsed; the replies are the same."""
    bodies = []
    for fast_path in (True, False):
        proxy = await start_proxy(openai=upstream, server={"fast_path": fast_path})
        async with Talk(proxy.url, b"") as talk:
            for _ in range(3):
                await talk.send(_post(_body("known")))
                bodies.append((await talk.response())[2])
        if fast_path:
            assert repeated
            repeated.clear()
            at_once.clear()
    assert not repeated
    assert not at_once
    assert all(body == bodies[0] for body in bodies)
