"""YAML -> validated settings. The only importer of yaml.

A mistake in the file is a ConfigError of one line that names the file, the key and the remedy.
"""

import difflib
import os
import re
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import ValidationError

from proxy.settings.pasted_keys import MASK, hide_keys
from proxy.settings.schema import Settings
from proxy.settings.section import Section

BUILT_IN = "the built-in configuration"


class ConfigError(Exception):
    """The configuration cannot be used; one line, with file, key and remedy, and without a key."""

    def __init__(self, message: str) -> None:
        super().__init__(hide_keys(message).replace("\r", "\\r").replace("\n", "\\n"))


def load(path: Path | None = None, *, overrides: Mapping[str, object] | None = None) -> Settings:
    """Read a configuration file, or the built-in one, and return its settings.

    `overrides` replaces keys of the `server` section (the command line's options). Raises
    ConfigError.
    """
    return load_named(path, overrides=overrides)[0]


def load_named(
    path: Path | None = None, *, overrides: Mapping[str, object] | None = None
) -> tuple[Settings, tuple[str, ...]]:
    """Return the settings as `load` does, and the models that the file itself names.

    The settings hold the whole catalogue and do not say which these are. Raises ConfigError.
    """
    name = BUILT_IN if path is None else str(path)
    content = _content(_built_in_file() if path is None else path, name)
    if path is None:
        # The file shows where the default leads; XDG_DATA_HOME may lead elsewhere.
        content["cache"].pop("directory")
    if overrides:
        server = content.get("server") or {}
        content["server"] = {**server, **overrides} if isinstance(server, dict) else server
    settings = validated(content, name, overrides or {})
    return settings, tuple(content.get("models") or ())


def validated(content: Mapping[Any, Any], name: str, overrides: Collection[str] = ()) -> Settings:
    """Return the settings that a file of that name holds. Raises ConfigError.

    `overrides` are keys of the `server` section that do not come from the file.
    """
    try:
        return Settings.model_validate(_substituted(content, name, ()))
    except ValidationError as error:
        if error.errors()[0]["loc"] in {("server", key) for key in overrides}:
            name = "the command line"
        raise ConfigError(f"{name}: {_first_problem(error)}") from error
    except RecursionError as error:
        raise ConfigError(f"{name}: an anchor holds itself; write the values out") from error


def dump(value: object) -> str:
    """Return plain values as YAML, in their order."""
    text: str = yaml.safe_dump(value, sort_keys=False, allow_unicode=True, width=100)
    return text


def read(path: Path | None) -> dict[Any, Any]:
    """Return what a file holds, or the built-in one: not validated, `${NAME}` as it stands.

    Raises ConfigError.
    """
    return _content(path or _built_in_file(), BUILT_IN if path is None else str(path))


def load_mapping(path: Path) -> dict[Any, Any]:
    """Return what a YAML file beside the configuration holds, a mapping. Raises ConfigError."""
    return _content(path, str(path))


def _content(source: Path, name: str) -> dict[Any, Any]:
    """Return what a file holds, not yet validated. Raises ConfigError."""
    try:
        text = source.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{name}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{name}: is not UTF-8 text") from error
    try:
        content = yaml.load(text, Loader=_Loader)  # noqa: S506 - a subclass of SafeLoader
    except yaml.YAMLError as error:
        raise ConfigError(f"{name}: {_yaml_problem(error)}") from error
    except (ValueError, KeyError, RecursionError) as error:
        # PyYAML's own way with values that look like a date, a number or a truth, and are none.
        raise ConfigError(f"{name}: holds a value that YAML cannot read: {error}") from error
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise ConfigError(f"{name}: expected keys such as `server:`, found something else")
    return content


def _built_in_file() -> Path:
    """Return config.yaml: beside this file in an installation, at the root of a checkout."""
    installed = Path(__file__).with_name("config.yaml")
    return installed if installed.exists() else Path(__file__).parents[1] / "config.yaml"


