"""What is asked and what is kept: inputs, requests, and stores of known vectors.

The entries are those of real inputs, in the space of a configured model; so the proxy serves them
as hits, without any provider. A vector is one of a few thousand: what they are does not matter to
whoever keeps and sends them.
"""

import base64
import http.client
import itertools
import os
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
import orjson
from embedding_proxy.cache import record
from embedding_proxy.cache.disk.store import Store
from embedding_proxy.cache.key import Keyring
from embedding_proxy.cache.record import Entry
from embedding_proxy.providers.base import Space
from embedding_proxy.providers.model_catalog import CATALOGUE

from .process import CLIENT_KEY, SIZE_LIMIT_GIB, Server

MODEL = "text-embedding-3-small"
RNG = np.random.default_rng(1)
CHARACTERS = 600
"""Of an input: a paragraph."""
FILLER = (
    "The committee met on Tuesday and heard what had been found: of the forty samples, all but "
    'two could be read, and the two were "not worth a second look".\nNothing was decided about '
    "them. Whoever wants the figures will find them in the annex, by date and by place, with the "
    "names of those who took them; the prices are those of the year before last.\n"
) * 2
TOKENS = 3
VECTORS = 4093
A_WRITE = 5_000


def say(line: str) -> None:
    """Tell how far it is, where it does not get into the results."""
    print(f"bench: {line}", file=sys.stderr, flush=True)


def text(number: int) -> str:
    """Return an input."""
    return f"{number}: {FILLER}"[:CHARACTERS]


class Ring(Keyring):
    """The keys of the inputs, and the vectors known for them."""

    def __init__(self) -> None:
        model = CATALOGUE[MODEL]
        super().__init__(Space(model.space, model.dimensions, model.matryoshka, model.tokenizer))

    @cached_property
    def _vectors(self) -> list[bytes]:
        vectors = RNG.standard_normal((VECTORS, self.space.dimensions), dtype=np.float32)
        vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
        return [vector.tobytes() for vector in vectors]

    def vector(self, number: int) -> bytes:
        """Return the vector of an input."""
        return self._vectors[number % VECTORS]

    def records(self, numbers: Sequence[int]) -> dict[bytes, bytes]:
        """Return a record for each of these inputs, by address."""
        return dict(map(self._record, numbers))

    def _record(self, number: int) -> tuple[bytes, bytes]:
        key = self.key(text(number))
        entry = Entry(self.vector(number), TOKENS, counted=True, digest=key.digest)
        return key.address, record.encode(entry)


RING = Ring()
VECTOR_BYTES = 4 * RING.space.dimensions


def http_request(body: bytes) -> bytes:
    """Return a whole HTTP request."""
    head = (
        "POST /v1/embeddings HTTP/1.1",
        "Host: 127.0.0.1:8080",
        "User-Agent: bench",
        "Accept: application/json",
        "Accept-Encoding: gzip, deflate",
        f"Authorization: Bearer {CLIENT_KEY}",
        "Content-Type: application/json",
        f"Content-Length: {len(body)}",
    )
    return "\r\n".join(head).encode() + b"\r\n\r\n" + body


def asking(numbers: int | Sequence[int], encoding: str = "base64", **fields: object) -> bytes:
    """Return a request for one input, or for a list of them."""
    given = text(numbers) if isinstance(numbers, int) else list(map(text, numbers))
    return http_request(body_of(given, encoding, **fields))


def body_of(given: object, encoding: str = "base64", **fields: object) -> bytes:
    """Return the body of a request."""
    body = {"input": given, "model": MODEL, "encoding_format": encoding, **fields}
    return orjson.dumps(body)


def prove(server: Server, numbers: Sequence[int], encoding: str = "base64") -> int:
    """Return the length of a reply. Raises RuntimeError unless it holds the known vectors."""
    client = http.client.HTTPConnection("127.0.0.1", server.port)
    headers = {"Authorization": f"Bearer {CLIENT_KEY}", "Content-Type": "application/json"}
    client.request("POST", "/v1/embeddings", body_of(list(map(text, numbers)), encoding), headers)
    reply = client.getresponse()
    body = reply.read()
    client.close()
    if reply.status != http.HTTPStatus.OK or reply.headers["x-cache"] != "hit":
        raise RuntimeError(f"no hit: {reply.status} {body[:500]!r}")
    found = [item["embedding"] for item in orjson.loads(body)["data"]]
    if encoding == "base64":
        vectors = [base64.b64decode(vector) for vector in found]
    else:
        vectors = [np.asarray(vector, np.float32).tobytes() for vector in found]
    if vectors != [RING.vector(number) for number in numbers]:
        raise RuntimeError("the reply holds other vectors than were kept")
    return len(body)


@dataclass(frozen=True)
class Made:
    """A store that was made for the bench."""

    directory: Path
    entries: int
    fresh: Iterator[int] = field(repr=False)
    """Numbers of inputs that it does not hold."""

    @property
    def name(self) -> str:
        """What it is called in the results."""
        return f"{self.entries:,} entries"

    def some(self, count: int) -> list[int]:
        """Return different inputs that it holds, at random."""
        return list(RNG.choice(self.entries, count, replace=False).tolist())

    def open(self) -> Store:
        """Return the store, to be opened."""
        return Store(self.directory, SIZE_LIMIT_GIB << 30)


async def make(directory: Path, entries: int) -> Made:
    """Write a store; it is closed, and on the disk, when this returns."""
    made, start = Made(directory, entries, itertools.count(entries)), time.perf_counter()
    steps = range(0, entries, A_WRITE)
    async with made.open() as opened:
        for step, first in enumerate(steps, 1):
            records = RING.records(range(first, min(first + A_WRITE, entries)))
            if not await opened.put_many(records, RING.partition):
                raise RuntimeError("the store took no more")
            if step * 10 // len(steps) > (step - 1) * 10 // len(steps):
                taken = time.perf_counter() - start
                say(f"{first + len(records):,} of {made.name} written after {taken:.0f} s")
    os.sync()
    return made
