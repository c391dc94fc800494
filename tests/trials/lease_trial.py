"""Equal requests at once, at several processes that share a folder: each text is bought once.

    PYTHONPATH=.:tests:tests/trials python lease_trial.py --rounds 200 --kills 20

In every round 16 clients ask for the same new texts, each over a connection of its own, so that
every worker gets some. In some rounds the worker whose call has reached the upstream is killed
there: its texts are bought once more, by another worker, and no further time. What was bought is
counted at the upstream. Processes that use the library do the same. Before all that, clients ask
nodes with folders of their own that share a Redis.
"""

import argparse
import asyncio
import contextlib
import json
import os
import random
import signal
import sqlite3
import sys
import tempfile
from collections import Counter
from collections.abc import AsyncIterator, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
from aiohttp import web
from fault_server import Call, FaultServer, Payload
from redis_server import redis_server

from embedding_proxy import EmbeddingService

MODEL = "text-embedding-3-small"
CLIENTS = 16
TEXTS = 3
"""Texts of a round: the first is in every request; of the others each request has some."""
CALL_S = 0.02
"""How long the upstream takes for a call: long enough for all requests to come meanwhile."""
MAX_TRIES = 100
NODES = 3
NODE_CLIENTS = 30
ASKS = 5
"""How often each text is asked for at the nodes."""
TIMEOUT_MS = 1000
"""Of the nodes: what is not answered in time decides each for itself, and all share two cores."""


@dataclass
class Seen:
    """What the clients and the upstream have seen."""

    bought: Counter[object] = field(default_factory=Counter)
    """How often each text was bought."""
    killed: set[object] = field(default_factory=set)
    """Texts of calls that had reached the upstream when their process was killed."""
    outcomes: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)

    def judge(self) -> None:
        """Note each text that was not bought once, or not twice at most after a kill."""
        for text, count in self.bought.items():
            if count > 1 + (text in self.killed):
                self.wrong.append(f"{text!r} was bought {count} times")


class Upstream:
    """Counts what is bought, and kills who has called when it is told to."""

    def __init__(self, seen: Seen) -> None:
        self.server = FaultServer(always=self._reply)
        self._seen = seen
        self.victims: Iterable[int] = ()
        """Processes of which the next one to call is killed."""
        self._dead_ports: set[int] = set()
        """Of the one that was killed last."""

    async def _reply(self, request: web.Request, payload: Payload) -> web.StreamResponse:
        texts = Call("", {}, payload).inputs
        assert request.transport is not None
        port = request.transport.get_extra_info("peername")[1]
        if self.victims:
            ports = {pid: _ports(pid) for pid in self.victims}
            pid = next(pid for pid, own in ports.items() if port in own)
            # Stopped first: it may be about to make another call.
            os.kill(pid, signal.SIGSTOP)
            self.victims, self._dead_ports = (), _ports(pid)
            os.kill(pid, signal.SIGKILL)
        self._seen.bought.update(texts)
        await asyncio.sleep(CALL_S)
        if port in self._dead_ports:
            # It may be another call than the one at which its process was killed.
            self._seen.killed.update(texts)
        return web.json_response(self.server.reply(payload))


def _ports(pid: int) -> set[int]:
    """Return the local ports of the connections of a process."""
    inodes = set()
    for descriptor in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(OSError):
            inodes.add(descriptor.readlink().name.removeprefix("socket:[").rstrip("]"))
    rows = Path("/proc/net/tcp").read_text(encoding="ascii").splitlines()[1:]
    fields = [row.split() for row in rows]
    return {int(field[1].rpartition(":")[2], 16) for field in fields if field[9] in inodes}


@contextlib.asynccontextmanager
async def workers(
    folder: Path, upstream: str, count: int, shared: dict[str, Any] | None = None
) -> AsyncIterator[tuple[asyncio.subprocess.Process, str]]:
    """Run the proxy with some workers; give its first process and its base URL."""
    config = folder / "config.yaml"
    config.write_text(json.dumps(settings(folder, upstream, shared)))
    command = ("serve", "--port", "0", "--config", str(config), "--workers", str(count))
    with (folder / "log").open("wb") as log:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "embedding_proxy", *command),
            stdout=asyncio.subprocess.PIPE,
            stderr=log,
            env={**os.environ, "OPENAI_API_KEY": "k"},
        )
    assert process.stdout is not None
    try:
        line = (await process.stdout.readline()).decode().strip()
        assert line.startswith("export "), (folder / "log").read_text()
        yield process, line.removeprefix("export OPENAI_BASE_URL=")
        process.send_signal(signal.SIGTERM)
        assert await process.wait() == 0
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


