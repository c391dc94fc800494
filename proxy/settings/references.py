"""References of a configuration to the environment: `${NAME}` and `${NAME:-default}`."""

import os
import re
import secrets
from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import Any, Literal

from .problem import KeyPath, Problem

_REFERENCE = re.compile(r"\$\{([A-Za-z_][A-Za-z0-9_]*)(?::-([^}]*))?\}")

Purpose = Literal["serve", "embed", "inspect"]
"""What a configuration is read for: `serve` opens a port; `embed` asks providers and opens none;
`inspect` does neither."""

_SPARED: Mapping[Purpose, tuple[str, ...]] = {
    "serve": (),
    "embed": ("server.keys.*",),
    "inspect": ("server.keys.*", "providers.*.headers.*", "providers.*.proxy"),
}
"""Keys whose variables need not be set, by purpose: they are for clients, or for providers."""


def resolve(content: object, purpose: Purpose) -> tuple[Any, list[Problem], list[Problem]]:
    """Return a configuration with its references replaced, and the variables that are not set.

    The first list has those that `purpose` needs, whose references stay; the second one the
    others, in whose place a value is put that nobody can know or use. An empty variable counts as
    unset. What a variable holds is not searched for references.
    """
    needed: list[Problem] = []
    spared: list[Problem] = []

    def replaced(value: object, path: KeyPath) -> object:
        if isinstance(value, dict):
            return {key: replaced(one, (*path, _part(key))) for key, one in value.items()}
        if isinstance(value, list):
            return [replaced(one, (*path, i)) for i, one in enumerate(value)]
        if not isinstance(value, str):
            return value
        references = _REFERENCE.finditer(value)
        unset = [one[1] for one in references if not os.environ.get(one[1]) and one[2] is None]
        if not unset:
            return _REFERENCE.sub(lambda one: os.environ.get(one[1]) or one[2], value)
        problems = [
            Problem(path, f"the variable {name} is not set; set it, or write ${{{name}:-default}}")
            for name in dict.fromkeys(unset)
        ]
        key = ".".join(map(str, path))
        if not any(fnmatchcase(key, pattern) for pattern in _SPARED[purpose]):
            needed.extend(problems)
            return value
        spared.extend(problems)
        return "http://unset:unset@unset.invalid" if path[-1] == "proxy" else secrets.token_hex()

    return replaced(content, ()), needed, spared


def _part(key: object) -> str | int:
    return key if isinstance(key, str | int) else str(key)
