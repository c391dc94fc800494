"""The JSON schema of a configuration, for editors: what `config schema` prints.

The classes of the configuration give the keys and their types; the comments of the built-in file
say what each does. The schema takes whatever a configuration may say. It does not check what
belongs together: `validation` does.
"""

import re
from collections.abc import Iterator
from typing import Any

from .loader import built_in_text
from .schema import Settings

_PLACES = {
    (): "",
    ("server",): "Server",
    ("log",): "Log",
    ("traces",): "Traces",
    ("cache",): "Cache",
    ("providers", "openai"): "ProviderConfig",
    ("providers", "openai", "limits"): "LimitsConfig",
    ("models", "text-embedding-3-small"): "ModelConfig",
}
"""The section of the built-in file that shows the keys of a definition."""
_REFERENCE = {"type": "string", "pattern": r"\$\{"}
"""`${NAME}` may stand for any value."""
_SHORT_FORMS: dict[str, dict[str, Any]] = {
    "ClientKey": {"type": "string"},
    "RouteConfig": {"type": "string"},
    "Fallback": {"type": "string"},
    "Shared": {"type": "string"},
}
"""Other values that are accepted instead of a definition's keys."""
_PARTIAL = ("ProviderConfig", "ModelConfig")
"""Definitions that the kind or the catalog completes: none of their keys is required."""
_BOUNDS = {"gt": "exclusiveMinimum", "ge": "minimum", "lt": "exclusiveMaximum", "le": "maximum"}
"""Words of pydantic, which leaves them as they are behind a validator, and those of JSON Schema."""
_CONSTRAINTS = {"enum", "const", "pattern", "minLength"}
_LINE = re.compile(r"(?P<indent> *)(?P<key>[\w.-]+):(?P<value>[^#]*)(?:# ?(?P<comment>.*))?")
_COMMENT = re.compile(r" *# ?(?P<comment>.*)")


def build() -> dict[str, Any]:
    """Return the schema, as JSON Schema 2020-12."""
    root = Settings.model_json_schema()
    definitions = root.pop("$defs")
    for path, comment in _comments(built_in_text()):
        name = _PLACES.get(path[:-1])
        if name is not None:
            section = definitions[name] if name else root
            section["properties"][path[-1]]["description"] = comment
    for name in _PARTIAL:
        del definitions[name]["required"]
    for name, section in root["properties"].items():
        # A section may be empty, which YAML reads as null.
        if "$ref" in section or section.get("type") == "object":
            root["properties"][name] = {"anyOf": [section, {"type": "null"}]}
    qdrant = definitions["Qdrant"]["properties"]
    for name in ("payload_indexes", "sparse_vectors"):
        names = {"type": "array", "items": {"type": "string"}}
        qdrant[name] = {"anyOf": [qdrant[name], names]}
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        **_relax(root),
        "title": "The configuration of embedding-proxy",
        "$defs": {
            name: {"anyOf": [_relax(definition), _SHORT_FORMS[name]]}
            if name in _SHORT_FORMS
            else _relax(definition)
            for name, definition in definitions.items()
        },
    }


def _comments(text: str) -> Iterator[tuple[tuple[str, ...], str]]:
    """Yield the paths of the built-in file's keys, each with its comment."""
    path: list[tuple[int, str]] = []
    words: list[str] = []
    """Of the comment so far, which may go on in the lines below its key."""
    before: list[str] = []
    """Of a comment above the next key."""
    for line in text.splitlines():
        match = _LINE.fullmatch(line)
        if match is None:
            comment = _COMMENT.fullmatch(line)
            if comment is None:
                before.clear()
            elif path and len(line) - len(line.lstrip()) > path[-1][0] + 2 and words:
                words.append(comment["comment"].strip())
            else:
                before.append(comment["comment"].strip())
            continue
        if path and words:
            yield tuple(key for _, key in path), " ".join(words)
        indent = len(match["indent"])
        path = [*((width, key) for width, key in path if width < indent), (indent, match["key"])]
        words = [*before, *filter(None, [(match["comment"] or "").strip()])]
        before.clear()
    if path and words:
        yield tuple(key for _, key in path), " ".join(words)


def _relax(schema: Any) -> Any:  # noqa: ANN401 - JSON
    """Return a schema that accepts `${NAME}` for each value, and one value for a list."""
    if isinstance(schema, list):
        return [_relax(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    relaxed = {
        _BOUNDS.get(key, key): value if key == "default" else _relax(value)
        for key, value in schema.items()
    }
    relaxed.pop("title", None)
    kind = schema.get("type")
    is_text = kind == "string" and not _CONSTRAINTS & schema.keys()
    if not isinstance(kind, str) or kind in ("object", "null") or is_text:
        return relaxed
    annotations = {key: relaxed.pop(key) for key in ("default", "description") if key in relaxed}
    others = [_REFERENCE]
    if kind == "array" and isinstance(schema.get("items"), dict):
        others.append(relaxed["items"])
    return {**annotations, "anyOf": [relaxed, *others]}
