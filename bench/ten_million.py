"""What a store of ten million small vectors costs: each command, the proxy's start, hits, expiry.

python -m bench.ten_million [ENTRIES] [--record]

The store has vectors of 16 and 32 numbers, a tenth of them each in another namespace, of 400 days
ago and of 200 days ago. It is kept in `.bench` for the next run, as long as records and layout stay
what they are; what deletes works on the copy that `cache backup` made. With 10,000,000 entries it
takes about 30 minutes and 12 GB of disk. `--record` puts the table into docs/performance.md.
"""

import argparse
import json
import os
import random
import shutil
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Any, Self

from embedding_proxy.cache import record
from embedding_proxy.cache.disk import connection
from embedding_proxy.cache.disk.database import FILE_NAME
from embedding_proxy.cache.disk.schema import LAYOUT
from embedding_proxy.cache.key import FORMAT, Namespace, keyring
from embedding_proxy.cache.record import Entry
from embedding_proxy.providers.base import Space

from . import pages
from .client import Client
from .environment import KEPT
from .material import http_request, say
from .process import MB, PROC, ROOT, SIZE_LIMIT_GIB, Server, memory, server
from .record import Machine
from .scale import ready
from .table import number, percentile

ENTRIES, FEWEST = 10_000_000, 10_000
MADE_OF = 2
"""Bumped when this file makes another store of the same entries."""
WIDTHS = (16, 32)
SPACES = tuple(Space(f"bench/small-{width}", width) for width in WIDTHS)
TENANT = "tenant"
TENTHS = {"tenant": 0, "oldest": 1, "old": 2}
"""By the last digit of its number, what an entry is; all others are bought yesterday."""
OLDEST_DAYS, OLD_DAYS, TTL_DAYS = 400, 200, 100
VECTORS = 4093
A_WRITE = 100_000
HITS, WARM_UPS = 20_000, 500
ASKED_AT_ONCE = 50
"""Hits between two looks at how far expiry is."""
SAMPLE_SECONDS = 0.01
PATIENCE_SECONDS = 3600.0
DAY = 86_400
BYTES_AN_ENTRY = 1200
"""Of the disk, for the store, its backup, the logs and the sorting of indexes, at most."""
CLIENT_KEY = "sk-of-the-bench"
HEADINGS = ("what", "seconds", "peak memory, MB", "with mapped pages, MB", "")


@dataclass(frozen=True)
class Figure:
    """One line of the table."""

    what: str
    seconds: float
    own_mb: float | None = None
    """The most memory of the process at any time, without mapped pages of files."""
    all_mb: float | None = None
    """The same with them; the kernel takes them back whenever somebody wants the memory."""
    more: dict[str, str] = field(default_factory=dict)

    def cells(self) -> tuple[str, ...]:
        """Return what the line shows, under HEADINGS."""
        sizes = ("" if mb is None else number(mb) for mb in (self.own_mb, self.all_mb))
        more = ", ".join(f"{name} {value}" for name, value in self.more.items())
        return self.what, number(self.seconds), *sizes, more


