"""What pydantic found wrong with a configuration, in words: problem and remedy for each mistake.

No value of the file is repeated: it may be a key.
"""

import difflib
import re
from collections.abc import Iterator, Sequence
from typing import Any, get_args

from pydantic import ValidationError

from .problem import Path, Problem, Problems
from .schema import Settings
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
    """Yield the mistakes that a validation found, each once; a path may be masked."""
    found = error.errors(include_url=False, include_input=False)
    paths = [tuple(part for part in one["loc"] if part != "[key]") for one in found]
    unknown = [
        path for path, one in zip(paths, found, strict=True) if one["type"] == "extra_forbidden"
    ]
    # A misspelt key is unknown here and missing there; the first says more. And a list whose only
    # entry is wrong counts as empty.
    replaced = {(*path[:-1], near) for path in unknown if (near := _near(path))}
    for path, one in zip(paths, found, strict=True):
        is_follow_up = one["type"] == "too_short" and any(
            other[: len(path)] == path and other != path for other in paths
        )
        if is_follow_up or (one["type"] == "missing" and path in replaced):
            continue
        yield from _problems(path, one)


def known_keys(path: Sequence[str | int]) -> Iterator[str]:
    """Yield the keys of the section at `path`."""
    section: Any = Settings
    for part in path:
        fields = getattr(section, "model_fields", None)
        if fields is not None and part in fields:
            section = _section_of(fields[part].annotation)
    yield from getattr(section, "model_fields", {})


def _problems(path: Path, one: Any) -> Iterator[Problem]:  # noqa: ANN401 - pydantic's ErrorDetails
    kind = one["type"]
    if kind == "extra_forbidden":
        yield _unknown_key(path)
    elif kind == "missing":
        yield Problem(path, "is missing; add it")
    elif kind == "value_error":
        cause = one.get("ctx", {}).get("error")
        if isinstance(cause, Problems):
            yield from (problem.below(path) for problem in cause.problems)
        else:
            yield Problem(path, one["msg"].removeprefix("Value error, "))
    else:
        is_name = kind == "string_pattern_mismatch" and one["loc"][-1] == "[key]"
        if is_name and not _NEAR_NAME.fullmatch(str(path[-1])):
            # With other characters it is probably a key or an address.
            path = path[:-1]
        expected = _EXPECTED.get(kind) or one["msg"].removeprefix("Input should be ")
        yield Problem(path, f"expected {expected}")


def _unknown_key(path: Path) -> Problem:
    name = str(path[-1])
    if path[0] in _OLD_SECTIONS and len(path) == 1:
        return Problem(
            path,
            "is a section of an older configuration; `embedding-proxy config convert FILE` turns"
            " that into one of this proxy",
        )
    near = _near(path)
    if near:
        return Problem(path, f"unknown key; did you mean {near}?")
    known = ", ".join(sorted(known_keys(path[:-1])))
    hides_name = not _PLAIN_NAME.fullmatch(name)
    return Problem(path, f"unknown key; known here: {known}", hides_name)


def _near(path: Path) -> str:
    """Return the known key that an unknown one is most like; empty if it is like none."""
    known = list(known_keys(path[:-1]))
    return next(iter(difflib.get_close_matches(str(path[-1]), known, n=1, cutoff=0.5)), "")


def _section_of(annotation: Any) -> Any:  # noqa: ANN401 - any annotation
    """Return the Section inside an annotation, as in `dict[str, Provider | None]`."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return annotation
    return next((found for arg in get_args(annotation) if (found := _section_of(arg))), None)
