"""What depends on how much is kept: the same figures of a small store and of a large one.

The entries are those of real inputs, in the space of a configured model; so the proxy serves them
as hits, without any provider. Rounds alternate between the two stores. All reads come from the
page cache: the stores were written just before.
"""

import http.client
import itertools
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

import uvloop
from common import (
    MB,
    RING,
    RNG,
    SIZE_LIMIT_GIB,
    VECTOR_BYTES,
    Row,
    ask,
    asking,
    connected,
    processor_seconds,
    proxy,
    resident,
    say,
    text,
)

from cache.store import Store

SMALL, LARGE, FEWEST = 10_000, 1_000_000, 4_000
BULK = 2_000
A_WRITE = 5_000
SPARE_BYTES = 2 << 30
"""Left free on the disk, for logs and for what the bench adds."""
BYTES_A_BYTE = 1.15
"""The most bytes on disk a byte of vectors."""
SINGLES, ROUNDS, WARM_UPS = 100, 200, 10
BULKS, STARTS, SETTLE_SECONDS = 10, 7, 1.0
MIB = 1 << 20
MEMORY_MIB = 256
IDLE_MB, SERVING_MB = 120, 200


@dataclass(frozen=True)
class Operation:
    """One call of a store, of `size` addresses, `calls` times a round."""

    name: str
    size: int
    calls: int


OPERATIONS = (
    Operation("get", 1, 300),
    Operation("get", BULK, 10),
    Operation("put", 1, 30),
    Operation("put", 64, 6),
    Operation("put", BULK, 1),
)
OPERATION_ROUNDS = 7


@dataclass(frozen=True)
class Made:
    """A store that was made for the bench."""

    directory: Path
    entries: int
    fresh: Iterator[int] = field(repr=False)
    """Numbers of inputs that it does not hold."""

    @property
    def name(self) -> str:
        """Return what it is called in the results."""
        return f"{self.entries:,} entries"

    def some(self, count: int) -> list[str]:
        """Return different inputs that it holds, at random."""
        return [text(number) for number in RNG.choice(self.entries, count, replace=False).tolist()]

    def open(self) -> Store:
        """Return the store, to be opened."""
        return Store(self.directory, SIZE_LIMIT_GIB << 30)


async def make(directory: Path, entries: int) -> Made:
    """Write a store; it is closed, and on the disk, when this returns."""
    made, start = Made(directory, entries, itertools.count(entries)), time.perf_counter()
    steps = range(0, entries, A_WRITE)
    async with made.open() as opened:
        for step, first in enumerate(steps, 1):
            records = RING.records(range(first, min(first + A_WRITE, entries)))
            if not await opened.put_many(records, RING.partition):
                raise RuntimeError("the store took no more")
            if step * 10 // len(steps) > (step - 1) * 10 // len(steps):
                taken = time.perf_counter() - start
                say(f"{first + len(records):,} of {made.name} written after {taken:.0f} s")
    os.sync()
    return made


def fitting(wanted: int, folder: Path) -> int:
    """Return how many entries the large store gets: those asked for, if there is room."""
    room = shutil.disk_usage(folder).free - SPARE_BYTES
    most = int(room / (BYTES_A_BYTE * VECTOR_BYTES)) - SMALL
    if most < FEWEST:
        raise SystemExit(f"bench: {folder} has no room for a store; set TMPDIR")
    if most < wanted:
        say(f"{folder} has no room for {wanted:,} entries: the large store gets {most:,}")
    return min(most, wanted)


