"""Validates a configuration, and finds all of its mistakes in one go.

pydantic looks at what belongs together only where each part is right by itself. So what is wrong is
replaced by something that is right, and the rest is validated again, until nothing is left to find.
What only follows from a replaced value is no mistake of the file, and is not returned.
"""

import secrets
from collections.abc import Iterable, Mapping
from typing import Any

from pydantic import ValidationError

from .explanation import explain, field_at
from .problem import KeyPath, Problem
from .schema import Settings

_MAX_ROUNDS = 20

_STAND_INS: Mapping[str, Any] = {
    "kind": "openai",
    "routes": [{"provider": "local", "model": "any"}],
    "provider": "local",
    "model": "any",
}
"""Values of required keys that are right by themselves; of all others a random one is."""


def validate(
    content: dict[Any, Any], context: Mapping[str, Any], unset: Iterable[KeyPath]
) -> tuple[Settings | None, list[Problem]]:
    """Return the settings of a content, None where it has mistakes, and these.

    `content` is changed. `unset` has the places of values that are not known, which count as
    mistakes that were told.
    """
    wrong = set(unset)
    for path in wrong:
        _replace(content, path)
    problems: list[Problem] = []
    misspelt: dict[KeyPath, KeyPath] = {}
    for _ in range(_MAX_ROUNDS):
        try:
            settings = Settings.model_validate(content, context=context)
        except ValidationError as error:
            found = list(explain(error))
            is_last = not any(one["loc"] for one in error.errors(include_url=False))
        else:
            return (None if problems or wrong else settings), problems
        lacking = {
            (*one.path[:-1], one.meant)
            for one in found
            if one.meant and one.meant not in _parent(content, one.path)
        }
        problems += [
            _as_written(one, misspelt) for one in found if not one.follows(wrong | lacking)
        ]
        places = {one.path for one in found} - wrong
        if is_last or not places:
            break
        for one in found:
            if one.meant:
                place = _rename_section(content, one)
                if place is not None:
                    misspelt[place] = one.path
                    lacking.discard(place)
        for path in places:
            _replace(content, path)
        wrong |= places | lacking
    return None, problems


def _as_written(problem: Problem, misspelt: Mapping[KeyPath, KeyPath]) -> Problem:
    """Return a problem of a section whose name was corrected, with the name that the file has."""
    for meant, written in misspelt.items():
        if problem.path[: len(meant)] == meant:
            return problem._replace(path=(*written, *problem.path[len(meant) :]))
    return problem


def _rename_section(content: dict[Any, Any], problem: Problem) -> KeyPath | None:
    """Give a misspelt section its name, so that it is validated, too; return its place then."""
    parent = _parent(content, problem.path)
    value = parent.get(problem.path[-1])
    if not isinstance(value, dict) or problem.meant in parent:
        return None
    parent[problem.meant] = parent.pop(problem.path[-1])
    return (*problem.path[:-1], problem.meant)


def _parent(content: dict[Any, Any], path: KeyPath) -> Any:  # noqa: ANN401 - whatever YAML holds
    """Return what holds the last key of a path."""
    parent: Any = content
    for part in path[:-1]:
        parent = parent[_key(parent, part)]
    return parent


def _key(node: Any, part: str | int) -> Any:  # noqa: ANN401 - as above
    """Return the key that a part of a path stands for: pydantic tells a null or a date as text."""
    if isinstance(node, dict) and part not in node:
        return next((one for one in node if str(one) == str(part)), part)
    return part


def _replace(content: dict[Any, Any], path: KeyPath) -> None:
    """Put something right in the place of what is wrong, or remove it if it may lack."""
    node: Any = content
    holder: tuple[Any, Any] | None = None
    for i, part in enumerate(path):
        key = _key(node, part)
        is_there = key in node if isinstance(node, dict) else key in range(len(node))
        below = node[key] if is_there else None
        if i + 1 < len(path) and isinstance(below, dict | list):
            holder, node = (node, key), below
            continue
        value = _stand_in(path[: i + 1])
        if value is not None and (is_there or isinstance(node, dict)):
            node[key] = value
        elif is_there and isinstance(node, dict):
            del node[key]
        elif holder is not None and isinstance(node, list):
            # All wrong entries of a list of plain values are found together.
            del holder[0][holder[1]]
        return


def _stand_in(path: KeyPath) -> Any:  # noqa: ANN401 - whatever is right there
    """Return a value that is right by itself; None for what may lack."""
    found = field_at(path)
    if found is None:
        return None
    if isinstance(found, type):
        return {
            name: _value(name) for name, field in found.model_fields.items() if field.is_required()
        }
    return _value(str(path[-1])) if found.is_required() else None


def _value(name: str) -> Any:  # noqa: ANN401 - as above
    return _STAND_INS.get(name) or secrets.token_hex()
