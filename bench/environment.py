"""Environments of their own, in `.bench`, for what is measured or measures and is none of ours."""

import subprocess
import sys
import venv
from pathlib import Path

from .process import ROOT

KEPT = ROOT / ".bench"


def python(*requirements: str) -> Path:
    """Return the interpreter of an environment that has these; it is made if it is not there.

    Raises subprocess.CalledProcessError if they cannot be installed.
    """
    name = "".join(c if c.isalnum() else "-" for c in requirements[0])
    folder = KEPT / name
    interpreter, done = folder / "bin" / "python", folder / "done"
    if not done.exists():
        print(f"bench: installing {', '.join(requirements)}", file=sys.stderr, flush=True)
        venv.create(folder, with_pip=True, clear=True)
        command = [str(interpreter), "-m", "pip", "install", "--quiet", *requirements]
        subprocess.run(command, check=True, stdout=sys.stderr)
        done.touch()
    return interpreter
