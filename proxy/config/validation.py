"""Validates a configuration, finds all of its mistakes in one go, and explains each with a remedy.

pydantic looks at what belongs together only where each part is right by itself. So `validate`
replaces what is wrong by something that is right, and validates again, until there is nothing left
to find. What only follows from a replaced value is no mistake of the file, and is not returned.

`explain` puts pydantic's errors into words. It repeats no value of the file: it may be a key.
"""

import secrets
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, get_args, get_origin

from embedding_proxy.providers.model_catalog import CATALOGUE
from pydantic import ValidationError
from pydantic.fields import FieldInfo

from .errors import KeyPath, Problem, Problems, is_plain_name, nearest
from .fields import Section
from .schema import KINDS, Settings

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
_OLD_SECTIONS = {"llm", "vector_store"}
_MAX_ROUNDS = 20
_REPLACEMENTS: Mapping[str, Any] = {
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
            problems_found = list(explain(error))
            is_last = not any(problem["loc"] for problem in error.errors(include_url=False))
        else:
            return (None if problems or wrong else settings), problems
        lacking = {
            (*problem.path[:-1], problem.meant)
            for problem in problems_found
            if problem.meant and problem.meant not in _parent(content, problem.path)
        }
        problems += [
            _restore_name(problem, misspelt)
            for problem in problems_found
            if not problem.is_consequence_of(wrong | lacking)
        ]
        paths = {problem.path for problem in problems_found} - wrong
        if is_last or not paths:
            break
        for problem in problems_found:
            if problem.meant:
                section_path = _rename_section(content, problem)
                if section_path is not None:
                    misspelt[section_path] = problem.path
                    lacking.discard(section_path)
        for path in paths:
            _replace(content, path)
        wrong |= paths | lacking
    return None, problems


def _restore_name(problem: Problem, misspelt: Mapping[KeyPath, KeyPath]) -> Problem:
    """Return a problem of a section whose name was corrected, with the name that the file has."""
    for right_path, path_of_file in misspelt.items():
        if problem.path[: len(right_path)] == right_path:
            return problem._replace(path=(*path_of_file, *problem.path[len(right_path) :]))
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
        return next((key for key in node if str(key) == str(part)), part)
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
        value = _replacement(path[: i + 1])
        if value is not None and (is_there or isinstance(node, dict)):
            node[key] = value
        elif is_there and isinstance(node, dict):
            del node[key]
        elif holder is not None and isinstance(node, list):
            # All wrong entries of a list of plain values are found together.
            del holder[0][holder[1]]
        return


def _replacement(path: KeyPath) -> Any:  # noqa: ANN401 - whatever is right there
    """Return a value that is right by itself; None for what may lack."""
    section_field = field_at(path)
    if section_field is None:
        return None
    if isinstance(section_field, type):
        return {
            name: _required_value(name)
            for name, field in section_field.model_fields.items()
            if field.is_required()
        }
    return _required_value(str(path[-1])) if section_field.is_required() else None


def _required_value(name: str) -> Any:  # noqa: ANN401 - as above
    return _REPLACEMENTS.get(name) or secrets.token_hex()


def explain(error: ValidationError) -> Iterator[Problem]:
    """Yield the mistakes that a validation found; a path may be masked."""
    details = error.errors(include_url=False, include_input=False)
    paths = [tuple(part for part in detail["loc"] if part != "[key]") for detail in details]
    for path, detail in zip(paths, details, strict=True):
        # A list whose only entry is wrong counts as empty.
        is_follow_up = detail["type"] == "too_short" and any(
            other[: len(path)] == path and other != path for other in paths
        )
        if not is_follow_up:
            yield from _problems(path, detail)


def _problems(path: KeyPath, detail: Any) -> Iterator[Problem]:  # noqa: ANN401 - pydantic's ErrorDetails
    kind = detail["type"]
    if kind == "extra_forbidden":
        yield _unknown_key(path)
    elif kind == "missing":
        yield Problem(path, f"is missing; add it{_meant_entry(path)}")
    elif kind == "value_error":
        cause = detail.get("ctx", {}).get("error")
        if isinstance(cause, Problems):
            yield from (problem.add_prefix(path) for problem in cause.problems)
        else:
            yield Problem(path, detail["msg"].removeprefix("Value error, "))
    else:
        # With other characters it is probably a key or an address.
        hides_name = (
            kind == "string_pattern_mismatch"
            and detail["loc"][-1] == "[key]"
            and not is_plain_name(str(path[-1]))
        )
        expected = _EXPECTED.get(kind) or detail["msg"].removeprefix("Input should be ")
        yield Problem(path, f"expected {expected}", hides_name)


def _meant_entry(path: KeyPath) -> str:
    """Return a hint for a name that lacks what is known of a similar one."""
    names = {("providers", "kind"): KINDS, ("models", "space"): tuple(CATALOGUE)}
    near = nearest(str(path[1]), names.get((str(path[0]), str(path[-1])), ())) if path[1:] else ""
    return f", or did you mean {near}?" if near else ""


def _unknown_key(path: KeyPath) -> Problem:
    name = str(path[-1])
    if path[0] in _OLD_SECTIONS and len(path) == 1:
        return Problem(
            path,
            "is a section of an older configuration; `embedding-proxy config convert FILE` turns"
            " that into one of this proxy",
        )
    for section, names in (("models", CATALOGUE), ("providers", KINDS)):
        if len(path) == 1 and name in names:
            return Problem(path, f"unknown key; put it below `{section}:`")
    keys = sorted(known_keys(path[:-1]))
    near = nearest(name, keys, cutoff=0.5)
    if near:
        return Problem(path, f"unknown key; did you mean {near}?", meant=near)
    message = f"unknown key; known here: {', '.join(keys)}"
    return Problem(path, message, hides_name=not is_plain_name(name))


def field_at(path: Sequence[str | int]) -> FieldInfo | type[Section] | None:
    """Return what a path leads to: a key of a section, or a section; None for anything else.

    >>> field_at(("models", "m", "routes", 0)), field_at(("server", "sport"))
    (<class 'embedding_proxy.proxy.config.models.RouteConfig'>, None)
    """
    field: FieldInfo | type[Section] | None = Settings
    is_name = False
    for part in path:
        if is_name:  # of an entry, or its position in a list
            is_name = False
            continue
        section = _section_of(field.annotation) if isinstance(field, FieldInfo) else field
        field = section.model_fields.get(str(part)) if section is not None else None
        if field is None:
            return None
        is_name = _is_container(field.annotation)
    if isinstance(field, FieldInfo) and not is_name and _is_container(field.annotation):
        return _section_of(field.annotation)
    return field


def known_keys(path: Sequence[str | int]) -> Iterator[str]:
    """Yield the keys of the section at `path`."""
    field = field_at(path)
    section = _section_of(field.annotation) if isinstance(field, FieldInfo) else field
    yield from section.model_fields if section is not None else ()


def _is_container(annotation: Any) -> bool:  # noqa: ANN401 - any annotation
    """Tell whether a key holds several values, by name or in a list."""
    if isinstance(annotation, type):
        return False
    origin = get_origin(annotation)
    return origin in (dict, tuple) or (
        origin is not None and any(_is_container(argument) for argument in get_args(annotation))
    )


def _section_of(annotation: Any) -> type[Section] | None:  # noqa: ANN401 - any annotation
    """Return the Section inside an annotation, as in `dict[str, Provider | None]`."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return annotation
    return next((section for arg in get_args(annotation) if (section := _section_of(arg))), None)
