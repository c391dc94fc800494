"""What the fuzz trial sends: strategies of malformed requests, and requests split at every byte.

A case is what goes over one connection. Its texts are its own, so that it is a cache miss at first
and a hit when it is repeated, whatever else is sent at the same time.
"""

import gzip
import itertools
import json
import random
import zlib
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import hypothesis
from hypothesis import HealthCheck, Phase
from hypothesis import strategies as st
from hypothesis.errors import Unsatisfiable

CLOSE = b"GET /livez HTTP/1.1\r\nHost: h\r\nConnection: close\r\n\r\n"
"""The last request of a connection: a server that is in step answers it and closes."""
MODEL = "m"
ROUTES = ("/v1/embeddings", "/embeddings", "/api/v1/embeddings/", "/openai/v1/embeddings",
          "/openai/deployments/m/embeddings?api-version=1", "/v1/engines/m/embeddings")  # fmt: skip
OTHER_TARGETS = (
    "/", "*", "", "/v1/models", "/v1/models/m", "/v1/models/", "/status", "/metrics", "/livez",
    "/readyz", "/openapi.json", "/v1/files", "/v1//embeddings", "/v1/%65mbeddings", "//h/v1",
    "http://h/v1/embeddings", "http://h/livez", "ftp://h/v1", "http://u:p@h/v1/models", "h:80",
    "http://[::1/v1", "http://h:x/v1/models", "/v1/models/%00", "/v1/models/%zz", "/%ff%fe",
    "/v1/models/" + "a" * 3000, "/v1/models/" + "%2e%2e/" * 50, "/\\h\\v1", "/v1/models?a=%00&b",
    "/v1/embeddings?" + "a=1&" * 200, "/v1/embeddings#x", "/v1/models/\u00e9", "/..",
    "/v1/../livez",
    "/v1/models;a=b", "/livez/", "/status/x", "/v1/embeddings/models", "/a?b?c#d#e", "/" + "/" * 50,
)  # fmt: skip


class Case(NamedTuple):
    """What is sent over one connection."""

    kind: str
    pieces: tuple[bytes, ...]
    requests: int
    is_ended: bool = False
    """Whether the sending side is closed, in place of the last request."""
    gap_s: float = 0.0
    is_well_formed: bool = False
    """Whether every request is to be answered, the closing one too."""
    statuses: frozenset[int] = frozenset()
    """Those that the first request may get; empty = any below 500."""

    @property
    def sent(self) -> tuple[bytes, ...]:
        """All pieces, the closing request included."""
        if self.is_ended:
            return self.pieces
        return (*self.pieces[:-1], self.pieces[-1] + CLOSE)


def post(body: bytes, target: str = ROUTES[0], *headers: str) -> bytes:
    """Return a well-formed request."""
    lines = [f"POST {target} HTTP/1.1", "Host: h", *headers, f"Content-Length: {len(body)}"]
    return "\r\n".join((*lines, "", "")).encode() + body


# --- bodies ---------------------------------------------------------------------------------------

