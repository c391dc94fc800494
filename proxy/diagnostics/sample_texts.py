"""Texts that providers are compared on: those of files, and docstrings that every machine has.

`read` also returns queries whose right texts are known. The docstrings are those of Python's
standard library.
"""

import ast
import inspect
import sysconfig
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from embedding_proxy.cache.maintenance.import_source import RejectedPair, SourceError
from embedding_proxy.providers.route_check import TEXTS
from embedding_proxy.proxy.importers.jsonl import is_jsonl, lines, need_fields, objects

MAX_SAMPLES = 2000
"""The most distinct inputs: each is compared with all others."""
# Not prose about the library: tests, vendored copies, and what is not always installed.
_LEFT_OUT = {"test", "tests", "idlelib", "lib2to3", "site-packages", "ensurepip", "__pycache__"}
# Of various subjects, small, and in every Python.
_A_FEW = ("bisect", "calendar", "colorsys", "fractions", "heapq", "shlex", "statistics", "textwrap")
_OF_EACH = 8


@dataclass(frozen=True, slots=True)
class Samples:
    """Distinct inputs: first the texts to search, then the queries that are no texts."""

    inputs: Sequence[str]
    texts: int
    """The number of inputs that are texts."""
    wanted: Mapping[int, frozenset[int]]
    """The right texts of each query, by the indices of their inputs."""


def read(texts: Path | None, pairs: Path | None) -> Samples:
    """Return the inputs of files; without one, samples that every machine has.

    Lines of `texts` are texts, or in a `….jsonl` objects with a `text`; those of `pairs` are
    objects with a `query` and a `text`. Blank and repeated ones are left out. Raises SourceError.
    """
    texts_read: list[str] = []
    if texts is not None:
        texts_read = (
            [text for (text,) in _read_fields(texts, "text")]
            if is_jsonl(texts)
            else _read_lines(texts)
        )
        if not texts_read:
            raise SourceError(f"{texts} holds no text")
    query_pairs = [] if pairs is None else list(_read_fields(pairs, "query", "text"))
    if pairs is not None and not query_pairs:
        raise SourceError(f"{pairs} holds no pair")
    if texts is None and pairs is None:
        texts_read = [*TEXTS, *sample_paragraphs()]
    indices = {
        text: i for i, text in enumerate(dict.fromkeys([*texts_read, *(t for _, t in query_pairs)]))
    }
    count = len(indices)
    labels: dict[int, frozenset[int]] = {}
    for query, text in query_pairs:
        index = indices.setdefault(query, len(indices))
        if query != text:
            labels[index] = labels.get(index, frozenset()) | {indices[text]}
    if len(indices) > MAX_SAMPLES:
        raise SourceError(
            f"{len(indices):,} different texts and queries are too many, {MAX_SAMPLES:,} are"
            " compared at most; take a sample of them"
        )
    return Samples(list(indices), count, labels)


def _read_lines(path: Path) -> list[str]:
    lines_read = []
    for number, line in lines(path):
        try:
            text = "" if line is None else line.decode()
        except UnicodeDecodeError as error:
            raise SourceError(f"{path}: line {number} is not UTF-8 text") from error
        if line is None:
            raise SourceError(f"{path}: line {number} is too long")
        if text.strip():
            lines_read.append(text)
    return lines_read


def _read_fields(path: Path, *fields: str) -> Iterable[tuple[str, ...]]:
    """Yield the strings in some fields of each line. Raises SourceError for a line without them."""
    need_fields(path, *fields)
    for item in objects(path, *fields):
        if isinstance(item, RejectedPair):
            raise SourceError(f"{path}: {item.where}: {item.why}")
        where, values_by_field = item
        values = [values_by_field[field] for field in fields]
        for field, value in zip(fields, values, strict=True):
            if not isinstance(value, str):
                raise SourceError(f"{path}: {where}: its `{field}` is no string")
        texts = tuple(value for value in values if isinstance(value, str))
        if all(text.strip() for text in texts):
            yield texts


@dataclass(frozen=True, slots=True)
class Docstring:
    """The docstring of a module, class or function."""

    name: str
    text: str


def standard_library() -> list[Docstring]:
    """Return all docstrings with at least four words, by module name; some thousands."""
    root = Path(sysconfig.get_path("stdlib"))
    docstrings: list[Docstring] = []
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        if not _LEFT_OUT.intersection(parts):
            module = ".".join(part for part in parts if part != "__init__")
            docstrings += (doc for doc in _docstrings(path, module) if len(doc.text.split()) >= 4)
    return docstrings


def sample_paragraphs() -> list[str]:
    """Return the first paragraphs of some docstrings, different ones; about sixty short texts."""
    root = Path(sysconfig.get_path("stdlib"))
    paragraphs: dict[str, None] = {}
    for module in _A_FEW:
        docs = _docstrings(root / f"{module}.py", module)
        first = (doc.text.partition("\n\n")[0] for doc in docs)
        paragraphs |= dict.fromkeys(
            islice((text for text in first if len(text.split()) >= 4), _OF_EACH)
        )
    return list(paragraphs)


def _docstrings(path: Path, module: str) -> Iterator[Docstring]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", SyntaxWarning)
            tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError, OSError):
        return
    yield from _walk_docstrings(tree, module)


def _walk_docstrings(node: ast.AST, name: str) -> Iterator[Docstring]:
    if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        text = ast.get_docstring(node, clean=False)
        if text:
            yield Docstring(name, inspect.cleandoc(text))
        for child in node.body:
            if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                yield from _walk_docstrings(child, f"{name}.{child.name}")
