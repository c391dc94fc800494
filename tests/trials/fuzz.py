"""100,000 malformed requests: each gets a right answer, and both paths answer alike.

python fuzz.py REQUESTS SEED — the suite runs some hundred, `make fuzz` 100,000 at each path.
Two proxies, each a process of its own in front of an upstream of its own, get the same bytes: one
with the fast path (`server.fast_path`), one without. Three kinds of cases: requests drawn by
hypothesis, well-formed and malformed requests split at every byte, and what schemathesis makes of
/openapi.json. Every answer is parsed by a strict client. Wrong are: no answer and no close, bytes
that are no HTTP, a status of 500 or above, an error that is not JSON in OpenAI's shape or has no
x-request-id, a connection that is out of step behind well-formed requests, and any difference
between the two proxies.
"""

import asyncio
import itertools
import json
import random
import re
import sys
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fault_server import FaultServer, status
from fuzz_cases import MODEL, Case, bases, connections, generate, splits, variants
from own_process import own_process
from schema_cases import schema_cases
from strict_http import Malformed, Response, exchange, parse

CLIENTS = 128
WIDTH = 8
DRAWN = 20
"""Requests for each example that is drawn: examples are sent in variants, and take long to draw."""
MEMORY_MIB = 32
"""Of the cache; what a proxy takes besides is told by `Seen.memory`."""
ROUND = 10_000
"""Requests, after each of which the memory is measured."""
MAX_GROWTH_MIB = 64
"""From the first round on: twice what the cache may take."""
MAX_UNSTEADY = 0.01
SHOWN, MAX_SHOWN = 8, 2500
"""Failures that are printed, and characters of each."""
_COUNTS = ("x-cache", "x-tokens-", "x-embedding-provider")
_OWN = ("date", "x-request-id")


@dataclass
class Seen:
    """What came back."""

    requests: int = 0
    cases: Counter[str] = field(default_factory=Counter)
    statuses: Counter[int] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    memory: list[tuple[int, int]] = field(default_factory=list)
    """Resident MiB of the proxy with the fast path, and of that without, after each round."""
    unsteady: int = 0
    """Cases whose answers depend on how the network joins what is sent, at both paths alike."""
    repeated: int = 0
    """Cases with a cache hit: those where the fast path has something to do."""


def config(directory: Path, upstream: FaultServer, *, fast_path: bool) -> dict[str, Any]:
    """Return the configuration of one of the two proxies: short times, small bounds."""
    model = {
        "space": "s",
        "dimensions": WIDTH,
        "matryoshka": True,
        "tokenizer": "cl100k_base",
        "unit_norm": True,
        "routes": [{"provider": "openai", "model": MODEL}],
    }
    return {
        "server": {
            "fast_path": fast_path,
            "allowed_hosts": ["h"],
            "body_timeout_s": 2,
            "head_timeout_s": 2,
            "max_body_mib": 1,
        },
        "cache": {"directory": str(directory / "cache"), "memory_mib": MEMORY_MIB},
        "providers": {"openai": {"base_url": upstream.url}},
        "models": {MODEL: model},
        "passthrough": None,
    }


class Upstream(FaultServer):
    """Knows one model, and forgets its calls."""

    def __init__(self) -> None:
        super().__init__(widths={MODEL: WIDTH})
        error = {"message": "no such model", "type": "invalid_request_error", "param": None}
        self._unknown = status(404, {"error": {**error, "code": "model_not_found"}})
        self.always = self._act

    async def _act(self, request: Any, payload: dict[str, Any]) -> Any:
        self.calls.clear()
        if payload["model"] != MODEL:
            return await self._unknown(request, payload)
        return await self.altered(lambda _: None)(request, payload)


@dataclass
class Proxy:
    """One of the two."""

    process: asyncio.subprocess.Process
    address: tuple[str, int]
    errors: Path

    @property
    def memory_mib(self) -> int:
        """Resident memory."""
        told = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(re.search(r"VmRSS:\s+(\d+) kB", told)[1]) >> 10


@asynccontextmanager
async def proxies(folder: Path) -> AsyncIterator[tuple[Proxy, Proxy]]:
    """Run both, with the fast path and without. Raises AssertionError if one does not end well."""
    async with AsyncExitStack() as stack:
        made = []
        for fast_path in (True, False):
            upstream = await stack.enter_async_context(Upstream())
            directory = folder / f"{fast_path}"
            directory.mkdir()
            errors = directory / "errors"
            process, url = await stack.enter_async_context(
                own_process(
                    directory,
                    upstream,
                    settings=config(directory, upstream, fast_path=fast_path),
                    errors=errors,
                )
            )
            host, _, port = url.removeprefix("http://").partition("/")[0].partition(":")
            made.append(Proxy(process, (host, int(port)), errors))
        yield made[0], made[1]
        for proxy in made:
            proxy.process.terminate()
            code = await proxy.process.wait()
            log = proxy.errors.read_text()
            assert code == 0, f"the proxy ended with {code}: {log[-2000:]}"
            assert "Traceback" not in log, log[log.index("Traceback") - 300 :][:3000]


