"""The laws of the code, read from the source: who imports whom, which library, names, length."""

import ast
import graphlib
from functools import cache
from pathlib import Path

import pytest

from tools import draw_architecture

ROOT = Path(__file__).parents[1]
# Each package may import those after it, never one before.
PACKAGES = ("proxy", "index", "cache", "providers")
MIN_LINES, MAX_LINES = 40, 500
LONGER = {}
"""Files that pass it, with their reasons. None today: try to keep it so."""

RETIRED_WORDS = """
Access admit Admitted adopt Adoption affords Again again AllResting alone answer Answering Answers
asked at_hand at_once at_sight Attendance start_deadline begun Boundary breaker brought budget bury
by_client Caller Canaries canary Carver catalogue Changes Choice CredentialsRefused dead declined
depart died faults few Fill Finding findings flight Form Found Full Gatherer give_back
Given Glance glance go_on guard Halver Heads heed_purges InputRefused is_the_leaders_own Journal
journal Journey journey Kept kinds landed lane Late late later least let_finish likeness made
Making mend most most_inputs NoneTooLong NOTHING_SAID objection objections oddity
one_before_others onward opening Origin outlive outliving OutOfCredit PassingFailure patience_s
Patient Pins place places Pool prove proved Purchase Questions reached read_few receipt
regime Repeat Repeating Replies Rest rested resting revive scouting scouts Seen seen SeenThrough
sent serials_of shown Shut stamp stand_in stand_ins Standing still take_back take_in Terms terms
Texts there told Trial Turn turn twins Unreadable unsent unusable UpstreamFault Upstreams Uses
Visit walk weigh weighed WhileProved wire Wish within
"""
RETIRED = frozenset(RETIRED_WORDS.split())
"""Names that gave way to the terms of docs/glossary.md; a leading underscore does not count."""

NOT_NOUNS_WORDS = """
a about above after again ahead alone along apart aside at away back before behind below beside
between beyond brought by done down during early first for forth from given gone held here in
inside into kept known late later least left lost made most near next now off often on once onward
onwards out outside over past round seen seldom sent shown soon still taken then there through to
together told toward under until up upon when where with within without yet
"""
NOT_NOUNS = frozenset(NOT_NOUNS_WORDS.split())
"""Prepositions, adverbs and irregular participles."""
NOUNS = {
    *("billing", "embedding", "formatting", "framing", "pending", "routing", "scheduling"),
    "tracing",
}
"""Nouns that look like participles; `pending` is the field's word for what waits."""
TERMS = {"blocking", "in_flight", "retry_after", "shared"}
"""The field's own terms."""

SEEN_BY_CACHE = {
    "providers.allowance",
    "providers.base",
    "providers.charge",
    "providers.client_credential",
    "providers.errors",
    "providers.vector",
    "providers.tokens",
    "providers.lru_cache",
    "providers.failure_backoff",
}
"""What the cache may import of providers: shared types, no provider."""