_words = st.text(alphabet=st.characters(codec="utf-8"), max_size=12)
_numbers = st.one_of(
    st.integers(-(2**70), 2**70),
    st.floats(),
    st.sampled_from([0, -1, 1, 2**31, 2**32 - 1, 2**32, 2**63, 2**64, 10**400, 1e308, 100_277]),
)
_json = st.recursive(
    st.one_of(st.none(), st.booleans(), _numbers, _words),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(_words, inner, max_size=4),
    max_leaves=8,
)
_tokens = st.lists(st.one_of(st.integers(0, 100_300), _numbers, _words), max_size=6)
_inputs = st.one_of(
    _words, st.lists(_words, max_size=4), _tokens, st.lists(_tokens, max_size=3), _json
)
_FIELDS = (
    "model", "input", "dimensions", "encoding_format", "user", "index", "input_type", "metadata",
    "api_key", "stream", "Model", "INPUT", "dims", "truncate", "provider", "__proto__", "", "\x00",
)  # fmt: skip
_values = st.one_of(
    _json,
    st.sampled_from(["float", "base64", "m", "text-embedding-3-small", [], {}, [[]], [""], ""]),
    st.sampled_from([{"ids": [1]}, {"ids": ["x"]}, {"collection": "../x"}, False]),
)
_RAW = (
    b"", b"{", b"}", b"[]", b"null", b"1", b'""', b"\xef\xbb\xbf{}", b"\x00", b"\xff\xfe{\x00}\x00",
    b'{"model":"m","input":"\\ud800"}', b'{"model":"m","input":"\\udc00\\ud800"}',
    b'{"model":"m","input":"a","input":"b"}', b'{"model":"m","model":null,"input":"dup"}',
    b'{"model":"m","input":"a"}x', b'{"model":"m","input":"a"', b"{'model':'m'}",
    b'{"model":"m","input":"\xff"}', b'{"model":"m","input":"\x00"}', b'{"model":"m","input":NaN}',
    b'{"model":"m","input":["a",null]}', b'{"model":"m","input":[[1,-1]]}', b'{"input":1e999}',
    b'{"model":"m","input":' + b"[" * 5000 + b"]" * 5000 + b"}", b"[" * 100_000,
    b'{"a":' * 900 + b"1" + b"}" * 900, b'{"model":"m","input":[' + b"1" * 5000 + b"]}",
    b'{"model":"m","input":"a","dimensions":' + b"9" * 400 + b"}", b"9" * 10_000, b"-", b"\\",
    b'{"model":"m","input":"a","x":' + b"[" * 300 + b"]" * 300 + b"}", b" " * 10_000,
    b'{"model":"' + b"m" * 10_000 + b'","input":"a"}', b'{"model":"a\\u0000b","input":"a"}',
    b'{"model":"\\r\\nx: y","input":"a"}', b'{"model":"m","input":"a","dimensions":1e400}',
    b'{"model":"m","input":[4294967295,100277]}', b'{"model":"m","input":[18446744073709551616]}',
)  # fmt: skip


@st.composite
def bodies(draw: st.DrawFn, own: str) -> bytes:
    """Draw a body: good, wrong in a field, or no JSON at all. `own` stands in its texts."""
    if draw(st.integers(0, 4)) == 0:
        return draw(st.sampled_from(_RAW) | st.binary(max_size=40))
    fields: dict[str, Any] = {"model": MODEL, "input": own}
    for name in draw(st.lists(st.sampled_from(_FIELDS) | _words, max_size=3)):
        fields[name] = draw(_inputs if name == "input" else _values)
    if draw(st.booleans()):
        fields.pop(draw(st.sampled_from(sorted(fields))))
    body = json.dumps(fields, ensure_ascii=draw(st.booleans()))
    data = body.encode("utf-8", "surrogatepass")
    if draw(st.integers(0, 5)) == 0:
        place = draw(st.integers(0, len(data)))
        data = data[:place] + draw(st.binary(max_size=4)) + data[place + draw(st.integers(0, 4)) :]
    return data


# --- heads ----------------------------------------------------------------------------------------

_METHODS = ("POST", "GET", "HEAD", "PUT", "DELETE", "OPTIONS", "PATCH", "TRACE", "CONNECT", "PRI",
            "post", "P\xd6ST", "", "FOO", "M-SEARCH", "PROPFIND", "GET\x00", "X" * 100)  # fmt: skip
_VERSIONS = ("HTTP/1.1",) * 12 + ("HTTP/1.0", "HTTP/0.9", "HTTP/2.0", "HTTP/1.2", "http/1.1", "",
             "HTTP/1.1 ", "HTTP/11", "XTTP/1.1")  # fmt: skip
