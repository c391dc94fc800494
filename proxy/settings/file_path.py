"""Paths of a configuration: `~` and variables expanded, relative ones below the file's folder."""

import os
import re
from pathlib import Path

_VARIABLE = re.compile(r"\$(?:([A-Za-z_][A-Za-z0-9_]*)|\{([A-Za-z_][A-Za-z0-9_]*)\})")


def absolute(text: str | Path, folder: Path | None) -> Path:
    """Return the absolute path that a configuration means. Raises ValueError with a remedy.

    `folder` is that of the file; None where there is none, as for standard input: then a relative
    path is refused.
    """
    text = str(text)
    if not text.strip():
        raise ValueError("expected a path, not an empty string")
    if "\0" in text:
        raise ValueError("holds a NUL character")
    path = _at_home(_VARIABLE.sub(_value, text))
    if path.is_absolute():
        return path
    if folder is None:
        raise ValueError(
            "is a relative path, and this configuration lies in no folder; write an absolute path"
        )
    path = folder.absolute() / path
    # `..` behind a link leads elsewhere than it reads: so it is resolved, and not left to be read.
    return path.resolve() if ".." in path.parts else path


def home() -> Path:
    """Return the home directory of this process. Raises ValueError with a remedy."""
    return _at_home("~")


def _at_home(text: str) -> Path:
    """Return a path with a leading `~` or `~user` expanded. Raises ValueError."""
    path = Path(text)
    if not text.startswith("~"):
        return path
    first = path.parts[0]
    try:
        found = path.expanduser()
    except RuntimeError as error:
        if first == "~":
            raise ValueError("the home directory is not known; set HOME") from error
        raise ValueError(f"there is no such user: {first}") from error
    is_empty = first == "~" and os.environ.get("HOME") == ""
    if is_empty or not found.is_absolute():
        raise ValueError("HOME is no absolute path; set it to one")
    return found


def _value(match: re.Match[str]) -> str:
    name = match[1] or match[2]
    value = os.environ.get(name)
    if not value:
        raise ValueError(f"the variable {name} is not set; set it, or write the path out")
    return value
