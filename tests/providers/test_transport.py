"""One attempt over real sockets: what arrives, what breaks, and how long it may take."""

import asyncio
import contextlib
import gzip
import re
import socket
import tracemalloc
import zlib

import pytest
from aiohttp import web
from clock import FOR_EVER, until
from embedding_proxy.providers.base import Context
from embedding_proxy.providers.errors import (
    DeadlineExceeded,
    LoopDetected,
    TransientError,
    Unreachable,
    UpstreamError,
    UpstreamTimeout,
)
from embedding_proxy.providers.profile import Timeouts
from embedding_proxy.providers.routing.policy import rule
from embedding_proxy.providers.upstream import content_encoding
from embedding_proxy.providers.upstream.transport import Transport
from fault_server import FaultServer, cut, reset, stale, status
from hypothesis import given
from hypothesis import strategies as st

PAYLOAD = b'{"model":"m","input":"a"}'
KEY = "Bearer made-up-key"
NO_LIMIT = 1 << 20
AN_HOUR = 3600.0
"""Seconds; no machine takes so long for anything here."""


def transport_to(url: str, timeout_s: float = AN_HOUR, **timeouts) -> Transport:
    """Return a transport to an upstream; its limit is far away unless it is what is tested."""
    return Transport("acme", url, {"Authorization": KEY}, Timeouts(timeout_s, **timeouts))


async def post(transport, limit=NO_LIMIT, deadline=None):
    """Send one request."""
    return await transport.post("/embeddings", PAYLOAD, limit, Context(deadline=deadline))


async def post_once(url, timeout_s=AN_HOUR, limit=NO_LIMIT, deadline=None, **timeouts):
    """Send one request over a transport of its own."""
    async with transport_to(url, timeout_s, **timeouts) as transport:
        return await post(transport, limit, deadline)


def now() -> float:
    """Return the time on the clock that deadlines are on."""
    return asyncio.get_running_loop().time()


@pytest.mark.parametrize("code", [200, 201, 400, 401, 429, 500, 529])
async def test_a_whole_reply_is_returned_whatever_its_status(code, upstream):
    """Status, headers and body come back as they were sent; judging them is not done here."""
    upstream.script.append(status(code, b'{"some": "body"}', {"Retry-After": "3"}))
    reply = await post_once(upstream.url)
    assert (reply.status, reply.body) == (code, b'{"some": "body"}')
    assert reply.headers["retry-after"] == "3"


@pytest.mark.parametrize("slash", ["", "/"])
async def test_the_request_is_what_was_asked_and_nothing_else(slash, upstream):
    """The payload goes to base URL and path; headers are the given ones and HTTP's own."""
    await post_once(upstream.url + slash)
    (call,) = upstream.calls
    assert (call.path, call.payload) == ("/v1/embeddings", {"model": "m", "input": "a"})
    assert call.headers["Authorization"] == KEY
    assert call.headers["Content-Type"] == "application/json"
    http = {"Host", "Accept", "Accept-Encoding", "User-Agent", "Content-Length"}
    assert set(call.headers) == {"Authorization", "Content-Type"} | http


@pytest.mark.parametrize("code", [300, 301, 302, 303, 307, 308, 399])
async def test_a_redirect_is_not_followed(code, upstream, second):
    """Neither request nor key goes where an upstream points, be it another origin or its own."""
    for target in (f"{second.url}/embeddings", f"{upstream.url}/elsewhere"):
        upstream.calls.clear()
        upstream.script.append(status(code, b"", {"Location": target}))
        with pytest.raises(UpstreamError, match="redirect"):
            await post_once(upstream.url)
        assert len(upstream.calls) == 1
    assert second.calls == []


async def test_the_environments_proxy_gets_no_key(upstream, second, monkeypatch):
    """HTTP_PROXY of the machine is not obeyed: the key goes to the origin alone."""
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.setenv(name, second.url)
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
    await post_once(upstream.url)
    assert len(upstream.calls) == 1
    assert second.calls == []


