"""Texts embedded with indexing on, while Qdrant is away for a part of the time and the proxy dies.

python index_trial.py TEXTS [WORKERS] — the suite runs a few, `make index` 5,000 of them.

The proxy is killed with kill -9 twice, once while Qdrant is away and once while it is there. A
client whose connection breaks asks again, as OpenAI's clients do; any answer but 200 is a failure.
In the end Qdrant holds one point for each text, no more, each with the right vector.
"""

import asyncio
import os
import random
import signal
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import aiohttp
import numpy as np
import orjson
from fault_server import FaultServer, vector_of
from ports import own_port
from qdrant_server import QdrantServer

CLIENTS = 8
MOST_INPUTS = 20
WIDTH = 64
COLLECTION = f"trial-m-{WIDTH}"
PATIENCE = 120


@dataclass
class Outcome:
    """What came of it."""

    texts: int
    points: int = 0
    wrong: int = 0
    """Points with another vector or text than they should have."""
    failed: int = 0
    """Answers that were no 200."""
    broken: int = 0
    """Connections that broke, and were made again."""
    kills: int = 0
    upserts: int = 0
    seconds: float = 0

    def __str__(self) -> str:
        return (
            f"{self.texts} texts, {self.points} points, {self.wrong} wrong, {self.failed} failed"
            f" requests, {self.kills} kills, {self.broken} connections broken,"
            f" {self.upserts} upserts, {self.seconds:.1f} s"
        )


class House:
    """The proxy as a process of its own, on a port that stays."""

    def __init__(self, folder: Path, upstream: FaultServer, qdrant: QdrantServer, workers: int):
        self._port = own_port()
        self.url = f"http://127.0.0.1:{self._port}"
        self._workers = workers
        self._config = folder / "config.yaml"
        self._log = folder / "log.txt"
        self._process: asyncio.subprocess.Process | None = None
        model = {
            "space": "trial/m",
            "dimensions": WIDTH,
            "routes": [{"provider": "openai", "model": "m"}],
        }
        # JSON is YAML.
        content = {
            "cache": {"directory": str(folder / "cache")},
            "providers": {"openai": {"base_url": upstream.url}},
            "models": {"m": model},
            "index": {"qdrant": {"url": qdrant.url, "prefix": "trial-", "batch_mib": 0.25}},
        }
        self._config.write_bytes(orjson.dumps(content))

    async def start(self) -> None:
        """Return once it answers."""
        with self._log.open("ab") as log:
            self._process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", "embedding_proxy", "serve", "--port", str(self._port)),
                *("--config", str(self._config), "--workers", str(self._workers)),
                stdout=asyncio.subprocess.PIPE,
                stderr=log,
                env={**os.environ, "OPENAI_API_KEY": "k"},
                start_new_session=True,
            )
        assert self._process.stdout is not None
        assert await self._process.stdout.readline(), self._log.read_text()[-2000:]

    async def kill(self) -> None:
        """Kill it and its workers at once."""
        assert self._process is not None
        os.killpg(self._process.pid, signal.SIGKILL)
        await self._process.wait()


@asynccontextmanager
async def _house(workers: int) -> AsyncIterator[tuple[House, QdrantServer]]:
    with tempfile.TemporaryDirectory() as folder:
        async with FaultServer(widths={"m": WIDTH}) as upstream, QdrantServer() as qdrant:
            house = House(Path(folder), upstream, qdrant, workers)
            await house.start()
            try:
                yield house, qdrant
            finally:
                await house.kill()


class Trial:
    """Clients and those who disturb them, on one house."""

    def __init__(self, texts: int, seed: int) -> None:
        self._chance = random.Random(seed)
        self.texts = [f"text {n} {'x' * self._chance.randint(0, 200)}" for n in range(texts)]
        self._waiting: list[list[str]] = []
        start = 0
        while start < texts:
            count = self._chance.randint(1, MOST_INPUTS)
            self._waiting.append(self.texts[start : start + count])
            start += count
        self._batches = len(self._waiting)
        self._answered: list[list[str]] = []
        self.outcome = Outcome(texts)

    async def run(self, house: House, qdrant: QdrantServer) -> None:
        """Return once all is answered, and what was answered has arrived."""
        async with aiohttp.ClientSession() as session:
            async with asyncio.TaskGroup() as group:
                group.create_task(self._disturb(house, qdrant))
                for _ in range(CLIENTS):
                    group.create_task(self._client(house, session))
            async with asyncio.timeout(PATIENCE):
                while await self._backlog(house, session):  # noqa: ASYNC110 - another process
                    await asyncio.sleep(0.05)

    async def _client(self, house: House, session: aiohttp.ClientSession) -> None:
        while self._waiting:
            batch = self._waiting.pop()
            await self._ask(house, session, batch)
            self._answered.append(batch)
            if self._chance.random() < 0.2:
                await self._ask(house, session, self._chance.choice(self._answered))

    async def _ask(self, house: House, session: aiohttp.ClientSession, batch: list[str]) -> None:
        body = {"model": "m", "input": batch}
        while True:
            try:
                async with session.post(f"{house.url}/v1/embeddings", json=body) as response:
                    await response.read()
                    self.outcome.failed += response.status != 200
                    return
            except aiohttp.ClientError:
                self.outcome.broken += 1
                await asyncio.sleep(0.02)

    async def _disturb(self, house: House, qdrant: QdrantServer) -> None:
        await self._reach(0.2)
        await qdrant.stop()
        await self._reach(0.4)
        await self._kill(house)
        await self._reach(0.6)
        await qdrant.start()
        await self._reach(0.8)
        await self._kill(house)

    async def _kill(self, house: House) -> None:
        await house.kill()
        self.outcome.kills += 1
        await house.start()

    async def _reach(self, share: float) -> None:
        while len(self._answered) < share * self._batches:  # noqa: ASYNC110 - many add to it
            await asyncio.sleep(0.001)

    @staticmethod
    async def _backlog(house: House, session: aiohttp.ClientSession) -> int:
        async with session.get(f"{house.url}/status") as response:
            return (await response.json())["index"]["backlog_points"]


async def trial(texts: int, workers: int = 1, seed: int = 1) -> Outcome:
    """Embed so many texts, and return what Qdrant holds of them afterwards."""
    begun = time.monotonic()
    this = Trial(texts, seed)
    async with _house(workers) as (house, qdrant):
        await this.run(house, qdrant)
        points = await qdrant.points(COLLECTION)
        this.outcome.upserts = qdrant.upserts
    found = {point["payload"]["text"]: point["vector"] for point in points.values()}
    this.outcome.points = len(points)
    this.outcome.wrong = len(found.keys() ^ set(this.texts)) + sum(
        not np.allclose(vector, vector_of("m", text, WIDTH), atol=1e-6)
        for text, vector in found.items()
    )
    this.outcome.seconds = time.monotonic() - begun
    return this.outcome


if __name__ == "__main__":
    found = asyncio.run(trial(int(sys.argv[1]), int((sys.argv[2:] or ["1"])[0])))
    print(found)
    sys.exit(bool(found.wrong or found.failed or found.points != found.texts))