def markdown(figures: Sequence[Figure]) -> str:
    """Return the table for a page."""
    lines = [HEADINGS, ("---",) * len(HEADINGS), *(figure.cells() for figure in figures)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


# The store


def text(number: int) -> str:
    """Return an input."""
    return f"text {number}"


def space_of(number: int) -> Space:
    """Return the space of an entry."""
    return SPACES[number // 10 % 2]


def namespace_of(number: int) -> str:
    """Return the namespace of an entry."""
    return TENANT if number % 10 == TENTHS["tenant"] else ""


def is_kept(number: int) -> bool:
    """Tell whether nothing here deletes the entry, and a client without a namespace asks for it."""
    return number % 10 not in TENTHS.values()


def make(directory: Path, entries: int) -> None:
    """Write a store with SQL: the real one's layout, records and keys, without its transactions."""
    with connection.opened(directory, SIZE_LIMIT_GIB << 30, create=True) as file:
        path = file.path
    with closing(sqlite3.connect(path, isolation_level=None)) as database:
        sql = database.execute
        for pragma in ("journal_mode = OFF", "synchronous = OFF", "cache_size = -262144"):
            sql(f"PRAGMA {pragma}").fetchall()
        extras = sql(
            "SELECT type, name, sql FROM sqlite_master WHERE type IN ('index', 'trigger')"
            " AND tbl_name IN ('Cache', 'Entries') AND sql IS NOT NULL"
        ).fetchall()
        for kind, name, _ in extras:
            sql(f'DROP {kind} "{name}"')
        rings = {
            (space, name): keyring(space, Namespace(name))
            for space in SPACES
            for name in ("", TENANT)
        }
        ids = {of: place for place, of in enumerate(rings, 1)}
        for of, ring in rings.items():
            sql("INSERT INTO Partitions VALUES (?, ?, ?, ?)", (ids[of], *ring.partition))
        say(f"writing {entries:,} entries")
        for first in range(0, entries, A_WRITE):
            numbers = range(first, min(first + A_WRITE, entries))
            sql("BEGIN")
            database.executemany(
                "INSERT INTO Cache (rowid, key, raw, store_time, access_time, mode, value)"
                " VALUES (?, ?, 1, ?, ?, 1, ?)",
                map(partial(_record_row, rings), numbers),
            )
            database.executemany(
                "INSERT INTO Entries (id, partition, stored, used) VALUES (?, ?, ?, ?)",
                map(partial(_entry_row, ids), numbers),
            )
            sql("COMMIT")
            if numbers[-1] * 10 // entries > first * 10 // entries or not first:
                say(f"{numbers[-1] + 1:,} written")
        sql("UPDATE Settings SET value = (SELECT count(*) FROM Entries) WHERE key = 'count'")
        for _, name, statement in extras:
            say(f"making {name}")
            sql(statement)
        sql("PRAGMA journal_mode = WAL").fetchall()
    os.sync()


_NOW = time.time()


def _stored(number: int) -> float:
    days = {TENTHS["oldest"]: OLDEST_DAYS, TENTHS["old"]: OLD_DAYS}.get(number % 10, 1)
    # Rows lie in the order in which they were bought.
    return _NOW - days * DAY + number / 1000


def _record_row(rings: dict[Any, Any], number: int) -> tuple[object, ...]:
    space = space_of(number)
    key = rings[space, namespace_of(number)].key(text(number))
    vector = _vector(number % VECTORS, space.dimensions)
    stored = _stored(number)
    entry = Entry(vector, tokens=2, counted=True, digest=key.digest)
    return number + 1, key.address, stored, stored, record.encode(entry)


def _entry_row(ids: dict[Any, int], number: int) -> tuple[object, ...]:
    stored = int(1000 * _stored(number))
    # Uses in another order than that of the rows.
    used = stored + number * 7919 % 86_400_000
    return number + 1, ids[space_of(number), namespace_of(number)], stored, used


@cache
def _vector(number: int, width: int) -> bytes:
    """Return numbers between 1 and 2 as little-endian float32; their low halves are noise."""
    noise = random.Random(number).randbytes(2 * width)  # noqa: S311 - the same in every run
    return b"".join(noise[i : i + 2] + b"\x80\x3f" for i in range(0, 2 * width, 2))


def kept_store(entries: int) -> Path:
    """Return the directory of the store, of an earlier run or new, read into the page cache."""
    name = f"small-{entries}-{LAYOUT}-{FORMAT}-{MADE_OF}"
    folder = KEPT / name
    done = folder / "done"
    if done.exists() and time.time() - done.stat().st_mtime > TTL_DAYS // 2 * DAY:
        # What was bought the day before it was made will soon be as old as what is to expire.
        done.unlink()
    if not done.exists():
        KEPT.mkdir(exist_ok=True)
        for old in KEPT.glob("small-*"):
            shutil.rmtree(old)
        if shutil.disk_usage(KEPT).free < entries * BYTES_AN_ENTRY:
            raise SystemExit(f"bench: {KEPT} has no room for a store of {entries:,} entries")
        folder.mkdir()
        make(folder / "store", entries)
        done.touch()
    directory = folder / "store"
    for file in directory.glob("v*/*"):
        with file.open("rb", buffering=0) as opened:
            while opened.read(1 << 24):
                pass
    return directory


# Processes


def config_of(directory: Path, **cache: object) -> Path:
    """Write a configuration for a store and return its path."""
    models = {
        f"small-{space.dimensions}": {
            "space": space.name,
            "dimensions": space.dimensions,
            "routes": [{"provider": "openai", "model": "small"}],
        }
        for space in SPACES
    }
    settings = {
        "server": {"keys": [CLIENT_KEY, {"key": f"{CLIENT_KEY}-2", "namespace": TENANT}]},
        "cache": {"directory": str(directory), "size_limit_gib": SIZE_LIMIT_GIB, **cache},
        "providers": {"openai": {"base_url": "http://127.0.0.1:9/v1"}},
        "models": models,
    }
    config = directory.with_name(f"{directory.name}.yaml")
    config.write_text(json.dumps(settings))
    return config


@contextmanager
def proxy(directory: Path, **cache: object) -> Iterator[Server]:
    """Run the proxy on a store."""
    config = config_of(directory, **cache)
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
    environment = {"OPENAI_API_KEY": "", "OPENROUTER_API_KEY": ""}
    prefix = "export OPENAI_BASE_URL=http://127.0.0.1:"
    with server(command, prefix, environment=environment) as running:
        yield running


def command(what: str, directory: Path, *arguments: str) -> tuple[Figure, str]:
    """Run `embedding-proxy cache …`; return what it took, and what it printed."""
    say(what)
    words = ["-m", "embedding_proxy", "cache", *arguments, "--config", str(config_of(directory))]
    began = time.perf_counter()
    with tempfile.TemporaryFile("w+") as out:
        process = subprocess.Popen(
            [sys.executable, *words], stdout=out, env={**os.environ, "PYTHONPATH": str(ROOT)}
        )
        own = 0.0
        while True:
            pid, status, used = os.wait4(process.pid, os.WNOHANG)
            if pid:
                break
            own = max(own, _own_mb(process.pid))
            time.sleep(SAMPLE_SECONDS)
        process.returncode = os.waitstatus_to_exitcode(status)
        seconds = time.perf_counter() - began
        out.seek(0)
        told = out.read()
    if process.returncode:
        raise RuntimeError(f"{what}: code {process.returncode}: {told}")
    return Figure(what, seconds, own, 1024 * used.ru_maxrss / MB), told


def _own_mb(pid: int) -> float:
    """Return what is resident of a process without mapped files, in MB; 0 if it has ended."""
    try:
        lines = (PROC / str(pid) / "status").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return 0.0
    status = dict(line.split(":", 1) for line in lines if ":" in line)
    return 1024 * int(status.get("RssAnon", "0 kB").split()[0]) / MB


class WriteLock:
    """How long the store's write lock is held, as the kernel tells it (SQLite's, in WAL mode).

    Two transactions with less than a sample's time between them count as one.
    """

    def __init__(self, directory: Path) -> None:
        shm = connection.folder_of(directory) / f"{FILE_NAME}-shm"
        # https://www.sqlite.org/walformat.html#locks: byte 120 is the write lock.
        self._sign = f":{shm.stat().st_ino} 120 120"
        self.longest_s = 0.0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def _watch(self) -> None:
        since: float | None = None
        while not self._stop.wait(0.001):
            held, now = self._sign in (PROC / "locks").read_text(), time.perf_counter()
            if not held:
                since = None
            elif since is None:
                since = now
            else:
                self.longest_s = max(self.longest_s, now - since)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()


# What is measured


class Asking:
    """Single hits, at random over all entries that stay."""

    def __init__(self, entries: int, client: Client) -> None:
        self._entries = entries
        self._client = client
        self._chance = random.Random(1)  # noqa: S311 - the same choices in every run

    def hits(self, count: int) -> list[float]:
        """Return the seconds that so many hits took."""
        return [self._client.ask(self._request()) for _ in range(count)]

    def _request(self) -> bytes:
        while not is_kept(number := self._chance.randrange(self._entries)):
            pass
        model = f"small-{space_of(number).dimensions}"
        body = {"input": text(number), "model": model, "encoding_format": "base64"}
        return http_request(json.dumps(body).encode())


def told(seconds: Sequence[float]) -> dict[str, str]:
    """Return percentiles in words."""
    shares = {"p50": 0.5, "p99": 0.99, "most": 1.0}
    return {name: f"{1e3 * percentile(seconds, share):.2f} ms" for name, share in shares.items()}


def start_and_hits(directory: Path, entries: int) -> Iterator[Figure]:
    """Start the proxy, and ask it for what the store holds."""
    say("starting the proxy")
    with proxy(directory) as running:
        ready(running)
        yield Figure("start to ready", time.perf_counter() - running.since)
        with Client(running, 1) as client:
            asking = Asking(entries, client)
            asking.hits(WARM_UPS)
            say(f"{HITS:,} hits")
            taken = asking.hits(HITS)
        used = memory(running, directory)
        yield Figure(
            f"{HITS:,} single hits, at random", sum(taken), used.resident, used.peak, told(taken)
        )


def expiry(directory: Path, entries: int) -> Figure:
    """Let a running proxy delete what is older than its TTL, and ask for the rest meanwhile."""
    say("expiry")
    path = connection.folder_of(directory) / FILE_NAME
    before = int(1000 * (time.time() - TTL_DAYS * DAY))
    taken: list[float] = []
    with (
        proxy(directory, ttl_days=TTL_DAYS) as running,
        Client(running, 1) as client,
        closing(sqlite3.connect(f"{path.as_uri()}?mode=ro", uri=True)) as database,
        WriteLock(directory) as lock,
    ):
        asking = Asking(entries, client)
        began = time.perf_counter()
        ((partitions,),) = database.execute("SELECT max(id) FROM Partitions")
        while any(_has_old(database, i, before) for i in range(1, partitions + 1)):
            taken += asking.hits(ASKED_AT_ONCE)
            if time.perf_counter() - began > PATIENCE_SECONDS:
                raise RuntimeError("expiry does not end")
        seconds = time.perf_counter() - began
        used = memory(running, directory)
    more = {"longest write": f"{1e3 * lock.longest_s:.0f} ms"}
    more |= {f"hits {name}": value for name, value in told(taken).items()} if taken else {}
    what = f"expiry of {entries // 10:,} entries by a running proxy"
    return Figure(what, seconds, used.resident, used.peak, more)


def _has_old(database: sqlite3.Connection, partition: int, before: int) -> bool:
    sql = "SELECT 1 FROM Entries WHERE partition = ? AND stored < ? LIMIT 1"
    return bool(database.execute(sql, (partition, before)).fetchall())


def figures(entries: int) -> Iterator[Figure]:
    """Measure everything."""
    directory = kept_store(entries)
    yield from start_and_hits(directory, entries)
    for what, *arguments in (
        ("`cache stats`", "stats", "--json"),
        ("`cache verify`", "verify", "--json"),
    ):
        figure, out = command(what, directory, *arguments)
        if what == "`cache stats`":
            _expect(json.loads(out)["entries"], entries)
        if what == "`cache verify`":
            _expect(json.loads(out)["records"], entries)
        yield figure
    copy = directory.with_name("copy")
    shutil.rmtree(copy, ignore_errors=True)
    try:
        file = connection.folder_of(copy) / FILE_NAME
        file.parent.mkdir(parents=True)
        figure, _ = command("`cache backup`", directory, "backup", str(file))
        yield figure
        tenth = f"{entries // 10:,}"
        figure, out = command(
            f"`cache purge --namespace`, {tenth} entries",
            *(copy, "purge", "--namespace", TENANT, "--yes", "--json"),
        )
        _expect(json.loads(out)["deleted"], entries // 10)
        yield figure
        figure, out = command(
            f"`cache purge --older-than`, {tenth} entries",
            *(
                copy,
                "purge",
                "--older-than",
                f"{(OLDEST_DAYS + OLD_DAYS) // 2}d",
                "--yes",
                "--json",
            ),
        )
        _expect(json.loads(out)["deleted"], entries // 10)
        yield figure
        yield expiry(copy, entries)
    finally:
        shutil.rmtree(copy, ignore_errors=True)


def _expect(found: int, wanted: int) -> None:
    if found != wanted:
        raise RuntimeError(f"{found:,} entries, and {wanted:,} were expected")


def main(arguments: Sequence[str] | None = None, tell: Callable[[str], None] = print) -> None:
    """Measure, print, and put it onto the page."""
    parser = argparse.ArgumentParser(description="What ten million small vectors cost.")
    parser.add_argument("entries", nargs="?", type=int, default=ENTRIES, help="%(default)s")
    parser.add_argument("--record", action="store_true", help="put it onto the page")
    asked = parser.parse_args(arguments)
    if asked.entries < FEWEST or asked.entries % 20:
        parser.error(f"ENTRIES: at least {FEWEST:,}, and a multiple of 20")
    machine = Machine()
    made: list[Figure] = []
    try:
        for figure in figures(asked.entries):
            say(" | ".join(figure.cells()))
            made.append(figure)
    finally:
        about = machine.told(1)
        line = (
            f"{asked.entries:,} entries of 16 and 32 dimensions, {about['date'][:10]}, commit"
            f" {about['commit']}, {about['cpu']}, {about['cores']} cores"
            f" ({about['cores_used_by_others']} of them used by others)."
        )
        page = f"{line}\n\n{markdown(made)}"
        tell(page)
    if asked.record:
        pages.put(pages.PERFORMANCE, "ten-million", page)


if __name__ == "__main__":
    main()
