"""No private name of aiohttp is used: another version of it need not have any of them.

Read from the source. Found are: imports of modules and names of aiohttp's that begin with an
underscore; such attributes of whatever was imported from aiohttp, and of `self` in a class that
derives from one of aiohttp's; and, of any other object, such attributes as aiohttp has and nothing
of ours. Names that are given as strings count, where they are given to what reads or sets them.

Not found is an attribute of an object of aiohttp's that is called as one of ours is: the source
does not tell of which type an object is. ruff forbids those of any object but `self` (SLF001),
outside of the tests.
"""

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import aiohttp
import pytest

ROOT = Path(__file__).parents[1]
OURS = [
    file
    for folder in ("proxy", "index", "cache", "providers", "tests", "bench")
    for file in sorted((ROOT / folder).rglob("*.py"))
    if "clients" not in file.parts
]
DOCUMENTED = {"_replace", "_asdict", "_fields", "_make"}
"""Of every named tuple."""
READERS = {"getattr", "setattr", "hasattr", "delattr", "setitem", "patch", "object"}
_IN_STRING = re.compile(r"aiohttp(?:\.\w+)*\._[a-zA-Z]\w*")


def is_private(name: str) -> bool:
    """Tell whether a name is one of those that Python says nothing of."""
    return name.startswith("_") and not name.endswith("__") and name not in DOCUMENTED | {"_"}


@cache
def parsed(file: Path) -> ast.Module:
    """Return the tree of one of our files."""
    return ast.parse(file.read_text("utf-8"))


def defined(tree: ast.AST, *, in_strings: bool = True) -> set[str]:
    """Return the private names that a source gives to attributes, methods and what is global."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            if isinstance(node.value, ast.Name) and node.value.id in {"self", "cls"}:
                found.add(node.attr)
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.add(node.id)
        elif in_strings and isinstance(node, ast.Constant) and isinstance(node.value, str):
            found |= {node.value} if node.value.isidentifier() else set()  # __slots__
    return {name for name in found if is_private(name)}


@cache
def theirs() -> frozenset[str]:
    """Return the private names of aiohttp."""
    sources = Path(aiohttp.__file__).parent.glob("*.py")
    return frozenset().union(*(defined(ast.parse(file.read_text("utf-8"))) for file in sources))


@cache
def ours() -> frozenset[str]:
    """Return our own private names; one that is only given as a string is none."""
    names: set[str] = set()
    for file in OURS:
        tree = parsed(file)
        names |= defined(tree, in_strings=False)
        names |= {
            target.id
            for node in ast.walk(tree)
            if isinstance(node, ast.AnnAssign) and isinstance(target := node.target, ast.Name)
        }
    return frozenset(names)


def imported(tree: ast.AST) -> set[str]:
    """Return under which names a source knows what is aiohttp's."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            modules = [alias for alias in node.names if alias.name.split(".")[0] == "aiohttp"]
            found |= {alias.asname or "aiohttp" for alias in modules}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "aiohttp":
            found |= {alias.asname or alias.name for alias in node.names}
    return found


def _root(node: ast.expr) -> str:
    while isinstance(node, ast.Attribute | ast.Call | ast.Subscript):
        node = node.func if isinstance(node, ast.Call) else node.value
    return node.id if isinstance(node, ast.Name) else ""


def problems(tree: ast.Module) -> Iterator[str]:
    """Yield the private names of aiohttp's that a source uses."""
    known = imported(tree)
    derived = {
        inner: node
        for node in ast.walk(tree)
        if isinstance(node, ast.ClassDef) and any(_root(base) in known for base in node.bases)
        for inner in ast.walk(node)
    }
    own = {node: defined(node) for node in {*derived.values()}}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            module = node.module if isinstance(node, ast.ImportFrom) else None
            names = [f"{module}.{a.name}" if module else a.name for a in node.names]
            for name in names:
                if name.split(".")[0] == "aiohttp" and any(map(is_private, name.split("."))):
                    yield name
        elif isinstance(node, ast.Attribute) and is_private(node.attr):
            root = _root(node.value)
            is_own = node.attr in (own[derived[node]] if node in derived else ours())
            if root in known or (node.attr in theirs() and not is_own):
                yield f"{ast.unparse(node.value)}.{node.attr}"
        elif isinstance(node, ast.Call):
            yield from _in_strings(node, known)


def _in_strings(call: ast.Call, known: set[str]) -> Iterator[str]:
    name = call.func.attr if isinstance(call.func, ast.Attribute) else _root(call.func)
    if name not in READERS:
        return
    for place, argument in enumerate(call.args):
        if not (isinstance(argument, ast.Constant) and isinstance(argument.value, str)):
            continue
        told = argument.value
        is_of_theirs = place > 0 and _root(call.args[place - 1]) in known
        if _IN_STRING.search(told) or (
            is_private(told) and (is_of_theirs or (told in theirs() and told not in ours()))
        ):
            yield told


def test_no_private_name_of_aiohttp_is_used():
    """Product, tests and measurements alike."""
    found = {file: list(problems(parsed(file))) for file in OURS}
    assert {
        file.relative_to(ROOT).as_posix(): names for file, names in found.items() if names
    } == {}


FAULTS = [
    "from aiohttp import _websocket",
    "from aiohttp._websocket import reader",
    "import aiohttp._http_parser",
    "from aiohttp.web_app import _cached_build_middleware",
    "from aiohttp import web\nweb.Server._kwargs",
    "from aiohttp import web\nweb.Server()._kwargs",
    "from aiohttp import web as w\nw.Server(1)._anything",
    "import aiohttp\naiohttp.web._run_app",
    "def f(connection):\n    connection._messages",
    "def f(runner):\n    return runner._make_server()",
    "from aiohttp import web\nclass A(web.RequestHandler):\n    def f(self):\n        self._waiter",
    "from aiohttp import web\nclass A(web.AppRunner):\n    def f(self):\n        self._loop",
    "def f(request):\n    getattr(request, '_payload_writer')",
    "from aiohttp import web\ndef f(patch):\n    patch.setattr(web.Server, '_x', 1)",
    "def f(patch):\n    patch.setattr('aiohttp.web_protocol._PAYLOAD', 1)",
]


@pytest.mark.parametrize("source", FAULTS)
def test_a_private_name_is_found(source):
    """Each of these would fail with another aiohttp."""
    assert list(problems(ast.parse(source)))


RIGHT = [
    "from aiohttp import web\nweb.Server.request_factory",
    "def f(message):\n    return message._replace(version=1)",
    "class A:\n    def f(self):\n        self._own = 1\n        return self._own",
    "from aiohttp import web\nclass A(web.View):\n    def f(self):\n        self._mine = 1",
    "from aiohttp import web\nweb.__name__",
]


@pytest.mark.parametrize("source", RIGHT)
def test_a_public_name_is_none(source):
    """Nor is a name of our own, or what named tuples have."""
    assert not list(problems(ast.parse(source)))
