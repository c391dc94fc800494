"""What is released, into dist/: wheel, sdist, bill of materials, provenance, checksums.

    python tools/release.py release     # make release
    python tools/release.py sbom FILE   # make sbom: the bill of materials alone

A release is built from the last commit with that commit's date, so the same commit gives the same
bytes. The archives are checked, and the wheel is installed into an empty environment and embeds a
text there. Nothing is signed or published.
"""

import hashlib
import json
import os
import platform
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]
BUILD = ROOT / "build"
DIST = ROOT / "dist"
IMAGE = BUILD / "image"
"""An environment with what the image holds."""
SBOM = "sbom.cdx.json"
PROVENANCE = "provenance.json"
CHECKSUMS = "SHA256SUMS"
_SMOKE_TEST = """
import embedding_proxy
vectors = embedding_proxy.embed(["a text"], model="wordllama-embed").vectors
assert vectors.shape == (1, 256), vectors.shape
"""


def main(arguments: list[str]) -> int:
    """Run the command line; return the exit code."""
    try:
        match arguments:
            case ["release"]:
                release()
            case ["sbom", file]:
                install(ROOT)
                write_sbom(ROOT, Path(file))
            case _:
                sys.stderr.write(f"usage: {__doc__}\n")
                return 2
    except subprocess.CalledProcessError as error:
        sys.stderr.write(f"release: failed: {' '.join(map(str, error.cmd))}\n")
        return 1
    return 0


def release() -> None:
    """Build, check and describe all files. Raises CalledProcessError."""
    commit = _git("rev-parse", "HEAD")
    source = BUILD / "source"
    for folder in (source, DIST):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
    archive = BUILD / "source.tar"
    _git("archive", "--output", str(archive), "HEAD")
    _run("tar", "--extract", "--file", archive, "--directory", source)
    environ = {**os.environ, "SOURCE_DATE_EPOCH": _git("log", "-1", "--format=%ct")}
    build = ["-m", "hatchling", "build", "--directory", str(DIST)]
    _run(sys.executable, *build, cwd=source, environ=environ)
    archives = sorted(DIST.iterdir())
    _run(sys.executable, "-m", "twine", "check", "--strict", *map(str, archives))
    (wheel,) = DIST.glob("*.whl")
    install(source)
    try_wheel(wheel)
    write_sbom(source, DIST / SBOM)
    subjects = [*archives, DIST / SBOM]
    statement = provenance(source, subjects, commit)
    (DIST / PROVENANCE).write_text(json.dumps(statement, indent=2) + "\n", encoding="utf-8")
    lines = [f"{digest(file)}  {file.name}\n" for file in (*subjects, DIST / PROVENANCE)]
    (DIST / CHECKSUMS).write_text("".join(lines), encoding="utf-8")
    sys.stdout.write("".join(lines))


def install(source: Path) -> None:
    """Make an environment with the packages of the image. Raises CalledProcessError."""
    shutil.rmtree(IMAGE, ignore_errors=True)
    _run(sys.executable, "-m", "venv", "--without-pip", str(IMAGE))
    pins = str(source / "requirements" / "image.txt")
    _install("--require-hashes", "--requirement", pins)


def try_wheel(wheel: Path) -> None:
    """Install a wheel into that environment, and embed a text. Raises CalledProcessError."""
    _install("--no-deps", str(wheel))
    _run(IMAGE / "bin" / "embedding-proxy", "--version", cwd=BUILD)
    store = BUILD / "store"
    shutil.rmtree(store, ignore_errors=True)
    environ = {**os.environ, "XDG_DATA_HOME": str(store)}
    # From a folder without the sources, so that it is the wheel that runs.
    _run(IMAGE / "bin" / "python", "-c", _SMOKE_TEST, cwd=BUILD, environ=environ)


def write_sbom(source: Path, file: Path) -> None:
    """Write what that environment holds as CycloneDX. Raises CalledProcessError."""
    file.parent.mkdir(parents=True, exist_ok=True)
    _run(
        sys.executable, "-m", "cyclonedx_py", "environment", "--pyproject",
        str(source / "pyproject.toml"), "--output-reproducible", "--spec-version", "1.6",
        "--output-file", str(file), str(IMAGE / "bin" / "python"),
    )  # fmt: skip


def provenance(source: Path, files: list[Path], commit: str) -> dict[str, object]:
    """Return an in-toto statement about files: what they are made of, and how (SLSA provenance)."""
    project = tomllib.loads((source / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return {
        "_type": "https://in-toto.io/Statement/v1",
        "subject": [{"name": file.name, "digest": {"sha256": digest(file)}} for file in files],
        "predicateType": "https://slsa.dev/provenance/v1",
        "predicate": {
            "buildDefinition": {
                "buildType": "make release",
                "externalParameters": {"version": project["version"]},
                "internalParameters": {"python": platform.python_version()},
                "resolvedDependencies": [
                    {"name": "source", "digest": {"gitCommit": commit}},
                    *(
                        {"name": f"requirements/{file.name}", "digest": {"sha256": digest(file)}}
                        for file in sorted((source / "requirements").glob("*.txt"))
                    ),
                ],
            },
            "runDetails": {"builder": {"id": "make release, by hand"}},
        },
    }


def digest(file: Path) -> str:
    """Return the SHA-256 of a file, in hexadecimal digits."""
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def _install(*arguments: str) -> None:
    pip = ["-m", "pip", "--python", str(IMAGE / "bin" / "python"), "install", "--quiet"]
    _run(sys.executable, *pip, *arguments)


def _run(*command: str | Path, cwd: Path = ROOT, environ: dict[str, str] | None = None) -> None:
    subprocess.run(command, cwd=cwd, env=environ, check=True)


def _git(*arguments: str) -> str:
    command = ["git", *arguments]
    done = subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True)
    return done.stdout.strip()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
