"""Mixed requests of every form against an oracle: no vector is wrong, misplaced or bought twice.

python oracle.py REQUESTS SEED — the suite runs some hundred, `make oracle` 100,000.
Many clients at once ask one proxy, in a process of its own, for texts and token arrays, in both
encodings, at many widths, with duplicates, with and without a parameter, from two namespaces, and
often again in the very same bytes, which the proxy may answer without parsing anything. The
upstreams answer each input with a vector of its own, out of order, and fail now and then. Every
reply is compared with what it must be, worked out here without the proxy's code; the purchases are
compared with the set of all that was asked for.
"""

import asyncio
import base64
import json
import os
import random
import signal
import sys
import tempfile
from collections import Counter, deque
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np
import orjson
from aiohttp import web
from fault_server import Call, FaultServer, status, vector_of
from splintr import Tokenizer

ROOT = Path(__file__).parents[2]
CLIENTS = 24
NARROWEST, WIDTH = 2, 48
TEXTS = 3000
KEYS = {"one-key": "", "other-key": "other"}
SCRIPTS = ((32, 126), (0xC0, 0x17F), (0x391, 0x3C9), (0x410, 0x44F), (0x5D0, 0x5EA), (0x621, 0x64A),
           (0x905, 0x939), (0xE01, 0xE30), (0x3041, 0x3096), (0x4E00, 0x9FFF), (0xAC00, 0xD7A3),
           (0x1F600, 0x1F64F))  # fmt: skip
"""First and last characters of some scripts."""

AGAIN = 0.7
"""The share of requests that are one of the last ones again."""
COUNTING = """
from embedding_proxy.proxy.cli.main import main
from embedding_proxy.proxy.http.response_cache import ResponseCache

count, get = 0, ResponseCache.get

def counted(cache, key, body):
    global count
    kept = cache.lru.get(key.whole)
    kept = cache.lru.get(kept) if isinstance(kept, bytes) else kept
    response = get(cache, key, body)
    count += response is not None and response is kept
    return response

ResponseCache.get = counted
try:
    main()
finally:
    print(count)
"""
"""Runs the proxy, and tells in the end how many replies were given again as they were."""

encode = Tokenizer.from_pretrained("cl100k_base").encode_ordinary


def make_inputs(chance: random.Random) -> list[tuple[object, object]]:
    """Return what clients send, and what it stands for: equal ones are one input to the proxy."""
    made: list[tuple[object, object]] = []
    for number in range(TEXTS):
        first, last = chance.choice(SCRIPTS)
        letters = "".join(chr(chance.randint(first, last)) for _ in range(chance.randint(1, 30)))
        text = f"{letters} {number}" if chance.random() < 0.8 else letters.strip() or "?"
        made.append((text, text))
        if chance.random() < 0.2:
            made += [(f" {text}", f" {text}"), (text.upper(), text.upper())]
        ids = encode(text)
        if chance.random() < 0.3:
            made.append((ids, text))
        if chance.random() < 0.1:
            # Ids that stand for no text are kept as ids, and are not the text of their digits.
            made.append((ids := [*ids, 100_257], tuple(ids)))
            made.append((json.dumps(ids), json.dumps(ids)))
    return made


@dataclass
class Seen:
    """What came back, and what was bought."""

    replies: Counter[int] = field(default_factory=Counter)
    inputs: int = 0
    repeated: int = 0
    """How many replies were given before, to the same bytes."""
    wrong: list[str] = field(default_factory=list)
    asked: set[tuple[str, str, object]] = field(default_factory=set)
    """(namespace, parameter, input) of all that was answered."""
    bought: Counter[tuple[str, object]] = field(default_factory=Counter)
    """(parameter, input) of all that an upstream has answered."""


@cache
def right(item: object, task: str) -> np.ndarray:
    """Return the native vector of an input."""
    sent = list(item) if isinstance(item, tuple) else item
    return vector_of("m", sent, WIDTH, {"task": task} if task else {})


def expected(item: object, task: str, dimensions: int | None) -> np.ndarray:
    """Return what a client must get: cut in float64, renormalised, rounded once."""
    native = right(item, task)
    if dimensions in (None, WIDTH):
        return native
    head = native[:dimensions].astype(np.float64)
    return (head / np.sqrt((head * head).sum())).astype("<f4")


def compare(asked: dict[str, Any], meant: list[object], body: bytes) -> str | None:
    """Return what is wrong with a reply, None if nothing is."""
    reply = orjson.loads(body)
    rows = reply["data"]
    if [row["index"] for row in rows] != list(range(len(meant))):
        return "indices"
    task = asked.get("task", "")
    for row, item in zip(rows, meant, strict=True):
        want = expected(item, task, asked.get("dimensions"))
        got = row["embedding"]
        if asked.get("encoding_format") == "base64":
            vector = np.frombuffer(base64.b64decode(got), "<f4")
        else:
            vector = np.array(got, dtype="<f4")
        if vector.shape != want.shape:
            return f"width {vector.shape} instead of {want.shape}"
        if asked.get("dimensions") in (None, WIDTH):
            if vector.tobytes() != want.tobytes():
                return f"vector of {item!r}"
        elif np.abs(vector - want).max() > 1e-7:
            return f"cut vector of {item!r}"
    return None


class Upstream(FaultServer):
    """Answers out of order, fails at times, and notes what it has answered."""

    def __init__(self, seen: Seen, chance: random.Random) -> None:
        super().__init__(widths={"m": WIDTH})
        self._seen, self._chance = seen, chance
        self.always = self._act

    async def _act(self, request: web.Request, payload: dict[str, Any]) -> web.StreamResponse:
        self.calls.clear()
        if self._chance.random() < 0.03:
            return await status(self._chance.choice((500, 503, 429)))(request, payload)
        for item in Call("", {}, payload).inputs:
            meant = tuple(item) if isinstance(item, list) else item
            self._seen.bought[payload.get("task", ""), meant] += 1
        shuffled = self.altered(lambda reply: self._chance.shuffle(reply["data"]))
        return await shuffled(request, payload)


