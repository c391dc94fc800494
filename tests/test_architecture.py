"""The laws of the house, read from the source: who imports whom, through which door, how long."""

import ast
import graphlib
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# Each package may import those after it, never one before.
PACKAGES = ("proxy", "index", "cache", "providers")
MOST_LINES = 500

SEEN_BY_CACHE = {
    "providers.base",
    "providers.billing",
    "providers.client_credential",
    "providers.errors",
    "providers.vector",
    "providers.tokens",
    "providers.slices",
    "providers.lru_cache",
    "providers.backoff",
    "providers.scheduling.assembly",
}

# A library, and the only files that may import it.
DOORS = {
    "xxhash": {"cache/key.py"},
    "diskcache": {"cache/disk/database.py"},
    "tenacity": {"providers/routing/policy.py"},
    "yaml": {"proxy/config/yaml_file.py"},
    "splintr": {"providers/tokens.py"},
    "wordllama": {"providers/local.py"},
    # The vectors' forms; what measures many at once; what makes its own; what shows off; what
    # computes the checksums of a log.
    "numpy": {
        "providers/vector.py",
        "providers/similarity.py",
        "providers/local.py",
        "proxy/cli/demo.py",
        "cache/disk/write_ahead_log.py",
    },
    "pyarrow": {"proxy/importers/parquet.py"},
    "qdrant_client": {
        "index/collection_reader.py",
        "index/client.py",
        "index/collection.py",
        "index/migration/qdrant.py",
        "index/errors.py",
        "index/sender.py",
        "index/search.py",
    },
    "pydantic": {
        "proxy/config/fields.py",
        "proxy/config/models.py",
        "proxy/config/providers.py",
        "proxy/config/schema.py",
        "proxy/config/validation.py",
    },
}

FILES = sorted(file for package in PACKAGES for file in (ROOT / package).rglob("*.py"))
NAMES = [file.relative_to(ROOT).as_posix() for file in FILES]


def imported(source: str, module: str) -> set[str]:
    """Return the full names of all that a module imports, anywhere in it.

    `from a import b` counts as `a.b`, for b may be a module; who needs a module looks at the
    beginning. `module` is the dotted name of the file, and of `__init__.py` ends in `__init__`.
    """
    found: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = module.split(".")[: -node.level] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            found |= {f"{base}.{alias.name}" for alias in node.names}
    return found


def _module(name: str) -> str:
    return "embedding_proxy." + name.removesuffix(".py").replace("/", ".")


MODULES = {_module(name): name for name in NAMES}
NAMES_OF = {module.removeprefix("embedding_proxy."): name for module, name in MODULES.items()}


@cache
def imports(name: str) -> set[str]:
    """Return what a file imports."""
    return imported((ROOT / name).read_text(encoding="utf-8"), _module(name))


def _ours(names: set[str]) -> set[str]:
    """Return the modules of the house among imported names, the package's own file included."""
    found = set()
    for name in names:
        if name.startswith("embedding_proxy."):
            above = name.rpartition(".")[0]
            first = ".".join(name.split(".")[:2])
            places = [name, f"{name}.__init__", above, f"{above}.__init__", f"{first}.__init__"]
            found.add(next(module for module in places if module in MODULES))
    return {module.removeprefix("embedding_proxy.") for module in found}


@pytest.mark.parametrize("name", NAMES)
def test_there_is_one_import_name(name):
    """Ours is imported as `embedding_proxy`: a user's own `cache.py` is nobody's."""
    assert not [one for one in imports(name) if one.partition(".")[0] in PACKAGES]


@pytest.mark.parametrize(
    ("source", "names"),
    [
        ("import a.b, c", {"a.b", "c"}),
        ("import a.b as c", {"a.b"}),
        ("from a.b import c, d", {"a.b.c", "a.b.d"}),
        ("from . import x", {"proxy.x"}),
        ("from .x import y", {"proxy.x.y"}),
        ("from .. import cache", {"cache"}),
        ("def f():\n    import a", {"a"}),
        ("if TYPE_CHECKING:\n    from a import b", {"a.b"}),
        ("try:\n    import a\nexcept ImportError:\n    import b", {"a", "b"}),
        ("'import a'  # import b", set()),
    ],
)
def test_imports_are_seen_wherever_they_stand(source, names):
    """The reader of imports sees every form and place of them, and nothing else."""
    assert {name.removeprefix(".") for name in imported(source, "proxy.m")} == names


def test_there_is_something_to_look_at():
    """The house is where it is looked for, so that no law holds for want of files."""
    assert {name.partition("/")[0] for name in NAMES} == set(PACKAGES)
    assert all(f"{package}/__init__.py" in NAMES for package in PACKAGES)


@pytest.mark.parametrize("name", NAMES)
def test_no_package_imports_one_above_it(name):
    """The arrows go proxy -> index -> cache -> providers, and never back."""
    above = PACKAGES[: PACKAGES.index(name.partition("/")[0])]
    assert not [module for module in _ours(imports(name)) if module.partition(".")[0] in above]


@pytest.mark.parametrize("name", [name for name in NAMES if name.startswith("cache/")])
def test_the_cache_knows_no_provider(name):
    """The cache sees the words of `providers`, its vectors and its tokens; no provider by name."""
    seen = {module for module in _ours(imports(name)) if module.startswith("providers.")}
    assert seen <= SEEN_BY_CACHE


@pytest.mark.parametrize("package", PACKAGES)
def test_modules_of_a_package_form_no_circle(package):
    """Inside a package too, modules import one another in one direction only."""
    inside = [name for name in NAMES if name.startswith(f"{package}/")]
    graph = {
        name: {NAMES_OF[module] for module in _ours(imports(name))} & set(inside) for name in inside
    }
    order = tuple(graphlib.TopologicalSorter(graph).static_order())
    assert len(order) == len(inside)


@pytest.mark.parametrize("library", DOORS)
def test_each_library_has_its_door(library):
    """A library that is behind a door is imported there, and nowhere else."""
    users = {
        name for name in NAMES if any(other.partition(".")[0] == library for other in imports(name))
    }
    assert users == DOORS[library]


def test_the_wire_knows_no_http_library():
    """What is pure stays so: `wire` turns bytes into values and knows no HTTP."""
    http = {"aiohttp", "httpx", "http", "socket", "asyncio"}
    assert not {name.partition(".")[0] for name in imports("proxy/http/openai_format.py")} & http


@pytest.mark.parametrize("name", NAMES)
def test_a_file_is_short_and_says_what_it_is(name):
    """No file passes 500 lines, and each begins with a docstring."""
    source = (ROOT / name).read_text(encoding="utf-8")
    assert len(source.splitlines()) <= MOST_LINES
    assert ast.get_docstring(ast.parse(source))
