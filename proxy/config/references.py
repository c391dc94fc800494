"""What a configuration refers to: the environment (`${NAME}`, `${NAME:-default}`) and paths.

In paths `~` and variables are expanded; relative paths start at the folder of the file.
"""

import os
import re
import secrets
from collections.abc import Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Literal

from .errors import KeyPath, Problem

_REFERENCE = re.compile(r"\$\{([A-Za-z_][A-Za-z0-9_]*)(?::-([^}]*))?\}")
_VARIABLE = re.compile(r"\$(?:([A-Za-z_][A-Za-z0-9_]*)|\{([A-Za-z_][A-Za-z0-9_]*)\})")
Purpose = Literal["serve", "embed", "inspect"]
"""What a configuration is read for: `serve` opens a port; `embed` asks providers and opens none;
`inspect` does neither."""
_OF_CLIENTS = ("server.keys.*", "server.metrics_token")
_SPARED: Mapping[Purpose, tuple[str, ...]] = {
    "serve": (),
    "embed": _OF_CLIENTS,
    "inspect": (*_OF_CLIENTS, "providers.*.headers.*", "providers.*.proxy"),
}
"""Keys whose variables need not be set, by purpose: they are for clients, or for providers."""


def resolve(content: object, purpose: Purpose) -> tuple[Any, list[Problem], list[Problem]]:
    """Return a configuration with its references replaced, and the variables that are not set.

    The first list has those that `purpose` needs, whose references stay; the second one the
    others, in whose place a value is put that nobody can know or use. An empty variable counts as
    unset. What a variable holds is not searched for references.
    """
    missing: list[Problem] = []
    unset_allowed: list[Problem] = []

    def replace(value: object, path: KeyPath) -> object:
        if isinstance(value, dict):
            return {key: replace(item, (*path, _path_part(key))) for key, item in value.items()}
        if isinstance(value, list):
            return [replace(item, (*path, i)) for i, item in enumerate(value)]
        if not isinstance(value, str):
            return value
        references = _REFERENCE.finditer(value)
        unset = [
            match[1] for match in references if not os.environ.get(match[1]) and match[2] is None
        ]
        if not unset:
            return _REFERENCE.sub(lambda match: os.environ.get(match[1]) or match[2], value)
        problems = [
            Problem(path, f"the variable {name} is not set; set it, or write ${{{name}:-default}}")
            for name in dict.fromkeys(unset)
        ]
        key = ".".join(map(str, path))
        if not any(fnmatchcase(key, pattern) for pattern in _SPARED[purpose]):
            missing.extend(problems)
            return value
        unset_allowed.extend(problems)
        return "http://unset:unset@unset.invalid" if path[-1] == "proxy" else secrets.token_hex()

    return replace(content, ()), missing, unset_allowed


def _path_part(key: object) -> str | int:
    return key if isinstance(key, str | int) else str(key)


def absolute_path(text: str | Path, folder: Path | None) -> Path:
    """Return the absolute path that a configuration means. Raises ValueError with a remedy.

    `folder` is that of the file; None where there is none, as for standard input: then a relative
    path is refused.
    """
    text = str(text)
    if not text.strip():
        raise ValueError("expected a path, not an empty string")
    if "\0" in text:
        raise ValueError("holds a NUL character")
    path = _expand_home(_VARIABLE.sub(_variable_value, text))
    if path.is_absolute():
        return path
    if folder is None:
        raise ValueError(
            "is a relative path, and this configuration lies in no folder; write an absolute path"
        )
    path = folder.absolute() / path
    # `..` behind a link leads elsewhere than it reads: so it is resolved, and not left to be read.
    return path.resolve() if ".." in path.parts else path


def home_directory() -> Path:
    """Return the home directory of this process. Raises ValueError with a remedy."""
    return _expand_home("~")


def _expand_home(text: str) -> Path:
    """Return a path with a leading `~` or `~user` expanded. Raises ValueError."""
    path = Path(text)
    if not text.startswith("~"):
        return path
    first = path.parts[0]
    try:
        expanded = path.expanduser()
    except RuntimeError as error:
        if first == "~":
            raise ValueError("the home directory is not known; set HOME") from error
        raise ValueError(f"there is no such user: {first}") from error
    is_empty = first == "~" and os.environ.get("HOME") == ""
    if is_empty or not expanded.is_absolute():
        raise ValueError("HOME is no absolute path; set it to one")
    return expanded


def _variable_value(match: re.Match[str]) -> str:
    name = match[1] or match[2]
    value = os.environ.get(name)
    if not value:
        raise ValueError(f"the variable {name} is not set; set it, or write the path out")
    return value
