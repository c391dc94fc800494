"""From answers to points: what of a request goes to Qdrant, to which collection, under which ids.

A vector is indexed as it was answered: at the width that was asked for, in the space it is of, and
so in the collection of that space and width. What a model gives that stands in for another goes to
the collection of its own space, and nowhere if the collection was named for the first model.
A request with `Cache-Control: no-store` leaves no trace here either.
"""

import asyncio
import hashlib
import logging
import re
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any, Self

import orjson
from embedding_proxy.cache.cached_hit import Reusable
from embedding_proxy.cache.key import Key, Namespace, keyring
from embedding_proxy.index.client import Connection
from embedding_proxy.index.collection import (
    CollectionNames,
    CollectionOptions,
    conflicts,
    name_of,
)
from embedding_proxy.index.errors import Denied, QdrantFailure, Unavailable, UntrustedCertificate
from embedding_proxy.index.indexer import Indexer
from embedding_proxy.index.point import Point, Target, id_bytes
from embedding_proxy.providers.base import Outcome, Space, Vector, slices
from embedding_proxy.providers.dimensions import derive
from embedding_proxy.providers.errors import InvalidRequest
from embedding_proxy.proxy.config.index import Hnsw, Optimizers, Qdrant
from embedding_proxy.proxy.config.loader import ConfigError
from embedding_proxy.proxy.config.schema import Settings

from .cache_policy import parse_cache_control
from .embedding_result import Result
from .index_options import NO_INDEX_OPTIONS, IndexOptions

log = logging.getLogger("embedding_proxy.index")

GIB = 1 << 30
MIB = 1 << 20
_QDRANT = ("index", "qdrant")
LOOK_SECONDS = 5.0
"""How long the start waits to learn whether the collections belong to the models."""
# Points made on the event loop; more are made in a thread.
_INLINE = 32
# Points that go into the outbox in one transaction.
_POINTS_AT_A_TIME = 2048


def check_index_options(settings: Settings, options: IndexOptions) -> None:
    """Raise InvalidRequest for a request that wants indexing where there is none."""
    if settings.index.qdrant is not None or options is NO_INDEX_OPTIONS or not options.is_enabled:
        return
    raise InvalidRequest(
        "This proxy indexes nothing: set index.qdrant.url, or index.qdrant.path, in its"
        " configuration, or leave out the field 'index'.",
        param="index",
    )


def connection(qdrant: Qdrant) -> Connection:
    """Return a connection to the Qdrant of a configuration, not yet opened."""
    return Connection(
        url=qdrant.url,
        path=qdrant.path,
        api_key_env=qdrant.api_key_env,
        timeout_s=qdrant.timeout_s,
        ca_file=qdrant.ca_file,
        grpc_port=qdrant.grpc_port if qdrant.prefer_grpc else None,
    )


def collection_options(qdrant: Qdrant) -> CollectionOptions:
    """Return how collections are made."""
    return CollectionOptions(
        qdrant.on_disk,
        qdrant.quantization,
        qdrant.payload_indexes,
        qdrant.adopt_unlabeled,
        vector_name=qdrant.vector_name,
        sparse_vectors=qdrant.sparse_vectors,
        shard_number=qdrant.shard_number,
        replication_factor=qdrant.replication_factor,
        hnsw_config=_set_fields(qdrant.hnsw_config),
        optimizers_config=_set_fields(qdrant.optimizers_config),
    )


def collection_names(settings: Settings, qdrant: Qdrant) -> CollectionNames:
    """Return the names of the models' own collections; none where one is named for everything."""
    return CollectionNames(() if qdrant.collection else settings.models, qdrant.prefix)


def _set_fields(section: Hnsw | Optimizers | None) -> dict[str, object]:
    return {} if section is None else section.model_dump(exclude_none=True)


async def find_conflicts(settings: Settings, open_connection: Connection) -> list[str]:
    """Say why vectors may not go to the collections that are there. Raises QdrantFailure."""
    qdrant = settings.index.qdrant
    if qdrant is None:
        return []
    spaces = {name: entry.as_space().label for name, entry in settings.models.items()}
    return await conflicts(
        open_connection,
        spaces,
        collection_options(qdrant),
        collection=qdrant.collection,
        prefix=qdrant.prefix,
    )


