"""What 10^6 to 10^9 texts cost on N nodes: hits by tier, memory, disk, machines. `make scale`.

python -m bench.scale_simulation [--texts 1e6,1e9] [--nodes 1,3] [--shared-gb 0,64] …

Clients ask for texts by Zipf's law, each input at a node at random, which is what a load balancer
without affinity does. The tiers are LRU caches, as the proxy's are: the memory of each worker, the
disk of each node, one shared tier. All begin empty. The costs of an entry and of an input are
measured (`COSTS`, docs/scale.md); the prices are assumptions (`PRICES`), and options.

A replay of 10^9 texts would not fit into memory. So it takes every n-th text of the tail, and makes
each tier n times smaller: the hit rates stay what they are (Waldspurger et al., "Efficient MRC
Construction with SHARDS", FAST 2015). The most popular texts are not sampled, but counted: each of
them is bought once, and then in every memory. Equal arguments give equal figures.
"""

import argparse
import re
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from embedding_proxy.proxy.service.storage import REPLIES_SHARE
from numpy.typing import NDArray

from .table import number

MIB, GIB, GB = 1 << 20, 1 << 30, 1e9
TIERS = ("memory", "disk", "shared", "provider")
EXACT = 1000
"""Ranks whose popularity is summed one by one; beyond them the sum is an integral."""
SAMPLE = 250_000
"""Texts of the tail that are replayed, at most."""
HOT = 40
"""Texts that are not sampled take a part in so many of the first tier, so that all stay there."""


@dataclass(frozen=True)
class Workload:
    """What clients ask for."""

    texts: int
    inputs: int
    """How many inputs are asked for, from the first one on."""
    exponent: float = 1.0
    """Of Zipf's law: the r-th most popular text is asked for in proportion to r ** -exponent."""
    seed: int = 1


@dataclass(frozen=True)
class Fleet:
    """The nodes, and how much each tier holds, in bytes. A tier of 0 bytes is none."""

    nodes: int = 1
    workers: int = 1
    memory: float = 256 * MIB
    """Of a worker: `cache.memory_mib`."""
    disk: float = 50 * GIB
    """Of a node: `cache.size_limit_gib`."""
    shared: float = 0.0
    """`maxmemory` of the engine."""


@dataclass(frozen=True)
class Costs:
    """What was measured, for vectors of 1536 dimensions and inputs of 600 characters."""

    memory_bytes: float = 6_624 / (1 - REPLIES_SHARE)
    """Of an entry, as the memory tier counts; the rest of `cache.memory_mib` holds replies."""
    disk_bytes: float = 6_636
    """Of an entry: T11 of docs/performance.md."""
    shared_bytes: float = 7_275
    """Of an entry: `python -m bench.nodes --records`."""
    single_us: tuple[float, float, float, float] = (117, 179, 423, 1_560)
    """Processor time of an input that comes alone, by tier, in µs: `bench.nodes --costs`."""
    bulk_us: tuple[float, float, float, float] = (7.3, 16.9, 47.4, 117)
    """The same of one in a list of 2,000."""
    reply_bytes: float = 8_344
    """Of the body of a reply to one input, in base64."""
    exchange_bytes: float = 6_600
    """Between a node and the shared tier, for an entry read, or written with its lease."""
    value_bytes: float = 6_273
    """Of a record and its key, as the shared tier is sent them."""


@dataclass(frozen=True)
class Prices:
    """Assumptions, in USD. Replace them with yours."""

    million_tokens: float = 0.02
    tokens: float = 150
    """Of an input."""
    core_month: float = 25.0
    memory_gb_month: float = 4.0
    disk_gb_month: float = 0.10
    object_gb_month: float = 0.023
    million_puts: float = 5.0
    million_gets: float = 0.4


COSTS, PRICES = Costs(), Prices()
FLOAT16 = 3_691 / 7_275
"""The part of the memory that a record in float16 takes: `python -m bench.nodes --records`."""


