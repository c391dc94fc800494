"""The shared tier under faults: what clients see, and whether a reply is ever another's.

python shared_trial.py cancel COUNT SEED   so many exchanges cancelled or late, by a delaying relay
python shared_trial.py faults SECONDS      Redis stopped, killed, full, emptied, started anew, slow,
                                           so many seconds each, under load: the p99 of requests,
                                           and of what a miss waits for the tier

The suite runs a few of each, `make shared` all of it. Needs redis-server.
"""

import asyncio
import os
import random
import signal
import statistics
import sys
import tempfile
import time
from collections import Counter
from contextlib import AsyncExitStack

import aiohttp
import numpy as np
from embedding_proxy.cache.shared.address import RedisOptions, parse
from embedding_proxy.cache.shared.client import UNAVAILABLE, Command, RedisClient
from embedding_proxy.proxy.config.schema import Settings
from embedding_proxy.proxy.http.app import build_app
from embedding_proxy.proxy.http.app_runner import Runner
from embedding_proxy.proxy.service.embedding_service import EmbeddingService
from fault_server import FaultServer, vector_of
from redis_server import RedisServer, redis_server, until
from relay import Relay

MODEL = {"space": "s/m", "dimensions": 8, "routes": [{"provider": "openai", "model": "m"}]}
CLIENTS = 20
"""That cancel."""
LOAD_CLIENTS = 4
"""That ask the proxy under faults: few, so that what is measured is not their own queue."""
KEYS = 400
MAX_DELAY_S = 0.004


async def cancel(count: int, seed: int) -> Counter[str]:
    """Cancel exchanges at random moments, and check every reply that is had.

    Returns counts: `cancelled`, `late` (given up for the time limit), `right`, `crossed`.
    """
    chance = random.Random(seed)
    seen: Counter[str] = Counter()
    with redis_server() as server:
        async with Relay(server.port, lambda: chance.random() * MAX_DELAY_S) as relay:
            address = parse(f"redis://127.0.0.1:{relay.port}")
            options = RedisOptions(address, limit_s=3 * MAX_DELAY_S, max_connections=4)
            async with RedisClient(options) as redis:
                # The first answer may have been late, too.
                await until(lambda: redis.is_available)
                for node in redis.nodes.values():
                    node._fail = lambda *_, **__: None  # it is never left alone
                keys = [b"%d:" % n for n in range(KEYS)]
                while UNAVAILABLE in await redis.exchange(
                    [Command(key, (b"SET", key, key * 9)) for key in keys], 10.0
                ):
                    pass
                await asyncio.gather(
                    *(_canceller(redis, keys, chance, seen, count) for _ in range(CLIENTS))
                )
    return seen


async def _canceller(
    redis: RedisClient,
    keys: list[bytes],
    chance: random.Random,
    seen: Counter[str],
    count: int,
) -> None:
    while seen["cancelled"] < count:
        some = chance.sample(keys, chance.choice((1, 1, 2, 40, 300)))
        task = asyncio.create_task(redis.get_many(some))
        if chance.random() < 0.7:
            for _ in range(chance.randrange(4)):
                await asyncio.sleep(0)
            await asyncio.wait([task], timeout=chance.random() * 4 * MAX_DELAY_S)
            if task.cancel():
                await asyncio.wait([task])
        try:
            values = await task
        except asyncio.CancelledError:
            seen["cancelled"] += 1
            continue
        # A reply to another exchange may have another length, too.
        seen["crossed"] += len(values) != len(some)
        for key, value in zip(some, values, strict=False):
            seen[
                "late" if value is UNAVAILABLE else "right" if value == key * 9 else "crossed"
            ] += 1


class Load:
    """Clients that ask a proxy without a pause, half of the time for texts that nobody knows."""

    def __init__(self, url: str, session: aiohttp.ClientSession) -> None:
        self._url, self._session = url, session
        self._number = 0
        self.seconds: list[float] = []
        self.failures: list[str] = []

    async def run(self, until: float) -> None:
        """Ask until a moment of the event loop's clock."""
        self.seconds = []
        await asyncio.gather(*(self._client(until) for _ in range(LOAD_CLIENTS)))

    async def _client(self, until: float) -> None:
        while time.monotonic() < until:
            self._number += 1
            text = f"new {self._number}" if self._number % 2 else f"known {self._number % 100}"
            began = time.perf_counter()
            try:
                async with self._session.post(
                    f"{self._url}/v1/embeddings", json={"model": "m", "input": text}
                ) as reply:
                    body = await reply.json()
                    vector = np.array(body["data"][0]["embedding"], "<f4")
                    if not np.array_equal(vector, vector_of("m", text, 8)):
                        self.failures.append(f"wrong vector of {text}")
            except (aiohttp.ClientError, KeyError) as error:
                self.failures.append(repr(error))
            self.seconds.append(time.perf_counter() - began)


