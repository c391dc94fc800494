"""One line of the log for each request: what it tells, in each form, and how many there may be."""

import io
import json
import logging
import re

import pytest
from embedding_proxy.proxy import log
from embedding_proxy.proxy.http.request_log import MAX_LINES_S, RequestLog
from fault_server import status, tokens_of

MODEL = {"space": "s/m", "dimensions": 8, "price": 2.0, "routes": [
    {"provider": "openai", "model": "m"}]}  # fmt: skip
KEYS = [{"key": "k", "admin": True, "name": "ci", "namespace": "team"}]
PARENT = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"


class Lines:
    """What the log has written."""

    def __init__(self, kind, stream):
        self.stream = stream
        self.handler = log.handler(stream)
        self.handler.setFormatter(log.formatter(kind, stream))

    def __iter__(self):
        return iter(self.stream.getvalue().splitlines())


class Terminal(io.StringIO):
    """A stream that says that it is a terminal."""

    def isatty(self):
        return True


@pytest.fixture
def lines():
    """Give a function that begins to write the log in some form."""
    root = logging.getLogger("embedding_proxy")
    level, made = root.level, []

    def begin(kind, stream=None):
        found = Lines(kind, stream or io.StringIO())
        root.addHandler(found.handler)
        root.setLevel(logging.INFO)
        made.append(found.handler)
        return found

    yield begin
    for handler in made:
        root.removeHandler(handler)
    root.setLevel(level)


@pytest.fixture
async def proxy(upstream, start_proxy):
    """Give a proxy with a key."""
    upstream.widths = {"m": 8}
    return await start_proxy(openai=upstream, models={"m": MODEL}, server={"keys": KEYS})


async def _ask(proxy, *texts, **headers):
    body = {"model": "m", "input": texts}
    return await proxy.post(body, Authorization="Bearer k", **headers)


async def test_a_line_tells_what_came_from_the_cache_and_what_was_billed(proxy, lines):
    """A JSON object for programs, with the ids of request and trace."""
    found = lines("json")
    await _ask(proxy, "one text")
    response = await _ask(proxy, "one text", "two", "two", traceparent=PARENT)
    told = [json.loads(line) for line in found if '"message": "request"' in line]
    line = told[1]
    assert line["request_id"] == response.headers["x-request-id"]
    assert line["trace_id"] == PARENT.split("-")[1]
    assert (line["client"], line["model"], line["provider"]) == ("ci", "m", "openai")
    assert (line["inputs"], line["hits"], line["misses"], line["coalesced"]) == (2, 1, 1, 0)
    assert line["tokens_billed"] == tokens_of("two")
    assert line["usd"] == pytest.approx(tokens_of("two") * 2e-6)
    assert (line["status"], line["level"]) == (200, "info")
    assert line["ms"] >= 0
    assert not [line for line in found if "one text" in line or "two" in line]


async def test_the_same_as_text(proxy, lines):
    """Names and values behind the message; a value of several words has quotes."""
    found = lines("text")
    response = await _ask(proxy, "a")
    own = response.headers["x-request-id"]
    (line,) = [line for line in found if " request " in line]
    assert f"request_id={own} client=ci model=m inputs=1 hits=0 misses=1" in line
    assert line.count(own) == 1


async def test_on_a_terminal_it_is_short(proxy, lines):
    """What a person wants to see at a glance."""
    found = lines("auto", Terminal())
    await _ask(proxy, "a")
    await _ask(proxy, "a", "b")
    first, second = (line for line in found if "tok" in line)
    assert re.fullmatch(r"\S+ miss 0/1  billed 1 tok at openai  [\d.]+ ms", first)
    assert re.fullmatch(r"\S+ partial 1/2  billed 1 tok at openai  saved 1 tok  [\d.]+ ms", second)


