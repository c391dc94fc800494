"""The command line, run in this process as it is typed."""

import json
import re
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
from embedding_proxy.proxy.cli import main
from leaks import WATCH

STORE = re.compile(r"^store: (.*)\n", re.MULTILINE)
"""The line by which a command says which store it works on."""


class Done(NamedTuple):
    """How a command ended. STORE is left out of `err`, so that this is what it complains of."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """What it printed with --json."""
        return json.loads(self.out)


Run = Callable[..., Done]
"""Runs `embedding-proxy` with these arguments. It opens an event loop of its own: where one runs
already, it is for another thread."""


def runner(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Return what runs commands; none of them ends in a traceback."""

    def run(*arguments: object) -> Done:
        monkeypatch.setattr(sys, "argv", ["embedding-proxy", *map(str, arguments)])
        with pytest.raises(SystemExit) as caught:
            main.main()
        out, err = capsys.readouterr()
        done = Done(caught.value.code or 0, out, STORE.sub("", err))
        WATCH.note("the output of a command", out + err)
        assert "Traceback" not in done.out + done.err
        return done

    return run