def percentile(seconds: list[float], percent: int) -> float:
    """Return a percentile of some times, in milliseconds."""
    if len(seconds) < 2:
        return 0.0
    return round(1000 * statistics.quantiles(seconds, n=100, method="inclusive")[percent - 1], 1)


async def faults(seconds: float) -> dict[str, object]:
    """Let Redis fail in every way under load; return what came of it."""
    with redis_server() as server, tempfile.TemporaryDirectory() as folder:
        async with AsyncExitStack() as stack:
            upstream = await stack.enter_async_context(FaultServer())
            upstream.widths = {"m": 8}
            delays = [0.0]
            relay = await stack.enter_async_context(Relay(server.port, lambda: delays[0]))
            os.environ["OPENAI_API_KEY"] = "k"
            settings = Settings.model_validate(
                {
                    "server": {"drift_check_hours": None},
                    "passthrough": None,
                    "providers": {"openai": {"base_url": upstream.url}},
                    "models": {"m": MODEL},
                    "cache": {"directory": folder, "shared": f"redis://127.0.0.1:{relay.port}"},
                }
            )
            service = EmbeddingService(settings)
            runner = Runner(build_app(settings, service), shutdown_timeout=1)
            await runner.setup()
            stack.push_async_callback(runner.cleanup)
            await runner.listen()
            session = await stack.enter_async_context(aiohttp.ClientSession())
            load = Load(f"http://127.0.0.1:{runner.addresses[0][1]}", session)
            storage = service.storage
            assert storage is not None
            assert storage.shared is not None
            shared = storage.shared
            told: dict[str, object] = {}
            told["p99_ms"] = phases = {}
            waits: list[float] = []
            lookup = shared.lookup

            async def timed(*arguments, **keywords):
                began = time.perf_counter()
                try:
                    return await lookup(*arguments, **keywords)
                finally:
                    waits.append(time.perf_counter() - began)

            shared.lookup = timed

            async def phase(name: str) -> None:
                waits.clear()
                await load.run(time.monotonic() + seconds)
                phases[name] = {
                    "request": percentile(load.seconds, 99),
                    "in the tier": percentile(waits, 99),
                }

            async def recovered() -> None:
                await until(lambda: shared.is_available)
                await shared.flush()

            await phase("warm-up")
            await phase("healthy")
            for name, fault, mend in _faults(server, delays):
                fault()
                await phase(name)
                mend()
                await recovered()
            await phase("healthy again")
            told["failures"] = load.failures
            told["requests"] = load._number
            told["tier"] = shared.snapshot()
            return told


def _faults(server: RedisServer, delays: list[float]):
    def limit(size: str) -> None:
        server.call("CONFIG", "SET", "maxmemory", size)

    def kill() -> None:
        # The next one has to listen on the same port.
        server.kill()

    def restart() -> None:
        server.kill()
        server.start()

    def slow(seconds: float) -> None:
        delays[0] = seconds

    nothing = lambda: None  # noqa: E731
    return (
        ("stopped", lambda: server.signal(signal.SIGSTOP), lambda: server.signal(signal.SIGCONT)),
        ("killed", kill, server.start),
        ("full", lambda: limit("1"), lambda: limit("0")),
        ("emptied", lambda: server.call("FLUSHALL"), nothing),
        ("restarted", restart, nothing),
        ("slow", lambda: slow(0.1), lambda: slow(0.0)),
    )


def main() -> None:
    """Run what the command line names."""
    if sys.argv[1] == "cancel":
        seed = int(sys.argv[3]) if len(sys.argv) > 3 else random.randrange(1 << 32)
        print("seed", seed)
        seen = asyncio.run(cancel(int(sys.argv[2]), seed))
        print(dict(seen))
        sys.exit(seen["crossed"] > 0)
    told = asyncio.run(faults(float(sys.argv[2])))
    for name, value in told.items():
        print(name, value)
    sys.exit(bool(told["failures"]))


if __name__ == "__main__":
    main()
