"""The Makefile says which Python it needs, and replaces a `.venv` that cannot be used."""

import ast
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from pages import ROOT

OLD = """#!/bin/sh
# Python 3.10, as far as the Makefile asks.
case "$*" in
*version_info*) exit 1 ;;
*version_tuple*) echo 3.10 ;;
*) echo "Python 3.10.13" ;;
esac
"""


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """Give a folder with what `make demo` looks at."""
    shutil.copy(ROOT / "Makefile", tmp_path)
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    shutil.copytree(ROOT / "requirements", tmp_path / "requirements")
    return tmp_path


def _python(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)
    return path


def _make(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    # What the make that runs the suite was told is not meant for this one.
    environ = {k: v for k, v in os.environ.items() if k not in ("MAKEFLAGS", "MAKELEVEL", "PYTHON")}
    command = ["make", *arguments]
    return subprocess.run(
        command, cwd=folder, env=environ, capture_output=True, text=True, check=False
    )


def test_a_python_that_is_too_old_is_refused_before_pip(checkout):
    """The message names the version that is needed, the one that was found, and a remedy."""
    old = _python(checkout / "old", OLD)
    made = _make(checkout, "demo", f"PYTHON={old}")
    assert made.returncode != 0
    assert "needs Python 3.11 or newer" in made.stderr
    assert f"{old} is Python 3.10.13" in made.stderr
    assert "try: make PYTHON=python3.12 demo" in made.stderr
    assert not (checkout / ".venv").exists()


@pytest.mark.parametrize("text", [OLD, "#!/nowhere/python"])
def test_a_stale_environment_is_replaced(text, checkout):
    """One that is too old, or whose Python is gone, is made anew even if its stamp is there."""
    _python(checkout / ".venv" / "bin" / "python", text)
    (checkout / ".venv" / "demo").touch()
    planned = _make(checkout, "-n", "demo", f"PYTHON={sys.executable}").stdout
    assert "-m venv --clear .venv" in planned


def test_an_environment_of_another_python_than_asked_for_is_replaced(checkout):
    """Who names a PYTHON gets it."""
    (checkout / ".venv" / "bin").mkdir(parents=True)
    (checkout / ".venv" / "bin" / "python").symlink_to(sys.executable)
    (checkout / ".venv" / "demo").touch()
    assert "-m venv" not in _make(checkout, "-n", "demo").stdout
    assert "-m venv" not in _make(checkout, "-n", "demo", f"PYTHON={sys.executable}").stdout

    other = _python(checkout / "other", '#!/bin/sh\necho "3.99"\n')
    planned = _make(checkout, "-n", "demo", f"PYTHON={other}").stdout
    assert "-m venv --clear .venv" in planned


def test_quick_leaves_out_files_that_are_there():
    """The names in conftest.py are those of test files: a renamed one would be run again."""
    left_out = set()
    for node in ast.parse((ROOT / "tests" / "conftest.py").read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) in {"TRIALS", "SLOW"}:
            left_out |= ast.literal_eval(node.value)
    there = {file.stem for file in (ROOT / "tests").rglob("test_*.py")}
    assert len(left_out) > 20
    assert left_out <= there
    assert '-m "not slow"' in _make(ROOT, "-n", "quick").stdout


def test_lint_and_the_hooks_run_mypy_alike():
    """`make mypy` shows mypy the packages by links; `make lint` and pre-commit use it."""
    planned = _make(ROOT, "-n", "mypy").stdout
    assert "build/types/embedding_proxy" in planned
    links = planned[planned.index("mkdir -p build/types") :].rstrip()
    assert links in _make(ROOT, "-n", "lint").stdout
    assert "entry: make mypy" in (ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8")
