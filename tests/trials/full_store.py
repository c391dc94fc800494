"""A store at its limit, part of it pinned, under a mixed load: what a client and the disk see.

python full_store.py SECONDS SIZE_MIB SEED — `make full` takes ten minutes and 1 GiB.

Two proxies with two workers each stand before one provider. The store of the one is full: 30 % of
its limit belongs to a pinned namespace. That of the other holds the same, and has room. Clients
load one proxy after the other, some seconds at a time, so that the times compare. 70 % of the
requests read texts that are read again and again, in both namespaces; 30 % buy new ones, so that
eviction goes on all the time. No request may fail, no write may be refused, nothing that is read
often or pinned may be bought again, and the ledger must say what the provider charged. The file
with its log stays within 5 % of the limit, and the 99th percentile of the hits is at most twice
that of the store that has room.

The suite runs the same load on two processes that have a small store open, without the proxy.
"""

import asyncio
import base64
import contextlib
import itertools
import json
import logging
import os
import random
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter, deque
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
from aiohttp import web
from embedding_proxy.cache.disk.store import Store
from embedding_proxy.cache.key import FORMAT, Namespace, keyring
from embedding_proxy.cache.ledger import By, LedgerKey, Usage
from embedding_proxy.cache.memory import Memory
from embedding_proxy.cache.record import Entry
from embedding_proxy.cache.tiers import Tiers
from embedding_proxy.providers.base import Space
from fault_server import FaultServer, vector_of

from tests.cache.fakes import entries_in

ROOT = Path(__file__).parents[2]
MODEL, WIDTH = "text-embedding-3-small", 1536
ENTRY_BYTES = 6600
"""About what an entry takes in the file."""
PINNED, OTHERS = "keep", "others"
PINNED_SHARE = 0.3
HOT = range(50, 401)
"""How many texts of each namespace are read again and again: a hundredth, within these bounds.

Were they more in a small store, one worker would evict what only the other has read of late."""
READS = 0.7
SIZES = (1, 1, 1, 2, 5, 20, 50)
"""Inputs of a request."""
CLIENTS = 4
REQUESTS_A_CONNECTION = 20
"""Then a client connects anew, and may get the other worker."""
SEGMENT_S = 5.0
SAMPLE_S = 0.1
FILL_BATCH = 500
EXAMPLES = 10
MOST_SHARE, MOST_SMALL_SHARE = 1.05, 1.08
"""Of the limit. In a store of 16 MiB one transaction of 50 records is 2 % of it."""
MOST_RATIO = 2.0
PROCESSES = 2
_REFUSED = re.compile(
    r"^(\w*(?:store|cache|disk)\w*(?:refus|fail|lost|drop|not_kept)\w*\S*) (\S+)$"
)
"""A metric that counts what was not written."""


def texts(namespace: str, numbers: range) -> list[str]:
    """Return some of the texts of a namespace."""
    return [f"text {number} of {namespace}" for number in numbers]


# The provider.


async def provide() -> None:
    """Be a provider that counts what it charges each key for, and tells when it is asked."""
    charged: dict[str, Counter[str]] = {}

    async def act(request: web.Request, payload: dict[str, Any]) -> web.Response:
        reply = server.reply(payload)
        sums = charged.setdefault(request.headers["Authorization"].split()[-1], Counter())
        sums.update(inputs=len(reply["data"]), tokens=reply["usage"]["prompt_tokens"])
        return web.json_response(reply)

    async with FaultServer(always=act, calls=deque(maxlen=1)) as server:
        print(server.url, flush=True)
        while await asyncio.to_thread(sys.stdin.readline):
            print(json.dumps(charged), flush=True)