_HEADERS = (
    "Content-Type: application/json", "content-type: text/plain", "Content-Type: application/xml",
    "Content-Type: multipart/form-data; boundary=x",
    "Content-Type: application/json; charset=utf-7",
    "Content-Type: ", "Content-Type: ;;;", "Expect: 100-continue", "Expect: 200-ok", "Expect: ",
    "Content-Encoding: gzip", "Content-Encoding: deflate", "Content-Encoding: br", "Via: 1.1 x",
    "Content-Encoding: gzip, gzip", "Content-Encoding: identity", "Content-Encoding: x-gzip",
    "Transfer-Encoding: chunked", "Transfer-Encoding: gzip, chunked", "Transfer-Encoding: identity",
    "Transfer-Encoding: xchunked", "Transfer-Encoding : chunked", "Transfer-Encoding:\x0bchunked",
    "Transfer-Encoding: chunked, identity", "TE: trailers", "Trailer: X", "Content-Length: 0",
    "Content-Length: 5", "Content-Length: -1", "Content-Length: +3", "Content-Length: 0x10",
    "Content-Length: 1, 1", "Content-Length: 99999999999999999999", "Content-Length: 1e2",
    "Content-Length: ", "Content-Length : 3", "Connection: close", "Connection: keep-alive",
    "Connection: Upgrade", "Connection: close, keep-alive", "Connection: x", "Keep-Alive: 1",
    "Upgrade: websocket", "Upgrade: h2c", "HTTP2-Settings: AAMAAABkAAQAAP__", "Upgrade: tcp",
    "Sec-WebSocket-Key: x", "Sec-WebSocket-Version: 13", "Host: other.example", "Host: h", "Host:",
    "Host: h h", "Host: [::1", "Host: h:99999", "Authorization: Bearer x", "Authorization: \x80",
    "Authorization: Basic !", "api-key: y", "Origin: http://evil.example", "Origin: null",
    "Origin: http://[", "Sec-Fetch-Site: cross-site", "Accept: text/html", "Accept: text/plain",
    "Accept-Encoding: gzip", "Range: bytes=0-1", "If-None-Match: *", "Cookie: a=b; c", "X: \x00",
    "If-Modified-Since: x", "Max-Forwards: 0", "Cache-Control: no-store", "X:\x01", "X: \x7f",
    "Cache-Control: max-age=99999999999999999999999, no-cache", 'Cache-Control: "', "X: y\rz",
    "Cache-Control: only-if-cached", "x-embedding-proxy-hop: a", "x-stainless-retry-count: \x80",
    "x-stainless-retry-count: 0", "x-stainless-retry-count: 99", "X: y\nZ: w", " folded: x",
    "X: a\r\n b", "X: a\r\n\tb", "X", ": empty", "X Y: z", "(X): y", "X: \u00e9",
    "X: " + "a" * 9000,
    "Access-Control-Request-Method: POST", "Access-Control-Request-Method: \x01", "X-\x00: y",
    "X-Forwarded-For: ::1", "Forwarded: for=x", "Date: x", "x-request-id: mine", "Pragma: no-cache",
)  # fmt: skip


def _chunked(body: bytes, draw: st.DrawFn) -> bytes:
    at = draw(st.integers(0, len(body)))
    extension = draw(
        st.sampled_from([b"", b"", b";a=b", b';a="\\""', b";", b" ", b";" + b"x" * 99])
    )
    sent = b""
    for part in (body[:at], body[at:]):
        if part:
            size = draw(st.sampled_from([b"%x", b"%x", b"%X", b"0%x", b"000000%x"])) % len(part)
            sent += size + extension + b"\r\n" + part + b"\r\n"
    end = draw(st.sampled_from(_CHUNK_ENDS))
    return sent + end


_CHUNK_ENDS = (
    b"0\r\n\r\n", b"0\r\n\r\n", b"0\r\n\r\n", b"0\r\nX: y\r\n\r\n",
    b"0\r\nContent-Length: 3\r\n\r\n",
    b"0\r\nbad trailer\r\n\r\n", b"0;x\r\n\r\n", b"00\r\n\r\n", b"0\n\n", b"zz\r\n\r\n",
    b"-1\r\n\r\n", b"ffffffffffffffffff\r\n", b"5\r\nabc", b"\r\n", b"", b"0\r\n", b"3\r\nabcd\r\n",
    b"0\r\n" + b"X: y\r\n" * 300 + b"\r\n", b"0\r\nX: " + b"a" * 9000 + b"\r\n\r\n", b"0 \r\n\r\n",
)  # fmt: skip
_PACKED = {
    "gzip": lambda data: gzip.compress(data, 1, mtime=0),
    "deflate": lambda data: zlib.compress(data, 1),
    "gzip twice": lambda data: gzip.compress(gzip.compress(data, mtime=0), mtime=0),
    "cut": lambda data: gzip.compress(data, mtime=0)[:-5],
    "members": lambda data: gzip.compress(data[:9], mtime=0) + gzip.compress(data[9:], mtime=0),
    "garbage behind": lambda data: gzip.compress(data, mtime=0) + b"x",
    "bomb": lambda data: _BOMB,
    "plain": lambda data: data,
}
_BOMB = gzip.compress(b" " * (8 << 20), 9, mtime=0)


