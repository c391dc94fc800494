"""A fault of the disk, under load, below a proxy that is a process of its own.

python disk_faults.py FAULT SECONDS — the suite runs some for two seconds, with the proxy's
waits cut to a twentieth. Clients buy and read for a quarter of the time, then the fault begins;
they go on for half of it, are silent for the rest, and the fault ends. No request may fail, no
vector be wrong, nothing be bought twice, the silent proxy use no processor to speak of; and all
that was bought must reach the disk without anybody asking again.
"""

import asyncio
import base64
import contextlib
import itertools
import json
import os
import random
import resource
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
from embedding_proxy.cache.key import FORMAT
from fault_server import FaultServer, vector_of

ROOT = Path(__file__).parents[2]
MODEL = "text-embedding-3-small"
CLIENTS = 4
BATCH = 100
LEAST_ROUNDS = 2
"""Of every client in each phase, however slow the machine: a few requests make no mean."""
SILENT_SHARE = 0.2
"""Of one core, which a proxy that nobody asks may use at most."""
PATIENCE_SECONDS = 120.0
"""Longer than the longest rest and the time between two flushes together."""

IN_SHORT = {
    "embedding_proxy.cache.disk.database.BUSY_SECONDS": 0.1,
    "embedding_proxy.providers.failure_backoff.MIN_SECONDS": 0.05,
    "embedding_proxy.providers.failure_backoff.MAX_SECONDS": 1.5,
    "embedding_proxy.cache.disk.store.TICK_SECONDS": 0.05,
}
"""What the proxy waits for, at a twentieth."""
_START = """
import importlib, json, os
for name, value in json.loads(os.environ["CONSTANTS"]).items():
    module, _, constant = name.rpartition(".")
    setattr(importlib.import_module(module), constant, value)
from embedding_proxy.proxy.cli.main import main
main()
"""

_KEEP = {
    "writer.lock": """
import fcntl, sys
file = open(sys.argv[1] + "/writer.lock")
fcntl.flock(file, fcntl.LOCK_EX)
""",
    "SQLite's lock": f"""
import sqlite3, sys
file = sqlite3.connect(sys.argv[1] + "/v{FORMAT}/cache.db", timeout=60, isolation_level=None)
file.execute("BEGIN IMMEDIATE")
""",
}
LOCKS = tuple(_KEEP)


class CannotMount(Exception):
    """File systems cannot be mounted here; the message says why."""