def settings(folder: Path, upstream: str, shared: dict[str, Any] | None = None) -> dict[str, Any]:
    """Return a configuration with one provider, and `cache.shared` if that is given."""
    return {
        "cache": {"directory": str(folder / "cache"), "shared": shared},
        "providers": {"openai": {"base_url": upstream}},
    }


def _children(pid: int) -> set[int]:
    path = Path(f"/proc/{pid}/task/{pid}/children")
    return {int(child) for child in path.read_text(encoding="ascii").split()}


async def ask(url: str, texts: list[str], seen: Seen) -> list[object]:
    """Ask over a new connection, as often as it breaks; return the vectors."""
    for _ in range(MAX_TRIES):
        connector = aiohttp.TCPConnector(force_close=True)
        try:
            async with aiohttp.ClientSession(connector=connector) as session:
                body = {"model": MODEL, "input": texts}
                async with session.post(f"{url}/embeddings", json=body) as response:
                    reply = await response.json()
                    if response.status != 200:
                        seen.wrong.append(f"{response.status}: {reply}")
                        return []
                    seen.outcomes[response.headers["x-cache"]] += 1
                    return [item["embedding"] for item in reply["data"]]
        except (aiohttp.ClientError, OSError):
            await asyncio.sleep(CALL_S)
    seen.wrong.append("the proxy could not be reached")
    return []


async def one_round(url: str, number: int, seen: Seen) -> None:
    """Ask for the same new texts in as many requests as there are clients."""
    texts = [f"round {number} text {index}" for index in range(TEXTS)]
    asked = [texts[:1] + texts[1 + index % TEXTS :] for index in range(CLIENTS)]
    replies = await asyncio.gather(*(ask(url, some, seen) for some in asked))
    vectors: dict[str, object] = {}
    for some, reply in zip(asked, replies, strict=True):
        for text, vector in zip(some, reply, strict=False):
            if vectors.setdefault(text, vector) != vector:
                seen.wrong.append(f"two vectors of {text!r}")


