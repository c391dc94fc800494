"""What a migration does in Qdrant: writes points, makes collections and switches aliases.

A point is written with its new vector; its other vectors stay as they are.
"""

import contextlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from embedding_proxy.index.collection import (
    KEY,
    LONGEST_NAME,
    Provenance,
    collection_aliases,
    name_of,
    provenance_of,
)
from embedding_proxy.index.collection_reader import CollectionReader, Point, PointId
from embedding_proxy.index.errors import Exists, Missing, OtherSpace, Rejected
from embedding_proxy.providers import vector

if TYPE_CHECKING:
    from qdrant_client.models import CollectionInfo, PointStruct

WRITE_BYTES = 4_000_000
"""About how many bytes of JSON one write has; servers take 32 MiB, gateways may take less."""
_BYTES_A_NUMBER = 12
"""About the size of a float32 in JSON."""


class Points(CollectionReader):
    """Reads and writes the points of collections; `name` is that of the migrated vector."""

    async def write(
        self, collection: str, points: Sequence[Point], *, only_new: bool = False
    ) -> None:
        """Write points and return when they can be read. `only_new` keeps points that exist.

        A server before 1.17 does not support `only_new`; so callers check first which points exist.
        """
        from qdrant_client import models  # noqa: PLC0415 - an extra, and slow to import

        # Older versions of the package lack it; then the check of the caller must do.
        modes = getattr(models, "UpdateMode", None)
        options = {"update_mode": modes.INSERT_ONLY} if only_new and modes else {}
        for some in _in_writes(points):
            structs = [self._struct(point) for point in some]
            await self.ask(
                lambda client, structs=structs: client.upsert(  # type: ignore[misc]
                    collection, structs, wait=True, **options
                ),
                [point.payload for point in some],
            )

    async def delete(self, collection: str, ids: Sequence[PointId]) -> None:
        """Delete points, and return when they are gone."""
        if ids:
            await self.ask(lambda client: client.delete(collection, list(ids), wait=True))

    def _struct(self, point: Point) -> "PointStruct":
        from qdrant_client import models  # noqa: PLC0415 - an extra, and slow to import

        assert point.vector is not None  # noqa: S101 - no point is written without one
        (numbers,) = vector.stack([point.vector]).tolist()
        every: Any = numbers
        if self.vector_name or point.others:
            every = {**(point.others or {}), self.vector_name: numbers}
        return models.PointStruct(id=point.id, payload=dict(point.payload), vector=every)


def _in_writes(points: Sequence[Point]) -> Iterator[list[Point]]:
    """Split points into writes of about WRITE_BYTES at most, and one point at least."""
    some: list[Point] = []
    size = 0
    for point in points:
        own = len(point.vector or b"") // 4 * _BYTES_A_NUMBER
        own += len(json.dumps(point.payload, default=str)) + sum(
            _BYTES_A_NUMBER * len(one) for one in (point.others or {}).values() if type(one) is list
        )
        if some and size + own > WRITE_BYTES:
            yield some
            some, size = [], 0
        some.append(point)
        size += own
    if some:
        yield some


@dataclass(frozen=True, slots=True)
class SourceCollection:
    """A collection that is to be migrated."""

    name: str
    """Its own name, never an alias."""
    vector: str
    """The name of the vector that is migrated; "" is the unnamed one."""
    width: int
    distance: str
    """Cosine, Dot, Euclid or Manhattan."""
    provenance: Provenance | None
    points: int
    others: bool
    """Whether its points may have further vectors."""


async def real_name(points: Points, name: str) -> str:
    """Return a collection's own name, given that or an alias. Raises Missing."""
    real = (await collection_aliases(points)).get(name)
    if real is not None:
        return real
    if await exists(points, name):
        return name
    raise Missing(f"there is no collection or alias `{name}` in {points.qdrant}")


async def exists(points: Points, name: str) -> bool:
    """Return whether there is a collection, or an alias of one, of this name."""
    return await points.ask(lambda client: client.collection_exists(name))


async def look(points: Points, name: str, vector: str | None = None) -> SourceCollection:
    """Return the description of a collection; `vector` picks one of several vectors.

    Raises Missing, and Rejected for one that cannot be migrated.
    """
    real = await real_name(points, name)
    info = await _info(points, real)
    params = info.config.params
    if params.sharding_method is not None and str(params.sharding_method.value) == "custom":
        raise Rejected(f"{real} is sharded by keys of its own, which is not supported")
    found: Any = params.vectors
    there = dict(found) if isinstance(found, Mapping) else {"": found} if found else {}
    chosen = vector if vector is not None else next(iter(there)) if len(there) == 1 else None
    if chosen is None or chosen not in there:
        names = ", ".join(one or "the unnamed one" for one in there) or "none"
        raise Rejected(f"pick one of the vectors of {real} with --vector: {names}")
    one = there[chosen]
    if one.multivector_config:
        raise Rejected(f"{real} has a multivector, many for each point, which cannot be migrated")
    count = await points.count(real)
    distance = str(one.distance.value)
    others = len(there) > 1 or bool(params.sparse_vectors)
    return SourceCollection(
        real, chosen, int(one.size), distance, provenance_of(info), count, others
    )


