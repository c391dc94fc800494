"""Where requests begin and end: told rightly, however the bytes are cut."""

from itertools import pairwise

import pytest
from embedding_proxy.proxy.http.framing import (
    BodyFramer,
    MalformedChunks,
    is_expecting,
    is_unusual,
    plain_request,
    refusal,
)
from hypothesis import given
from hypothesis import strategies as st

BODY = b'\r\n\r\nGET / HTTP/1.1\r\n\r\n{"input":"a"}'
"""A body with the end of a head in it."""
HEAD = b"POST /v1/embeddings HTTP/1.1\r\nHost: h\r\n"


def _cut(sent: bytes, cuts: list[int]) -> list[bytes]:
    edges = [0, *sorted(min(cut, len(sent)) for cut in cuts), len(sent)]
    return [sent[start:end] for start, end in pairwise(edges) if start < end]


def _read(framer: BodyFramer, pieces: list[bytes]) -> tuple[bytes, bytes]:
    """Return the content of a body that comes in pieces, and what comes behind it."""
    body = rest = b""
    for piece in pieces:
        if framer.is_complete:
            rest += piece
            continue
        part, rest = framer.feed(piece)
        body += part
    return body, rest


def _content(body: bytes) -> bytes:
    """Return what stands in well-formed chunks."""
    content = []
    while body != b"0\r\n\r\n":
        size, _, body = body.partition(b"\r\n")
        content.append(body[: int(size, 16)])
        assert content[-1], "a chunk without content would end the body"
        assert body[int(size, 16) :][:2] == b"\r\n"
        body = body[int(size, 16) + 2 :]
    return b"".join(content)


CUTS = st.lists(st.integers(0, 400), max_size=6) | st.just(list(range(400)))


@given(st.binary(max_size=50), st.binary(max_size=50), CUTS)
def test_a_body_of_a_told_length_ends_there(body, behind, cuts):
    """What comes behind it is kept for the next request."""
    framer = BodyFramer(len(body))
    assert _read(framer, _cut(body + behind, cuts)) == (body, behind)
    assert framer.is_complete


@given(
    st.lists(st.sampled_from([b"a", b"\r\n", b"0\r\n\r\n", BODY]), max_size=4),
    st.sampled_from([b"", b";a=b", b' ;a="b c"']),
    st.sampled_from([b"", b"X: y\r\n", b"X: y\r\nZ:\r\n"]),
    st.sampled_from([b"", BODY]),
    CUTS,
)
def test_a_body_in_chunks_ends_with_the_last_line(chunks, extension, trailers, behind, cuts):
    """Extensions and trailers count for nothing; the content is that of the chunks."""
    lines = [b"%X%b\r\n%b\r\n" % (len(chunk), extension, chunk) for chunk in chunks]
    sent = b"".join(lines) + b"000" + extension + b"\r\n" + trailers + b"\r\n"
    framer = BodyFramer(None)
    body, rest = _read(framer, _cut(sent + behind, cuts))
    assert (_content(body), rest) == (b"".join(chunks), behind)
    assert framer.is_complete


MALFORMED = [
    b"zz\r\n",
    b"\r\n",
    b"-1\r\n",
    b"+1\r\na\r\n",
    b"0x1\r\na\r\n",
    b"1_0\r\n",
    b"1\n\r\n",
    b" 1\r\n",
    b"1\r\nab",
    b"1\r\na\n",
    b"0\r\nbad trailer\r\n",
    b"0\r\n: y\r\n",
    b"1" * 17 + b"\r\n",
    b"1;" + b"a" * 5000,
    b"0\r\n" + b"X: y\r\n" * 10_000,
]


@pytest.mark.parametrize("sent", MALFORMED, ids=range(len(MALFORMED)))
@pytest.mark.parametrize("before", [b"", b"1\r\na\r\n"])
def test_malformed_chunks_are_told(sent, before):
    """However they are cut, and without waiting for more."""
    for pieces in ([before + sent], _cut(before + sent, list(range(len(before + sent))))):
        with pytest.raises(MalformedChunks):
            _read(BodyFramer(None), pieces)


@pytest.mark.parametrize("length", [None, 90])
def test_small_parts_are_held_back(length):
    """Until they are enough, or the body is complete."""
    framer = BodyFramer(length)
    framer.min_part = 40
    drips = [b"a" if length else b"1\r\na\r\n"] * 90 + ([] if length else [b"0\r\n\r\n"])
    parts = [framer.feed(drip)[0] for drip in drips]
    assert framer.is_complete
    assert [place for place, part in enumerate(parts) if part] == [39, 79, len(drips) - 1]
    body = b"".join(parts)
    assert (body if length else _content(body)) == b"a" * 90


UNUSUAL = {
    "TLS": b"\x16\x03\x01",
    "a bare line end": b"GET / HTTP/1.1\n",
    "a bare line end later": b"GET / HTTP/1.1\r\nHost: h\n\n",
    "another version": b"GET / HTTP/2.0\r\n",
    "no version": b"GET /\r\n",
    "a long line": b"GET /" + b"a" * 9000,
    "a long header": b"GET / HTTP/1.1\r\nX: " + b"a" * 9000,
    "a long head": b"GET / HTTP/1.1\r\n" + b"X: 1234567\r\n" * 6000,
}


@pytest.mark.parametrize("data", UNUSUAL.values(), ids=UNUSUAL)
def test_what_need_not_be_waited_for_is_told(data):
    """Aiohttp can say at once that it is no request, or how much is too much."""
    assert is_unusual(data)


@pytest.mark.parametrize("end", range(1, len(HEAD)))
def test_the_beginning_of_a_plain_head_is_waited_with(end):
    """Wherever it is cut."""
    assert not is_unusual(HEAD[:end])


def test_only_a_plain_request_is_told():
    """A POST with one length; whether its client waits for a word is told apart."""
    assert plain_request(HEAD + b"\r\n", len(HEAD) - 2, 9) is None
    assert plain_request(b"GET / HTTP/1.1\r\nContent-Length: 1\r\n\r\n", 33, 9) is None
    assert is_expecting(HEAD + b"EXPECT: 100-continue")
    assert not is_expecting(HEAD + b"X: Expect: 100-continue")
    counted = HEAD + b"Content-Length: 07\r\n\r\n"
    assert plain_request(counted, len(HEAD) + 18, 6) is None
    found = plain_request(counted, len(HEAD) + 18, 7)
    assert found == (HEAD + b"Content-Length: ", len(HEAD) + 22, len(HEAD) + 29)


def test_a_refusal_quotes_nothing():
    """What aiohttp says may hold what was sent."""
    for said in ("bad: b'sk-canary'", "/sk-canary", "a@b", "*", "", "\x00"):
        assert "canary" not in refusal(said).message
