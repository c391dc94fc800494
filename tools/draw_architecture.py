"""Draws docs/architecture.svg from the imports of the packages. Needs the standard library only.

    python tools/draw_architecture.py            # writes the picture
    python tools/draw_architecture.py --check    # exit code 1 if it is out of date

Each package is a column of layers. An import goes to the same layer, to one below it, or to a
package on the right; tests/test_architecture.py checks it.
"""

import ast
import sys
from collections import Counter
from collections.abc import Iterator
from html import escape
from itertools import chain
from pathlib import Path
from textwrap import wrap

ROOT = Path(__file__).parents[1]
PICTURE = ROOT / "docs" / "architecture.svg"
NAME = "embedding_proxy"

PACKAGES: dict[str, dict[str, tuple[str, ...]]] = {
    "proxy": {
        "entry points": ("proxy/__init__.py", "proxy/__main__.py", "proxy/blocking.py"),
        "cli": ("proxy/cli/",),
        "diagnostics, importers": ("proxy/diagnostics/", "proxy/importers/"),
        "http": ("proxy/http/",),
        "service": ("proxy/service/",),
        "config": ("proxy/config/",),
        "log, request fields": ("proxy/log.py", "proxy/request_fields.py"),
    },
    "index": {
        "migration": ("index/migration/",),
        "outbox, Qdrant": ("index/",),
    },
    "cache": {
        "maintenance": ("cache/maintenance/",),
        "look-up and purchase": (
            "cache/embedder.py",
            "cache/in_flight.py",
            "cache/shared_task.py",
            "cache/cached_hit.py",
            "cache/tiers.py",
        ),
        "disk, shared": ("cache/disk/", "cache/shared/"),
        "keys, records, ledger": ("cache/",),
    },
    "providers": {
        "adapters": (
            "providers/registry.py",
            "providers/vendors.py",
            "providers/openai_compatible.py",
            "providers/local.py",
            "providers/route_check.py",
        ),
        "scheduling": ("providers/scheduling/",),
        "routing": ("providers/routing/",),
        "upstream": ("providers/upstream/",),
        "shared types and data": ("providers/",),
    },
}
"""The packages, and the layers of each, top to bottom. A file belongs to the longest path here that
it begins with."""

LAYERS = {
    path: (package, layer)
    for package, layers in PACKAGES.items()
    for layer, paths in layers.items()
    for path in paths
}
FILES = sorted(
    file.relative_to(ROOT).as_posix()
    for package in PACKAGES
    for file in (ROOT / package).rglob("*.py")
)


def layer_of(file: str) -> tuple[str, str]:
    """Return package and layer of a file, as in PACKAGES."""
    return LAYERS[max((path for path in LAYERS if file.startswith(path)), key=len)]


def is_downward(origin: str, target: str) -> bool:
    """Tell whether a file may import another one, by the order of packages and layers."""
    (package, layer), (other, below) = layer_of(origin), layer_of(target)
    if package != other:
        return [*PACKAGES].index(package) < [*PACKAGES].index(other)
    return [*PACKAGES[package]].index(layer) <= [*PACKAGES[package]].index(below)


