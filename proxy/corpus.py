"""Real text that every machine has: the docstrings of Python's standard library."""

import ast
import inspect
import sysconfig
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

# Not prose about the library: tests, vendored copies, and what is not always installed.
_LEFT_OUT = {"test", "tests", "idlelib", "lib2to3", "site-packages", "ensurepip", "__pycache__"}


@dataclass(frozen=True, slots=True)
class Docstring:
    """What a module, class or function says of itself."""

    name: str
    text: str


def standard_library() -> list[Docstring]:
    """Return all docstrings with at least four words, by module name; some thousands."""
    root = Path(sysconfig.get_path("stdlib"))
    found: list[Docstring] = []
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        if not _LEFT_OUT.intersection(parts):
            module = ".".join(part for part in parts if part != "__init__")
            found += (doc for doc in _docstrings(path, module) if len(doc.text.split()) >= 4)
    return found


# Of various matters, small, and in every Python.
_A_FEW = ("bisect", "calendar", "colorsys", "fractions", "heapq", "shlex", "statistics", "textwrap")
_OF_EACH = 8


def a_few() -> list[str]:
    """Return the first paragraphs of some docstrings, different ones; about sixty short texts."""
    root = Path(sysconfig.get_path("stdlib"))
    found: dict[str, None] = {}
    for module in _A_FEW:
        docs = _docstrings(root / f"{module}.py", module)
        first = (doc.text.partition("\n\n")[0] for doc in docs)
        found |= dict.fromkeys(islice((text for text in first if len(text.split()) >= 4), _OF_EACH))
    return list(found)


def _docstrings(path: Path, module: str) -> Iterator[Docstring]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", SyntaxWarning)
            tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError, OSError):
        return
    yield from _inside(tree, module)


def _inside(node: ast.AST, name: str) -> Iterator[Docstring]:
    if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        text = ast.get_docstring(node, clean=False)
        if text:
            yield Docstring(name, inspect.cleandoc(text))
        for child in node.body:
            if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                yield from _inside(child, f"{name}.{child.name}")
