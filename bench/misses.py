"""T5 to T7, T13, T14: what a miss adds to a direct call, and how few are bought."""

import json
import statistics
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import TypeVar

from splintr import Tokenizer

from .client import Client
from .material import asking, body_of, http_request, say, text
from .process import Server, proxy, upstream
from .table import Row

SLOW = ("20", "1")
"""Milliseconds a call and an input take upstream."""
ONES_A_ROUND = 60
MANY = 2_000
MANY_ROUNDS = 3
AT_ONCE = 1_000
CROWD = 300
VERY_SLOW = ("1000", "0")
"""Milliseconds a call and an input take at an upstream that a crowd has to queue for."""
GATHER_MS = 5
"""`server.batch_window_ms`, which is off by default: it is for those who want few calls."""
DOCUMENTS = 2_000
CLIENTS = 16

T = TypeVar("T")


def rows(folder: Path, rounds: int, wanted: Callable[[str], bool]) -> Iterator[Row]:
    """Measure what is wanted."""
    if wanted("T5"):
        say("T5 a miss beside a direct call")
        with upstream() as up, proxy(folder / "ones", provider=up) as running:
            yield one(running, up, rounds * ONES_A_ROUND)
    if wanted("T6"):
        say("T6 2,000 misses beside a direct call")
        with upstream(*SLOW) as up, proxy(folder / "many", provider=up) as running:
            yield many(running, up, min(rounds, MANY_ROUNDS))
    if wanted("T7"):
        say("T7 1,000 misses at once")
        for batch_window_ms in (0, GATHER_MS):
            store, section = (
                folder / f"gather-{batch_window_ms}",
                {"batch_window_ms": batch_window_ms},
            )
            with upstream(*SLOW) as up, proxy(store, provider=up, section=section) as running:
                yield from at_once(running, up, batch_window_ms)
    if wanted("T14"):
        say("T14 300 clients of one text each, at a slow upstream")
        with upstream(*VERY_SLOW) as up, proxy(folder / "crowd", provider=up) as running:
            yield from crowd(running, up)
    if wanted("T13"):
        say("T13 a trace of indexing and re-indexing")
        with upstream() as up, proxy(folder / "trace", provider=up) as running:
            yield traced(running, up)


def calls(up: Server) -> list[int]:
    """Return how many inputs each call had since this was last asked."""
    with urllib.request.urlopen(f"http://127.0.0.1:{up.port}/v1/calls") as reply:
        return list(json.load(reply))


def one(running: Server, up: Server, count: int) -> Row:
    """T5: serial misses of one input, and direct calls, in turns."""
    direct, through = [], []
    before = 0.0
    with (
        Client(up, 1, expects=b"") as first,
        Client(running, 1, expects=b"x-cache: miss") as second,
    ):
        for number in range(-10, count):
            if number == 0:
                before = running.cpu_seconds
            direct.append(first.ask(asking(number)))
            through.append(second.ask(asking(number)))
    cpu = (running.cpu_seconds - before) / count
    direct, through = direct[10:], through[10:]
    added = statistics.median(through) - statistics.median(direct)
    figures = {
        "through_ms": statistics.median(through) * 1e3,
        "direct_ms": statistics.median(direct) * 1e3,
        "proxy_cpu_ms": cpu * 1e3,
        "calls": len(calls(up)) - len(direct),
    }
    return Row(
        target="T5",
        what="a miss, added to a direct call",
        value=added * 1e3,
        unit="ms",
        most=1.0,
        figures=figures,
    )


def many(running: Server, up: Server, rounds: int) -> Row:
    """T6: long requests of which nothing is known, and direct calls, in turns."""
    direct, through, ratios = [], [], []
    with (
        Client(up, 1, expects=b"") as first,
        Client(running, 1, expects=b"x-cache: miss") as second,
    ):
        for number in range(rounds):
            request = asking(range(number * MANY, (number + 1) * MANY))
            direct.append(first.ask(request))
            calls(up)
            through.append(second.ask(request))
            parts = calls(up)
            ratios.append(direct[-1] / through[-1])
    figures = {
        "through_ms": statistics.median(through) * 1e3,
        "direct_ms": statistics.median(direct) * 1e3,
        "calls": len(parts),
        "worst": min(ratios),
    }
    return Row(
        target="T6",
        what="2,000 misses, fanned out",
        value=statistics.median(ratios),
        unit="× faster",
        least=3.0,
        figures=figures,
    )