def problem(  # noqa: PLR0911 - one for each kind of fault
    case: Case, responses: list[Response]
) -> str | None:
    """Return what is wrong with the answers to a case; None if nothing is."""
    if not responses:
        # Without a whole head there is nobody to answer, if the client sends no more.
        return None if case.is_ended else "no answer"
    for response in responses:
        told = f"{response.status} {response.body[:200]!r}"
        if response.status >= 500:
            return f"a failure of the proxy: {told}"
        own = response.header("x-request-id") or ""
        # A client may choose its own, also by damage to the header that it sends.
        if not own.startswith("req_") and (not own or own.encode() not in b"".join(case.pieces)):
            return f"no x-request-id: {told}"
        if response.status >= 400 and (wrong := not_in_shape(response)):
            return f"{wrong}: {told}"
    if case.statuses and responses[0].status not in case.statuses:
        return f"a status that /openapi.json does not tell of: {responses[0]}"
    if any(one.is_last for one in responses[:-1]):
        return "an answer behind the last one"
    if case.is_well_formed and not is_closing_reply(responses[-1]):
        return f"the last request was not answered: {responses[-1]}"
    return None


def is_closing_reply(response: Response) -> bool:
    """Tell whether this is the answer to `CLOSE`: the server is in step with the client."""
    return response.body == b'{"status": "ok"}' and response.is_last


def not_in_shape(response: Response) -> str | None:
    """Return how an error differs from OpenAI's shape; None if it does not."""
    if response.header("content-type") != "application/json":
        return f"an error as {response.header('content-type')}"
    if not response.body:
        return None  # the answer to HEAD
    try:
        error = json.loads(response.body)["error"]
    except (ValueError, KeyError, TypeError):
        return "an error that is not of OpenAI's shape"
    if list(error) != ["message", "type", "param", "code"]:
        return f"an error with the keys {list(error)}"
    if not (isinstance(error["message"], str) and error["message"] and error["type"]):
        return "an error without a message"
    return None


def comparable(case: Case, responses: list[Response]) -> list[Any]:
    """Return responses without what differs from one to the other: the time and the id.

    Where the client ends, it is a matter of time whether a reply tells that it is the last.
    """
    own = (*_OWN, "connection") if case.is_ended else _OWN
    found = []
    for one in responses:
        # /status, /metrics and the dashboard tell of the process, its time and what it has counted.
        is_told = any(mark in one.body for mark in (b"uptime", b"# TYPE", b"usd_saved"))
        left_out = (*own, "content-length") if is_told else own
        headers = sorted(
            (name, value) for name, value in one.headers if name.lower() not in left_out
        )
        found.append((one.status, one.is_old, headers, b"" if is_told else one.body))
    return found


async def ask(case: Case, proxy: Proxy, gap_s: float) -> tuple[list[Response], str | None]:
    """Send a case; return the answers, and what is wrong with them."""
    data = b""
    try:
        data = await exchange(proxy.address, case.sent, gap_s=gap_s, is_ended=case.is_ended)
        responses = parse(data, has_head=b"HEAD" in b"".join(case.pieces))
    except TimeoutError:
        return [], "neither an answer nor a close"
    except Malformed as error:
        return [], f"no HTTP: {error} in {data[:500]!r}"
    return responses, problem(case, responses)


async def try_case(case: Case, pair: tuple[Proxy, Proxy], seen: Seen) -> None:
    """Send a case to both proxies, one after the other, and note what is wrong."""
    answers = []
    for proxy, path in zip(pair, ("fast path", "plain path"), strict=True):
        responses, wrong = await ask(case, proxy, case.gap_s)
        if wrong:
            seen.wrong.append(f"{case.kind}, {path}: {wrong}\n  {shown(case)}")
        seen.statuses.update(response.status for response in responses)
        answers.append(comparable(case, responses))
    seen.repeated += any(("x-cache", "hit") in headers for _, _, headers, _ in answers[0])
    if answers[0] != answers[1]:
        if await is_a_matter_of_time(case, pair, answers):
            seen.unsteady += 1
        else:
            seen.wrong.append(f"{case.kind}: {difference(*answers)}\n  {shown(case)}")


