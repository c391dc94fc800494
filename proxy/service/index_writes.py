"""From answers to points: what of a request goes to Qdrant, to which collection, under which ids.

A vector is indexed as it was answered: at the width that was asked for, in the space it is of, and
so in the collection of that space and width. What a model gives that stands in for another goes to
the collection of its own space, and nowhere if the collection was named for the first model.
A request with `Cache-Control: no-store` leaves no trace here either.
"""

import asyncio
import logging
import re
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any, Self

import orjson
from embedding_proxy.cache.cached_hit import Reusable
from embedding_proxy.cache.key import Key, Namespace, checksum, keyring
from embedding_proxy.index.client import Connection
from embedding_proxy.index.collection import CollectionOptions, conflicts, name_of
from embedding_proxy.index.errors import Denied, QdrantFailure, Unavailable
from embedding_proxy.index.indexer import Indexer
from embedding_proxy.index.point import Point, Target, id_bytes
from embedding_proxy.providers import vector
from embedding_proxy.providers.base import Outcome, Space, Vector
from embedding_proxy.providers.errors import InvalidRequest
from embedding_proxy.providers.slices import slices
from embedding_proxy.proxy.config.loader import ConfigError
from embedding_proxy.proxy.config.schema import Qdrant, Settings

from . import request
from .embedding_result import Result
from .request import NO_INDEX_OPTIONS, IndexOptions

log = logging.getLogger("embedding_proxy.index")

GIB = 1 << 30
MIB = 1 << 20
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
    )


def collection_options(qdrant: Qdrant) -> CollectionOptions:
    """Return how collections are made."""
    return CollectionOptions(
        qdrant.on_disk, qdrant.quantization, qdrant.payload_indexes, qdrant.adopt
    )


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
        self.indexer = Indexer(
            folder,
            lambda: connection(qdrant),
            collection_options(qdrant),
            on_open=self._look,
            size_limit=int(qdrant.outbox_gib * GIB),
            max_bytes=qdrant.batch_mib * MIB,
            sleep=sleep,
        )

    async def __aenter__(self) -> Self:
        """Open the outbox and begin to send. Raises ConfigError.

        A Qdrant that cannot be reached is no error; a collection of another space is.
        """
        try:
            await self.indexer.__aenter__()
        except QdrantFailure as error:
            raise ConfigError(f"index.qdrant: {error}") from error
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.indexer.__aexit__(*exc)

    async def _look(self, qdrant: Connection) -> None:
        """Refuse the start if a collection belongs to another space. Raises ConfigError."""
        try:
            async with asyncio.timeout(LOOK_SECONDS):
                against = await find_conflicts(self._settings, qdrant)
        except (Unavailable, Denied, TimeoutError) as error:
            log.warning("Qdrant at %s: %s; points wait on disk", qdrant, str(error) or "no answer")
            return
        if against:
            raise ConfigError(f"index.qdrant: {against[0]}")

    async def take(self, options: IndexOptions, control: str, result: Result) -> None:
        """Put what was answered into the outbox. Never raises; waits for the local disk only."""
        try:
            if (
                options.is_enabled
                and result.inputs
                and not request.parse_cache_control(control).no_store
            ):
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
        if not keys or target is None or options.ids is not None or options.payload is not None:
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
        if options.ids is not None or options.payload is not None:
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
        vectors = vector.derive(
            [result.embedded.vectors[place] for place in places], result.dimensions
        )
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
            content = {**content, **given, **fixed}
            mark = 0
            if options.ids is not None or options.payload is not None:
                mark = _mark(numbers, content)
            points.append(
                Point(
                    id_bytes(options.ids[place])
                    if options.ids is not None
                    else keys[place].address,
                    numbers,
                    orjson.dumps({**common, **content}),
                    mark,
                    new=result.outcomes[place] is Outcome.MISS,
                    address=keys[place].address,
                    namespace=result.namespace,
                )
            )
        return points


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


def _mark(numbers: bytes, content: Mapping[str, object]) -> int:
    """Return what tells this content from another; never 0."""
    told = checksum(numbers) + orjson.dumps(content, option=orjson.OPT_SORT_KEYS)
    return int.from_bytes(checksum(told), "big", signed=True) or 1
