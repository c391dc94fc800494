"""What the benches share: servers as processes of their own, inputs, and the rows of the table."""

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np

from cache import record
from cache.key import Keyring
from cache.record import Entry
from providers.base import Space
from providers.catalogue import CATALOGUE

STORE_MODEL = "text-embedding-3-small"
RNG = np.random.default_rng(1)
MB = 1e6
READ_BYTES = 1 << 20
PROC = Path("/proc")
TICKS_A_SECOND = os.sysconf("SC_CLK_TCK")
SIZE_LIMIT_GIB = 1000
"""No store of a bench is to evict."""


@dataclass(frozen=True)
class Row:
    """One figure, what it was made from, and the most it should be."""

    what: str
    value: float
    unit: str
    figures: dict[str, float] = field(default_factory=dict)
    target: str = ""
    most: float | None = None

    @property
    def verdict(self) -> str:
        """Whether the target is met; empty if there is none."""
        if self.most is None:
            return ""
        return "ok" if self.value <= self.most else "MISS"

    def as_json(self) -> dict[str, object]:
        """Return everything there is to say."""
        return {**asdict(self), "verdict": self.verdict}


def print_table(rows: Sequence[Row]) -> None:
    """Print the rows, each with its target and the figures behind it."""
    width = max(len(row.what) for row in rows)
    print(f"{'':4} {'what':{width}} {'measured':>12} {'target':>12}       from")
    for row in rows:
        value = f"{row.value:.3g}" if row.value < 100 else f"{row.value:.0f}"
        most = "" if row.most is None else f"≤ {row.most:.4g} {row.unit}"
        figures = "  ".join(f"{name} {figure:,.10g}" for name, figure in row.figures.items())
        measured = f"{value} {row.unit}"
        against = f"{measured:>12} {most:>12} {row.verdict:4}"
        print(f"{row.target:4} {row.what:{width}} {against}  {figures}")


def say(line: str) -> None:
    """Tell how far it is, where it does not get into the results."""
    print(f"bench: {line}", file=sys.stderr, flush=True)


class Server(NamedTuple):
    """A server that runs."""

    port: int
    pid: int
    since: float
    """`time.perf_counter` just before it was started."""


@contextmanager
def server(command: list[str], prefix: str) -> Iterator[Server]:
    """Run a server until the block ends; it prints its port behind `prefix`."""
    environment = {**os.environ, "OPENAI_API_KEY": "", "OPENROUTER_API_KEY": ""}
    since = time.perf_counter()
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment
    ) as process:
        line = process.stdout.readline().strip()
        try:
            if not line.startswith(prefix):
                raise RuntimeError(f"it did not start: {command}")
            yield Server(int(line.removeprefix(prefix).removesuffix("/v1")), process.pid, since)
        finally:
            process.terminate()


@contextmanager
def proxy(directory: Path, **cache: object) -> Iterator[Server]:
    """Run the proxy on a store; `cache` are further keys of that section."""
    section = {"directory": str(directory), "size_limit_gib": SIZE_LIMIT_GIB, **cache}
    config = directory.with_name(f"{directory.name}.yaml")
    config.write_text(json.dumps({"cache": section}))
    command = [sys.executable, "-m", "proxy", "serve", "--port", "0", "--config", str(config)]
    with server(command, "export OPENAI_BASE_URL=http://127.0.0.1:") as running:
        yield running


def request(model: str, texts: Sequence[str], encoding: str) -> bytes:
    """Return a whole HTTP request for the vectors of some texts."""
    body = json.dumps({"model": model, "input": texts, "encoding_format": encoding}).encode()
    head = (
        "POST /v1/embeddings HTTP/1.1",
        "Host: bench",
        "Content-Type: application/json",
        f"Content-Length: {len(body)}",
    )
    return "\r\n".join(head).encode() + b"\r\n\r\n" + body