# A library, and the only files that may import it.
DOORS = {
    "xxhash": {"cache/key.py"},
    "diskcache": {"cache/disk/database.py"},
    "tenacity": {"providers/routing/policy.py"},
    "yaml": {"proxy/config/yaml_file.py"},
    "splintr": {"providers/tokens.py"},
    "wordllama": {"providers/local.py"},
    "prometheus_client": {"proxy/http/metrics.py", "proxy/http/metric_families.py"},
    "opentelemetry": {"proxy/http/tracing.py"},
    # The vectors' forms; what measures many at once; what makes its own; what shows off; what
    # computes the checksums of a log.
    "numpy": {
        "providers/vector.py",
        "providers/dimensions.py",
        "index/migration/points.py",
        "providers/similarity.py",
        "providers/local.py",
        "proxy/cli/demo.py",
        "cache/disk/write_ahead_log.py",
    },
    "pyarrow": {"proxy/importers/parquet.py"},
    "redis": {"cache/shared/client.py", "cache/shared/node.py"},
    "qdrant_client": {
        "index/collection_reader.py",
        "index/client.py",
        "index/collection.py",
        "index/migration/points.py",
        "index/migration/qdrant.py",
        "index/errors.py",
        "index/sender.py",
        "index/search.py",
    },
    "pydantic": {
        "proxy/config/fields.py",
        "proxy/config/index.py",
        "proxy/config/models.py",
        "proxy/config/providers.py",
        "proxy/config/schema.py",
        "proxy/config/shared.py",
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
    """Return our own modules among imported names, the package's own file included."""
    found = set()
    for name in names:
        if name.startswith("embedding_proxy."):
            above = name.rpartition(".")[0]
            first = ".".join(name.split(".")[:2])
            places = [name, f"{name}.__init__", above, f"{above}.__init__", f"{first}.__init__"]
            found.add(next(module for module in places if module in MODULES))
    return {module.removeprefix("embedding_proxy.") for module in found}


def test_there_is_one_import_name():
    """Ours is imported as `embedding_proxy`: a user's own `cache.py` is nobody's."""
    bare = [(name, one) for name in NAMES for one in imports(name)]
    assert [(name, one) for name, one in bare if one.partition(".")[0] in PACKAGES] == []


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
    """The packages are where they are looked for, so that no law holds for want of files."""
    assert {name.partition("/")[0] for name in NAMES} == set(PACKAGES)
    assert all(f"{package}/__init__.py" in NAMES for package in PACKAGES)


def test_no_package_imports_one_above_it():
    """The arrows go proxy -> index -> cache -> providers, and never back."""
    upward = []
    for name in NAMES:
        above = PACKAGES[: PACKAGES.index(name.partition("/")[0])]
        found = [module for module in _ours(imports(name)) if module.partition(".")[0] in above]
        upward += [(name, module) for module in found]
    assert upward == []


def test_the_cache_knows_no_provider():
    """The cache sees the words of `providers`, its vectors and its tokens; no provider by name."""
    modules = {module for name in NAMES if name.startswith("cache/") for module in imports(name)}
    seen = {module for module in _ours(modules) if module.startswith("providers.")}
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


def test_a_file_is_short_and_says_what_it_is():
    """No file passes MAX_LINES without a reason, or is a fragment; each has its docstring."""
    sources = {name: (ROOT / name).read_text(encoding="utf-8") for name in NAMES}
    lines = {name: len(source.splitlines()) for name, source in sources.items()}
    assert {name for name in NAMES if lines[name] > MAX_LINES} == set(LONGER)
    files = [name for name in NAMES if not Path(name).stem.startswith("__")]
    assert [name for name in files if lines[name] < MIN_LINES] == []
    assert [name for name in NAMES if not ast.get_docstring(ast.parse(sources[name]))] == []


def test_imports_go_down_the_layers():
    """Between packages and between the layers of each, no import goes back up."""
    edges = draw_architecture.EDGES
    assert [edge for edge in edges if not draw_architecture.is_downward(*edge)] == []


def _folder(name: str) -> str:
    """Return the folder of a file; for one directly in its package, the layer."""
    folder = name.rpartition("/")[0]
    return folder if "/" in folder else "/".join(draw_architecture.layer_of(name))


def test_folders_form_no_circle():
    """Folders import one another in one direction only, also within a layer."""
    graph: dict[str, set[str]] = {_folder(name): set() for name in NAMES}
    for name, target in draw_architecture.EDGES:
        graph[_folder(name)] |= {_folder(target)} - {_folder(name)}
    assert {*graphlib.TopologicalSorter(graph).static_order()} == {*graph}


def test_no_package_has_more_layers_than_can_be_remembered():
    """A package has at most seven layers."""
    assert all(len(layers) <= 7 for layers in draw_architecture.PACKAGES.values())


def test_the_picture_sees_the_same_imports():
    """What is drawn, and what the layers go by, are all imports of a file."""
    expected = {
        (name, MODULES[f"embedding_proxy.{module}"])
        for name in NAMES
        for module in _ours(imports(name)) & {*NAMES_OF}
    }
    assert set(draw_architecture.EDGES) == {edge for edge in expected if edge[0] != edge[1]}


def test_the_picture_is_drawn_from_the_code():
    """docs/architecture.svg is what `make picture` draws now."""
    picture = draw_architecture.PICTURE.read_text(encoding="utf-8")
    assert picture == draw_architecture.drawn(), "out of date: make picture"


def test_every_layer_has_files():
    """A path in the table of layers that no file begins with is a mistake."""
    files = {draw_architecture.layer_of(name) for name in NAMES}
    assert files == set(draw_architecture.LAYERS.values())
    assert [
        path for path in draw_architecture.LAYERS if not any(n.startswith(path) for n in NAMES)
    ] == []


def _top_level(name: str) -> set[str]:
    """Return the names of a file: its own, and those of its classes and functions."""
    kinds = (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    body = ast.parse((ROOT / name).read_text(encoding="utf-8")).body
    found = {node.name for node in body if isinstance(node, kinds)}
    return {one.strip("_") for one in found | {Path(name).stem}}


def test_no_retired_name_comes_back():
    """Modules, classes and functions have the names of the glossary."""
    assert {name: names for name in NAMES if (names := _top_level(name) & RETIRED)} == {}


VAGUE_NAMES = frozenset(
    ["asked", "found", "gone", "heard", "kept", "known", "one", "said", "some", "there", "told"]
)
"""Names that do not say what a variable holds."""
NAMED_FOLDERS = ("index/", "proxy/cli/", "proxy/config/", "proxy/diagnostics/", "proxy/importers/")
"""Folders without them."""


def _local_names(name: str) -> set[str]:
    """Return the names of a file's variables and parameters."""
    nodes = [*ast.walk(ast.parse((ROOT / name).read_text(encoding="utf-8")))]
    names = {
        node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)
    }
    return names | {node.arg for node in nodes if isinstance(node, ast.arg)}


@pytest.mark.parametrize("name", [name for name in NAMES if name.startswith(NAMED_FOLDERS)])
def test_variables_say_what_they_hold(name):
    """A variable is named by a noun: `records`, and not `found`."""
    assert _local_names(name) & VAGUE_NAMES == set()


def is_odd(stem: str) -> bool:
    """Tell whether a module's name is, or begins or ends with, what is no noun and no verb."""
    words = stem.strip("_").split("_")
    if stem in TERMS:
        return False
    if len(words) == 1 and words[0].endswith(("ing", "ed")) and words[0] not in NOUNS:
        return True
    return words[0] in NOT_NOUNS or words[-1] in NOT_NOUNS


def test_modules_are_named_by_nouns_and_verbs():
    """No preposition, adverb or participle is the name of a module or a folder."""
    assert is_odd("within")
    assert is_odd("set_aside")
    assert is_odd("resting")
    assert not is_odd("cached_hit")
    assert [name for name in NAMES if any(map(is_odd, Path(name).with_suffix("").parts))] == []