@st.composite
def requests(draw: st.DrawFn, own: str, targets: Sequence[str]) -> bytes:
    """Draw one request, with whatever is wrong in it."""
    is_post = draw(st.integers(0, 5)) > 0
    method = "POST" if is_post else draw(st.sampled_from(_METHODS))
    target = draw(st.sampled_from(targets))
    version = draw(st.sampled_from(_VERSIONS))
    lines = draw(st.lists(st.sampled_from(_HEADERS), max_size=4))
    if draw(st.integers(0, 30)) == 0:
        lines += [f"X-{n}: {n}" for n in range(draw(st.sampled_from([50, 127, 128, 200, 900])))]
    if draw(st.integers(0, 15)):
        lines.insert(draw(st.integers(0, len(lines))), "Host: h")
    body = draw(bodies(own))
    if draw(st.integers(0, 7)) == 0:
        body = _PACKED[draw(st.sampled_from(sorted(_PACKED)))](body)
        lines.append(f"Content-Encoding: {draw(st.sampled_from(['gzip', 'deflate', 'br']))}")
    framing = draw(st.sampled_from(["length"] * 8 + ["chunked"] * 3 + ["none", "wrong", "both"]))
    if framing in ("length", "both"):
        lines.append(f"Content-Length: {len(body)}")
    if framing in ("chunked", "both"):
        lines.append("Transfer-Encoding: chunked")
        body = _chunked(body, draw)
    if framing == "wrong":
        lines.append(f"Content-Length: {max(0, len(body) + draw(st.integers(-5, 5)))}")
    newline = draw(st.sampled_from(["\r\n"] * 12 + ["\n", "\r", "\r\n\r\n"]))
    head = newline.join((f"{method} {target} {version}", *lines, "", ""))
    before = draw(st.sampled_from([b""] * 8 + [b"\r\n", b"\n", b"\r\n\r\n", b" ", b"\x00"]))
    return before + head.encode("utf-8", "surrogatepass") + body


@st.composite
def connections(draw: st.DrawFn, targets: Sequence[str] = ROUTES + OTHER_TARGETS) -> Case:
    """Draw what one connection sends: up to three requests, some again, in up to four pieces."""
    own = f"text {draw(st.integers(0, 1 << 60))}"
    drawn = draw(st.lists(requests(own, targets), min_size=1, max_size=2))
    if draw(st.booleans()):
        drawn.append(drawn[-1])
    sent = b"".join(drawn)
    cuts = sorted(draw(st.sets(st.integers(0, len(sent)), max_size=3)))
    return Case(
        "drawn",
        _cut(sent, cuts),
        len(drawn),
        is_ended=draw(st.integers(0, 9)) == 0,
        gap_s=draw(st.sampled_from([0.0, 0.001, 0.015])),
    )


def _cut(sent: bytes, cuts: Sequence[int]) -> tuple[bytes, ...]:
    edges = [0, *cuts, len(sent)]
    pieces = [sent[start:end] for start, end in itertools.pairwise(edges)]
    return tuple(piece for piece in pieces if piece) or (b"",)


def variants(case: Case, chance: random.Random) -> Iterator[Case]:
    """Yield a case as it is, cut elsewhere, sent twice, and with a few bytes damaged."""
    yield case
    sent = b"".join(case.pieces)
    yield case._replace(kind="cut", pieces=_at_random(sent, chance), gap_s=_pause(chance))
    yield case._replace(
        kind="twice", pieces=_at_random(sent * 2, chance), requests=2 * case.requests
    )
    damaged = bytearray(sent)
    for _ in range(chance.randint(1, 3)):
        place = chance.randrange(len(damaged) + 1)
        # Mostly in the head: there a byte decides more.
        place = min(place, chance.choice((80, 300, len(damaged))))
        width = chance.choice((0, 1, 1, 2, 20))
        damaged[place : place + width] = chance.choice(_DAMAGES) or chance.randbytes(1)
    yield case._replace(
        kind="damaged", pieces=_at_random(bytes(damaged), chance), gap_s=_pause(chance)
    )


_DAMAGES = (b"", b"\r\n", b"\n", b"\r", b"\0", b":", b" ", b"\x80", b"0", b"9", b"chunked",
            b"\r\n\r\n", b",", b"POST / HTTP/1.1\r\nHost: h\r\n\r\n", b"\t")  # fmt: skip


def _at_random(sent: bytes, chance: random.Random) -> tuple[bytes, ...]:
    return _cut(sent, sorted(chance.randint(0, len(sent)) for _ in range(chance.randint(0, 5))))


def _pause(chance: random.Random) -> float:
    return chance.choice((0.0, 0.002, 0.012))


