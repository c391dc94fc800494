"""Segments are cut where requests end: what is malformed costs no request ahead of it."""

import asyncio
from itertools import pairwise
from types import SimpleNamespace

import pytest
from aiohttp import web
from aiohttp.http import RawRequestMessage
from hypothesis import given
from hypothesis import strategies as st

from proxy.http.framing import Framing

BODY = b'\r\n\r\nGET / HTTP/1.1\r\n\r\n{"input":"a"}'
"""A body with the end of a head in it."""
HEAD = b"POST /v1/embeddings HTTP/1.1\r\nHost: h\r\n"
GOOD = {
    "counted": HEAD + b"Content-Length: %d\r\n\r\n" % len(BODY) + BODY,
    "chunked": HEAD
    + b"Transfer-Encoding: chunked\r\n\r\n%x\r\n" % len(BODY)
    + BODY
    + b"\r\n0\r\n\r\n",
    "trailer": HEAD + b"Transfer-Encoding: chunked\r\n\r\n1\r\na\r\n0\r\nX: y\r\n\r\n",
    "no body": b"GET /livez HTTP/1.1\r\nHost: h\r\n\r\n",
    "empty lines": b"\r\n\r\nGET /livez HTTP/1.1\r\nHost: h\r\n\r\n",
    "upgrade": HEAD + b"Connection: upgrade\r\nUpgrade: h2c\r\nContent-Length: 2\r\n\r\n{}",
}
BAD = {
    "method": b"\x00\r\n\r\n",
    "framings": HEAD + b"Content-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n",
    "length": HEAD + b"Content-Length: x\r\n\r\n",
    "host": b"GET / HTTP/1.1\r\n\r\n",
}


def _read(pieces: list[bytes]) -> list[object]:
    """Return the messages that a connection finds in pieces."""
    with asyncio.Runner() as runner:
        manager = SimpleNamespace(request_handler=len, request_factory=len)
        connection = Framing(manager, loop=runner.get_loop())
        for piece in pieces:
            connection.data_received(piece)
        return [message for message, _ in connection._messages]


def _cut(sent: bytes, cuts: list[int]) -> list[bytes]:
    edges = [0, *sorted(cuts), len(sent)]
    return [sent[start:end] for start, end in pairwise(edges) if start < end]


@given(
    st.lists(st.sampled_from(sorted(GOOD)), max_size=3),
    st.sampled_from(sorted(BAD)),
    st.lists(st.integers(0, 600), max_size=4),
)
def test_all_requests_ahead_of_a_malformed_one_are_found(names, bad, cuts):
    """However the bytes are cut, each good request is found, and then the error."""
    sent = b"".join(GOOD[name] for name in names) + BAD[bad]
    found = _read(_cut(sent, cuts))
    assert [isinstance(one, RawRequestMessage) for one in found] == [True] * len(names) + [False]


@pytest.mark.parametrize("name", GOOD)
def test_the_places_of_a_cut_make_no_difference(name):
    """A request that is cut in two anywhere is found, and the one behind it, and the error."""
    sent = GOOD[name] + GOOD["counted"] + BAD["method"]
    for place in range(1, len(sent)):
        found = _read([sent[:place], sent[place:]])
        assert [isinstance(one, RawRequestMessage) for one in found] == [True, True, False], place


def test_a_body_full_of_empty_lines_is_not_handed_over_line_by_line(monkeypatch):
    """What costs most to cut goes to the parser as a whole, and is read all the same."""
    parts = []
    feed = web.RequestHandler.data_received
    monkeypatch.setattr(
        web.RequestHandler,
        "data_received",
        lambda connection, data: (parts.append(data), feed(connection, data)),
    )
    lines = b"\r\n" * 4096
    chunk = b"%x\r\n" % len(lines) + lines + b"\r\n0\r\n\r\n"
    head = HEAD + b"Transfer-Encoding: chunked\r\n\r\n"
    for sent in (head + chunk, lines + head + chunk):
        parts.clear()
        assert isinstance(_read([sent])[0], RawRequestMessage)
        assert b"".join(parts) == sent
        assert len(parts) < 20


def test_a_body_that_was_handed_over_is_not_waited_for():
    """Behind a body full of empty lines a request came whole: what follows is cut as ever."""
    chunks = b"2\r\n\r\n\r\n" * 20
    full = HEAD + b"Transfer-Encoding: chunked\r\n\r\n" + chunks + b"0\r\n\r\n"
    text = b"x" * 1000
    counted = HEAD + b"Content-Length: %d\r\n\r\n" % len(text) + text
    found = _read([full + counted, GOOD["no body"] + BAD["length"]])
    assert [isinstance(one, RawRequestMessage) for one in found] == [True, True, True, False]


def test_nothing_is_read_behind_what_is_no_http():
    """One error is told, however much follows it."""
    assert len(_read([BAD["method"] * 1000, GOOD["no body"], BAD["host"]])) == 1