@contextlib.asynccontextmanager
async def _process(*command: object, **options: Any) -> AsyncIterator[asyncio.subprocess.Process]:
    """Run a Python process and end it in good order."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, *map(str, command), stdout=asyncio.subprocess.PIPE, **options
    )
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.send_signal(signal.SIGTERM)
        await process.wait()


# The proxies.


@dataclass
class Proxy:
    """A proxy, and what its clients saw of it."""

    name: str
    folder: Path
    url: str = ""
    hit_ms: list[float] = field(default_factory=list)
    told: Counter[str] = field(default_factory=Counter)
    problems: Counter[str] = field(default_factory=Counter)
    examples: list[str] = field(default_factory=list)
    """The first requests that were not answered as they should have been."""
    began: float = field(default_factory=time.monotonic)
    asked_others: int = 0
    """So many texts of the other namespace were asked for."""
    hot: int = 0
    """So many texts of each namespace are read again and again."""
    pinned: int = 0
    """So many texts of the pinned namespace are there."""

    @property
    def config(self) -> Path:
        return self.folder / f"{self.name}.json"

    @property
    def log(self) -> Path:
        return self.folder / f"{self.name}.log"

    @property
    def files(self) -> list[Path]:
        """The database and its log."""
        folder = self.folder / self.name / f"v{FORMAT}"
        return [folder / "cache.db", folder / "cache.db-wal"]

    async def ask(
        self, http: aiohttp.ClientSession, namespace: str, asked: list[str], new: int
    ) -> None:
        """Ask for texts of which so many are new, and note what is not as it has to be."""
        body = {"model": MODEL, "input": asked, "encoding_format": "base64"}
        headers = {"Authorization": f"Bearer key-of-{namespace}"}
        begun = time.perf_counter()
        async with http.post(f"{self.url}/embeddings", json=body, headers=headers) as response:
            raw = await response.read()
            taken = 1000 * (time.perf_counter() - begun)
            self.told["requests"] += 1
            if response.status != 200:
                self.problems[f"{response.status}: {raw[:200].decode()}"] += 1
                return
            misses = int(response.headers["x-cache-misses"])
            self.told["misses"] += misses
            self.told["hits"] += int(response.headers["x-cache-hits"])
            self.told["tokens_billed"] += int(response.headers["x-tokens-billed"])
        if misses != new:
            kind = "known texts bought again" if misses > new else "new texts not bought"
            self.problems[f"{kind}, {namespace}"] += abs(misses - new)
            if len(self.examples) < EXAMPLES:
                seconds = time.monotonic() - self.began
                told = f"{misses} of {len(asked)} missed and not {new}: {asked[0]!r} and so on"
                self.examples.append(f"{seconds:.2f} s after the start, {told}")
        if not new:
            self.hit_ms.append(taken)
        if self.told["requests"] % 20 == 0:
            vector = base64.b64decode(json.loads(raw)["data"][-1]["embedding"])
            is_right = vector == vector_of(MODEL, asked[-1], WIDTH).tobytes()
            self.problems["wrong vectors"] += not is_right

    async def fill(self, http: aiohttp.ClientSession, limit: int) -> None:
        """Buy as much as the limit allows, 30 % of it pinned; the hot ones last."""
        self.hot = max(HOT[0], min(HOT[-1], limit // ENTRY_BYTES // 100))
        self.pinned = max(self.hot, int(PINNED_SHARE * limit / ENTRY_BYTES))
        others = int((MOST_SHARE - PINNED_SHARE) * limit / ENTRY_BYTES)
        for start in range(0, self.pinned, FILL_BATCH):
            numbers = range(start, min(start + FILL_BATCH, self.pinned))
            await self.ask(http, PINNED, texts(PINNED, numbers), len(numbers))
        for _ in range(0, others, FILL_BATCH):
            await self.ask(http, OTHERS, self._new(FILL_BATCH), FILL_BATCH)
        await self.ask(http, OTHERS, texts("hot others", range(self.hot)), self.hot)

    def _new(self, count: int) -> list[str]:
        """Return texts that nobody has asked for."""
        first, self.asked_others = self.asked_others, self.asked_others + count
        return texts(OTHERS, range(first, first + count))

    async def load(self, seed: str, until: float) -> None:
        """Be one client of the mixed load until this time."""
        chance = random.Random(seed)
        hot = {PINNED: texts(PINNED, range(self.hot)), OTHERS: texts("hot others", range(self.hot))}
        while time.monotonic() < until:
            async with aiohttp.ClientSession() as http:
                for _ in range(REQUESTS_A_CONNECTION):
                    size = chance.choice(SIZES)
                    if chance.random() < READS:
                        namespace = chance.choice((PINNED, OTHERS))
                        await self.ask(http, namespace, chance.sample(hot[namespace], size), 0)
                    else:
                        await self.ask(http, OTHERS, self._new(size), size)

    async def read_pinned(self, http: aiohttp.ClientSession) -> None:
        """See that everything pinned is still there."""
        for start in range(0, self.pinned, FILL_BATCH):
            numbers = range(start, min(start + FILL_BATCH, self.pinned))
            await self.ask(http, PINNED, texts(PINNED, numbers), 0)

    async def read_metrics(self, http: aiohttp.ClientSession) -> None:
        """See that no metric tells of a write that was refused."""
        async with http.get(f"{self.url.removesuffix('/v1')}/metrics") as response:
            for line in (await response.text()).splitlines():
                told = _REFUSED.match(line)
                if told and float(told[2]):
                    self.problems[line] += 1

    def read_log(self) -> None:
        """See that the log tells of nothing unusual."""
        for line in self.log.read_text().splitlines():
            if " INFO " not in line:
                # Without the time and the numbers, so that like lines are counted together.
                self.problems[f"log: {re.sub('[0-9]+', 'N', line[24:224])}"] += 1

    def read_ledger(self, charged: dict[str, int]) -> None:
        """Hold the ledger against what the provider charged and what clients were told."""
        command = (
            sys.executable,
            "-m",
            "embedding_proxy",
            "cache",
            "stats",
            "--by",
            "provider",
            "--json",
        )
        done = subprocess.run(
            [*command, "--config", str(self.config)], check=True, capture_output=True
        )
        sums: Counter[str] = Counter()
        for line in json.loads(done.stdout):
            sums.update({name: line[name] for name in ("hits", "misses", "tokens_billed")})
        for name, there, told in (
            ("misses", sums["misses"], charged["inputs"]),
            ("tokens billed", sums["tokens_billed"], charged["tokens"]),
            ("misses told", sums["misses"], self.told["misses"]),
            ("hits told", sums["hits"], self.told["hits"]),
            ("tokens told", sums["tokens_billed"], self.told["tokens_billed"]),
        ):
            if there != told:
                self.problems[f"the ledger has {there} and not {told} {name}"] += 1


@contextlib.asynccontextmanager
async def serving(proxy: Proxy, size_gib: float, provider: str) -> AsyncIterator[None]:
    """Run a proxy with two workers."""
    keys = [{"key": f"key-of-{name}", "namespace": name} for name in (PINNED, OTHERS)]
    settings = {
        "server": {"keys": keys, "workers": PROCESSES, "drift_check_hours": None},
        "cache": {
            "directory": str(proxy.folder / proxy.name),
            "size_limit_gib": size_gib,
            "pinned_namespaces": [PINNED],
            # Most hits come from the disk.
            "memory_mib": 4,
        },
        "providers": {"openai": {"base_url": provider}},
    }
    proxy.config.write_text(json.dumps(settings))
    environment = {**os.environ, "OPENAI_API_KEY": f"key-of-{proxy.name}"}
    command = ("-m", "embedding_proxy", "serve", "--port", "0", "--config", proxy.config)
    with proxy.log.open("wb") as log:
        async with _process(*command, stderr=log, env=environment) as process:
            line = (await process.stdout.readline()).decode().strip()
            proxy.url = line.removeprefix("export OPENAI_BASE_URL=")
            yield


async def sample(proxy: Proxy, limit: int, shares: list[float]) -> None:
    """Note now and then how large the file and its log are, as a share of the limit."""
    while True:
        size = sum(file.stat().st_size for file in proxy.files if file.exists())
        shares.append(size / limit)
        await asyncio.sleep(SAMPLE_S)


def p99(values: list[float]) -> float:
    """Return the 99th percentile."""
    return statistics.quantiles(values, n=100)[98]


async def through_proxies(folder: Path, seconds: float, size_mib: int, seed: int) -> dict[str, Any]:
    """Load a full store and one that has room; return what is wrong, and some figures."""
    limit, shares = size_mib << 20, []
    full, room = Proxy("full", folder), Proxy("room", folder)
    provider_command = (__file__, "provider")
    async with contextlib.AsyncExitStack() as outer:
        provider = await outer.enter_async_context(
            _process(*provider_command, stdin=asyncio.subprocess.PIPE)
        )
        url = (await provider.stdout.readline()).decode().strip()
        async with contextlib.AsyncExitStack() as stack:
            await stack.enter_async_context(serving(full, size_mib / 1024, url))
            await stack.enter_async_context(serving(room, 100_000, url))
            http = await stack.enter_async_context(aiohttp.ClientSession())
            sampling = asyncio.create_task(sample(full, limit, shares))
            for proxy in (full, room):
                await proxy.fill(http, limit)
            end = time.monotonic() + seconds
            for number, proxy in enumerate(itertools.cycle((full, room))):
                if time.monotonic() > end:
                    break
                until = time.monotonic() + min(SEGMENT_S, seconds / 4)
                names = (f"{seed} {number} {client}" for client in range(CLIENTS))
                await asyncio.gather(*(proxy.load(name, until) for name in names))
            hit_ms = {proxy.name: proxy.hit_ms.copy() for proxy in (full, room)}
            for proxy in (full, room):
                await proxy.read_pinned(http)
                await proxy.read_metrics(http)
            sampling.cancel()
        provider.stdin.write(b"sums\n")
        charged = json.loads(await provider.stdout.readline())
    for proxy in (full, room):
        proxy.read_ledger(charged[f"key-of-{proxy.name}"])
        proxy.read_log()
    tails = {name: p99(values) for name, values in hit_ms.items()}
    ratio = tails["full"] / tails["room"]
    most = max(shares)
    wrong: dict[str, Any] = {
        proxy.name: {**+proxy.problems, "examples": proxy.examples}
        for proxy in (full, room)
        if +proxy.problems
    }
    if most > MOST_SHARE:
        wrong["size"] = f"the file and its log took {most:.3f} of the limit"
    if ratio > MOST_RATIO:
        wrong["hit p99"] = f"{ratio:.2f} times that of the store that has room"
    return {
        "wrong": wrong,
        "requests": {proxy.name: proxy.told["requests"] for proxy in (full, room)},
        "bought": {proxy.name: proxy.told["misses"] for proxy in (full, room)},
        "pinned_namespaces": full.pinned,
        "hits measured": {name: len(values) for name, values in hit_ms.items()},
        "hit p50 ms": {name: round(statistics.median(v), 2) for name, v in hit_ms.items()},
        "hit p99 ms": {name: round(tail, 2) for name, tail in tails.items()},
        "hit p99, full / room": round(ratio, 2),
        "file and log / limit": round(most, 3),
    }


# The same without the proxy: two processes that have a small store open.

SPACE = Space(f"trial/{MODEL}", WIDTH)
RINGS = {name: keyring(SPACE, Namespace(name, b"secret")) for name in (PINNED, OTHERS)}


class Process:
    """One process that uses the store."""

    def __init__(self, store: Store, number: int, seed: int) -> None:
        self._store = store
        self._tiers = Tiers(Memory(1 << 20), store)
        self._number = number
        self._chance = random.Random(f"{seed} {number}")
        self.seen: Counter[str] = Counter()

    async def put(self, namespace: str, asked: list[str]) -> None:
        """Write what was bought, with its charge."""
        ring, heading = RINGS[namespace], LedgerKey(RINGS[namespace].partition, MODEL, "p")
        self._store.count(heading, Usage(misses=len(asked), tokens_billed=3 * len(asked)))
        entries = {
            key: Entry((key.digest * (WIDTH // 4)), tokens=3, counted=True, digest=key.digest)
            for key in ring.keys_at_once(asked)
        }
        await self._tiers.put_many(entries, ring.partition)
        self.seen["misses"] += len(asked)

    async def read(self, namespace: str, asked: list[str]) -> None:
        """Look up what has to be there."""
        ring = RINGS[namespace]
        keys = ring.keys_at_once(asked)
        found = await entries_in(self._tiers, list(keys), ring.partition)
        self._store.count(LedgerKey(ring.partition, MODEL), Usage(hits=len(found)))
        self.seen["hits"] += len(found)
        self.seen[f"{namespace} lost"] += len(keys) - len(found)
        self.seen["wrong"] += sum(
            entry.vector != key.digest * (WIDTH // 4) for key, entry in found.items()
        )

    async def use(self, groups: int, pinned: int, limit: int) -> None:
        """Buy and read so many groups of texts, and see how large the file gets."""
        mine = f"{OTHERS} {self._number}"
        hot = {PINNED: texts(PINNED, range(pinned)), OTHERS: texts(f"hot {mine}", range(20))}
        await self.put(OTHERS, hot[OTHERS])
        written = most = 0
        for _ in range(groups):
            if self._chance.random() < READS:
                namespace = self._chance.choice((PINNED, OTHERS))
                await self.read(namespace, self._chance.sample(hot[namespace], 5))
                await self.read(OTHERS, hot[OTHERS])
            else:
                count = self._chance.choice(SIZES)
                await self.put(OTHERS, texts(mine, range(written, written + count)))
                written += count
            files = [self._store.folder / name for name in ("cache.db", "cache.db-wal")]
            most = max(most, *(sum(file.stat().st_size for file in files),))
        await self.read(PINNED, hot[PINNED])
        self.seen["thousandths of the limit"] = 1000 * most // limit


async def use_store(directory: Path, number: int, groups: int, pinned: int, limit: int) -> None:
    """Be one of the processes, and print what it saw; process -1 fills the store."""
    async with Store(directory, limit, pinned=(PINNED,)) as store:
        process = Process(store, number, pinned)
        if number < 0:
            await process.put(PINNED, texts(PINNED, range(pinned)))
            free = int((MOST_SHARE - PINNED_SHARE) * limit / ENTRY_BYTES)
            for start in range(0, free, FILL_BATCH):
                await process.put(OTHERS, texts(OTHERS, range(start, start + FILL_BATCH)))
        else:
            await process.use(groups, pinned, limit)
    print(json.dumps(process.seen))


async def through_stores(folder: Path, groups: int, size_mib: int) -> dict[str, Any]:
    """Have two processes use a full store; return what is wrong, and some figures."""
    limit, directory = size_mib << 20, folder / "store"
    pinned = int(PINNED_SHARE * limit / ENTRY_BYTES)
    path = os.pathsep.join(map(str, (ROOT, ROOT / "tests", ROOT / "tests" / "trials")))
    wrong: Counter[str] = Counter()
    seen: Counter[str] = Counter()
    most = 0

    async def run(number: int) -> None:
        nonlocal most
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, __file__, "store", str(directory)),
            *map(str, (number, groups, pinned, limit)),
            env={**os.environ, "PYTHONPATH": path},
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
        out, errors = await process.communicate()
        wrong.update(Counter(f"said: {line}" for line in errors.decode().splitlines()))
        told = Counter(json.loads(out or b"{}"))
        most = max(most, told.pop("thousandths of the limit", 0))
        seen.update(told)

    await run(-1)
    await asyncio.gather(*map(run, range(PROCESSES)))
    async with Store(directory, limit, pinned=(PINNED,)) as store:
        lines = await store.ledger((By.NAMESPACE,)) or ()
    sums = Usage()
    for _, usage in lines:
        sums = sums.plus(usage)
    wrong.update({name: seen[name] for name in ("keep lost", "others lost", "wrong")})
    for name, told in (("hits", seen["hits"]), ("misses", seen["misses"])):
        wrong[f"{name} that the ledger does not have"] = told - getattr(sums, name)
    wrong["tokens that the ledger does not have"] = 3 * seen["misses"] - sums.tokens_billed
    wrong["thousandths above the limit"] = max(0, most - int(1000 * MOST_SMALL_SHARE))
    return {
        "wrong": {name: count for name, count in wrong.items() if count},
        "hits": seen["hits"],
        "bought": seen["misses"],
        "thousandths of the limit": most,
    }


def main() -> int:
    """Do what is asked, say what came of it, and return the exit code."""
    if sys.argv[1] == "provider":
        asyncio.run(provide())
        return 0
    if sys.argv[1] == "store":
        logging.basicConfig(level=logging.WARNING)
        asyncio.run(use_store(Path(sys.argv[2]), *map(int, sys.argv[3:])))
        return 0
    seconds, size_mib, seed = map(int, sys.argv[1:])
    # Not where temporary files may lie in memory: the stores take twice their size and more.
    with tempfile.TemporaryDirectory(dir=os.environ.get("BENCH_DIR")) as name:
        came = asyncio.run(through_proxies(Path(name), seconds, size_mib, seed))
    print(json.dumps(came, indent=2))
    return bool(came["wrong"])


if __name__ == "__main__":
    sys.exit(main())
