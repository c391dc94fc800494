"""The providers fail and the clients go on: what clients see, and what the providers get.

python outage.py flap KILLS    the first provider dies and lives again so often, under load
python outage.py dead SECONDS  both are down: a crowd, a trickle and a burst, one by one

The suite runs a few rounds of each, `make outage` a hundred. All of it goes over real sockets.
"""

import asyncio
import os
import random
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field

import aiohttp
import numpy as np
from aiohttp import web
from embedding_proxy.proxy.config.schema import Settings
from embedding_proxy.proxy.http.app import build_app
from embedding_proxy.proxy.http.app_runner import Runner
from embedding_proxy.proxy.service.embedding_service import EmbeddingService
from fault_server import FaultServer, status

CLIENTS = 50
WIDTH = 8
WINDOW = 10.0
DOWN = (0.02, 0.5)
UP = (0.02, 3.0)
"""Seconds; lives as long as the breaker's first openings, so that some are found well and die."""


@dataclass
class Seen:
    """What happened, in seconds of the event loop's clock."""

    asked: list[float] = field(default_factory=list)
    """When each request was sent."""
    ended: list[float] = field(default_factory=list)
    taken: list[float] = field(default_factory=list)
    """How long each took."""
    statuses: Counter[int] = field(default_factory=Counter)
    providers: Counter[str] = field(default_factory=Counter)
    bodies: list[str] = field(default_factory=list)
    """What was said instead of vectors."""

    def percentile(self, percent: int) -> float:
        """Return a percentile of the times taken, in milliseconds."""
        return 1000 * statistics.quantiles(self.taken, n=100, method="inclusive")[percent - 1]


class Counting(FaultServer):
    """A fault server that notes when it was called."""

    def __init__(self) -> None:
        super().__init__(widths={"m": WIDTH})
        self.times: list[float] = []

    async def _handle(self, request: web.Request) -> web.StreamResponse:
        self.times.append(asyncio.get_running_loop().time())
        return await super()._handle(request)


@dataclass
class House:
    """A proxy in front of two upstreams, and a client."""

    first: Counting
    second: Counting
    session: aiohttp.ClientSession
    url: str
    seen: Seen = field(default_factory=Seen)
    count: int = 0

    async def ask(self, text: str | None = None) -> int:
        """Send one request, for a new text if none is given, and note what comes of it."""
        self.count += 1
        loop = asyncio.get_running_loop()
        begun = loop.time()
        self.seen.asked.append(begun)
        body = {"model": "m", "input": text or f"text {self.count}"}
        async with self.session.post(f"{self.url}/embeddings", json=body) as reply:
            said = await reply.text()
            if reply.status != 200:
                self.seen.bodies.append(said)
            self.seen.ended.append(loop.time())
            self.seen.taken.append(loop.time() - begun)
            self.seen.statuses[reply.status] += 1
            self.seen.providers[reply.headers.get("x-embedding-provider", "none")] += 1
            return reply.status

    @property
    def answers_of_second(self) -> int:
        """How many requests the second provider has answered."""
        return self.seen.providers["openrouter"]

    async def hammer(self, until: asyncio.Event) -> None:
        """Be one client of a crowd: ask one request after another."""
        while not until.is_set():
            await self.ask()

    def excess(self) -> tuple[float, float]:
        """Compare calls and requests in every window of ten seconds, both upstreams together.

        A request is in a window when any part of its life is, as its calls may be in any part.
        Returns the most calls a request in a window of at least fifty requests, and the most calls
        beyond 1.2 a request in any window.
        """
        calls = np.array(sorted(self.first.times + self.second.times))
        begun = np.array(self.seen.asked)
        ended = np.array(sorted(self.seen.ended))
        ratio, beyond = 0.0, float("-inf")
        for start in calls:
            end = start + WINDOW
            made = int(((calls >= start) & (calls < end)).sum())
            asked = int((begun < end).sum() - (ended < start).sum())
            beyond = max(beyond, made - 1.2 * asked)
            if asked >= 50:
                ratio = max(ratio, made / asked)
        return ratio, beyond