async def through_workers(folder: Path, rounds: int, kills: int, count: int) -> Seen:
    """Return what is seen of rounds at some workers, and of as many kills spread over them."""
    seen = Seen()
    upstream = Upstream(seen)
    async with upstream.server, workers(folder, upstream.server.url, count) as (process, url):
        for number in range(rounds):
            pids = _children(process.pid)
            if kills and number % max(1, rounds // kills) == 0:
                upstream.victims = pids
            await one_round(url, number, seen)
            while len(_children(process.pid)) < count:  # noqa: ASYNC110 - nobody tells
                await asyncio.sleep(CALL_S)
    seen.judge()
    _compare_ledger(folder, seen)
    return seen


def _compare_ledger(folder: Path, seen: Seen) -> None:
    """Compare what was bought with the ledger; what a killed process has not written is not in."""
    (database,) = (folder / "cache").glob("v*/cache.db")
    with contextlib.closing(sqlite3.connect(database)) as connection:
        ((misses,),) = connection.execute("SELECT sum(misses) FROM Usage").fetchall()
    bought = seen.bought.total()
    if not bought - len(seen.killed) <= misses <= bought:
        seen.wrong.append(f"the ledger has {misses} misses of {bought}")


async def member(config: Path) -> None:
    """Embed the texts of each line of stdin, twice at a time; print the outcomes as a line."""
    async with EmbeddingService.from_config(config) as service:
        sys.stdout.write("ready\n")
        sys.stdout.flush()
        while line := await asyncio.to_thread(sys.stdin.readline):
            texts = json.loads(line)
            both = await asyncio.gather(*(service.embed(texts, MODEL) for _ in range(2)))
            sys.stdout.write(json.dumps([str(one) for r in both for one in r.outcomes]) + "\n")
            sys.stdout.flush()


async def through_services(folder: Path, rounds: int, count: int) -> Seen:
    """Return what is seen of rounds in which some processes of the library embed the same texts."""
    seen = Seen()
    upstream = Upstream(seen)
    async with upstream.server, contextlib.AsyncExitStack() as stack:
        config = folder / "config.yaml"
        config.write_text(json.dumps(settings(folder, upstream.server.url)))
        members = [
            await asyncio.create_subprocess_exec(
                *(sys.executable, __file__, "--member", str(config)),
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                env={**os.environ, "OPENAI_API_KEY": "k", "PYTHONPATH": os.pathsep.join(sys.path)},
            )
            for _ in range(count)
        ]
        for one in members:
            stack.push_async_callback(_end, one)
            assert await one.stdout.readline() == b"ready\n"  # type: ignore[union-attr]
        for number in range(rounds):
            texts = [f"round {number} text {index}" for index in range(TEXTS)]
            for one in members:
                one.stdin.write(json.dumps(texts).encode() + b"\n")  # type: ignore[union-attr]
            for one in members:
                line = await one.stdout.readline()  # type: ignore[union-attr]
                seen.outcomes.update(json.loads(line))
    seen.judge()
    _compare_ledger(folder, seen)
    return seen


async def through_nodes(folder: Path, count: int, texts: int, options: dict[str, Any]) -> Seen:
    """Return what is seen when some nodes are asked five times for each text, by 30 clients.

    `options` are those of `cache.shared`. A text is asked for five times within a short while.
    """
    seen, chance = Seen(), random.Random(texts)
    upstream = Upstream(seen)
    requests = [f"text {number}" for number in range(texts) for _ in range(ASKS)]
    for start in range(0, len(requests), NODE_CLIENTS):
        some = requests[start : start + NODE_CLIENTS]
        chance.shuffle(some)
        requests[start : start + NODE_CLIENTS] = some
    async with upstream.server, contextlib.AsyncExitStack() as stack:
        urls = []
        for number in range(count):
            own = folder / f"node {number}"
            own.mkdir()
            node = workers(own, upstream.server.url, 1, options)
            urls.append((await stack.enter_async_context(node))[1])
        session = await stack.enter_async_context(aiohttp.ClientSession())
        line = iter(requests)

        async def client() -> None:
            for text in line:
                body = {"model": MODEL, "input": text, "encoding_format": "base64"}
                url = f"{chance.choice(urls)}/embeddings"
                async with session.post(url, json=body) as response:
                    reply = await response.json()
                    seen.outcomes[response.headers.get("x-cache", str(response.status))] += 1
                    if response.status != 200:
                        seen.wrong.append(f"{response.status}: {reply}")

        await asyncio.gather(*(client() for _ in range(NODE_CLIENTS)))
    seen.judge()
    if len(seen.bought) != texts:
        seen.wrong.append(f"{len(seen.bought)} texts were bought of {texts}")
    return seen


async def _end(process: asyncio.subprocess.Process) -> None:
    assert process.stdin is not None
    process.stdin.close()
    await process.wait()


async def run(rounds: int, kills: int, counts: list[int], texts: int) -> bool:
    """Run all of it, say what was seen; return whether all was as it must be."""
    wrong: list[str] = []
    if texts:
        with tempfile.TemporaryDirectory() as folder, redis_server() as redis:
            options = {"url": redis.url, "timeout_ms": TIMEOUT_MS}
            seen = await through_nodes(Path(folder), NODES, texts, options)
        twice = sum(number > 1 for number in seen.bought.values())
        sys.stdout.write(
            f"{NODES} nodes: {len(seen.bought)} texts, {twice} bought twice;"
            f" {dict(seen.outcomes)}\n"
        )
        wrong += seen.wrong
    for count in counts if rounds else ():
        for kind in ("workers", "services"):
            with tempfile.TemporaryDirectory() as folder:
                if kind == "workers":
                    seen = await through_workers(Path(folder), rounds, kills, count)
                else:
                    seen = await through_services(Path(folder), rounds, count)
            twice = sum(number > 1 for number in seen.bought.values())
            sys.stdout.write(
                f"{count} {kind}, {rounds} rounds: {len(seen.bought)} texts, {twice} bought twice,"
                f" of {len(seen.killed)} whose buyer was killed; {dict(seen.outcomes)}\n"
            )
            wrong += seen.wrong
    sys.stdout.write("".join(f"{line}\n" for line in wrong[:20]))
    return not wrong


def main() -> None:
    """Run the trial, or one process of the library in it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--workers", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--texts", type=int, default=10_000)
    parser.add_argument("--member", type=Path)
    given = parser.parse_args()
    if given.member is not None:
        asyncio.run(member(given.member))
        return
    sys.exit(not asyncio.run(run(given.rounds, given.kills, given.workers, given.texts)))


if __name__ == "__main__":
    main()
