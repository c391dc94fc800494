"""T8 to T11: what depends on how much is kept: the same figures of small stores and a large one.

All reads come from the page cache. The large store is kept in `.bench` for the next run, as long as
records and layout stay what they are.
"""

import hashlib
import http.client
import itertools
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from statistics import median

import uvloop
from embedding_proxy.cache.disk.schema import LAYOUT, PAGE_BYTES

from .client import Client
from .environment import KEPT
from .hits import BULK, KNOWN, MEMORY_MIB
from .material import RING, VECTOR_BYTES, VECTORS, Made, asking, make, prove, say
from .process import MB, Server, memory, proxy
from .table import Row, percentile

ENTRIES, FEWEST = 1_000_000, 2 * BULK
SPARE_BYTES = 2 << 30
"""Left free on the disk, for logs and for what the bench adds."""
BYTES_A_BYTE = 1.15
"""The most bytes on disk a byte of vectors."""
SINGLES, TURNS_A_ROUND, WARM_UPS = 100, 15, 10
BULKS, SETTLE_SECONDS = 10, 1.0
MIB = 1 << 20
IDLE_MB, SERVING_MB = 120, 200
READ_BYTES = 1 << 24


def rows(folder: Path, rounds: int, wanted: Callable[[str], bool], entries: int) -> Iterator[Row]:
    """Measure what is wanted."""
    if not any(map(wanted, ("T8", "T9", "T10", "T11"))):
        return
    large = large_store(entries)
    small = uvloop.run(make(folder / "small", min(KNOWN, large.entries // 2)))
    empty = Made(folder / "empty", 0, itertools.count())
    if wanted("T8"):
        say("T8 asking two proxies in turns")
        yield from hits(small, large, rounds)
    if wanted("T9"):
        say("T9 starting the proxy")
        yield from starts((empty, small, large), rounds)
    if wanted("T10"):
        say("T10 memory")
        for made in (small, large):
            yield from resident(made)
    if wanted("T11"):
        yield from map(on_disk, (small, large))


def large_store(entries: int) -> Made:
    """Return the large store, of an earlier run or new, and read it into the page cache."""
    made_of = (*RING.records(range(VECTORS)).items(), (bytes([LAYOUT]), str(PAGE_BYTES).encode()))
    digest = hashlib.sha256(b"".join(itertools.chain.from_iterable(made_of))).hexdigest()
    folder = KEPT / f"store-{entries}-{digest[:12]}"
    done = folder / "done"
    if not done.exists():
        for old in KEPT.glob("store-*"):
            shutil.rmtree(old)
        folder.mkdir(parents=True)
        done.write_text(str(uvloop.run(make(folder / "large", fitting(entries))).entries))
    made = Made(folder / "large", int(done.read_text()), itertools.count())
    for file in made.directory.glob("v*/*"):
        with file.open("rb", buffering=0) as opened:
            while opened.read(READ_BYTES):
                pass
    return made


def fitting(wanted: int) -> int:
    """Return how many entries the large store gets: those asked for, if there is room."""
    room = shutil.disk_usage(KEPT).free - SPARE_BYTES
    most = int(room / (BYTES_A_BYTE * VECTOR_BYTES)) - KNOWN
    if most < FEWEST:
        raise SystemExit(f"bench: {KEPT} has no room for a store")
    if most < wanted:
        say(f"{KEPT} has no room for {wanted:,} entries: the large store gets {most:,}")
    return min(most, wanted)


def hits(small: Made, large: Made, rounds: int) -> Iterator[Row]:
    """T8: single hits on disk through the whole proxy, in turns on both stores."""
    # Short turns: a moment in which others have the processors falls on both, for p99's sake.
    times: dict[str, list[float]] = {"small": [], "large": []}
    with ExitStack() as stack:
        sides = []
        for made in (small, large):
            running = stack.enter_context(proxy(made.directory, memory_mib=0))
            sides.append((made, stack.enter_context(Client(running, 1))))
            prove(running, made.some(BULK))
        for number in range(WARM_UPS + TURNS_A_ROUND * rounds):
            for (made, client), of in zip(sides, times.values(), strict=True):
                some = [client.ask(asking(one)) for one in made.some(SINGLES)]
                of.extend(some if number >= WARM_UPS else ())
    for what, share in (("median", 0.5), ("p99", 0.99)):
        found = {name: percentile(taken, share) for name, taken in times.items()}
        yield Row(
            target="T8",
            what=f"hit on disk, {large.name} against {small.name}, {what}",
            value=found["large"] / found["small"],
            unit="×",
            most=1.3,
            figures={f"{name}_µs": seconds * 1e6 for name, seconds in found.items()},
        )


def starts(stores: tuple[Made, ...], rounds: int) -> Iterator[Row]:
    """T9: from exec to the announcement and an answer of /readyz."""
    taken: dict[Made, list[tuple[float, float]]] = {made: [] for made in stores}
    for _ in range(rounds):
        for made, times in taken.items():
            if not made.entries:
                shutil.rmtree(made.directory, ignore_errors=True)
            with proxy(made.directory, memory_mib=MEMORY_MIB) as running:
                ready(running)
                times.append((time.perf_counter() - running.since, running.cpu_seconds))
    for made, measured in taken.items():
        seconds = [taken_s for taken_s, _ in measured]
        used = median(cpu_s for _, cpu_s in measured)
        yield Row(
            target="T9",
            what=f"start to ready, {made.name}",
            value=median(seconds),
            unit="s",
            most=0.8,
            figures={"fastest_s": min(seconds), "slowest_s": max(seconds), "cpu_s": used},
        )


def ready(running: Server) -> None:
    """Raise RuntimeError unless the server says that it is ready."""
    client = http.client.HTTPConnection("127.0.0.1", running.port)
    client.request("GET", "/readyz")
    if client.getresponse().status != http.HTTPStatus.OK:
        raise RuntimeError("it is not ready")
    client.close()


def resident(made: Made) -> Iterator[Row]:
    """T10: once it idles; and after as many hits as fill the memory tier, or without one."""
    for memory_mib in (MEMORY_MIB, 0):
        with (
            proxy(made.directory, memory_mib=memory_mib) as running,
            Client(running, 1) as client,
        ):
            ready(running)
            if memory_mib:
                time.sleep(SETTLE_SECONDS)
                yield memory_row(f"idle, {made.name}", running, made.directory, IDLE_MB)
            for one in made.some(BULK):
                client.ask(asking(one))
            for _ in range(max(BULKS, 2 * memory_mib * MIB // VECTOR_BYTES // BULK)):
                client.ask(asking(made.some(BULK)))
            what = f"serving, {made.name}, memory_mib {memory_mib}"
            most = SERVING_MB + memory_mib * MIB / MB
            yield memory_row(what, running, made.directory, most)


def memory_row(what: str, running: Server, directory: Path, most: float) -> Row:
    """Return a row of what is resident, less the mapped pages of the store."""
    used = memory(running, directory)
    figures = {"store_pages_mb": used.mapped, "peak_with_them_mb": used.peak}
    return Row(
        target="T10",
        what=f"resident, {what}",
        value=used.resident,
        unit="MB",
        most=most,
        figures=figures,
    )


def on_disk(made: Made) -> Row:
    """T11: the closed file's bytes, by what its vectors have."""
    size = sum(file.stat().st_size for file in made.directory.glob("v*/*"))
    return Row(
        target="T11",
        what=f"bytes on disk a byte of vectors, {made.name}",
        value=size / made.entries / VECTOR_BYTES,
        unit="×",
        most=BYTES_A_BYTE,
        figures={"bytes_an_entry": size / made.entries, "vector_bytes": VECTOR_BYTES},
    )
