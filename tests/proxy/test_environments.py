"""The command in poor surroundings: one line and an exit code, and no traceback."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CONFIG = """
cache: {directory: ./store}
models: {prüfung: {space: s, routes: [{provider: local, model: m}]}}
"""
OLD = "llm: {embedding: {provider: openai, model: text-embedding-3-small}}\n"
PURGE = ["cache", "purge", "--all", "--config", "c.yaml"]
SHOW = ["config", "show", "--config", "c.yaml"]
SERVE = ["serve", "--port", "0", "--config", "c.yaml"]


@pytest.fixture
def run(tmp_path):
    """Give a function that runs the command by a shell, in a folder with an odd name."""
    folder = tmp_path / "wörk dir\nx"
    folder.mkdir()
    (folder / "c.yaml").write_text(CONFIG)
    (folder / "old.yaml").write_text(OLD)

    def run(arguments, before="", after="", **variables) -> subprocess.CompletedProcess[str]:
        inherited = {name: os.environ[name] for name in ("PATH", "TMPDIR") if name in os.environ}
        return subprocess.run(
            ["/bin/sh", "-c", f'{before} exec "$@" {after}', "sh", sys.executable, *arguments],
            cwd=folder,
            env={**inherited, "HOME": str(tmp_path), "PYTHONPATH": str(ROOT), **variables},
            capture_output=True,
            text=True,
            errors="replace",
            stdin=subprocess.DEVNULL,
            check=False,
        )

    return lambda arguments, *words, **options: run(
        ["-m", "embedding_proxy", *arguments], *words, **options
    )


POOR_LOCALE = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}


@pytest.mark.parametrize(
    ("arguments", "options", "code", "told"),
    [
        (SERVE, {"before": "ulimit -n 20;"}, 1, "the limit on open files (ulimit -n) is 20, and"),
        (SHOW, {"before": "ulimit -n 12;"}, 0, ""),
        (SHOW, {"before": "ulimit -v 60000;"}, 1, "(ulimit -v)"),
        (["config", "show"], {"HOME": ""}, 2, "cache.directory: HOME is no absolute path; set it"),
        (["cache", "stats"], {"HOME": "/nowhere"}, 1, "there is no store yet"),
        (PURGE, {"after": "<&-"}, 2, "there is no terminal to ask on"),
        (SHOW, {"after": ">&-"}, 0, ""),
        (["frobnicate"], {"after": "2>&-"}, 2, ""),
        (SHOW, {"after": "<&- >&- 2>&-"}, 0, ""),
        (SHOW, {"after": ">/dev/full"}, 1, "No space left on device"),
        (PURGE, {"after": "2>/dev/full"}, 2, ""),
        (SHOW, POOR_LOCALE, 0, ""),
        (["cache", "backup", "wörk/ü", "--config", "c.yaml"], POOR_LOCALE, 1, "no such folder"),
        (["--help"], {"COLUMNS": "20"}, 0, ""),
        (["cache", "stats", "--config", "c.yaml"], {"COLUMNS": "1"}, 1, "there is no store yet"),
        (["config", "convert", "old.yaml"], {"COLUMNS": "20", **POOR_LOCALE}, 0, ""),
    ],
    ids=str,
)
def test_what_the_surroundings_lack_is_said_in_a_line(arguments, options, code, told, run):
    """Limits, streams that are closed or full, no home, another encoding, a narrow terminal."""
    done = run(arguments, **options)
    assert done.returncode == code, done
    assert "Traceback" not in done.stdout + done.stderr
    assert told in done.stderr
    if code:
        *_, last = done.stderr.splitlines() or [""]
        assert last.startswith("embedding-proxy: ") or not told