def imports(file: str) -> set[str]:
    """Return the files of this project that a file imports, anywhere in it."""
    names: set[str] = set()
    parts = [NAME, *file.removesuffix(".py").split("/")]
    for node in ast.walk(ast.parse((ROOT / file).read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = parts[: -node.level] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            names |= {f"{base}.{alias.name}" for alias in node.names}
    return {found for name in names if (found := _file(name)) is not None and found != file}


def _file(name: str) -> str | None:
    """Return the file of an imported name: a module, or what a module defines."""
    first, *parts = name.split(".")
    if first != NAME:
        return None
    for end in (parts, parts[:-1]):
        for file in ("/".join(end) + ".py", "/".join([*end, "__init__.py"])):
            if file in FILES:
                return file
    return None


EDGES = sorted((file, target) for file in FILES for target in imports(file))

WIDTH, GAP, MARGIN, TOP, LINE = 268, 44, 24, 150, 15
STYLE = """
text { font: 12px system-ui, sans-serif; fill: #1f2933 }
.modules { font: 11px ui-monospace, monospace; fill: #52606d }
.count { font: 11px system-ui, sans-serif; paint-order: stroke; stroke: #fff; stroke-width: 4 }
.package { font-size: 17px; font-weight: 600 }
.layer { font-size: 13px; font-weight: 600 }
.column { fill: #f5f7fa; stroke: #cbd2d9 }
.box { fill: #fff; stroke: #9aa5b1 }
path { fill: none; stroke: #2b6cb0; stroke-width: 1.4; marker-end: url(#down) }
.across { stroke: #1f2933 }
"""
MARKER = (
    '<marker id="down" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7"'
    ' orient="auto"><polygon points="0,0 8,4 0,8" fill="#2b6cb0"/></marker>'
)


def _text(x: int, y: int, text: str, kind: str, anchor: str = "start") -> str:
    return f'<text x="{x}" y="{y}" class="{kind}" text-anchor="{anchor}">{escape(text)}</text>'


def _column(
    package: str, left: int, heights: dict[tuple[str, str], tuple[int, int]]
) -> Iterator[str]:
    """Draw a package, and note where its layers are: the top and the bottom of each."""
    y = TOP + 44
    parts = []
    for layer in PACKAGES[package]:
        stems = [Path(file).stem for file in FILES if layer_of(file) == (package, layer)]
        lines = wrap(", ".join(stem for stem in stems if stem != "__init__"), 30)
        height = 28 + LINE * len(lines)
        heights[package, layer] = y, y + height
        parts.append(
            f'<rect class="box" x="{left + 24}" y="{y}" width="{WIDTH - 48}"'
            f' height="{height}" rx="5"/>'
        )
        is_folder = any(path == f"{package}/{layer}/" for path in PACKAGES[package][layer])
        parts.append(_text(left + 34, y + 18, f"{layer}/" if is_folder else layer, "layer"))
        for number, line in enumerate(lines):
            parts.append(_text(left + 34, y + 35 + LINE * number, line, "modules"))
        y += height + 16
    yield (f'<rect class="column" x="{left}" y="{TOP}" width="{WIDTH}" height="{y - TOP}" rx="8"/>')
    yield _text(left + WIDTH // 2, TOP + 28, f"{package}/", "package", "middle")
    yield from parts


def _inner(left: dict[str, int], heights: dict[tuple[str, str], tuple[int, int]]) -> Iterator[str]:
    """Draw the arrows between the layers of each package."""
    pairs = Counter((layer_of(file), layer_of(target)) for file, target in EDGES)
    for ((package, layer), (other, below)), _ in sorted(pairs.items()):
        if package != other or layer == below:
            continue
        order = [*PACKAGES[package]]
        steps = order.index(below) - order.index(layer)
        (_, bottom), (top, _) = heights[package, layer], heights[other, below]
        x, bow = left[package] + 24, min(6 + 3 * steps, 22)
        start, end = bottom - 8, top + 8 + 2 * steps
        yield f'<path d="M{x},{start} C{x - bow},{start} {x - bow},{end} {x},{end}"/>'


def _across(left: dict[str, int]) -> Iterator[str]:
    """Draw the arrows between packages above them, with the number of imports."""
    pairs = Counter((layer_of(file)[0], layer_of(target)[0]) for file, target in EDGES)
    order = [*PACKAGES]
    for (package, other), count in sorted(pairs.items()):
        steps = order.index(other) - order.index(package)
        if steps == 0:
            continue
        start, end = left[package] + WIDTH // 2 + 14 * steps, left[other] + WIDTH // 2 - 14 * steps
        y = TOP - 26 * steps - 10
        yield f'<path class="across" d="M{start},{TOP} C{start},{y} {end},{y} {end},{TOP}"/>'
        yield _text(
            (start + end) // 2, (TOP + 3 * y) // 4 - 4, f"{count} imports", "count", "middle"
        )


def drawn() -> str:
    """Return the picture, as SVG."""
    left = {package: MARGIN + number * (WIDTH + GAP) for number, package in enumerate(PACKAGES)}
    heights: dict[tuple[str, str], tuple[int, int]] = {}
    columns = [
        *chain.from_iterable(_column(package, left[package], heights) for package in PACKAGES)
    ]
    width = 2 * MARGIN + len(PACKAGES) * (WIDTH + GAP) - GAP
    height = max(bottom for _, bottom in heights.values()) + 56
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img">',
        "<title>The packages, their layers, and who imports whom</title>",
        f"<style>{STYLE}</style>",
        f"<defs>{MARKER}</defs>",
        f'<rect width="{width}" height="{height}" fill="#fff"/>',
        _text(MARGIN, 30, "Who imports whom", "package"),
        *columns,
        *_inner(left, heights),
        *_across(left),
        _text(
            MARGIN,
            height - 14,
            "Drawn from the imports by tools/draw_architecture.py.",
            "modules",
        ),
        "</svg>",
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Write the picture, or with --check say whether it is the one that would be written."""
    picture = drawn()
    if sys.argv[1:] == ["--check"]:
        if PICTURE.read_text(encoding="utf-8") != picture:
            sys.exit(f"{PICTURE.relative_to(ROOT)} is out of date: make picture")
        return
    PICTURE.write_text(picture, encoding="utf-8")


if __name__ == "__main__":
    main()