def resident(what: str, running: Server, directory: Path, most: float) -> Row:
    """T10: what is resident, less the mapped pages of the store in `directory`.

    Those are mapped from the page cache: the kernel takes them back whenever somebody wants the
    memory, and reading without mapping leaves the same pages there. `rss_mb` is the whole.
    """
    lines = (PROC / str(running.pid) / "status").read_text().splitlines()
    status = dict(line.split(":", 1) for line in lines)
    names = ("VmRSS", "RssAnon", "RssShmem", "RssFile", "VmHWM")
    rss, anon, shared, files, peak = (1024 * int(status[name].split()[0]) / MB for name in names)
    mapped = sum(mapped_bytes(running.pid, directory)) / MB
    figures = {
        "anon+shmem_mb": round(anon + shared),
        "file_mb": round(files),
        "of_which_store_mb": round(mapped),
        "rss_mb": round(rss),
        "peak_rss_mb": round(peak),
    }
    return Row(f"resident, {what}", rss - mapped, "MB", figures, "T10", most)


def mapped_bytes(pid: int, directory: Path) -> Iterator[int]:
    """Yield what is resident of each mapping of a file in a directory."""
    inside = False
    for line in (PROC / str(pid) / "smaps").read_text().splitlines():
        first, *rest = line.split()
        if not first.endswith(":"):
            inside = rest[-1].startswith(str(directory))
        elif inside and first == "Rss:":
            yield 1024 * int(rest[0])


@contextmanager
def connected(running: Server) -> Iterator[socket.socket]:
    """Connect to a server. A blocking socket: what the client costs would hide a difference."""
    with socket.create_connection(("127.0.0.1", running.port)) as client:
        client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        yield client


def received(client: socket.socket) -> bytes:
    """Return the next bytes. Raises ConnectionError at the end."""
    if data := client.recv(READ_BYTES):
        return data
    raise ConnectionError("the server hung up")


def ask(client: socket.socket, sent: bytes) -> float:
    """Return the seconds a request takes; raises unless all of it was in the cache."""
    start = time.perf_counter()
    client.sendall(sent)
    reply = b""
    while (split := reply.find(b"\r\n\r\n")) < 0:
        reply += received(client)
    head = reply[:split].lower()
    if not head.startswith(b"http/1.1 200") or b"x-cache: hit" not in head:
        raise RuntimeError(f"no hit: {reply[:500].decode()}")
    if b"content-length: " in head:
        missing = int(head.split(b"content-length: ")[1].split()[0]) - len(reply) + split + 4
        while missing > 0:
            missing -= len(received(client))
    else:
        while not reply.endswith(b"\r\n0\r\n\r\n"):
            reply = reply[-7:] + received(client)
    return time.perf_counter() - start


def processors() -> tuple[float, float, float]:
    """Return seconds: passed, of processors in use by anybody, and by this process's tree."""
    own = sum(os.times()[:4])
    if not PROC.exists():
        return time.monotonic(), own, own
    line = (PROC / "stat").read_text().splitlines()[0]
    user, nice, system, _, _, *more = (int(ticks) for ticks in line.split()[1:9])
    return time.monotonic(), (user + nice + system + sum(more)) / TICKS_A_SECOND, own


def processor_seconds(pid: int) -> tuple[float, float]:
    """Return for how long the process's first thread had a processor, and waited for one."""
    used, waited, _ = (PROC / str(pid) / "schedstat").read_text().split()
    return int(used) / 1e9, int(waited) / 1e9


class Ring(Keyring):
    """The keys of the inputs, and records of random unit vectors for them."""

    def __init__(self) -> None:
        model = CATALOGUE[STORE_MODEL]
        super().__init__(Space(model.space, model.dimensions, model.matryoshka, model.tokenizer))

    def records(self, numbers: Sequence[int]) -> dict[bytes, bytes]:
        """Return a record for each of these inputs, by address."""
        width = self.space.dimensions
        vectors = RNG.standard_normal((len(numbers), width), dtype=np.float32)
        vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
        keys = [self.key(text(number)) for number in numbers]
        return {
            key.address: record.encode(Entry(vector.tobytes(), 3, True, key.digest))  # noqa: FBT003
            for key, vector in zip(keys, vectors, strict=True)
        }


RING = Ring()
VECTOR_BYTES = 4 * RING.space.dimensions


def text(number: int) -> str:
    """Return an input."""
    return f"input {number}"


def asking(*texts: str) -> bytes:
    """Return a request for some inputs."""
    return request(STORE_MODEL, texts, "base64")