async def test_every_line_about_a_failed_request_has_its_id(proxy, upstream, lines):
    """Also those of the provider's failure, written far from the request."""
    found = lines("json")
    upstream.script.append(status(402))
    response = await _ask(proxy, "a")
    assert response.status == 402
    own = response.headers["x-request-id"]
    told = [json.loads(line) for line in found]
    of_provider = [line for line in told if "402" in line["message"]]
    assert len(of_provider) >= 2
    assert {line["request_id"] for line in of_provider} == {own}
    (last,) = [line for line in told if line.get("code")]
    assert (last["status"], last["model"], last["client"]) == (402, "m", "ci")


async def test_the_trace_goes_on_to_the_provider(proxy, upstream):
    """The header is sent on as it came, if it is well-formed."""
    await _ask(proxy, "a", traceparent=PARENT)
    await _ask(proxy, "b", traceparent="nonsense")
    await _ask(proxy, "c")
    sent = [call.headers.get("traceparent") for call in upstream.calls]
    assert sent == [PARENT, None, None]


async def test_a_hit_of_the_fast_path_has_its_line(proxy, lines):
    """It is answered without a handler, and told of like others."""
    found = lines("json")
    for _ in range(4):
        response = await _ask(proxy, "a")
    *_, line = [json.loads(one) for one in found]
    assert line["request_id"] == response.headers["x-request-id"]
    assert (line["client"], line["model"]) == ("ci", "m")
    assert (line["inputs"], line["hits"], line["tokens_saved"]) == (1, 1, 1)
    assert (line["tokens_billed"], line["usd"], line["status"]) == (0, 0, 200)


async def test_without_lines_for_requests_errors_are_told(upstream, start_proxy, lines):
    """`log.requests: false`."""
    upstream.widths = {"m": 8}
    proxy = await start_proxy(openai=upstream, models={"m": MODEL}, log={"requests": False})
    found = lines("text")
    assert (await proxy.post({"model": "m", "input": "a"})).status == 200
    assert (await proxy.post({"model": "m", "input": []})).status == 400
    assert [line for line in found if "request_id=" in line] == []
    assert len([line for line in found if "status 400" in line]) == 1


def test_lines_are_bounded_and_those_left_out_are_counted(lines):
    """A flood of hits writes MAX_LINES_S lines a second, and says how many there were."""
    now = 0.0
    requests = RequestLog()
    found = lines("json")
    head, body = b"HTTP/1.1 200 OK\r\nx-cache: hit\r\nx-cache-hits: 1\r\n", b'],"model":"m"}'

    def hit():
        if requests.has_room(now):
            requests.write_hit(head, body, "id", "ci", 0.001)

    for _ in range(3 * MAX_LINES_S):
        hit()
    now += 1
    hit()
    told = [json.loads(line) for line in found]
    assert len(told) == MAX_LINES_S + 1
    assert told[-1]["left_out"] == 2 * MAX_LINES_S


def test_a_traceback_is_part_of_the_object(lines):
    """One line, that parses; what stands where a key may be is masked."""
    found = lines("json")
    error = ValueError("Authorization: Bearer sk-1234567890\nand more")
    logging.getLogger("embedding_proxy.x").error("a failure", exc_info=error)
    (line,) = found
    told = json.loads(line)
    assert told["level"] == "error"
    assert "ValueError" in told["exception"]
    assert "sk-1234567890" not in line


def test_levels(monkeypatch):
    """`log.level` is about our own lines; those of libraries stay at info."""
    root, own = logging.getLogger(), logging.getLogger("embedding_proxy")
    for logger in (root, own):
        monkeypatch.setattr(logger, "level", logger.level)
    monkeypatch.setattr(root, "handlers", [])
    log.configure("debug", "text")
    assert (root.level, own.level) == (logging.INFO, logging.DEBUG)
    log.configure("warning", "text")
    assert (root.level, own.level) == (logging.WARNING, logging.WARNING)
    own.setLevel(logging.NOTSET)
