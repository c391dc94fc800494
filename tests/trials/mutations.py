"""Faults planted one at a time, each with the tests that must notice it.

`make mutations` plants each in a copy of the tree, by replacing a text, and runs its tests there. A
fault that no test notices is a gap in the suite; so is a text that the code no longer has: then the
row is brought up to date. Run it before tests are removed or joined.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

import yaml

ROOT = Path(__file__).parents[2]
LEFT_OUT = (".git", ".venv", "build", "dist", ".*_cache", ".hypothesis", "__pycache__")
SECONDS = 600
"""After so long tests that wait for what a fault keeps from coming have noticed it."""


class Fault(NamedTuple):
    """One text of the code replaced by another."""

    what: str
    file: str
    right: str
    wrong: str
    tests: str
    """Files, below tests/."""


FAULTS = [
    Fault(**row)
    for row in yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text(encoding="utf-8"))
]


def plant(tree: Path, fault: Fault) -> str:
    """Say whether a fault in a copy of the tree is noticed: "noticed", or what happened instead."""
    file = tree / fault.file
    source = file.read_text(encoding="utf-8")
    if source.count(fault.right) != 1:
        return "OUT OF DATE: the text is not there once"
    file.write_text(source.replace(fault.right, fault.wrong), encoding="utf-8")
    options = ("-q", "-x", "-p", "no:cacheprovider", "--hypothesis-seed=1")
    tests = [f"tests/{test}" for test in fault.tests.split()]
    try:
        # What was compiled of the right source may look as new as the wrong one.
        done = subprocess.run(
            [sys.executable, "-m", "pytest", *options, *tests],
            cwd=tree,
            env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1"},
            capture_output=True,
            text=True,
            check=False,
            timeout=SECONDS,
        )
    except subprocess.TimeoutExpired:
        return "noticed"
    finally:
        file.write_text(source, encoding="utf-8")
    if done.returncode == 1:
        return "noticed"
    return "MISSED" if done.returncode == 0 else f"BROKEN: {done.stdout[-300:]}"


def main() -> int:
    """Plant the faults whose words are given, or all; return 1 unless all are noticed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "words", nargs="*", help="only faults whose name or file holds one of these"
    )
    words = parser.parse_args().words
    chosen = [one for one in FAULTS if not words or any(w in one.what + one.file for w in words)]
    failed = 0
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder) / "tree"
        shutil.copytree(ROOT, tree, ignore=shutil.ignore_patterns(*LEFT_OUT))
        for fault in chosen:
            told = plant(tree, fault)
            failed += told != "noticed"
            print(f"{told:8} {fault.what} ({fault.file})", flush=True)
    print(f"{len(chosen) - failed} of {len(chosen)} faults were noticed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