async def test_cookies_are_not_kept(upstream):
    """What an upstream sets does not tie one client's request to another's."""
    upstream.script.append(status(200, b"{}", {"Set-Cookie": "session=1; Path=/"}))
    named = upstream.url.replace("127.0.0.1", "localhost")  # no jar keeps an address's cookies
    async with transport_to(named) as transport:
        await post(transport)
        await post(transport)
    assert "Cookie" not in upstream.calls[1].headers


async def test_requests_run_side_by_side(upstream):
    """Three requests are under way at once: none is answered before all have arrived."""
    together = asyncio.Barrier(3)

    async def act(*_):
        await together.wait()
        return web.Response()

    upstream.always = act
    async with transport_to(upstream.url) as transport:
        replies = await asyncio.gather(*(post(transport) for _ in range(3)))
    assert [reply.status for reply in replies] == [200] * 3


@pytest.mark.parametrize("finishes_calls", [False, True])
@pytest.mark.parametrize("late", [0.0, 1.0])
async def test_nothing_is_sent_after_the_deadline(late, finishes_calls, upstream):
    """A request whose time is up, even just now, costs nothing, also where calls outlive it."""
    context = Context(deadline=now() - late, finishes_calls=finishes_calls)
    async with transport_to(upstream.url) as transport:
        with pytest.raises(DeadlineExceeded):
            await transport.post("/embeddings", PAYLOAD, NO_LIMIT, context)
    assert upstream.calls == []


@pytest.fixture(params=["silence", "trickle"])
async def stuck(request, upstream):
    """Give an upstream that says nothing, or starts its answer and never ends it."""
    over = asyncio.Event()

    async def act(http_request, _):
        response = web.StreamResponse()
        if request.param == "trickle":
            await response.prepare(http_request)
            await response.write(b"{")
        await over.wait()
        return response

    upstream.always = act
    yield upstream
    over.set()


async def test_an_attempt_has_a_limit_of_its_own(stuck, move):
    """Neither silence nor an answer without end lasts longer than one attempt may."""
    asking = post_once(stuck.url, deadline=now() + 3 * AN_HOUR, min_bytes_per_s=0.0)
    posting = asyncio.create_task(asking)
    await until(lambda: stuck.calls)
    await move(AN_HOUR - FOR_EVER)
    assert not posting.done()
    await move(AN_HOUR)
    await until(posting.done)
    with pytest.raises(UpstreamTimeout, match=r"acme: no answer within \d+\.\d s"):
        await posting
    assert len(stuck.calls) == 1


async def test_an_attempt_ends_with_the_request(stuck, move):
    """A deadline before the attempt's own limit is kept: an upstream gets what time is left."""
    asking = post_once(stuck.url, timeout_s=2 * AN_HOUR, deadline=now() + AN_HOUR)
    posting = asyncio.create_task(asking)
    await until(lambda: stuck.calls)
    await move(AN_HOUR + 1)
    await until(posting.done)
    with pytest.raises(DeadlineExceeded):
        await posting
    assert len(stuck.calls) == 1


async def test_a_call_that_was_begun_outlives_its_request(upstream, move):
    """It is paid for: when the request's time is up it goes on, to be kept."""
    upstream.gate = asyncio.Event()
    context = Context(deadline=now() + AN_HOUR, finishes_calls=True)
    async with transport_to(upstream.url, 2 * AN_HOUR) as transport:
        payload = b'{"input": "a", "model": "m"}'
        asking = transport.post("/embeddings", payload, NO_LIMIT, context)
        posting = asyncio.create_task(asking)
        await until(lambda: upstream.calls)
        await move(AN_HOUR + 1)
        assert not posting.done()
        upstream.gate.set()
        assert (await posting).status == 200


