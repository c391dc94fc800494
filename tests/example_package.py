"""Installs a package of `examples/` for a test: its folder and its metadata are put on the path."""

import tomllib
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"


def install(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Install `examples/NAME` as pip would, in `folder`; return the name of its module."""
    content = (EXAMPLES / name / "pyproject.toml").read_text(encoding="utf-8")
    project = tomllib.loads(content)["project"]
    module: str = project["name"].replace("-", "_")
    info = folder / f"{module}-{project['version']}.dist-info"
    info.mkdir(parents=True)
    head = f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n"
    (info / "METADATA").write_text(head)
    lines = []
    for group, points in project["entry-points"].items():
        lines += [f"[{group}]", *(f"{name} = {value}" for name, value in points.items())]
    (info / "entry_points.txt").write_text("\n".join(lines))
    monkeypatch.syspath_prepend(folder)
    monkeypatch.syspath_prepend(EXAMPLES / name)
    return module
