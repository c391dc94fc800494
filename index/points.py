"""The points of a Qdrant collection as pairs of text and vector. Only this imports qdrant_client.

A collection is named in one of three ways, its own name always last::

    qdrant://localhost:6333/documents                  a server; the port is 6333 unless given
    qdrant+https://x.cloud.qdrant.io:6333/documents    the same over TLS
    qdrant+path:/var/data/qdrant/documents             a folder of the client's embedded mode

Between host and collection may stand the path under which a gateway serves Qdrant. The key of a
server is read from the environment, QDRANT_API_KEY, and stands in no location.

A server scales the vectors of a cosine collection to length 1 when it stores them, in float32. They
come back with other last bits if the model's vectors have length 1, and as other vectors if not.
A folder keeps them as they were given.
"""

import os
import sqlite3
import warnings
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote, urlsplit

from cache.maintenance.import_source import Pair, Refused, SourceError, listed, to_pair

if TYPE_CHECKING:
    from qdrant_client import QdrantClient
    from qdrant_client.models import Record

API_KEY = "QDRANT_API_KEY"
SCHEMES = ("qdrant://", "qdrant+https://", "qdrant+path:")
"""How a location begins that is a collection."""

_PAGE = 256
_TIMEOUT = 60
"""Seconds for one page: some megabytes, perhaps from far away."""


class Points:
    """A collection's points, read in pages. The text is a field of the payload.

    `vector` names one of each point's vectors, and may be None where there is only one. The
    embedded mode, made for small collections, holds its folder in memory, and locks it meanwhile.
    """

    def __init__(self, location: str, text: str = "text", vector: str | None = None) -> None:
        self.name = location
        self._text = text
        self._collection, self._options = _place(location)
        with self._client() as client:
            self._vector = _choose(client, self._collection, vector)
            points, _ = self._page(client, None)
        payloads = [point.payload or {} for point in points]
        if payloads and not any(text in payload for payload in payloads):
            there = listed(field for payload in payloads for field in payload) or "none"
            raise SourceError(f"the payloads of {location} have no field `{text}`; fields: {there}")

    def __iter__(self) -> Iterator[Pair | Refused]:
        after: Any = None
        with self._client() as client:
            while True:
                points, after = self._page(client, after)
                for point in points:
                    vector: object = point.vector
                    if isinstance(vector, Mapping):
                        vector = vector.get(self._vector)
                    text = (point.payload or {}).get(self._text)
                    yield to_pair(f"point {point.id}", text, vector)
                if after is None:
                    return

    def _page(self, client: "QdrantClient", after: Any) -> tuple[list["Record"], Any]:  # noqa: ANN401 - an id or nothing
        vectors = [self._vector] if self._vector else True
        return client.scroll(self._collection, limit=_PAGE, offset=after, with_vectors=vectors)

    @contextmanager
    def _client(self) -> Iterator["QdrantClient"]:
        """Connect, or open the folder; what the library raises meanwhile becomes a SourceError."""
        try:
            from qdrant_client import QdrantClient  # noqa: PLC0415 - an extra, and slow to import
            from qdrant_client.common.client_exceptions import QdrantException  # noqa: PLC0415
            from qdrant_client.http.exceptions import ApiException  # noqa: PLC0415
        except ImportError as error:
            remedy = "pip install 'qdrant-client>=1.16'"
            raise SourceError(f"Qdrant needs more: {remedy}") from error
        known = (ApiException, QdrantException, OSError, RuntimeError, ValueError, sqlite3.Error)
        try:
            # It warns of large folders and of a key without TLS; both were the user's choice.
            with warnings.catch_warnings(action="ignore"):
                client = QdrantClient(**self._options)
            with closing(client):
                yield client
        except known as error:
            what = {
                401: f"a key is needed: set {API_KEY}",
                403: f"the key is refused: see {API_KEY}",
                404: f"there is no collection `{self._collection}`",
            }.get(getattr(error, "status_code", None) or 0, " ".join(str(error).split()))
            raise SourceError(f"{self.name}: {what}") from error


def _place(location: str) -> tuple[str, dict[str, Any]]:
    """Return the collection's name, and how the client gets there. Raises SourceError."""
    if location.startswith("qdrant+path:"):
        path = Path(location.removeprefix("qdrant+path:"))
        # The client would make the folder.
        if not (path.parent / "meta.json").is_file():
            raise SourceError(f"{path.parent} is no folder of Qdrant's embedded mode: no meta.json")
        return path.name, {"path": str(path.parent), "force_disable_check_same_thread": True}
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
        "api_key": os.environ.get(API_KEY) or None,
        "timeout": _TIMEOUT,
        "check_compatibility": False,
    }


def _choose(client: "QdrantClient", collection: str, name: str | None) -> str:
    """Return the name of the vector to take, "" for the unnamed one. Raises SourceError."""
    found = client.get_collection(collection).config.params.vectors
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