class Result(NamedTuple):
    """What became of the inputs, and what the tiers hold at the end."""

    inputs: tuple[float, float, float, float]
    """By the tier that answered, as TIERS names them."""
    disk_entries: float
    """Of the fullest node."""
    shared_entries: float

    @property
    def rates(self) -> list[float]:
        """Return the share of each tier in all inputs."""
        return [count / sum(self.inputs) for count in self.inputs]


class LRU(OrderedDict[int, None]):
    """At most `limit` texts, the least recently used out first."""

    def __init__(self, limit: float) -> None:
        super().__init__()
        self._limit = round(limit)

    def use(self, text: int) -> bool:
        """Tell whether a text is held, and mark it as used."""
        if text in self:
            self.move_to_end(text)
            return True
        return False

    def put(self, text: int) -> None:
        """Hold a text from now on."""
        if self._limit:
            self[text] = None
            if len(self) > self._limit:
                self.popitem(last=False)


def popularity(ranks: NDArray[np.int64], exponent: float) -> NDArray[np.float64]:
    """Return the sum of r ** -exponent over the ranks 1 … n, for each n."""
    exact = np.concatenate([[0.0], np.cumsum(np.arange(1, EXACT + 1.0) ** -exponent)])
    upper, lower = ranks + 0.5, EXACT + 0.5
    if exponent == 1:
        beyond = np.log(upper / lower)
    else:
        beyond = (upper ** (1 - exponent) - lower ** (1 - exponent)) / (1 - exponent)
    return np.where(ranks <= EXACT, exact[np.minimum(ranks, EXACT)], exact[-1] + beyond)


def draw(load: Workload, slots: int, hot: int = 0, step: int = 1) -> NDArray[np.int64]:
    """Return requests in their order, one a row: a text, and the worker that gets it.

    They are those for every `step`-th text, less popular than the first `hot`.
    """
    edges = np.append(np.arange(hot, load.texts, step), load.texts)
    sums = popularity(edges, load.exponent)
    share = (sums[-1] - sums[0]) / popularity(edges[-1:], load.exponent)[0]
    chance = np.random.default_rng(load.seed)
    count = round(load.inputs * share / step)
    drawn = sums[0] + (sums[-1] - sums[0]) * chance.random(count)
    texts = np.searchsorted(sums[1:-1], drawn, side="right")
    return np.column_stack([texts, chance.integers(slots, size=count)])


