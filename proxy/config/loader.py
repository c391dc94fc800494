"""Configuration files -> validated settings.

All mistakes of a file are told at once: a ConfigError has a line for each that names the file, the
line, the key and the remedy.
"""

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import NoneType
from typing import Any

from . import references, yaml_file
from .errors import ConfigError, KeyPath, Problem
from .fields import FOLDER, INSPECTED
from .references import Purpose
from .schema import Settings
from .validation import validate
from .yaml_file import YamlError, YamlFile, dump

__all__ = [
    "BUILT_IN",
    "ConfigError",
    "Configuration",
    "built_in_text",
    "dump",
    "find",
    "load",
    "load_mapping",
    "load_named",
    "read",
    "read_configuration",
    "validate_content",
]

BUILT_IN = "the built-in configuration"
COMMAND_LINE = "the command line"
FILE_NAME = "embedding-proxy.yaml"
"""The configuration of a folder: see `find`."""
MAX_PROBLEMS = 50
"""Mistakes that are told of one file; more are counted."""


@dataclass(frozen=True, slots=True)
class Configuration:
    """A configuration file, or the built-in one, and what it comes to."""

    settings: Settings
    content: Mapping[Any, Any]
    """What the file says, not validated, `${NAME}` as it stands."""
    file: Path | None
    """None = the built-in one."""
    unresolved: tuple[str, ...] = ()
    """Variables of the file that are not set and that nobody needs now; a line for each, as in
    ConfigError."""

    @property
    def models(self) -> tuple[str, ...]:
        """The models that the file itself names; the settings hold the whole catalogue."""
        return tuple(self.content.get("models") or ())

    @property
    def providers(self) -> tuple[str, ...]:
        """The providers that the file of a user names, but for those that are null."""
        if self.file is None or not self.settings.names_providers:
            return ()
        named = self.content.get("providers") or {}
        return tuple(name for name in named if self.settings.providers.get(name) is not None)

    def problem(self, path: KeyPath, message: str) -> str:
        """Return a line that tells what is wrong with a key, as in ConfigError."""
        return self.settings.problem(path, message)


def load(
    path: Path | None = None,
    *,
    overrides: Mapping[KeyPath, object] | None = None,
    purpose: Purpose = "embed",
) -> Settings:
    """Read a configuration file, or the built-in one, and return its settings.

    See `read_configuration`. Raises ConfigError.
    """
    return read_configuration(path, overrides=overrides, purpose=purpose).settings


def load_named(path: Path | None = None) -> tuple[Settings, tuple[str, ...]]:
    """Return the settings as `load` does, and the models that the file itself names.

    Raises ConfigError.
    """
    configuration = read_configuration(path)
    return configuration.settings, configuration.models


def read_configuration(
    path: Path | None = None,
    *,
    overrides: Mapping[KeyPath, object] | None = None,
    purpose: Purpose = "embed",
) -> Configuration:
    """Read a configuration file, or the built-in one. Raises ConfigError.

    `overrides` replaces keys of the file, or adds some (the command line's options). Variables that
    `purpose` does not need may be unset: in place of a client's key there is then one that nobody
    knows. Relative paths are below the folder of the file.
    """
    source = _Source(_name_of(path), _parse(_built_in_file() if path is None else path, path))
    written = _mapping(source)
    source.overrides = overrides or {}
    settings, unresolved = _settings(source, _folder_of(path), purpose)
    lines = tuple(source.line(problem) for problem in unresolved)
    settings.set_source(source.line)
    return Configuration(settings, written, path, lines)


def validate_content(content: Mapping[Any, Any], name: str) -> Settings:
    """Return the settings that a file of that name holds. Raises ConfigError.

    Relative paths are below the working directory.
    """
    return _settings(_Source(name, YamlFile(content)), Path(), "embed")[0]


def read(path: Path | None) -> dict[Any, Any]:
    """Return what a file holds, or the built-in one: not validated, `${NAME}` as it stands.

    Raises ConfigError.
    """
    return _mapping(_Source(_name_of(path), _parse(path or _built_in_file(), path)))


def load_mapping(path: Path) -> dict[Any, Any]:
    """Return what a YAML file beside the configuration holds, a mapping. Raises ConfigError."""
    return read(path)


