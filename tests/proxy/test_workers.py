"""Several processes behind one port: they share a store, are replaced, and end together."""

import json
import os
import signal
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path
from urllib.request import Request, urlopen

import pytest

MODEL = "wordllama-embed"


@contextmanager
def _running(tmp_path, *options):
    """Run the proxy with two workers; give the parent process and the base URL."""
    config = tmp_path / "config.yaml"
    config.write_text(f"cache: {{directory: {tmp_path / 'cache'}}}\n")
    command = [sys.executable, "-m", "proxy", "serve", "--port", "0", "--config", str(config)]
    with (
        (tmp_path / "log").open("wb") as log,
        subprocess.Popen(
            [*command, "--workers", "2", *options], stdout=subprocess.PIPE, stderr=log, text=True
        ) as parent,
    ):
        try:
            line = parent.stdout.readline().strip()
            yield parent, line.removeprefix("export OPENAI_BASE_URL=")
        finally:
            parent.kill()


def _children(parent) -> set[int]:
    path = Path(f"/proc/{parent.pid}/task/{parent.pid}/children")
    return {int(pid) for pid in path.read_text(encoding="ascii").split()}


def _until_nobody_answers(url):
    while True:
        urlopen(url, timeout=20).close()


def _fresh(url, text):
    """Ask over a connection of its own, so that either worker may get it."""
    body = json.dumps({"model": MODEL, "input": text}).encode()
    with urlopen(Request(f"{url}/embeddings", body), timeout=20) as reply:
        return reply.headers["x-cache"]


def test_workers_share_what_one_of_them_bought(tmp_path):
    """What one worker stored is a hit at every other, and both end in good order."""
    with _running(tmp_path) as (parent, url):
        assert len(_children(parent)) == 2
        assert _fresh(url, "once") == "miss"
        assert {_fresh(url, "once") for _ in range(20)} == {"hit"}
        parent.send_signal(signal.SIGTERM)
        assert parent.wait(20) == 0


def test_a_worker_that_dies_is_replaced(tmp_path):
    """The others go on meanwhile, and soon there are as many as before."""
    with _running(tmp_path) as (parent, url):
        before = _children(parent)
        victim = min(before)
        os.kill(victim, signal.SIGKILL)
        while len(_children(parent) - {victim}) < 2:
            assert _fresh(url, "text") in ("hit", "miss")
        parent.send_signal(signal.SIGINT)
        assert parent.wait(20) == 130
    assert "it is replaced" in (tmp_path / "log").read_text()


def test_workers_end_with_their_parent(tmp_path):
    """Nobody keeps the port when the parent was killed."""
    with _running(tmp_path) as (parent, url):
        parent.kill()
        parent.wait()
        with pytest.raises(OSError, match=r"refused|reset|closed"):
            _until_nobody_answers(url.removesuffix("/v1") + "/livez")


def test_workers_that_cannot_start_are_one_error(tmp_path):
    """A store that does not open ends the start with exit code 1, and says why."""
    (tmp_path / "cache").write_text("a file")
    with _running(tmp_path) as (parent, url):
        assert url == ""
        assert parent.wait(20) == 1
    log = (tmp_path / "log").read_text()
    assert "File exists" in log
    assert "Traceback" not in log