def rows(entries: int) -> list[Row]:
    """Make the stores and measure everything."""
    with tempfile.TemporaryDirectory(prefix="bench-") as name:
        folder = Path(name)
        large_size = fitting(entries, folder)
        empty = Made(folder / "empty", 0, itertools.count())
        small = uvloop.run(make(folder / "small", min(SMALL, large_size // 2)))
        large = uvloop.run(make(folder / "large", large_size))
        results = [on_disk(made) for made in (small, large)]
        results += starts(empty, small, large)
        results += hits(small, large)
        results += [serving(made) for made in (small, large)]
        return results + uvloop.run(operations(small, large))


def on_disk(made: Made) -> Row:
    """T11: the closed file's bytes, by what its vectors have."""
    size = sum(file.stat().st_size for file in made.directory.glob("v*/*"))
    ratio = size / made.entries / VECTOR_BYTES
    figures = {"bytes_an_entry": round(size / made.entries, 1), "vector_bytes": VECTOR_BYTES}
    return Row(f"bytes on disk, {made.name}", ratio, "×", figures, "T11", BYTES_A_BYTE)


def starts(*stores: Made) -> Iterator[Row]:
    """T9: from exec to the announcement and an answer of /readyz. T10: memory once it idles."""
    say("starting the proxy")
    taken: dict[Made, list[tuple[float, float, float]]] = {made: [] for made in stores}
    idle: list[Row] = []
    for attempt in range(STARTS + 1):
        for made, times in taken.items():
            if not made.entries:
                shutil.rmtree(made.directory, ignore_errors=True)
            with proxy(made.directory, memory_mib=MEMORY_MIB) as running:
                client = http.client.HTTPConnection("127.0.0.1", running.port)
                client.request("GET", "/readyz")
                if client.getresponse().status != http.HTTPStatus.OK:
                    raise RuntimeError("it is not ready")
                taken_s = time.perf_counter() - running.since
                times.append((taken_s, *processor_seconds(running.pid)))
                if attempt == STARTS:
                    time.sleep(SETTLE_SECONDS)
                    idle.append(resident(f"idle, {made.name}", running, made.directory, IDLE_MB))
    for made, (_, *measured) in taken.items():
        times, used, waited = zip(*measured, strict=True)
        figures = {"fastest_s": min(times), "slowest_s": max(times)}
        figures |= {"cpu_s": median(used), "waited_for_cpu_s": median(waited)}
        rounded = {name: round(figure, 3) for name, figure in figures.items()}
        yield Row(f"start, {made.name}", median(times), "s", rounded, "T9", 0.8)
    yield from idle


def hits(small: Made, large: Made) -> Iterator[Row]:
    """T8: single hits on disk through the whole proxy, in turns on both stores."""
    say("asking two proxies in turns")
    # Short turns: a moment in which others have the processors falls on both, for p99's sake.
    with ExitStack() as stack:
        times: dict[Made, list[float]] = {small: [], large: []}
        running = {made: stack.enter_context(proxy(made.directory, memory_mib=0)) for made in times}
        clients = {made: stack.enter_context(connected(running[made])) for made in times}
        for number, made in itertools.product(range(WARM_UPS + ROUNDS), times):
            taken = [ask(clients[made], asking(one)) for one in made.some(SINGLES)]
            times[made] += taken if number >= WARM_UPS else ()
        yield from compared("hit on disk", times, "T8", 1.3)
        for made in times:
            for _ in range(BULKS):
                ask(clients[made], asking(*made.some(BULK)))
            what = f"serving, {made.name}, memory_mib 0"
            yield resident(what, running[made], made.directory, SERVING_MB)


def serving(made: Made) -> Row:
    """T10: after as many hits as fill the memory tier."""
    with proxy(made.directory, memory_mib=MEMORY_MIB) as running, connected(running) as client:
        for one in made.some(BULK):
            ask(client, asking(one))
        for _ in range(2 * MEMORY_MIB * MIB // VECTOR_BYTES // BULK):
            ask(client, asking(*made.some(BULK)))
        most = SERVING_MB + MEMORY_MIB * MIB / MB
        what = f"serving, {made.name}, memory_mib {MEMORY_MIB}"
        return resident(what, running, made.directory, most)


def compared(
    what: str, times: dict[Made, list[float]], target: str = "", most: float | None = None
) -> Iterator[Row]:
    """Yield the ratios of the large store's median and p99 to the small one's.

    The p99 of less than a hundred calls is the slowest.
    """
    small, large = times.values()
    for name, figure in (("median", median), ("p99", lambda t: sorted(t)[int(0.99 * len(t))])):
        unit, scale = ("µs", 1e6) if figure(small) < 1e-3 else ("ms", 1e3)
        figures = {f"{m.name} {name}_{unit}": round(figure(t) * scale, 2) for m, t in times.items()}
        ratio = figure(large) / figure(small)
        yield Row(f"{what}, {name}", ratio, "×", figures, target, most)


async def operations(small: Made, large: Made) -> list[Row]:
    """Time the calls of a store, in turns on both; puts are of new entries."""
    say("calling two stores in turns")
    results: list[Row] = []
    async with small.open() as first, large.open() as second:
        for operation in OPERATIONS:
            times: dict[Made, list[float]] = {small: [], large: []}
            for number in range(OPERATION_ROUNDS + 1):
                for made, opened in ((small, first), (large, second)):
                    taken = [await timed(operation, made, opened) for _ in range(operation.calls)]
                    times[made] += taken if number else ()
            results += compared(f"store: {operation.name} {operation.size:,}", times)
    return results


async def timed(operation: Operation, made: Made, opened: Store) -> float:
    """Return the seconds one call takes."""
    if operation.name == "get":
        addresses = [RING.key(one).address for one in made.some(operation.size)]
        start = time.perf_counter()
        complete = len(await opened.get_many(addresses)) == len(addresses)
    else:
        records = RING.records(list(itertools.islice(made.fresh, operation.size)))
        start = time.perf_counter()
        complete = await opened.put_many(records, RING.partition)
    end = time.perf_counter()
    if not complete:
        raise RuntimeError(f"{operation.name} failed")
    return end - start
