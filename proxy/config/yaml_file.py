"""The text of a YAML file -> plain values, and the line of each. The only importer of yaml.

Values are made by PyYAML's SafeLoader: no tag of a file makes an object of a class.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import yaml

_MERGE = "tag:yaml.org,2002:merge"
_OTHER_BREAKS = re.compile(r"[\x85\u2028\u2029]")
# What PyYAML's constructors raise for a value that looks like a date, a number or a truth value, or
# is tagged as one, and is none.
_UNREADABLE = (ValueError, KeyError, IndexError, AttributeError, TypeError, OverflowError)
MAX_REPEATED = 100_000
"""Values that aliases repeat, all together: a few lines can stand for billions."""
MAX_VERSIONS = 10
"""Copies of a key that is written several times which are looked at."""


class YamlError(Exception):
    """A text is not usable YAML: why, and in which line, if that is known."""

    def __init__(self, message: str, line: int | None = None) -> None:
        super().__init__(message)
        self.line = line


class Duplicate(NamedTuple):
    """A key that is written twice in one mapping."""

    path: tuple[str | int, ...]
    line: int
    first_line: int

    @property
    def message(self) -> str:
        """What is wrong, and the remedy."""
        return f"is written twice, first in line {self.first_line}; remove one"


@dataclass(frozen=True, slots=True)
class YamlFile:
    """The values of a file, and where they stand."""

    content: object
    root: yaml.Node | None = None
    duplicates: tuple[Duplicate, ...] = ()
    versions: "tuple[YamlFile, ...]" = ()
    """Of a file with duplicates: what it is with the first copy of each, with the second, and so
    on. Of a section at the top, what its copies hold is put together."""

    def line_of(self, path: Sequence[str | int]) -> int | None:
        """Return the line of a key, or of the nearest section above it; None if there is neither.

        `path` holds the names of keys and the positions in lists.
        """
        node, line = self.root, None
        for part in path:
            step = None if node is None else _step(node, part)
            if step is None:
                break
            node, line = step
        return line


def parse(text: str, *, is_generated: bool = False) -> YamlFile:
    """Return what a text holds. Raises YamlError.

    Of a key that is written twice the last value is returned, and the key is in `duplicates`. What
    a program has written is read by libyaml, if that is there, in a fifth of the time; it differs
    from PyYAML in its messages, and in corners that no program writes.
    """
    try:
        loader = (_FastLoader if is_generated else _Loader)(text)
        try:
            root = loader.get_single_node()
            if root is None:
                return YamlFile(None)
            _check_aliases(root, {})
            # Before merge keys (`<<`) are resolved, which adds to the nodes.
            duplicates = tuple(_duplicates(root, (), set()))
            roots = [
                _version(root, i, {}, is_top=True)
                for i in range(min(len(duplicates) + 1, MAX_VERSIONS) if duplicates else 0)
            ]
            versions = tuple(YamlFile(loader.construct_document(node), node) for node in roots)
            return YamlFile(loader.construct_document(root), root, duplicates, versions)
        finally:
            loader.dispose()
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise YamlError("is not valid YAML; correct the YAML there", line) from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        problem = getattr(error, "problem", None) or "is not valid YAML"
        raise YamlError(f"{problem}; correct the YAML there", mark and mark.line + 1) from error
    except RecursionError as error:
        raise YamlError("is nested too deeply; write it with fewer levels") from error


def dump(value: object) -> str:
    """Return plain values as YAML, in their order; `parse` reads the same values from it."""
    text: str = yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100)
    return text


class _Dumper(yaml.SafeDumper):
    """SafeDumper that escapes the line breaks of YAML 1.1, which are read as others otherwise."""

    def represent_str(self, data: str) -> yaml.ScalarNode:
        if _OTHER_BREAKS.search(data):
            return self.represent_scalar("tag:yaml.org,2002:str", data, style='"')
        return super().represent_str(data)


_Dumper.add_representer(str, _Dumper.represent_str)


class _NamesLines:
    """Names the line of a value that a loader cannot read."""

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:  # noqa: ANN401, FBT001, FBT002
        try:
            return super().construct_object(node, deep)  # type: ignore[misc]
        except _UNREADABLE as error:
            raise yaml.constructor.ConstructorError(
                None, None, "holds a value that YAML cannot read", node.start_mark
            ) from error


class _Loader(_NamesLines, yaml.SafeLoader):
    pass


class _FastLoader(_NamesLines, getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]
    pass


def _step(node: yaml.Node, part: str | int) -> tuple[yaml.Node, int] | None:
    """Return the node below another one at a key or a position, and the line where it begins."""
    if isinstance(node, yaml.MappingNode):
        # Of merged and repeated keys the last one counts.
        for key, value in reversed(node.value):
            if isinstance(key, yaml.ScalarNode) and key.value == str(part):
                return value, key.start_mark.line + 1
    if isinstance(node, yaml.SequenceNode) and isinstance(part, int) and part < len(node.value):
        value = node.value[part]
        return value, value.start_mark.line + 1
    return None


def _check_aliases(node: yaml.Node, sizes: dict[int, tuple[int, int]]) -> tuple[int, int]:
    """Return how many values a node holds, and how many of them are repeated by aliases.

    Each node is looked at once. `sizes` has what is known of nodes; of one that holds itself,
    nothing. Raises YamlError for too many.
    """
    if id(node) in sizes:
        size, _ = sizes[id(node)]
        return size, size
    sizes[id(node)] = 0, 0
    size, repeated = 1, 0
    if isinstance(node, yaml.CollectionNode):
        pairs = isinstance(node, yaml.MappingNode)
        for child in (part for pair in node.value for part in pair) if pairs else node.value:
            part_size, part_repeated = _check_aliases(child, sizes)
            size += part_size
            repeated += part_repeated
    if repeated > MAX_REPEATED:
        raise YamlError(
            f"aliases repeat more than {MAX_REPEATED:,} values here; write out what is needed",
            node.start_mark.line + 1,
        )
    sizes[id(node)] = size, repeated
    return size, repeated


def _version(
    node: yaml.Node, copy: int, versions: dict[int, yaml.Node], *, is_top: bool
) -> yaml.Node:
    """Return a node with one copy of each key that is written several times, or with its last."""
    if id(node) in versions or not isinstance(node, yaml.CollectionNode):
        return versions.get(id(node), node)
    version = type(node)(node.tag, [], node.start_mark, node.end_mark)
    versions[id(node)] = version
    if isinstance(node, yaml.SequenceNode):
        version.value = [_version(item, copy, versions, is_top=False) for item in node.value]
        return version
    sections_merged: list[yaml.Node] = []
    copies: dict[object, list[tuple[yaml.Node, yaml.Node]]] = {}
    for key, value in node.value:
        is_name = isinstance(key, yaml.ScalarNode) and key.tag != _MERGE
        copies.setdefault((key.tag, key.value) if is_name else id(key), []).append((key, value))
    for several in copies.values():
        key, value = several[min(copy, len(several) - 1)]
        sections = [item for _, item in several if isinstance(item, yaml.MappingNode)]
        if is_top and len(sections) == len(several) > 1:
            entries = [entry for item in sections for entry in item.value]
            # Nodes are told apart by their identity, so this one has to stay.
            value = yaml.MappingNode(value.tag, entries, value.start_mark, value.end_mark)
            sections_merged.append(value)
        version.value.append((key, _version(value, copy, versions, is_top=False)))
    return version


def _duplicates(
    node: yaml.Node, path: tuple[str | int, ...], visited: set[int]
) -> Iterator[Duplicate]:
    """Yield the keys that are written twice in one mapping; each node is looked at once."""
    if id(node) in visited:
        return
    visited.add(id(node))
    if isinstance(node, yaml.SequenceNode):
        for i, entry in enumerate(node.value):
            yield from _duplicates(entry, (*path, i), visited)
    elif isinstance(node, yaml.MappingNode):
        first: dict[tuple[str, str], int] = {}
        for key, value in node.value:
            key_path = path
            if isinstance(key, yaml.ScalarNode) and key.tag != _MERGE:
                key_path = (*path, key.value)
                line = key.start_mark.line + 1
                if (key.tag, key.value) in first:
                    yield Duplicate(key_path, line, first[key.tag, key.value])
                else:
                    first[key.tag, key.value] = line
            yield from _duplicates(value, key_path, visited)