async def test_a_server_that_does_not_accept_is_given_up_early():
    """Connecting has a limit of its own, far below that of an answer."""
    with socket.socket() as deaf:
        deaf.bind(("127.0.0.1", 0))
        deaf.listen(0)
        url = f"http://127.0.0.1:{deaf.getsockname()[1]}/v1"
        with socket.create_connection(deaf.getsockname()):  # the only one that is let in
            async with asyncio.timeout(FOR_EVER):
                with pytest.raises(
                    UpstreamTimeout, match=rf"connection timed out to {url[7:-3]}, after"
                ):
                    await post_once(url, connect_s=0.1)


async def _refused(upstream):
    await upstream.stop()
    return upstream.url


async def _dropped(upstream):
    upstream.script.append(reset())
    return upstream.url


async def _cut(upstream):
    upstream.script.append(cut())
    return upstream.url


async def _plain_text(upstream):
    return upstream.url.replace("http:", "https:")


@pytest.mark.parametrize(
    ("prepare", "reason"),
    [
        (_refused, r"^acme: connection refused by 127\.0\.0\.1:{port}$"),
        (_dropped, r"^acme: connection reset$"),
        (_cut, r"^acme: reply broke off after 20 bytes$"),
        (
            _plain_text,
            r"^acme: TLS handshake failed with 127\.0\.0\.1:{port}: the server does not speak TLS",
        ),
    ],
)
async def test_a_broken_connection_is_a_passing_failure(prepare, reason, upstream):
    """Each way to have no whole answer is named, without the key, and may be retried."""
    url = await prepare(upstream)
    with pytest.raises(Unreachable, match=reason.format(port=upstream.port)) as caught:
        await post_once(url)
    assert isinstance(caught.value, TransientError)
    assert "made-up-key" not in str(caught.value)


CANNED = {
    "nothing": (b"", "server disconnected without an answer"),
    "half a head": (b"HTTP/1.1 200 OK\r\nConte", "server disconnected without an answer"),
    "another protocol": (b"SSH-2.0-OpenSSH_9\r\n", "reply is not HTTP: bad status line"),
    "an alert of TLS": (b"\x15\x03\x01\x00\x02\x02\x16", "reply is not HTTP: bad status line"),
    "no head": (b'{"data": []}', "reply is not HTTP: bad status line"),
    "a wrong header": (
        b"HTTP/1.1 200 OK\r\nContent-Length: abc\r\n\r\nab",
        "reply is not valid HTTP: Invalid character in Content-Length",
    ),
    "a cut chunk": (
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nab",
        "reply broke off after 2 bytes",
    ),
}


@contextlib.asynccontextmanager
async def canned(answer: bytes):
    """Give the URL of a server that says this, whatever it is asked, and closes."""

    async def serve(reader, writer):
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
            await reader.readuntil(b"\r\n\r\n")
            await reader.readexactly(len(PAYLOAD))
            writer.write(answer)
            await writer.drain()
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with server:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1"


@pytest.mark.parametrize(("answer", "reason"), CANNED.values(), ids=CANNED)
async def test_what_is_no_whole_answer_is_named(answer, reason, upstream):
    """What came instead of a reply is said, and nothing of it is quoted."""
    async with canned(answer) as url:
        with pytest.raises(Unreachable, match=f"^acme: {reason}$"):
            await post_once(url)


@pytest.mark.parametrize(
    "headers", [b"X-Large: " + b"a" * 20_000, b"\r\n".join(b"X-%d: a" % i for i in range(3000))]
)
async def test_headers_that_are_too_large_are_named_and_not_asked_for_again(headers):
    """The same call would bring them again, and be charged again."""
    async with canned(b"HTTP/1.1 200 OK\r\n" + headers + b"\r\n\r\n") as url:
        with pytest.raises(UpstreamError, match=r"^acme: reply headers too large$") as caught:
            await post_once(url)
    assert rule(caught.value).retries == 0


