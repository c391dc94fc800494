"""Makes the environments of the clients that are tried: in .clients/, and for Node in place.

    python tests/client_environments.py [NAME...]

Without a name, those that CI tries. One that was made from the same pins is left as it is. Nothing
is needed of the machine but Python: uv, Node and npm come from the pins as well.
"""

import asyncio
import os
import shutil
import sys
from collections.abc import Iterable
from pathlib import Path

HERE = Path(__file__).parent
PINS = HERE / "clients" / "pins"
NODE = HERE / "clients" / "node"
ENVIRONMENTS = HERE.parent / ".clients"
TOOLS = ENVIRONMENTS / "tools" / "bin"
OWN = "openai-3"
"""The client of the suite's own environment, which needs no other."""
ALWAYS = ("openai-1", "openai-2", OWN, "node")
"""Those that CI tries."""


def _pins(name: str) -> Path:
    return NODE / "package-lock.json" if name == "node" else PINS / f"{name}.txt"


def _made(name: str) -> Path:
    """Return where the pins are noted of which an environment was made."""
    return (NODE / "node_modules" if name == "node" else ENVIRONMENTS / name) / ".pins"


def is_made(name: str) -> bool:
    """Say whether an environment is there, of the pins as they are now."""
    if name == OWN:
        return True
    made = _made(name)
    return made.exists() and made.read_bytes() == _pins(name).read_bytes()


def program(name: str) -> Path:
    """Return what runs the scripts of an environment."""
    if name == OWN:
        return Path(sys.executable)
    return TOOLS / "node" if name == "node" else ENVIRONMENTS / name / "bin" / "python"


async def _run(*command: str | Path, folder: Path = HERE) -> None:
    # npm looks for its Node there.
    env = {**os.environ, "PATH": f"{TOOLS}{os.pathsep}{os.environ['PATH']}"}
    process = await asyncio.create_subprocess_exec(*command, cwd=folder, env=env)
    if await process.wait():
        raise SystemExit(f"failed: {' '.join(map(str, command))}")


async def _make(name: str) -> None:
    print(f"making the environment of {name}", flush=True)
    made, pins = _made(name), _pins(name)
    folder = made.parent
    shutil.rmtree(folder, ignore_errors=True)
    if name == "tools":
        pip = (folder / "bin" / "python", "-m", "pip", "install", "--quiet", "--require-hashes")
        await _run(sys.executable, "-m", "venv", folder)
        await _run(*pip, "--requirement", pins)
    elif name == "node":
        await _run(TOOLS / "npm", "ci", "--no-audit", "--no-fund", "--ignore-scripts", folder=NODE)
    else:
        await _run(TOOLS / "uv", "venv", "--quiet", "--python", sys.executable, folder)
        sync = (TOOLS / "uv", "pip", "sync", "--quiet", "--python", folder / "bin" / "python")
        await _run(*sync, pins)
    made.write_bytes(pins.read_bytes())


async def make(names: Iterable[str]) -> None:
    """Make those environments that are not there yet; the tools first, for they make the others."""
    missing = [name for name in names if not is_made(name)]
    if missing and not is_made("tools"):
        await _make("tools")
    await asyncio.gather(*map(_make, missing))


if __name__ == "__main__":
    asyncio.run(make(sys.argv[1:] or ALWAYS))