@contextlib.contextmanager
def locked(how: str, directory: Path) -> Iterator[None]:
    """Let another process keep one of the locks of a store."""
    program = f"{_KEEP[how]}\nprint(flush=True)\nsys.stdin.read()\n"
    with subprocess.Popen(
        [sys.executable, "-c", program, str(directory)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as keeper:
        keeper.stdout.readline()
        yield
        keeper.stdin.close()


def _mount(*arguments: object) -> None:
    if os.geteuid():
        raise CannotMount("only root mounts")
    try:
        subprocess.run(["mount", *arguments], check=True, capture_output=True, text=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise CannotMount(getattr(error, "stderr", "") or str(error)) from error


@contextlib.contextmanager
def file_system(directory: Path, size: int) -> Iterator[None]:
    """Mount a small file system. Raises CannotMount."""
    directory.mkdir()
    _mount("-t", "tmpfs", "-o", f"size={size}", "none", directory)
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", directory], check=True)


@contextlib.contextmanager
def full(directory: Path) -> Iterator[None]:
    """Fill a small file system to the last byte."""
    filler = directory / "filler"
    with contextlib.suppress(OSError), filler.open("wb", buffering=0) as file:
        while file.write(bytes(4096)):
            pass
    yield
    filler.unlink()


@contextlib.contextmanager
def read_only(directory: Path) -> Iterator[None]:
    """Make a directory read-only: for root by a mount, for others by permissions.

    Files that are open can be written on. Raises CannotMount.
    """
    if os.geteuid():
        paths = [directory, *directory.rglob("*")]
        for path in paths:
            path.chmod(path.stat().st_mode & ~0o222)
        yield
        for path in paths:
            path.chmod(path.stat().st_mode | 0o200)
        return
    _mount("--bind", directory, directory)
    try:
        _mount("-o", "remount,bind,ro", directory)
        yield
    finally:
        subprocess.run(["umount", "--lazy", directory], check=True)


@contextlib.contextmanager
def refusing(pid: int) -> Iterator[None]:
    """Refuse every byte that a process would write to a file. Python ignores SIGXFSZ."""
    soft, hard = resource.prlimit(pid, resource.RLIMIT_FSIZE)
    resource.prlimit(pid, resource.RLIMIT_FSIZE, (0, hard))
    try:
        yield
    finally:
        resource.prlimit(pid, resource.RLIMIT_FSIZE, (soft, hard))


def count_right(texts: list[str], reply: dict[str, Any]) -> int:
    """Return how many vectors of a reply in base64 are those of the texts."""
    return sum(
        base64.b64decode(item["embedding"]) == vector_of(MODEL, text).tobytes()
        for text, item in zip(texts, reply["data"], strict=True)
    )


@dataclass
class Outcome:
    """What came of a fault."""

    requests: int = 0
    failed: int = 0
    wrong: int = 0
    bought_twice: int = 0
    not_kept: int = 0
    """Texts bought during the fault that a restarted proxy does not have."""
    slowest_s: float = 0.0
    calm_cpu_ms: float = 0.0
    """Processor time of the proxy, a request, before the fault."""
    fault_cpu_ms: float = 0.0
    """The same during the fault, beyond what a silent proxy may use in that time."""
    silent_cpu_share: float = 0.0
    """Of one core, while the fault lasts and nobody asks."""
    kept_after_s: float = 0.0
    """From the end of the fault until all was on disk."""
    errors: Counter[str] = field(default_factory=Counter)


class Proxy:
    """The proxy as a process of its own."""

    def __init__(self, pid: int, url: str, http: aiohttp.ClientSession, seen: Outcome) -> None:
        self.pid = pid
        self._url = url
        self._http = http
        self.seen = seen

    async def ask(self, texts: list[str]) -> bool:
        """Ask for texts, and return whether all of them were hits."""
        start = time.monotonic()
        self.seen.requests += 1
        body = {"model": MODEL, "input": texts, "encoding_format": "base64"}
        try:
            async with self._http.post(f"{self._url}/embeddings", json=body) as response:
                response.raise_for_status()
                reply = await response.json()
        except (aiohttp.ClientError, TimeoutError) as error:
            self.seen.failed += 1
            self.seen.errors[repr(error)] += 1
            return False
        self.seen.wrong += len(texts) - count_right(texts, reply)
        self.seen.slowest_s = max(self.seen.slowest_s, time.monotonic() - start)
        return response.headers["x-cache"] == "hit"

    def cpu_s(self) -> float:
        """Return the processor time the process has used."""
        fields = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@contextlib.asynccontextmanager
async def serving(
    directory: Path, upstream: FaultServer, seen: Outcome, constants: dict[str, float], **cache: Any
) -> AsyncIterator[Proxy]:
    """Run a proxy until the block ends, and have it end in good order."""
    config = directory.with_name("config.json")
    settings = {
        "cache": {"directory": str(directory), **cache},
        "providers": {"openai": {"base_url": upstream.url}},
    }
    config.write_text(json.dumps(settings))
    with directory.with_name("log").open("ab") as log:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-c", _START, "serve", "--port", "0", "--config", str(config)),
            stdout=asyncio.subprocess.PIPE,
            stderr=log,
            env={
                **os.environ,
                "CONSTANTS": json.dumps(constants),
                "OPENAI_API_KEY": "k",
                "PYTHONPATH": str(ROOT),
            },
        )
    try:
        line = (await process.stdout.readline()).decode().strip()
        async with aiohttp.ClientSession() as http:
            yield Proxy(process.pid, line.removeprefix("export OPENAI_BASE_URL="), http, seen)
    finally:
        process.send_signal(signal.SIGTERM)
        if await process.wait():
            seen.errors[f"the proxy ended with {process.returncode}"] += 1


class Load:
    """Clients that buy new texts and read known ones, and what they have bought so far."""

    def __init__(self, proxy: Proxy) -> None:
        self._proxy = proxy
        self._chance = random.Random(7)
        self.bought: list[str] = []

    async def run(self, seconds: float) -> float:
        """Load the proxy for a while; return the milliseconds of processor a request took."""
        begun, cpu_s, requests = time.monotonic(), self._proxy.cpu_s(), self._proxy.seen.requests
        await asyncio.gather(*(self._client(begun + seconds) for _ in range(CLIENTS)))
        silent_s = SILENT_SHARE * (time.monotonic() - begun)
        used_s = max(self._proxy.cpu_s() - cpu_s - silent_s, 0.0)
        return 1e3 * used_s / (self._proxy.seen.requests - requests)

    async def _client(self, until: float) -> None:
        for number in itertools.count():
            if number >= LEAST_ROUNDS and time.monotonic() >= until:
                return
            new = [
                f"text {self._chance.getrandbits(64)}" for _ in range(self._chance.randint(1, 5))
            ]
            await self._proxy.ask(new)
            self.bought += new
            for _ in range(4):
                await self._proxy.ask(self._chance.sample(self.bought, 1))


async def ask_for_all(proxy: Proxy, texts: list[str]) -> int:
    """Return how many batches of the texts were no full hits."""
    batches = [texts[start : start + BATCH] for start in range(0, len(texts), BATCH)]
    return sum([not await proxy.ask(batch) for batch in batches])


def entries(directory: Path) -> int:
    """Return how many entries the file holds, as another process sees it."""
    path = directory / f"v{FORMAT}" / "cache.db"
    with contextlib.closing(sqlite3.connect(path, timeout=60)) as connection:
        return int(connection.execute("SELECT count(*) FROM Cache").fetchone()[0])


async def until_kept(directory: Path, count: int) -> float:
    """Wait until the file holds so many entries; return the seconds it took."""
    start = time.monotonic()
    # The other process tells nobody: there is no event to wait for.
    while entries(directory) < count and time.monotonic() - start < PATIENCE_SECONDS:  # noqa: ASYNC110
        await asyncio.sleep(0.05)
    return time.monotonic() - start


async def suffer(fault: str, seconds: float, folder: Path, *, in_short: bool = False) -> Outcome:
    """Make a fault below a proxy that is in use, and return what came of it."""
    seen = Outcome()
    directory = folder / "cache"
    constants = {**IN_SHORT} if in_short else {}
    async with contextlib.AsyncExitStack() as stack:
        if fault == "full":
            # To the last byte, and not as far as the proxy would leave some of it to others.
            constants["embedding_proxy.cache.disk.disk_full.FREE_BYTES"] = 0
        if "full" in fault:
            stack.enter_context(file_system(directory, 256 << 20))
        upstream = await stack.enter_async_context(FaultServer())
        # What the disk lost can be had from memory; otherwise it is to come from the disk.
        memory_mib = 256 if fault == "deleted" else 0
        async with serving(directory, upstream, seen, constants, memory_mib=memory_mib) as proxy:
            load = Load(proxy)
            await load.run(0)
            seen.calm_cpu_ms = await load.run(seconds / 4)
            lost = await _with_fault(fault, directory, proxy, load, seconds)
            kept = load.bought[lost:]
            seen.kept_after_s = await until_kept(directory, len(kept))
            await ask_for_all(proxy, load.bought)
        bought = Counter(upstream.inputs)
        seen.bought_twice = sum(count > 1 for count in bought.values())
        async with serving(directory, upstream, seen, constants) as proxy:
            await ask_for_all(proxy, kept)
        seen.not_kept = len(upstream.inputs) - bought.total()
    return seen


async def _with_fault(fault: str, directory: Path, proxy: Proxy, load: Load, seconds: float) -> int:
    """Load the proxy during a fault; return how many of the texts bought so far may be lost."""
    seen = proxy.seen
    if fault == "deleted":
        for _ in range(10):
            for path in (directory / f"v{FORMAT}").glob("cache.db*"):
                path.unlink()
            lost = len(load.bought) + CLIENTS * 5
            seen.fault_cpu_ms = await load.run(seconds / 20)
    else:
        lost = 0
        if fault in LOCKS:
            made = locked(fault, directory)
        else:
            made = refusing(proxy.pid) if fault == "refused" else full(directory)
        with made:
            seen.fault_cpu_ms = await load.run(seconds / 2)
            cpu_s = proxy.cpu_s()
            await asyncio.sleep(seconds / 4)
            seen.silent_cpu_share = (proxy.cpu_s() - cpu_s) / (seconds / 4)
    return lost


FAULTS = ("nearly full", "full", "refused", *LOCKS, "deleted")


def verdict(seen: Outcome) -> list[str]:
    """Return what is not as it has to be."""
    faults = ("failed", "wrong", "bought_twice", "not_kept")
    found = [f"{name}: {getattr(seen, name)}" for name in faults if getattr(seen, name)]
    if seen.silent_cpu_share > SILENT_SHARE:
        found.append(f"silent, it used {seen.silent_cpu_share:.0%} of a core")
    if seen.kept_after_s >= PATIENCE_SECONDS:
        found.append("what was bought did not reach the disk")
    return found + list(seen.errors)


def main() -> int:
    """Make the fault, say what came of it, and return the exit code."""
    fault, seconds = sys.argv[1], float(sys.argv[2])
    if fault not in FAULTS:
        sys.exit(f"FAULT is one of: {', '.join(FAULTS)}")
    with tempfile.TemporaryDirectory() as name:
        seen = asyncio.run(suffer(fault, seconds, Path(name)))
        log = Path(name, "log").read_text()
    sys.stdout.write(f"{fault}: {json.dumps(asdict(seen))}\n")
    wrong = verdict(seen)
    if wrong:
        sys.stdout.write(f"{log[-4000:]}\n{wrong}\n")
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
