"""Where a request ends: told rightly, or not at all, however the bytes are cut."""

import asyncio
from itertools import accumulate, pairwise
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.http.boundary import Boundary
from proxy.http.heads import Heads
from proxy.http.repeating import Repeating
from proxy.http.replies import Replies

INNER = b"POST /v1/embeddings HTTP/1.1\r\nHost: h\r\nContent-Length: 2\r\n\r\n{}"
"""What looks like a request, and is part of a body."""
LINES = (
    b"POST /v1/embeddings HTTP/1.1",
    b"GET /v1/models HTTP/1.1",
    b"PUT / HTTP/1.0",
    b"OPTIONS * HTTP/1.1",
)
BODIES = (b"", b"\r\n\r\n", INNER, b"\r\n\r\n" + 3 * INNER + b"\r\n\r\n")


@st.composite
def requests(draw) -> bytes:
    """Give a well-formed request, with what may stand before it."""
    head = [draw(st.sampled_from(LINES)), b"Host: h"]
    body = draw(st.sampled_from(BODIES))
    match draw(st.sampled_from(["length", "length", "zeros", "none", "chunks", "upgrade"])):
        case "length":
            name = draw(st.sampled_from([b"Content-Length", b"content-length"]))
            head.append(name + b": %d" % len(body) + draw(st.sampled_from([b"", b" ", b"\t"])))
        case "zeros":
            head.append(b"Content-Length: " + b"0" * 9 + b"%d" % len(body))
        case "none":
            body = b""
        case "chunks":
            head[0] = head[0].replace(b"1.0", b"1.1")
            head.append(b"Transfer-Encoding: chunked")
            chunk = b"%x\r\n%b\r\n" % (len(body), body) if body else b""
            body = chunk + b"0\r\n\r\n"
        case "upgrade":
            head += [b"Connection: upgrade", b"Upgrade: websocket"]
            body = b""
    empty = draw(st.sampled_from([b"", b"", b"\r\n", b"\r\n\r\n"]))
    return empty + b"\r\n".join(head) + b"\r\n\r\n" + body


def _reached(pieces: list[bytes]) -> list[int]:
    """Return after which bytes a connection that reads these pieces takes a request to begin."""
    with asyncio.Runner() as runner:
        manager = SimpleNamespace(request_handler=len, request_factory=len)
        connection = Repeating(
            Replies(0), Heads(Replies(0), lambda *_: None), manager, loop=runner.get_loop()
        )
        told = []
        for piece, read in zip(pieces, accumulate(map(len, pieces)), strict=True):
            connection.data_received(piece)
            if connection._boundary.reached:
                told.append(read)
    return told


def test_empty_lines_before_a_head_are_not_its_end():
    """What stands before a request is passed over, so no part of its body is taken for the next."""
    body = 3 * INNER
    head = b"\r\n\r\nPOST / HTTP/1.1\r\nHost: h\r\nContent-Length: %d\r\n\r\n" % len(body)
    assert _reached([head, *(bytes([one]) for one in body)]) == [len(head + body)]


@given(st.lists(requests(), min_size=1, max_size=6), st.data())
def test_where_it_is_reached_a_request_begins(made, data):
    """Whatever is sent and however it is cut, no part of a request is taken for the next one."""
    stream = b"".join(made)
    ends = list(accumulate(map(len, made)))
    begins = [0, *ends[:-1]]
    heads = [stream.index(b"\r\n\r\n", begin + 4) + 4 for begin in begins]
    place = st.sampled_from(ends + heads) | st.integers(0, len(stream))
    cuts = data.draw(st.lists(place, max_size=12))
    # From some byte on they come one by one, so that each is asked about.
    alone = data.draw(st.sampled_from(heads) | st.just(len(stream)))
    places = sorted({0, *cuts, *range(alone, min(alone + 300, len(stream))), len(stream)})
    assert set(_reached([stream[a:b] for a, b in pairwise(places)])) <= set(ends)


@given(st.lists(st.tuples(st.sampled_from(BODIES), st.booleans()), min_size=1, max_size=9))
def test_plain_requests_one_at_a_time_are_told_apart(made):
    """Each end is told where lengths are given, though head and body come apart; nothing else."""
    pieces, ends, sent = [], [], 0
    for body, apart in made:
        head = b"POST / HTTP/1.1\r\nHost: h\r\nContent-Length: %d\r\n\r\n" % len(body)
        pieces += [head, body] if apart and body else [head + body]
        sent += len(head + body)
        ends.append(sent)
    assert _reached(pieces) == ends


@pytest.mark.parametrize(
    "after",
    [
        b"\x16\x03\x01",
        b"POST / HT",
        b"GET / HTTP/1.1\r\nHost: h\r\n\r\nGET / HTTP/1.1\r\nHost: h\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: h\r\n\r\nGE",
        b"\r\n",
        b"CONNECT h:1 HTTP/1.1\r\nHost: h\r\n\r\n",
    ],
    ids=["no HTTP", "half a head", "two at once", "one and a half", "nothing", "a tunnel"],
)
def test_after_what_is_unusual_it_is_never_reached_again(after):
    """What cannot be counted stays uncounted, though plain requests follow."""
    plain = b"GET / HTTP/1.1\r\nHost: h\r\n\r\n"
    assert _reached([plain, after, plain, plain]) == [len(plain)]


@pytest.mark.parametrize(
    "length", ["-1", "+1", "1 ", "1_0", "٣", "", "0x1", "9" * 21, "0" * 5000 + "1"]
)
def test_a_length_that_is_no_plain_number_tells_nothing(length):
    """What only Python, or no one, would read as a length leaves the end unknown."""
    boundary = Boundary()
    boundary.begin(b"POST / HTTP/1.1\r\n\r\n", {"Content-Length": length})
    assert not boundary.reached
    boundary.go_on(b"x")
    assert not boundary.reached
