"""Two processes that read and write one store as fast as they can: every count is exact in the end.

python mixed_load.py OPERATIONS SEED — the suite runs some thousand, a full run is 100,000.
First through two workers behind one port, requests of one and of many inputs, known and new ones,
some of them twice; then, without the proxy around it, through two processes that each have the
store open. Nobody may meet a lock, nothing known may be bought, and nothing be counted wrong.
"""

import asyncio
import base64
import contextlib
import json
import logging
import os
import random
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any

import aiohttp
from embedding_proxy.cache.disk.store import Store
from embedding_proxy.cache.key import FORMAT, Partition
from embedding_proxy.cache.ledger import LedgerKey, Usage
from fault_server import FaultServer, tokens_of, vector_of

ROOT = Path(__file__).parents[2]
MODEL, WIDTH = "m", 64
PROCESSES = 2
CLIENTS = 12
REQUESTS_A_CONNECTION = 20
"""Then a client connects anew, and may get the other worker."""
CONTESTED_EVERY = 100
"""So many requests of a client, all clients ask for the same new text at the same moment."""
SIZE_LIMIT = 1 << 40
PARTITION = Partition("", "a space", WIDTH)
HEADING = LedgerKey(PARTITION, MODEL)


HEADERS = {
    "hits": "x-cache-hits",
    "joins": "x-cache-joined",
    "misses": "x-cache-misses",
    "tokens_saved": "x-tokens-saved",
    "tokens_billed": "x-tokens-billed",
}


class Books:
    """What was asked, and what the replies said of it."""

    def __init__(self) -> None:
        self.known: list[str] = []
        """Texts that a reply held: from then on they are hits, at either worker."""
        self.contested: list[str] = []
        self.told: Counter[str] = Counter()
        self.wrong: Counter[str] = Counter()

    def enter(
        self,
        texts: list[str],
        new: int | None,
        reply: dict[str, Any],
        headers: Mapping[str, str],
    ) -> None:
        """Enter one reply; `new` of the texts were nobody's before, None = others ask for them."""
        distinct = len(set(texts))
        told = {name: int(headers[header]) for name, header in HEADERS.items()}
        self.told.update(told, inputs=len(texts), duplicates=len(texts) - distinct)
        if new is not None:
            outcomes = told["hits"], told["joins"], told["misses"]
            self.wrong["outcomes"] += outcomes != (distinct - new, 0, new)
        vectors = [base64.b64decode(item["embedding"]) for item in reply["data"]]
        self.wrong["vectors"] += vectors != [
            vector_of(MODEL, text, WIDTH).tobytes() for text in texts
        ]


@contextlib.asynccontextmanager
async def workers(folder: Path, upstream: FaultServer) -> AsyncIterator[tuple[int, str]]:
    """Run two workers, and have them end in good order; give the parent's id and the URL."""
    config = folder / "config.json"
    model = {"space": "s", "dimensions": WIDTH, "routes": [{"provider": "openai", "model": MODEL}]}
    settings = {
        # Room for about half of the reads of a long run: the others go to the disk.
        "cache": {"directory": str(folder / "cache"), "memory_mib": 2},
        "providers": {"openai": {"base_url": upstream.url}},
        "models": {MODEL: model},
    }
    config.write_text(json.dumps(settings))
    command = (
        sys.executable,
        "-m",
        "embedding_proxy",
        "serve",
        "--port",
        "0",
        "--config",
        str(config),
    )
    with (folder / "log").open("wb") as log:
        process = await asyncio.create_subprocess_exec(
            *(*command, "--workers", str(PROCESSES)),
            stdout=asyncio.subprocess.PIPE,
            stderr=log,
            env={**os.environ, "OPENAI_API_KEY": "k", "PYTHONPATH": str(ROOT)},
        )
    try:
        line = (await process.stdout.readline()).decode().strip()
        yield process.pid, line.removeprefix("export OPENAI_BASE_URL=")
    finally:
        process.send_signal(signal.SIGTERM)
        if await process.wait():
            raise RuntimeError(f"the proxy ended with {process.returncode}")