class IndexWrites:
    """Indexes answers. Open it with `async with`."""

    def __init__(
        self,
        settings: Settings,
        qdrant: Qdrant,
        folder: Path,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self._settings = settings
        self._qdrant = qdrant
        self.names = collection_names(settings, qdrant)
        self.indexer = Indexer(
            folder,
            lambda: connection(qdrant),
            collection_options(qdrant),
            on_open=self._look,
            size_limit=int(qdrant.outbox_gib * GIB),
            max_bytes=qdrant.batch_mib * MIB,
            names=self.names,
            sleep=sleep,
        )

    async def __aenter__(self) -> Self:
        """Open the outbox and begin to send. Raises ConfigError.

        A Qdrant that cannot be reached is no error; a collection of another space is.
        """
        try:
            await self.indexer.__aenter__()
        except QdrantFailure as error:
            raise ConfigError(self._settings.problem(_QDRANT, str(error))) from error
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.indexer.__aexit__(*exc)

    async def _look(self, qdrant: Connection) -> None:
        """Refuse the start if a collection belongs to another space. Raises ConfigError."""
        try:
            async with asyncio.timeout(LOOK_SECONDS):
                against = await find_conflicts(self._settings, qdrant)
        except (Unavailable, Denied, UntrustedCertificate, TimeoutError) as error:
            log.warning("Qdrant at %s: %s; points wait on disk", qdrant, str(error) or "no answer")
            return
        if against:
            raise ConfigError(self._settings.problem(_QDRANT, against[0]))

    async def take(self, options: IndexOptions, control: str, result: Result) -> None:
        """Put what was answered into the outbox. Never raises; waits for the local disk only."""
        try:
            if options.is_enabled and result.inputs and not parse_cache_control(control).no_store:
                await self._take(options, result)
        except Exception:
            log.exception("an answer is not indexed")

    def knows(self, options: IndexOptions, result: Result) -> bool:
        """Tell whether each point of an answer is known to be in the outbox, or to have arrived.

        Of a request that names ids or a payload none is. Of one that indexes nothing each is.
        """
        if not options.is_enabled:
            return True
        keys, target = result.embedded.keys, self._target(options, result)
        if not keys or target is None or options.names_content:
            return False
        return self.indexer.knows_all(target, [key.address for key in keys])

    def reusable(self, again: Reusable, options: IndexOptions, result: Result) -> Reusable | None:
        """Return what gives an answer once more while its points are known; None if not all are."""
        if not self.knows(options, result):
            return None
        return (
            again
            if not options.is_enabled
            else _IndexBoundHit(self.indexer, self.indexer.epoch, again)
        )

    def _target(self, options: IndexOptions, result: Result) -> Target | None:
        """Return where the points of an answer go; None if nowhere."""
        named = options.collection or self._qdrant.collection
        if named and result.fallback:
            return None
        name = named or collection_of(result.name, result.space, result.dimensions, self._qdrant)
        return Target(name, result.space.label, result.dimensions)

    async def _take(self, options: IndexOptions, result: Result) -> None:
        target = self._target(options, result)
        if target is None:
            return
        keys: Sequence[Key] = result.embedded.keys
        if not keys:
            ring = keyring(result.space, Namespace(result.namespace))
            keys = await ring.keys(result.inputs)
        # Of equal ids the last counts, also where they are added one after the other.
        async for some in slices(range(len(keys)), _POINTS_AT_A_TIME):
            places = self._select_unindexed(options, result, keys, some, target)
            if places:
                points = partial(self._points, options, result, keys, places)
                few = len(places) <= _INLINE
                await self.indexer.add(target, points() if few else await asyncio.to_thread(points))

    def _select_unindexed(
        self,
        options: IndexOptions,
        result: Result,
        keys: Sequence[Key],
        places: Sequence[int],
        target: Target,
    ) -> Sequence[int]:
        """Return those of some places whose points are new, or not known to be indexed."""
        if options.names_content:
            return places
        outcomes, knows = result.outcomes, self.indexer.knows
        return [
            place
            for place in places
            if outcomes[place] is Outcome.MISS or not knows(target, keys[place].address)
        ]

    def _points(
        self,
        options: IndexOptions,
        result: Result,
        keys: Sequence[Key],
        places: Sequence[int],
    ) -> list[Point]:
        vectors = derive([result.embedded.vectors[place] for place in places], result.dimensions)
        now = datetime.now(UTC).isoformat(timespec="seconds").replace("+00:00", "Z")
        common = {
            "created_at": now,
            **({"namespace": result.namespace} if result.namespace else {}),
        }
        fixed = {
            "model": result.name,
            "space": result.space.label,
            "dimensions": result.dimensions,
        }
        points = []
        for place, numbers in zip(places, vectors, strict=True):
            item = result.inputs[place]
            content: dict[str, Any] = {"tokens": result.embedded.tokens[place]}
            if self._qdrant.store_text and isinstance(item, str):
                content["text"] = item
            # What the request gives counts, but for what tells whose vector it is.
            given = options.payload[place] if options.payload is not None else {}
            if options.group_id is not None:
                given = {**given, "group_id": options.group_id}
            sparse = options.sparse_vectors[place] if options.sparse_vectors is not None else None
            points.append(
                Point(
                    self._id(options, keys[place], place),
                    numbers,
                    orjson.dumps({**common, **content, **given, **fixed}),
                    plain=not options.names_content,
                    new=options.names_content or result.outcomes[place] is Outcome.MISS,
                    address=keys[place].address,
                    namespace=result.namespace,
                    digest=keys[place].digest,
                    vectors=orjson.dumps(sparse) if sparse else b"",
                    is_update=options.is_update,
                )
            )
        return points

    @staticmethod
    def _id(options: IndexOptions, key: Key, place: int) -> bytes:
        """Return the id of a point: what the request says, or what follows from its input."""
        if options.ids is not None:
            return id_bytes(options.ids[place])
        if options.group_id is None:
            return key.address
        # The same text of two groups is two points.
        told = key.address + str(options.group_id).encode()
        return hashlib.blake2b(told, digest_size=16).digest()


@dataclass(frozen=True, slots=True)
class _IndexBoundHit:
    """An answer that is given again for as long as its points are known."""

    indexer: Indexer
    epoch: int
    answer: Reusable

    async def vectors(self) -> Sequence[Vector] | None:
        return await self.answer.vectors() if self.indexer.epoch == self.epoch else None

    def count(self) -> None:
        self.answer.count()

    def reuse_of(self, vectors: Sequence[Vector]) -> Callable[[], bool] | None:
        reuse = self.answer.reuse_of(vectors)
        return None if reuse is None else lambda: self.indexer.epoch == self.epoch and reuse()


def collection_of(model: str, space: Space, dimensions: int, qdrant: Qdrant) -> str:
    """Return the collection of a space's vectors of a width, where none is named."""
    # Collections are named by a digest of the values, so the names stay as they were.
    told = re.search("[~?](.*)", space.former_label)
    return name_of(model, dimensions, parameters=told[1] if told else "", prefix=qdrant.prefix)