async def is_a_matter_of_time(
    case: Case, pair: tuple[Proxy, Proxy], first: list[list[Any]]
) -> bool:
    """Tell whether both paths give the answers of the other, when the pieces come otherwise.

    What is malformed may be found before what stands ahead of it is answered, or after.
    """
    found: list[list[list[Any]]] = [[], []]
    for gap_s in (0.0, 0.003, 0.02, 0.1, 0.0, 0.003):
        for proxy, outcomes in zip(pair, found, strict=True):
            outcomes.append(comparable(case, (await ask(case, proxy, gap_s))[0]))
    both = [one for one in found[0] if one in found[1]]
    return bool(both) and any(
        [_without_counts(answers) for answers in others].count(_without_counts(own))
        for own, others in ((first[0], found[1]), (first[1], found[0]))
    )


def _without_counts(answers: list[Any]) -> list[Any]:
    """Return answers without what a cache miss and a hit differ in."""
    return [
        (*told, [one for one in headers if not one[0].startswith(_COUNTS)], body)
        for *told, headers, body in answers
    ]


def difference(fast: list[Any], plain: list[Any]) -> str:
    """Return the first response in which both paths differ."""
    for number, (one, other) in enumerate(itertools.zip_longest(fast, plain)):
        if one != other:
            return f"answer {number} differs:\n    fast  {one}\n    plain {other}"
    return ""


def shown(case: Case) -> str:
    """Return how a case can be sent again."""
    pieces = case.pieces if sum(map(len, case.pieces)) < 3000 else [p[:300] for p in case.pieces]
    return f"{list(pieces)!r} ended={case.is_ended} gap={case.gap_s}"


def all_cases(requests: int, seed: int) -> Iterator[Case]:
    """Yield cases of all kinds in turn, of so many requests together.

    What takes long to draw is drawn before the first one: meanwhile nothing could be sent.
    """
    chance = random.Random(seed)
    drawn = [
        variant
        for case in generate(connections(), max(10, requests // DRAWN), seed)
        for variant in variants(case, chance)
    ]
    chance.shuffle(drawn)
    schema = list(schema_cases(max(60, requests // DRAWN), seed))
    kinds = (itertools.cycle(drawn), splits(seed), itertools.cycle(schema))
    made = 0
    for case in itertools.chain.from_iterable(zip(*kinds, strict=False)):
        yield case
        made += case.requests
        if made >= requests:
            return


async def run(cases: Iterable[Case], limit: int = 20) -> Seen:
    """Send the cases to both proxies; stop when `limit` of them went wrong."""
    seen, left = Seen(), iter(cases)
    left = itertools.chain([next(left)], left)
    with tempfile.TemporaryDirectory() as folder:
        async with proxies(Path(folder)) as pair:

            async def client() -> None:
                for case in left:
                    if len(seen.wrong) >= limit:
                        return
                    await try_case(case, pair, seen)
                    before = seen.requests
                    seen.requests += case.requests
                    seen.cases[case.kind.split()[0]] += 1
                    if before // ROUND != seen.requests // ROUND:
                        seen.memory.append((pair[0].memory_mib, pair[1].memory_mib))
                        print(
                            f"{seen.requests:,} requests, memory {seen.memory[-1]} MiB", flush=True
                        )

            warm = Case("warm", tuple(bases().values())[:2], 2)
            await try_case(warm, pair, seen)
            # Alone, so that a body follows its head while the proxy waits for it.
            for case in itertools.islice(splits(seed=0), len(bases())):
                await try_case(case._replace(gap_s=0.003), pair, seen)
            await asyncio.gather(*(client() for _ in range(CLIENTS)))
            seen.memory.append((pair[0].memory_mib, pair[1].memory_mib))
    return seen


def check(seen: Seen) -> None:
    """Raise AssertionError unless all answers were right, and the memory is bounded."""
    assert not seen.wrong, f"{len(seen.wrong)} wrong, the first: {seen.wrong[0]}"
    assert seen.repeated > 0
    assert seen.unsteady <= MAX_UNSTEADY * seen.requests
    for first, last in zip(seen.memory[0], seen.memory[-1], strict=True):
        assert last <= first + MAX_GROWTH_MIB, f"memory grew from {first} to {last} MiB"


def main() -> None:
    """Run the trial as the command line says."""
    started = time.monotonic()
    seen = asyncio.run(run(all_cases(int(sys.argv[1]), int(sys.argv[2]))))
    kinds = {re.split(r"[:\d]", wrong.partition(": ")[2])[0]: wrong for wrong in seen.wrong}
    for wrong in list(kinds.values())[:SHOWN]:
        print(wrong[:MAX_SHOWN])
    print(
        f"{seen.requests:,} requests at each path in {time.monotonic() - started:.0f} s,"
        f" {dict(seen.cases)}, {seen.repeated:,} connections with hits, statuses"
        f" {dict(sorted(seen.statuses.items()))}, memory {seen.memory} MiB,"
        f" {seen.unsteady} unsteady,"
        f" {len(seen.wrong)} wrong"
    )
    check(seen)


if __name__ == "__main__":
    main()