def cpu_seconds(parent: int) -> list[float]:
    """Return the processor time that each worker has used."""
    children = Path(f"/proc/{parent}/task/{parent}/children").read_text().split()
    stats = [Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split() for pid in children]
    return [(int(some[11]) + int(some[12])) / os.sysconf("SC_CLK_TCK") for some in stats]


async def client(name: str, count: int, url: str, books: Books, together: asyncio.Barrier) -> None:
    """Make `count` requests; the new texts are this client's own, the known ones anybody's."""
    chance = random.Random(name)
    http = aiohttp.ClientSession()

    async def ask(texts: list[str]) -> tuple[dict[str, object], object]:
        body = {"model": MODEL, "input": texts, "encoding_format": "base64"}
        async with http.post(f"{url}/embeddings", json=body) as response:
            reply = await response.json()
            if response.status != 200:
                raise RuntimeError(f"{response.status}: {reply}")
            return reply, response.headers

    for i in range(count):
        if i % REQUESTS_A_CONNECTION == 0:
            await http.close()
            http = aiohttp.ClientSession()
        if i % CONTESTED_EVERY == 0:
            await together.wait()
            text = f"text {i:07} everyone's"
            books.enter([text], None, *await ask([text]))
            books.contested.append(text)
            continue
        kind = chance.choice(("read", "read", "read", "write", "mix"))
        size = chance.choice((1, 1, 1, 4, 20))
        new = [] if kind == "read" else [f"text {i:07} {name}.{n:02}" for n in range(size)]
        reads = kind != "write" and books.known
        texts = new + (chance.choices(books.known, k=size) if reads else [])
        if chance.random() < 0.2:
            texts += texts[:1]
        chance.shuffle(texts)
        if texts:
            books.enter(texts, len(new), *await ask(texts))
            books.known += new
    await http.close()


def sums(directory: Path) -> dict[str, int]:
    """Return what the file says: its sums, and its entries counted in three ways."""
    path = directory / f"v{FORMAT}" / "cache.db"
    # Nobody who looks may meet a lock either: there is no waiting here.
    with contextlib.closing(sqlite3.connect(path, timeout=0)) as connection:
        columns = ", ".join(f"coalesce(sum({name}), 0)" for name in Usage._fields)
        connection.execute("BEGIN")
        (found,) = connection.execute(f"SELECT {columns} FROM Usage").fetchall()
        ((rows,),) = connection.execute("SELECT count(*) FROM Cache").fetchall()
        ((entries,),) = connection.execute("SELECT count(*) FROM Entries").fetchall()
        ((counted,),) = connection.execute("SELECT value FROM Settings WHERE key = 'count'")
    if not rows == entries == counted:
        raise RuntimeError(f"{rows} rows, {entries} entries, {counted} counted")
    return {**dict(zip(Usage._fields, found, strict=True)), "entries": rows}


async def look_on(directory: Path) -> None:
    """Look at the file again and again, as another process would; see that counts agree."""
    while True:
        await asyncio.to_thread(sums, directory)
        await asyncio.sleep(0.1)