@asynccontextmanager
async def house() -> AsyncIterator[House]:
    """Open two upstreams and a proxy over an empty cache."""
    async with AsyncExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        first = await stack.enter_async_context(Counting())
        second = await stack.enter_async_context(Counting())
        os.environ |= {"OPENAI_API_KEY": "first", "OPENROUTER_API_KEY": "second"}
        routes = [{"provider": name, "model": "m"} for name in ("openai", "openrouter")]
        settings = Settings.model_validate(
            {
                "cache": {"directory": folder},
                "providers": {
                    "openai": {"base_url": first.url},
                    "openrouter": {"base_url": second.url},
                },
                "models": {"m": {"space": "s", "dimensions": WIDTH, "routes": routes}},
            }
        )
        app = build_app(settings, EmbeddingService(settings))
        runner = Runner(app, shutdown_timeout=0.01)
        await runner.setup()
        stack.push_async_callback(runner.cleanup)
        await runner.listen()
        connector = aiohttp.TCPConnector(limit=0)
        session = await stack.enter_async_context(aiohttp.ClientSession(connector=connector))
        yield House(first, second, session, f"http://127.0.0.1:{runner.addresses[0][1]}/v1")


async def load(house: House, seconds: float, clients: int = CLIENTS) -> None:
    """Let a crowd ask for so long."""
    until = asyncio.Event()
    asyncio.get_running_loop().call_later(seconds, until.set)
    await asyncio.gather(*(house.hammer(until) for _ in range(clients)))


async def flap(kills: int, seed: int = 1) -> tuple[Seen, Seen]:
    """Kill and revive the first provider under load. Return what was seen before, and during."""
    chance = random.Random(seed)
    async with house() as calm:
        await load(calm, max(1.0, kills * 0.05))
    async with house() as stormy:
        over = asyncio.Event()
        crowd = asyncio.gather(*(stormy.hammer(over) for _ in range(CLIENTS)))
        for _ in range(kills):
            await asyncio.sleep(chance.uniform(*UP))
            await stormy.first.stop()
            served = stormy.answers_of_second
            await asyncio.sleep(chance.uniform(*DOWN))
            # However slow the machine is, the second provider is needed before the first is back.
            while stormy.answers_of_second == served and stormy.seen.statuses.keys() <= {200}:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
            await stormy.first.start()
        over.set()
        await crowd
    return calm.seen, stormy.seen


def fail(house: House) -> None:
    """Let both upstreams fail from now on."""
    house.first.always = house.second.always = status(500)


async def crowd(seconds: float) -> House:
    """Fifty clients, each asking again as soon as it is told no."""
    async with house() as dark:
        fail(dark)
        await load(dark, seconds)
        return dark


async def trickle(seconds: float) -> House:
    """Five requests a second."""
    async with house() as dark:
        fail(dark)
        for _ in range(int(seconds * 5)):
            await dark.ask()
            await asyncio.sleep(0.2)
        return dark


async def burst(size: int = CLIENTS) -> House:
    """Many requests at one moment after idleness, all the first of their proxy."""
    async with house() as dark:
        fail(dark)
        await asyncio.gather(*(dark.ask() for _ in range(size)))
        return dark


def tell(name: str, seen: Seen) -> None:
    """Print what clients saw."""
    print(
        f"{name}: {len(seen.taken)} requests, {dict(seen.statuses)}, {dict(seen.providers)},"
        f" p50 {seen.percentile(50):.1f} ms, p99 {seen.percentile(99):.1f} ms,"
        f" longest {1000 * max(seen.taken):.0f} ms"
    )


async def main(what: str, number: float) -> None:
    """Run one of the two, and print the figures."""
    begun = time.monotonic()
    if what == "flap":
        calm, stormy = await flap(int(number))
        tell("calm", calm)
        tell("kills", stormy)
        print(f"added p99 {stormy.percentile(99) - calm.percentile(99):.1f} ms")
        print(f"{sum(stormy.statuses.values()) - stormy.statuses[200]} failed", *stormy.bodies[:3])
    else:
        for name, make in (("crowd", crowd(number)), ("trickle", trickle(number))):
            dark = await make
            report(name, dark)
        report("burst", await burst())
    print(f"{time.monotonic() - begun:.0f} s")


def report(name: str, dark: House) -> None:
    """Print what an outage of everything cost."""
    tell(name, dark.seen)
    ratio, beyond = dark.excess()
    calls = len(dark.first.times), len(dark.second.times)
    print(f"  calls {calls}, at most {ratio:.2f} a request, {beyond:.1f} beyond 1.2 a request")


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], float(sys.argv[2])))