def replay(fleet: Fleet, requests: NDArray[np.int64], costs: Costs, step: int, hot: int) -> Result:
    """Ask the tiers for each request in turn; scale the counts to all texts of the tail."""

    def local(size: float, entry: float) -> LRU:
        return LRU(max(size / entry - hot, 0.0) / step)

    slots = range(fleet.nodes * fleet.workers)
    memories = [local(fleet.memory, costs.memory_bytes) for _ in slots]
    disks = [local(fleet.disk, costs.disk_bytes) for _ in range(fleet.nodes)]
    # Hot texts do not stay there: nobody asks it for them again.
    shared = LRU(fleet.shared / costs.shared_bytes / step)
    counts = [0, 0, 0, 0]
    for text, slot in requests.tolist():
        memory, disk = memories[slot], disks[slot // fleet.workers]
        # A hit in memory is noted as a use on disk, too.
        is_on_disk = disk.use(text)
        if memory.use(text):
            counts[0] += 1
        elif is_on_disk:
            counts[1] += 1
        elif shared.use(text):
            counts[2] += 1
        else:
            counts[3] += 1
            shared.put(text)
        if not is_on_disk:
            disk.put(text)
        memory.put(text)
    first, second, third, last = (step * count for count in counts)
    held = step * max(map(len, disks)), step * len(shared)
    return Result((first, second, third, last), *held)


def simulate(load: Workload, fleet: Fleet, costs: Costs = COSTS, sample: int = SAMPLE) -> Result:
    """Return what becomes of a workload. With no more than `sample` texts none is left out."""
    if load.texts <= sample:
        requests = draw(load, fleet.nodes * fleet.workers)
        return replay(fleet, requests, costs, step=1, hot=0)
    first_tier = fleet.memory / costs.memory_bytes or fleet.disk / costs.disk_bytes
    hot = min(load.texts // 100, int(first_tier / HOT))
    step = -(-(load.texts - hot) // sample)
    tail = replay(
        fleet,
        draw(load, fleet.nodes * fleet.workers, hot, step),
        costs,
        step=step,
        hot=hot,
    )
    # Each hot text: bought once, then once from the shared tier for each other node, once from disk
    # for each other worker, and from then on from memory.
    firsts = fleet.nodes if fleet.shared else 1
    bought = hot * fleet.nodes / firsts
    from_shared = hot * fleet.nodes - bought
    from_disk = hot * fleet.nodes * (fleet.workers - 1)
    of_hot = load.inputs - sum(tail.inputs)
    if fleet.memory:
        counted = (of_hot - bought - from_shared - from_disk, from_disk, from_shared, bought)
    else:
        counted = (0.0, of_hot - bought - from_shared, from_shared, bought)
    both = [a + b for a, b in zip(tail.inputs, counted, strict=True)]
    return Result(
        (both[0], both[1], both[2], both[3]),
        tail.disk_entries + hot,
        min(tail.shared_entries + hot, fleet.shared / costs.shared_bytes),
    )


class Bill(NamedTuple):
    """What a fleet takes and serves."""

    disk_gb: float
    """In use on each node."""
    shared_gb: float
    """In use in the shared tier."""
    singles_s: float
    """Inputs a second that the fleet answers, one a request, with its cores busy."""
    bulk_s: float
    """The same in lists of 2,000."""
    clients_mb_s: float
    """To the clients, while the fleet answers `singles_s` in base64."""
    shared_mb_s: float
    """Between the nodes and the shared tier, while the nodes answer `singles_s`."""
    provider_usd: float
    saved_usd: float
    """What the same inputs would have cost at the provider, less `provider_usd`."""
    month_usd: float
    """Of cores, memory and disks: those that are configured, not those in use."""


def bill(
    load: Workload, fleet: Fleet, result: Result, costs: Costs = COSTS, prices: Prices = PRICES
) -> Bill:
    """Return what a simulated fleet costs. A worker has a core, the shared tier another."""
    rates = result.rates
    cores = fleet.nodes * fleet.workers
    single, bulk = (
        cores * 1e6 / sum(rate * us for rate, us in zip(rates, of_tier, strict=True))
        for of_tier in (costs.single_us, costs.bulk_us)
    )
    exchanged = (rates[2] + rates[3]) * costs.exchange_bytes if fleet.shared else 0.0
    an_input = prices.tokens * prices.million_tokens / 1e6
    spent = result.inputs[3] * an_input
    disk_gb = fleet.nodes * fleet.disk / GB
    memory_gb = (cores * (fleet.memory + 200e6) + fleet.shared) / GB
    return Bill(
        disk_gb=result.disk_entries * costs.disk_bytes / GB,
        shared_gb=result.shared_entries * costs.shared_bytes / GB,
        singles_s=single,
        bulk_s=bulk,
        clients_mb_s=single * costs.reply_bytes / 1e6,
        shared_mb_s=single * exchanged / 1e6,
        provider_usd=spent,
        saved_usd=load.inputs * an_input - spent,
        month_usd=(cores + (1 if fleet.shared else 0)) * prices.core_month
        + memory_gb * prices.memory_gb_month
        + disk_gb * prices.disk_gb_month,
    )


HEADINGS = (
    "texts",
    "nodes",
    "disk, GB a node",
    "shared, GB",
    *(f"{tier}, %" for tier in TIERS),
    "disk used, GB",
    "shared used, GB",
    "inputs/s alone",
    "inputs/s in lists",
    "to clients, MB/s",
    "to and from shared, MB/s",
    "provider, USD",
    "saved, USD",
    "fleet, USD a month",
)


STORES = (
    "texts",
    "purchase, USD",
    "Redis, GB",
    "Redis, servers of 64 GB",
    "Redis, USD a month",
    "the same in float16",
    "on disk, GB",
    "on disk, USD a month",
    "object store, USD a month",
    "writing it in packs, USD",
    "one by one, USD",
    "a million reads, USD",
)
RECORDS_A_PACK = 10_000
ON_DISK = 1.1
"""What a tree of sorted files adds to what it holds: an assumption, as the prices are."""


def stores(texts: int, costs: Costs = COSTS, prices: Prices = PRICES) -> tuple[str, ...]:
    """Return what one copy of every text costs in other stores, under STORES."""
    in_redis = texts * costs.shared_bytes / GB
    values = texts * costs.value_bytes / GB
    figures = (
        texts * prices.tokens * prices.million_tokens / 1e6,
        in_redis,
        -(-in_redis // 64),
        in_redis * prices.memory_gb_month,
        in_redis * prices.memory_gb_month * FLOAT16,
        values * ON_DISK,
        values * ON_DISK * prices.disk_gb_month,
        values * prices.object_gb_month,
        texts / RECORDS_A_PACK * prices.million_puts / 1e6,
        texts * prices.million_puts / 1e6,
        prices.million_gets,
    )
    return (exponential(texts), *map(number, figures))


def exponential(texts: float) -> str:
    """Return a number of texts as the tables show it.

    >>> exponential(25_000_000)
    '2.5e7'
    """
    return re.sub(r"(\.0)?e\+0*", "e", f"{texts:.1e}")


def row(load: Workload, fleet: Fleet) -> tuple[str, ...]:
    """Return what a line of the table shows, under HEADINGS."""
    result = simulate(load, fleet)
    found = bill(load, fleet, result)
    return (
        exponential(load.texts),
        str(fleet.nodes),
        number(fleet.disk / GB),
        number(fleet.shared / GB),
        *(f"{100 * rate:.2f}" for rate in result.rates),
        *map(number, found),
    )


def numbers(given: str) -> list[float]:
    """Return the numbers of a list.

    >>> numbers("1e6, 64")
    [1000000.0, 64.0]
    """
    return [float(word) for word in given.replace(",", " ").split()]


def main(arguments: Sequence[str] | None = None) -> None:
    """Print a line for each number of texts, nodes and size of the shared tier; then the stores."""
    parser = argparse.ArgumentParser(description="What texts cost on N nodes with a shared tier.")
    for name, default, unit in (
        ("--texts", "1e6,1e7,1e8,1e9", "different texts"),
        ("--nodes", "1,3", "machines"),
        ("--shared-gb", "0,64", "of the shared tier; one node has none"),
    ):
        parser.add_argument(name, type=numbers, default=default, help=f"{unit}: %(default)s")
    for name, value, unit in (
        ("--inputs", 10.0, "asked for, a text"),
        ("--exponent", 1.0, "of Zipf's law"),
        ("--workers", 1.0, "of a node"),
        ("--memory-mib", 256.0, "of a worker"),
        ("--disk-gib", 50.0, "of a node"),
        ("--seed", 1.0, "of the requests"),
    ):
        parser.add_argument(name, type=float, default=value, help=f"{unit}: %(default)s")
    asked = parser.parse_args(arguments)
    lines = [HEADINGS]
    for texts in map(int, asked.texts):
        load = Workload(texts, int(texts * asked.inputs), asked.exponent, int(asked.seed))
        for nodes in map(int, asked.nodes):
            sizes = asked.shared_gb if nodes > 1 else [0.0]
            for shared in sizes:
                fleet = Fleet(
                    nodes,
                    int(asked.workers),
                    asked.memory_mib * MIB,
                    asked.disk_gib * GIB,
                    shared * GB,
                )
                lines.append(row(load, fleet))
    for table in (lines, [STORES, *(stores(int(texts)) for texts in asked.texts)]):
        for line in (table[0], ("---",) * len(table[0]), *table[1:], ()):
            print(f"| {' | '.join(line)} |" if line else "")


if __name__ == "__main__":
    main()