async def through_workers(folder: Path, operations: int, seed: int) -> dict[str, Any]:
    """Load two workers; return what does not agree, and some figures."""
    books = Books()
    start = time.monotonic()
    async with FaultServer(widths={MODEL: WIDTH}) as upstream:
        async with workers(folder, upstream) as (parent, url):
            looking = asyncio.create_task(look_on(folder / "cache"))
            together = asyncio.Barrier(CLIENTS)
            async with asyncio.TaskGroup() as group:
                for number in range(CLIENTS):
                    name = f"{seed}.{number:02}"
                    each = operations // CLIENTS
                    group.create_task(client(name, each, url, books, together))
            shares = cpu_seconds(parent)
            looking.cancel()
            await asyncio.wait([looking])
            if not looking.cancelled():
                looking.result()
        bought = Counter(upstream.inputs)
    found = sums(folder / "cache")
    contested = set(books.contested)
    told = {name: books.told[name] for name in (*HEADERS, "duplicates")}
    told["entries"] = len(books.known) + len(contested)
    billed = sum(tokens_of(text) * count for text, count in bought.items())
    lines = (folder / "log").read_text().splitlines()
    checks: dict[str, object] = {
        **{name: (found[name], value) for name, value in told.items() if found[name] != value},
        **books.wrong,
        "inputs": Usage(**{name: found[name] for name in Usage._fields}).inputs
        - books.told["inputs"],
        "misses that the upstream did not see": found["misses"] - bought.total(),
        "tokens that it did not bill": found["tokens_billed"] - billed,
        "bought twice": sum(bought[text] != 1 for text in books.known),
        "bought by more than there are": sum(bought[text] > PROCESSES for text in contested),
        "log": [line for line in lines if " INFO " not in line or "locked" in line],
        "a worker was idle": min(shares) < 0.1 * max(shares),
    }
    figures = {
        "requests": operations // CLIENTS * CLIENTS,
        **found,
        "inputs": books.told["inputs"],
        "contested": len(contested),
        "bought by both": sum(bought[text] == PROCESSES for text in contested),
        "worker cpu s": shares,
        "seconds": round(time.monotonic() - start),
    }
    return {"wrong": {name: value for name, value in checks.items() if value}, **figures}


def address(process: int, number: int) -> bytes:
    """Return the address of one of a process's own records."""
    return bytes([process]) * 8 + number.to_bytes(8, "big")


async def use_store(directory: Path, process: int, operations: int, seed: int) -> None:
    """Read and write a store, alone and in groups, and print how much of it went well."""
    chance = random.Random(f"{seed} {process}")
    written = 0
    good: Counter[str] = Counter()
    async with Store(directory, SIZE_LIMIT) as store:
        for _ in range(operations):
            if chance.random() < 0.5 or not written:
                size = chance.choice((1, 1, 1, 20))
                mine = {address(process, written + i): b"r" * 300 for i in range(size)}
                store.count(HEADING, Usage(misses=size, tokens_billed=size))
                good["writes"] += await store.put_many(mine, PARTITION)
                written += size
            else:
                # The latest of one's own, and of the other's whatever is there.
                asked = [address(process, written - 1 - chance.randrange(min(written, 50)))]
                asked.append(address(PROCESSES - 1 - process, chance.randrange(written)))
                found = await store.lookup(asked)
                store.count(HEADING, Usage(hits=len(found)))
                store.touch(found, PARTITION)
                good["hits"] += len(found)
                good["reads"] += asked[0] in found
    sys.stdout.write(json.dumps({**good, "records": written}) + "\n")


def through_stores(folder: Path, operations: int, seed: int) -> dict[str, Any]:
    """Have two processes use one store; return what does not agree, and some figures."""
    start = time.monotonic()
    directory = folder / "store"
    each = operations // PROCESSES
    command = [sys.executable, __file__, "store", str(directory)]
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"}
    processes = [
        subprocess.Popen(
            [*command, str(number), str(each), str(seed)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for number in range(PROCESSES)
    ]
    told = [process.communicate() for process in processes]
    good = Counter()
    for out, _ in told:
        good.update(json.loads(out or "{}"))
    found = sums(directory)
    checks = {
        "said": "".join(errors for _, errors in told),
        "failed": PROCESSES * each - good["writes"] - good["reads"],
        "misses": found["misses"] - good["records"],
        "hits": found["hits"] - good["hits"],
        "entries": found["entries"] - good["records"],
    }
    figures = {**good, "seconds": round(time.monotonic() - start)}
    return {"wrong": {name: value for name, value in checks.items() if value}, **figures}


def main() -> int:
    """Run both, say what came of it, and return the exit code."""
    if sys.argv[1] == "store":
        logging.basicConfig(level=logging.WARNING)
        asyncio.run(use_store(Path(sys.argv[2]), *map(int, sys.argv[3:])))
        return 0
    operations, seed = map(int, sys.argv[1:])
    with tempfile.TemporaryDirectory() as name:
        for came in (
            asyncio.run(through_workers(Path(name), operations, seed)),
            through_stores(Path(name), operations, seed),
        ):
            sys.stdout.write(json.dumps(came) + "\n")
            if came["wrong"]:
                return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