@pytest.mark.parametrize(
    ("number", "reason"),
    [
        (socket.EAI_NONAME, "no such host: upstream.invalid"),
        (socket.EAI_AGAIN, "the host name upstream.invalid could not be resolved"),
    ],
)
async def test_a_name_that_does_not_resolve_is_said_to(number, reason, monkeypatch):
    """A wrong host name in the configuration is told from a server that is down."""

    async def unknown(*_, **__):
        raise socket.gaierror(number, "made up")

    monkeypatch.setattr(asyncio.get_running_loop(), "getaddrinfo", unknown)
    with pytest.raises(Unreachable, match=f"^acme: {reason}$"):
        await post_once("http://upstream.invalid/v1")


JSON = b'{"object": "list", "data": [' + b'"made up, ' * 20_000 + b'"]}'
HALVES = JSON[:1000], JSON[1000:]


def raw_deflate(data: bytes) -> bytes:
    """Compress without the head of RFC 1950, as some servers do."""
    packer = zlib.compressobj(wbits=-zlib.MAX_WBITS)
    return packer.compress(data) + packer.flush()


@pytest.mark.parametrize(
    ("label", "sent"),
    [
        ("gzip", gzip.compress(JSON)),
        ("x-gzip", gzip.compress(JSON)),
        ("gzip", JSON),
        ("deflate", JSON),
        ("br", JSON),
        ("zstd", b"\xef\xbb\xbf" + JSON),
        ("utf-8", JSON),
        ("identity", gzip.compress(JSON)),
        ("deflate", gzip.compress(JSON)),
        ("deflate", zlib.compress(JSON)),
        ("deflate", raw_deflate(JSON)),
        ("gzip", zlib.compress(JSON)),
        ("gzip", b"".join(map(gzip.compress, HALVES))),
        ("gzip", gzip.compress(JSON) + bytes(100)),
        ("gzip", b'{"a": 1}'),
        ("gzip", b""),
    ],
)
async def test_the_bytes_of_a_reply_say_how_it_is_packed(label, sent, upstream):
    """A label that lies costs nothing: what can be read is read."""
    upstream.script.append(status(200, sent, {"Content-Encoding": label}))
    body = (await post_once(upstream.url)).body.removeprefix(b"\xef\xbb\xbf")
    assert body == (JSON if len(sent) > 10 else sent)


@pytest.mark.parametrize(
    ("label", "sent"),
    [
        ("gzip", b"no gzip"),
        ("gzip", gzip.compress(JSON)[:-20]),
        ("gzip", gzip.compress(JSON)[:50] + bytes(500)),
        ("deflate", b"\xff" * 50),
        ("br", b"\x80" * 50),
        ("compress", b"\x1f\x9d" + bytes(50)),
        ("gzip, br", bytes(50)),
        ("gzip", gzip.compress(b"") * 2000),
    ],
)
async def test_a_reply_that_cannot_be_decoded_says_so(label, sent, upstream):
    """It names what it was said to be, and is not asked for again: it would be charged again."""
    upstream.script.append(status(200, sent, {"Content-Encoding": label}))
    said = f"acme: reply could not be decoded (content-encoding {label})"
    with pytest.raises(UpstreamError, match=f"^{re.escape(said)}$") as caught:
        await post_once(upstream.url)
    assert rule(caught.value).retries == 0


async def test_a_refusal_that_cannot_be_decoded_is_one_all_the_same(upstream):
    """The status and the headers of an error say enough."""
    headers = {"Content-Encoding": "gzip", "Retry-After": "3"}
    upstream.script.append(status(429, b"no gzip", headers))
    reply = await post_once(upstream.url)
    assert (reply.status, reply.body, reply.headers["Retry-After"]) == (429, b"", "3")


class Reversed:
    """A codec with the interface of the zstd libraries: it turns its one frame round."""

    class ZstdDecompressor:
        """One frame."""

        def __init__(self):
            self.frame, self.eof, self.unused_data, self.needs_input = b"", False, b"", True

        def decompress(self, data, max_length):
            frame, end, rest = data.partition(b"END")
            self.frame += frame.removeprefix(b"\x28\xb5\x2f\xfd")
            if not end:
                return b""
            self.unused_data = self.unused_data or rest
            piece, self.frame = self.frame[::-1][:max_length], self.frame[:-max_length]
            self.eof = not self.frame
            self.needs_input = False
            return piece


