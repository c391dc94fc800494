"""T1 to T4: hits, against the limit of the stack, which answers as many bytes to the same requests.

One worker has one core. Inputs are drawn from 10,000 known ones, all in memory or all on disk.
"""

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import uvloop

from .client import Client, in_turns
from .material import Made, asking, make, prove, say
from .process import Server, bare, proxy
from .table import Row, compare

KNOWN = 10_000
BULK = 2_000
CONNECTIONS = 16
SINGLES_A_ROUND = 2_000
BULKS_A_ROUND = 3
MEMORY_MIB = 256
WARM_UPS = 1


AGAIN_AND_AGAIN = "the same, one body again and again"


@dataclass(frozen=True)
class Case:
    """What is asked of the proxy and of the bare server in turns."""

    target: str
    what: str
    requests: Callable[[Made], list[bytes]]
    """Makes a round's."""
    inputs: int = 1
    encoding: str = "base64"
    disk: bool = False
    again: bool = False
    """Whether everything was asked for once before in these words."""
    least: float | None = None
    most: float | None = None


def known(made: Made) -> list[bytes]:
    """One input each, drawn from all that are known."""
    return [asking(number) for number in made.some(SINGLES_A_ROUND)]


def repeated(_: Made) -> list[bytes]:
    """Make the same body each time."""
    return [asking(7)] * SINGLES_A_ROUND


def new_bodies(made: Made) -> list[bytes]:
    """Known inputs in bodies that were never seen: of another user each."""
    return [asking(number, user=f"{next(made.fresh):09}") for number in made.some(SINGLES_A_ROUND)]


def bulks(encoding: str) -> Callable[[Made], list[bytes]]:
    """Make rounds of long requests, each for other inputs."""
    return lambda made: [asking(made.some(BULK), encoding) for _ in range(BULKS_A_ROUND)]


def same_bulk(encoding: str) -> Callable[[Made], list[bytes]]:
    """Make rounds of one long request."""
    return lambda _: [asking(range(BULK), encoding)] * BULKS_A_ROUND


def new_inputs(_: Made) -> list[bytes]:
    """Known inputs that were never asked for by themselves, as long as there are some."""
    return [asking(next(_in_order)) for _ in range(SINGLES_A_ROUND // 2)]


_in_order = itertools.cycle(range(KNOWN))

CASES = (
    Case("T1", "one input, memory hit, the first request for it alone", new_inputs),
    Case("T1", "one input, memory hit", known, again=True, least=1.0),
    Case("T1", AGAIN_AND_AGAIN, repeated),
    Case("T1", "the same, bodies never seen before", new_bodies),
    Case("T2", "one input, disk hit", new_bodies, disk=True, least=0.6),
    Case("T3", "2,000 inputs base64, memory", bulks("base64"), BULK, most=1.0),
    Case("T3", AGAIN_AND_AGAIN, same_bulk("base64"), BULK),
    Case("T3", "2,000 inputs base64, disk", bulks("base64"), BULK, disk=True, most=2.2),
    Case("T4", "2,000 inputs float, memory", bulks("float"), BULK, "float", most=1.8),
    Case("T4", AGAIN_AND_AGAIN, same_bulk("float"), BULK, "float"),
)


def rows(folder: Path, rounds: int, wanted: Callable[[str], bool]) -> Iterator[Row]:
    """Measure what is wanted."""
    cases = [case for case in CASES if wanted(case.target)]
    if not cases:
        return
    made = uvloop.run(make(folder / "known", KNOWN))
    for disk in (False, True):
        if some := [case for case in cases if case.disk is disk]:
            with proxy(made.directory, memory_mib=0 if disk else MEMORY_MIB) as running:
                for first in range(0, KNOWN, BULK):
                    prove(running, range(first, first + BULK))
                for case in some:
                    say(f"{case.target} {case.what}")
                    numbers = made.some(case.inputs)
                    size = prove(running, numbers, case.encoding)
                    with bare(size) as limit:
                        yield measured(case, made, (running, limit), rounds)


def prepare(case: Case, client: Client) -> None:
    """Ask for everything once, if the case wants it."""
    if case.again:
        client.load([asking(number) for number in range(KNOWN)])


def measured(case: Case, made: Made, servers: tuple[Server, Server], rounds: int) -> Row:
    """Load both in turns, and compare what a request took of the server's one core.

    That decides: it is what a worker has, however much of the core others had meanwhile.
    """
    single = case.inputs == 1
    connections = CONNECTIONS if single else 1
    # Long requests are few in a round, and so are more rounds: short turns, of like moments.
    turns = WARM_UPS + (rounds if single else 2 * rounds)
    ours, limit = servers
    with Client(ours, connections) as first, Client(limit, connections, expects=b"") as second:
        prepare(case, first)
        loads = in_turns((first, second), (case.requests(made) for _ in range(turns)))
    mine, bares = (taken[WARM_UPS:] for taken in loads)
    compared = compare(mine, bares, "µs" if single else "ms")
    ratios = (compared.cpu, compared.wall, compared.high, compared.low)
    # Many requests in a second, or little time for one: the same, upside down.
    value, clock, worst, best = (1 / ratio if single else ratio for ratio in ratios)
    return Row(
        target=case.target,
        what=case.what,
        value=value,
        unit="× bare's requests/s" if single else "× bare's time",
        least=case.least,
        most=case.most,
        figures={"by_the_clock": clock, "worst": worst, "best": best, **compared.figures},
    )
