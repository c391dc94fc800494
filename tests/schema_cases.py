"""What schemathesis makes of the OpenAPI description: fitting requests, and unfitting ones."""

import json
import random
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import requests
import schemathesis
from fuzz_cases import Case, generate
from schemathesis import GenerationMode

DESCRIPTION = Path(__file__).parents[1] / "proxy" / "http" / "openapi.json"
STREAMS = {"/dashboard/events"}
"""Replies without an end."""
_OF_THE_TOOL = {"user-agent", "x-schemathesis-testcaseid", "content-length"}


def description() -> dict[str, Any]:
    """Return the description as the proxy serves it."""
    return json.loads(DESCRIPTION.read_bytes())


def operations(document: Mapping[str, Any]) -> dict[tuple[str, str], dict[str, Any]]:
    """Return all operations by path and method, the shared ones of aliases too."""
    found = {}
    for path, item in document["paths"].items():
        name = item.get("$ref", "").rpartition("/")[2]
        shown = document["components"]["pathItems"][name] if name else item
        found |= {(path, method): operation for method, operation in shown.items()}
    return found


def schema_cases(count: int, seed: int) -> Iterator[Case]:
    """Yield about so many cases, for every operation alike, half of them fitting."""
    document = description()
    statuses = {
        place: frozenset(map(int, operation["responses"]))
        for place, operation in operations(document).items()
    }
    made = [one.ok() for one in schemathesis.openapi.from_dict(document).get_all_operations()]
    made = [one for one in made if one.path not in STREAMS]
    modes = (GenerationMode.POSITIVE, GenerationMode.NEGATIVE)
    cases = []
    for operation in made:
        # There is little to vary in a GET without parameters.
        share = 4 * count // (5 * len(made)) if operation.method == "post" else count // 100
        for mode in modes:
            drawn = generate(operation.as_strategy(generation_mode=mode), max(2, share), seed)
            known = statuses[operation.path, operation.method]
            cases += [case for one in drawn if (case := _case(one, known)) is not None]
    random.Random(seed).shuffle(cases)
    yield from cases


def _case(drawn: schemathesis.Case, statuses: frozenset[int]) -> Case | None:
    """Return a drawn case as bytes, sent twice; None for what cannot be written as HTTP."""
    try:
        told = requests.Request(**drawn.as_transport_kwargs(base_url="http://h")).prepare()
    except (requests.exceptions.RequestException, UnicodeError, ValueError):
        return None
    body = told.body or b""
    body = body.encode("utf-8", "surrogatepass") if isinstance(body, str) else body
    lines = [f"{told.method} {told.path_url} HTTP/1.1", "Host: h"]
    lines += [
        f"{_text(name)}: {_text(value)}"
        for name, value in told.headers.items()
        if name.lower() not in _OF_THE_TOOL
    ]
    lines.append(f"Content-Length: {len(body)}")
    sent = "\r\n".join((*lines, "", "")).encode("utf-8", "surrogatepass") + body
    return Case("schema", (sent, sent), 2, gap_s=0.002, statuses=statuses)


def _text(value: str | bytes) -> str:
    return value.decode("latin-1") if isinstance(value, bytes) else value