async def test_zstd_is_read_where_a_library_can(upstream, monkeypatch):
    """Frame after frame; and where none is installed, the error names it."""
    frame = b"\x28\xb5\x2f\xfd" + JSON[:100][::-1] + b"END"
    upstream.always = status(200, frame * 2, {"Content-Encoding": "zstd"})
    monkeypatch.setattr(content_encoding, "_zstd", Reversed)
    assert (await post_once(upstream.url)).body == JSON[:100] * 2
    monkeypatch.setattr(content_encoding, "_zstd", None)
    with pytest.raises(UpstreamError, match=r"could not be decoded \(content-encoding zstd\)"):
        await post_once(upstream.url)


async def test_only_what_can_be_read_is_asked_for(upstream):
    """The codings in Accept-Encoding are those that have a decoder here."""
    await post_once(upstream.url)
    asked = upstream.calls[0].headers["Accept-Encoding"].split(", ")
    assert asked[:2] == ["gzip", "deflate"]
    assert set(asked[2:]) == {
        *(["br"] if content_encoding._brotli else []),
        *(["zstd"] if content_encoding._zstd else []),
    }


@given(st.binary(max_size=200), st.sampled_from(["", "gzip", "deflate", "br", "zstd", "x"]))
def test_no_bytes_break_the_decoder(data, label):
    """Whatever is sent is decoded, or a DecodeError; in one chunk or in many it is the same."""

    def decoded(size):
        decoder = content_encoding.Decoder(label)
        parts = [data[i : i + size] for i in range(0, len(data), size)]
        try:
            pieces = [piece for part in parts for piece in decoder.feed(part)]
            return b"".join([*pieces, *decoder.finish()])
        except content_encoding.DecodeError as error:
            return str(error)

    assert decoded(1) == decoded(1000)


async def test_a_508_is_a_loop_and_not_asked_for_again(upstream):
    """The provider's address leads back here; which key to set is said."""
    upstream.script.append(status(508))
    with pytest.raises(LoopDetected, match=r"set providers\.acme\.base_url to the") as caught:
        await post_once(upstream.url)
    assert rule(caught.value).retries == 0


async def test_the_transport_outlives_an_outage(upstream):
    """After an upstream was down and is back, the same transport reaches it again."""
    async with transport_to(upstream.url) as transport:
        assert (await post(transport)).status == 200
        await upstream.stop()
        with pytest.raises(Unreachable):
            await post(transport)
        await upstream.start()
        assert (await post(transport)).status == 200


@pytest.mark.parametrize("encoding", ["identity", "gzip"])
async def test_a_reply_may_be_as_large_as_the_limit_and_no_larger(encoding, upstream):
    """The last byte allowed is allowed and the next is not, counted after decompression."""
    body = b"x" * 100_000
    sent = gzip.compress(body) if encoding == "gzip" else body
    upstream.always = status(200, sent, {"Content-Encoding": encoding})
    assert (await post_once(upstream.url, limit=len(body))).body == body
    with pytest.raises(UpstreamError, match="larger than expected"):
        await post_once(upstream.url, limit=len(body) - 1)


async def test_a_compressed_bomb_is_not_unpacked(upstream):
    """Of a reply that would unpack to 64 MiB only a small part is ever held."""
    size = 64 << 20
    bomb = gzip.compress(bytes(size), 1)
    upstream.script.append(status(200, bomb, {"Content-Encoding": "gzip"}))
    tracemalloc.start()
    try:
        with pytest.raises(UpstreamError, match="larger than expected"):
            await post_once(upstream.url, limit=1000)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < size / 8


