"""Servers as processes of their own, on a core of their own, and what they use of the machine.

The servers get the first core that this process may use, the load and the upstreams the second; so
neither takes from the other, and what one worker can do is what one core can do.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
PROC = Path("/proc")
CORES = sorted(os.sched_getaffinity(0))
SERVING, LOADING = frozenset(CORES[:1]), frozenset(CORES[1:2] or CORES)
EVERYWHERE = frozenset(CORES)
TICKS_A_SECOND = os.sysconf("SC_CLK_TCK")
CLIENT_KEY = "sk-of-the-bench"
SIZE_LIMIT_GIB = 1000
"""No store of a bench is to evict."""
START_SECONDS = 60.0
MB = 1e6

# What a process's clock is called, where there is no name for it: see clock_getcpuclockid(3).
_OF_A_PROCESS = 2


class Server(NamedTuple):
    """A server that runs."""

    port: int
    pid: int
    since: float
    """`time.perf_counter` just before it was started."""

    @property
    def cpu_seconds(self) -> float:
        """How long its threads, and those of its workers, have had a processor."""
        return sum(cpu_seconds(pid) for pid in tree(self.pid))


class Memory(NamedTuple):
    """What is resident of a process, in MB."""

    resident: float
    """Without the mapped pages of the store."""
    mapped: float
    """Those. The kernel takes them back whenever somebody wants the memory, and reading without
    mapping would leave the same pages in the page cache."""
    peak: float
    """The most that was ever resident, mapped pages included."""


def cpu_seconds(pid: int) -> float:
    """Return how long all threads of a process have had a processor, to the nanosecond."""
    return time.clock_gettime((~pid << 3) | _OF_A_PROCESS)


def tree(pid: int) -> Iterator[int]:
    """Yield a process and its descendants."""
    yield pid
    for task in (PROC / str(pid) / "task").iterdir():
        for child in (task / "children").read_text().split():
            yield from tree(int(child))


def memory(server: Server, directory: Path) -> Memory:
    """Return what is resident of a server whose store lies in `directory`."""
    lines = (PROC / str(server.pid) / "status").read_text().splitlines()
    status = dict(line.split(":", 1) for line in lines)
    whole, peak = (1024 * int(status[name].split()[0]) / MB for name in ("VmRSS", "VmHWM"))
    mapped = sum(_mapped_bytes(server.pid, directory)) / MB
    return Memory(whole - mapped, mapped, peak)


def _mapped_bytes(pid: int, directory: Path) -> Iterator[int]:
    """Yield what is resident of each mapping of a file in a directory."""
    inside = False
    for line in (PROC / str(pid) / "smaps").read_text().splitlines():
        first, *rest = line.split()
        if not first.endswith(":"):
            inside = bool(rest) and rest[-1].startswith(str(directory))
        elif inside and first == "Rss:":
            yield 1024 * int(rest[0])


def busy_seconds() -> tuple[float, float, float]:
    """Return seconds: passed, of processors in use by anybody, and by this process's tree."""
    line = (PROC / "stat").read_text().splitlines()[0]
    user, nice, system, _, _, *more = (int(ticks) for ticks in line.split()[1:9])
    own = sum(os.times()[:4])
    return time.monotonic(), (user + nice + system + sum(more)) / TICKS_A_SECOND, own


@contextmanager
def on(cores: frozenset[int]) -> Iterator[None]:
    """Keep this thread, and what it starts, on some cores until the block ends."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


@contextmanager
def server(
    command: Sequence[str],
    prefix: str = "",
    cores: frozenset[int] = SERVING,
    environment: Mapping[str, str] | None = None,
) -> Iterator[Server]:
    """Run a server until the block ends; its first line is its port, behind `prefix`."""
    variables = {**os.environ, "PYTHONPATH": str(ROOT), **(environment or {})}
    with ExitStack() as stack:
        # A pipe that nobody reads would stop a server that has much to log.
        log = stack.enter_context(tempfile.TemporaryFile("w+"))
        with on(cores):
            since = time.perf_counter()
            process = stack.enter_context(
                subprocess.Popen(
                    command, stdout=subprocess.PIPE, stderr=log, text=True, env=variables
                )
            )
        try:
            line = process.stdout.readline().strip() if process.stdout else ""
            if not line.startswith(prefix):
                process.terminate()
                process.wait()
                log.seek(0)
                raise RuntimeError(f"it did not start: {' '.join(command)}\n{log.read()}")
            yield Server(int(line.removeprefix(prefix).removesuffix("/v1")), process.pid, since)
        finally:
            process.terminate()


@contextmanager
def bare(size: int) -> Iterator[Server]:
    """Run the limit of the stack, answering with so many bytes."""
    with server([sys.executable, "-m", "bench.bare", str(size)]) as running:
        yield running


@contextmanager
def upstream(*arguments: str) -> Iterator[Server]:
    """Run a provider that does as it is told, beside the load."""
    with server([sys.executable, "-m", "bench.upstream", *arguments], cores=LOADING) as running:
        yield running


@contextmanager
def proxy(
    directory: Path,
    *,
    provider: Server | None = None,
    workers: int = 1,
    cores: frozenset[int] = SERVING,
    section: Mapping[str, object] | None = None,
    **cache: object,
) -> Iterator[Server]:
    """Run the proxy on a store, with client keys.

    `section` are further keys of `server`, and `cache` further ones of its own section.
    """
    url = f"http://127.0.0.1:{provider.port}/v1" if provider else "http://127.0.0.1:9/v1"
    settings = {
        "server": {"keys": [CLIENT_KEY], "workers": workers, **(section or {})},
        "cache": {"directory": str(directory), "size_limit_gib": SIZE_LIMIT_GIB, **cache},
        "providers": {"openai": {"base_url": url}},
    }
    config = directory.with_name(f"{directory.name}.yaml")
    config.write_text(json.dumps(settings))
    command = [
        sys.executable,
        "-m",
        "embedding_proxy",
        "serve",
        "--port",
        "0",
        "--config",
        str(config),
    ]
    environment = {"OPENAI_API_KEY": "k" if provider else "", "OPENROUTER_API_KEY": ""}
    with server(command, "export OPENAI_BASE_URL=http://127.0.0.1:", cores, environment) as running:
        yield running
