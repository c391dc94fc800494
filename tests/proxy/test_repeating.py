"""Requests that come again byte for byte: the same replies in the same order, only sooner."""

import asyncio
import itertools
import json
import socket
from dataclasses import dataclass
from typing import Any

import pytest
from aiohttp import web
from conftest import Proxy, StartProxy
from fault_server import FaultServer
from hypothesis import given, settings
from hypothesis import strategies as st
from talk import Talk

from proxy.http import repeating
from proxy.http.connection import Connection, Runner, Server

MODEL = "text-embedding-3-small"


def _body(text: str, **fields: object) -> bytes:
    return json.dumps({"model": MODEL, "input": text, "dimensions": 4, **fields}).encode()


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


async def _learn(proxy: Proxy, *requests: bytes) -> None:
    """Ask each twice: it is bought, then it is a hit, whose reply is kept."""
    for request in requests:
        async with Talk(proxy.url, request) as talk:
            assert (await talk.response())[0] == 200
            await talk.send(request)
            assert (await talk.response())[1]["x-cache"] == "hit"


# --- the same as without -----------------------------------------------------------------------


class PlainConnection(Connection):
    """One on which nothing is ever held, looked up or kept: aiohttp's own way."""

    def data_received(self, data: bytes) -> None:
        web.RequestHandler.data_received(self, data)


class PlainServer(Server):
    def __call__(self) -> Connection:
        return PlainConnection(self._replies, self, loop=self._loop, **self._kwargs)


class PlainRunner(Runner):
    async def _make_server(self) -> web.Server:
        server = await super()._make_server()
        server.__class__ = PlainServer
        return server


numbers = itertools.count()
MADE = {
    "known": lambda _: KNOWN,
    "other": lambda _: OTHER,
    "new": lambda n: _post(_body(f"new {n}")),
    "new, soon known": lambda n: _post(_body(f"soon {n // 100}")),
    "anew": lambda _: _post(_body("known"), b"Cache-Control: no-cache"),
    "no request": lambda _: _post(b"{}"),
    "another path": lambda _: _post(_body("known"), path=b"/v1/nothing"),
    "no body": lambda _: _post(b""),
    "get": lambda _: LIVE,
    "in a body": lambda _: _post(KNOWN + b"\r\n\r\n" + KNOWN),
    "in a string": lambda n: _post(_body(f"{n} {KNOWN.decode()}")),
    "chunked": lambda _: _chunked(_body("known")),
    "chunked request": lambda _: _chunked(KNOWN),
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
    kinds = st.sampled_from(["known", "known", "known", "new", *MADE])
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
    joined = b""
    for place, (kind, cuts, after) in enumerate(stream):
        if joined:
            after = sent_after
        made, sent_after = joined + MADE[kind](100 * number + place), after
        joined = b""
        if cuts == (2.0,) and place < len(stream) - 1:
            joined = made
            continue
        if cuts == (3.0,):
            places = list(range(1, len(made)))
        else:
            head = made.index(b"\r\n\r\n", 4) + 4
            places = sorted({head if at < 0 else int(at * len(made)) for at in cuts})
        parts = [made[a:b] for a, b in itertools.pairwise([0, *places, len(made)])]
        sent += [Sent(part, after) for part in parts if part]
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
        except (asyncio.IncompleteReadError, ConnectionError) as error:
            assert not getattr(error, "partial", b"")
            self.over = True


class Both:
    """Two proxies, with and without what is tested, that are told the same."""

    def __init__(self, tmp_path, monkeypatch) -> None:
        self._starts = [StartProxy(tmp_path / name, monkeypatch) for name in ("with", "without")]
        self._patch = monkeypatch
        self.arrived = 0

    async def start(self) -> None:
        self.upstream = await FaultServer().__aenter__()
        self.proxies = []
        for start, runner in zip(self._starts, (Runner, PlainRunner), strict=True):
            self._patch.setitem(StartProxy.__call__.__globals__, "Runner", runner)
            self.proxies.append(await start(openai=self.upstream))
        for kind in (Connection, PlainConnection):
            self._patch.setattr(kind, "data_received", self._counted(kind.data_received))

    async def stop(self) -> None:
        for start in self._starts:
            await start.stop()
        await self.upstream.stop()

    def _counted(self, receive: Any) -> Any:
        def data_received(connection: Connection, data: bytes) -> None:
            self.arrived += len(data)
            receive(connection, data)

        return data_received

    async def hear(self, proxy: Proxy, sent: list[Sent], last: bytes | None, count: int) -> Any:
        """Send piece by piece, each read before the next; return the replies.

        Without a `last` request after which the connection is closed, `count` replies are awaited.
        """
        heard = Heard()
        await _learn(proxy, KNOWN, OTHER)
        async with asyncio.timeout(3), Talk(proxy.url, b"") as talk:
            hearing = asyncio.create_task(heard.hear(talk.reader))
            self.arrived = total = 0
            end = [LIVE] if last is None else [last, KNOWN, KNOWN]
            for one in [*sent, *(Sent(piece, sent[-1].after) for piece in end)]:
                while len(heard.replies) < one.after and not heard.over:
                    await asyncio.sleep(0)
                if not heard.over:
                    talk.writer.write(one.piece)
                    total += len(one.piece)
                while self.arrived < total and not heard.over:
                    await asyncio.sleep(0)
            if last is None:
                while len(heard.replies) < count and not heard.over:
                    await asyncio.sleep(0)
                talk.writer.write_eof()
            await hearing
        return heard.replies


def test_a_stream_of_requests_gets_the_same_replies_as_without(tmp_path, monkeypatch, repeated):
    """Mixed, malformed, pipelined, cut anywhere: none is answered twice, out of order or not."""
    both = Both(tmp_path, monkeypatch)
    with asyncio.Runner() as runner:
        runner.run(both.start())

        @settings(max_examples=30, deadline=None)
        @given(streams(), st.none() | st.sampled_from(list(LAST.values())), st.sampled_from([0, 60]))
        def same(stream, last, held):
            monkeypatch.setattr(repeating, "HELD", held)
            number = next(numbers)
            sent = _pieces(stream, number)
            count = len(stream) + 1
            told = [runner.run(both.hear(proxy, sent, last, count)) for proxy in both.proxies]
            assert told[0] == told[1]
            assert len(told[1]) == count

        same()
        runner.run(both.stop())
    assert len(repeated) > 40