@pytest.mark.parametrize(
    ("encoding", "head", "rest"),
    [
        ("identity", b"", b"x" * 65_536),
        # Blocks of nothing: however many come, they unpack to no byte.
        ("gzip", b"\x1f\x8b\x08\0\0\0\0\0\0\xff", b"\0\0\0\xff\xff" * 13_000),
    ],
    ids=["plain", "packed"],
)
async def test_a_reply_without_end_is_cut_off(encoding, head, rest, upstream):
    """An upstream that never stops talking is hung up on as soon as it passes the limit."""
    hung_up = asyncio.Event()

    async def act(request, _):
        response = web.StreamResponse(headers={"Content-Encoding": encoding})
        await response.prepare(request)
        try:
            await response.write(head + rest)
            while True:
                await response.write(rest)  # raises when nobody listens any more
        finally:
            hung_up.set()

    upstream.script.append(act)
    async with asyncio.timeout(FOR_EVER):
        with pytest.raises(UpstreamError, match="larger than expected"):
            await post_once(upstream.url, limit=100_000)
        await hung_up.wait()


async def test_a_cancelled_request_is_cancelled(upstream):
    """A caller that goes away is not told of a failure, and others can go on."""
    arrived, over = asyncio.Event(), asyncio.Event()

    async def act(*_):
        arrived.set()
        await over.wait()
        return web.Response()

    upstream.script.append(act)
    try:
        async with transport_to(upstream.url) as transport:
            task = asyncio.create_task(post(transport))
            await arrived.wait()
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert (await post(transport)).status == 200
    finally:
        over.set()


async def test_a_transport_is_open_between_enter_and_exit(upstream):
    """Outside of `async with` nothing can be sent; closing twice does no harm."""
    transport = transport_to(upstream.url)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="not open"):
            await post(transport)
        async with transport:
            assert (await post(transport)).status == 200
    await transport.__aexit__(None, None, None)


async def test_two_transports_keep_their_keys_apart(upstream, second):
    """Each origin sees its own key and never the other's."""
    servers: dict[str, FaultServer] = {"one": upstream, "two": second}
    for key, server in servers.items():
        async with Transport("acme", server.url, {"Authorization": key}, Timeouts()) as transport:
            await post(transport)
    for key, server in servers.items():
        assert [call.headers["Authorization"] for call in server.calls] == [key]


def dribble(pause: asyncio.Event, first: bytes = b""):
    """Play an upstream that sends so much at once and then a byte whenever it is let."""

    async def act(request, _):
        response = web.StreamResponse()
        await response.prepare(request)
        await response.write(first or b"{")
        while not pause.is_set():
            await asyncio.sleep(0.005)
            await response.write(b" ")
        await response.write_eof()
        return response

    return act


async def test_a_trickling_reply_is_given_up(upstream):
    """A reply that keeps coming, but slower than the least rate, ends long before the total."""
    over = asyncio.Event()
    upstream.script.append(dribble(over))
    try:
        async with asyncio.timeout(FOR_EVER):
            with pytest.raises(UpstreamTimeout, match="acme: the answer arrives too slowly"):
                await post_once(upstream.url, min_bytes_per_s=100_000, min_rate_window_s=0.1)
    finally:
        over.set()


async def test_a_burst_does_not_make_up_for_a_trickle(upstream):
    """The rate is that of each window: a fast beginning does not excuse what follows."""
    over = asyncio.Event()
    upstream.script.append(dribble(over, b"x" * 100_000))
    try:
        async with asyncio.timeout(FOR_EVER):
            with pytest.raises(UpstreamTimeout, match="too slowly"):
                await post_once(upstream.url, min_bytes_per_s=100_000, min_rate_window_s=0.1)
    finally:
        over.set()


async def test_silence_amid_a_reply_is_a_trickle_too(stuck):
    """A reply that stops coming is given up after a window, not after the total."""
    async with asyncio.timeout(FOR_EVER):
        with pytest.raises(UpstreamTimeout):
            await post_once(stuck.url, first_byte_s=0.2, min_bytes_per_s=100, min_rate_window_s=0.1)


