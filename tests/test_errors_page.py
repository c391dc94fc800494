"""docs/errors.md: its codes are those of the code, and its three requests get what it says."""

import ast
import re
from collections.abc import Mapping
from dataclasses import dataclass, field

import pytest
from fault_server import Act, hang, reset, status
from pages import ROOT

PAGE = (ROOT / "docs" / "errors.md").read_text(encoding="utf-8")
PACKAGES = ("proxy", "index", "cache", "providers")
MODEL = "text-embedding-3-small"
START = 1000.0


def _rows(heading):
    """Return the cells of the table below a heading, without its head."""
    part = PAGE.partition(f"\n## {heading}\n")[2].partition("\n## ")[0]
    lines = [line for line in part.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def _error(code=None, kind="requests"):
    return {"error": {"message": "refused", "type": kind, "param": None, "code": code}}


@dataclass(frozen=True)
class Failure:
    """How the upstream fails, and what is configured of its provider."""

    act: Act | None = None
    provider: Mapping[str, object] = field(default_factory=dict)
    has_key: bool = True
    calls: int | None = None
    """Calls that fail before the upstream is well; None = all."""


LIMIT = "rate_limit_exceeded"
FAILURES = {
    "the proxy's key is refused: 401": Failure(status(401, _error("invalid_api_key"))),
    "the proxy's key is refused: 403 `invalid_api_key`": Failure(
        status(403, _error("invalid_api_key"))
    ),
    "a model or an input is denied: 403 without a reason": Failure(status(403)),
    "the client's own key is refused (`auth: client`)": Failure(
        status(401, _error("invalid_api_key")), {"auth": "client"}
    ),
    "no key is configured": Failure(has_key=False),
    "out of credit: 429 `insufficient_quota`": Failure(
        status(429, _error("insufficient_quota", "insufficient_quota"))
    ),
    "out of credit: 402": Failure(status(402)),
    "rate limit with `Retry-After: 60`": Failure(status(429, _error(LIMIT), {"Retry-After": "60"})),
    "rate limit with `Retry-After: 2`, over by then": Failure(
        status(429, _error(LIMIT), {"Retry-After": "2"}), calls=1
    ),
    "rate limit without `Retry-After`": Failure(status(429, _error(LIMIT))),
    "outage: 500": Failure(status(500)),
    "outage: 503 with `Retry-After: 30`": Failure(status(503, headers={"Retry-After": "30"})),
    "outage: the connection breaks": Failure(reset()),
    "time-out: no answer within `timeout_s`": Failure(hang(), {"timeout_s": 0.5}),
    "bad input: 400": Failure(status(400, _error())),
}


def _requests():
    """Return the rows of each failure: those of its first, second and third request."""
    found = {}
    for name, *cells in _rows("The first, second and third request"):
        if name:
            last = found.setdefault(name, [])
        last.append(cells)
    return found


def _is(value, cell):
    """Tell whether a header or a code is what a cell says: itself, a range, or a dash for none."""
    if value is None or cell == "–":
        return value is None and cell == "–"
    least, _, most = cell.strip("`").partition("–")
    return int(least) <= int(value) <= int(most) if most else value == least


def test_a_cell_is_compared_with_what_came():
    """A range, a value and a dash each take what they say, and nothing else."""
    assert _is("900", "800–1000")
    assert not _is("700", "800–1000")
    assert _is("false", "`false`")
    assert not _is(None, "1")
    assert not _is("1", "–")


@pytest.mark.parametrize("name", FAILURES)
async def test_three_requests_get_what_the_page_says(name, upstream, start_proxy, monkeypatch):
    """Status, code, headers and whether the provider is called are those of the page's rows."""
    failure, now = FAILURES[name], START
    provider = {"base_url": upstream.url, **failure.provider}
    if failure.calls is None:
        upstream.always = failure.act
    else:
        upstream.script.extend([failure.act] * failure.calls)
    if failure.has_key and "key" not in provider:
        monkeypatch.setenv("OPENAI_API_KEY", "upstream-secret-key")
    proxy = await start_proxy(providers={"openai": provider})
    # The breaker and the cooldown of the provider see this clock; deadlines keep the real one.
    upstreams = proxy.service.upstreams
    real, upstreams.clock = upstreams.clock, lambda: now
    upstreams.of("openai")
    upstreams.clock = real

    rows = _requests()[name]
    assert len(rows) == 3
    for number, row in enumerate(rows):
        at, expected, code, *headers, called = row
        now = START + float(at.removesuffix(" s"))
        upstream.calls.clear()
        body = {"model": MODEL, "input": f"text {number}"}
        response = await proxy.post(body, Authorization="Bearer client-key")
        said = (await response.json()).get("error", {"code": None})
        assert response.status == int(expected), said
        assert _is(said["code"], code)
        for header, cell in zip(
            ("Retry-After", "retry-after-ms", "x-should-retry"), headers, strict=True
        ):
            assert _is(response.headers.get(header), cell), (header, response.headers.get(header))
        assert bool(upstream.calls) == (called == "yes")
        if response.status != 200:
            assert said.keys() == {"message", "type", "param", "code"}
            assert "secret" not in said["message"]
        if not failure.has_key:
            assert "OPENAI_API_KEY" in said["message"]


def test_every_failure_of_the_page_is_tried():
    """The rows of the page are those that the test above drives the proxy through."""
    assert list(_requests()) == list(FAILURES)


def _codes():
    """Return the error codes that stand in the code.

    A code is the value of an argument `code`, the fifth argument of a `Failure`, or the last string
    of a tuple that begins an answer: one that holds an HTTP status.
    """
    found = set()
    for package in PACKAGES:
        for file in sorted((ROOT / package).rglob("*.py")):
            for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
                values = []
                if isinstance(node, ast.Call):
                    values = [one.value for one in node.keywords if one.arg == "code"]
                    if getattr(node.func, "id", "") == "Failure":
                        values += node.args[4:5]
                elif isinstance(node, ast.Tuple):
                    constants = [one.value for one in node.elts if isinstance(one, ast.Constant)]
                    if any(type(one) is int and 400 <= one <= 599 for one in constants):
                        values = [one for one in node.elts if _is_word(one)][-1:]
                found |= {one.value for one in values if _is_word(one)}
    return found


def _is_word(node):
    return (
        isinstance(node, ast.Constant)
        and isinstance(node.value, str)
        and re.fullmatch(r"[a-z]+(_[a-z]+)*", node.value) is not None
    )


def test_the_page_has_every_code():
    """Each code that the proxy can answer with has its row, and no row is of a code it lacks."""
    listed = {row[0].strip("`") for row in _rows("Codes")} - {"none"}
    assert listed == _codes()
    assert len(listed) > 12
