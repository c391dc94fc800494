"""Imports from Qdrant: the texts and vectors of a collection's points.

A collection to import from is named in one of three ways, its own name always last::

    qdrant://localhost:6333/documents                  a server; the port is 6333 unless given
    qdrant+https://x.cloud.qdrant.io:6333/documents    the same over TLS
    qdrant+path:/var/data/qdrant/documents             a folder of the client's embedded mode

Between host and collection may stand the path under which a gateway serves Qdrant. The key of a
server is read from the environment, QDRANT_API_KEY, and stands in no location.
"""

import asyncio
import os
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from embedding_proxy.cache.maintenance.import_source import (
    Pair,
    RejectedPair,
    SourceError,
    quote_names,
    to_pair,
)
from embedding_proxy.index.client import Connection
from embedding_proxy.index.collection_reader import Page
from embedding_proxy.index.errors import Denied, QdrantFailure
from embedding_proxy.index.migration.points import Points
from embedding_proxy.index.migration.text_template import (
    Payload,
    Rule,
    TemplateError,
    readings_of,
)

API_KEY = "QDRANT_API_KEY"
SCHEMES = ("qdrant://", "qdrant+https://", "qdrant+path:")
"""How a location begins that is a collection."""
PAGE = 256


class TextSource:
    """A collection's texts and vectors, to be imported. Everything raises SourceError.

    The text is a field of the payload, or what `rule` makes of it. `vector` names one of each
    point's vectors, and may be None where there is only one. The embedded mode, made for small
    collections, holds its folder in memory, and locks it meanwhile.
    """

    def __init__(
        self,
        location: str,
        text: str = "text",
        vector: str | None = None,
        rule: Rule | None = None,
    ) -> None:
        self.name = location
        self._text = text
        self._rule = rule
        self._collection, self._options = _parse_location(location)
        with self._open() as (runner, qdrant):
            self._vector = runner.run(_choose(qdrant, self._collection, vector))
            page = runner.run(_next(self._pages(qdrant)))
        payloads = [point.payload for point in page.points] if page else []
        if payloads and not any(self._has_text(payload) for payload in payloads):
            names = quote_names(field for payload in payloads for field in payload) or "none"
            what = f"no text for {rule.source}" if rule else f"no field `{text}`"
            ready = readings_of(payloads)
            hint = f"; --text-by {ready[0]} reads them" if ready else ""
            raise SourceError(f"the payloads of {location} have {what}; fields: {names}{hint}")

    def _has_text(self, payload: Payload) -> bool:
        return self._text in payload if self._rule is None else self._value(payload) is not None

    def _value(self, payload: Payload) -> object:
        return payload.get(self._text) if self._rule is None else self._rule.text(payload)

    def __iter__(self) -> Iterator[Pair | RejectedPair]:
        with self._open() as (runner, qdrant):
            pages = self._pages(qdrant)
            while page := runner.run(_next(pages)):
                for point in page.points:
                    yield to_pair(f"point {point.id}", self._value(point.payload), point.vector)

    def _pages(self, qdrant: Connection) -> AsyncIterator[Page]:
        return Points(qdrant, self._vector).pages(self._collection, PAGE, vectors=True)

    @contextmanager
    def _open(self) -> Iterator[tuple[asyncio.Runner, Connection]]:
        """Connect, or open the folder; what Qdrant fails with meanwhile becomes a SourceError."""
        try:
            with asyncio.Runner() as runner:
                qdrant = Connection(**self._options)
                runner.run(qdrant.__aenter__())
                try:
                    yield runner, qdrant
                finally:
                    runner.run(qdrant.close())
        except Denied as error:
            has_key = self._options.get("api_key_env") is not None
            where = f"the key is in {API_KEY}" if has_key else f"{API_KEY} is not set"
            raise SourceError(f"{self.name}: {error} ({where})") from error
        except (QdrantFailure, TemplateError) as error:
            raise SourceError(f"{self.name}: {error}") from error


async def _next(pages: AsyncIterator[Page]) -> Page | None:
    return await anext(pages, None)


def _parse_location(location: str) -> tuple[str, dict[str, Any]]:
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
    config = info.config.params.vectors
    vectors = config if isinstance(config, dict) else {"": config} if config else {}
    if name is None and len(vectors) == 1:
        (name,) = vectors
    description = f"vector `{name}`" if name else "unnamed vector"
    if (params := vectors.get(name or "")) is None:
        names = quote_names(vectors) or "none"
        raise SourceError(f"`{collection}` has no {description}; pick one of its vectors: {names}")
    if params.multivector_config:
        raise SourceError(
            f"the {description} of `{collection}` is a multivector: many for each text"
        )
    if params.datatype and params.datatype.value != "float32":
        kind = params.datatype.value
        raise SourceError(
            f"`{collection}` keeps its {description} as {kind}: rounded, not as bought"
        )
    return name or ""