def generate(strategy: st.SearchStrategy[Any], count: int, seed: int) -> Iterator[Any]:
    """Yield so many examples, the same ones for the same seed; none if there are none."""
    left = count
    while left > 0:
        found: list[Any] = []

        @hypothesis.seed(seed)
        @hypothesis.settings(
            max_examples=min(left, 500),
            database=None,
            deadline=None,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        @hypothesis.given(strategy)
        def collect(one: Any) -> None:
            found.append(one)  # noqa: B023 - it is called before the next round begins

        try:
            collect()
        except Unsatisfiable:
            return
        yield from found[:left]
        left -= len(found)
        seed += 1


# --- splits ---------------------------------------------------------------------------------------


def bases() -> dict[str, bytes]:
    """Return the requests that are split at every byte: well-formed ones, and malformed ones."""
    good = json.dumps({"model": MODEL, "input": "split"}).encode()
    floats = json.dumps({"model": MODEL, "input": ["split", "two"], "dimensions": 4}).encode()
    packed = gzip.compress(good, mtime=0)
    chunked = b"%x;e\r\n" % len(good) + good + b"\r\n0\r\nX: y\r\n\r\n"
    line = b"POST /v1/embeddings HTTP/1.1\r\nHost: h\r\n"
    smuggled = b"GET /v1/models HTTP/1.1\r\nHost: h\r\n\r\n"
    return {
        "good": post(good, ROUTES[0], "Content-Type: application/json"),
        "floats": post(floats, ROUTES[4], "cOnTent-tYpe: application/json", "api-key: k"),
        "old version": post(good).replace(b"HTTP/1.1", b"HTTP/1.0"),
        "last": post(good, ROUTES[1], "Connection: close"),
        "gzip": post(packed, ROUTES[2], "Content-Encoding: gzip"),
        "chunked": line + b"Transfer-Encoding: chunked\r\n\r\n" + chunked,
        "expect": post(good, ROUTES[0], "Expect: 100-continue"),
        "expect other": post(good, ROUTES[0], "Expect: other"),
        "absolute": post(good, "http://h/v1/embeddings"),
        "models": b"GET /v1/models HTTP/1.1\r\nHost: h\r\n\r\n",
        "bad JSON": post(b'{"model":"m","input":'),
        "two": post(good) + post(floats),
        "line feeds": post(good).replace(b"\r\n", b"\n"),
        "both lengths": line + b"Content-Length: 4\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        "two lengths": line + b"Content-Length: 2\r\nContent-Length: 40\r\n\r\n{}" + smuggled,
        "folded": post(good, ROUTES[0], "X: a\r\n b"),
        "HTTP/2": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        "upgrade": post(good, ROUTES[0], "Connection: Upgrade", "Upgrade: websocket"),
        "connect": b"CONNECT h:443 HTTP/1.1\r\nHost: h\r\n\r\n",
        "trace": b"TRACE /v1/embeddings HTTP/1.1\r\nHost: h\r\n\r\n",
        "TLS": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\x00" * 20,
        "empty lines": b"\r\n\r\n" + post(good),
        "unknown path": post(good, "/v1/nothing"),
        "bad chunk": line + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n\r\n",
    }


WELL_FORMED = frozenset(
    {"good", "floats", "gzip", "chunked", "expect", "expect other", "absolute", "models",
     "bad JSON", "two", "upgrade", "empty lines", "unknown path"}
)  # fmt: skip
"""The names of the base requests after which the connection goes on."""


def splits(seed: int) -> Iterator[Case]:
    """Yield each base request between two whole good ones, split at every byte; for ever.

    The first round has every place, with a pause in which the server reads; it begins with those
    between head and body. Later rounds have random places and pauses. A round has 2,300 cases.
    """
    chance = random.Random(seed)
    good = post(json.dumps({"model": MODEL, "input": "split"}).encode())
    found = bases()
    places = [(name, place) for name, base in found.items() for place in range(1, len(base))]
    chance.shuffle(places)
    places.sort(key=lambda one: one[1] != found[one[0]].find(b"\r\n\r\n") + 4)
    for is_first in itertools.chain([True], itertools.repeat(False)):  # noqa: FBT003
        for name, place in places:
            base = found[name]
            cut = (base[:place], base[place:])
            pieces = cut if is_first else _at_random(base, chance)
            # What comes before is repeated from memory; what comes behind shows who is in step.
            yield Case(
                f"split {name}",
                (good, *pieces[:-1], pieces[-1] + good),
                3,
                gap_s=0.002 if is_first else _pause(chance),
                is_well_formed=name in WELL_FORMED,
            )
