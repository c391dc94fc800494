"""Hits beside others: T12, several workers, and what bulk replies leave in memory."""

import multiprocessing
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import uvloop

from .client import Client, Load, in_turns
from .hits import BULK, KNOWN, MEMORY_MIB
from .material import Made, asking, make, prove, say
from .process import EVERYWHERE, Server, bare, memory, on, proxy
from .table import Row, compare, percentile

SINGLES_A_TURN = 150
MOST_BULKS = 1_000_000
LEAST_NICE = 19
REPLIES, A_LOOK = 1_000, 50
SETTLE_SECONDS = 2.0
REPLY_MB = 16.4
"""One long reply: what is kept after a thousand is less, or it is kept of each."""
WORKERS = 2
CONNECTIONS = 32
SINGLES_A_ROUND = 3_000


def rows(folder: Path, rounds: int, wanted: Callable[[str], bool]) -> Iterator[Row]:
    """Measure what is wanted."""
    if not any(map(wanted, ("T12", "WORKERS", "MEMORY"))):
        return
    made = uvloop.run(make(folder / "beside", KNOWN))
    if wanted("T12"):
        say("T12 single hits beside bulk requests")
        yield quick(made, rounds)
    if wanted("WORKERS"):
        say("several workers")
        yield workers(made, rounds)
    if wanted("MEMORY"):
        say(f"memory after {REPLIES:,} bulk replies")
        yield kept(made, REPLIES if rounds > 3 else REPLIES // 5)


def quick(made: Made, rounds: int) -> Row:
    """T12: single hits with nobody beside them and with a client that asks for bulks, in turns."""
    same = [asking(made.some(BULK), encoding) for encoding in ("base64", "float")]

    def bulks() -> list[bytes]:
        """Return four, two of which come again in every turn."""
        base64, floats = (asking(made.some(BULK), encoding) for encoding in ("base64", "float"))
        return [base64, same[1], same[0], floats]

    with proxy(made.directory, memory_mib=MEMORY_MIB) as running:
        for first in range(0, KNOWN, BULK):
            size = prove(running, range(first, first + BULK))
        ours = latencies(running, made, bulks, rounds, b"x-cache: hit")
    with bare(size) as limit:
        alone, beside = latencies(limit, made, lambda: same[:1], max(2, rounds // 3), b"")
    figures = {}
    for what, taken in zip(("alone", "beside"), ours, strict=True):
        figures[f"{what}_p99_ms"] = percentile(taken, 0.99) * 1e3
        figures[f"{what}_p50_ms"] = percentile(taken, 0.5) * 1e3
    figures["beside_most_ms"] = max(ours[1]) * 1e3
    figures["bare_ratio"] = percentile(beside, 0.99) / percentile(alone, 0.99)
    return Row(
        target="T12",
        what="p99 of single hits beside bulk requests",
        value=percentile(ours[1], 0.99) / percentile(ours[0], 0.99),
        unit="× without",
        most=5.0,
        figures=figures,
    )


def latencies(
    running: Server, made: Made, bulks: Callable[[], list[bytes]], rounds: int, expects: bytes
) -> tuple[list[float], list[float]]:
    """Return the seconds of single requests: alone, and beside bulks."""
    alone: list[float] = []
    beside: list[float] = []
    with Client(running, 1, expects=expects) as client:
        for number in range(rounds + 1):
            singles = [asking(one) for one in made.some(SINGLES_A_TURN)]
            some = [client.ask(single) for single in singles]
            with asked_for(running, bulks(), expects):
                others = [client.ask(single) for single in singles]
            if number:
                alone += some
                beside += others
    return alone, beside


@contextmanager
def asked_for(running: Server, bulks: Sequence[bytes], expects: bytes) -> Iterator[None]:
    """Have another process ask for bulks, one after another, until the block ends.

    It gives way to this one, which shares its core: what is timed here is the server.
    """
    context = multiprocessing.get_context("fork")
    asks = context.Event()

    def work() -> None:
        os.nice(LEAST_NICE)
        with Client(running, 1, expects=expects) as client:
            for number in range(MOST_BULKS):
                client.ask(bulks[number % len(bulks)])
                asks.set()

    other = context.Process(target=work, daemon=True)
    other.start()
    try:
        if not asks.wait(60):
            raise RuntimeError("bulk requests are not answered")
        yield
    finally:
        other.terminate()
        other.join()


def workers(made: Made, rounds: int) -> Row:
    """Single hits of one worker and of two, on all cores, which the load shares.

    The load takes its part of the machine, so what counts is requests by second of the servers'
    processors: 1 means that two workers do twice the work of one where they have the cores for it.
    """
    with (
        on(EVERYWHERE),
        proxy(made.directory, memory_mib=MEMORY_MIB, cores=EVERYWHERE) as one,
        proxy(made.directory, memory_mib=MEMORY_MIB, cores=EVERYWHERE, workers=WORKERS) as two,
        Client(one, CONNECTIONS) as first,
        Client(two, CONNECTIONS) as second,
    ):
        # In an order of its own each time, lest a worker is always asked the same.
        everything = ([asking(number) for number in made.some(KNOWN)] for _ in range(3 * WORKERS))
        in_turns((first, second), everything)
        taken = in_turns(
            (first, second),
            ([asking(number) for number in made.some(SINGLES_A_ROUND)] for _ in range(rounds)),
        )
    compared = compare(taken[1], taken[0], name="one")
    figures = {"by_the_clock": 1 / compared.wall}
    for who, loads in zip(("one", "two"), taken, strict=True):
        figures |= each(who, loads)
    return Row(
        target="",
        what="two workers on two cores, requests by CPU second",
        value=1 / compared.cpu,
        unit="× one worker's",
        figures=figures,
    )


def each(who: str, loads: Sequence[Load]) -> dict[str, float]:
    """Return what a server did in a second, and what a request cost it and the load."""
    count = len(loads)
    return {
        f"{who}_requests_s": count / sum(load.seconds for load in loads),
        f"{who}_requests_cpu_s": count / sum(load.cpu_seconds for load in loads),
        f"{who}_client_cpu_µs": sum(load.client_seconds for load in loads) / count * 1e6,
    }


def kept(made: Made, replies: int) -> Row:
    """Return what is resident after many bulk replies, beyond what was: all known inputs cached."""
    with (
        proxy(made.directory, memory_mib=MEMORY_MIB) as running,
        Client(running, 1) as client,
    ):
        for first in range(0, KNOWN, BULK):
            prove(running, range(first, first + BULK))
        time.sleep(SETTLE_SECONDS)
        before = memory(running, made.directory).resident
        requests = [asking(made.some(BULK)) for _ in range(5)]
        peak = before
        for number in range(replies):
            client.ask(requests[number % len(requests)])
            if number % A_LOOK == 0:
                peak = max(peak, memory(running, made.directory).resident)
        time.sleep(SETTLE_SECONDS)
        after = memory(running, made.directory)
    figures = {"before_mb": before, "between_replies_mb": peak, "after_mb": after.resident}
    figures["peak_with_mapped_mb"] = after.peak
    return Row(
        target="T10",
        what=f"resident after {replies:,} bulk replies, beyond what was before",
        value=after.resident - before,
        unit="MB",
        most=REPLY_MB,
        figures=figures,
    )
