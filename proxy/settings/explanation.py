"""What pydantic found wrong with a configuration, in words: problem and remedy for each mistake.

No value of the file is repeated: it may be a key.
"""

import re
from collections.abc import Iterator, Sequence
from typing import Any, get_args, get_origin

from embedding_proxy.providers.catalogue import CATALOGUE
from pydantic import ValidationError
from pydantic.fields import FieldInfo

from .problem import KeyPath, Problem, Problems, nearest
from .schema import KINDS, Settings
from .section import Section

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
_OLD_SECTIONS = {"llm", "vector_store"}


def explain(error: ValidationError) -> Iterator[Problem]:
    """Yield the mistakes that a validation found; a path may be masked."""
    found = error.errors(include_url=False, include_input=False)
    paths = [tuple(part for part in one["loc"] if part != "[key]") for one in found]
    for path, one in zip(paths, found, strict=True):
        # A list whose only entry is wrong counts as empty.
        is_follow_up = one["type"] == "too_short" and any(
            other[: len(path)] == path and other != path for other in paths
        )
        if not is_follow_up:
            yield from _problems(path, one)


def field_at(path: Sequence[str | int]) -> FieldInfo | type[Section] | None:
    """Return what a path leads to: a key of a section, or a section; None for anything else.

    >>> field_at(("models", "m", "routes", 0)), field_at(("server", "sport"))
    (<class 'proxy.settings.model_entry.Route'>, None)
    """
    found: FieldInfo | type[Section] | None = Settings
    is_name = False
    for part in path:
        if is_name:  # of an entry, or its position in a list
            is_name = False
            continue
        section = _section_of(found.annotation) if isinstance(found, FieldInfo) else found
        found = section.model_fields.get(str(part)) if section is not None else None
        if found is None:
            return None
        is_name = _is_container(found.annotation)
    if isinstance(found, FieldInfo) and not is_name and _is_container(found.annotation):
        return _section_of(found.annotation)
    return found


def known_keys(path: Sequence[str | int]) -> Iterator[str]:
    """Yield the keys of the section at `path`."""
    found = field_at(path)
    section = _section_of(found.annotation) if isinstance(found, FieldInfo) else found
    yield from section.model_fields if section is not None else ()


def _problems(path: KeyPath, one: Any) -> Iterator[Problem]:  # noqa: ANN401 - pydantic's ErrorDetails
    kind = one["type"]
    if kind == "extra_forbidden":
        yield _unknown_key(path)
    elif kind == "missing":
        yield Problem(path, f"is missing; add it{_meant_entry(path)}")
    elif kind == "value_error":
        cause = one.get("ctx", {}).get("error")
        if isinstance(cause, Problems):
            yield from (problem.below(path) for problem in cause.problems)
        else:
            yield Problem(path, one["msg"].removeprefix("Value error, "))
    else:
        # With other characters it is probably a key or an address.
        hides_name = (
            kind == "string_pattern_mismatch"
            and one["loc"][-1] == "[key]"
            and not _NEAR_NAME.fullmatch(str(path[-1]))
        )
        expected = _EXPECTED.get(kind) or one["msg"].removeprefix("Input should be ")
        yield Problem(path, f"expected {expected}", hides_name)


def _meant_entry(path: KeyPath) -> str:
    """Return a hint for a name that lacks what is known of a similar one."""
    known = {("providers", "kind"): KINDS, ("models", "space"): tuple(CATALOGUE)}
    near = nearest(str(path[1]), known.get((str(path[0]), str(path[-1])), ())) if path[1:] else ""
    return f", or did you mean {near}?" if near else ""


def _unknown_key(path: KeyPath) -> Problem:
    name = str(path[-1])
    if path[0] in _OLD_SECTIONS and len(path) == 1:
        return Problem(
            path,
            "is a section of an older configuration; `embedding-proxy config convert FILE` turns"
            " that into one of this proxy",
        )
    keys = sorted(known_keys(path[:-1]))
    near = nearest(name, keys, cutoff=0.5)
    if near:
        return Problem(path, f"unknown key; did you mean {near}?", meant=near)
    hides_name = not _PLAIN_NAME.fullmatch(name)
    return Problem(path, f"unknown key; known here: {', '.join(keys)}", hides_name)


def _is_container(annotation: Any) -> bool:  # noqa: ANN401 - any annotation
    """Tell whether a key holds several values, by name or in a list."""
    if isinstance(annotation, type):
        return False
    origin = get_origin(annotation)
    return origin in (dict, tuple) or (
        origin is not None and any(_is_container(one) for one in get_args(annotation))
    )


def _section_of(annotation: Any) -> type[Section] | None:  # noqa: ANN401 - any annotation
    """Return the Section inside an annotation, as in `dict[str, Provider | None]`."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return annotation
    return next((found for arg in get_args(annotation) if (found := _section_of(arg))), None)
