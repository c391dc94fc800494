"""The log: nobody but the proxy begins a line in it, and nobody fills it."""

import io
import logging
import os
import re
import subprocess
import sys
from collections.abc import Iterator

import pytest
from clock import Clock
from embedding_proxy.proxy import log
from fault_server import status
from hypothesis import given
from hypothesis import strategies as st
from talk import Talk

MODEL = "text-embedding-3-small"
FORGED = "2026-01-01 00:00:00,000 ERROR everything is lost"
EVIL = f"m\r\n{FORGED}\n\x1b[2J\x1b]0;title\x07\x00\x85\u2028\u202e\x9b31m"
LINE = re.compile(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3} [A-Z]+ |\| |Traceback")


@pytest.fixture
def clock() -> Clock:
    """Give a clock that stands still."""
    return Clock()


@pytest.fixture
def written(clock) -> Iterator[io.StringIO]:
    """Give what is written to the log."""
    stream = io.StringIO()
    handler = log.handler(stream, lambda: clock.now)
    root = logging.getLogger()
    before = root.level
    root.addHandler(handler)
    root.setLevel(logging.DEBUG)
    yield stream
    root.setLevel(before)
    root.removeHandler(handler)


def _is_whole(text):
    """Tell whether a log has only lines that the proxy began, of printable characters."""
    lines = text.split("\n")[:-1]
    return all(LINE.match(line) and line.isprintable() for line in lines)


async def test_names_of_models_and_messages_of_upstreams_forge_no_line(
    written, upstream, start_proxy
):
    """Line breaks, ESC and the like are escaped, whoever sends them."""
    error = {"error": {"message": EVIL, "type": EVIL, "code": EVIL, "param": EVIL}}
    upstream.always = status(500, error)
    proxy = await start_proxy(openai=upstream)
    for model in (MODEL, EVIL, f"openai/{EVIL}"):
        await proxy.post({"model": model, "input": "a", EVIL: 1})
    reply = upstream.reply({"model": EVIL, "input": "a"})
    upstream.always = status(200, {**reply, "model": EVIL})
    await proxy.post({"model": MODEL, "input": "a"})
    assert written.getvalue()
    assert _is_whole(written.getvalue())
    assert f"\n{FORGED}" not in written.getvalue()


@pytest.mark.parametrize("exception", [False, True])
def test_a_record_is_one_line_whatever_it_holds(exception, written):
    """In the message, in its arguments, and in the message of an exception."""
    error = ValueError(EVIL) if exception else None
    logging.getLogger("embedding_proxy.x").error("%s\n%s", EVIL, EVIL, exc_info=error)
    assert _is_whole(written.getvalue())
    assert f"\n{FORGED}" not in written.getvalue()
    assert "everything is lost" in written.getvalue()


def test_a_very_long_message_is_cut(written):
    """It says how much is missing."""
    logging.getLogger("embedding_proxy.x").warning("a%s", "b" * 1_000_000)
    assert len(written.getvalue()) < log.MAX_MESSAGE + 100
    assert "(998,001 more characters)" in written.getvalue()


@given(st.text())
def test_what_is_escaped_is_printable(text):
    """Also halves of surrogate pairs, which no stream could write."""
    assert log.escape(text).isprintable()


async def test_repeated_refusals_are_not_all_written(written, start_proxy):
    """A client that repeats a refused request does not fill the disk, whatever it varies."""
    proxy = await start_proxy()
    for n in range(log.BURST + 10):
        async with Talk(proxy.url, f"BOGUS{n}\r\n\r\n".encode()) as talk:
            assert (await talk.response())[0] == 400
    assert written.getvalue().count("not valid HTTP") == log.BURST


def test_what_was_left_out_is_counted(written, clock):
    """The next record of the same place says how many there were."""
    for _ in range(log.BURST + 7):
        _refuse("one text or")
    assert written.getvalue().count("\n") == log.BURST
    clock.now += log.INTERVAL_S
    _refuse("another")
    assert written.getvalue().endswith("WARNING another (7 more like this were not written)\n")


def _refuse(text):
    logging.getLogger("embedding_proxy.x").warning("%s", text)


async def test_no_provider_is_left_out_at_a_start(written, start_proxy, monkeypatch):
    """Of many that are skipped for want of a key, each is named."""
    names = [f"provider-{n}" for n in range(30)]
    provider = {"kind": "openai", "base_url": "http://127.0.0.1:1/v1", "api_key_env": "NO_SUCH"}
    await start_proxy(providers=dict.fromkeys(names, provider))
    assert all(f"provider {name} is skipped" in written.getvalue() for name in names)


def test_other_places_are_heard_meanwhile(written):
    """A flood in one place hides nothing that another place says."""
    for _ in range(10 * log.BURST):
        _refuse("flood")
    logging.getLogger("embedding_proxy.x").error("the key is refused")
    assert written.getvalue().endswith("ERROR the key is refused\n")


def test_mistakes_of_clients_hide_no_warning(written):
    """One statement tells of every request that failed: a flood of 4xx leaves room for a 5xx."""
    for level in [logging.INFO] * (10 * log.BURST) + [logging.WARNING]:
        logging.getLogger("embedding_proxy.x").log(level, "request %d", level)
    assert written.getvalue().endswith(f"WARNING request {logging.WARNING}\n")


def test_the_command_writes_its_log_so():
    """`embedding-proxy` itself escapes what it logs."""
    code = (
        "import logging, sys; from embedding_proxy.proxy.cli import main as cli;"
        "cli._root(); logging.getLogger('embedding_proxy').error('a\\n\\x1b[2Jb')"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=os.environ, check=True
    )
    assert done.stderr.endswith("ERROR a\\n\\x1b[2Jb\n")