def at_once(running: Server, up: Server, batch_window_ms: int) -> Iterator[Row]:
    """T7: as many clients as requests."""
    with Client(running, AT_ONCE, expects=b"") as client:
        for what, inputs in (("identical", [-1] * AT_ONCE), ("different", range(-9999, -8999))):
            calls(up)
            seconds = client.load([asking(number) for number in inputs]).seconds * AT_ONCE
            bought = calls(up)
            most = 1 if what == "identical" else 16
            yield Row(
                target="T7",
                what=f"1,000 {what} misses at once, batch_window_ms {batch_window_ms}",
                value=len(bought),
                unit="calls",
                most=most,
                figures={"seconds": seconds, "inputs": sum(bought), "largest_call": max(bought)},
            )


def crowd(running: Server, up: Server) -> Iterator[Row]:
    """T14: more clients than the provider has slots, each with a text of its own."""
    with Client(running, CROWD, expects=b"") as client:
        seconds = client.load([asking(number) for number in range(-600, CROWD - 600)]).seconds
    bought = calls(up)
    figures = {"inputs": sum(bought), "largest_call": max(bought)}
    what = "300 clients, upstream of 1 s a call, 8 slots"
    yield Row(target="T14", what=what, value=len(bought), unit="calls", most=60, figures=figures)
    yield Row(target="T14", what=f"{what}: all", value=seconds * CROWD, unit="s", most=10)


def traced(running: Server, up: Server) -> Row:
    """T13: five clients index the same documents in their own ways, all at once; then once more.

    Between, every twentieth document changed. Each client has its way of asking: lists of many in
    base64, single texts in JSON, ids of tokens as LangChain sends them, a shorter width, and lists
    in which documents come more than once.
    """
    random = Random(13)  # noqa: S311 - the same trace each time
    calls(up)
    first = [text(number) for number in range(DOCUMENTS)]
    second = [f"{one} (revised)" if i % 20 == 0 else one for i, one in enumerate(first)]
    with Client(running, CLIENTS, expects=b"") as client:
        requests = []
        for documents in (first, second):
            requests = [http_request(body) for body in trace(documents, random)]
            client.load(requests)
    bought, distinct = sum(calls(up)), len({*first, *second})
    asked = 2 * (3 * DOCUMENTS + DOCUMENTS // 2 + 2 * DOCUMENTS)
    return Row(
        target="T13",
        what="inputs billed over distinct inputs, re-indexing",
        value=bought / distinct,
        unit="×",
        least=1.0,
        most=1.0,
        figures={"billed": bought, "distinct": distinct, "asked": asked},
    )


def trace(documents: list[str], random: Random) -> list[bytes]:
    """Return the bodies that five clients send for some documents, in any order."""
    tokenizer = Tokenizer.from_pretrained("cl100k_base")

    def lists(of: list[T], size: int) -> Iterator[list[T]]:
        return (of[i : i + size] for i in range(0, len(of), size))

    twice = random.sample(documents * 2, 2 * len(documents))
    ids = [tokenizer.encode_ordinary(one) for one in documents]
    half = documents[: len(documents) // 2]
    bodies = [
        *(body_of(some, "base64") for some in lists(documents, 100)),
        *(body_of(some, "float", user="one by one") for some in documents),
        *(body_of(some, "base64") for some in lists(ids, 64)),
        *(body_of(some, "float", dimensions=256) for some in lists(half, 50)),
        *(body_of(some, "base64", dimensions=1536) for some in lists(twice, 96)),
    ]
    random.shuffle(bodies)
    return bodies