def make_request(
    chance: random.Random, inputs: list[tuple[object, object]]
) -> tuple[dict[str, Any], list[object]]:
    """Return a request, and the inputs that its parts stand for."""
    count = 1 if chance.random() < 0.4 else chance.randint(2, 12)
    # Some are asked for often and some rarely, so that hits and misses go on to come.
    picked = [inputs[int(len(inputs) * chance.random() ** 3)] for _ in range(count)]
    kind = type(picked[0][0])
    picked = [one for one in picked if type(one[0]) is kind]
    if chance.random() < 0.2:
        picked.append(chance.choice(picked))
    sent = [one[0] for one in picked]
    asked: dict[str, Any] = {"model": "m", "input": sent}
    if len(sent) == 1 and chance.random() < 0.5:
        asked["input"] = sent[0]
    if chance.random() < 0.5:
        asked["encoding_format"] = chance.choice(("base64", "float"))
    if chance.random() < 0.6:
        asked["dimensions"] = chance.randint(NARROWEST, WIDTH)
    if chance.random() < 0.2:
        asked["task"] = chance.choice(("query", "document"))
    if chance.random() < 0.2:
        asked["user"] = f"user {chance.randint(1, 9)}"
    return dict(chance.sample(list(asked.items()), len(asked))), [one[1] for one in picked]


@asynccontextmanager
async def proxy(folder: Path, upstreams: list[Upstream], seen: Seen):
    """Run a proxy in front of both upstreams; give its URL."""
    names = ("openai", "openrouter")
    config = {
        "server": {
            "port": 0,
            "keys": [{"key": key, "namespace": name} for key, name in KEYS.items()],
        },
        "cache": {"directory": str(folder / "cache"), "memory_mib": 0.3},
        "providers": {n: {"base_url": u.url} for n, u in zip(names, upstreams, strict=True)},
        "models": {
            "m": {
                "space": "s",
                "dimensions": WIDTH,
                "matryoshka": True,
                "tokenizer": "cl100k_base",
                "unit_norm": True,
                "routing_strategy": "fastest",
                "routes": [{"provider": name, "model": "m"} for name in names],
            }
        },
    }
    (folder / "config.json").write_text(json.dumps(config))
    keys = {f"{name.upper()}_API_KEY": "k" for name in names}
    with (folder / "log").open("wb") as log:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-c", COUNTING, "serve", "--config", str(folder / "config.json")),
            stdout=asyncio.subprocess.PIPE,
            stderr=log,
            env={**os.environ, **keys, "PYTHONPATH": str(ROOT)},
        )
    try:
        line = (await process.stdout.readline()).decode().strip()
        yield line.removeprefix("export OPENAI_BASE_URL=")
    finally:
        process.send_signal(signal.SIGTERM)
        seen.repeated = int(await process.stdout.read() or 0)
        if await process.wait():
            raise RuntimeError(f"the proxy ended with {process.returncode}")


async def run(requests: int, seed: int) -> Seen:
    """Make so many requests; return what was seen."""
    chance = random.Random(seed)
    seen, inputs = Seen(), make_inputs(chance)
    chance.shuffle(inputs)
    left = iter(range(requests))
    async with AsyncExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        upstreams = [await stack.enter_async_context(Upstream(seen, chance)) for _ in range(2)]
        url = await stack.enter_async_context(proxy(folder, upstreams, seen))
        session = await stack.enter_async_context(aiohttp.ClientSession())

        last: deque[tuple[dict[str, Any], list[object], str]] = deque(maxlen=CLIENTS)

        async def client() -> None:
            for _ in left:
                if not last or chance.random() > AGAIN:
                    last.append((*make_request(chance, inputs), chance.choice(list(KEYS))))
                asked, meant, key = chance.choice(last)
                headers = {"Authorization": f"Bearer {key}"}
                while True:
                    async with session.post(
                        f"{url}/embeddings", json=asked, headers=headers
                    ) as reply:
                        body = await reply.read()
                        seen.replies[reply.status] += 1
                    if reply.status == 200:
                        break
                    if reply.status not in (429, 502, 503):
                        seen.wrong.append(f"status {reply.status}: {body[:300]!r}")
                        break
                    await asyncio.sleep(0.05)  # as clients do; the upstreams fail by chance
                seen.inputs += len(meant)
                if problem := reply.status == 200 and compare(asked, meant, body):
                    seen.wrong.append(f"{problem}: {str(asked)[:300]}")
                seen.asked |= {(KEYS[key], asked.get("task", ""), item) for item in meant}

        await asyncio.gather(*(client() for _ in range(CLIENTS)))
    return seen


def check(seen: Seen) -> None:
    """Raise AssertionError unless all was right, and bought exactly once."""
    assert not seen.wrong, f"{len(seen.wrong)} wrong, the first: {seen.wrong[:3]}"
    should = Counter((task, item) for _, task, item in seen.asked)
    assert seen.bought == should, (
        f"bought otherwise: {(seen.bought - should) or (should - seen.bought)}"
    )


if __name__ == "__main__":
    result = asyncio.run(run(int(sys.argv[1]), int(sys.argv[2])))
    check(result)
    print(
        f"{sum(result.replies.values()):,} requests ({dict(result.replies)}),"
        f" {result.repeated:,} of them answered as before, {result.inputs:,} inputs,"
        f" {sum(result.bought.values()):,} bought, each of {len(result.asked):,} once, 0 wrong"
    )
