"""Reads collections of Qdrant: in pages, by ids, by similarity, or as pairs of text and vector.

What passes by itself (an outage, a limit) is waited out, up to some two minutes; everything raises
QdrantFailure. A point's one vector that is asked for is bytes here, as everywhere in the program;
its other vectors, named or sparse, come as they are.

A collection to import from is named in one of three ways, its own name always last::

    qdrant://localhost:6333/documents                  a server; the port is 6333 unless given
    qdrant+https://x.cloud.qdrant.io:6333/documents    the same over TLS
    qdrant+path:/var/data/qdrant/documents             a folder of the client's embedded mode

Between host and collection may stand the path under which a gateway serves Qdrant. The key of a
server is read from the environment, QDRANT_API_KEY, and stands in no location.

A server scales the vectors of a cosine collection to length 1 when it stores them, in float32. They
come back with other last bits if the model's vectors have length 1, and as other vectors if not.
A folder keeps them as they were given.
"""

import asyncio
import hashlib
import json
import logging
import math
import os
from collections.abc import (
    AsyncIterator,
    Awaitable,
    Callable,
    Iterable,
    Iterator,
    Mapping,
    Sequence,
)
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias, TypeVar
from urllib.parse import unquote, urlsplit

from embedding_proxy.cache.maintenance.import_source import (
    Pair,
    RejectedPair,
    SourceError,
    listed,
    to_pair,
)
from embedding_proxy.providers import vector
from embedding_proxy.providers.backoff import Backoff
from embedding_proxy.providers.base import Vector

from .client import Connection
from .errors import Denied, InUse, QdrantFailure, Unavailable

if TYPE_CHECKING:
    from qdrant_client import AsyncQdrantClient
    from qdrant_client.models import Record, ScoredPoint

T = TypeVar("T")

log = logging.getLogger("embedding_proxy.qdrant")

MAX_TRIES = 8
"""Of one call to Qdrant, in a row; with the waits between them some two minutes."""
MIN_WAIT_S, MAX_WAIT_S = 0.5, 30.0

API_KEY = "QDRANT_API_KEY"
SCHEMES = ("qdrant://", "qdrant+https://", "qdrant+path:")
"""How a location begins that is a collection."""
PAGE = 256

PointId: TypeAlias = int | str
"""A point's id as Qdrant gives it: a number, or a UUID as text."""


@dataclass(frozen=True, slots=True)
class Point:
    """A point, with as much of it as was asked for."""

    id: PointId
    payload: Mapping[str, Any]
    vector: Vector | None = None
    """The one of the reader's name; None if there is none, or it was not asked for."""
    others: Mapping[str, Any] | None = None
    """Further vectors by their names."""

    def digest(self) -> bytes:
        """Return a digest of the payload; two with the same content have the same."""
        told = json.dumps(self.payload, sort_keys=True, default=str)
        return hashlib.blake2b(told.encode(), digest_size=16).digest()

    def with_vector(self, new: Vector) -> "Point":
        """Return the same point with another vector."""
        return replace(self, vector=new)


class Page(NamedTuple):
    """Some points, and where the next ones begin; None after the last ones."""

    points: Sequence[Point]
    after: PointId | None