def target_name(source: str, model: str, dimensions: int) -> str:
    """Return the name of the new collection.

    >>> target_name("docs", "mistral/mistral-embed", 1024)
    'docs__mistral_mistral-embed-1024'
    >>> target_name("docs__mistral_mistral-embed-1024", "m", 8)
    'docs__m-8'
    >>> target_name("docs__m-8", "m", 8), target_name("docs__m-8-2", "m", 8)
    ('docs__m-8-2', 'docs__m-8')
    """
    stem = re.sub(r"(?<=.)__.*", "", source, flags=re.DOTALL)
    tail = name_of(model, dimensions, prefix="__")
    name = stem[: LONGEST_NAME - len(tail)] + tail
    return name if name != source else f"{name}-2"


async def make_target(points: Points, old: SourceCollection, name: str, wanted: Provenance) -> None:
    """Make the new collection like the old one but for the width, with its payload indexes.

    An existing one is used if it says that it holds these vectors, or if it was made by this
    migration (an interrupted one). Raises OtherSpace, QdrantFailure.
    """
    info = await _info(points, old.name)
    config = _config_like(info, old, wanted)
    if not await exists(points, name):
        with contextlib.suppress(Exists):  # an attempt before, whose answer was lost
            await points.ask(lambda client: client.create_collection(name, **config))
    made = await _info(points, name)
    found = provenance_of(made)
    if found is not None and (found.space, found.dimensions) != (wanted.space, wanted.dimensions):
        raise OtherSpace(f"{name} holds vectors of {found}, and not of {wanted}; see --into")
    if _width(made, old.vector) != wanted.dimensions:
        raise OtherSpace(f"{name} has other vectors than {wanted}; see --into")
    for field, schema in info.payload_schema.items():
        if field not in made.payload_schema:
            kind: Any = schema.params or schema.data_type
            await points.ask(
                lambda client, field=field, kind=kind: client.create_payload_index(  # type: ignore[misc]
                    name, field, kind, wait=True
                )
            )


async def owner(points: Points, name: str) -> tuple[Provenance | None, int] | None:
    """Return the provenance and the number of points of a collection; None if there is none."""
    if not await exists(points, name):
        return None
    return provenance_of(await _info(points, name)), await points.count(name)


async def aliases_of(points: Points, name: str) -> list[str]:
    """Return the aliases of a collection, sorted."""
    found = await collection_aliases(points)
    return sorted(alias for alias, real in found.items() if real == name)


async def switch(points: Points, to: str, aliases: Sequence[str]) -> None:
    """Point all these aliases, also new ones, to a collection in one atomic step."""
    from qdrant_client import models  # noqa: PLC0415 - an extra, and slow to import

    there = await collection_aliases(points)
    operations: list[Any] = []
    for alias in aliases:
        if alias in there:
            gone = models.DeleteAlias(alias_name=alias)
            operations.append(models.DeleteAliasOperation(delete_alias=gone))
        new = models.CreateAlias(collection_name=to, alias_name=alias)
        operations.append(models.CreateAliasOperation(create_alias=new))
    if operations:
        await points.ask(lambda client: client.update_collection_aliases(operations))


async def delete(points: Points, name: str) -> None:
    """Delete a collection if it exists."""
    if await exists(points, name):
        await points.ask(lambda client: client.delete_collection(name))


async def _info(points: Points, name: str) -> "CollectionInfo":
    return await points.ask(lambda client: client.get_collection(name))


def _width(info: "CollectionInfo", vector: str) -> int:
    found: Any = info.config.params.vectors
    one = found.get(vector) if isinstance(found, Mapping) else None if vector else found
    return int(one.size) if one else 0


def _config_like(
    info: "CollectionInfo", old: SourceCollection, wanted: Provenance
) -> dict[str, Any]:
    """Return the configuration of an existing collection with another width of one vector."""
    from qdrant_client import models  # noqa: PLC0415 - an extra, and slow to import

    config, params = info.config, info.config.params
    found: Any = params.vectors

    def widened(name: str, one: Any) -> Any:  # noqa: ANN401 - VectorParams
        size = wanted.dimensions if name == old.vector else one.size
        return one.model_copy(update={"size": size})

    if isinstance(found, Mapping):
        vectors: Any = {name: widened(name, one) for name, one in found.items()}
    else:
        vectors = widened("", found)
    hnsw = models.HnswConfigDiff(**_fields_of(config.hnsw_config, models.HnswConfigDiff))
    optimizers = models.OptimizersConfigDiff(
        **_fields_of(config.optimizer_config, models.OptimizersConfigDiff)
    )
    old_metadata = {k: v for k, v in (config.metadata or {}).items() if k != KEY}
    made = {
        "vectors_config": vectors,
        "sparse_vectors_config": params.sparse_vectors,
        "shard_number": params.shard_number,
        "replication_factor": params.replication_factor,
        "write_consistency_factor": params.write_consistency_factor,
        "on_disk_payload": params.on_disk_payload,
        "hnsw_config": hnsw,
        "optimizers_config": optimizers,
        "quantization_config": config.quantization_config,
        "metadata": {**old_metadata, **wanted.as_metadata()},
    }
    return {key: value for key, value in made.items() if value is not None}


def _fields_of(config: Any, model: Any) -> dict[str, Any]:  # noqa: ANN401 - pydantic models, or None
    """Return the values of a configuration that are fields of `model`."""
    values = {} if config is None else config.model_dump(exclude_none=True)
    return {key: value for key, value in values.items() if key in model.model_fields}
