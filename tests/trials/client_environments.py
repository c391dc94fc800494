"""Makes the environments of the clients that are tried: in .clients/, and for Node in place.

    python client_environments.py [NAME...]

Without a name, those that CI tries. One that was made from the same pins is left as it is. For
those of Python and Node nothing is needed of the machine but Python: uv, Node and npm come from the
pins as well. Those of Go and Java need go, and java with mvn, on the PATH.
"""

import asyncio
import os
import shutil
import sys
from collections.abc import Iterable
from pathlib import Path

HERE = Path(__file__).parents[1]
PINS = HERE / "clients" / "pins"
NODE = HERE / "clients" / "node"
GO = HERE / "clients" / "go"
JAVA = HERE / "clients" / "java"
ENVIRONMENTS = HERE.parent / ".clients"
TOOLS = ENVIRONMENTS / "tools" / "bin"
OWN = "openai-3"
"""The client of the suite's own environment, which needs no other."""
ALWAYS = ("openai-1", "openai-2", OWN, "node")
"""Those that CI tries."""


def folder_of(name: str) -> Path:
    """Return the folder of the scripts of an environment."""
    others = {"node": NODE, "go": GO, "java": JAVA}
    return others.get(name, HERE / "clients" / "python")


def _pins(name: str) -> bytes:
    """Return what an environment is made of; for compiled clients their sources are part of it."""
    match name:
        case "go" | "java":
            sources = sorted(file for file in folder_of(name).iterdir() if file.is_file())
            return b"".join(file.read_bytes() for file in sources)
        case "node":
            return (NODE / "package-lock.json").read_bytes()
    return (PINS / f"{name}.txt").read_bytes()


def _made(name: str) -> Path:
    """Return where the pins are noted of which an environment was made."""
    return (NODE / "node_modules" if name == "node" else ENVIRONMENTS / name) / ".pins"


def is_made(name: str) -> bool:
    """Say whether an environment is there, of the pins as they are now."""
    if name == OWN:
        return True
    made = _made(name)
    return made.exists() and made.read_bytes() == _pins(name)


def command(name: str, script: str) -> list[str | Path]:
    """Return the command that runs a script of an environment."""
    file = folder_of(name) / script
    match name:
        case "go":
            return [ENVIRONMENTS / "go" / "client"]
        case "java":
            built = ENVIRONMENTS / "java" / "target"
            return ["java", "-cp", f"{built}/classes{os.pathsep}{built}/dependency/*", "TryOpenAI"]
        case "node":
            return [TOOLS / "node", file]
    own = Path(sys.executable)
    return [own if name == OWN else ENVIRONMENTS / name / "bin" / "python", file]


async def _run(*command: str | Path, folder: Path = HERE) -> None:
    # npm looks for its Node there.
    env = {**os.environ, "PATH": f"{TOOLS}{os.pathsep}{os.environ['PATH']}"}
    process = await asyncio.create_subprocess_exec(*command, cwd=folder, env=env)
    if await process.wait():
        raise SystemExit(f"failed: {' '.join(map(str, command))}")


def _tool(name: str) -> str:
    """Return the path of a tool of the machine. Raises SystemExit when it has none."""
    found = shutil.which(name)
    if found is None:
        raise SystemExit(f"{name} is not on the PATH: install it, or name other clients to try")
    return found


async def _make(name: str) -> None:
    print(f"making the environment of {name}", flush=True)
    made, pins = _made(name), _pins(name)
    folder, requirements = made.parent, PINS / f"{name}.txt"
    shutil.rmtree(folder, ignore_errors=True)
    if name == "tools":
        pip = (folder / "bin" / "python", "-m", "pip", "install", "--quiet", "--require-hashes")
        await _run(sys.executable, "-m", "venv", folder)
        await _run(*pip, "--requirement", requirements)
    elif name == "node":
        await _run(TOOLS / "npm", "ci", "--no-audit", "--no-fund", "--ignore-scripts", folder=NODE)
    elif name == "go":
        await _run(_tool("go"), "build", "-o", folder / "client", ".", folder=GO)
    elif name == "java":
        shutil.copytree(JAVA, folder)
        goals = ("compiler:compile", "dependency:copy-dependencies")
        await _run(_tool("mvn"), "--quiet", "--batch-mode", *goals, folder=folder)
    else:
        await _run(TOOLS / "uv", "venv", "--quiet", "--python", sys.executable, folder)
        sync = (TOOLS / "uv", "pip", "sync", "--quiet", "--python", folder / "bin" / "python")
        await _run(*sync, requirements)
    made.write_bytes(pins)


async def make(names: Iterable[str]) -> None:
    """Make those environments that are not there yet; the tools first, for they make the others."""
    missing = [name for name in names if not is_made(name)]
    if not {*missing} <= {"go", "java"} and not is_made("tools"):
        await _make("tools")
    await asyncio.gather(*map(_make, missing))


if __name__ == "__main__":
    asyncio.run(make(sys.argv[1:] or ALWAYS))