class _Loader(yaml.SafeLoader):
    """SafeLoader that refuses a key written twice instead of forgetting the first."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:  # noqa: FBT001, FBT002
        seen: set[object] = set()
        for key_node, _ in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge":
                continue
            key = self.construct_object(key_node, deep=True)
            if isinstance(key, str) and key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key!r} is written twice", key_node.start_mark
                )
            if isinstance(key, str):
                seen.add(key)
        mapping: dict[Any, Any] = super().construct_mapping(node, deep)
        return mapping


def _yaml_problem(error: yaml.YAMLError) -> str:
    mark = getattr(error, "problem_mark", None)
    where = f"line {mark.line + 1}: " if mark else ""
    problem = getattr(error, "problem", None) or "is not valid YAML"
    return f"{where}{problem}; correct the YAML there"


_REFERENCE = re.compile(r"\$\{([A-Za-z_][A-Za-z0-9_]*)(?::-([^}]*))?\}")


def _substituted(value: object, file: str, path: tuple[str, ...]) -> object:
    """Replace ${NAME} and ${NAME:-default} in all strings; an empty variable counts as unset."""

    def look_up(match: re.Match[str]) -> str:
        name, default = match.groups()
        found = os.environ.get(name) or default
        if found is None:
            raise ConfigError(
                f"{file}: {'.'.join(path)}: the variable {name} is not set;"
                f" set it, or write ${{{name}:-default}}"
            )
        return found

    if isinstance(value, str):
        return _REFERENCE.sub(look_up, value)
    if isinstance(value, dict):
        return {key: _substituted(v, file, (*path, str(key))) for key, v in value.items()}
    if isinstance(value, list):
        return [_substituted(v, file, (*path, str(i))) for i, v in enumerate(value)]
    return value


_EXPECTED = {
    "string_too_long": "a shorter string",
    "string_pattern_mismatch": "a name of letters, digits and the like; no key and no address",
    "bool_parsing": "true or false",
    "bool_type": "true or false",
    "dict_type": "keys with values below it",
    "float_parsing": "a number",
    "float_type": "a number",
    "int_from_float": "a whole number",
    "int_parsing": "a whole number",
    "int_type": "a whole number",
    "model_type": "keys with values below it",
    "none_required": "null; this version has nothing else",
    "path_type": "a path",
    "string_too_short": "something, not an empty string",
    "string_type": "a string; put it in quotes",
    "too_short": "at least one entry",
    "tuple_type": "a list",
}


_PLAIN_NAME = re.compile(r"[A-Za-z][A-Za-z_]{0,39}")
"""An unknown key that is shown though it is like none that is known."""
_NEAR_NAME = re.compile(r"[\w .-]{1,40}")
"""A name that is not valid and is shown."""


def _first_problem(error: ValidationError) -> str:
    """Say what is wrong first, as `key: problem; remedy`; no value is repeated, it may be a key."""
    problems = error.errors(include_url=False, include_input=False)
    # A misspelt key is unknown here and missing there; the first says more.
    problem = min(problems, key=lambda one: one["type"] != "extra_forbidden")
    where = [str(part) for part in problem["loc"] if part != "[key]"]
    kind = problem["type"]
    is_name = kind == "string_pattern_mismatch" and problem["loc"][-1] == "[key]"
    if is_name and not _NEAR_NAME.fullmatch(where[-1]):
        # With other characters it is probably a key or an address.
        where.pop()
    key = ".".join(where)
    if kind == "extra_forbidden":
        known = list(_known_keys(where[:-1]))
        near = difflib.get_close_matches(where[-1], known, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]}?" if near else f"known here: {', '.join(sorted(known))}"
        if not near and not _PLAIN_NAME.fullmatch(where[-1]):
            key = ".".join([*where[:-1], MASK])
        return f"{key}: unknown key; {hint}"
    if kind == "missing":
        return f"{key}: is missing; add it"
    if kind == "value_error":
        message = problem["msg"].removeprefix("Value error, ")
        return f"{key}: {message}" if key else message
    expected = _EXPECTED.get(kind) or problem["msg"].removeprefix("Input should be ")
    return f"{key}: expected {expected}"


def _known_keys(path: list[str]) -> Iterator[str]:
    """Yield the keys of the section at `path`."""
    section: Any = Settings
    for part in path:
        fields = getattr(section, "model_fields", None)
        if fields is not None and part in fields:
            section = _section_of(fields[part].annotation)
    yield from getattr(section, "model_fields", {})


def _section_of(annotation: Any) -> Any:  # noqa: ANN401 - any annotation
    """Return the Section inside an annotation, as in `dict[str, Provider | None]`."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return annotation
    return next((found for arg in get_args(annotation) if (found := _section_of(arg))), None)
