"""What all commands share: one line for a failure, progress that disturbs nobody, plain numbers."""

import io
import sys

import orjson
import pytest
from embedding_proxy.cache.disk.connection import StoreError
from embedding_proxy.cache.maintenance.archive import ArchiveError
from embedding_proxy.cache.maintenance.import_source import SourceError
from embedding_proxy.providers.errors import NoRoute
from embedding_proxy.proxy.cli import formatting, output
from embedding_proxy.proxy.cli.output import WorkFailed
from embedding_proxy.proxy.config.loader import ConfigError
from embedding_proxy.proxy.http.process import PortUnavailable
from embedding_proxy.proxy.http.workers import WorkerFailed

FAILURES = [
    (ConfigError, 2),
    (ArchiveError, 1),
    (NoRoute, 1),
    (PortUnavailable, 1),
    (SourceError, 1),
    (StoreError, 1),
    (WorkFailed, 1),
]


@pytest.mark.parametrize(("kind", "code"), FAILURES)
def test_what_is_foreseeable_is_one_line_and_a_code(kind, code, capsys):
    """Wrong configuration is code 2, all other failures 1; signs in a message are only signs."""
    with pytest.raises(SystemExit) as caught, output.handle_failures():
        raise kind("100% of {this} [red]failed[/red] ü")
    assert caught.value.code == code
    assert capsys.readouterr() == (
        "",
        "embedding-proxy: 100% of {this} [red]failed[/red] ü\n",
    )


@pytest.mark.parametrize(("ended", "code", "lines"), [(2, 2, 0), (1, 1, 0), (-9, 1, 1)])
def test_a_worker_that_has_said_why_needs_no_second_line(ended, code, lines, capsys):
    """The start ends as the worker did, and tells of one that could say nothing."""
    with pytest.raises(SystemExit) as caught, output.handle_failures():
        raise WorkerFailed(ended)
    assert caught.value.code == code
    assert len(capsys.readouterr().err.splitlines()) == lines


def test_a_mistake_of_ours_is_not_hidden():
    """What nobody foresaw is raised as it is; what succeeds ends nothing."""
    with pytest.raises(LookupError), output.handle_failures():
        raise LookupError
    with output.handle_failures():
        pass


def test_json_is_all_that_is_printed(capsys):
    """One value, valid, in UTF-8, and on standard output only."""
    value = {"a": [1, 2.5, None, True], "ü %s": "☃ \n \x1b"}
    output.print_json(value)
    out, err = capsys.readouterr()
    assert (orjson.loads(out), err) == (value, "")
    assert out.endswith("\n")


LINE_SECONDS = output.LINE_SECONDS
"""What it is outside of the tests."""


class _Clock:
    now = 100.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch):
    """Give a clock that goes only when it is told."""
    clock = _Clock()
    monkeypatch.setattr(output, "time", clock)
    monkeypatch.setattr(output, "LINE_SECONDS", LINE_SECONDS)
    return clock


@pytest.mark.parametrize(
    ("total", "lines"),
    [
        (4000, "working: 25%\nworking: 100%\n"),
        (None, "working: 1,000\nworking: 9,000\n"),
        (0, "working: 1,000\nworking: 9,000\n"),
    ],
)
def test_without_a_terminal_progress_is_a_line_now_and_then(total, lines, clock, capsys):
    """Nothing at first, then a line every five seconds, to stderr; never more than all."""
    with output.progress("working", total) as tell:
        for done, later in ((10, 4.9), (1000, 0.1), (1001, 0), (2000, 4.9), (9000, 0.1), (9001, 1)):
            clock.now += later
            tell(done)
    assert capsys.readouterr() == ("", lines)


class _Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("total", [None, 0, 10])
def test_on_a_terminal_progress_is_a_bar_that_goes_away(total, monkeypatch, capsys):
    """The bar is drawn on stderr and gone in the end; nothing goes to standard output."""
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    terminal = _Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    with output.progress("copying [bold]", total) as tell:
        tell(3)
        tell(20)
    assert "copying" in terminal.getvalue()
    assert terminal.getvalue().endswith("\x1b[2K")
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1.0 kB"), (1.5e9, "1.5 GB"), (2e15, "2000.0 TB")],
)
def test_bytes_for_people(count, text):
    """Sizes have a unit of thousands and at most one decimal."""
    assert formatting.size(count) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(-5, "0 s"), (0, "0 s"), (119, "119 s"), (120, "2 min"), (7200, "2 h"), (172_800, "2 d")],
)
def test_spans_for_people(seconds, text):
    """A span has the largest unit of which there are two; what is still to come is now."""
    assert formatting.age(seconds) == text


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("0s", 0),
        ("30s", 30),
        ("30min", 1800),
        ("1.5h", 5400),
        ("90d", 7_776_000),
        (" 2 w ", 1_209_600),
    ],
)
def test_spans_are_read(text, seconds):
    """Each unit is worth what it says, and blanks around the number do no harm."""
    assert output.parse_duration(text, "--o") == seconds
    assert output.past_time(1e9, text, "--o") == 1e9 - seconds
    assert output.past_time(1e9, None, "--o") is None


@pytest.mark.parametrize(
    "text", ["", "90", "d", "-5d", "5 d d", "1e3d", "5D", "5m", "five d", ".5d", "5,5d", "5d\n5d"]
)
def test_what_is_no_span_is_wrong_usage(text):
    """The message names the option and gives an example; nothing is guessed."""
    with pytest.raises(ConfigError, match=r"^--older-than: expected .*, as in 90d$"):
        output.parse_duration(text, "--older-than")