class CollectionReader:
    """Reads the points of collections; of each the vector of this name."""

    def __init__(
        self,
        qdrant: Connection,
        name: str = "",
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self.qdrant = qdrant
        self.vector_name = name
        """"" is the unnamed one."""
        self._sleep = sleep

    async def ask(
        self,
        work: "Callable[[AsyncQdrantClient], Awaitable[T]]",
        payloads: Iterable[object] = (),
        *,
        doing: str = "",
    ) -> T:
        """Ask Qdrant as `Connection.ask` does; what passes is waited for. Raises QdrantFailure."""
        backoff = Backoff(MIN_WAIT_S, MAX_WAIT_S)
        for tried in range(1, MAX_TRIES + 1):
            try:
                return await self.qdrant.ask(work, payloads, doing=doing)
            except Unavailable as error:
                if tried == MAX_TRIES or isinstance(error, InUse):
                    raise
                wait_s = backoff.fail()
                wait_s = min(MAX_WAIT_S, error.retry_after_s or wait_s)
                log.warning("Qdrant: %s; trying again in %.0f s", error, wait_s)
                await self._sleep(wait_s)
        raise AssertionError("the last try returns or raises")

    async def pages(
        self, collection: str, size: int, offset: PointId | None = None, *, vectors: bool = False
    ) -> AsyncIterator[Page]:
        """Yield the pages of a collection in the order of ids, each of 1…`size` points."""
        while True:
            found, after = await self.ask(
                lambda client, offset=offset: client.scroll(  # type: ignore[misc]
                    collection, limit=size, offset=offset, with_payload=True, with_vectors=vectors
                )
            )
            offset = _id(after)
            if found:
                yield Page([self._point(record) for record in found], offset)
            if offset is None:
                return

    async def get_points(
        self, collection: str, ids: Sequence[PointId], *, vectors: bool = False
    ) -> dict[PointId, Point]:
        """Return the points of these ids that are there."""
        if not ids:
            return {}
        found = await self.ask(
            lambda client: client.retrieve(
                collection, list(ids), with_payload=True, with_vectors=vectors
            )
        )
        return {point.id: point for point in map(self._point, found)}

    async def sample(self, collection: str, most: int) -> list[Point]:
        """Return points drawn at random, with their vectors."""
        from qdrant_client import models  # noqa: PLC0415 - an extra, and slow to import

        query = models.SampleQuery(sample=models.Sample.RANDOM)
        found = await self.ask(
            lambda client: client.query_points(
                collection, query=query, limit=most, with_payload=True, with_vectors=True
            )
        )
        return [self._point(record) for record in found.points]

    async def nearest(self, collection: str, to: Vector, most: int) -> list[Point]:
        """Return what a search with this vector finds, the nearest first, with their vectors."""
        (numbers,) = vector.stack([to]).tolist()
        found = await self.ask(
            lambda client: client.query_points(
                collection,
                query=numbers,
                using=self.vector_name or None,
                limit=most,
                with_payload=False,
                with_vectors=True,
            )
        )
        return [self._point(record) for record in found.points]

    async def count(self, collection: str) -> int:
        """Return how many points there are, exactly."""
        return (await self.ask(lambda client: client.count(collection, exact=True))).count

    def _point(self, record: "Record | ScoredPoint") -> Point:
        found: object = record.vector
        others = None
        if isinstance(found, Mapping):
            others = {name: one for name, one in found.items() if name != self.vector_name}
            found = found.get(self.vector_name)
        numbers = vector.from_numbers(_floats(found)) if isinstance(found, Sequence) else None
        return Point(_id(record.id), record.payload or {}, numbers, others or None)


def _floats(numbers: Sequence[Any]) -> list[float]:
    """Return numbers as they are read from JSON, where a NaN is a null."""
    return [math.nan if number is None else float(number) for number in numbers]


def _id(found: object) -> Any:  # noqa: ANN401 - a number, a text, or None
    return found if found is None or isinstance(found, int) else str(found)


class TextSource:
    """A collection's texts and vectors, to be imported. The text is a field of the payload.

    `vector` names one of each point's vectors, and may be None where there is only one. The
    embedded mode, made for small collections, holds its folder in memory, and locks it meanwhile.
    """

    def __init__(self, location: str, text: str = "text", vector: str | None = None) -> None:
        self.name = location
        self._text = text
        self._collection, self._options = _place(location)
        with self._opened() as (runner, qdrant):
            self._vector = runner.run(_choose(qdrant, self._collection, vector))
            page = runner.run(_next(self._pages(qdrant)))
        payloads = [point.payload for point in page.points] if page else []
        if payloads and not any(text in payload for payload in payloads):
            there = listed(field for payload in payloads for field in payload) or "none"
            raise SourceError(f"the payloads of {location} have no field `{text}`; fields: {there}")

    def __iter__(self) -> Iterator[Pair | RejectedPair]:
        with self._opened() as (runner, qdrant):
            pages = self._pages(qdrant)
            while page := runner.run(_next(pages)):
                for point in page.points:
                    yield to_pair(f"point {point.id}", point.payload.get(self._text), point.vector)

    def _pages(self, qdrant: Connection) -> AsyncIterator[Page]:
        return CollectionReader(qdrant, self._vector).pages(self._collection, PAGE, vectors=True)

    @contextmanager
    def _opened(self) -> Iterator[tuple[asyncio.Runner, Connection]]:
        """Connect, or open the folder; what Qdrant fails with meanwhile becomes a SourceError."""
        try:
            with asyncio.Runner() as runner:
                qdrant = Connection(**self._options)
                runner.run(qdrant.__aenter__())
                try:
                    yield runner, qdrant
                finally:
                    runner.run(qdrant.close())
        except QdrantFailure as error:
            remedy = f" (see {API_KEY})" if isinstance(error, Denied) else ""
            raise SourceError(f"{self.name}: {error}{remedy}") from error


async def _next(pages: AsyncIterator[Page]) -> Page | None:
    return await anext(pages, None)


def _place(location: str) -> tuple[str, dict[str, Any]]:
    """Return the collection's name, and how the client gets there. Raises SourceError."""
    if location.startswith("qdrant+path:"):
        path = Path(location.removeprefix("qdrant+path:"))
        # The client would make the folder.
        if not (path.parent / "meta.json").is_file():
            raise SourceError(f"{path.parent} is no folder of Qdrant's embedded mode: no meta.json")
        return path.name, {"path": path.parent}
    try:
        url = urlsplit(location)
        port = url.port or 6333
    except ValueError as error:
        raise SourceError(f"{location}: {error}") from error
    if "@" in url.netloc:
        raise SourceError(f"a location holds no key: set {API_KEY} instead")
    gateway, _, name = url.path.rpartition("/")
    if not (url.hostname and name) or url.query or url.fragment:
        raise SourceError(f"{location} is not of the form qdrant://host:6333/collection")
    scheme = "https" if url.scheme == "qdrant+https" else "http"
    host = f"[{url.hostname}]" if ":" in url.hostname else url.hostname
    return unquote(name), {
        "url": f"{scheme}://{host}:{port}{gateway}",
        "api_key_env": API_KEY if os.environ.get(API_KEY) else None,
    }


async def _choose(qdrant: Connection, collection: str, name: str | None) -> str:
    """Return the name of the vector to take, "" for the unnamed one. Raises SourceError."""
    info = await qdrant.ask(lambda client: client.get_collection(collection))
    found = info.config.params.vectors
    vectors = found if isinstance(found, dict) else {"": found} if found else {}
    if name is None and len(vectors) == 1:
        (name,) = vectors
    wanted = f"vector `{name}`" if name else "unnamed vector"
    if (params := vectors.get(name or "")) is None:
        there = listed(vectors) or "none"
        raise SourceError(f"`{collection}` has no {wanted}; pick one of its vectors: {there}")
    if params.multivector_config:
        raise SourceError(f"the {wanted} of `{collection}` is a multivector: many for each text")
    if params.datatype and params.datatype.value != "float32":
        kind = params.datatype.value
        raise SourceError(f"`{collection}` keeps its {wanted} as {kind}: rounded, not as bought")
    return name or ""