async def test_a_reply_that_keeps_up_may_take_many_windows(upstream, move, monkeypatch):
    """As long as each window brings enough, a reply lasts as long as the total allows."""
    parts, read = asyncio.Queue(), []
    feed = content_encoding.Decoder.feed

    async def act(request, _):
        response = web.StreamResponse()
        await response.prepare(request)
        while part := await parts.get():
            await response.write(part)
        return response

    def noted(decoder, chunk):
        read.append(chunk)
        return feed(decoder, chunk)

    monkeypatch.setattr(content_encoding.Decoder, "feed", noted)
    upstream.script.append(act)
    slow = {"min_bytes_per_s": 0.5 / AN_HOUR, "min_rate_window_s": AN_HOUR}
    posting = asyncio.create_task(post_once(upstream.url, 100 * AN_HOUR, **slow))
    for number in range(1, 5):
        parts.put_nowait(b"x")
        await until(lambda: b"".join(read) == number * b"x")  # noqa: B023
        await move(AN_HOUR)
    parts.put_nowait(b"")
    assert (await posting).body == b"xxxx"


async def test_a_quick_reply_need_not_be_long(upstream):
    """A reply of two bytes that is whole within the window is no trickle."""
    upstream.script.append(status(200, b"{}"))
    assert (await post_once(upstream.url, min_bytes_per_s=1e9)).body == b"{}"


async def test_an_answer_must_begin_in_time(upstream):
    """An upstream that says nothing is given up at the limit of the first byte."""
    upstream.gate = asyncio.Event()
    async with asyncio.timeout(FOR_EVER):
        with pytest.raises(UpstreamTimeout, match=r"no answer within \d\.\d s"):
            await post_once(upstream.url, first_byte_s=0.1)
    upstream.gate.set()


async def test_a_stale_connection_is_a_cut_one():
    """A kept connection that is reset on its next use is unreachable; a new one works."""
    connections = []
    answer = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}"

    async def serve(reader, writer):
        connections.append(writer)
        served = 0
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
            while True:
                await reader.readuntil(b"\r\n\r\n")
                await reader.readexactly(len(PAYLOAD))
                if served and len(connections) == 1:
                    writer.transport.abort()
                    return
                served += 1
                writer.write(answer)
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1"
    async with server, transport_to(url) as transport:
        assert (await post(transport)).body == b"{}"
        with pytest.raises(Unreachable, match=r"connection reset|disconnected"):
            await post(transport)
        assert (await post(transport)).body == b"{}"
    assert len(connections) == 2


async def test_no_kept_connection_is_trusted_after_one_was_stale(upstream):
    """Of three stale connections one is found out; a call under way on a fourth goes on."""
    together = asyncio.Barrier(4)
    arrived, over = asyncio.Event(), asyncio.Event()

    async def meet(*_):
        await together.wait()
        return web.Response()

    async def last(*_):
        arrived.set()
        await over.wait()
        return web.Response()

    async with transport_to(upstream.url) as transport:
        upstream.script += [meet] * 4
        await asyncio.gather(*(post(transport) for _ in range(4)))
        upstream.script.append(last)
        under_way = asyncio.create_task(post(transport))
        await arrived.wait()
        upstream.always = stale()
        with pytest.raises(Unreachable, match=r"connection reset|disconnected"):
            await post(transport)
        assert (await post(transport)).status == 200
        over.set()
        assert (await under_way).status == 200
        upstream.always = None
        assert (await post(transport)).status == 200


async def test_connections_are_kept(upstream):
    """Calls one after another share a connection."""
    ports = set()

    async def act(request, _):
        ports.add(request.transport.get_extra_info("peername"))
        return web.Response()

    upstream.always = act
    async with transport_to(upstream.url) as transport:
        for _ in range(3):
            await post(transport)
    assert len(ports) == 1