@dataclass(slots=True)
class _Source:
    """Where a configuration comes from: what makes lines of its mistakes."""

    name: str
    file: YamlFile = field(default_factory=lambda: YamlFile(None))
    overrides: Mapping[KeyPath, object] = field(default_factory=dict)
    """Keys that do not come from the file."""

    def where(self, path: KeyPath) -> tuple[str, int]:
        """Return the file, and the line of a key in it; 0 where that is not known."""
        line = self.file.line_of(path) or 0
        for override in self.overrides:
            is_below = path[: len(override)] == override
            # A section may be the file's, and a key below it the command line's.
            is_above = bool(path) and override[: len(path)] == path
            if is_below or (is_above and (len(path) > 1 or not line)):
                return COMMAND_LINE, 0
        return self.name, line

    def content(self) -> dict[Any, Any]:
        """Return what applies before it is validated: the file, and what replaces keys of it."""
        content = dict(_mapping(self))
        if self.name == BUILT_IN:
            # The file shows where the default leads; XDG_DATA_HOME may lead elsewhere.
            content["cache"] = {k: v for k, v in content["cache"].items() if k != "directory"}
            # Nobody has named these: they are what is there by default.
            content.pop("providers", None)
        for path, value in self.overrides.items():
            # A section that is none stays, as a mistake of the file.
            if isinstance(content.get(path[0]), dict | NoneType) or len(path) == 1:
                content = _replace(content, path, value)
        return content

    def line(self, problem: Problem, line: int = 0) -> str:
        """Return a problem as `file:line: key: problem; remedy`, without what is not known."""
        name, line_number = self.where(problem.path)
        line = line or line_number
        if name == BUILT_IN:
            line = 0
        location = f"{name}:{line}" if line else name
        return ": ".join(part for part in (location, problem.key, problem.message) if part)

    def mistakes(self, problems: Iterable[Problem]) -> list[tuple[int, str]]:
        """Return problems as (number of the line, what is told)."""
        return [(self.where(problem.path)[1], self.line(problem)) for problem in problems]

    def error(self, mistakes: Iterable[tuple[int, str]]) -> ConfigError:
        """Return the error that tells of mistakes, in the order of the file's lines."""
        ordered = sorted(dict.fromkeys(mistakes), key=lambda mistake: mistake[0])
        lines = [line for _, line in ordered[:MAX_PROBLEMS]]
        if len(ordered) > MAX_PROBLEMS:
            lines.append(f"{self.name}: and {len(ordered) - MAX_PROBLEMS} more mistakes")
        return ConfigError(*lines)


def _replace(content: dict[Any, Any], path: KeyPath, value: object) -> dict[Any, Any]:
    """Return a content with another value at a place. What stands for a section there goes."""
    key, *below = path
    if below:
        section = content.get(key)
        value = _replace(section if isinstance(section, dict) else {}, tuple(below), value)
    return {**content, key: value}


def find() -> Path | None:
    """Return the file that applies where none is named: in the working directory, or the user's.

    None = there is none, and the built-in configuration applies.
    """
    user_folder = os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config"
    places = (Path(FILE_NAME), Path(user_folder) / "embedding-proxy" / "config.yaml")
    return next((place for place in places if place.is_file()), None)


def _name_of(path: Path | None) -> str:
    return BUILT_IN if path is None else str(path)


def _built_in_file() -> Path:
    """Return config.yaml: in `proxy` in an installation, at the root of a checkout."""
    installed = Path(__file__).parents[1] / "config.yaml"
    return installed if installed.exists() else Path(__file__).parents[2] / "config.yaml"


def built_in_text() -> str:
    """Return config.yaml as it stands: every key with its default, and what it does."""
    return _built_in_file().read_text(encoding="utf-8")


def _folder_of(path: Path | None) -> Path | None:
    """Return the folder that a file's relative paths are below; None where it lies in none."""
    if path is None:
        return Path()
    whole = path.absolute()
    # /dev/shm is a folder like any other; /dev/stdin, /dev/fd/N and what is below /proc are not.
    is_stream = whole.parts[1:2] in (("dev",), ("proc",)) and whole.parts[1:3] != ("dev", "shm")
    in_folder = path.is_file() and not is_stream
    return whole.parent if in_folder else None


def _parse(source: Path, path: Path | None) -> YamlFile:
    """Return what a file holds. Raises ConfigError."""
    name = _name_of(path)
    try:
        return yaml_file.parse(source.read_text(encoding="utf-8"))
    except OSError as error:
        hint = "; for standard input give /dev/stdin" if name == "-" else ""
        raise ConfigError(f"{name}: cannot be read: {error.strerror}{hint}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{name}: is not UTF-8 text; save it as UTF-8") from error
    except YamlError as error:
        where = f"{name}:{error.line}" if error.line else name
        raise ConfigError(f"{where}: {error}") from error


def _mapping(source: _Source) -> dict[Any, Any]:
    """Return what a file holds, keys with values. Raises ConfigError."""
    content = source.file.content
    if content is not None and not isinstance(content, dict):
        raise ConfigError(f"{source.name}: expected keys such as `server:`, found something else")
    return content or {}


def _settings(
    source: _Source, folder: Path | None, purpose: Purpose
) -> tuple[Settings, list[Problem]]:
    """Return the settings of a source, and its variables that nobody needs now.

    Raises ConfigError with all mistakes; of a key that is written twice, those of each copy.
    """
    context = {FOLDER: folder, INSPECTED: purpose == "inspect"}
    mistakes = [
        (problem.line, source.line(Problem(problem.path, problem.message), problem.line))
        for problem in source.file.duplicates
    ]
    settings: Settings | None = None
    spared: list[Problem] = []
    for version in source.file.versions or (source.file,):
        copy = replace(source, file=version)
        try:
            resolved, needed, spared = references.resolve(copy.content(), purpose)
            settings, problems = validate(resolved, context, [problem.path for problem in needed])
        except RecursionError as error:
            raise ConfigError(
                f"{source.name}: an anchor holds itself; write the values out"
            ) from error
        mistakes += copy.mistakes([*needed, *problems])
    if mistakes or settings is None:
        raise source.error(mistakes)
    return settings, spared
